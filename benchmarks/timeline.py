"""When what happens within a call of the experts op whose GEMMs are one launch, by the GPU's own timer.

    python -m benchmarks.timeline [--model qwen3-30b,...] [--tokens 8,...] [--json timeline.json]

A copy of the device code takes notes in memory: one thread of each CTA writes %globaltimer (seen: steps of a quarter of
a microsecond) at the places of `EVENTS`, and at three of each tile. Calls run one behind the other in a graph, weights
cold from memory, balanced random routing; the last one is told, in microseconds from when what came before it had
ended. What each launch adds is told by `benchmarks.experts_parts`; this says where memory rests within one.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from fp8_backend.bench.moe import floor_us, route_on_gpu
from fp8_backend.bench.moe_operands import RandomExperts, copies_for
from fp8_backend.bench.moe_shapes import MoeShape, parse_models
from fp8_backend.bench.shapes import parse_ms
from fp8_backend.bench.stream import read_bytes_per_us
from fp8_backend.kernels import cache, combine, experts_joint, launcher, quantize
from fp8_backend.kernels.compiler import CUDA_FOLDER, KernelSpec, compile_kernel
from fp8_backend.measure.environment import environment, write_json
from fp8_backend.measure.timing import capture

CALLS, CTAS, SLOTS = 8, 256, 64
STEPS, TILE_SLOTS, TILES = ("data", "multiplied", "written"), 4, 14  # of a tile: three times, and which GEMM's it is
FIRST_TILE_SLOT = SLOTS - TILES * TILE_SLOTS
# In which file, before or after which text a note is taken, by which thread; of which kernel, in which slot.
EVENTS = {
    "quantisation, begun": ("quantize.cuh", "before", "    if (early == 1)", "threadIdx.x == 0", 0, 0),
    "quantisation, what came before has ended": (
        "quantize.cuh",
        "before",
        "    if (early == 2)",
        "threadIdx.x == 0",
        0,
        1,
    ),
    "quantisation, ended": ("quantize.cuh", "before", "    // One CTA is enough", "threadIdx.x == 0", 0, 2),
    "GEMMs, begun": ("experts_joint.cuh", "before", "    launch_next_kernel();\n", "threadIdx.x == 0", 1, 0),
    "GEMMs, pairs sorted": ("experts_joint.cuh", "before", "    const u32 first_columns =", "threadIdx.x == 0", 1, 1),
    "GEMMs, quantisation waited for": (
        *("experts_joint.cuh", "after", "        wait_for_previous_kernel();\n", "threadIdx.x == 0", 1, 2),
    ),
    "GEMMs, first ticket": (
        *("experts_joint.cuh", "after", "            u32 t = atomicAdd(counters, 1u);\n", "lane == 0", 1, 3),
    ),
    "sum, begun": ("combine.cuh", "after", "    launch_next_kernel();\n", "threadIdx.x == 0", 2, 0),
    "sum, GEMMs waited for": (
        *("combine.cuh", "after", "        if (first == 0) wait_for_previous_kernel();\n", "threadIdx.x == 0", 2, 1),
    ),
    "sum, ended": ("combine.cuh", "after", "pack_elements(sum[6], sum[7], type));\n", "threadIdx.x == 0", 2, 2),
}
NOTE = """DEVICE void take_note(u32 kernel, u32 slot, u64 word) {{
    const u32 cta = blockIdx.x + blockIdx.y * gridDim.x;
    u64* const notes = reinterpret_cast<u64*>({address}ull) + (kernel * {ctas} + cta) * {slots};
    if (cta < {ctas} && slot < {slots}) notes[slot] = word;
}}
DEVICE void take_note(u32 kernel, u32 slot) {{
    u64 now;
    asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(now));
    take_note(kernel, slot, now);
}}

// ---- warps ---"""


def note(thread: str, kernel: int, slot: str) -> str:
    """Return a statement by which a thread notes the time."""
    return f"if ({thread}) take_note({kernel}, {slot});\n"


def planted(text: str, anchor: str, more: str, where: str) -> str:
    """Return a source with more before or after a text that it has once."""
    assert text.count(anchor) == 1, (anchor, text.count(anchor))
    return text.replace(anchor, more + anchor if where == "before" else anchor + more)


