"""Grouped GEMMs and the activation between them, against one float64 product a row."""

from __future__ import annotations

import pytest
import torch

import fp8_backend
from fp8_backend.errors import ArgumentError
from fp8_backend.kernels import reference
from fp8_backend.kernels.activation import masked_silu_mul_quant
from fp8_backend.kernels.expert_weights import pack_expert_scales, pack_experts
from fp8_backend.kernels.m_grouped import mn_major_groups
from fp8_backend.kernels.reference import BLOCK, dequantize, relative_error

GROUPS, N, K = 5, 264, 384
NAN = float("nan")


@pytest.fixture(scope="module")
def weight() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    codes = torch.randn(GROUPS, N, K, generator=generator).to(torch.float8_e4m3fn)
    return codes, torch.rand(GROUPS, -(-N // BLOCK), K // BLOCK, generator=generator) / 20 + 0.01


def given(weight: tuple[torch.Tensor, torch.Tensor], packed: bool) -> tuple[torch.Tensor, torch.Tensor]:
    codes, scale = weight
    return (pack_experts(codes.clone()), pack_expert_scales(scale, N, K)) if packed else weight


def product(x: torch.Tensor, weight: tuple[torch.Tensor, torch.Tensor], group: int) -> torch.Tensor:
    codes, scale = reference.per_token_group_quant(x)
    a = dequantize(codes, scale, 1, torch.float64)
    return a @ dequantize(weight[0][group], weight[1][group], BLOCK, torch.float64).t()


def ragged(*counts: int) -> list[int]:
    """Return the group of each row: counts[g] rows of group g, and after each group as many of -1 as are negative."""
    return [group for group, count in enumerate(counts) for _ in range(count)]


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    "indices",
    [
        ragged(3, 0, 7, 1, 130),
        ragged(0, 0, 141, 0, 0),
        [0] * 100 + [-1] * 28 + [3] * 13 + [-1] * 115,  # padded to 128 rows, as DeepGEMM wants it
        [-1, 1, -1, 4],
        [],
    ],
    ids=["ragged", "one-group", "padded", "holes", "none"],
)
def test_contiguous(weight: tuple[torch.Tensor, torch.Tensor], indices: list[int], packed: bool) -> None:
    x = torch.randn(len(indices), K, generator=torch.Generator().manual_seed(2))
    out = torch.full((len(indices), N), NAN, dtype=torch.bfloat16)
    m_indices = torch.tensor(indices, dtype=torch.int32)
    a = reference.per_token_group_quant(x)
    fp8_backend.m_grouped_fp8_gemm_nt_contiguous(a, given(weight, packed), out, m_indices)
    for group in range(GROUPS):
        rows = m_indices == group
        if rows.any():
            assert relative_error(out[rows], product(x, weight, group)[rows]) < 0.003
    assert out[m_indices < 0].isnan().all() and not out[m_indices >= 0].isnan().any()


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("counts", [(0, 1, 9, 3, 0), (9, 9, 9, 9, 9), (0, 0, 0, 0, 0)])
def test_masked(weight: tuple[torch.Tensor, torch.Tensor], counts: tuple[int, ...], packed: bool) -> None:
    x = torch.randn(GROUPS, 9, K, generator=torch.Generator().manual_seed(3))
    codes, scale = reference.per_token_group_quant(x.view(-1, K))
    a = codes.view(GROUPS, 9, K), scale.reshape(GROUPS, 9, -1)
    out = torch.full((GROUPS, 9, N), NAN, dtype=torch.bfloat16)
    masked_m = torch.tensor(counts, dtype=torch.int32)
    fp8_backend.m_grouped_fp8_gemm_nt_masked(a, given(weight, packed), out, masked_m, 4)
    for group, rows in enumerate(counts):
        if rows:
            assert relative_error(out[group, :rows], product(x[group, :rows], weight, group)) < 0.003
        assert out[group, rows:].isnan().all()


def test_scales_by_group_are_laid_out_once() -> None:
    scale = torch.rand(3, 6, 4)
    laid_out = mn_major_groups(scale)
    assert torch.equal(laid_out, scale) and laid_out.stride() == (32, 1, 8)
    assert mn_major_groups(laid_out) is laid_out


def test_masked_activation_quantises_the_product() -> None:
    hidden = torch.randn(3, 7, 512, generator=torch.Generator().manual_seed(4)).to(torch.bfloat16)
    hidden[:, :, 1] = NAN
    masked_m = torch.tensor([7, 0, 2], dtype=torch.int32)
    codes, scale = masked_silu_mul_quant(hidden, masked_m)
    for group, rows in enumerate(masked_m.tolist()):
        gate, up = hidden[group, :rows].float().chunk(2, dim=1)
        expected_codes, expected_scale = reference.per_token_group_quant(gate / (1 + (-gate).exp()) * up)
        got = dequantize(codes[group, :rows], scale[group, :rows], 1)
        assert got[:, 1].isnan().all()
        torch.testing.assert_close(got, dequantize(expected_codes, expected_scale, 1), equal_nan=True)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"a": (torch.zeros(4, K), torch.zeros(4, 3))}, "a, out: got"),
        ({"out": torch.zeros(4, N, dtype=torch.int32)}, "a, out: got"),
        ({"out": torch.zeros(4, N + 8)}, "b: got"),
        ({"m_indices": torch.zeros(4, dtype=torch.int64)}, "m_indices: got"),
        ({"m_indices": torch.zeros(5, dtype=torch.int32)}, "m_indices: got"),
    ],
)
def test_wrong_arguments_are_named(weight: tuple[torch.Tensor, torch.Tensor], change: dict, words: str) -> None:
    a = reference.per_token_group_quant(torch.zeros(4, K))
    m_indices = torch.zeros(4, dtype=torch.int32)
    arguments = {"a": a, "b": weight, "out": torch.zeros(4, N), "m_indices": m_indices, **change}
    with pytest.raises(ArgumentError, match=words):
        fp8_backend.m_grouped_fp8_gemm_nt_contiguous(**arguments)
    with pytest.raises(ArgumentError, match="scale_a: got"):
        fp8_backend.m_grouped_fp8_gemm_nt_contiguous((a[0], a[1][:, :2]), weight, torch.zeros(4, N), m_indices)
