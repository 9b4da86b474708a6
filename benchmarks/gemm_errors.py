"""Errors of the GEMM and of the whole linear over a grid of shapes; a part of `python -m benchmarks.correctness`."""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.operands import DEVICE, DeepGemm, RandomWeight, row
from fp8_backend.kernels import reference
from fp8_backend.kernels.quantize import per_token_group_quant
from fp8_backend.measure.environment import write_json

MS = (0, 1, 3, 17, 64, 127, 128, 129, 1000, 4096)
# (n, k) where DeepGEMM is demanded for every m: DeepSeek-V3 TP1 and TP8, Qwen3-8B and Qwen3-32B.
FULL = ((2112, 7168), (24576, 1536), (7168, 16384), (7168, 2048), (512, 7168), (7168, 256), (6144, 4096), (4096, 12288))
# Elsewhere it is demanded for the two m of DEMANDED_MS and runs for the others while its time lasts.
REST = (
    (3072, 1536),
    (4096, 512),
    (32768, 512),
    (36864, 7168),
    (7168, 18432),
    (4608, 7168),
    (7168, 2304),
    (4096, 7168),
    (4096, 4096),
    (24576, 4096),
    (10240, 5120),
    (5120, 8192),
    (51200, 5120),
    (1280, 5120),
    (5120, 3200),
    (576, 2048),
    (200, 384),
    (1000, 640),
    (64, 128),
)
ODD = ((7, 256), (1001, 1152), (2047, 4096), (513, 300), (1000, 130), (2048, 10944), (384, 192))
DEMANDED_MS = (17, 4096)
CHOICE = (
    f"DeepGEMM is demanded for every m at {len(FULL)} (n, k) and for m in {DEMANDED_MS} at the others; it runs for the "
    "rest while its time lasts"
)


def rows_of_shape(n: int, k: int, ms: tuple[int, ...], deepgemm: DeepGemm) -> list[dict[str, Any]]:
    """Return the rows of one weight; activations of m rows are the first m of one matrix."""
    weight = RandomWeight(n, k)
    x = torch.randn(max(ms), k, device=DEVICE).to(torch.bfloat16)
    truth = weight.truth(x)
    rows = []
    for m in sorted(ms, key=lambda m: m not in DEMANDED_MS):
        codes, scale = per_token_group_quant(x[:m])
        outputs = {
            "gemm, packed weight": weight.multiply(codes, scale, packed=True),
            "gemm, plain weight": weight.multiply(codes, scale, packed=False),
            "linear": weight.linear(x[:m]),
        }
        peer = deepgemm.multiply(weight, codes, scale, (n, k) in FULL or m in DEMANDED_MS) if m else None
        peer_error = None if peer is None else reference.relative_error(peer, truth[:m])
        for case, y in outputs.items():
            assert y.shape == (m, n)
            rows.append(row(case, m, n, k, reference.relative_error(y, truth[:m]), peer_error))
    return rows


def main() -> None:
    """Measure every shape and write after each one."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gemm_errors", description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--m", type=lambda text: tuple(map(int, text.split(","))), default=MS)
    parser.add_argument("--shapes", help="like 576x2048,200x384; default: all")
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--deepgemm-seconds", type=float, default=100)
    arguments = parser.parse_args()
    shapes: tuple[tuple[int, int], ...] = FULL + REST + ODD
    if arguments.shapes:
        shapes = tuple((int(n), int(k)) for n, k in (shape.split("x") for shape in arguments.shapes.split(",")))
    torch.manual_seed(arguments.seed)
    deepgemm = DeepGemm(arguments.deepgemm_seconds)
    result: dict[str, Any] = {"rows": [], "failures": []}
    for n, k in shapes:
        start = time.monotonic()
        try:
            rows = rows_of_shape(n, k, arguments.m, deepgemm)
        except Exception as error:  # the other shapes still count
            result["failures"].append(f"{n} x {k}: {error!r}"[:400])
            print(f"{n:6d} x {k:5d} FAILED {error!r}"[:300], flush=True)
            continue
        finally:
            result["deepgemm"] = {"choice": CHOICE, **deepgemm.report()}
        result["rows"] += rows
        write_json(arguments.out, result)
        worst = max((found["rel_err"] for found in rows if found["rel_err"] is not None), default=0.0)
        peers = [found["deepgemm_rel_err"] for found in rows if "deepgemm_rel_err" in found]
        bad = sum(not found["verified"] for found in rows)
        print(
            f"{n:6d} x {k:5d} largest error {worst:.5f}, DeepGEMM's {max(peers, default=float('nan')):.5f} "
            f"({len(peers)} of {len(rows)} rows), {bad} bad, {time.monotonic() - start:.1f} s",
            flush=True,
        )
    write_json(arguments.out, result)


if __name__ == "__main__":
    main()
