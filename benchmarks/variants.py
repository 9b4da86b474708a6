"""Time edited copies of the GEMM's device code beside the code in use and DeepGEMM.

    cp -r fp8_backend/kernels/cuda FOLDER       # and edit gemm.cuh in it
    python -m benchmarks.variants FOLDER [FOLDER ...] [--problems 4096x7168x2048,...] [--seconds 1] [--json OUT.json]

A problem is m x n x k. Each is timed in the configuration that is chosen for it, weights cold from memory, the GEMM
alone, all arms in turns; outputs are poisoned and compared bit for bit with those of the code in use. With --seconds
each arm runs for so long on end, twice, in the order A B B A, and its clock and power are told: many rows are bound by
the power limit then (docs/kernel-notes-power.md).
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import patch

import torch

from benchmarks.sustained import Sample, sampling, sustain
from fp8_backend.bench import peers
from fp8_backend.bench.dense import calls_for
from fp8_backend.bench.operands import RandomLinear
from fp8_backend.errors import ArgumentError
from fp8_backend.kernels import cache, gemm, gemm_plan, heuristics, launcher
from fp8_backend.kernels.compiler import CUDA_FOLDER, KernelSpec
from fp8_backend.kernels.problem import GemmConfig, GemmProblem, StationaryGemmConfig
from fp8_backend.kernels.quantize import per_token_group_quant
from fp8_backend.measure.environment import environment, write_json
from fp8_backend.measure.timing import Captured, capture, interleaved_us

PROBLEMS = "16384x32768x512,4096x24576x1536,4096x7168x2048,4096x4096x4096,4096x4096x12288,512x2112x7168,512x4096x4096"
ROUNDS = 15
Problem = tuple[int, int, int]


def parse_problems(text: str) -> list[Problem]:
    """Return the (m, n, k) of text such as 4096x7168x2048,512x4096x4096.

    Raises:
        ArgumentError: one is not three numbers above 0.
    """
    found = []
    for each in text.split(","):
        numbers = [int(part) if part.isdecimal() else 0 for part in each.split("x")]
        if len(numbers) != 3 or min(numbers) < 1:
            raise ArgumentError(f"--problems {each}: expected MxNxK, such as 4096x7168x2048")
        found.append((numbers[0], numbers[1], numbers[2]))
    return found


def spec_of(config: GemmConfig | StationaryGemmConfig, folder: Path) -> KernelSpec:
    """Return what to compile of a configuration, from a copy of the device code."""
    return replace(config.spec(), folder=folder)


def captured(
    folder: Path,
    choice: heuristics.GemmChoice,
    a: tuple[torch.Tensor, torch.Tensor],
    weight: RandomLinear,
    count: int,
) -> Captured:
    """Return a graph of `count` calls of a copy's kernel, each with a cold weight."""
    (codes, scale), m = a, a[0].shape[0]
    outs = [torch.full((m, weight.n), float("nan"), dtype=torch.bfloat16, device="cuda") for _ in range(count)]

    def kernel(config: GemmConfig | StationaryGemmConfig, device: int) -> launcher.Kernel:
        return launcher.load(spec_of(config, folder), gemm_plan._LAYOUT)

    with patch.object(gemm_plan, "kernel", kernel):
        launch = gemm_plan.GemmLaunch(choice, weight.k, codes.stride(0), None, outs[0], None)

    def call(index: int) -> torch.Tensor:
        packed = weight.ours[index]
        stream = launcher.current_stream(codes.device.index)
        launch(stream, codes.data_ptr(), scale.data_ptr(), packed.codes, packed.scale, outs[index], None)
        return outs[index]

    return capture([partial(call, index) for index in range(count)])


def sustained(arms: dict[str, Captured], seconds: float, samples: list[Sample]) -> dict[str, list[Any]]:
    """Return microseconds, MHz and watts of two runs of each arm, there and back again."""
    found: dict[str, list[Any]] = {name: [] for name in arms}
    for name in (*arms, *reversed(arms)):
        ran = sustain(arms[name].graph.replay, seconds, samples)
        found[name].append([round(ran.us / len(arms[name].outputs), 2), ran.mhz, ran.watts])
    return found


def measure(
    problem: Problem, folders: dict[str, Path], deepgemm: ModuleType | None, seconds: float, samples: list[Sample]
) -> dict[str, Any]:
    """Return a row: microseconds of every arm, and the arms that wrote other bits than the code in use."""
    m, n, k = problem
    weight = RandomLinear(n, k, bf16=False, plain=deepgemm is not None)
    a = per_token_group_quant(torch.randn(m, k, device="cuda", dtype=torch.bfloat16))
    choice = heuristics.select_gemm(GemmProblem(m, n, k, gemm.machine(torch.cuda.current_device())))
    count = calls_for(m, n, k, len(weight.ours))
    arms = {name: captured(folder, choice, a, weight, count) for name, folder in folders.items()}
    torch.cuda.synchronize()
    expected = arms["in use"].outputs[0]
    differ = [name for name, arm in arms.items() if not all(torch.equal(out, expected) for out in arm.outputs)]
    if deepgemm is not None:
        plain = weight.plain
        calls: list[Callable[[], object]] = [
            partial(peers.deepgemm_gemm, deepgemm, a, (plain.codes[index], plain.scales[index]))
            for index in range(count)
        ]
        arms["deepgemm"] = capture(calls)
    us = {name: round(value, 2) for name, value in interleaved_us(arms, ROUNDS).items()}
    row = {"m": m, "n": n, "k": k, "choice": str(choice), "us": us, "differ": differ}
    return row | {"on_end": sustained(arms, seconds, samples)} if seconds else row


def run(
    problems: list[Problem], folders: dict[str, Path], seconds: float, samples: list[Sample]
) -> Iterator[dict[str, Any]]:
    """Compile every kernel that is needed, on all cores, and yield the rows."""
    machine = gemm.machine(torch.cuda.current_device())
    configs = {heuristics.select_gemm(GemmProblem(*problem, machine)).config for problem in problems}
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(cache.get, [spec_of(config, folder) for config in configs for folder in folders.values()]))
    try:
        deepgemm: ModuleType | None = peers.deepgemm_module()
    except ImportError as error:
        print(f"deepgemm is absent: {error}")
        deepgemm = None
    for problem in problems:
        yield measure(problem, folders, deepgemm, seconds, samples)
        torch.cuda.empty_cache()


def main() -> None:
    """Measure and print; write the rows where asked."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.variants", description="Time edits of the GEMM.")
    parser.add_argument("folders", nargs="+", type=Path, metavar="FOLDER", help="copy of fp8_backend/kernels/cuda")
    parser.add_argument("--problems", default=PROBLEMS, help="MxNxK,...")
    parser.add_argument("--seconds", type=float, default=0.0, help="of each arm on end, too; 0: not")
    parser.add_argument("--json", type=Path, help="where to write the rows")
    parser.add_argument("--commit", help="of a tree without a repository")
    arguments = parser.parse_args()
    folders = {"in use": CUDA_FOLDER, **{folder.name: folder.resolve() for folder in arguments.folders}}
    result: dict[str, Any] = {"env": environment(arguments.commit), "rows": []}
    watched: AbstractContextManager[list[Sample]] = sampling() if arguments.seconds else nullcontext([])
    with watched as samples:
        for row in run(parse_problems(arguments.problems), folders, arguments.seconds, samples):
            result["rows"].append(row)
            print(row, flush=True)
            if arguments.json:
                write_json(arguments.json, result)


if __name__ == "__main__":
    main()
