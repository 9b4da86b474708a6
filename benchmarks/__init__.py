"""Measurements: each writes a result file that names the run it came from."""

from __future__ import annotations

import re
from pathlib import Path

from fp8_backend.measure.environment import gpu

ROOT = Path(__file__).resolve().parents[1]


def results() -> Path:
    """Return the folder of this machine's results, by its GPU: benchmarks/results/h200, .../h100, ... or .../cpu."""
    return ROOT / "benchmarks" / "results" / folder_of((gpu() or {}).get("name"))


def folder_of(gpu_name: str | None) -> str:
    """Return the name of the folder for a GPU as nvidia-smi calls it; "cpu" for None."""
    if gpu_name is None:
        return "cpu"
    chip = re.search(r"\b[A-Z]+\d+[A-Z]*\b", gpu_name)  # H200 of "NVIDIA H200", GH200 of "NVIDIA GH200 480GB"
    return chip[0].lower() if chip else re.sub(r"\W+", "-", gpu_name.strip()).lower()
