"""What GPUs give under their power limit: TFLOPS, clock and power of the tensor core by itself and of our kernels.

    python -m benchmarks.power [--seconds 2] [--json power.json]

Each arm runs for so many seconds on end, of which the second half counts, while nvidia-smi is asked for clock and
power. `bench` times kernels in turns with gaps between them, in which the GPU cools down and its clock rises: compare
arms of one file with each other, not with `bench`. Nothing is verified here; `bench` does that.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.sustained import Sample, sampling, sustain
from fp8_backend.bench import peers
from fp8_backend.bench.moe import route_on_gpu
from fp8_backend.bench.moe_grouped import GroupedWeight
from fp8_backend.bench.moe_operands import RandomExperts
from fp8_backend.bench.moe_shapes import parse_models
from fp8_backend.bench.operands import RandomLinear
from fp8_backend.kernels import gemm, launcher
from fp8_backend.kernels.backend import num_sms
from fp8_backend.kernels.compiler import CUDA_FOLDER, KernelSpec
from fp8_backend.kernels.m_grouped import m_grouped_fp8_gemm_nt_contiguous
from fp8_backend.kernels.quantize import per_token_group_quant
from fp8_backend.measure.environment import environment, write_json

LAYOUT = launcher.ParamLayout(("u64", "u64", "f32", "u32"))
# As in tensor_core.cuh: rows, columns and k of a block; stages; k-blocks a launch, about a millisecond.
TILE, STAGES, K_BLOCKS = (256, 128, 128), 4, 2000
THREADS = 256
GEMMS = ((4096, 5120, 25600), (8192, 7168, 16384), (8192, 4096, 7168))  # m, n, k; the first: the fastest of dense.json
GROUPED = ((256, 256, 4096, 7168), (4, 8192, 4096, 7168))  # groups, rows of each, n, k
TOKENS = 8192
# Of the tensor core by itself: PROMOTE and TURNS of tensor_core.cuh.
SCHEDULES = {
    "added up by the tensor core": (False, False),
    "promoted": (True, False),
    "promoted in turns": (True, True),
}
Arm = tuple[str, Callable[[], object], float]  # name, a call, its floating-point operations


def tensor_core_spec(promote: bool, turns: bool) -> KernelSpec:
    """Return what to compile of tensor_core.cuh, which lies here and includes the package's device code."""
    file = os.path.relpath(Path(__file__).with_name("tensor_core.cuh"), CUDA_FOLDER)
    return KernelSpec(file, "tensor_core", (("PROMOTE", int(promote)), ("TURNS", int(turns))))


def measure(arm: Arm, seconds: float, samples: list[Sample]) -> dict[str, Any]:
    """Run an arm and return its row."""
    name, call, operations = arm
    found = sustain(call, seconds, samples)
    tflops = round(operations / found.us / 1e6)
    return {"arm": name, "us": round(found.us, 1), "tflops": tflops, "mhz": found.mhz, "watts": found.watts}


def tensor_core_arms() -> Iterator[Arm]:
    """Yield the products of random codes and of zeros in every schedule."""
    device = torch.cuda.current_device()
    (rows, columns, k), sms = TILE, num_sms(device)
    size = STAGES * (rows + columns) * k
    out = torch.empty(sms * THREADS, device="cuda")
    for how, schedule in SCHEDULES.items():
        kernel = launcher.load(tensor_core_spec(*schedule), LAYOUT)
        for values in ("random", "zero"):
            codes = (torch.randn(size, device="cuda") * 60 * (values == "random")).to(torch.float8_e4m3fn)

            def call(kernel: launcher.Kernel = kernel, codes: torch.Tensor = codes) -> None:
                params = codes.data_ptr(), out.data_ptr(), 1e-3, K_BLOCKS
                kernel.launch((sms, 1, 1), THREADS, size, params, launcher.current_stream(device), pdl=False)

            yield f"products of {values} codes, {how}", call, 2.0 * sms * rows * columns * k * K_BLOCKS


def gemm_arms() -> Iterator[Arm]:
    """Yield GEMMs alone, ours and DeepGEMM's where that is installed."""
    try:
        deepgemm = peers.deepgemm_module()
    except ImportError as error:
        print(f"deepgemm is absent: {error}")
        deepgemm = None
    for m, n, k in GEMMS:
        weight = RandomLinear(n, k, copies=1, bf16=False)
        a = per_token_group_quant(torch.randn(m, k, device="cuda", dtype=torch.bfloat16))
        out = torch.empty(m, n, dtype=torch.bfloat16, device="cuda")
        (b,), plain = weight.ours, weight.plain
        yield f"GEMM {m} x {n}x{k}", partial(gemm.fp8_gemm_nt, a, (b.codes, b.scale), out), 2.0 * m * n * k
        if deepgemm is not None:
            theirs = partial(peers.deepgemm_gemm, deepgemm, a, (plain.codes[0], plain.scales[0]))
            yield f"DeepGEMM {m} x {n}x{k}", theirs, 2.0 * m * n * k
        del weight, a, out, b, plain
        torch.cuda.empty_cache()


def grouped_arms() -> Iterator[Arm]:
    """Yield grouped GEMMs alone, and the experts of DeepSeek-V3."""
    for groups, rows, n, k in GROUPED:
        weight = GroupedWeight(groups, n, k, copies=1)
        a = per_token_group_quant(torch.randn(groups * rows, k, device="cuda", dtype=torch.bfloat16))
        out = torch.empty(groups * rows, n, dtype=torch.bfloat16, device="cuda")
        indices = torch.arange(groups, device="cuda", dtype=torch.int32).repeat_interleave(rows)
        call = partial(m_grouped_fp8_gemm_nt_contiguous, a, weight.packed[0], out, indices)
        yield f"grouped GEMM {groups} x {rows} {n}x{k}", call, 2.0 * groups * rows * n * k
        del weight, a, out, call
        torch.cuda.empty_cache()
    (shape,) = parse_models("dsv3")
    layer = RandomExperts(shape, torch.device("cuda", torch.cuda.current_device()), 1, plain=False)
    x = torch.randn(TOKENS, shape.hidden, device="cuda", dtype=torch.bfloat16)
    routed = route_on_gpu(shape, TOKENS, "balanced", 0)
    operations = 6.0 * TOKENS * shape.top_k * shape.hidden * shape.intermediate
    yield f"experts of {shape.name}, {TOKENS} tokens", partial(layer.run, x, routed, 0), operations


def main() -> None:
    """Measure and print; write the rows where asked."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.power", description="TFLOPS, clock and power.")
    parser.add_argument("--seconds", type=float, default=2.0, help="of each arm")
    parser.add_argument("--json", type=Path, help="where to write the rows")
    parser.add_argument("--commit", help="of a tree without a repository")
    arguments = parser.parse_args()
    result: dict[str, Any] = {"env": environment(arguments.commit), "rows": []}
    with sampling() as samples:
        for arms in (tensor_core_arms, gemm_arms, grouped_arms):
            for arm in arms():
                result["rows"].append(measure(arm, arguments.seconds, samples))
                print(result["rows"][-1], flush=True)
                if arguments.json:
                    write_json(arguments.json, result)


if __name__ == "__main__":
    main()
