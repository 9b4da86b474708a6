"""What this process has done so far: calls, layers that fell back, kernels compiled, and compiled too late.

    from fp8_backend import counters
    counters.snapshot()

A call is counted where the host makes it: one while a CUDA graph is captured counts, a replay of the graph does not.
"""

from __future__ import annotations

import logging
import os
from collections import Counter
from functools import cache
from multiprocessing import util
from typing import TypedDict

calls: Counter[str] = Counter()  # by op of integration/ops.py: "linear", "experts" and the others
fallbacks: Counter[str] = Counter()  # by reason: layers that vLLM's own FP8 path serves
compiles: list[str] = []  # names of kernels, in order; appending is atomic, adding to a counter is not
late_compiles: list[str] = []  # those of them after this process said that it is ready

_log = logging.getLogger(f"vllm.{__name__}")  # only vLLM's own loggers reach the log of each of its processes


class Snapshot(TypedDict):
    """The counters as plain data, for JSON."""

    calls: dict[str, int]
    fallbacks: dict[str, int]
    compiles: int
    late_compiles: int


def snapshot() -> Snapshot:
    """Return the counters of this process."""
    return {
        "calls": dict(calls),
        "fallbacks": dict(fallbacks),
        "compiles": len(compiles),
        "late_compiles": len(late_compiles),
    }


def line() -> str:
    """Return the counters as a person reads them."""
    made = ", ".join(f"{count} {name}" for name, count in sorted(calls.items())) or "none"
    fell = ", ".join(f"{count} ({reason})" for reason, count in sorted(fallbacks.items())) or "none"
    compiled = f"{len(compiles)}, of them late: {len(late_compiles)}"
    return f"calls: {made}; layers that fell back: {fell}; compiled: {compiled}"


def log_at_exit() -> None:
    """Have the counters logged at debug level when this process ends; a second call changes nothing.

    Not through atexit: what multiprocessing forks, such as vLLM's engine and workers, leaves without running that.
    """
    _log_at_exit_of(os.getpid())


@cache
def _log_at_exit_of(process: int) -> None:
    util.Finalize(None, lambda: _log.debug("process %d: %s", process, line()), exitpriority=0)
