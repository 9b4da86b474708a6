"""Fit the constants of GEMM tiles in heuristics.py to sweeps, by what its choices cost. Needs no GPU.

    python -m benchmarks.fit SWEEP.json [SWEEP.json ...] [--tiles 64x32,64x96] [--steps 3000]

Each file is one of `python -m benchmarks.sweep`, best with --whole. A choice costs the logarithm of its time over the
best time of its cell. It is taken softly: candidates whose predicted costs are within some per cent share it, for where
constants sit on a tie, rounding decides. Prints the lines to put into heuristics.py, and the dearest choices before and
behind.
"""

from __future__ import annotations

import argparse
import json
import math
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

from fp8_backend.errors import ArgumentError
from fp8_backend.kernels import decode_heuristics, heuristics
from fp8_backend.kernels.heuristics import GemmChoice
from fp8_backend.kernels.problem import GemmConfig, GemmProblem
from fp8_backend.kernels.reference import ceil_div

Tile = tuple[int, int]
Constants = dict[Tile, tuple[float, float, float]]
SOFTNESS = 0.02  # candidates whose predicted costs are so far apart, as a share, have chances of 1 to 1 / e
SPREAD_WEIGHT = 0.3  # of the root mean square beside the mean: one bad choice is worse than many fair ones
DRIFT_WEIGHT = 0.003  # what nothing in the sweeps decides stays where it was
LEAST_SHARE = 0.5  # of a constant's value before: sweeps of a wave or two would have a tile's own time vanish


@dataclass(frozen=True)
class Candidate:
    """A kernel that was timed in a cell.

    us: its time. name: the choice as text. gemm: the choice, and None for a kernel that the constants do not concern.
    cost_ns: predicted, of such a kernel; of a GEMM what its quantisation adds.
    """

    us: float
    name: str
    gemm: GemmChoice | None
    cost_ns: float


@dataclass(frozen=True)
class Cell:
    """A problem and the kernels that were timed for it."""

    problem: GemmProblem
    candidates: tuple[Candidate, ...]

    def costs(self) -> Iterator[tuple[float, float, str]]:
        """Yield predicted cost, logarithm of time over the best time, and name of each candidate."""
        best = min(candidate.us for candidate in self.candidates)
        for candidate in self.candidates:
            cost = candidate.cost_ns
            if (choice := candidate.gemm) is not None:
                config, problem = choice.config, self.problem
                tiles = ceil_div(problem.m, config.block_m) * ceil_div(problem.n, config.block_n)
                most = problem.machine.max_clusters(choice.split) * config.ctas_per_sm
                cost += heuristics._gemm_ns(problem, choice, tiles, most)
            yield cost, math.log(candidate.us / best), candidate.name


def read_cells(paths: Sequence[Path]) -> list[Cell]:
    """Return the cells of sweeps; kernels that are no longer there are left out.

    Raises:
        ArgumentError: none of the kernels of any cell is known.
    """
    cells = []
    for row in (row for path in paths for row in json.loads(path.read_text())):
        problem = GemmProblem(row["m"], row["n"], row["k"])
        quantise = heuristics.quantisation_ns(problem)
        known: dict[str, tuple[GemmChoice | None, float]] = {
            str(choice): (choice, quantise) if isinstance(choice.config, GemmConfig) else (None, cost + quantise)
            for cost, choice in heuristics.gemm_choices(problem)
        }
        for cost, other in (*decode_heuristics.decode_choices(problem), *heuristics.quantizing_choices(problem)):
            known[str(other)] = (None, cost)
        found = tuple(Candidate(us, name, *known[name]) for us, name, _ in row["found"] if name in known)
        if found:
            cells.append(Cell(problem, found))
    if not cells:
        raise ArgumentError(f"{', '.join(map(str, paths))}: no kernel of these is known; make the sweep again")
    return cells


