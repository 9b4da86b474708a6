"""compute-sanitizer over every kernel configuration on small odd shapes; a part of `python -m benchmarks.correctness`.

    python -m benchmarks.sanitize OUT.json

Only our kernels run on the GPU: operands are made and results compared on the CPU.

racecheck counts the arrival of a lane for that lane alone: where one lane arrives behind __syncwarp() for its warp, it
takes what the others read before as a race with what is written next. Under it every lane arrives (arrivals.cuh).
"""

from __future__ import annotations

import argparse
import itertools
import re
import shutil
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks import sanitize_experts
from fp8_backend.kernels import (
    attention,
    decode_heuristics,
    gemm,
    heuristics,
    launcher,
    layout,
    norm,
    norm_rope,
    reference,
    silu,
)
from fp8_backend.kernels.compiler import KernelSpec
from fp8_backend.kernels.decode import DecodePlan
from fp8_backend.kernels.gemm_quantize import QuantizingGemmPlan
from fp8_backend.kernels.problem import SPLITS, DecodeConfig, GemmConfig, GemmProblem, QuantizingGemmConfig
from fp8_backend.kernels.quantize import per_token_group_quant
from fp8_backend.kernels.reference import align, ceil_div
from fp8_backend.measure.child import run_child, stop_children_on_signals
from fp8_backend.measure.environment import environment, write_json

FINDINGS = {
    "memcheck": re.compile(r"ERROR SUMMARY: (\d+) error"),
    "racecheck": re.compile(r"RACECHECK SUMMARY: (\d+) hazards?"),
}
LAUNCHED = re.compile(r"^ *\d+\.\d s ", re.MULTILINE)
FINDING = re.compile(r"^========= +(?!COMPUTE-SANITIZER)(\S.*)", re.MULTILINE)
STATUS_OF_FINDINGS = 86
TARGET = [sys.executable, "-m", "benchmarks.sanitize", "--target"]
WATCHED = {"memcheck": [], "racecheck": ["--every-lane-arrives"]}  # what each tool is shown
SLACK_S = 30  # to start, to end the launch under way, and to print the summary
# One allocation a tensor, so that memcheck knows where each ends.
ENVIRONMENT = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
LIMIT = 0.01  # as tests/test_gemm_gpu.py has it
LIMIT_OF_CODES = 0.04  # e4m3 of normal data: 0.026


def launches() -> Iterator[str]:
    """Launch each kernel configuration once; yield what was launched, its result compared with the reference."""
    for m, k, dtype in ((5, 300, torch.bfloat16), (9, 1029, torch.float16), (3, 7, torch.float32)):
        x = torch.randn(m, k).to(dtype)
        for found, expected in zip(per_token_group_quant(x.cuda()), reference.per_token_group_quant(x), strict=True):
            assert torch.equal(found.cpu().float(), expected.float()), f"quantise {m} x {k} {dtype}"
        yield f"quantise {m} x {k} {dtype}"
        if dtype.itemsize == 2:
            launch_producers(m, k, dtype)
            yield f"norm and SiLU with quantisation {m} x {k} {dtype}"
            launch_heads(m, dtype)
            yield f"norm and rotation of {m} x 5 heads {dtype}"
    for group, dtype in itertools.product((3, attention.MAX_GROUP), attention.DTYPES):
        launch_attention(group, dtype)
        yield f"attention of {group} heads a key head {dtype}"
    # In turns, so that a run cut short has seen both kernels.
    for gemm_config, decode_config in itertools.zip_longest(heuristics.GEMM_CONFIGS, decode_heuristics.DECODE_CONFIGS):
        if gemm_config is not None:
            for packed in (True, False):
                launch_gemm(gemm_config, packed)
                yield f"{gemm_config}, {'packed' if packed else 'plain'} weight"
        if decode_config is not None:
            launch_decode(decode_config)
            yield str(decode_config)
    launch_stationary()
    yield str(heuristics.STATIONARY_CONFIG)
    launch_quantizing(heuristics.QUANTIZING_CONFIG)
    yield str(heuristics.QUANTIZING_CONFIG)
    yield from sanitize_experts.launches()


