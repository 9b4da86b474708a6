"""Compile what a run needs before it is timed: our kernels in threads, the peers' in processes of their own.

    python -m fp8_backend.bench.warm PEERS SHAPE MS

The peers compile inside a call, one kernel after the other, and keep them on disk; several processes fill that cache.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import Protocol, TypeVar

from fp8_backend.bench import peers, stream
from fp8_backend.bench.shapes import DECODE_M, Shape
from fp8_backend.kernels import cache, heuristics, quantize
from fp8_backend.kernels.problem import GemmProblem, Machine

# FlashInfer last: its first call of all builds a module for a minute, under a lock.
COMPILED_AT_CALL = ("deepgemm", "triton", "flashinfer")


def compile_ours(shapes: Sequence[Shape], ms: Sequence[int], machine: Machine, batch_invariant: bool = False) -> int:
    """Compile every kernel of ours that the cells need, on all cores; return how many."""
    problems = [GemmProblem(m, n, k, machine) for n, k in shapes for m in ms]
    configs = {heuristics.select(problem).config for problem in problems}
    configs |= {heuristics.select_gemm(problem).config for problem in problems}
    if batch_invariant:
        configs |= {heuristics.select(problem, batch_invariant=True).config for problem in problems}
    codes = [spec for (_, zeros), spec in quantize.SPECS.items() if not zeros]
    specs = [*codes, stream.SPEC, *(config.spec() for config in configs)]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(cache.get, specs))
    return len(specs)


@dataclass(frozen=True)
class Portion:
    """What one process compiles: the kernels of some peers for some cells of a shape."""

    names: tuple[str, ...]
    shape: Shape
    ms: tuple[int, ...]

    @property
    def command(self) -> list[str]:
        """The module that compiles it, and its arguments."""
        n, k = self.shape
        return ["fp8_backend.bench.warm", ",".join(self.names), f"{n}x{k}", ",".join(map(str, self.ms))]

    def __str__(self) -> str:
        return f"{self.shape[0]}x{self.shape[1]}, m={','.join(map(str, self.ms))}"


def portions(names: Sequence[str], shapes: Sequence[Shape], ms: Sequence[int], cores: int) -> list[Portion]:
    """Return all cells in portions: a shape each, or parts of one where shapes are fewer than cores.

    FlashInfer's module is built by a process that does nothing else, while the others compile for other peers.
    """
    names = tuple(name for name in COMPILED_AT_CALL if name in names)
    parts = min(len(ms), -(-cores // max(1, len(shapes))))
    found = [Portion(names, shape, tuple(ms[part::parts])) for shape in shapes for part in range(parts) if names]
    if "flashinfer" in names and found and (few := [m for m in ms if m <= DECODE_M]):
        found.insert(0, Portion(("flashinfer",), shapes[0], (few[0],)))
    return found


def compile_peers(
    names: Sequence[str], shapes: Sequence[Shape], ms: Sequence[int], limit_s: float, say: Callable[[str], None]
) -> list[str]:
    """Call each such peer once for every cell, one process a portion.

    Returns:
        One line for every process that failed or was stopped; the rest is compiled just before its cell is timed.
    """
    return run_portions(portions(names, shapes, ms, os.cpu_count() or 1), limit_s, say)[0]


class Compiled(Protocol):
    """What one process compiles; its text names it."""

    @property
    def command(self) -> list[str]:
        """The module that compiles it, and its arguments."""


Each = TypeVar("Each", bound=Compiled)


def run_portions(found: Sequence[Each], limit_s: float, say: Callable[[str], None]) -> tuple[list[str], list[Each]]:
    """Run a process for each portion; after the limit stop what still runs, and the compilers that it started.

    Two run at once for each core: they wait for the GPU and for locks, too.

    Returns:
        One line for every process that failed, and for all that were stopped; the portions that did not end.
    """
    waiting, problems = list(found), []
    running: dict[Each, subprocess.Popen[str]] = {}
    end = time.monotonic() + limit_s
    try:
        while waiting or running:
            while waiting and len(running) < 2 * (os.cpu_count() or 1):
                portion = waiting.pop(0)
                running[portion] = subprocess.Popen(
                    [sys.executable, "-m", *portion.command],
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.PIPE,
                    text=True,
                    start_new_session=True,
                )
            portion, process = next(iter(running.items()))
            try:
                errors = process.communicate(timeout=max(0.1, end - time.monotonic()))[1]
            except subprocess.TimeoutExpired:
                late = [*(each for each, process in running.items() if process.poll() is None), *waiting]
                problems.append(f"peers' kernels: stopped after {limit_s:.0f} s, {len(late)} portions left")
                return problems, late
            del running[portion]
            if process.returncode:
                problems.append(f"peers' kernels for {portion}: {errors.strip()[-200:]}")
            say(f"peers compiled for {portion}, {len(waiting) + len(running)} portions left")
    finally:
        for process in running.values():
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
    return problems, []


def main() -> None:
    """Call each peer once for each m of one shape; a peer that fails says so again when it is timed."""
    from fp8_backend.bench.operands import RandomLinear

    names, shape, ms = sys.argv[1].split(","), sys.argv[2].split("x"), sys.argv[3].split(",")
    import torch

    n, k = map(int, shape)
    present, _ = peers.load(names)
    weight = RandomLinear(n, k, copies=1, bf16=False)
    for name, linear in present.items():
        for m in map(int, ms):
            if peers.why_not(name, m, n, k) is None:
                peers.try_call(linear, torch.randn(m, k, device="cuda", dtype=torch.bfloat16), weight.plain)


if __name__ == "__main__":
    main()
