"""A request storm: many concurrent streams against `vllm serve` for some minutes, and a fixed prompt among them.

    python -m benchmarks.storm --minutes 10 --streams 256
    python -m benchmarks.storm --url http://127.0.0.1:8000 --model NAME    # a server that runs already

Every stream has to end with [DONE] and as many tokens as it asked for. The fixed prompt is asked alone before and after
the storm and all the time during it: greedy and never batched with the same neighbours twice. An answer that differs
from the first one has to part from it at a near tie. With a server of its own the script also reads the server's log:
nothing compiled after it was ready, no traceback. Exits with status 1 and the reasons if anything was wrong.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import sys
import tempfile
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks import ROOT, results
from demo.architectures import SIZES
from demo.checkpoint import write_checkpoint
from demo.server import DemoError, Server
from fp8_backend.measure.child import stop_children_on_signals
from fp8_backend.measure.environment import environment, write_json

PROMPT = "once upon a time there was a young dog"
FIXED_TOKENS = 24
# Greedy text parts where two tokens are nearly equal and another batch size rounds another way; see demo.run.NEAR_TIE.
NEAR_TIE = 0.2
STREAM_LIMIT_S = 180  # without a byte from the server
ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
FAULTS = re.compile(r"Traceback|compiled now, which stalls|CUDA error|EngineDeadError")
WARM_UP = re.compile(
    r"(?P<kernels>\d+) kernels ready in (?P<seconds>[\d.]+) s: "
    r"(?P<cached>\d+) from the cache, (?P<compiled>\d+) compiled"
)
COUNTERS = re.compile(r"process \d+: (calls: .*)")
_opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # never through a proxy to this machine


@dataclass
class Stream:
    """What one streamed completion gave: tokens and, at each, the likeliest alternatives; or why it did not end."""

    tokens: list[str] = field(default_factory=list)
    alternatives: list[dict[str, float]] = field(default_factory=list)
    failure: str = ""
    seconds: float = 0.0
    first_token_s: float = 0.0


def stream(url: str, model: str, prompt: str | list[int], max_tokens: int) -> Stream:
    """Read one greedy /v1/completions stream to its end; a failure is part of the result."""
    body = {
        "model": model,
        "prompt": prompt,
        "max_tokens": max_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "logprobs": 5,
        "return_tokens_as_token_ids": True,
        "stream": True,
    }
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(f"{url}/v1/completions", json.dumps(body).encode(), headers)
    got, begin, ended = Stream(), time.monotonic(), False
    try:
        with _opener.open(request, timeout=STREAM_LIMIT_S) as response:
            for line in response:
                data = line.removeprefix(b"data:").strip()
                if data == b"[DONE]":
                    ended = True
                elif data:
                    _take(got, json.loads(data))
                    got.first_token_s = got.first_token_s or time.monotonic() - begin
    except (OSError, ValueError) as error:
        got.failure = f"{type(error).__name__}: {error}"
    got.seconds = time.monotonic() - begin
    if not got.failure and not (ended and len(got.tokens) == max_tokens):
        got.failure = f"{len(got.tokens)} of {max_tokens} tokens, {'' if ended else 'not '}ended with [DONE]"
    return got


def _take(got: Stream, event: dict[str, Any]) -> None:
    if "error" in event:
        raise ValueError(json.dumps(event["error"]))
    for choice in event["choices"]:
        if logprobs := choice.get("logprobs"):
            got.tokens += logprobs["tokens"]
            got.alternatives += logprobs["top_logprobs"]


def difference(expected: Stream, got: Stream) -> float:
    """Return by how much the expected answer preferred its token where the other parts from it; 0 if none does."""
    for position, (right, other) in enumerate(zip(expected.tokens, got.tokens, strict=True)):
        if right != other:
            alternatives = expected.alternatives[position]
            return alternatives[right] - alternatives.get(other, float("-inf"))
    return 0.0


class Storm:
    """`streams` threads that ask without pause until `seconds` are over, one in 16 of the requests the fixed prompt."""

    def __init__(self, url: str, model: str, streams: int, seconds: float, vocab: int, max_tokens: int) -> None:
        self.url, self.model, self.vocab, self.max_tokens = url, model, vocab, max_tokens
        self.streams, self.end = streams, time.monotonic() + seconds
        self.lock = threading.Lock()
        self.done: list[Stream] = []
        self.fixed: list[Stream] = []
        self.in_flight = self.most_in_flight = 0

    def run(self) -> None:
        """Ask until the time is over; return when the last stream has ended or been given up."""
        threads = [threading.Thread(target=self._work, args=(index,), daemon=True) for index in range(self.streams)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def _work(self, index: int) -> None:
        numbers = random.Random(index)
        while time.monotonic() < self.end:
            with self.lock:
                self.in_flight += 1
                self.most_in_flight = max(self.most_in_flight, self.in_flight)
            if fixed := numbers.random() < 1 / 16:
                got = stream(self.url, self.model, PROMPT, FIXED_TOKENS)
            else:
                length, tokens = numbers.randint(1, 200), numbers.randint(1, self.max_tokens)
                prompt = [numbers.randrange(5, self.vocab) for _ in range(length)]
                got = stream(self.url, self.model, prompt, tokens)
            with self.lock:
                self.in_flight -= 1
                (self.fixed if fixed else self.done).append(got)


def examine(storm: Storm, before: Stream, after: Stream) -> tuple[dict[str, Any], list[str]]:
    """Return the row of a storm and one line for everything that was wrong."""
    every = [*storm.done, *storm.fixed]
    failures = Counter(found.failure for found in [*every, before, after] if found.failure)
    problems = [f"{count} streams: {failure}" for failure, count in failures.most_common(10)]
    answered = [found for found in [*storm.fixed, after] if not found.failure]
    gaps = [difference(before, found) for found in answered] if not before.failure else []
    if wrong := [gap for gap in gaps if not gap <= NEAR_TIE]:
        problems.append(f"{len(wrong)} answers of the fixed prompt are wrong, the worst by {max(wrong):.2f}")
    if not gaps:
        problems.append("the fixed prompt was never answered")
    tokens = sum(len(found.tokens) for found in every)
    waits = sorted(found.first_token_s for found in every if not found.failure) or [0.0]
    row = {
        "streams": len(every),
        "most_in_flight": storm.most_in_flight,
        "failed": sum(failures.values()),
        "tokens": tokens,
        "fixed_asked": len(gaps),
        "fixed_same": sum(gap == 0 for gap in gaps),
        "fixed_near_ties": sum(0 < gap <= NEAR_TIE for gap in gaps),
        "first_token_s_median": round(waits[len(waits) // 2], 2),
        "first_token_s_max": round(waits[-1], 2),
    }
    return row, problems


def storm_seconds(minutes: float, deadline: float | None, passed: float) -> float:
    """Return how long a storm may take that ends `deadline` seconds after the start, of which `passed` are over."""
    return minutes * 60 if deadline is None else max(1.0, min(minutes * 60, deadline - passed))


def kernels_ready(log: str) -> dict[str, float] | None:
    """Return what the warm-up's line says: kernels, seconds, cached, compiled; None where there is no such line."""
    found = WARM_UP.search(log)
    return {key: float(value) for key, value in found.groupdict().items()} if found else None


