"""Kernels on trial: measured beside the one in use, moved into the package where they win, deleted where they lose."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from fp8_backend.bench.shapes import parse_ms, parse_shapes
from fp8_backend.measure.environment import environment, write_json
from fp8_backend.measure.timing import Captured

Measure = Callable[[int, int, tuple[int, ...]], Iterable[dict[str, Any]]]


def replay_into_nan(captured: Captured, outs: Sequence[torch.Tensor]) -> None:
    """Replay a graph that writes these outputs, poisoned before, so that what is left unwritten shows."""
    for out in outs:
        out.fill_(float("nan"))
    captured.graph.replay()
    torch.cuda.synchronize()


def time_linears(name: str, shapes: str, ms: str, prepare: Callable[[], Measure]) -> None:
    """Run the command of a trial of linears: print what it measures of each shape, write it where asked.

    Args:
        name: of the trial's module.
        shapes: (n, k) by default, NxK,...
        ms: by default, comma-separated.
        prepare: compiles; called once the arguments are read. Returns what yields the rows of one (n, k) for some m.
    """
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.trials.{name}", description="Time a kernel on trial.")
    parser.add_argument("--m", default=ms)
    parser.add_argument("--shapes", default=shapes)
    parser.add_argument("--json", type=Path, help="where to write the rows")
    parser.add_argument("--commit", help="of a tree without a repository")
    arguments = parser.parse_args()
    result: dict[str, Any] = {"env": environment(arguments.commit), "rows": []}
    measure = prepare()
    for n, k in parse_shapes(None, arguments.shapes):
        for row in measure(n, k, parse_ms(arguments.m)):
            result["rows"].append(row)
            print(row, flush=True)
        if arguments.json:
            write_json(arguments.json, result)
