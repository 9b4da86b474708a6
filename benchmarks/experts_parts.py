"""Time the experts' launches: all forms, cut off behind the first launch, the second, ...

    python -m benchmarks.experts_parts [--model qwen3-30b,...] [--tokens 1,4,16] [--many] [--json parts.json]

Weights cold from memory, balanced random routing, CUDA-graph replays, all cuts of a form in turns. The difference
of two neighbours is what a launch adds behind the others, dependent launches overlapping as they do in serving; a call
that is cut off leaves its output unwritten, so nothing is verified here: `fp8-backend bench --moe` does that. With
--many only the form for many rows, once with rows gathered in the first GEMM and once with rows sorted before it.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, get_args
from unittest.mock import patch

import torch

from fp8_backend.bench.moe import calls_for, floor_us, route_on_gpu
from fp8_backend.bench.moe_operands import RandomExperts, copies_for
from fp8_backend.bench.moe_shapes import MoeShape, parse_models
from fp8_backend.bench.shapes import parse_ms
from fp8_backend.bench.stream import read_bytes_per_us
from fp8_backend.kernels import experts, experts_prefill_plan, launcher
from fp8_backend.measure.environment import environment, write_json
from fp8_backend.measure.timing import capture, interleaved_us

ROUNDS = 11
SORTING = {"gathered": False, "sorted": True}


@contextmanager
def launches_up_to(most: int | None = None) -> Iterator[list[str]]:
    """Let only the first launches of this package reach the driver; yield the names of those that did."""
    names: list[str] = []
    submit = launcher.Kernel.submit

    def counted(self: launcher.Kernel, *arguments: Any) -> None:
        if most is None or len(names) < most:
            names.append(self.name)
            submit(self, *arguments)

    with patch.object(launcher.Kernel, "submit", counted):
        yield names


def cut(call: Callable[[], object], most: int) -> None:
    """Run a call, cut off behind its first `most` launches."""
    with launches_up_to(most):
        call()


@contextmanager
def sorting(rows: bool) -> Iterator[None]:
    """Have the form for many rows sort its rows before the first GEMM, or gather them in it, wherever that can be."""
    with patch.multiple(experts_prefill_plan, SORTED_ROWS=0 if rows else 10**9, SORTED_INTERMEDIATE=0):
        yield


def launch_sorted(rows: bool, *operands: Any) -> None:
    """Launch the form for many rows as `sorting` says."""
    with sorting(rows):
        experts.launch("prefill", *operands)


def arms_of(shape: MoeShape, tokens: int, many: bool) -> dict[str, Callable[..., None]]:
    """Return what is timed by name: every form that can serve so many tokens, or the one for many rows in both ways."""
    if many:
        return {f"prefill, rows {name}": partial(launch_sorted, rows) for name, rows in SORTING.items()}
    widths = shape.top_k, shape.hidden, shape.intermediate
    forms = (form for form in get_args(experts.Form) if experts.can_serve(form, tokens, *widths))
    return {form: partial(experts.launch, form) for form in forms}


def measure(shape: MoeShape, tokens: int, layer: RandomExperts, many: bool = False) -> Iterator[dict[str, Any]]:
    """Yield a row for each form: its kernels, and microseconds up to and with each of them."""
    x = torch.randn(tokens, shape.hidden, device="cuda", dtype=torch.bfloat16)
    drawn = [route_on_gpu(shape, tokens, "balanced", 0)]
    hit, rate = len(drawn[0][1].unique()), read_bytes_per_us(x.device.index)
    drawn += [route_on_gpu(shape, tokens, "balanced", seed) for seed in range(1, calls_for(shape, tokens, hit, rate))]
    out = torch.empty_like(x)
    for form, launch in arms_of(shape, tokens, many).items():
        calls = []
        for index, routed in enumerate(drawn):
            each = layer.ours[index % len(layer.ours)]
            operands = (x, *routed, each.w13, each.scale_13, each.w2, each.scale_2, out, None, False)
            calls.append(partial(launch, *operands))
        with launches_up_to() as names:
            calls[0]()
        arms = {str(most): capture([partial(cut, call, most) for call in calls]) for most in range(1, len(names) + 1)}
        us = interleaved_us(arms, ROUNDS)
        up_to = [[name, round(us[str(most)], 2)] for most, name in enumerate(names, 1)]
        floor = round(floor_us(shape, hit, rate), 2)
        yield {"model": shape.name, "tokens": tokens, "form": form, "us_up_to": up_to, "floor_us": floor}


def main() -> None:
    """Measure and print; write the rows where asked."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.experts_parts", description="Time launch by launch.")
    parser.add_argument("--model", default="qwen3-30b,qwen3-235b-tp4,dsv3-tp8", help="as for bench --moe")
    parser.add_argument("--tokens", default="1,4,16,64")
    parser.add_argument("--many", action="store_true", help="the form for many rows alone, in both its ways")
    parser.add_argument("--json", type=Path, help="where to write the rows")
    parser.add_argument("--commit", help="of a tree without a repository")
    arguments = parser.parse_args()
    result: dict[str, Any] = {"env": environment(arguments.commit), "rows": []}
    device = torch.device("cuda", torch.cuda.current_device())
    l2 = torch.cuda.get_device_properties(device).L2_cache_size
    for shape in parse_models(arguments.model):
        layer = RandomExperts(shape, device, copies_for(shape, l2, torch.cuda.mem_get_info()[0], False), plain=False)
        for tokens in parse_ms(arguments.tokens):
            for row in measure(shape, tokens, layer, arguments.many):
                result["rows"].append(row)
                print(row, flush=True)
        del layer
        torch.cuda.empty_cache()
        if arguments.json:
            write_json(arguments.json, result)


if __name__ == "__main__":
    main()
