"""A `vllm serve` child process that is always stopped, and two requests to it."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

START_TIMEOUT_S = 900  # an H200 needs 75-95 s, most of it torch.compile and graph capture; two busy cores about 40 s
STOP_TIMEOUT_S = 30
# Direct: a proxy configured for the outside world has no business with a server on this machine.
_opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))


class DemoError(Exception):
    """The demo cannot go on; the message is all the user sees."""


@dataclass(frozen=True)
class Completion:
    """Greedy continuation of one prompt; `alternatives` holds the likeliest log-probabilities at each position."""

    text: str
    tokens: list[str]
    alternatives: list[dict[str, float]]


class Server:
    """`vllm serve MODEL` on a free port of this machine; a context manager that ends with no process left behind.

    Raises:
        DemoError: on entering, where the server dies or does not answer in time; quotes the end of its log.
    """

    def __init__(
        self,
        model: Path,
        log: Path,
        arguments: list[str],
        environment: dict[str, str],
        start_timeout_s: float = START_TIMEOUT_S,
    ) -> None:
        self.model = model
        self.log = log
        self.arguments = arguments
        self.environment = environment
        self.start_timeout_s = start_timeout_s
        self.started_s = 0.0

    def __enter__(self) -> Server:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.url = f"http://127.0.0.1:{probe.getsockname()[1]}"
        port = self.url.rpartition(":")[2]
        command = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", str(self.model)]
        command += ["--host", "127.0.0.1", "--port", port, *self.arguments]
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, **self.environment},
                start_new_session=True,  # one process group for the server, its engine and workers
            )
        try:
            self._wait_until_healthy()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *exception: type[BaseException] | BaseException | TracebackType | None) -> None:
        self.stop()

    def _wait_until_healthy(self) -> None:
        begin = time.monotonic()
        while time.monotonic() < begin + self.start_timeout_s:
            try:
                self.process.wait(timeout=0.2)  # the pause between two looks, cut short by the server's death
            except subprocess.TimeoutExpired:
                pass
            else:
                raise DemoError(f"the server exited with status {self.process.returncode}; {self.end_of_log()}")
            try:
                _opener.open(f"{self.url}/health", timeout=5).close()
            except OSError:
                continue
            self.started_s = time.monotonic() - begin
            return
        raise DemoError(f"the server did not answer within {self.start_timeout_s:.0f} s; {self.end_of_log()}")

    def end_of_log(self, lines: int = 25) -> str:
        """Return the last lines of the server's log, with the log's name."""
        text = self.log.read_text(errors="replace").splitlines()
        return "\n".join([f"the end of {self.log}:", *text[-lines:]])

    def complete(self, prompt: str, max_tokens: int) -> Completion:
        """Send one /v1/completions request, greedy and never ended by an end-of-text token."""
        body = {
            "model": str(self.model),
            "prompt": prompt,
            "max_tokens": max_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "logprobs": 5,
            "return_tokens_as_token_ids": True,
        }
        choice = self.post("/v1/completions", body)["choices"][0]
        logprobs = choice["logprobs"]
        return Completion(choice["text"], logprobs["tokens"], logprobs["top_logprobs"])

    def post(self, path: str, body: dict[str, Any], timeout_s: float = 300) -> dict[str, Any]:
        """Send one request and return its answer.

        Raises:
            DemoError: the server refuses it, dies or takes longer than `timeout_s` without sending a byte.
        """
        request = urllib.request.Request(
            self.url + path, json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        try:
            with _opener.open(request, timeout=timeout_s) as response:
                answer: dict[str, Any] = json.load(response)
                return answer
        except urllib.error.HTTPError as error:
            raise DemoError(f"{path} answered {error.code}: {error.read()[:500].decode(errors='replace')}") from None
        except OSError as error:
            raise DemoError(f"{path}: {error}; {self.end_of_log()}") from None

    def stop(self) -> None:
        """End the server and every process it started."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(timeout=STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                pass
        try:
            os.killpg(self.process.pid, signal.SIGKILL)  # also an engine that outlived a killed server
        except ProcessLookupError:
            pass
        self.process.wait()