def launch_producers(m: int, k: int, dtype: torch.dtype) -> None:
    """Launch the kernels that write codes in front of a linear, in rows and in tiles."""
    x, weight = torch.randn(m, 2 * k).to(dtype), torch.rand(k).to(dtype)
    given, norm_weight = x.cuda(), weight.cuda()
    halves = given[:, :k], given[:, k:]
    made = norm.rms_norm_quant(*halves, norm_weight, 1e-6, keep=True)
    normed, summed = reference.rms_norm(x[:, :k], x[:, k:], weight, 1e-6)
    assert made.summed is not None and made.normed is not None and summed is not None
    assert torch.equal(made.summed.cpu(), summed) and reference.relative_error(made.normed.cpu(), normed) < LIMIT
    codes, scale = (each.cpu() for each in silu.silu_mul_quant(given))
    expected = reference.silu_mul(x)
    assert reference.relative_error(reference.dequantize(codes[:, :k], scale, 1), expected) < LIMIT_OF_CODES
    rows, gate, k_blocks, stream = norm.Rows(*halves, norm_weight, True), silu.halved(given), ceil_div(k, 128), 0
    for launch, pointers in (
        (rows.prepare(1e-6)(rows.x, 16), rows.pointers()),
        (silu.prepare(gate, 16), (gate.data_ptr(),)),
    ):
        tiles = torch.empty(k_blocks, 16, 128, dtype=torch.uint8, device="cuda")
        scales = torch.empty(k_blocks, align(m, 4), device="cuda")
        launch(stream, *pointers, tiles.data_ptr(), scales.data_ptr())


