"""The CUDA kernels against float64 of the same FP8 codes."""

from __future__ import annotations

import threading
from dataclasses import replace

import pytest
import torch

from fp8_backend.kernels import decode_heuristics, gemm, heuristics, launcher, layout, prepared, quantize, reference
from fp8_backend.kernels.decode import DecodePlan
from fp8_backend.kernels.problem import MAX_SHARED_BYTES, DecodeConfig, GemmProblem
from fp8_backend.kernels.quantize import per_token_group_quant
from fp8_backend.kernels.reference import align, ceil_div

pytestmark = pytest.mark.gpu

# bf16 rounding gives about 0.0017 (measured: at most 0.002); a wrong scale or a lost block gives far more.
BF16_ERROR = 0.004


def make_weight(n, k, seed=0):
    generator = torch.Generator("cuda").manual_seed(seed)
    codes = (torch.randn(n, k, generator=generator, device="cuda") * 60).clamp(-448, 448).to(torch.float8_e4m3fn)
    scale = torch.rand(ceil_div(n, 128), ceil_div(k, 128), generator=generator, device="cuda") * 1e-3 + 1e-4
    return codes, scale


def make_x(m, k, dtype=torch.bfloat16, seed=1):
    generator = torch.Generator("cuda").manual_seed(seed)
    return torch.randn(m, k, generator=generator, device="cuda").to(dtype)


def truth(x, codes, scale, bias=None):
    q, s = reference.per_token_group_quant(x)
    return reference.fp8_gemm_nt(q[:, : x.shape[1]], s, codes, scale, bias, torch.float64)


def linear(x, codes, scale, bias=None):
    n, k = codes.shape
    return gemm.fp8_linear(x, layout.pack_weight(codes), layout.pack_scale(scale, n, k), n, bias)


# Every row count that changes the kernel or leaves a partial tile; n and k off every tile width.
@pytest.mark.parametrize("m", [0, 1, 3, 8, 9, 17, 33, 64, 65, 127, 129, 300])
@pytest.mark.parametrize(
    ("n", "k"), [(128, 128), (576, 2048), (2112, 7168), (200, 384), (7, 200), (1000, 130), (513, 256)]
)
def test_linear_matches_float64(m, n, k):
    codes, scale = make_weight(n, k)
    x = make_x(m, k)
    y = linear(x, codes, scale)
    assert y.shape == (m, n)
    if m:
        assert reference.relative_error(y, truth(x, codes, scale)) < BF16_ERROR


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("shape", [(1, 300), (5, 129), (70, 4096), (3, 7), (512, 4096), (509, 4099)])
@pytest.mark.parametrize("strided", [False, True])
def test_quantisation_is_the_reference_bit_for_bit(dtype, shape, strided):
    m, k = shape
    x = make_x(m, 2 * k + 3, dtype)[:, 3 : 3 + k] if strided else make_x(m, k, dtype)
    x[0] = 0
    x[-1, 0] = 6e4
    codes, scale = per_token_group_quant(x)
    expected_codes, expected_scale = reference.per_token_group_quant(x)
    assert torch.equal(codes.view(torch.uint8), expected_codes.view(torch.uint8))
    assert torch.equal(scale, expected_scale) and scale.stride() == expected_scale.stride()


# The same codes and scales as the reference, each tile swizzled as a packed weight is.
@pytest.mark.parametrize(("m", "k"), [(1, 128), (7, 520), (16, 4096)])
def test_tiles_hold_the_codes_in_the_order_of_wgmma(m, k):
    x, k_blocks = make_x(m, k), ceil_div(k, 128)
    codes = torch.full((k_blocks, 16, 128), 0x55, dtype=torch.uint8, device="cuda")
    scale = torch.empty(k_blocks, align(m, 4), device="cuda")
    quantize.prepare(x, 16)(launcher.current_stream(0), x.data_ptr(), codes.data_ptr(), scale.data_ptr())
    expected, expected_scale = reference.per_token_group_quant(x)
    plain = layout.unpack_weight(codes.view(torch.float8_e4m3fn), 16, k_blocks * 128)
    assert torch.equal(plain[:m].view(torch.uint8), expected.view(torch.uint8))
    assert torch.equal(scale[:, :m].t(), expected_scale)
    assert (codes.view(k_blocks, 16, 128)[:, m:] == 0x55).all()  # rows without a token are left alone


