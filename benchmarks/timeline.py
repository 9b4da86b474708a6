"""When what happens within a call of the experts op whose GEMMs are one launch, by the GPU's own timer.

    python -m benchmarks.timeline [--model qwen3-30b,...] [--tokens 8,...] [--json timeline.json]

A copy of the device code takes notes (`benchmarks.notes`): one thread of each CTA at the places of `EVENTS`, and at
three of each tile. Calls run one behind the other in a graph, weights cold from memory, balanced random routing; the
last one is told, in microseconds from when what came before it had ended. What each launch adds is told by
`benchmarks.experts_parts`; this says where memory rests within one.
"""

from __future__ import annotations

import argparse
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.notes import CTAS, SLOTS, Place, instrument, kernels_from, note, told
from fp8_backend.bench.moe import floor_us, route_on_gpu
from fp8_backend.bench.moe_operands import RandomExperts, copies_for
from fp8_backend.bench.moe_shapes import MoeShape, parse_models
from fp8_backend.bench.shapes import parse_ms
from fp8_backend.bench.stream import read_bytes_per_us
from fp8_backend.kernels import combine, experts_joint, quantize
from fp8_backend.kernels.experts_plans import ExpertWeights
from fp8_backend.measure.environment import environment, write_json
from fp8_backend.measure.timing import capture

CALLS = 8
STEPS, TILE_SLOTS, TILES = ("data", "multiplied", "written"), 4, 14  # of a tile: three times, and which GEMM's it is
FIRST_TILE_SLOT = SLOTS - TILES * TILE_SLOTS
QUANTISATION, GEMMS, SUM = range(3)  # rows of notes
_FIRST, _MATH, _PRODUCER = "threadIdx.x == 0", "threadIdx.x == 128", "lane == 0"
# Row and slot of each event; where its note is taken.
EVENTS = {
    "quantisation, begun": (QUANTISATION, 0, "quantize.cuh", _FIRST, "    if (!ZEROS && early)", False),
    "quantisation, what came before has ended": (QUANTISATION, 1, "quantize.cuh", _FIRST, "    if (ZEROS) {", False),
    "quantisation, ended": (QUANTISATION, 2, "quantize.cuh", _FIRST, "    // One CTA is enough", False),
    "GEMMs, begun": (GEMMS, 0, "experts_joint.cuh", _FIRST, "    launch_next_kernel();\n", False),
    "GEMMs, pairs sorted": (GEMMS, 1, "experts_joint.cuh", _FIRST, "    const u32 first_columns =", False),
    "GEMMs, quantisation waited for": (
        *(GEMMS, 2, "experts_joint.cuh", _FIRST, "        wait_for_previous_kernel();\n", True),
    ),
    "GEMMs, first ticket": (
        *(GEMMS, 3, "experts_joint.cuh", _PRODUCER, "            u32 t = atomicAdd(counters, 1u);\n", True),
    ),
    "sum, begun": (SUM, 0, "combine.cuh", _FIRST, "    launch_next_kernel();\n", True),
    "sum, GEMMs waited for": (
        *(SUM, 1, "combine.cuh", _FIRST, "        if (first == 0) wait_for_previous_kernel();\n", True),
    ),
    "sum, ended": (SUM, 2, "combine.cuh", _FIRST, "pack_elements(sum[6], sum[7], type));\n", True),
}


def places() -> list[Place]:
    """Return where notes are taken: of `EVENTS`, and of each tile when its data is there, multiplied and written."""
    found = [Place(file, text, note(who, row, slot), late) for row, slot, file, who, text, late in EVENTS.values()]
    loop = "    while (true) {\n        barrier_wait(full + 8 * ring.stage, ring.parity);\n        const int4 tile"
    of_gemm = f"if ({_MATH}) take_note({GEMMS}, noted + 3, is_first ? 1 : 2);\nnoted += {TILE_SLOTS};\n"
    written = note(_MATH, GEMMS, f"noted - {TILE_SLOTS - 2}")
    of_tiles = {
        loop: f"    u32 noted = {FIRST_TILE_SLOT};\n",
        "        const u32 column = tile.z": note(_MATH, GEMMS, "noted"),
        "        const bool valid_low = row_in": note(_MATH, GEMMS, "noted + 1") + of_gemm,
        "            continue;\n        }\n        const i64 row = tile.x": written,
        "        __syncwarp();\n        if (warp * 16 < count": written,
    }
    return found + [Place("experts_joint.cuh", text, planted) for text, planted in of_tiles.items()]


