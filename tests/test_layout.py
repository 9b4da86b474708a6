"""Packed layouts, and the linear op and GEMM on them, on the CPU."""

from __future__ import annotations

import gc
import importlib.util

import pytest
import torch

from fp8_backend.errors import ArgumentError
from fp8_backend.kernels import gemm, layout, reference
from fp8_backend.kernels.reference import ceil_div

# Multiples of nothing, of the swizzle period and of the block; one row; k below a block.
SHAPES = [(1, 128), (7, 200), (8, 128), (130, 384), (2112, 256), (256, 1), (129, 513)]


def random_weight(n, k):
    codes = torch.randint(0, 256, (n, k), dtype=torch.uint8).view(torch.float8_e4m3fn)
    return codes, torch.rand(ceil_div(n, 128), ceil_div(k, 128)) + 0.5


def finite_weight(n, k):
    return torch.randn(n, k).mul(50).to(torch.float8_e4m3fn), random_weight(n, k)[1]


@pytest.mark.parametrize(("n", "k"), SHAPES)
def test_packing_is_undone_bit_for_bit(n, k):
    codes, scale = random_weight(n, k)
    packed = layout.pack_weight(codes)
    assert packed.shape == layout.packed_weight_shape(n, k) and packed.is_contiguous()
    assert torch.equal(layout.unpack_weight(packed, n, k).view(torch.uint8), codes.view(torch.uint8))
    packed_scale = layout.pack_scale(scale, n, k)
    assert packed_scale.shape == layout.packed_scale_shape(n, k) and packed_scale.is_contiguous()
    assert torch.equal(layout.unpack_scale(packed_scale, n), scale)


def test_packing_keeps_no_tensor():
    """While vLLM loads, memory may come from a pool that its sleep level 2 forgets: a kept table would be garbage."""
    spec = importlib.util.find_spec(layout.__name__)
    fresh = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(fresh)
    codes, scale = random_weight(24, 256)

    def alive():
        gc.collect()
        return sum(isinstance(each, torch.Tensor) for each in gc.get_objects())

    before = alive()
    fresh.pack_weight(codes), fresh.pack_scale(scale, 24, 256)
    assert alive() == before


def test_packed_chunks_lie_where_the_swizzle_puts_them():
    n, k = 24, 256
    codes = torch.arange(n * k // 16).repeat_interleave(16).remainder(251).to(torch.uint8).view(n, k)
    packed = layout.pack_weight(codes.view(torch.float8_e4m3fn)).view(torch.uint8).view(2, n, 8, 16)
    for block, row, chunk in ((0, 0, 3), (1, 5, 0), (1, 23, 7), (0, 10, 2)):
        expected = codes[row, block * 128 + chunk * 16 : block * 128 + chunk * 16 + 16]
        assert torch.equal(packed[block, row, chunk ^ (row % 8)], expected)


def test_kernels_can_fetch_eight_scales_from_every_aligned_place():
    for n in (1, 128, 129, 640, 24576):
        row = layout.packed_scale_shape(n, 128)[1]
        last = ceil_div(n, 128) - 1
        assert (last & ~3) + layout.SCALES_FETCHED <= row and row % layout.SCALE_ALIGNMENT == 0


@pytest.mark.parametrize(("n", "k"), SHAPES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_linear_is_the_product_of_the_codes(n, k, dtype):
    codes, scale = finite_weight(n, k)
    x, bias = torch.randn(2, 3, k).to(dtype), torch.randn(n).to(dtype)
    y = gemm.fp8_linear(x, layout.pack_weight(codes), layout.pack_scale(scale, n, k), n, bias)
    q, s = reference.per_token_group_quant(x.view(6, k))
    expected = reference.fp8_gemm_nt(q[:, :k], s, codes, scale, bias, torch.float64)
    assert y.shape == (2, 3, n) and y.dtype == dtype
    assert reference.relative_error(y.view(6, n), expected) < 0.004


def test_quantisation_against_its_definition():
    x = torch.randn(5, 300).bfloat16()
    x[1] = 0
    x[2, 7], x[3, 200] = float("nan"), float("inf")
    codes, scale = reference.per_token_group_quant(x)
    assert codes.shape == (5, 384) and scale.shape == (5, 3) and scale.stride() == (1, 8)
    assert not codes[:, 300:].float().any() and not codes[1].float().any()
    amax = x[0, 128:256].float().abs().max()
    assert scale[0, 1] == amax / torch.tensor(448.0)
    error = reference.dequantize(codes[:1], scale[:1], 1)[:, :300] - x[:1].float()
    assert error.abs().max() <= x[0].float().abs().max() / 16  # half a step of 3 mantissa bits at the top
    assert codes[2, 7].isnan() and codes[2, :7].float().isfinite().all()
    assert codes[3, 200].isnan() and scale[3, 1].isinf() and scale[3, 0].isfinite()


def test_gemm_takes_plain_and_packed_operands():
    m, n, k = 5, 200, 256
    codes, scale = finite_weight(n, k)
    a, scale_a = reference.per_token_group_quant(torch.randn(m, k))
    expected = reference.fp8_gemm_nt(a, scale_a, codes, scale)
    for b in ((codes, scale), (layout.pack_weight(codes), layout.pack_scale(scale, n, k))):
        out = torch.full((m, n), float("nan"))
        gemm.fp8_gemm_nt((a, scale_a.contiguous()), b, out)
        assert torch.equal(out, expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"a": torch.zeros(5, 256)}, r"a: got \[5, 256\] float32.*expected \[5, 256\] float8_e4m3fn"),
        ({"scale_a": torch.ones(5, 3)}, r"scale_a: got \[5, 3\].*expected \[5, 2\] float32"),
        ({"scale_b": torch.ones(3, 2)}, r"scale: got \[3, 2\].*expected \[2, 2\]"),
        ({"out": torch.zeros(5, 200, dtype=torch.int8)}, r"out: got .*int8.*expected \[5, 200\] bfloat16 or float16"),
        ({"out": torch.zeros(200, 5).t()}, "out: .*contiguous columns"),
        ({"bias": torch.zeros(199)}, r"bias: got \[199\].*expected \[200\]"),
    ],
)
def test_gemm_names_the_tensor_that_does_not_fit(change, message):
    codes, scale = finite_weight(200, 256)
    a, scale_a = reference.per_token_group_quant(torch.randn(5, 256))
    given = {"a": a, "scale_a": scale_a, "scale_b": scale, "out": torch.zeros(5, 200), "bias": None, **change}
    with pytest.raises(ArgumentError, match=message):
        gemm.fp8_gemm_nt((given["a"], given["scale_a"]), (codes, given["scale_b"]), given["out"], given["bias"])


def test_linear_and_packing_refuse_what_does_not_fit():
    codes, scale = finite_weight(200, 256)
    with pytest.raises(ArgumentError, match=r"expected \(2, 200, 128\) for n=200 and x of 256"):
        gemm.fp8_linear(torch.zeros(1, 256), codes, scale, 200)
    with pytest.raises(ArgumentError, match="pass the checkpoint's codes"):
        layout.pack_weight(torch.zeros(4, 4))
    with pytest.raises(ArgumentError, match="use pack_weight"):
        layout.unpack_weight(layout.pack_weight(codes), 300, 256)
