"""When what happens in a dense layer without its attention, by the GPU's own timer.

    python -m benchmarks.layer_timeline [--m 1,8,32] [--layers 4] [--json layer.json]

The layer is that of `benchmarks.layer`, linears joined to what comes before them, in one CUDA graph; a copy of the
device code takes notes (`benchmarks.notes`), and the last layer is told: of each launch when its CTAs begin, when what
came before it has ended, when they have their first data, have multiplied, and end. Microseconds from its
first norm on.
"""

from __future__ import annotations

import argparse
import tempfile
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from benchmarks.layer import HIDDEN, Layer, chain
from benchmarks.notes import CTAS, SLOTS, Place, instrument, kernels_from, note, told
from fp8_backend.bench.shapes import parse_ms
from fp8_backend.kernels import decode, fused_linear, gemm, gemm_plan, norm, quantize, silu
from fp8_backend.measure.environment import environment, write_json
from fp8_backend.measure.timing import capture

LAUNCHES = ("norm 1", "qkv", "quantisation", "out", "norm 2", "gate_up", "silu", "down", "other layers")
STEPS = ("begins", "waited", "data", "multiplied", "ends")
BEGINS, WAITED, DATA, MULTIPLIED, ENDS = range(len(STEPS))
_FIRST, _MATH = "threadIdx.x == 0", "threadIdx.x == 128"
_ENDED = "group_scale(largest[{}]);\n{}"  # of kernels that quantise
_ROW_OF = """DEVICE u32 row_of(const void* pointer) {{
    const u64 address = reinterpret_cast<u64>(pointer);
{}    return {};
}}
"""


def places(addresses: dict[int, int]) -> list[Place]:
    """Return where notes are taken; addresses: of the last layer's weights, and which launch of `LAUNCHES` has each."""
    known = "".join(f"    if (address == {address}ull) return {row};\n" for address, row in addresses.items())
    row_of = Place("ptx.cuh", "DEVICE bool elect_lane()", _ROW_OF.format(known, len(LAUNCHES) - 1))
    of_gemm, of_decode, of_norm = "row_of(packed_b)", "row_of(weight)", "row_of(norm_weight)"
    of_silu, of_codes = LAUNCHES.index("silu"), LAUNCHES.index("quantisation")
    first_data = "if (first_tile < num_tiles) barrier_wait(full, 0);\n" + note(_MATH, of_gemm, DATA)
    begun, waited = "    if (early) launch_next_kernel();\n", "    wait_for_previous_kernel();\n"
    return [
        row_of,
        Place("gemm.cuh", "    meet(split);\n", note(_FIRST, of_gemm, BEGINS), behind=True),
        Place(
            *("gemm.cuh", "            if (producer != 1 || !packed_b) wait_for_previous_kernel();\n"),
            *(note("producer == 0", of_gemm, WAITED), True),
        ),
        Place("gemm.cuh", "        bool full_already = false;\n\n        for (u32 t", first_data),
        Place("gemm.cuh", "            if (t == first_tile) wait_for_pre", note(_MATH, of_gemm, MULTIPLIED)),
        Place("gemm.cuh", "        if (stores_by_copy && lane == 0) bulk_wait();\n", note(_MATH, of_gemm, ENDS), True),
        Place("decode.cuh", "    if (warp < kProducers) {\n", note(_FIRST, of_decode, BEGINS)),
        Place("decode.cuh", "        if (FUSED && warp == 0) named_b", note("threadIdx.x == 64", of_decode, WAITED)),
        Place("decode.cuh", "            if (SPLIT > 1) cluster_wait();\n", note(_MATH, of_decode, MULTIPLIED)),
        Place("decode.cuh", "            if (SPLIT > 1) break;", note(_MATH, of_decode, ENDS)),
        Place("rms_norm_quantize.cuh", begun, note(_FIRST, of_norm, BEGINS)),
        Place("rms_norm_quantize.cuh", waited, note(_FIRST, of_norm, WAITED), behind=True),
        Place("rms_norm_quantize.cuh", _ENDED.format("c", "        }\n"), note(_FIRST, of_norm, ENDS), behind=True),
        Place("silu_mul_quantize.cuh", begun, note(_FIRST, of_silu, BEGINS)),
        Place("silu_mul_quantize.cuh", waited, note(_FIRST, of_silu, WAITED), behind=True),
        Place("silu_mul_quantize.cuh", _ENDED.format("0", ""), note(_FIRST, of_silu, ENDS), behind=True),
        Place("quantize.cuh", "    if (!ZEROS && early)", note(_FIRST, of_codes, BEGINS)),
        Place("quantize.cuh", "    if (ZEROS) {", note(_FIRST, of_codes, WAITED)),
        Place("quantize.cuh", "    // One CTA is enough", note(_FIRST, of_codes, ENDS)),
    ]