def instrument(folder: Path, address: int) -> None:
    """Write to a folder the device code with notes, which go to memory of 3 * CTAS * SLOTS words at an address."""
    shutil.copytree(CUDA_FOLDER, folder, dirs_exist_ok=True)
    texts = {file: (folder / file).read_text() for file in ("ptx.cuh", *(event[0] for event in EVENTS.values()))}
    words = NOTE.format(ctas=CTAS, slots=SLOTS, address=address)
    texts["ptx.cuh"] = texts["ptx.cuh"].replace("// ---- warps ---", words, 1)
    for file, where, anchor, thread, kernel, slot in EVENTS.values():
        texts[file] = planted(texts[file], anchor, note(thread, kernel, str(slot)), where)
    gemms = texts["experts_joint.cuh"]
    loop = "    while (true) {\n        barrier_wait(full + 8 * ring.stage, ring.parity);\n        const int4 tile"
    gemms = planted(gemms, loop, f"    u32 noted = {FIRST_TILE_SLOT};\n", "before")
    math = "threadIdx.x == 128"
    gemms = planted(gemms, "        const u32 column = tile.z", note(math, 1, "noted"), "before")
    products = note(math, 1, "noted + 1") + f"if ({math}) take_note(1, noted + 3, is_first ? 1 : 2);\n"
    gemms = planted(gemms, "        const bool valid_low = row_in", products + f"noted += {TILE_SLOTS};\n", "before")
    written = note(math, 1, f"noted - {TILE_SLOTS - 2}")
    gemms = planted(gemms, "            continue;\n        }\n        float low[16]", written, "before")
    gemms = planted(gemms, "        __syncwarp();\n        if (warp * 16 < count", written, "before")
    for file, text in (texts | {"experts_joint.cuh": gemms}).items():
        (folder / file).write_text(text)


@contextmanager
def kernels_from(folder: Path) -> Iterator[None]:
    """Have kernels loaded from a folder of device code, compiled anew and kept nowhere."""
    load, caches = launcher.load, (experts_joint._kernel, combine.kernel, quantize.kernel)

    def of_folder(spec: KernelSpec, layout: launcher.ParamLayout) -> launcher.Kernel:
        return load(replace(spec, folder=folder), layout)

    for each in caches:
        each.cache_clear()
    try:
        with patch.object(launcher, "load", of_folder), patch.object(cache, "get", compile_kernel):
            yield
    finally:
        for each in caches:
            each.cache_clear()


def summary(words: torch.Tensor) -> dict[str, Any]:
    """Return microseconds of all events from the notes of a call, [3, CTAS, SLOTS] nanoseconds, 0 where there is none.

    Each event: how many CTAs have it, the first, the median and the last. Tiles: those of each GEMM by the steps of
    their ends, and the median of what lies between two steps.
    """
    start = min(int(word) for word in words[0, :, 1] if word)

    def times(column: torch.Tensor) -> list[float]:
        return sorted((int(word) - start) / 1e3 for word in column if word)

    def told(found: list[float]) -> dict[str, float]:
        return {"ctas": len(found), "first": found[0], "median": statistics.median(found), "last": found[-1]}

    result: dict[str, Any] = {}
    for name, (*_, kernel, slot) in EVENTS.items():
        if found := times(words[kernel, :, slot]):
            result[name] = told(found)
    tiles = words[1, :, FIRST_TILE_SLOT:].reshape(-1, TILE_SLOTS)
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
        instrument(Path(folder), words.data_ptr())
        with kernels_from(Path(folder)):
            weights = one.w13, one.scale_13, one.w2, one.scale_2
            plan = experts_joint.JointPlan(x, shape.top_k, *weights, out, 0, False)
    calls = []
    for index, (router_weights, ids) in enumerate(drawn):
        each = layer.ours[index % len(layer.ours)]
        weights = each.w13, each.scale_13, each.w2, each.scale_2
        calls.append(partial(plan, x, router_weights.float().contiguous(), ids.int().contiguous(), *weights, out, None))
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
