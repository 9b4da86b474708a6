"""Time every configuration on a grid of shapes, to fit the cost model of heuristics.py by.

python -m benchmarks.sweep OUT.json [--m 1,16] [--shapes 512x7168,...]
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from operator import itemgetter
from pathlib import Path

import torch

from fp8_backend.kernels import decode_heuristics, gemm, heuristics, layout, reference
from fp8_backend.kernels.decode_heuristics import DecodeChoice
from fp8_backend.kernels.heuristics import GemmChoice
from fp8_backend.kernels.problem import GemmProblem
from fp8_backend.kernels.quantize import per_token_group_quant
from fp8_backend.kernels.reference import BLOCK
from fp8_backend.measure.timing import copies_for, graph_us

SHAPES = (
    "512x7168,7168x256,3072x1536,2112x7168,7168x2048,4096x4096,6144x4096,4096x7168,"
    "24576x1536,4096x12288,24576x4096,7168x16384,10240x5120"
)


def weights_of(n: int, k: int) -> list[gemm.Weight]:
    """Return enough packed copies of one random weight to be cold."""
    codes = torch.randint(0, 256, (n, k), dtype=torch.uint8, device="cuda")
    codes = torch.where(codes & 0x7F == 0x7F, codes & 0x80, codes).view(torch.float8_e4m3fn)
    scale = torch.rand(-(-n // 128), -(-k // 128), device="cuda") * 1e-3 + 1e-4
    packed, packed_scale = layout.pack_weight(codes), layout.pack_scale(scale, n, k)
    return [gemm.Weight(packed.clone(), packed_scale.clone(), n, k) for _ in range(copies_for(n * k))]


def decode_candidates(problem: GemmProblem, per_config: int, ahead_kib: Sequence[int] = ()) -> list[DecodeChoice]:
    """Return the best-predicted ways of cutting the weight for each decode configuration and residency.

    ahead_kib: with each of these amounts of weights in flight ahead of the activations instead of the one chosen.
    """
    by_config: dict[object, list[tuple[float, DecodeChoice]]] = {}
    for residency in range(len(decode_heuristics.RESIDENCIES)):
        for cost, choice in decode_heuristics.resident_choices(problem, residency):
            by_config.setdefault((choice.config, residency), []).append((cost, choice))
    best = [choice for found in by_config.values() for _, choice in sorted(found, key=itemgetter(0))[:per_config]]
    if not ahead_kib:
        return best
    stages = [(choice, max(1, kib * 1024 // (choice.rows * BLOCK))) for choice in best for kib in ahead_kib]
    return list(dict.fromkeys(replace(choice, prefetch=min(choice.num_stages, ahead)) for choice, ahead in stages))


def _quantise_and_launch(choice: GemmChoice, x: torch.Tensor, weight: gemm.Weight, out: torch.Tensor) -> None:
    gemm.launch_gemm(choice, *per_token_group_quant(x), weight, out, None)


def time_choice(
    choice: heuristics.Choice, x: torch.Tensor, weights: list[gemm.Weight], out: torch.Tensor, whole: bool
) -> float:
    """Return microseconds of one call; whole: with the quantisation launch where the kernel needs one."""
    if not isinstance(choice, GemmChoice):
        plan = gemm.plan_of(choice, x, out, None)
        return graph_us([partial(plan, x, w.codes, w.scale, out, None) for w in weights])
    codes, scale = per_token_group_quant(x)
    if whole:
        return graph_us([partial(_quantise_and_launch, choice, x, w, out) for w in weights])
    return graph_us([partial(gemm.launch_gemm, choice, codes, scale, w, out, None) for w in weights])


def main() -> None:
    """Run the sweep and print the best of each problem."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--m", default="1,8,16,32,64,128,256,1024,4096")
    parser.add_argument("--shapes", default=SHAPES)
    parser.add_argument("--per-config", type=int, default=2, help="ways of cutting the weight, for each residency")
    parser.add_argument(
        "--ahead", default="", help="KiB of weights ahead of the activations to try, such as 16,32,48,96"
    )
    parser.add_argument(
        "--whole",
        action="store_true",
        help="time GEMMs for more than 64 tokens with their quantisation, too, and those that quantise by themselves",
    )
    arguments = parser.parse_args()
    rows = []
    for shape in arguments.shapes.split(","):
        n, k = map(int, shape.split("x"))
        weights = weights_of(n, k)
        for m in map(int, arguments.m.split(",")):
            start, problem = time.time(), GemmProblem(m, n, k)
            x = torch.randn(m, k, device="cuda", dtype=torch.bfloat16)
            out = torch.empty(m, n, device="cuda", dtype=torch.bfloat16)
            codes, scale = reference.per_token_group_quant(x)
            truth = reference.fp8_gemm_nt(codes, scale, *weights[0].plain())
            used = weights if m <= 256 else weights[:3]
            ahead = [int(kib) for kib in arguments.ahead.split(",") if kib]
            candidates: list[heuristics.Choice] = list(decode_candidates(problem, arguments.per_config, ahead))
            candidates += [choice for _, choice in heuristics.gemm_choices(problem)] if m >= 8 else []
            candidates += [choice for _, choice in heuristics.quantizing_choices(problem)] if arguments.whole else []
            found = []
            for choice in candidates:
                out.fill_(float("nan"))
                us = time_choice(choice, x, used, out, whole=m <= 64 or arguments.whole)
                time_choice(choice, x, weights[:1], out, whole=False)
                error = reference.relative_error(out, truth)
                found.append((us, str(choice), error))
            found.sort()
            chosen = heuristics.select(problem)
            rows.append({"m": m, "n": n, "k": k, "found": found, "chosen": str(chosen)})
            mine = next((us for us, name, _ in found if name == str(chosen)), None)
            worst = max(error for *_, error in found)
            tflops = 2 * m * n * k / found[0][0] / 1e6
            print(
                f"{m:5d} {n:6d} {k:6d} best {found[0][0]:8.2f} us {tflops:7.1f} TFLOPS, chosen {mine}, "
                f"error {worst:.5f}, {time.time() - start:.1f} s: {found[0][1]}",
                flush=True,
            )
        arguments.out.write_text(json.dumps(rows))
        del weights
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
