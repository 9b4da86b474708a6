"""From rows to what a person reads: the table, means by regime, and the cells that are lost. Pure arithmetic."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from math import exp, log
from typing import Any

from fp8_backend.bench.peers import FP8_NAMES, NAMES
from fp8_backend.bench.shapes import DECODE_M, REGIMES, Regime, regime_of

Row = dict[str, Any]
FLOOR_LIMIT = 1.0  # decode: geometric mean of ours / stream floor
GEMM_TFLOPS = 1480  # prefill: the best cell of the GEMM alone
PREFILL_M = REGIMES[-1].ms[0]


def geomean(values: Iterable[float]) -> float:
    """Return the geometric mean; NaN for none."""
    logs = [log(value) for value in values]
    return exp(sum(logs) / len(logs)) if logs else float("nan")


def best_peer(row: Row, names: Sequence[str] = NAMES) -> str | None:
    """Return the fastest of these peers in a row, or None where none ran."""
    present = [name for name in names if name in row["peers"]]
    return min(present, key=lambda name: row["peers"][name]) if present else None


def ratio(row: Row, names: Sequence[str] = NAMES) -> float | None:
    """Return best peer / ours: above 1 ours is faster."""
    best = best_peer(row, names)
    return row["peers"][best] / row["us"] if best else None


def tflops(row: Row, key: str) -> float:
    """Return the rate of a row's time in 1e12 operations a second."""
    return float(2 * row["m"] * row["n"] * row["k"] / row[key] / 1e6)


def table(rows: Sequence[Row]) -> list[str]:
    """Return one line a cell; a cell where any peer is faster ends in its name, one that is wrong in WRONG."""
    head = f"{'m':>6} {'n':>6} {'k':>6} {'ours us':>9} {'stream':>8} {'x floor':>7} "
    head += " ".join(f"{name:>10}" for name in NAMES) + f" {'best/ours':>9}"
    lines = [head]
    for row in rows:
        floor = f"{row['us'] / row['stream_us']:7.2f}" if row["m"] <= DECODE_M else f"{'':>7}"
        line = f"{row['m']:6d} {row['n']:6d} {row['k']:6d} {row['us']:9.2f} {row['stream_us']:8.2f} {floor} "
        line += " ".join(f"{row['peers'][name]:10.2f}" if name in row["peers"] else f"{'-':>10}" for name in NAMES)
        best = ratio(row)
        line += f" {best:9.2f}" if best is not None else f" {'-':>9}"
        line += f"  < {best_peer(row)}" if best is not None and best < 1 else ""
        line += "" if row["verified"] else "  WRONG"
        lines.append(line)
    return lines


def judge(value: float, limit: float, at_most: bool = False) -> str:
    """Return a value with its limit and whether it holds."""
    holds = value <= limit if at_most else value >= limit
    return f"{value:.3f} (to be {'<=' if at_most else '>='} {limit}: {'holds' if holds else 'MISSED'})"


def _regime_lines(regime: Regime, rows: Sequence[Row]) -> list[str]:
    fp8 = [found for row in rows if (found := ratio(row, FP8_NAMES)) is not None]
    if not fp8:
        return [f"{regime.name}: {len(rows)} cells, no FP8 peer ran"]
    mean = judge(geomean(fp8), regime.geomean)
    lines = [f"{regime.name}: {len(rows)} cells, geometric mean of best FP8 peer / ours {mean}"]
    cells = {f"m={row['m']} {row['n']}x{row['k']}": found for row in rows if (found := ratio(row)) is not None}
    worst = min(cells, key=lambda cell: cells[cell])
    lines.append(f"  smallest of any peer / ours, BF16 too: {judge(cells[worst], regime.cell)} at {worst}")
    for name in NAMES:
        each = [row["peers"][name] / row["us"] for row in rows if name in row["peers"]]
        if each:
            lines.append(f"  {name} / ours: {geomean(each):.2f} over {len(each)} cells, smallest {min(each):.2f}")
    return lines


def _invariant_lines(rows: Sequence[Row]) -> list[str]:
    costs = {
        f"m={row['m']} {row['n']}x{row['k']}": row["batch_invariant"]["us"] / row["us"]
        for row in rows
        if "batch_invariant" in row
    }
    if not costs:
        return []
    worst = max(costs, key=lambda cell: costs[cell])
    return [
        f"  batch-invariant / ours: geometric mean {geomean(costs.values()):.2f}, largest {costs[worst]:.2f} at {worst}"
    ]


def lost_cells(rows: Sequence[Row]) -> list[Row]:
    """Return the cells where some peer is faster, the worst first."""
    lost = [row for row in rows if (found := ratio(row)) is not None and found < 1]
    return sorted(lost, key=lambda row: ratio(row) or 0)


def _gemm_lines(rows: Sequence[Row]) -> list[str]:
    alone = [row for row in rows if row["m"] >= PREFILL_M and "gemm_us" in row]
    if not alone:
        return []
    both = [row for row in alone if "deepgemm_gemm_us" in row]
    best = max(alone, key=lambda row: tflops(row, "gemm_us"))
    rate = tflops(best, "gemm_us")
    lines = [
        f"prefill, GEMM alone: best {judge(round(rate), GEMM_TFLOPS)} TFLOPS at m={best['m']} {best['n']}x{best['k']}"
    ]
    if both:
        ratios = {f"m={row['m']} {row['n']}x{row['k']}": row["deepgemm_gemm_us"] / row["gemm_us"] for row in both}
        worst = min(ratios, key=lambda cell: ratios[cell])
        below = ", ".join(f"{cell} {found:.2f}" for cell, found in ratios.items() if found < 1)
        lines.append(
            f"  DeepGEMM / ours {geomean(ratios.values()):.3f}, smallest {judge(ratios[worst], 1.0)} at {worst}"
            + (f"; under 1: {below}" if below else "")
        )
    return lines


def summary(rows: Sequence[Row]) -> list[str]:
    """Return means by regime, the GEMM alone, accuracy, and the cells that are lost."""
    lines = []
    for regime in REGIMES:
        if not (found := [row for row in rows if regime_of(row["m"]) is regime]):
            continue
        lines += _regime_lines(regime, found)
        if regime is REGIMES[0]:
            floor = geomean(row["us"] / row["stream_us"] for row in found)
            lines.append(f"  ours / stream floor: geometric mean {judge(floor, FLOOR_LIMIT, at_most=True)}")
        lines += _invariant_lines(found)
    lines += _gemm_lines(rows)
    wrong = [f"m={row['m']} {row['n']}x{row['k']}" for row in rows if not row["verified"]]
    lines.append(
        f"verified: {len(rows) - len(wrong)} of {len(rows)} cells" + (f"; WRONG: {', '.join(wrong)}" if wrong else "")
    )
    lost = lost_cells(rows)
    beyond = sum((ratio(row) or 0) < regime_of(row["m"]).cell for row in lost)
    lines.append(f"cells under 1.0: {len(lost)}, of which {beyond} by more than 3 %")
    for row in lost:
        lines.append(f"  m={row['m']} {row['n']}x{row['k']}: {ratio(row):.2f} against {best_peer(row)}")
    return lines
