"""Notes that copies of the device code take of the time: that they can be planted, and how they are told."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks import layer_timeline, notes, timeline


def test_device_code_with_notes_compiles(tmp_path: Path) -> None:
    """Every place is there once, and notes cost no spill."""
    from fp8_backend.kernels import combine, experts_joint, quantize
    from fp8_backend.kernels.compiler import compile_kernel

    notes.instrument(tmp_path, 0x7F0000000000, timeline.places())
    for spec in (*experts_joint.all_specs(), combine.SPEC, quantize.SPECS[1, True]):
        compiled = compile_kernel(replace(spec, folder=tmp_path))
        assert compiled.spill_bytes == 0 and not compiled.warnings


def test_notes_are_told_from_when_what_came_before_had_ended() -> None:
    words = torch.zeros(3, notes.CTAS, notes.SLOTS, dtype=torch.int64)
    words[0, 0, 1], words[0, 1, 1], words[2, 0, 2] = 5000, 6000, 9500
    words[1, :2, timeline.FIRST_TILE_SLOT :][:, :4] = torch.tensor([[6000, 7000, 7500, 1], [6500, 8500, 8750, 2]])
    told = timeline.summary(words)
    assert told["quantisation, what came before has ended"] == {"ctas": 2, "first": 0.0, "median": 0.5, "last": 1.0}
    assert told["sum, ended"] == {"ctas": 1, "first": 4.5, "median": 4.5, "last": 4.5}
    assert told["first GEMM, tiles written"]["last"] == 2.5 and told["second GEMM, tiles data"]["first"] == 1.5
    assert told["second GEMM, a tile"] == {"products": 2.0, "end": 0.25} and "GEMMs, begun" not in told


def test_linears_with_notes_compile(tmp_path: Path) -> None:
    from fp8_backend.kernels import decode_heuristics, heuristics, norm, quantize, silu
    from fp8_backend.kernels.compiler import compile_kernel

    notes.instrument(tmp_path, 0x7F0000000000, layer_timeline.places({0x7F1000000000 + row: row for row in range(8)}))
    linears = heuristics.GEMM_CONFIGS[0].spec(), decode_heuristics.DECODE_CONFIGS[0].spec()
    for spec in (*linears, norm.SPECS[1], silu.SPEC, quantize.SPECS[1, False]):
        compiled = compile_kernel(replace(spec, folder=tmp_path))
        assert compiled.spill_bytes == 0 and not compiled.warnings


def test_launches_of_a_layer_are_told_from_its_first_norm() -> None:
    words = torch.zeros(len(layer_timeline.LAUNCHES), notes.CTAS, notes.SLOTS, dtype=torch.int64)
    words[0, :2, layer_timeline.WAITED] = torch.tensor([5000, 5500])
    words[1, :3, layer_timeline.ENDS] = torch.tensor([9000, 7000, 8000])
    words[-1] = 1  # of other layers
    told = layer_timeline.summary(words)
    assert told["norm 1"]["waited"] == {"ctas": 2, "first": 0.0, "median": 0.25, "last": 0.5}
    assert told["qkv"] == {"ends": {"ctas": 3, "first": 2.0, "median": 3.0, "last": 4.0}} and len(told) == 2


@pytest.mark.gpu
@pytest.mark.parametrize("m", [1, 32])
def test_launches_of_a_layer_come_one_after_the_other(m: int) -> None:
    launches = layer_timeline.measure([layer_timeline.Layer() for _ in range(2)], m)["launches"]
    linears = [name for name in ("qkv", "out", "gate_up", "down") if name in launches]
    assert linears == ["qkv", "out", "gate_up", "down"]
    ends = [launches[name]["ends"]["last"] for name in linears]
    assert ends == sorted(ends) and 0 < ends[0] and ends[-1] < 10_000


@pytest.mark.gpu
def test_what_happens_in_a_call_is_in_order() -> None:
    from fp8_backend.bench.moe_operands import RandomExperts
    from fp8_backend.bench.moe_shapes import MoeShape

    shape = MoeShape("small", 16, 512, 256, 4)
    row = timeline.measure(shape, 8, RandomExperts(shape, torch.device("cuda"), copies=2))
    events = row["events"]
    assert set(timeline.EVENTS) <= set(events)
    order = ["GEMMs, pairs sorted", "first GEMM, tiles data", "second GEMM, tiles written", "sum, ended"]
    firsts = [events[name]["first"] for name in order]
    assert firsts == sorted(firsts) and 0 < events["sum, ended"]["last"] < 1000