# Each compiled kernel on a problem with partial tiles everywhere, into a poisoned output that other data surrounds.
@pytest.mark.parametrize("config", heuristics.GEMM_CONFIGS, ids=str)
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("out_dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_every_gemm_config(config, packed, out_dtype):
    m, n, k = 389, 712, 2176
    codes, scale = make_weight(n, k)
    x = make_x(m, k)
    q, s = per_token_group_quant(x)
    bias = make_x(1, n)[0]
    weight = (
        gemm.Weight(layout.pack_weight(codes), layout.pack_scale(scale, n, k), n, k)
        if packed
        else gemm.Weight(codes, layout.arrange_scale(scale, n, k), n, k)
    )
    surroundings = torch.full((m + 2, n + 16), float("nan"), dtype=out_dtype, device="cuda")
    out = surroundings[1:-1, 8:-8]
    expected = truth(x, codes, scale, bias)
    choices = [choice for _, choice in heuristics.gemm_choices(GemmProblem(m, n, k)) if choice.config == config]
    assert {choice.split for choice in choices} == set(config.splits)
    for choice in (*choices, replace(choices[0], strip=3)):  # by themselves few rows of tiles go without strips
        out.fill_(float("nan"))
        gemm.launch_gemm(choice, q, s, weight, out, bias)
        assert reference.relative_error(out, expected) < BF16_ERROR
        first = out.clone()
        gemm.launch_gemm(choice, q, s, weight, out, bias)
        assert torch.equal(first, out)
    out.fill_(float("nan"))
    assert surroundings.isnan().all()


# Tiles of rows and columns that one CTA has, that many share, and that take every CTA from column to column.
@pytest.mark.parametrize(
    ("m", "n", "run", "grid"), [(1, 128, 1, 1), (389, 712, 2, 3), (389, 712, 1, 42), (2085, 7168, 5, 132)]
)
@pytest.mark.parametrize("k", [128, 200, 384, 512, 768])
@pytest.mark.parametrize("out_dtype", [torch.bfloat16, torch.float32])
def test_stationary_weights_give_the_bits_of_other_gemms(m, n, run, grid, k, out_dtype):
    codes, scale = make_weight(n, k)
    q, s = per_token_group_quant(make_x(m, k))
    bias = make_x(1, n)[0]
    weight = gemm.Weight(layout.pack_weight(codes), layout.pack_scale(scale, n, k), n, k)
    if k % 128 == 0 and out_dtype == torch.float32:
        weight = gemm.Weight(codes, layout.arrange_scale(scale, n, k), n, k)
    surroundings = torch.full((m + 2, n + 16), float("nan"), dtype=out_dtype, device="cuda")
    out, expected = surroundings[1:-1, 8:-8], torch.empty(m, n, dtype=out_dtype, device="cuda")
    other = next(config for config in heuristics.GEMM_CONFIGS if (config.block_m, config.block_n) == (128, 128))
    gemm.launch_gemm(
        heuristics.GemmChoice(other, 0, min(132, ceil_div(m, 128) * ceil_div(n, 128))), q, s, weight, expected, bias
    )
    assert reference.relative_error(expected, truth(make_x(m, k), codes, scale, bias)) < BF16_ERROR
    choice, different = heuristics.GemmChoice(heuristics.STATIONARY_CONFIG, run, grid), torch.zeros((), device="cuda")
    for _ in range(100):
        out.fill_(float("nan"))
        gemm.launch_gemm(choice, q, s, weight, out, bias)
        different += (out != expected).any()
    assert not different
    out.fill_(float("nan"))
    assert surroundings.isnan().all()


@pytest.mark.parametrize(
    ("config", "rows"),
    [(config, rows) for config in decode_heuristics.DECODE_CONFIGS for rows in (8, 40, 72, 128)],
    ids=str,
)
@pytest.mark.parametrize("shared_bytes", [MAX_SHARED_BYTES, decode_heuristics.HALF_SHARED_BYTES])
def test_every_decode_config(config, rows, shared_bytes):
    m, n, k = config.tokens - 1, 712, 2176
    codes, scale = make_weight(n, k)
    x, bias = make_x(m, k), make_x(1, n)[0]
    weight = gemm.Weight(layout.pack_weight(codes), layout.pack_scale(scale, n, k), n, k)
    tiles = ceil_div(n, rows)
    stages = decode_heuristics.decode_stages(config, rows, ceil_div(k, 128), shared_bytes)
    grid = min(tiles, 3) if config.split == 1 else tiles * config.split
    choice = decode_heuristics.DecodeChoice(config, rows, stages, grid, min(2, stages))
    surroundings = torch.full((m + 2, n + 16), float("nan"), dtype=torch.bfloat16, device="cuda")
    out = surroundings[1:-1, 8:-8]
    plan = DecodePlan(choice, x, out, bias)
    plan(x, weight.codes, weight.scale, out, bias)
    assert reference.relative_error(out, truth(x, codes, scale, bias)) < BF16_ERROR
    first = out.clone()
    plan(x, weight.codes, weight.scale, out, bias)
    assert torch.equal(first, out)
    out.fill_(float("nan"))
    assert surroundings.isnan().all()


# Stages were once released while other lanes of the warp still read them: wrong with two CTAs a multiprocessor, few
# stages and launches that overlap (docs/kernel-notes.md, 2026-11-24).
@pytest.mark.parametrize(("tokens", "rows"), [(8, 96), (16, 72)])
def test_overlapping_launches_give_the_same_bits(tokens, rows):
    n, k, config = 24_576, 1536, DecodeConfig(tokens, False, 1)
    codes, scale = make_weight(n, k)
    weight = layout.pack_weight(codes), layout.pack_scale(scale, n, k)
    x = make_x(tokens, k)
    outs = [torch.empty(tokens, n, dtype=torch.bfloat16, device="cuda") for _ in range(24)]
    stages = decode_heuristics.decode_stages(config, rows, ceil_div(k, 128), decode_heuristics.HALF_SHARED_BYTES)
    plan = DecodePlan(decode_heuristics.DecodeChoice(config, rows, stages, 132, stages), x, outs[0], None)
    plan(x, *weight, outs[0], None)
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        for out in outs:
            plan(x, *weight, out, None)
    for _ in range(4):
        for out in outs:
            out.fill_(float("nan"))
        graph.replay()
        assert reference.relative_error(outs[0], truth(x, codes, scale)) < BF16_ERROR
        assert all(torch.equal(out, outs[0]) for out in outs)


# Scales once overtook the answer that they had arrived: 39 of 2000 launches of 256 x 128 tiles, 158 of 4000 of 128 x 64
# tiles with k shared by two CTAs (docs/kernel-notes-gemm.md, 2026-11-26).
@pytest.mark.parametrize("config", heuristics.GEMM_CONFIGS, ids=str)
def test_every_launch_of_a_gemm_gives_the_same_bits(config):
    m, n, k = 389, 712, 2176
    codes, scale = make_weight(n, k)
    weight = gemm.Weight(layout.pack_weight(codes), layout.pack_scale(scale, n, k), n, k)
    q, s = per_token_group_quant(make_x(m, k))
    for choice in (choice for _, choice in heuristics.gemm_choices(GemmProblem(m, n, k)) if choice.config == config):
        first, out = (torch.empty(m, n, dtype=torch.bfloat16, device="cuda") for _ in range(2))
        gemm.launch_gemm(choice, q, s, weight, first, None)
        different = torch.zeros((), dtype=torch.int64, device="cuda")
        for _ in range(1000):
            gemm.launch_gemm(choice, q, s, weight, out, None)
            different += (out != first).any()
        assert not different, choice


@pytest.mark.parametrize("m", [1, 16, 64, 200])
def test_non_finite_inputs_stay_in_their_row(m):
    codes, scale = make_weight(256, 512)
    x = make_x(m, 512)
    x[0, 5], x[m // 2, 300] = float("nan"), float("inf")
    y = linear(x, codes, scale)
    bad = sorted({0, m // 2})
    assert not y[bad].isfinite().any()
    good = [i for i in range(m) if i not in bad]
    assert y[good].isfinite().all()


def test_output_of_more_than_2_to_the_31_elements():
    m, n, k = 66_000, 32_768, 128
    codes, scale = make_weight(n, k)
    x = make_x(m, k)
    y = linear(x, codes, scale)
    assert y.numel() > 2**31
    for rows in (slice(0, 64), slice(m - 64, m)):
        assert reference.relative_error(y[rows], truth(x[rows], codes, scale)) < BF16_ERROR


def test_linear_is_captured_in_a_cuda_graph():
    codes, scale = make_weight(2112, 1024)
    packed, packed_scale = layout.pack_weight(codes), layout.pack_scale(scale, 2112, 1024)
    for m in (1, 40, 200):
        x = make_x(m, 1024)
        eager = gemm.fp8_linear(x, packed, packed_scale, 2112)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = gemm.fp8_linear(x, packed, packed_scale, 2112)
        x.copy_(make_x(m, 1024, seed=7))
        y.fill_(float("nan"))
        graph.replay()
        assert not torch.equal(y, eager)
        assert torch.equal(y, gemm.fp8_linear(x, packed, packed_scale, 2112))


# Plans are kept by thread and patched by call: other tensors, streams and threads get their own answers.
@pytest.mark.parametrize("m", [1, 40, 200])
def test_threads_and_streams_do_not_mix_their_calls(m):
    n, k = 712, 2176
    weights = []
    for seed in range(3):
        codes, scale = make_weight(n, k, seed=seed)
        weights.append((layout.pack_weight(codes), layout.pack_scale(scale, n, k)))
    inputs = [make_x(m, k, seed=seed) for seed in range(3)]
    expected = [[gemm.fp8_linear(x, *weight, n) for weight in weights] for x in inputs]
    torch.cuda.synchronize()
    found: dict[int, list[tuple[int, torch.Tensor]]] = {}

    def issue(worker: int) -> None:
        with torch.cuda.stream(torch.cuda.Stream()):
            found[worker] = [(call % 3, gemm.fp8_linear(inputs[worker], *weights[call % 3], n)) for call in range(30)]
            torch.cuda.current_stream().synchronize()

    threads = [threading.Thread(target=issue, args=(worker,)) for worker in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for worker in range(3):
        assert len(found[worker]) == 30
        assert all(torch.equal(y, expected[worker][weight]) for weight, y in found[worker])


# Rows of decode and GEMM kernels, of fused and separate quantisation: in this mode all add k-blocks in one order.
@pytest.mark.parametrize(("n", "k"), [(512, 7168), (2112, 1536), (1000, 130)])
def test_batch_invariant_rows_do_not_depend_on_m(n, k, monkeypatch):
    monkeypatch.setattr(gemm.backend, "batch_invariant", lambda: True)
    gemm._plans.by_key.clear()
    codes, scale = make_weight(n, k)
    weight = layout.pack_weight(codes), layout.pack_scale(scale, n, k)
    x = make_x(4096, k)
    whole = gemm.fp8_linear(x, *weight, n)
    for m in (1, 2, 8, 9, 16, 17, 32, 33, 64, 65, 128, 300, 1024):
        assert torch.equal(gemm.fp8_linear(x[:m].contiguous(), *weight, n), whole[:m]), m
    gemm._plans.by_key.clear()


def test_plans_are_bounded(monkeypatch):
    monkeypatch.setattr(prepared, "MAX_PLANS", 3)
    gemm._plans.by_key.clear()
    codes, scale = make_weight(256, 256)
    weight = layout.pack_weight(codes), layout.pack_scale(scale, 256, 256)
    for m in (1, 65, 66, 67, 68, 65):
        x = make_x(m, 256)
        assert reference.relative_error(gemm.fp8_linear(x, *weight, 256), truth(x, codes, scale)) < BF16_ERROR
    assert len(gemm._plans.by_key) == 3


def test_float8_input_has_scale_one():
    codes, scale = make_weight(384, 512)
    x = make_x(20, 512).to(torch.float8_e4m3fn)
    y = linear(x, codes, scale)
    ones = torch.ones(20, 4, device="cuda")
    assert y.dtype == torch.bfloat16
    assert reference.relative_error(y, reference.fp8_gemm_nt(x, ones, codes, scale, None, torch.float64)) < BF16_ERROR
