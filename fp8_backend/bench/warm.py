"""Compile what a run needs before it is timed: our kernels in threads, the peers' in one process for each shape.

    python -m fp8_backend.bench.warm PEERS SHAPES MS

The peers compile inside a call, one kernel after the other, and keep them on disk; several processes fill that cache.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

from fp8_backend.bench import peers, stream
from fp8_backend.bench.shapes import Shape
from fp8_backend.kernels import cache, heuristics, quantize
from fp8_backend.kernels.problem import GemmProblem, Machine

COMPILED_AT_CALL = ("deepgemm", "flashinfer", "triton")


def compile_ours(shapes: Sequence[Shape], ms: Sequence[int], machine: Machine, batch_invariant: bool = False) -> int:
    """Compile every kernel of ours that the cells need, on all cores; return how many."""
    problems = [GemmProblem(m, n, k, machine) for n, k in shapes for m in ms]
    configs = {heuristics.select(problem).config for problem in problems}
    configs |= {heuristics.select_gemm(problem).config for problem in problems}
    if batch_invariant:
        configs |= {heuristics.select(problem, batch_invariant=True).config for problem in problems}
    specs = [*quantize.SPECS.values(), stream.SPEC, *(config.spec() for config in configs)]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(cache.get, specs))
    return len(specs)


def _command(names: Sequence[str], shape: Shape, ms: Sequence[int]) -> list[str]:
    n, k = shape
    arguments = [",".join(names), f"{n}x{k}", ",".join(map(str, ms))]
    return [sys.executable, "-m", "fp8_backend.bench.warm", *arguments]


def portions(shapes: Sequence[Shape], ms: Sequence[int], cores: int) -> list[tuple[Shape, tuple[int, ...]]]:
    """Return the cells in portions for one process each: a shape, or parts of it where shapes are fewer than cores."""
    parts = min(len(ms), -(-cores // max(1, len(shapes))))
    return [(shape, tuple(ms[part::parts])) for shape in shapes for part in range(parts)]


def compile_peers(
    names: Sequence[str], shapes: Sequence[Shape], ms: Sequence[int], limit_s: float, say: Callable[[str], None]
) -> list[str]:
    """Call each such peer once for every cell, one process a portion.

    Two run at once for each core: they wait for the GPU and for locks, too.

    Returns:
        One line for every process that failed or was stopped; the rest is compiled just before its cell is timed.
    """
    names = [name for name in names if name in COMPILED_AT_CALL]
    cores, problems = os.cpu_count() or 1, []
    waiting = portions(shapes, ms, cores) if names else []
    running: dict[tuple[Shape, tuple[int, ...]], subprocess.Popen[str]] = {}
    end = time.monotonic() + limit_s
    try:
        while waiting or running:
            while waiting and len(running) < 2 * cores:
                portion = waiting.pop(0)
                running[portion] = subprocess.Popen(
                    _command(names, *portion),
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.PIPE,
                    text=True,
                )
            portion, process = next(iter(running.items()))
            try:
                errors = process.communicate(timeout=max(0.1, end - time.monotonic()))[1]
            except subprocess.TimeoutExpired:
                problems.append(
                    f"peers' kernels: stopped after {limit_s:.0f} s, {len(waiting) + len(running)} portions left"
                )
                break
            del running[portion]
            (n, k), of_portion = portion
            if process.returncode:
                problems.append(f"peers' kernels for {n}x{k}, m={of_portion}: {errors.strip()[-200:]}")
            say(f"peers compiled for {n}x{k}, {len(waiting) + len(running)} portions left")
    finally:
        for process in running.values():
            process.kill()
            process.communicate()
    return problems


def main() -> None:
    """Call the peers once for each m of one shape; a peer that fails says so again when it is timed."""
    from fp8_backend.bench.operands import RandomLinear

    names, shape, ms = sys.argv[1].split(","), sys.argv[2].split("x"), sys.argv[3].split(",")
    import torch

    n, k = map(int, shape)
    present, _ = peers.load(names)
    weight = RandomLinear(n, k, copies=1, bf16=False)
    for m in map(int, ms):
        x = torch.randn(m, k, device="cuda", dtype=torch.bfloat16)
        for name, linear in present.items():
            if peers.why_not(name, m, n, k) is None:
                peers.try_call(linear, x, weight.plain)


if __name__ == "__main__":
    main()