def launch_heads(m: int, dtype: torch.dtype) -> None:
    """Launch the kernel of queries' and keys' heads, 5 a token, with values behind them, which go to a cache, too."""
    rows, (of_queries, of_keys) = torch.randn(m, 7 * 100).to(dtype), torch.rand(2, 100).to(dtype)
    positions, angles = torch.arange(m) % 9, torch.randn(9, 100).to(dtype)
    expected = reference.qk_norm_rope(rows, positions, of_queries, of_keys, angles, 1e-6, 3, 2)
    on_gpu = rows.cuda(), positions.cuda(), of_queries.cuda(), of_keys.cuda(), angles.cuda()
    slots = torch.arange(m) * 3
    slots[1::3] = -1
    cache = torch.zeros(-(-3 * m // 16), 16, 2, 200, dtype=dtype)
    keys, values = cache.cuda().split(100, dim=-1)
    kept = norm_rope.KeyValueCache(keys, values, slots.cuda())
    for found, truth in zip(norm_rope.qk_norm_rope(*on_gpu, 1e-6, 3, 2, kept), expected, strict=True):
        assert reference.relative_error(found.cpu(), truth) < LIMIT
    true_keys, true_values = cache.split(100, dim=-1)
    reference.keep(expected[1], rows[:, 500:].unflatten(1, (2, 100)), true_keys, true_values, slots)
    for found, truth in ((keys, true_keys), (values, true_values)):
        assert reference.relative_error(found.cpu(), truth) < LIMIT


def launch_attention(group: int, dtype: torch.dtype) -> None:
    """Launch attention of requests of none, of some tokens, and of several parts: without codes and with both kinds."""
    lengths = torch.tensor([0, 5, 70, 3000, 1], dtype=torch.int32)
    keys, values = torch.randn(200, 16, 2, 2 * attention.HEAD).to(dtype).split(attention.HEAD, dim=-1)
    table = torch.randperm(200, dtype=torch.int32)[:190].expand(len(lengths), 190).contiguous()
    queries = torch.randn(len(lengths), 2 * group, attention.HEAD).to(dtype)
    truth = attention.reference(queries, keys, values, table, lengths, 0.1)
    rows, cache, blocks, tokens = (each.cuda() for each in (queries, torch.cat((keys, values), -1), table, lengths))
    of_keys, of_values = cache.split(attention.HEAD, dim=-1)
    out = torch.empty_like(rows)
    in_rows, in_tiles = (attention.empty_codes(len(lengths), 2 * group, tile_rows, out.device) for tile_rows in (0, 8))
    for codes in (None, in_rows, in_tiles):
        out.fill_(float("nan"))
        attention.launch(rows, of_keys, of_values, blocks, tokens, 0.1, out, codes)
        assert reference.relative_error(out.cpu(), truth) < LIMIT


def operands(m: int, n: int, k: int) -> tuple[torch.Tensor, gemm.Weight, torch.Tensor, torch.Tensor]:
    """Return x on the CPU, the packed weight on the GPU, an output there full of NaN, and the truth on the CPU."""
    x = torch.randn(m, k).to(torch.bfloat16)
    codes = (torch.randn(n, k) * 60).clamp(-448, 448).to(torch.float8_e4m3fn)
    scale = torch.rand(ceil_div(n, 128), ceil_div(k, 128)) * 1e-3 + 1e-4
    codes_x, scale_x = reference.per_token_group_quant(x)
    truth = reference.fp8_gemm_nt(codes_x[:, :k], scale_x, codes, scale)
    weight = gemm.Weight(layout.pack_weight(codes).cuda(), layout.pack_scale(scale, n, k).cuda(), n, k)
    return x, weight, torch.full((m, n), float("nan"), dtype=torch.bfloat16).cuda(), truth


def launch_gemm(config: GemmConfig, packed: bool) -> None:
    """Launch one configuration on partial tiles, two tiles by two, k split in every way that it can be."""
    m = config.block_m + 3
    # An n that allows stores of 16 bytes, and one that does not; every stage is filled more than once.
    n, k = config.block_n + (8 if packed else 7), 128 * max(config.num_stages + 2, 8 if config.split_k else 0)
    x, weight, out, truth = operands(m, n, k)
    if not packed:
        weight = gemm.Weight(layout.unpack_weight(weight.codes.cpu(), n, k).cuda(), weight.scale, n, k)
    codes, scale = per_token_group_quant(x.cuda())
    for _, choice in heuristics.gemm_choices(GemmProblem(m, n, k)):
        if choice.config == config:
            out.fill_(float("nan"))
            gemm.launch_gemm(choice, codes, scale, weight, out, None)
            assert reference.relative_error(out.cpu(), truth) < LIMIT, choice


def launch_stationary() -> None:
    """Launch the GEMM whose weights stay, on partial tiles of more columns than weights fit, two CTAs for all."""
    x, weight, out, truth = operands(3 * 64 + 3, 3 * 128 + 7, 4 * 128 - 8)
    choice = heuristics.GemmChoice(heuristics.STATIONARY_CONFIG, 3, 2)
    gemm.launch_gemm(choice, *per_token_group_quant(x.cuda()), weight, out, None)
    assert reference.relative_error(out.cpu(), truth) < LIMIT, choice


def launch_quantizing(config: QuantizingGemmConfig) -> None:
    """Launch one configuration on partial tiles, two tiles by two, k split in every way."""
    m, n, k = config.block_m + 3, config.block_n + 7, 128 * 10 + 8
    x, weight, out, truth = operands(m, n, k)
    rows = x.cuda()
    for split in SPLITS:
        out.fill_(float("nan"))
        choice = heuristics.QuantizingGemmChoice(config, 4 * split if split > 1 else 3, split)
        QuantizingGemmPlan(choice, rows, out, None)(rows, weight.codes, weight.scale, out, None)
        assert reference.relative_error(out.cpu(), truth) < LIMIT, choice


def launch_decode(config: DecodeConfig) -> None:
    """Launch one configuration with an odd number of tokens and of rows, on more tiles than clusters or CTAs."""
    m, n, k, rows = config.tokens - 1, 93, 128 * 2 * config.split + 128, 40
    x, weight, out, truth = operands(m, n, k)
    tiles = ceil_div(n, rows)
    stages = decode_heuristics.decode_stages(config, rows, ceil_div(k, 128))
    grid = min(tiles, 2) if config.split == 1 else tiles * config.split
    choice = decode_heuristics.DecodeChoice(config, rows, stages, grid, min(2, stages))
    tokens = x.cuda()
    DecodePlan(choice, tokens, out, None)(tokens, weight.codes, weight.scale, out, None)
    assert reference.relative_error(out.cpu(), truth) < LIMIT, config


def let_every_lane_arrive() -> None:
    """Have kernels that are loaded from now on arrive by every lane where one would for its warp."""
    load = launcher.load

    def load_so(spec: KernelSpec, layout: launcher.ParamLayout) -> launcher.Kernel:
        return load(replace(spec, defines=(*spec.defines, ("EVERY_LANE_ARRIVES", 1))), layout)

    launcher.load = load_so


def target(seconds: float, every_lane_arrives: bool) -> None:
    """Be the program that compute-sanitizer watches; end after `seconds`, for its summary to be printed."""
    if every_lane_arrives:
        let_every_lane_arrive()
    torch.manual_seed(0)
    start = time.monotonic()
    for name in launches():
        print(f"{time.monotonic() - start:6.1f} s {name}", flush=True)
        if time.monotonic() - start > seconds:
            print("stopped: the time is used up")
            return
    print("every configuration was launched")


def sanitize(tool: str, log: Path, seconds: float) -> dict[str, Any]:
    """Run the launches under one tool; return what it found, or why it found nothing out."""
    program = shutil.which("compute-sanitizer") or shutil.which("/usr/local/cuda/bin/compute-sanitizer")
    if program is None:
        return {"failure": "compute-sanitizer is neither on PATH nor in /usr/local/cuda/bin", "clean": False}
    command = [program, "--tool", tool, "--error-exitcode", str(STATUS_OF_FINDINGS), "--print-limit", "20"]
    watched = [*TARGET, *WATCHED[tool], "--seconds", str(seconds)]
    start = time.monotonic()
    failure = run_child([*command, *watched], log, seconds + SLACK_S, ENVIRONMENT)
    text = log.read_text(errors="replace")
    summary = FINDINGS[tool].search(text)
    result: dict[str, Any] = {
        "errors": int(summary[1]) if summary else None,
        "seconds": round(time.monotonic() - start, 1),
        "launches": len(LAUNCHED.findall(text)),
        "every_configuration": "every configuration was launched" in text,
        "clean": failure is None and summary is not None and summary[1] == "0",
    }
    return result if result["clean"] else {**result, "failure": failure, "findings": FINDING.findall(text)[:20]}


def main() -> None:
    """Run what each tool is shown alone, which compiles its kernels, then under the tool; write after each one."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sanitize", description=__doc__)
    parser.add_argument("out", type=Path, nargs="?")
    parser.add_argument("--target", action="store_true", help="launch the kernels and nothing else")
    parser.add_argument("--every-lane-arrives", action="store_true", help="of --target, for racecheck")
    parser.add_argument("--seconds", type=float, default=40, help="of launches under each tool")
    parser.add_argument("--commit", help="of a tree without a repository")
    arguments = parser.parse_args()
    if arguments.target:
        return target(arguments.seconds, arguments.every_lane_arrives)
    if arguments.out is None:
        parser.error("name the file to write")
    stop_children_on_signals()
    found: dict[str, Any] = {}
    result = {"env": environment(arguments.commit), "sanitizer": found}
    log = arguments.out.with_suffix(".log")
    for options in WATCHED.values():
        if (failure := run_child([*TARGET, *options], log, arguments.seconds + SLACK_S, ENVIRONMENT)) is not None:
            found["without a tool"] = {"failure": failure, "clean": False}
            write_json(arguments.out, result)
            sys.exit(f"the launches fail without any tool: {failure}")
    for tool in FINDINGS:
        found[tool] = sanitize(tool, arguments.out.with_name(f"{arguments.out.stem}-{tool}.log"), arguments.seconds)
        print(f"{tool}: {found[tool]}"[:500], flush=True)
        write_json(arguments.out, result)
    if not all(result.get("clean") for result in found.values()):
        sys.exit("compute-sanitizer: not clean")


if __name__ == "__main__":
    main()