def log_problems(log: str) -> list[str]:
    """Return the lines of a server's log that a healthy server does not write."""
    lines = [line for line in log.splitlines() if FAULTS.search(line) and not re.search(r"\bDEBUG\b", line)]
    return [f"the server's log: {line[-300:]}" for line in lines[:5]]


@contextmanager
def served(options: argparse.Namespace) -> Iterator[tuple[str, str, Server | None]]:
    """Yield (url, model, server) of the server to attack; one of our own is stopped afterwards."""
    if options.url:
        yield options.url, options.model, None
        return
    with tempfile.TemporaryDirectory(prefix="fp8-storm-") as name:
        folder = Path(name) / "model"
        write_checkpoint(folder, options.architecture, SIZES[options.architecture, options.size])
        arguments = ["--quantization", "deepgemm_fp8", "--max-model-len", "512", "--max-num-seqs", "256"]
        variables = {**ENVIRONMENT, "VLLM_LOGGING_LEVEL": "DEBUG"}
        if torch.cuda.is_available():
            sizes = json.dumps({"cudagraph_capture_sizes": [1, 8, 64, 256]})
            arguments += ["--gpu-memory-utilization", "0.3", "--kv-cache-memory-bytes", str(8 << 30)]
            arguments += ["--compilation-config", sizes]
        else:
            arguments += ["--enforce-eager"]
            variables["VLLM_CPU_KVCACHE_SPACE"] = "1"  # in GiB
        with Server(folder, options.log, arguments, variables, options.start_limit) as server:
            yield server.url, str(folder), server


def main() -> None:
    """Run the storm and report."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.storm", description=__doc__)
    parser.add_argument("--url", help="of a running server; by default one is started with a generated model")
    parser.add_argument("--model", help="the name it serves; with --url")
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--deadline", type=float, metavar="S", help="the storm ends earlier, this long after the start")
    parser.add_argument("--streams", type=int, default=200, help="at once")
    parser.add_argument("--max-tokens", type=int, default=64, help="most tokens of one answer")
    parser.add_argument("--vocab", type=int, default=1000, help="token ids of prompts are below this")
    parser.add_argument("--architecture", default="qwen3", choices=sorted({name for name, _ in SIZES}))
    parser.add_argument("--size", default="demo", choices=["demo", "large"])
    parser.add_argument("--start-limit", type=float, default=300, help="seconds until the server must answer")
    parser.add_argument("--log", type=Path, default=ROOT / "build" / "storm-server.log", help="of the server")
    parser.add_argument("--out", type=Path, default=results() / "storm.json")
    parser.add_argument("--commit", help="where the tree is no repository")
    options = parser.parse_args()
    if bool(options.url) != bool(options.model):
        parser.error("--url and --model belong together")
    stop_children_on_signals()
    options.log.parent.mkdir(parents=True, exist_ok=True)
    start = time.monotonic()
    try:
        with served(options) as (url, model, server):
            before = stream(url, model, PROMPT, FIXED_TOKENS)
            seconds = storm_seconds(options.minutes, options.deadline, time.monotonic() - start)
            storm = Storm(url, model, options.streams, seconds, options.vocab, options.max_tokens)
            storm.run()
            after = stream(url, model, PROMPT, FIXED_TOKENS)
            # Read before it is stopped, on which vLLM writes tracebacks.
            faults = log_problems(options.log.read_text(errors="replace")) if server else []
    except DemoError as error:
        sys.exit(f"the server failed: {error}")
    row, problems = examine(storm, before, after)
    problems += faults
    row = {
        "model": f"{options.architecture} {options.size}" if server else model,
        "minutes": round(seconds / 60, 2),
        **row,
    }
    if server is not None:
        log = options.log.read_text(errors="replace")
        row |= {"start_s": round(server.started_s, 1), "kernels": kernels_ready(log), "counters": COUNTERS.findall(log)}
    write_json(options.out, {"env": environment(options.commit), "problems": problems, "rows": [row]})
    print(json.dumps(row))
    if problems:
        sys.exit("\n".join(problems))


if __name__ == "__main__":
    main()
