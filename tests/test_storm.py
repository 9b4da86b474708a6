"""The storm and the start-up measurement: what they call a fault, on a small HTTP server; and a real storm."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from benchmarks import startup
from benchmarks.storm import (
    NEAR_TIE,
    Storm,
    Stream,
    difference,
    examine,
    kernels_ready,
    log_problems,
    storm_seconds,
    stream,
)


def event(token: str, rival: float = -3.0) -> bytes:
    logprobs = {"tokens": [token], "top_logprobs": [{token: -1.0, "rival": rival}]}
    return b"data: " + json.dumps({"choices": [{"text": token, "logprobs": logprobs}]}).encode() + b"\n\n"


DONE = b"data: [DONE]\n\n"
ANSWERS = {
    "good": [event("a"), event("b"), DONE],
    "near": [event("a"), event("rival"), DONE],
    "short": [event("a"), DONE],
    "cut": [event("a"), event("b")],
    "error": [event("a"), b'data: {"error": {"message": "engine died"}}\n\n'],
    "garbage": [b"data: {{\n\n"],
}


class Handler(BaseHTTPRequestHandler):
    """Streams the answer that the model's name asks for, or an HTTP error."""

    def do_POST(self) -> None:  # noqa: N802, the name is http.server's
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if asked["model"] == "refused":
            self.send_error(503)
            return
        self.send_response(200)
        self.end_headers()
        for part in ANSWERS[asked["model"]]:
            self.wfile.write(part)

    def log_message(self, *arguments: object) -> None:
        """Say nothing."""


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


@pytest.mark.parametrize(
    ("model", "failure"),
    [
        ("good", ""),
        ("short", "1 of 2 tokens, ended with [DONE]"),
        ("cut", "2 of 2 tokens, not ended with [DONE]"),
        ("error", 'ValueError: {"message": "engine died"}'),
        ("garbage", "JSONDecodeError: "),
        ("refused", "HTTPError: HTTP Error 503"),
    ],
)
def test_stream_that_does_not_end_as_asked_is_a_failure(url: str, model: str, failure: str) -> None:
    got = stream(url, model, "x", 2)
    assert got.failure.startswith(failure) and bool(got.failure) == bool(failure)


def test_server_that_is_not_there_is_a_failure() -> None:
    assert "refused" in stream("http://127.0.0.1:1", "good", "x", 2).failure


def test_another_answer_is_right_only_at_a_near_tie(url: str) -> None:
    good, near = stream(url, "good", "x", 2), stream(url, "near", "x", 2)
    assert difference(good, good) == 0
    assert difference(good, near) == pytest.approx(2.0)
    good.alternatives[1]["rival"] = -1.0 - NEAR_TIE / 2
    assert difference(good, near) == pytest.approx(NEAR_TIE / 2)


def test_what_is_wrong_is_counted(url: str) -> None:
    storm = Storm(url, "good", 8, 0, 10, 2)
    before = stream(url, "good", "x", 2)
    storm.fixed = [stream(url, model, "x", 2) for model in ("good", "near")]
    storm.done = [stream(url, "good", "x", 2), stream(url, "cut", "x", 2), Stream(failure="timed out")]
    row, problems = examine(storm, before, before)
    assert (row["streams"], row["failed"], row["fixed_asked"], row["fixed_same"]) == (5, 2, 3, 2)
    assert sorted(problem.partition(":")[0] for problem in problems) == [
        "1 answers of the fixed prompt are wrong, the worst by 2.00",
        "1 streams",
        "1 streams",
    ]
    assert examine(storm, Stream(failure="refused"), Stream(failure="refused"))[1][-1].startswith("the fixed prompt")


@pytest.mark.parametrize(
    ("deadline", "passed", "seconds"),
    [(None, 500, 120), (300, 100, 120), (300, 180, 120), (300, 240, 60), (300, 299.5, 1), (300, 400, 1)],
)
def test_storm_ends_at_its_deadline(deadline: float | None, passed: float, seconds: float) -> None:
    assert storm_seconds(2, deadline, passed) == seconds


def test_log_is_read() -> None:
    log = (
        "INFO 36 kernels ready in 9.8 s: 6 from the cache, 30 compiled\n"
        "DEBUG 11-24 [x.py:1] Traceback (most recent call last):\n"
        "WARNING kernel gemm was not made ready before serving and is compiled now, which stalls requests; and\n"
    )
    assert kernels_ready(log) == {"kernels": 36, "seconds": 9.8, "cached": 6, "compiled": 30}
    assert kernels_ready("") is None
    (problem,) = log_problems(log)
    assert "compiled now" in problem


def test_start_beyond_its_limits_is_named() -> None:
    def row(start: str, seconds: float, compiled: int) -> dict:
        kernels = {"kernels": 36, "seconds": seconds, "cached": 36 - compiled, "compiled": compiled}
        return {"start": start, "kernels": kernels, "summary": "12 of 12", "faults": []}

    fine = [row("cold", 14.0, 36), row("warm", 0.5, 0)]
    assert startup.problems_of(fine, True) == []
    assert len(startup.problems_of([row("cold", 16.0, 36), row("warm", 1.5, 1)], True)) == 3
    silent = {"start": "warm", "kernels": None, "summary": None, "faults": ["a traceback"]}
    assert len(startup.problems_of([silent], True)) == 3 and len(startup.problems_of([silent], False)) == 2


@pytest.mark.vllm
def test_two_hundred_streams_at_once(tmp_path: Path) -> None:
    out = tmp_path / "storm.json"
    command = [sys.executable, "-m", "benchmarks.storm", "--minutes", "0.2", "--streams", "200", "--max-tokens", "8"]
    done = subprocess.run(
        [*command, "--out", str(out), "--log", str(tmp_path / "server.log")],
        capture_output=True,
        text=True,
        timeout=500,
        cwd=Path(__file__).parents[1],
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (row,) = json.loads(out.read_text())["rows"]
    assert row["most_in_flight"] == 200 and row["failed"] == 0 and row["streams"] >= 200
