"""The bench of experts as far as a CPU goes: what is measured, operands, and the arithmetic on recorded rows."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from fp8_backend import cli
from fp8_backend.bench import moe, moe_grouped, moe_operands, moe_peers, moe_report, moe_shapes, moe_warm, stream
from fp8_backend.bench.moe_shapes import MODELS, MoeShape
from fp8_backend.bench.peers import parse_peers
from fp8_backend.errors import ArgumentError
from fp8_backend.kernels.backend import memory_rate
from fp8_backend.kernels.reference import relative_error

needs_no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="shows what happens without a GPU")
SMALL = MoeShape("small", 8, 256, 128, 2)
READ = stream.READ_SHARE * memory_rate(3_201_000, 6144)  # of an H200


def row(tokens: int, us: float, model: str = "dsv3", routing: str = "balanced", **changes: object) -> dict:
    found = {"model": model, "tokens": tokens, "routing": routing, "us": us, "floor_us": 50.0, "tflops": 900.0}
    found |= {"peers": {}, "extra_bytes": 2**20, "peer_extra_bytes": {}, "rel_err": 0.01, "peer_rel_err": {}}
    return found | {"verified": True} | changes


ROWS = [
    row(1, 60.0, peers={"triton": 108.0}),
    row(64, 65.0, peers={"triton": 70.0, "deepgemm": 60.0}, peer_extra_bytes={"deepgemm": 2**19}),
    row(8192, 5000.0, peers={"triton": 11000.0}, peer_rel_err={"triton": 0.008}, verified=False),
    row(8192, 7000.0, routing="zipf"),
]


def test_memory_of_both_gpus() -> None:
    assert READ == pytest.approx(4.5e6, rel=0.001)
    assert stream.READ_SHARE * memory_rate(2_619_000, 5120) == pytest.approx(3.07e6, rel=0.001)


def test_layers_are_those_of_the_models() -> None:
    shape = MODELS["qwen3-30b"]
    assert (shape.experts, shape.hidden, shape.intermediate, shape.top_k) == (128, 2048, 768, 8)
    assert moe.floor_us(shape, 128, READ) == pytest.approx(134, abs=0.5)  # docs: 134 us for all experts
    assert MODELS["dsv3"].flops(8192) == 6 * 8192 * 8 * 7168 * 2048
    assert moe_shapes.parse_models("64,1024,256,4") == (MoeShape("64,1024,256,4", 64, 1024, 256, 4),)
    assert [shape.name for shape in moe_shapes.parse_models("dsv3,qwen3-30b,dsv3")] == ["dsv3", "qwen3-30b"]
    assert len(moe_shapes.parse_models(None)) == 4


def test_portions_hold_every_layer_and_weight_once() -> None:
    shapes = [MODELS["qwen3-30b"], MODELS["dsv3"]]
    found = moe_warm.experts_portions(["flashinfer", "cutlass", "deepgemm"], shapes, [1, 64])
    assert [portion.peer for portion in found] == ["deepgemm"] * 2 + ["flashinfer"] * 2
    assert found[0].command[1:] == ["experts", "deepgemm", "128,2048,768,8", "1,64"]
    assert moe_shapes.parse_models(found[1].command[3])[0].expert_bytes == MODELS["dsv3"].expert_bytes
    weights = {tuple(map(int, portion.command[2:])) for portion in moe_warm.grouped_portions(["deepgemm"])}
    assert weights == {(n, k, len(cell.counts)) for n, k in moe_grouped.SHAPES for cell in moe_grouped.CELLS}
    assert moe_warm.grouped_portions(["triton"]) == []


@needs_no_gpu
def test_a_peer_that_is_not_compiled_in_time_is_left_out() -> None:
    portions = moe_warm.experts_portions(["triton"], [SMALL], [1])
    problems, late = moe_warm.compile_peers(portions, 120, print)
    assert len(problems) == 1 and problems[0].startswith("peers' kernels for triton 8,256,128,2 1: ") and not late
    _, late = moe_warm.compile_peers(portions, 0, print)
    assert late == {"triton": "its kernels were not compiled after 0 s"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "gpt"], "--model gpt: unknown; with --moe give some of qwen3-30b"),
        (["--model", "8,256,100,2"], "intermediate a multiple of 128"),
        (["--model", "8,256,128,9"], "top_k at most experts"),
        (["--tokens", "0"], "--tokens 0: expected numbers above 0"),
        (["--routing", "odd"], "--routing odd: unknown; give some of balanced, zipf, same"),
        (["--peers", "bf16"], "--peers bf16: unknown; give auto, none or some of triton"),
        pytest.param([], "needs a Hopper GPU", marks=needs_no_gpu),
        pytest.param(["--grouped"], "needs a Hopper GPU", marks=needs_no_gpu),
    ],
)
def test_refusals(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", "--moe", *arguments]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("routing", moe_shapes.ROUTINGS)
def test_routings(routing: moe_shapes.Routing) -> None:
    shape = MODELS["qwen3-30b"]
    weights, ids = moe_shapes.route(shape, 512, routing, 1)
    assert (weights.dtype, ids.dtype, ids.shape) == (torch.float32, torch.int32, (512, 8))
    assert ids.sort(dim=1).values.diff(dim=1).min() > 0  # a token takes an expert once
    torch.testing.assert_close(weights.sum(dim=1), torch.ones(512))
    counts = torch.bincount(ids.flatten(), minlength=128)
    largest = {"balanced": (40, 70), "zipf": (256, 512), "same": (512, 512)}[routing]
    assert largest[0] <= counts.max() <= largest[1]
    assert not torch.equal(moe_shapes.route(shape, 512, routing, 2)[1], ids)
    assert torch.equal(moe_shapes.route(shape, 512, routing, 1)[1], ids)


def test_copies_are_cold_and_fit() -> None:
    l2, gib = 60 * 2**20, 2**30
    assert moe_operands.copies_for(MODELS["qwen3-30b"], l2, 130 * gib, True) == 14  # of 38 MB a token
    assert moe_operands.copies_for(MODELS["dsv3"], l2, 130 * gib, True) == 2
    assert moe_operands.copies_for(MODELS["dsv3"], l2, 30 * gib, True) == 1


def test_our_experts_match_their_truth() -> None:
    layer = moe_operands.RandomExperts(SMALL, torch.device("cpu"), copies=2)
    assert len(layer.plain) == len(layer.ours) == 2 and layer.ours[0].w13.data_ptr() != layer.ours[1].w13.data_ptr()
    x = torch.randn(33, 256, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16)
    routed = moe_shapes.route(SMALL, 33, "balanced", 0)
    rows = moe_operands.sampled_tokens(33)
    truth = layer.truth(x, routed, rows)
    assert truth.dtype == torch.float64 and truth.shape == (16, 256)
    for copy in range(3):
        assert relative_error(layer.run(x, routed, copy)[rows], truth) < 0.005
    # Activations of unit variance stay near it, so that chained layers neither die nor overflow.
    assert 0.05 < truth.std() < 2


def test_calls_of_a_graph() -> None:
    assert moe.calls_for(MODELS["qwen3-30b"], 1, 8, READ) == moe.MAX_CALLS
    assert moe.calls_for(MODELS["dsv3"], 8192, 256, READ) == moe.MIN_CALLS


@needs_no_gpu
def test_absent_peers_are_named_with_a_reason() -> None:
    present, absent = moe_peers.load(moe_peers.NAMES, SMALL)
    assert "cutlass" in absent and "flashinfer" in absent["flashinfer"]
    assert present.keys() | absent.keys() == set(moe_peers.NAMES)
    assert parse_peers("deepgemm,triton", moe_peers.NAMES) == ("triton", "deepgemm")
    with pytest.raises(ArgumentError):
        parse_peers("auto,triton", moe_peers.NAMES)


def test_grouped_cells() -> None:
    assert sum(moe_grouped.ragged_counts(32, 4096)) == 4096 and min(moe_grouped.ragged_counts(32, 4096)) > 0
    assert 0 in moe_grouped.ragged_counts(256, 512)
    measured = [cell for cell in moe_grouped.CELLS if cell.rows.isdecimal()]
    assert len(measured) == 9
    cell = next(cell for cell in measured if cell.layout == "contiguous" and len(cell.counts) == 4)
    assert moe_grouped.floor_us(cell, 4096, 7168, READ) == pytest.approx(1288, rel=0.01)  # docs: 1288 us
    assert moe_grouped.floor_us(measured[0], 4096, 7168, READ) == pytest.approx(1671, rel=0.01)
    assert measured[0].max_m == 64


def test_table_marks_lost_and_wrong_cells() -> None:
    lines = moe_report.table(ROWS)
    assert [line.partition("<")[2].strip() for line in lines[1:]] == ["", "deepgemm", "", ""]
    assert [line.endswith("WRONG") for line in lines[1:]] == [False, False, True, False]


def test_summary_judges_against_the_figures() -> None:
    text = "\n".join(moe_report.summary(ROWS))
    assert "1-4 tokens: 1 cells, best peer / ours, geometric mean 1.800 (to be >= 1.7: holds)" in text
    assert "8-64 tokens: 1 cells, best peer / ours, geometric mean 0.923 (to be >= 1.12: MISSED)" in text
    assert "ours / weight floor: largest 1.300 (to be <= 1.2: MISSED) at dsv3, 64 tokens" in text
    assert "dsv3, 8192 tokens, balanced: 900.000 (to be >= 1000: MISSED) TFLOPS" in text
    assert "skew: time / balanced time, largest 1.400 (to be <= 1.3: MISSED) at dsv3, 8192 tokens, zipf" in text
    assert "over DeepGEMM's experts in 1 of 1 cells: dsv3, 64 tokens" in text
    assert "error / Triton's, largest 1.250 (to be <= 1.1: MISSED)" in text
    assert "verified: 3 of 4 cells; WRONG: dsv3, 8192 tokens, balanced" in text
    assert "cells under 1.0: 1, of which 1 by more than 3 %" in text


def test_recorded_rows_are_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    grouped = {"layout": "masked", "groups": 8, "rows": "64", "n": 4096, "k": 7168, "us": 60.0, "floor_us": 54.0}
    grouped |= {"peers": {"deepgemm": 57.0}, "rel_err": 0.002, "verified": True}
    env = {"failures": {"triton: broke": ["dsv3 1 balanced"]}, "absent_peers": {"flashinfer": "not installed"}}
    path = tmp_path / "moe.json"
    path.write_text(json.dumps({"env": env, "rows": [*ROWS, grouped]}))
    assert cli.main(["bench", "--moe", "--from", str(path)]) == 0
    said = capsys.readouterr().out
    assert "absent: flashinfer: not installed" in said and "left out: triton: broke (1 cells" in said
    assert "DeepGEMM / ours, geometric mean 0.950 (to be >= 1.1: MISSED)" in said
    assert "masked 8 x 64, 4096x7168: 0.95" in said


@pytest.mark.gpu
def test_small_run_on_a_gpu(tmp_path: Path) -> None:
    out = tmp_path / "moe.json"
    arguments = ["bench", "--moe", "--model", "16,512,256,4", "--tokens", "1,64,512", "--peers", "none"]
    assert cli.main([*arguments, "--routing", "balanced,same", "--json", str(out)]) == 0
    result = json.loads(out.read_text())
    assert len(result["rows"]) == 6
    assert all(found["verified"] and found["bitwise"] and found["us"] > 0 for found in result["rows"])
