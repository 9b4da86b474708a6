"""The counters in this process, and what a process says of them when it ends, however it was started."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from fp8_backend import counters

CHILD = """
import logging, multiprocessing, sys
logger = logging.getLogger("vllm")
handler = logging.StreamHandler()
handler.setFormatter(logging.Formatter("%(name)s %(levelname)s %(message)s"))
logger.addHandler(handler)
logger.setLevel(sys.argv[1])
from fp8_backend import counters

def work():
    counters.log_at_exit()
    counters.log_at_exit()
    counters.calls["linear"] += 3
    counters.fallbacks["linear: why"] += 2
    counters.compiles.append("gemm")

if sys.argv[2] == "none":
    work()
else:
    counters.log_at_exit()  # the parent's registration is not the child's
    child = multiprocessing.get_context(sys.argv[2]).Process(target=work)
    child.start()
    child.join()
"""
LINE = "calls: 3 linear; layers that fell back: 2 (linear: why); compiled: 1, of them late: 0"
NOTHING = "calls: none; layers that fell back: none; compiled: 0, of them late: 0"


def said(level: str, start: str) -> list[str]:
    command = [sys.executable, "-c", CHILD, level, start]
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    lines = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60, env=environ).stderr
    return [
        line.partition(": ")[2] for line in lines.splitlines() if line.startswith("vllm.fp8_backend.counters DEBUG")
    ]


@pytest.mark.parametrize(
    ("level", "start", "expected"),
    [("DEBUG", "none", [LINE]), ("INFO", "none", []), ("DEBUG", "fork", [LINE, NOTHING])],
)
def test_process_that_ends_says_what_it_did(level: str, start: str, expected: list[str]) -> None:
    assert said(level, start) == expected


def test_snapshot_is_plain_data_and_does_not_change_later(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(counters, "calls", counters.Counter(linear=1))
    before = counters.snapshot()
    counters.calls["linear"] += 1
    assert before["calls"] == {"linear": 1}
    assert counters.snapshot()["calls"] == {"linear": 2}
