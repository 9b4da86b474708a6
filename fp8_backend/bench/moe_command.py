"""`fp8-backend bench --moe` and `--grouped`: experts and grouped GEMMs beside their peers on a Hopper GPU."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from fp8_backend.bench import moe, moe_grouped, moe_report, moe_warm
from fp8_backend.bench.moe_peers import NAMES
from fp8_backend.bench.moe_shapes import ALL_TOKENS, parse_models, parse_routings
from fp8_backend.bench.peers import parse_peers
from fp8_backend.bench.report import ratio
from fp8_backend.bench.shapes import parse_ms
from fp8_backend.errors import Fp8BackendError
from fp8_backend.kernels import warmup
from fp8_backend.measure.environment import environment, write_json
from fp8_backend.measure.watchdog import Watchdog
from fp8_backend.progress import Progress

CELL_LIMIT_S = 240.0  # a cell takes seconds, and more where a peer still has to compile
Row = dict[str, Any]


def plan_of(arguments: argparse.Namespace) -> moe.Plan:
    """Return what was asked for.

    Raises:
        ArgumentError: a name or number that cannot be read.
    """
    return moe.Plan(
        parse_models(arguments.model),
        parse_ms(arguments.tokens, ALL_TOKENS, "--tokens"),
        parse_routings(arguments.routing),
        parse_peers(arguments.peers, NAMES),
    )


def run(arguments: argparse.Namespace, plan: moe.Plan) -> int:
    """Measure on the current GPU; return 0 if every cell was right, 1 if one was not."""
    begin = time.monotonic()
    env = {**environment(arguments.commit), "absent_peers": plan.absent, "failures": plan.failures}
    result: dict[str, Any] = {"env": env, "rows": []}
    print(f"our kernels: {warmup.warm_up()}", flush=True)
    _compile_peers(arguments, plan, env)
    sections: list[tuple[int, Iterator[Row], Callable[[Row], str]]] = []
    if arguments.moe:
        sections.append((plan.cells, moe.run(plan), _moe_line))
    if arguments.grouped:
        cells = len(moe_grouped.CELLS) * len(moe_grouped.SHAPES)
        sections.append((cells, moe_grouped.run(plan.failures, plan.peers), _grouped_line))
    for cells, rows, line in sections:
        _measure(rows, cells, result, line, arguments.json)
    env["seconds"] = round(time.monotonic() - begin, 1)
    _write(arguments.json, result)
    report(result)
    good = result["rows"] and "stopped" not in env and all(row["verified"] for row in result["rows"])
    return 0 if good else 1


def _compile_peers(arguments: argparse.Namespace, plan: moe.Plan, env: dict[str, Any]) -> None:
    """Compile the peers' kernels; one that is not done in time is absent from the plan."""
    portions = moe_warm.experts_portions(plan.peers, plan.shapes, plan.tokens) if arguments.moe else []
    portions += moe_warm.grouped_portions(plan.peers) if arguments.grouped else []
    if not portions:
        return
    with Progress("compiling peers", len(portions), "portions") as progress:
        problems, late = moe_warm.compile_peers(portions, arguments.peer_compile_limit, progress.step)
    plan.absent |= late
    plan.peers = tuple(name for name in plan.peers if name not in late)
    env["peer_compilation"] = problems
    print("\n".join(problems), flush=True)


def _measure(
    rows: Iterator[Row], cells: int, result: dict[str, Any], line: Callable[[Row], str], out: Path | None
) -> None:
    watchdog = Watchdog(CELL_LIMIT_S)
    watchdog.begin("first cell")
    try:
        with Progress("timing", cells, "cells") as progress:
            for row in rows:
                watchdog.begin(f"the cell after {line(row)}")
                result["rows"].append(row)
                _write(out, result)
                progress.step(line(row))
    except Fp8BackendError as error:  # what was measured until then still counts
        result["env"]["stopped"] = str(error)
        print(error, file=sys.stderr)
    watchdog.end()


def _moe_line(row: Row) -> str:
    best = ratio(row, NAMES)
    tail = f", best peer / ours {best:.2f}" if best else ""
    return f"{row['model']} {row['tokens']} {row['routing']} {row['us']:.1f} us{tail}"


def _grouped_line(row: Row) -> str:
    return f"{row['layout']} {row['groups']} x {row['rows']} {row['n']}x{row['k']} {row['us']:.1f} us"


def _write(out: Path | None, result: dict[str, Any]) -> None:
    if out:
        write_json(out, result)


def report(result: dict[str, Any]) -> None:
    """Print the tables and what they say of the figures."""
    rows = [row for row in result["rows"] if "tokens" in row]
    grouped = [row for row in result["rows"] if "layout" in row]
    lines = moe_report.table(rows) if rows else []
    lines += moe_report.grouped_table(grouped) if grouped else []
    for failure, cells in result["env"]["failures"].items():
        lines.append(f"left out: {failure} ({len(cells)} cells, {cells[0]} first)")
    lines += [f"absent: {name}: {reason}" for name, reason in result["env"]["absent_peers"].items()]
    lines += moe_report.summary(rows) if rows else []
    lines += moe_report.grouped_summary(grouped) if grouped else []
    print("\n".join(lines))