def loss(cells: Sequence[Cell]) -> float:
    """Return what the choices by the constants in place cost, softly taken."""
    expected = []
    for cell in cells:
        costs = list(cell.costs())
        least = min(cost for cost, _, _ in costs)
        chances = [math.exp(-math.log(cost / least) / SOFTNESS) for cost, _, _ in costs]
        expected.append(sum(c * lost for c, (_, lost, _) in zip(chances, costs, strict=True)) / sum(chances))
    mean, square = (sum(value**power for value in expected) / len(cells) for power in (1, 2))
    return mean + SPREAD_WEIGHT * math.sqrt(square)


def choices(cells: Sequence[Cell]) -> list[tuple[float, Cell, str]]:
    """Return what each choice by the constants in place loses as a share, its cell, and its name; dearest first."""
    picked = [(min(cell.costs()), cell) for cell in cells]
    return sorted(((math.expm1(lost), cell, name) for (_, lost, name), cell in picked), key=lambda each: -each[0])


def search(cells: Sequence[Cell], tiles: Sequence[Tile], steps: int, seed: int = 0) -> Constants:
    """Return constants of these tiles that lose less, found by random steps from those in place."""
    start: Constants = {tile: heuristics._GEMM_NS[tile] for tile in tiles}
    draw = random.Random(seed)

    def judged(constants: Mapping[Tile, tuple[float, float, float]]) -> float:
        moved = [
            math.log(value / before) ** 2
            for tile in tiles
            for value, before in zip(constants[tile], start[tile], strict=True)
            if before
        ]
        with patch.dict(heuristics._GEMM_NS, constants):
            return loss(cells) + DRIFT_WEIGHT * sum(moved) / max(1, len(moved))

    best, constants = judged(start), start
    for _ in range(steps):
        tile, index = draw.choice(tiles), draw.randrange(3)
        values = list(constants[tile])
        moved = values[index] * math.exp(draw.gauss(0, 0.12))
        values[index] = max(LEAST_SHARE * start[tile][index], moved)
        trial = {**constants, tile: (values[0], values[1], values[2])}
        if (value := judged(trial)) < best:
            best, constants = value, trial
    return {tile: (round(a), round(b), round(c)) for tile, (a, b, c) in constants.items()}


def report(cells: Sequence[Cell], title: str) -> str:
    """Return what the choices by the constants in place lose, and the dearest of them."""
    found = choices(cells)
    lines = [f"{title}: {sum(lost for lost, _, _ in found) / len(found):.2%} on average over {len(found)} cells"]
    for lost, cell, name in found[:8]:
        lines.append(f"  {lost:6.1%}  m={cell.problem.m} {cell.problem.n}x{cell.problem.k}: {name}")
    return "\n".join(lines)


def parse_tiles(text: str) -> list[Tile]:
    """Return the (block_m, block_n) of text such as 64x32,64x96.

    Raises:
        ArgumentError: one of them has no constants.
    """
    tiles = {f"{block_m}x{block_n}": (block_m, block_n) for block_m, block_n in heuristics._GEMM_NS}
    for name in text.split(","):
        if name not in tiles:
            raise ArgumentError(f"--tiles {name}: expected some of {', '.join(tiles)}, comma-separated")
    return [tiles[name] for name in text.split(",")]


def main() -> None:
    """Fit and print."""
    every = ",".join(f"{block_m}x{block_n}" for block_m, block_n in heuristics._GEMM_NS)
    parser = argparse.ArgumentParser(prog="python -m benchmarks.fit", description=__doc__)
    parser.add_argument("sweeps", nargs="+", type=Path, metavar="SWEEP.json")
    parser.add_argument("--tiles", default=every, help="whose constants may move; default: all")
    parser.add_argument("--steps", type=int, default=3000)
    arguments = parser.parse_args()
    cells = read_cells(arguments.sweeps)
    print(report(cells, "in place"), flush=True)
    fitted = search(cells, parse_tiles(arguments.tiles), arguments.steps)
    with patch.dict(heuristics._GEMM_NS, fitted):
        print(report(cells, "fitted"))
    for tile, constants in fitted.items():
        print(f"    {tile}: {constants},")


if __name__ == "__main__":
    main()