def addresses_of(layer: Layer) -> dict[int, int]:
    """Return the addresses of a layer's weights, and which launch has each."""
    linears = {layer.weights[name][0].data_ptr(): LAUNCHES.index(name) for name in layer.weights}
    return linears | {each.data_ptr(): LAUNCHES.index(f"norm {i}") for i, each in enumerate(layer.norms, 1)}


def summary(words: torch.Tensor) -> dict[str, dict[str, dict[str, float]]]:
    """Return what is told of each launch and step of the notes [launches, CTAS, SLOTS], nanoseconds or 0."""
    start = min((int(word) for word in words[0, :, WAITED] if word), default=0)
    result: dict[str, dict[str, dict[str, float]]] = {}
    for row, name in enumerate(LAUNCHES[:-1]):
        steps = {step: [(int(word) - start) / 1e3 for word in words[row, :, i] if word] for i, step in enumerate(STEPS)}
        if found := {step: told(us) for step, us in steps.items() if us}:
            result[name] = found
    return result


def measure(layers: list[Layer], m: int) -> dict[str, Any]:
    """Return a row: what a layer takes with notes, and when what happens in the last one."""
    words = torch.zeros(len(LAUNCHES), CTAS, SLOTS, dtype=torch.int64, device="cuda")
    x = torch.randn(m, HIDDEN, device="cuda", dtype=torch.bfloat16)
    caches = gemm_plan.kernel, decode.kernel, norm.kernel, silu.kernel, quantize.kernel
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        instrument(Path(folder), words.data_ptr(), places(addresses_of(layers[-1])))
        stack.enter_context(kernels_from(Path(folder), caches))
        for prepared in (gemm._plans, gemm._launches, fused_linear._plans):
            stack.enter_context(patch.dict(prepared.by_key, clear=True))
        captured = capture([partial(chain, [layer.joined for layer in layers], x)] * 2)
        words.zero_()
        us = captured.replay_us()
    return {"m": m, "layer_us": us / len(layers), "launches": summary(words.cpu())}


def main() -> None:
    """Measure and print; write the rows where asked."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.layer_timeline", description="Say when what happens.")
    parser.add_argument("--m", default="1,8,32", help="numbers of tokens")
    parser.add_argument("--layers", type=int, default=4, help="each with weights of its own, together beyond L2")
    parser.add_argument("--json", type=Path, help="where to write the rows")
    parser.add_argument("--commit", help="of a tree without a repository")
    arguments = parser.parse_args()
    result: dict[str, Any] = {"env": environment(arguments.commit), "rows": []}
    layers = [Layer() for _ in range(arguments.layers)]
    for m in parse_ms(arguments.m):
        row = measure(layers, m)
        result["rows"].append(row)
        print(f"m={m}: {row['layer_us']:.2f} us a layer")
        for name, steps in row["launches"].items():
            spans = (f"{step} {each['first']:.2f} to {each['last']:.2f}" for step, each in steps.items())
            print(f"    {name:14} {steps['begins']['ctas']:4} CTAs:", ", ".join(spans), flush=True)
        if arguments.json:
            write_json(arguments.json, result)


if __name__ == "__main__":
    main()
