"""Quantise weights to e4m3 with one scale a 128x128 block, and say what it cost."""

from __future__ import annotations

from typing import Literal

import torch

from fp8_backend.kernels.reference import BLOCK, FP8_MAX, MIN_AMAX, ceil_div, dequantize

# float32: amax / 448. ue8m0: the next power of two, in float32. e8m0: that, in one byte.
ScaleKind = Literal["float32", "ue8m0", "e8m0"]
SCALE_DTYPES = {"float32": "F32", "ue8m0": "F32", "e8m0": "F8_E8M0"}


def quantize_blocks(weight: torch.Tensor, kind: ScaleKind) -> tuple[torch.Tensor, torch.Tensor]:
    """Return codes and scales whose product is about the weight.

    A block's scale is its largest magnitude / 448 (at least 1e-30 / 448), or the next power of two above; a block of
    zeros has scale 1.

    Args:
        weight: [n, k], any float dtype, finite.
        kind: of the scales.

    Returns:
        codes: [n, k] float8_e4m3fn.
        scale: [ceil(n / 128), ceil(k / 128)] float32, or float8_e8m0fnu for `e8m0`.
    """
    n, k = weight.shape
    blocks = _blocks(weight.float())
    amax = blocks.abs().amax(dim=(1, 3))
    scale = amax.clamp_min(MIN_AMAX) / FP8_MAX
    if kind != "float32":
        mantissa, exponent = torch.frexp(scale)  # mantissa in [0.5, 1)
        scale = torch.ldexp(torch.ones_like(scale), exponent - (mantissa == 0.5).int())
    scale = torch.where(amax == 0, torch.ones_like(scale), scale)
    codes = (blocks / scale[:, None, :, None]).clamp(-FP8_MAX, FP8_MAX)
    codes = codes.view(ceil_div(n, BLOCK) * BLOCK, -1)[:n, :k].to(torch.float8_e4m3fn).contiguous()
    return codes, scale.to(torch.float8_e8m0fnu) if kind == "e8m0" else scale


def block_errors(weight: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the squared norms of each block's error and of each block, both [n_blocks, k_blocks] float64."""
    weight = weight.float()
    error = dequantize(codes, scale.float(), BLOCK) - weight
    # In float64 before squaring: float32 weights of 1e20, or of 1e-25, leave the range of float32 there.
    return tuple(_blocks(x.double()).square().sum(dim=(1, 3), dtype=torch.float64) for x in (error, weight))  # type: ignore[return-value]


def _blocks(x: torch.Tensor) -> torch.Tensor:
    """Return [n, k] as [n_blocks, 128, k_blocks, 128], padded with zeros."""
    n, k = x.shape
    padded = torch.nn.functional.pad(x, (0, -k % BLOCK, 0, -n % BLOCK))
    return padded.view(ceil_div(n, BLOCK), BLOCK, ceil_div(k, BLOCK), BLOCK)
