"""Random weights, cold copies of them, and the float64 truth of what a linear computes from them."""

from __future__ import annotations

import torch

from fp8_backend.bench.peers import Weights, padded_scale
from fp8_backend.kernels import gemm, layout, reference
from fp8_backend.kernels.reference import BLOCK, ceil_div
from fp8_backend.measure.timing import copies_for

SAMPLED_ROWS = 64


class RandomLinear:
    """A weight [n, k] whose block scales differ by up to a factor of 11, as stored and as packed, in cold copies."""

    def __init__(self, n: int, k: int, copies: int | None = None, bf16: bool = True, plain: bool = True) -> None:
        """Draw the weight on the current GPU.

        Args:
            n: rows.
            k: columns.
            copies: how many; by default enough to be cold.
            bf16: whether to hold dequantised copies.
            plain: whether to hold copies as stored; one is held anyway.
        """
        self.n, self.k = n, k
        codes = (torch.randn(n, k, device="cuda") * 60).clamp(-448, 448).to(torch.float8_e4m3fn)
        # Outputs of unit variance for inputs of unit variance, so that a chain of linears neither dies nor overflows.
        mean = 1 / (60 * k**0.5)
        scale = (torch.rand(ceil_div(n, BLOCK), ceil_div(k, BLOCK), device="cuda") + 0.1) * mean * 1.5
        copies = copies_for(n * k) if copies is None else copies
        packed, packed_scale = layout.pack_weight(codes), layout.pack_scale(scale, n, k)
        self.ours = [gemm.Weight(packed.clone(), packed_scale.clone(), n, k) for _ in range(copies)]
        stored = copies if plain else 1
        dequantised = reference.dequantize(codes, scale, BLOCK).to(torch.bfloat16) if bf16 else None
        self.plain = Weights(
            codes=[codes.clone() for _ in range(stored)],
            scales=[scale.clone() for _ in range(stored)],
            bf16=[dequantised.clone() for _ in range(ceil_div(copies, 2) + 1)] if dequantised is not None else [],
            padded_scales=[padded_scale(scale) for _ in range(stored)],
        )
        self._double = reference.dequantize(codes, scale, BLOCK, torch.float64)
        torch.cuda.synchronize()  # kernels fetch weights before earlier work of the stream ends

    def linear(self, x: torch.Tensor, copy: int) -> torch.Tensor:
        """Return our linear of x by one copy, as the serving op calls it."""
        weight = self.ours[copy]
        return gemm.fp8_linear(x, weight.codes, weight.scale, self.n)

    def truth(self, x: torch.Tensor) -> torch.Tensor:
        """Return the product of the codes that the reference quantises x to, [m, n] float64."""
        codes, scale = reference.per_token_group_quant(x)
        return reference.dequantize(codes[:, : self.k], scale, 1, torch.float64) @ self._double.t()


def sampled_rows(m: int, most: int = SAMPLED_ROWS) -> torch.Tensor:
    """Return at most `most` rows of m, evenly spread, the first and the last among them."""
    return torch.linspace(0, m - 1, min(m, most)).round().long()
