"""The dense GEMM entry points: check the arguments, choose a configuration, launch."""

from __future__ import annotations

import torch

from fp8_backend.kernels import layout, reference
from fp8_backend.kernels.reference import per_token_group_quant


def fp8_linear(
    x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, n: int, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """Quantise activations and multiply them by a packed FP8 weight: y = x @ weight^T + bias.

    Args:
        x: [..., k] bfloat16, float16 or float32, quantised in groups of 128; or float8_e4m3fn, taken as codes of scale 1.
        weight: [ceil(k / 128), align(n, 8), 128] float8_e4m3fn, from `pack_weight`.
        scale: [ceil(n / 128), align(ceil(k / 128), 4)] float32, from `pack_scale`.
        n: rows of the unpacked weight.
        bias: [n], any float dtype, or None.

    Returns:
        [..., n] in x's dtype (bfloat16 for float8 x).
    """
    k = x.shape[-1]
    rows = x.reshape(-1, k)
    out_dtype = torch.bfloat16 if x.dtype == torch.float8_e4m3fn else x.dtype
    if x.dtype == torch.float8_e4m3fn:
        codes, scale_a = rows, rows.new_ones(rows.shape[0], reference.ceil_div(k, 128), dtype=torch.float32)
    else:
        codes, scale_a = per_token_group_quant(rows)
    plain = layout.unpack_weight(weight, n, k)
    y = reference.fp8_gemm_nt(codes[:, :k], scale_a, plain, layout.unpack_scale(scale, k), bias)
    return y.to(out_dtype).reshape(*x.shape[:-1], n)
