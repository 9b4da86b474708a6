"""Host time of an eager call: calls issued without synchronising, on a shape whose GPU time hides behind it."""

from __future__ import annotations

import importlib
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

from fp8_backend.bench import peers
from fp8_backend.bench.operands import RandomLinear

CALLS, ROUNDS, WARM_UP = 1000, 3, 50
LIMIT_US = 25.0
SHAPE = (512, 512)
MS = (1, 16, 33, 64, 128, 512)


def host_us(call: Callable[[], object], calls: int = CALLS) -> float:
    """Return microseconds of CPU time a call, the median of a few rounds."""
    for _ in range(WARM_UP):
        call()
    taken = []
    for _ in range(ROUNDS):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(calls):
            call()
        taken.append((time.perf_counter() - start) / calls * 1e6)
    torch.cuda.synchronize()
    return statistics.median(taken)


def run(present: dict[str, peers.Linear], failures: dict[str, list[str]]) -> Iterator[dict[str, Any]]:
    """Yield one row an m: our op as vLLM calls it, our function, and the peers."""
    n, k = SHAPE
    weight = RandomLinear(n, k, copies=1)
    packed = weight.ours[0]
    try:
        op = importlib.import_module("fp8_backend.integration.ops").linear
    except Exception as error:  # without vLLM there is no op; the function is timed all the same
        op = None
        failures[f"op: {type(error).__name__}: {error}".splitlines()[0][:200]] = ["host"]
    for m in MS:
        x = torch.randn(m, k, device="cuda", dtype=torch.bfloat16)
        row: dict[str, Any] = {"m": m, "n": n, "k": k, "function_us": host_us(partial(weight.linear, x, 0))}
        if op is not None:
            row["op_us"] = host_us(partial(op, x, packed.codes, packed.scale, None, n))
        row["peers"] = {}
        for name, linear in present.items():
            if peers.why_not(name, m, n, k) is None and peers.try_call(linear, x, weight.plain)[0] is not None:
                row["peers"][name] = host_us(peers.call(linear, x, weight.plain, 0))
        yield row


def line(row: dict[str, Any]) -> str:
    """Return a row as text."""
    ours = row.get("op_us", row["function_us"])
    verdict = "holds" if ours <= LIMIT_US else "MISSED"
    others = ", ".join(f"{name} {us:.1f}" for name, us in row["peers"].items())
    return (
        f"host m={row['m']} {row['n']}x{row['k']}: op {row.get('op_us', float('nan')):.1f} us a call, function "
        f"{row['function_us']:.1f} (at most {LIMIT_US:.0f}: {verdict}){'; ' + others if others else ''}"
    )
