"""Time two or more trees of this project in turns: the same `fp8-backend bench`, or `benchmarks.layer`, run anew.

    python -m benchmarks.trees OLD NEW [--rounds 3] [--limit 120] [--deadline 300] -- --moe --tokens 4096 --peers none
    python -m benchmarks.trees OLD NEW --program layer -- --m 1,8,32 --tokens 160

A tree is a folder that holds the package, such as `git archive COMMIT | tar x -C FOLDER` makes. What was measured on
another GPU is no comparison: they differ by more than most changes gain. Behind `--` stands what the program takes, but
for `--json`. Prints the median of each cell's rounds and the ratio to the first tree, and their mean.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from fp8_backend.bench.report import geomean
from fp8_backend.measure.child import run_child

# What tells one row of a result from another; the rest is what was measured.
CELL = ("model", "tokens", "routing", "layout", "groups", "rows", "chain", "m", "n", "k", "arm")
PROGRAMS = {"bench": ["fp8_backend.cli", "bench"], "layer": ["benchmarks.layer"]}

Rows = list[dict[str, Any]]


def cell_of(row: dict[str, Any]) -> tuple[Any, ...]:
    """Return what a row is of."""
    return tuple(row[key] for key in CELL if key in row)


def run_tree(tree: Path, arguments: list[str], limit_s: float, folder: Path, program: str = "bench") -> Rows:
    """Return the rows of one run of one of PROGRAMS by the package in `tree`.

    Raises:
        RuntimeError: it failed or did not end within `limit_s`; says how its log ends.
    """
    result, log = folder / "rows.json", folder / "log"
    result.unlink(missing_ok=True)
    paths = [str(tree.resolve()), *filter(None, [os.environ.get("PYTHONPATH")])]
    # -P: or the package would be that of the folder this command was started in.
    command = [sys.executable, "-P", "-m", *PROGRAMS[program], *arguments, "--json", str(result)]
    failure = run_child([*command, "--commit", "tree"], log, limit_s, {"PYTHONPATH": os.pathsep.join(paths)})
    if failure is not None or not result.exists():
        raise RuntimeError(f"{tree}: {failure or 'no rows were written'}")
    rows: Rows = json.loads(result.read_text())["rows"]
    return rows


def compare(runs: dict[str, list[Rows]]) -> list[str]:
    """Return a line for each cell that every run has, and one for all: medians by tree, and ratios to the first."""
    times = {name: [{cell_of(row): row["us"] for row in rows} for rows in of_tree] for name, of_tree in runs.items()}
    every = [of_run for of_tree in times.values() for of_run in of_tree]
    cells = [cell for cell in every[0] if all(cell in of_run for of_run in every)]
    first, lines = next(iter(times)), []
    ratios: dict[str, list[float]] = {name: [] for name in times}
    for cell in cells:
        medians = {name: statistics.median(of_run[cell] for of_run in of_tree) for name, of_tree in times.items()}
        for name, us in medians.items():
            ratios[name].append(us / medians[first])
        texts = [f"{name} {us:.2f} us ({us / medians[first]:.3f})" for name, us in medians.items()]
        lines.append(" ".join([*map(str, cell), "|", ", ".join(texts)]))
    means = ", ".join(f"{name} {geomean(each):.4f}" for name, each in ratios.items())
    return [*lines, f"{len(cells)} cells, geometric mean of the ratios: {means}"]


def take_turns(
    trees: list[str],
    arguments: list[str],
    rounds: int,
    limit_s: float,
    deadline_s: float | None,
    program: str = "bench",
) -> dict[str, list[Rows]]:
    """Return the rows of each tree's runs; none begins that may end behind the deadline."""
    runs: dict[str, list[Rows]] = {}
    start, longest = time.monotonic(), 0.0
    with tempfile.TemporaryDirectory() as folder:
        for number, tree in ((number, tree) for number in range(1, rounds + 1) for tree in trees):
            began = time.monotonic()
            if deadline_s is not None and runs and began - start + longest > deadline_s:
                print(
                    f"round {number} ends before {tree}: the next run may end behind the deadline of {deadline_s:g} s"
                )
                break
            runs.setdefault(tree, []).append(run_tree(Path(tree), arguments, limit_s, Path(folder), program))
            longest = max(longest, time.monotonic() - began)
    return runs


def main() -> int:
    """Run the trees in turns and print the comparison."""
    given = sys.argv[1:]
    end = given.index("--") if "--" in given else len(given)
    parser = argparse.ArgumentParser(prog="python -m benchmarks.trees", description="Time trees in turns.")
    parser.add_argument("trees", type=Path, nargs="+", help="folders; ratios are to the first")
    parser.add_argument("--program", choices=PROGRAMS, default="bench", help="fp8-backend bench, or benchmarks.layer")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--limit", type=float, default=120, metavar="S", help="seconds of one run")
    parser.add_argument("--deadline", type=float, metavar="S", help="seconds of all; begin no run that may end later")
    arguments = parser.parse_args(given[:end])
    trees = [str(tree) for tree in arguments.trees]
    limits = arguments.rounds, arguments.limit, arguments.deadline
    runs = take_turns(trees, given[end + 1 :], *limits, arguments.program)
    print(*compare(runs), sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
