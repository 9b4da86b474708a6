"""From rows of experts and grouped GEMMs to what a person reads. Pure arithmetic."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fp8_backend.bench.moe_peers import NAMES
from fp8_backend.bench.moe_shapes import (
    BIGGEST,
    BIGGEST_TFLOPS,
    BIGGEST_TOKENS,
    CELL_LIMIT,
    FLOOR_LIMIT,
    FLOOR_REGIME,
    REGIMES,
    SKEW_LIMIT,
    regime_of,
)
from fp8_backend.bench.report import best_peer, geomean, judge, ratio
from fp8_backend.measure.accuracy import LIMIT_RATIO

Row = dict[str, Any]
GROUPED_GEOMEAN = 1.1
MIB = 2**20


def table(rows: Sequence[Row]) -> list[str]:
    """Return one line a cell; a cell where a peer is faster ends in its name, one that is wrong in WRONG."""
    width = max([5, *(len(row["model"]) for row in rows)])
    head = f"{'model':>{width}} {'tokens':>6} {'routing':>8} {'ours us':>9} {'floor':>8} {'TFLOPS':>7} "
    lines = [head + " ".join(f"{name:>10}" for name in NAMES) + f" {'best/ours':>9} {'extra MiB':>9} {'rel err':>8}"]
    for row in rows:
        line = f"{row['model']:>{width}} {row['tokens']:6d} {row['routing']:>8} {row['us']:9.2f} "
        line += f"{row['floor_us']:8.2f} {row['tflops']:7.1f} "
        line += " ".join(f"{row['peers'][name]:10.2f}" if name in row["peers"] else f"{'-':>10}" for name in NAMES)
        best = ratio(row, NAMES)
        line += f" {best:9.2f}" if best is not None else f" {'-':>9}"
        line += f" {row['extra_bytes'] / MIB:9.1f} " + (f"{row['rel_err']:8.5f}" if row["rel_err"] else f"{'-':>8}")
        line += f"  < {best_peer(row, NAMES)}" if best is not None and best < 1 else ""
        lines.append(line + ("" if row["verified"] else "  WRONG"))
    return lines


def grouped_table(rows: Sequence[Row]) -> list[str]:
    """Return one line a grouped GEMM."""
    lines = [
        f"{'layout':>10} {'groups':>6} {'rows':>14} {'n x k':>10} {'ours us':>9} {'floor':>8} "
        f"{'DeepGEMM':>9} {'ratio':>6}"
    ]
    for row in rows:
        best = row["peers"].get("deepgemm")
        line = f"{row['layout']:>10} {row['groups']:6d} {row['rows']:>14} {row['n']}x{row['k']:<5} {row['us']:9.2f} "
        line += f"{row['floor_us']:8.2f} " + (f"{best:9.2f} {best / row['us']:6.2f}" if best else f"{'-':>9} {'-':>6}")
        lines.append(line + ("" if row["verified"] else "  WRONG"))
    return lines


def grouped_summary(rows: Sequence[Row]) -> list[str]:
    """Return the mean against DeepGEMM and the cells that are lost."""
    ratios = {_grouped_cell(row): row["peers"]["deepgemm"] / row["us"] for row in rows if "deepgemm" in row["peers"]}
    if not ratios:
        return ["grouped GEMM: DeepGEMM did not run"]
    lost = {cell: found for cell, found in ratios.items() if found < CELL_LIMIT}
    lines = [f"grouped GEMM: DeepGEMM / ours, geometric mean {judge(geomean(ratios.values()), GROUPED_GEOMEAN)}"]
    return [*lines, f"  cells under {CELL_LIMIT}: {len(lost)}", *(f"    {cell}: {lost[cell]:.2f}" for cell in lost)]


def _grouped_cell(row: Row) -> str:
    return f"{row['layout']} {row['groups']} x {row['rows']}, {row['n']}x{row['k']}"


def _cell(row: Row) -> str:
    return f"{row['model']}, {row['tokens']} tokens, {row['routing']}"


def summary(rows: Sequence[Row]) -> list[str]:
    """Return means by regime, the weight floor, skew, memory, accuracy, and the cells that are lost."""
    balanced = [row for row in rows if row["routing"] == "balanced"]
    lines = []
    for regime in REGIMES:
        found = [row for row in balanced if regime_of(row["tokens"]) is regime]
        ratios = [each for row in found if (each := ratio(row, NAMES)) is not None]
        if ratios:
            lines.append(
                f"{regime.name}: {len(ratios)} cells, best peer / ours, geometric mean "
                f"{judge(geomean(ratios), regime.geomean)}"
            )
        if found and regime is FLOOR_REGIME:
            worst = max(found, key=lambda row: row["us"] / row["floor_us"])
            over = judge(worst["us"] / worst["floor_us"], FLOOR_LIMIT, at_most=True)
            lines.append(f"  ours / weight floor: largest {over} at {_cell(worst)}")
    for row in balanced:
        if (row["model"], row["tokens"]) == (BIGGEST, BIGGEST_TOKENS):
            lines.append(f"{_cell(row)}: {judge(row['tflops'], BIGGEST_TFLOPS)} TFLOPS")
    lines += _skew_lines(rows) + _memory_lines(rows) + _accuracy_lines(rows)
    wrong = [_cell(row) for row in rows if not row["verified"]]
    lines.append(
        f"verified: {len(rows) - len(wrong)} of {len(rows)} cells" + (f"; WRONG: {'; '.join(wrong)}" if wrong else "")
    )
    lost = sorted((of, _cell(row)) for row in rows if (of := ratio(row, NAMES)) is not None and of < 1)
    lines.append(f"cells under 1.0: {len(lost)}, of which {sum(of < CELL_LIMIT for of, _ in lost)} by more than 3 %")
    return lines + [f"  {cell}: {of:.2f}" for of, cell in lost]


def _skew_lines(rows: Sequence[Row]) -> list[str]:
    """Compare times an operation, which mean something where weights do not bound them: from 256 tokens on."""
    even = {(row["model"], row["tokens"]): row["us"] for row in rows if row["routing"] == "balanced"}
    skewed = {
        _cell(row): row["us"] / even[row["model"], row["tokens"]]
        for row in rows
        if row["routing"] != "balanced" and (row["model"], row["tokens"]) in even and row["tokens"] >= 256
    }
    if not skewed:
        return []
    worst = max(skewed, key=lambda cell: skewed[cell])
    return [f"skew: time / balanced time, largest {judge(skewed[worst], SKEW_LIMIT, at_most=True)} at {worst}"]


def _memory_lines(rows: Sequence[Row]) -> list[str]:
    both = [row for row in rows if "deepgemm" in row["peer_extra_bytes"]]
    over = [_cell(row) for row in both if row["extra_bytes"] > row["peer_extra_bytes"]["deepgemm"]]
    most = max(rows, key=lambda row: row["extra_bytes"])
    line = f"extra memory: at most {most['extra_bytes'] / MIB:.1f} MiB at {_cell(most)}"
    if both:
        line += f"; over DeepGEMM's experts in {len(over)} of {len(both)} cells" + (
            f": {'; '.join(over)}" if over else ""
        )
    return [line]


def _accuracy_lines(rows: Sequence[Row]) -> list[str]:
    ratios = [
        row["rel_err"] / row["peer_rel_err"]["triton"]
        for row in rows
        if "triton" in row["peer_rel_err"] and row["rel_err"]
    ]
    if not ratios:
        return []
    return [f"error / Triton's, largest {judge(max(ratios), LIMIT_RATIO, at_most=True)}"]
