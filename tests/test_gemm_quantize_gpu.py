"""The GEMM that quantises its rows itself on a GPU: against float64 of the same codes, and against two launches."""

from __future__ import annotations

import pytest
import torch

from fp8_backend.kernels import gemm, heuristics, layout, reference
from fp8_backend.kernels.gemm_plan import GemmPlan
from fp8_backend.kernels.gemm_quantize import QuantizingGemmPlan
from fp8_backend.kernels.heuristics import QUANTIZING_CONFIG, GemmChoice, QuantizingGemmChoice
from fp8_backend.kernels.problem import SPLITS, GemmProblem
from fp8_backend.kernels.reference import ceil_div
from tests.test_gemm_gpu import BF16_ERROR, make_weight, make_x, truth

pytestmark = pytest.mark.gpu


def packed_weight(n, k, seed=0):
    codes, scale = make_weight(n, k, seed)
    return (codes, scale), (layout.pack_weight(codes), layout.pack_scale(scale, n, k))


def choice_of(m, n, split):
    config = QUANTIZING_CONFIG
    tiles = ceil_div(m, config.block_m) * ceil_div(n, config.block_n)
    return QuantizingGemmChoice(config, min(tiles, 132) if split == 1 else tiles * split, split)


def run(choice, x, weight, out, bias=None):
    QuantizingGemmPlan(choice, x, out, bias)(x, *weight, out, bias)
    return out


def outliers(x):
    """Put zeros, outliers, numbers of very different sizes and below every scale into rows of x."""
    x[0], x[1], x[3, 5], x[9, -1] = 0, torch.finfo(x.dtype).tiny, 6e4, -6e4
    x[4:8] *= torch.logspace(-6, 0, x.shape[1], device=x.device).to(x.dtype)
    return x


# Partial tiles and blocks, rows of a wider x, into a poisoned output that other data surrounds.
@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize(("m", "n", "k"), [(389, 712, 2176), (17, 77, 1032), (256, 512, 7168), (300, 389, 1096)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("out_dtype", [None, torch.float32])
def test_tiles_and_splits(split, m, n, k, dtype, out_dtype):
    (codes, scale), weight = packed_weight(n, k)
    x, bias = outliers(make_x(m, k + 16, dtype)[:, 8 : 8 + k]), make_x(1, n)[0]
    expected, choice = truth(x, codes, scale, bias), choice_of(m, n, split)
    surroundings = torch.full((m + 2, n + 16), float("nan"), dtype=out_dtype or dtype, device="cuda")
    out = surroundings[1:-1, 8:-8]
    run(choice, x, weight, out, bias)
    assert reference.relative_error(out, expected) < BF16_ERROR
    first = out.clone()
    assert torch.equal(run(choice, x, weight, out, bias), first)
    out.fill_(float("nan"))
    assert surroundings.isnan().all()


@pytest.mark.parametrize("seed", range(40))
def test_random_shapes(seed):
    generator = torch.Generator().manual_seed(seed)

    def draw(low, high):
        return int(torch.randint(low, high + 1, (1,), generator=generator))

    m, n, k = draw(1, 700), draw(1, 600), draw(1, 300) * 8
    split = SPLITS[draw(0, 3)]
    if split > ceil_div(k, 128):
        split = 1
    (codes, scale), weight = packed_weight(n, k, seed)
    x = make_x(m, k, torch.float16 if seed % 2 else torch.bfloat16, seed)
    out = torch.full((m, n), float("nan"), dtype=x.dtype, device="cuda")
    run(choice_of(m, n, split), x, weight, out)
    assert reference.relative_error(out, truth(x, codes, scale)) < BF16_ERROR, (m, n, k, split)


# Codes, scales and the order of sums are those of two launches, and so are the bits: batch-invariant mode relies on it.
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("m", "n", "k"), [(389, 712, 2176), (1000, 512, 7168), (130, 136, 1096)])
def test_bits_are_those_of_two_launches(dtype, m, n, k):
    _, weight = packed_weight(n, k)
    x = outliers(make_x(m, k, dtype))
    outs = [torch.full((m, n), float("nan"), dtype=torch.float32, device="cuda") for _ in range(2)]
    run(choice_of(m, n, 1), x, weight, outs[0])
    for two in heuristics.GEMM_CONFIGS:
        tiles = ceil_div(m, two.block_m) * ceil_div(n, two.block_n)
        GemmPlan(GemmChoice(two, 0, min(tiles, 132)), x, outs[1], None)(x, *weight, outs[1], None)
        assert torch.equal(*outs), two


# Many launches, which overlap: what is read before it is there, or overwritten before it is read, shows now and then.
@pytest.mark.parametrize("split", SPLITS)
def test_every_launch_gives_the_same_bits(split):
    m, n, k = 389, 712, 2176
    _, weight = packed_weight(n, k)
    x, choice = make_x(m, k), choice_of(m, n, split)
    first, out = (torch.empty(m, n, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    run(choice, x, weight, first)
    plan, different = QuantizingGemmPlan(choice, x, out, None), torch.zeros((), dtype=torch.int64, device="cuda")
    for _ in range(1000):
        plan(x, *weight, out, None)
        different += (out != first).any()
    assert not different


@pytest.mark.parametrize("m", [256, 1000])
def test_non_finite_inputs_stay_in_their_row(m):
    n, k = 512, 7168
    _, weight = packed_weight(n, k)
    x = make_x(m, k)
    x[0, 5], x[m // 2, 300] = float("nan"), float("inf")
    out = run(choice_of(m, n, 4), x, weight, torch.empty(m, n, dtype=x.dtype, device="cuda"))
    bad = out.isfinite().logical_not().any(dim=1).nonzero().flatten().tolist()
    assert bad == [0, m // 2] and not out[bad].isfinite().any()


# The kernel starts before the one that writes its rows has ended, and overwrites what the one behind it has read.
@pytest.mark.parametrize("m", [4096, 8192, 16384])
def test_rows_of_a_kernel_before_it_in_a_graph(m):
    n, k = 512, 7168
    assert isinstance(heuristics.select(GemmProblem(m, n, k, gemm.machine(0))), QuantizingGemmChoice)
    (codes, scale), weight = packed_weight(n, k)
    _, back = packed_weight(k, n, seed=1)
    x = make_x(m, k)

    def step(rows):
        return gemm.fp8_linear(gemm.fp8_linear(rows, *weight, n), *back, k)

    def chain():
        rows = x * 1
        for _ in range(4):
            rows = step(rows)
            rows = rows / rows.abs().amax()
        return gemm.fp8_linear(rows, *weight, n)

    chain()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = chain()
    for seed in range(3):
        x.copy_(make_x(m, k, seed=seed + 7))
        expected = chain().clone()
        torch.cuda.synchronize()
        y.fill_(float("nan"))
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(y, expected)
    assert reference.relative_error(gemm.fp8_linear(x, *weight, n), truth(x, codes, scale)) < BF16_ERROR
