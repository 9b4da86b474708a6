"""`fp8-backend bench`: time linears and experts beside every peer on a Hopper GPU."""

from __future__ import annotations

import argparse
import gc
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch

from fp8_backend.bench import chain, dense, host, moe_command, moe_peers, moe_shapes, peers, report, warm
from fp8_backend.bench.plot import plot, pyplot
from fp8_backend.bench.shapes import MODELS, parse_ms, parse_shapes
from fp8_backend.errors import Fp8BackendError, UnsupportedError
from fp8_backend.kernels.backend import capability_reason, runs_cuda_kernels
from fp8_backend.kernels.gemm import machine
from fp8_backend.measure.environment import environment, write_json
from fp8_backend.measure.watchdog import Watchdog
from fp8_backend.progress import Progress

CELL_LIMIT_S = 180.0  # a cell takes about a second, and minutes where a peer still has to compile


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what the command takes."""
    parser.add_argument(
        "--model",
        help=f"comma-separated; default: all of {', '.join(MODELS)}; with --moe of {', '.join(moe_shapes.MODELS)}, or "
        "experts,hidden,intermediate,top_k",
    )
    parser.add_argument("--shapes", help="more shapes or others, NxK,...")
    parser.add_argument("--m", help="comma-separated; default: 1 to 64, 128 to 1024 and 2048 to 16384 in powers of two")
    parser.add_argument(
        "--peers",
        default="auto",
        help=f"auto, none, or some of {', '.join(peers.NAMES)}; with --moe of {', '.join(moe_peers.NAMES)}",
    )
    parser.add_argument("--peer-compile-limit", type=float, default=240, metavar="S", help="seconds for peers' kernels")
    parser.add_argument("--json", type=Path, metavar="OUT", help="write the rows here, after every cell")
    parser.add_argument("--plot", type=Path, metavar="PNG", help="write a chart; needs matplotlib")
    parser.add_argument("--batch-invariant", action="store_true", help="also time ours in batch-invariant mode")
    parser.add_argument("--chain", action="store_true", help="instead: eight dependent linears in one graph")
    parser.add_argument("--host", action="store_true", help="instead: host time of an eager call")
    parser.add_argument("--moe", action="store_true", help="instead: layers of routed experts")
    parser.add_argument("--tokens", help="of --moe, comma-separated; default: 1 to 8192")
    parser.add_argument("--routing", default="balanced", help=f"of --moe: some of {', '.join(moe_shapes.ROUTINGS)}")
    parser.add_argument("--grouped", action="store_true", help="instead, or after --moe: grouped GEMMs alone")
    parser.add_argument("--from", type=Path, dest="recorded", metavar="JSON", help="report these rows")
    parser.add_argument("--commit", help="recorded in the result where the tree is no repository")


def require_hopper() -> None:
    """Raise unless a Hopper GPU is there.

    Raises:
        UnsupportedError: no CUDA device, one of another generation, or the reference is asked for.
    """
    if not torch.cuda.is_available():
        raise UnsupportedError("measuring needs a Hopper GPU (H100, H200, GH200); torch sees no CUDA device")
    reason = capability_reason(torch.cuda.get_device_capability())
    if reason is not None:
        raise UnsupportedError(f"measuring needs a Hopper GPU; {torch.cuda.get_device_name()}: {reason}; run it there")
    if not runs_cuda_kernels(torch.device("cuda", torch.cuda.current_device())):
        raise UnsupportedError("FP8_BACKEND_KERNELS=reference: there is nothing to measure; unset it")


def run(arguments: argparse.Namespace) -> int:
    """Measure; return 0 if every cell was right, 1 if one was not."""
    if arguments.moe or arguments.grouped:
        return _experts(arguments)
    shapes, ms, names = (
        parse_shapes(arguments.model, arguments.shapes),
        parse_ms(arguments.m),
        peers.parse_peers(arguments.peers),
    )
    if arguments.plot:
        pyplot()  # refuses now, not after minutes
    if arguments.recorded:
        _report(json.loads(arguments.recorded.read_text()), arguments.plot)
        return 0
    require_hopper()
    begin = time.monotonic()
    present, absent = peers.load(names)
    gc.freeze()  # a capture may collect garbage, and there are thousands: spare them all that is loaded
    env = {**environment(arguments.commit), "absent_peers": absent, "failures": {}}
    result: dict[str, Any] = {"env": env, "rows": []}
    for name, reason in absent.items():
        print(f"peer {name} is absent: {reason}", flush=True)
    if arguments.host or arguments.chain:
        return _side(arguments, present, result)
    deepgemm = peers.deepgemm_module() if "deepgemm" in present else None
    plan = dense.Plan(shapes, ms, present, deepgemm, env["failures"], arguments.batch_invariant)
    _warm(plan, arguments.peer_compile_limit, env)
    env["seconds_to_compile"] = round(time.monotonic() - begin, 1)
    _dense(plan, arguments.json, result)
    env["seconds"] = round(time.monotonic() - begin, 1)
    if arguments.json:
        write_json(arguments.json, result)
    _report(result, arguments.plot)
    return 0 if result["rows"] and all(row["verified"] for row in result["rows"]) else 1


def _experts(arguments: argparse.Namespace) -> int:
    """Run --moe and --grouped, or report their recorded rows."""
    plan = moe_command.plan_of(arguments)
    if arguments.recorded:
        moe_command.report(json.loads(arguments.recorded.read_text()))
        return 0
    require_hopper()
    gc.freeze()
    return moe_command.run(arguments, plan)


def _warm(plan: dense.Plan, limit_s: float, env: dict[str, Any]) -> None:
    begin = time.monotonic()
    count = warm.compile_ours(plan.shapes, plan.ms, machine(torch.cuda.current_device()), plan.batch_invariant)
    print(f"our {count} kernels: {time.monotonic() - begin:.1f} s", flush=True)
    begin = time.monotonic()
    portions = warm.portions(list(plan.peers), plan.shapes, plan.ms, os.cpu_count() or 1)
    with Progress("compiling peers", len(portions), "portions") as progress:
        problems = warm.compile_peers(list(plan.peers), plan.shapes, plan.ms, limit_s, progress.step)
    env["peer_compilation"] = problems
    print("\n".join([f"peers' kernels: {time.monotonic() - begin:.1f} s", *problems]), flush=True)


def _dense(plan: dense.Plan, out: Path | None, result: dict[str, Any]) -> None:
    watchdog = Watchdog(CELL_LIMIT_S)
    watchdog.begin("first cell")
    try:
        with Progress("timing", len(plan.shapes) * len(plan.ms), "cells") as progress:
            for row in dense.run(plan):
                cell = f"m={row['m']} {row['n']}x{row['k']}"
                watchdog.begin(f"the cell after {cell}")
                result["rows"].append(row)
                if out:
                    write_json(out, result)
                best = report.ratio(row)
                progress.step(f"{cell} {row['us']:.1f} us" + (f", best peer / ours {best:.2f}" if best else ""))
    except Fp8BackendError as error:  # what was measured until then still counts
        result["env"]["stopped"] = str(error)
        print(error, file=sys.stderr)
    watchdog.end()


def _report(result: dict[str, Any], chart: Path | None) -> None:
    """Print what was measured; rows of --chain and --host may have been merged into a result, or be all of it."""
    linears = [row for row in result["rows"] if "stream_us" in row]
    if linears:
        print("\n".join(report.table(linears)))
    for failure, cells in result["env"]["failures"].items():
        print(f"left out: {failure} ({len(cells)} cells, {cells[0]} first)")
    for name, reason in result["env"]["absent_peers"].items():
        print(f"absent: {name}: {reason}")
    if linears:
        print("\n".join(report.summary(linears)))
    for kind, line in (("chain", chain.line), ("function_us", host.line)):
        print("".join(f"{line(row)}\n" for row in result["rows"] if kind in row), end="")
    if chart and not linears:
        print(f"{chart} is not drawn: the result has no rows of linears, only of --chain or --host", file=sys.stderr)
    elif chart:
        gpu = (result["env"]["gpu"] or {}).get("name", "GPU")
        plot(linears, f"{gpu}, FP8 linear, bf16 in and out, weights cold", chart)
        print(f"chart: {chart}")


def _side(arguments: argparse.Namespace, present: dict[str, peers.Linear], result: dict[str, Any]) -> int:
    """Run --host or --chain: a few rows, each printed as it comes."""
    watchdog, failures = Watchdog(CELL_LIMIT_S), result["env"]["failures"]
    watchdog.begin("first row")
    rows, line = (host.run(present, failures), host.line) if arguments.host else (chain.run(), chain.line)
    for row in rows:
        watchdog.begin(f"the row after {line(row)}")
        result["rows"].append(row)
        print(line(row), flush=True)
        if arguments.json:
            write_json(arguments.json, result)
    watchdog.end()
    return 0 if all(row.get("verified", True) for row in result["rows"]) else 1
