"""A chart of the rows: ours over the floor, and best peers over ours, by m."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fp8_backend.bench.peers import NAMES
from fp8_backend.bench.report import geomean
from fp8_backend.bench.shapes import DECODE_M
from fp8_backend.errors import UnsupportedError


def pyplot() -> Any:
    """Return matplotlib.pyplot, drawing to files.

    Raises:
        UnsupportedError: matplotlib is not installed.
    """
    try:
        matplotlib = importlib.import_module("matplotlib")
    except ImportError:
        raise UnsupportedError("matplotlib is not installed; pip install 'fp8-backend[plot]'") from None
    matplotlib.use("Agg")
    return importlib.import_module("matplotlib.pyplot")


def plot(rows: Sequence[dict[str, Any]], title: str, out: Path) -> None:
    """Write a PNG: on the left ours / stream floor for decode, on the right each peer / ours for every m.

    Raises:
        UnsupportedError: matplotlib is not installed.
    """
    plt = pyplot()
    figure, (left, right) = plt.subplots(1, 2, figsize=(13, 5), constrained_layout=True)
    for shape in dict.fromkeys((row["n"], row["k"]) for row in rows):
        found = [row for row in rows if (row["n"], row["k"]) == shape and row["m"] <= DECODE_M]
        ratios = [row["us"] / row["stream_us"] for row in found]
        left.plot([row["m"] for row in found], ratios, marker=".", label=f"{shape[0]}x{shape[1]}")
    left.axhline(1, color="black", linewidth=0.8)
    left.set(xscale="log", xlabel="m", ylabel="time / time of streaming the weight alone", title="decode")
    left.legend(fontsize=6, ncols=2)
    ms = sorted({row["m"] for row in rows})
    for name in NAMES:
        with_peer = [
            [row["peers"][name] / row["us"] for row in rows if row["m"] == m and name in row["peers"]] for m in ms
        ]
        points = [(m, geomean(ratios), min(ratios)) for m, ratios in zip(ms, with_peer, strict=True) if ratios]
        if points:
            (line,) = right.plot([p[0] for p in points], [p[1] for p in points], marker="o", label=name)
            right.plot([p[0] for p in points], [p[2] for p in points], color=line.get_color(), linestyle=":")
    right.axhline(1, color="black", linewidth=0.8)
    right.set(xscale="log", xlabel="m", ylabel="peer / ours", title="mean over shapes; dotted: worst shape")
    right.legend(fontsize=8)
    for axes in (left, right):
        shown = [m for m in ms if m <= DECODE_M or axes is right]
        axes.set_xticks(shown, [str(m) for m in shown], rotation=45)
        axes.minorticks_off()
    figure.suptitle(title)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=130)
    plt.close(figure)
