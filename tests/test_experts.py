"""The reference experts against a float64 loop over tokens."""

from __future__ import annotations

import pytest
import torch

from fp8_backend.kernels.reference import BLOCK, dequantize, fp8_experts, relative_error

EXPERTS, HIDDEN, INTERMEDIATE, TOP_K = 6, 192, 256, 2


def weights(n: int, k: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randn(EXPERTS, n, k, generator=generator).to(torch.float8_e4m3fn)
    return codes, torch.rand(EXPERTS, -(-n // BLOCK), -(-k // BLOCK), generator=generator) / 20 + 0.01


@pytest.fixture(scope="module")
def packed() -> tuple[torch.Tensor, ...]:
    return *weights(2 * INTERMEDIATE, HIDDEN, 1), *weights(HIDDEN, INTERMEDIATE, 2)


def expected(x, topk_weights, topk_ids, packed, position, on_input):
    w13, scale_13, w2, scale_2 = packed
    y = torch.zeros(x.shape, dtype=torch.float64)
    for token in range(x.shape[0]):
        for weight, expert in zip(topk_weights[token].double(), topk_ids[token].tolist(), strict=True):
            local = position(expert)
            if local < 0:
                continue
            row = x[token].double() * (weight if on_input else 1)
            gate, up = (dequantize(w13[local], scale_13[local], BLOCK, torch.float64) @ row).chunk(2)
            out = dequantize(w2[local], scale_2[local], BLOCK, torch.float64) @ (gate.sigmoid() * gate * up)
            y[token] += out * (1 if on_input else weight)
    return y


def routed(m: int, dtype: torch.dtype, top_k: int = TOP_K) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(m)
    x = torch.randn(m, HIDDEN, generator=generator).to(dtype)
    scores = torch.randn(m, EXPERTS, generator=generator).softmax(dim=1)
    topk_weights, topk_ids = scores.topk(top_k)
    return x, topk_weights, topk_ids.to(torch.int32)


@pytest.mark.parametrize(
    ("m", "dtype"), [(0, torch.bfloat16), (1, torch.bfloat16), (33, torch.bfloat16), (33, torch.float16)]
)
def test_matches_a_loop_over_tokens(m: int, dtype: torch.dtype, packed: tuple[torch.Tensor, ...]) -> None:
    x, topk_weights, topk_ids = routed(m, dtype)
    y = fp8_experts(x, topk_weights, topk_ids, *packed)
    assert (y.dtype, y.shape) == (dtype, x.shape)
    # Two quantisations of activations, each 0.026, and a product of two quantised factors between them.
    assert relative_error(y, expected(x, topk_weights, topk_ids, packed, lambda e: e, False)) < 0.08


def test_skipped_ids_add_nothing(packed: tuple[torch.Tensor, ...]) -> None:
    x, topk_weights, topk_ids = routed(9, torch.bfloat16)
    topk_ids[3] = -1  # a padding token
    topk_ids[5, 1] = -1
    y = fp8_experts(x, topk_weights, topk_ids, *packed)
    assert not y[3].any()
    assert relative_error(y, expected(x, topk_weights, topk_ids, packed, lambda e: e, False)) < 0.08


def test_experts_of_two_ranks_add_up(packed: tuple[torch.Tensor, ...]) -> None:
    x, topk_weights, topk_ids = routed(17, torch.float32)
    topk_ids[2, 0] = -1  # must not be looked up as the last expert
    whole = fp8_experts(x, topk_weights, topk_ids, *packed)
    maps = torch.tensor([[0, 1, 2, -1, -1, -1], [-1, -1, -1, 0, 1, 2]], dtype=torch.int32)
    halves = [
        fp8_experts(x, topk_weights, topk_ids, *(tensor[rank * 3 : rank * 3 + 3] for tensor in packed), maps[rank])
        for rank in range(2)
    ]
    assert all(half.any() for half in halves)
    torch.testing.assert_close(halves[0] + halves[1], whole)


def test_router_weight_on_input(packed: tuple[torch.Tensor, ...]) -> None:
    x, topk_weights, topk_ids = routed(8, torch.bfloat16, top_k=1)
    y = fp8_experts(x, topk_weights, topk_ids, *packed, None, True)
    assert relative_error(y, expected(x, topk_weights, topk_ids, packed, lambda e: e, True)) < 0.08
    assert relative_error(y, expected(x, topk_weights, topk_ids, packed, lambda e: e, False)) > 0.2
