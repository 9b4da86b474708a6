"""Time the experts with experts_rows.cuh and combine.cuh in the place of experts_down.cuh, beside both forms in use.

    python -m benchmarks.trials.experts_rows [--tokens 1,8,64] [--model qwen3-30b,...] [--json experts_rows.json]

Weights cold from memory, balanced random routing, the variants interleaved in CUDA-graph replays; each is verified
against float64 in the run that times it, its output poisoned before.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.trials import replay_into_nan
from fp8_backend.bench.moe import floor_us
from fp8_backend.bench.moe_operands import RandomExperts, copies_for, sampled_tokens
from fp8_backend.bench.moe_shapes import MODELS, MoeShape, route
from fp8_backend.kernels import experts, experts_decode, experts_prefill, launcher
from fp8_backend.kernels.compiler import CUDA_FOLDER, KernelSpec
from fp8_backend.kernels.problem import MAX_SHARED_BYTES
from fp8_backend.kernels.quantize import ELEMENT_TYPES, vectorised
from fp8_backend.kernels.reference import align, relative_error
from fp8_backend.measure.environment import environment, write_json
from fp8_backend.measure.timing import capture, interleaved_us

HERE = Path(__file__).parent
ROWS, TILE_GROUPS = (8, 16), 16  # wgmma's N; groups of 8 rows of the weight in a tile: both halves of 64 are filled
ROUTINGS = 8
LAYOUT = launcher.ParamLayout(("u64",) * 7 + ("i64",) * 3 + ("u32",) * 11)
Load = Callable[[int], launcher.Kernel]


def spec(rows: int, folder: Path) -> KernelSpec:
    """Return what to compile, from a folder made by `sources`."""
    return KernelSpec("experts_rows.cuh", "experts_rows", (("ROWS", rows),), folder)


def sources(folder: Path) -> Path:
    """Write the device code of the package and of this trial into a folder; return it."""
    shutil.copytree(CUDA_FOLDER, folder, dirs_exist_ok=True)
    shutil.copy(HERE / "experts_rows.cuh", folder)
    return folder


def run(
    kernel: Load,
    x: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    w13: torch.Tensor,
    scale_13: torch.Tensor,
    w2: torch.Tensor,
    scale_2: torch.Tensor,
    out: torch.Tensor,
) -> torch.Tensor:
    """Launch the op; arguments are those of `experts_decode`, without an expert map and weights on the input."""
    (m, hidden), top_k, intermediate, device = x.shape, topk_ids.shape[1], w13.shape[2] // 2, x.device.index
    pairs, plan = m * top_k, experts_decode._plan(m, top_k, hidden, intermediate, False)
    workspace = torch.empty(plan.offsets[-1], dtype=torch.uint8, device=x.device)
    h, x_codes, x_scale, h_codes, h_scale, _ = (workspace.data_ptr() + offset for offset in plan.offsets)
    wide = int(topk_ids.dtype == torch.int64)
    quantise = experts_decode._quantize
    quantise(x.data_ptr(), x.dtype, x.shape, x.stride(0), vectorised(x), x_codes, x_scale, device)
    routed = (topk_ids.data_ptr(), 0, 0)
    experts_decode._launch_up(plan, x, (x_codes, x_scale), w13, scale_13, h, routed, top_k, wide)
    quantise(h, torch.float32, (pairs, intermediate), intermediate, 0, h_codes, h_scale, device, early=True)
    rows = torch.empty((pairs, hidden), dtype=x.dtype, device=x.device)
    num_groups, k_blocks, n_aligned, _ = w2.shape
    tokens = plan.down.rows
    taken = experts_decode.BARRIER_BYTES + tokens * 512 + experts_decode.units_bytes(num_groups, pairs, pairs)
    ring_bytes = (MAX_SHARED_BYTES - taken) // 1024 * 1024
    params: tuple[int, ...] = (
        h_codes,
        h_scale,
        w2.data_ptr(),
        scale_2.data_ptr(),
        rows.data_ptr(),
        topk_ids.data_ptr(),
        0,
    )
    params += (w2.stride(0), scale_2.stride(0), align(pairs, 4), pairs, num_groups, hidden, n_aligned, k_blocks)
    params += (scale_2.stride(1), TILE_GROUPS, ring_bytes, plan.stage_bytes, wide, ELEMENT_TYPES[x.dtype])
    stream, grid = launcher.current_stream(device), (experts_decode.num_sms(device), 1, 1)
    kernel(tokens).launch(grid, experts_decode.THREADS, MAX_SHARED_BYTES, params, stream, pdl=True)
    experts_prefill._combine(topk_ids, None, topk_weights, rows, out, num_groups)
    return out


def form(name: experts.Form, x: torch.Tensor, *operands: torch.Tensor) -> torch.Tensor:
    """Run one form in use; return its output, the last operand."""
    experts.launch(name, x, *operands, None, False)
    return operands[-1]


def measure(shape: MoeShape, tokens: list[int], kernel: Load) -> Iterator[dict[str, Any]]:
    """Yield a row for each number of tokens: microseconds of both forms in use and of the trial."""
    device = torch.device("cuda", torch.cuda.current_device())
    l2 = torch.cuda.get_device_properties(device).L2_cache_size
    layer = RandomExperts(shape, device, copies_for(shape, l2, torch.cuda.mem_get_info()[0], False), plain=False)
    for m in tokens:
        x = torch.randn(m, shape.hidden, device=device, dtype=torch.bfloat16)
        drawn = [route(shape, m, "balanced", seed) for seed in range(ROUTINGS)]
        routed = [(weights.to(device), ids.to(device)) for weights, ids in drawn]
        sampled = sampled_tokens(m).to(device)
        truth = layer.truth(x, routed[0], sampled)
        arms, errors = {}, {}
        calls_of: dict[str, Callable[..., torch.Tensor]] = {
            "decode": partial(form, "decode"),
            "prefill": partial(form, "prefill"),
            "trial": partial(run, kernel),
        }
        for name, call in calls_of.items():
            outs = [torch.full_like(x, float("nan")) for _ in routed]
            calls = []
            for index, (given, out) in enumerate(zip(routed, outs, strict=True)):
                each = layer.ours[index % len(layer.ours)]
                calls.append(partial(call, x, *given, each.w13, each.scale_13, each.w2, each.scale_2, out))
            arms[name] = capture(calls)
            replay_into_nan(arms[name], outs)
            errors[name] = relative_error(outs[0][sampled], truth)
        us = {name: round(value, 2) for name, value in interleaved_us(arms).items()}
        hit = sum(len(ids.unique()) for _, ids in routed) / len(routed)
        floor = round(floor_us(shape, hit), 2)
        yield {"model": shape.name, "tokens": m, "us": us, "rel_err": errors, "floor_us": floor}


def main() -> None:
    """Measure and print; write the rows where asked."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.trials.experts_rows", description="Time a trial.")
    parser.add_argument("--tokens", default="1,2,4,8,16,32,64")
    parser.add_argument("--model", default="qwen3-30b,qwen3-235b-tp4,dsv3-tp8")
    parser.add_argument("--json", type=Path, help="where to write the rows")
    parser.add_argument("--commit", help="of a tree without a repository")
    arguments = parser.parse_args()
    result: dict[str, Any] = {"env": environment(arguments.commit), "rows": []}
    with tempfile.TemporaryDirectory() as scratch:
        folder = sources(Path(scratch))
        kernel = cache(lambda rows: launcher.load(spec(rows, folder), LAYOUT))
        for name in arguments.model.split(","):
            for row in measure(MODELS[name], [int(m) for m in arguments.tokens.split(",")], kernel):
                result["rows"].append(row)
                print(row, flush=True)
            torch.cuda.empty_cache()
            if arguments.json:
                write_json(arguments.json, result)


if __name__ == "__main__":
    main()
