"""A chart of default / ours for every row."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fp8_backend.ab.report import name_of
from fp8_backend.bench.plot import pyplot


def chart(result: dict[str, Any], out: Path) -> None:
    """Write a PNG of bars: how many times better ours is; hatched where the verdict is not clear.

    Raises:
        UnsupportedError: matplotlib is not installed.
    """
    plt = pyplot()
    rows = [row for row in result["rows"] if row["ratio"] is not None]
    figure, axes = plt.subplots(figsize=(9, 0.5 * len(rows) + 2), constrained_layout=True)
    names = [name_of(row) for row in rows]
    bars = axes.barh(names, [row["ratio"] for row in rows])
    for bar, row in zip(bars, rows, strict=True):
        bar.set_hatch("" if row["verdict"].startswith("ours") else "//")
    axes.bar_label(bars, [f"{row['ratio']:.2f}" for row in rows], padding=3)
    axes.axvline(1, color="black", linewidth=0.8)
    axes.invert_yaxis()
    axes.set(xlabel="default / ours; hatched: no clear verdict", title=result["model"])
    figure.savefig(out, dpi=130)
    plt.close(figure)
