"""The fit of the cost model: sweeps whose times are known constants' costs, fitted from others."""

import json
import sys
from unittest.mock import patch

import pytest

from benchmarks import fit
from fp8_backend.errors import ArgumentError
from fp8_backend.kernels import decode_heuristics, heuristics
from fp8_backend.kernels.problem import GemmProblem

TILES = [(64, 32), (128, 64)]


@pytest.fixture
def sweep(tmp_path):
    """A sweep of kernels that take exactly as long as the model says, in microseconds."""
    rows = []
    for n, k in ((4096, 4096), (2112, 7168), (7168, 2048), (4608, 7168)):
        for m in (16, 64, 128, 256):
            problem = GemmProblem(m, n, k)
            quantise = heuristics.quantisation_ns(problem)
            found = [((cost + quantise) / 1e3, str(choice), 0.0) for cost, choice in heuristics.gemm_choices(problem)]
            found += [
                (cost / 1e3, str(choice), 0.0) for cost, choice in list(decode_heuristics.decode_choices(problem))[::9]
            ]
            rows.append({"m": m, "n": n, "k": k, "found": sorted(found), "chosen": ""})
    path = tmp_path / "sweep.json"
    path.write_text(json.dumps(rows))
    return path


def test_times_that_the_model_predicts_lose_nothing(sweep):
    cells = fit.read_cells([sweep])
    assert len(cells) == 16
    assert max(lost for lost, _, _ in fit.choices(cells)) == pytest.approx(0)


# The tile that is wrongly dear or cheap is found out by what it loses, and the others stay.
def test_wrong_constants_are_mended(sweep):
    cells = fit.read_cells([sweep])
    wrong = {(64, 32): (520.0, 85.0, 2280.0), (128, 64): (180.0, 4400.0, 3020.0)}
    with patch.dict(heuristics._GEMM_NS, wrong):
        before = sum(lost for lost, _, _ in fit.choices(cells)) / len(cells)
        found = fit.search(cells, TILES, 300)
    with patch.dict(heuristics._GEMM_NS, found):
        behind = sum(lost for lost, _, _ in fit.choices(cells)) / len(cells)
    assert before > 0.03 and behind < before / 3
    assert list(found) == TILES


def test_kernels_that_are_gone_are_left_out(sweep):
    rows = json.loads(sweep.read_text())
    rows[0]["found"] = [[1.0, "GemmChoice(of another time)", 0.0]]
    rows[1]["found"].append([0.001, "GemmChoice(of another time)", 0.0])
    sweep.write_text(json.dumps(rows))
    cells = fit.read_cells([sweep])
    assert len(cells) == 15 and max(lost for lost, _, _ in fit.choices(cells)) == pytest.approx(0)
    sweep.write_text(json.dumps(rows[:1]))
    with pytest.raises(ArgumentError, match="make the sweep again"):
        fit.read_cells([sweep])


def test_the_command_prints_lines_of_the_model(sweep, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["fit", str(sweep), "--tiles", "64x32,128x64", "--steps", "3"])
    fit.main()
    said = capsys.readouterr().out
    assert "in place: 0.00% on average over 16 cells" in said
    assert f"    (64, 32): {heuristics._GEMM_NS[64, 32]}," in said and "(128, 128)" not in said


def test_a_tile_without_constants_is_refused():
    with pytest.raises(ArgumentError, match="--tiles 64x33: expected some of 64x32, "):
        fit.parse_tiles("64x33")
