"""Checks of what a caller hands to a GEMM: each error names the tensor, what it is and what is expected."""

from __future__ import annotations

import torch

from fp8_backend.errors import ArgumentError
from fp8_backend.kernels import layout
from fp8_backend.kernels.quantize import ELEMENT_TYPES
from fp8_backend.kernels.reference import BLOCK, ceil_div


def check_linear(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, n: int, bias: torch.Tensor | None) -> None:
    """Check the operands of x @ weight^T + bias, of which weight and scale are packed.

    Args:
        x: [..., k] bfloat16, float16, float32 or float8_e4m3fn, any strides.
        weight: from `layout.pack_weight`.
        scale: from `layout.pack_scale`.
        n: rows of the unpacked weight.
        bias: [n] bfloat16, float16 or float32, or None.

    Raises:
        ArgumentError: a dtype, shape or device that does not fit.
    """
    any_float, k = tuple(ELEMENT_TYPES), x.shape[-1] if x.dim() else 0
    _expect("x", x, tuple(x.shape) if x.dim() else (0,), (*any_float, torch.float8_e4m3fn), contiguous_columns=False)
    if tuple(weight.shape) != layout.packed_weight_shape(n, k):
        raise ArgumentError(
            f"weight: got {tuple(weight.shape)}; expected {layout.packed_weight_shape(n, k)} for n={n} and x of {k} "
            "columns; pack it with pack_weight"
        )
    _expect("weight", weight, layout.packed_weight_shape(n, k), (torch.float8_e4m3fn,))
    _expect("scale", scale, layout.packed_scale_shape(n, k), (torch.float32,))
    if bias is not None:
        _expect("bias", bias, (n,), any_float)
    for name, tensor in (("weight", weight), ("scale", scale), ("bias", bias)):
        if tensor is not None and tensor.device != x.device:
            raise ArgumentError(f"{name} is on {tensor.device} and x on {x.device}; move them to one device")


def check_gemm(
    codes: torch.Tensor,
    scale_a: torch.Tensor,
    codes_b: torch.Tensor,
    scale_b: torch.Tensor,
    out: torch.Tensor,
    bias: torch.Tensor | None,
) -> None:
    """Check the operands of out = a @ b^T + bias, whose scale_b is packed.

    Args:
        codes: [m, k] float8_e4m3fn.
        scale_a: [m, ceil(k / 128)] float32, any strides.
        codes_b: [n, k] float8_e4m3fn, or packed.
        scale_b: packed.
        out: [m, n] bfloat16, float16 or float32; its columns give n.
        bias: [n] bfloat16, float16 or float32, or None.

    Raises:
        ArgumentError: a dtype, shape, stride or device that does not fit.
    """
    (m, k), n = codes.shape, out.shape[1]
    fp8, float32, any_float = (torch.float8_e4m3fn,), (torch.float32,), tuple(ELEMENT_TYPES)
    weight_shape = layout.packed_weight_shape(n, k) if codes_b.dim() == 3 else (n, k)
    _expect("a", codes, (m, k), fp8)
    _expect("scale_a", scale_a, (m, ceil_div(k, BLOCK)), float32, contiguous_columns=False)
    _expect("b", codes_b, weight_shape, fp8)
    _expect("scale_b", scale_b, layout.packed_scale_shape(n, k), float32)
    _expect("out", out, (m, n), any_float)
    if bias is not None:
        _expect("bias", bias, (n,), any_float)
    for name, tensor in (("a", codes), ("scale_a", scale_a), ("b", codes_b), ("scale_b", scale_b), ("bias", bias)):
        if tensor is not None and tensor.device != out.device:
            raise ArgumentError(f"{name} is on {tensor.device} and out on {out.device}; move them to one device")


def _expect(
    name: str,
    tensor: torch.Tensor,
    shape: tuple[int, ...],
    dtypes: tuple[torch.dtype, ...],
    contiguous_columns: bool = True,
) -> None:
    columns = not contiguous_columns or shape[-1] <= 1 or tensor.stride(-1) == 1
    if tuple(tensor.shape) == shape and tensor.dtype in dtypes and columns:
        return
    names = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
    raise ArgumentError(
        f"{name}: got {list(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')} of strides {tensor.stride()}; "
        f"expected {list(shape)} {names}{', contiguous columns' if contiguous_columns else ''}"
    )