def summary(words: torch.Tensor) -> dict[str, Any]:
    """Return microseconds of all events from the notes of a call, [3, CTAS, SLOTS] nanoseconds, 0 where there is none.

    Tiles: those of each GEMM by the steps of their ends, and the median of what lies between two steps.
    """
    start = min(int(word) for word in words[QUANTISATION, :, 1] if word)

    def times(column: torch.Tensor) -> list[float]:
        return [(int(word) - start) / 1e3 for word in column if word]

    result: dict[str, Any] = {}
    for name, (row, slot, *_) in EVENTS.items():
        if found := times(words[row, :, slot]):
            result[name] = told(found)
    tiles = words[GEMMS, :, FIRST_TILE_SLOT:].reshape(-1, TILE_SLOTS)
    for gemm, name in ((1, "first GEMM"), (2, "second GEMM")):
        own = tiles[tiles[:, 3] == gemm]
        if not len(own):
            continue
        result |= {f"{name}, tiles {step}": told(times(own[:, index])) for index, step in enumerate(STEPS)}
        products, ends = ((own[:, i + 1] - own[:, i]).double().median() / 1e3 for i in (0, 1))
        result[f"{name}, a tile"] = {"products": float(products), "end": float(ends)}
    return result


def measure(shape: MoeShape, tokens: int, layer: RandomExperts) -> dict[str, Any]:
    """Return a row: what a call of so many tokens takes with notes, and when what happens in it."""
    words = torch.zeros(3, CTAS, SLOTS, dtype=torch.int64, device="cuda")
    x = torch.randn(tokens, shape.hidden, device="cuda", dtype=torch.bfloat16)
    out, one = torch.empty_like(x), layer.ours[0]
    drawn = [route_on_gpu(shape, tokens, "balanced", seed) for seed in range(CALLS)]
    hit = len(drawn[-1][1].unique())
    with tempfile.TemporaryDirectory() as folder:
        instrument(Path(folder), words.data_ptr(), places())
        with kernels_from(Path(folder), (experts_joint._kernel, combine.kernel, quantize.kernel)):
            weights = ExpertWeights(one.w13, one.scale_13, one.w2, one.scale_2)
            plan = experts_joint.JointPlan(x, shape.top_k, weights, out, 0, False)
    calls = []
    for index, (router_weights, ids) in enumerate(drawn):
        each = layer.ours[index % len(layer.ours)]
        weights = ExpertWeights(each.w13, each.scale_13, each.w2, each.scale_2)
        calls.append(partial(plan, x, router_weights.float().contiguous(), ids.int().contiguous(), weights, out, None))
    captured = capture(calls)
    words.zero_()
    us = captured.replay_us()
    row = {"model": shape.name, "tokens": tokens, "us": us, "experts_hit": hit}
    return row | {"floor_us": floor_us(shape, hit, read_bytes_per_us(x.device.index)), "events": summary(words.cpu())}


def main() -> None:
    """Measure and print; write the rows where asked."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.timeline", description="Say when what happens.")
    parser.add_argument("--model", default="qwen3-30b,qwen3-235b-tp4,dsv3-tp8", help="as for bench --moe")
    parser.add_argument("--tokens", default="4,8,32")
    parser.add_argument("--json", type=Path, help="where to write the rows")
    parser.add_argument("--commit", help="of a tree without a repository")
    arguments = parser.parse_args()
    result: dict[str, Any] = {"env": environment(arguments.commit), "rows": []}
    device = torch.device("cuda", torch.cuda.current_device())
    l2 = torch.cuda.get_device_properties(device).L2_cache_size
    for shape in parse_models(arguments.model):
        layer = RandomExperts(shape, device, copies_for(shape, l2, torch.cuda.mem_get_info()[0], False), plain=False)
        for tokens in parse_ms(arguments.tokens):
            row = measure(shape, tokens, layer)
            result["rows"].append(row)
            print(f"{row['model']}, {tokens} tokens: {row['us']:.1f} us, weights' floor {row['floor_us']:.1f}")
            for name, event in row["events"].items():
                print(f"    {name:42}", "  ".join(f"{key} {value:7.2f}" for key, value in event.items()), flush=True)
        del layer
        torch.cuda.empty_cache()
        if arguments.json:
            write_json(arguments.json, result)


if __name__ == "__main__":
    main()
