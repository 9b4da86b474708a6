"""The GEMM that quantises its rows itself, on the emulated machine: right codes, right sums, no hazard."""

from __future__ import annotations

import shutil

import pytest
import torch

from fp8_backend.kernels import gemm, heuristics, layout, reference
from fp8_backend.kernels.gemm_plan import GemmPlan
from fp8_backend.kernels.gemm_quantize import QuantizingGemmPlan, mappable
from fp8_backend.kernels.heuristics import QUANTIZING_CONFIG, GemmChoice, QuantizingGemmChoice
from fp8_backend.kernels.problem import H200
from fp8_backend.kernels.reference import BLOCK, ceil_div
from tests.emulation import emulated
from tests.test_device_code import BF16_ERROR, MACHINE, make_weight, planted, truth

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++ to compile the device code for the CPU")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("device-code")


def choice_of(m, n, split):
    config = QUANTIZING_CONFIG
    tiles = ceil_div(m, config.block_m) * ceil_div(n, config.block_n)
    return QuantizingGemmChoice(config, min(tiles, MACHINE.num_sms) if split == 1 else tiles * split, split)


def packed_weight(n, k):
    """Return codes and scales of a weight, and the same packed."""
    codes, scale = make_weight(n, k)
    return (codes, scale), (layout.pack_weight(codes), layout.pack_scale(scale, n, k))


def extreme(x):
    """Put rows of zeros, of numbers below every scale, outliers and numbers of very different sizes into x."""
    x[0], x[1], x[3, 5], x[9, -1] = 0, torch.finfo(x.dtype).tiny, 6e4, -6e4
    x[4:8] *= torch.logspace(-6, 0, x.shape[1], dtype=torch.float32).to(x.dtype)
    return x


# Several tiles a CTA and none of a whole cluster's; rows fewer than a tile; columns that end in a first and a second
# slice, at a multiple of 8 and not; k-blocks that go around both rings, the last one whole, half, and of 8 columns.
@pytest.mark.parametrize(
    ("m", "n", "k", "split"),
    [(140, 389, 9 * BLOCK + 8, 1), (257, 136, 5 * BLOCK, 1), (50, 77, 9 * BLOCK - 64, 8), (130, 264, 8 * BLOCK, 4)],
)
def test_tiles_and_splits(m, n, k, split, folder):
    torch.manual_seed(m)
    (codes, scale), weight = packed_weight(n, k)
    dtype = torch.bfloat16 if m % 2 else torch.float16
    x, bias = extreme(torch.randn(m, k + 16, dtype=dtype)[:, 8 : 8 + k]), torch.randn(n)
    assert mappable(x) and not mappable(x[:, 1:]) and not mappable(x.float())
    choice = choice_of(m, n, split)
    with emulated(folder, MACHINE) as machine:
        # Outputs that are aligned for 16 bytes and, behind 7 others, for none.
        for out_dtype, offset in ((dtype, 8), (torch.float32, 7)):
            surroundings = torch.full((m + 2, n + 16), float("nan"), dtype=out_dtype)
            out = surroundings[1:-1, offset : offset + n]
            QuantizingGemmPlan(choice, x, out, bias)(x, *weight, out, bias)
            assert reference.relative_error(out, truth(x, codes, scale, bias)) < BF16_ERROR
            out.fill_(float("nan"))
            assert surroundings.isnan().all()
        assert machine.filled_rows() == 0


# The same codes, scales and order of sums as those of two launches: the same bits.
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_bits_are_those_of_two_launches(dtype, folder):
    torch.manual_seed(1)
    m, n, k = 70, 264, 5 * BLOCK + 24
    _, weight = packed_weight(n, k)
    x = extreme(torch.randn(m, k, dtype=dtype))
    x[20, 3], x[30, 300] = float("nan"), float("inf")
    outs = [torch.full((m, n), 7.0) for _ in range(2)]
    with emulated(folder, MACHINE):
        QuantizingGemmPlan(choice_of(m, n, 1), x, outs[0], None)(x, *weight, outs[0], None)
        two = GemmChoice(heuristics.GEMM_CONFIGS[0], 0, 1)
        GemmPlan(two, x, outs[1], None)(x, *weight, outs[1], None)
    assert outs[0][[20, 30]].isnan().all()
    for out in outs:
        out[[20, 30]] = 0
    assert outs[0].isfinite().all() and torch.equal(*outs)


# A call as serving makes it: one launch of this kernel; rows that the copy engine cannot fetch take two others.
def test_linear(folder, monkeypatch):
    torch.manual_seed(2)
    m, n, k = 130, 72, 10 * BLOCK
    choice = choice_of(m, n, 2)
    chosen = gemm.choose
    monkeypatch.setattr(gemm, "choose", lambda *problem: choice if problem[4].mappable else chosen(*problem))
    (codes, scale), weight = packed_weight(n, k)
    x = torch.randn(m, k + 1, dtype=torch.bfloat16)
    aligned = x[:, :k].contiguous()
    expected = truth(aligned, codes, scale)
    with emulated(folder, H200) as machine:
        y, again = (gemm.fp8_linear(aligned, *weight, n) for _ in range(2))
        assert [spec.file for spec, _ in machine.loaded] == ["gemm_quantize.cuh"] and machine.runs == 2
        other = gemm.fp8_linear(x[:, :k], *weight, n)
        assert {spec.file for spec, _ in machine.loaded} == {"gemm_quantize.cuh", "quantize.cuh", "gemm.cuh"}
    assert torch.equal(y, again)
    assert all(reference.relative_error(each, expected) < BF16_ERROR for each in (y, other))


# What is planted, and the CTAs that share k: of eight some have one block, and others two.
FAULTS = {
    "rows are read at once": (1, "if (row == 0) barrier_wait(full_x + 8 * ring_x.stage, ring_x.parity);", ""),
    "rows are fetched over others": (1, "barrier_wait(empty_x + 8 * ring.stage, ring.parity ^ 1);", ""),
    "weights are read at once": (1, "barrier_wait(full_b + 8 * s, ring.parity);", ""),
    "weights are fetched over others": (1, "barrier_wait(empty_b + 8 * s, ring.parity ^ 1);", ""),
    "a stage is free when one warp has read it": (1, "kMathWarps * kArrivalsOfWarp;", "kArrivalsOfWarp;"),
    "odd rows stay as they were read": (1, "odd ? second : first", "first"),
    "sums are sent over rows": (8, "cluster_wait();\n                send_sums", "send_sums"),
    "half of the sums are waited for": (8, "kShares * kExchangedBytes<2>);\n        b", "kShares * 2048);\n        b"),
}


# Each of these is wrong in some interleaving, and one of a few shows it.
@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults_are_found(fault, folder, tmp_path):
    torch.manual_seed(3)
    split, right, wrong = FAULTS[fault]
    sources = planted(tmp_path, "gemm_quantize.cuh", right, wrong)
    m, n, k = 60, 77, 15 * BLOCK
    (codes, scale), weight = packed_weight(n, k)
    x, out = torch.randn(m, k, dtype=torch.bfloat16), torch.full((m, n), float("nan"), dtype=torch.bfloat16)
    expected, choice = truth(x, codes, scale), choice_of(m, n, split)
    with emulated(folder, MACHINE, sources) as machine, pytest.raises(AssertionError):
        for machine.seed in range(6):
            QuantizingGemmPlan(choice, x, out, None)(x, *weight, out, None)
            assert reference.relative_error(out, expected) < BF16_ERROR
