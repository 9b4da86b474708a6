"""RMSNorm of each query's and key's head with the rotary embedding behind it, in one kernel."""

from __future__ import annotations

from functools import cache

import torch

from fp8_backend.errors import ArgumentError
from fp8_backend.kernels import launcher, quantize, reference
from fp8_backend.kernels.backend import is_current, runs_cuda_kernels
from fp8_backend.kernels.compiler import KernelSpec
from fp8_backend.kernels.reference import ceil_div

SPEC = KernelSpec("norm_rope.cuh", "norm_rope")
DTYPES = (torch.bfloat16, torch.float16)
MAX_HEAD, HEAD_ALIGNMENT = 256, 4  # elements that a warp holds; pairs, in each half of a head
_LAYOUT = launcher.ParamLayout(("u64",) * 7 + ("i64",) + ("u32",) * 5 + ("f32",))
_WARPS = 8


@cache
def kernel(device: int) -> launcher.Kernel:
    """Return the loaded kernel on the current device, whose index is part of the key only."""
    return launcher.load(SPEC, _LAYOUT)


def check(
    rows: torch.Tensor,
    positions: torch.Tensor,
    query_weight: torch.Tensor,
    key_weight: torch.Tensor,
    cos_sin_cache: torch.Tensor,
    query_heads: int,
    key_heads: int,
) -> None:
    """Check the operands of `qk_norm_rope`.

    Raises:
        ArgumentError: a dtype, shape or device that does not fit.
    """
    head = query_weight.shape[-1]
    if head % HEAD_ALIGNMENT or not 0 < head <= MAX_HEAD:
        raise ArgumentError(
            f"query_weight: a head of {head} elements; expected a multiple of {HEAD_ALIGNMENT}, at most {MAX_HEAD}"
        )
    if rows.dim() != 2 or rows.dtype not in DTYPES or rows.shape[1] < (query_heads + key_heads) * head:
        raise ArgumentError(
            f"rows: got {list(rows.shape)} {rows.dtype}; expected [m, at least {query_heads} query and {key_heads} key "
            f"heads of {head}] bfloat16 or float16"
        )
    for name, tensor, shape, dtype in (
        ("positions", positions, rows.shape[:1], torch.int64),
        ("query_weight", query_weight, (head,), rows.dtype),
        ("key_weight", key_weight, (head,), rows.dtype),
        ("cos_sin_cache", cos_sin_cache, (cos_sin_cache.shape[0], head), rows.dtype),
    ):
        if tuple(tensor.shape) != tuple(shape) or tensor.dtype != dtype or tensor.device != rows.device:
            raise ArgumentError(
                f"{name}: got {list(tensor.shape)} {tensor.dtype} on {tensor.device}; expected {list(shape)} {dtype} "
                f"on {rows.device}"
            )


def qk_norm_rope(
    rows: torch.Tensor,
    positions: torch.Tensor,
    query_weight: torch.Tensor,
    key_weight: torch.Tensor,
    cos_sin_cache: torch.Tensor,
    epsilon: float,
    query_heads: int,
    key_heads: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Normalise every query's and key's head and rotate its halves by the token's position (NeoX style).

    Numerics: see `fp8_backend.kernels.reference.qk_norm_rope`, which rounds every step; the kernel rounds once.

    Args:
        rows: [m, n] bfloat16 or float16, any row stride: query heads, key heads, and what is left alone.
        positions: [m] int64, rows of the cache.
        query_weight: [head] in the rows' dtype; head is a multiple of 4, at most 256.
        key_weight: likewise.
        cos_sin_cache: [positions, head] in the rows' dtype, contiguous: head / 2 cosines, then as many sines.
        epsilon: added to the mean of squares.
        query_heads: heads at the start of a row.
        key_heads: heads behind them.

    Returns:
        queries [m, query_heads, head] and keys [m, key_heads, head], contiguous in the rows' dtype.

    Raises:
        ArgumentError: a dtype, shape or device that does not fit.
        UnsupportedError: the rows are on a GPU for which there are no kernels.
    """
    check(rows, positions, query_weight, key_weight, cos_sin_cache, query_heads, key_heads)
    if not runs_cuda_kernels(rows.device):
        return reference.qk_norm_rope(
            rows, positions, query_weight, key_weight, cos_sin_cache, epsilon, query_heads, key_heads
        )
    if not is_current(rows.device):
        with torch.cuda.device(rows.device):
            return qk_norm_rope(
                rows, positions, query_weight, key_weight, cos_sin_cache, epsilon, query_heads, key_heads
            )
    head = query_weight.shape[0]
    # Only the heads: a copy of whole rows would keep an odd length, and every second row would lie two bytes off.
    rows = _paired(rows[:, : (query_heads + key_heads) * head])
    weights = [_paired(weight.contiguous()) for weight in (query_weight, key_weight)]
    cosines, places = _paired(cos_sin_cache.contiguous()), positions.contiguous()
    m = rows.shape[0]
    queries, keys = (rows.new_empty((m, heads, head)) for heads in (query_heads, key_heads))
    if m and query_heads + key_heads:
        tensors = (rows, places, *weights, cosines, queries, keys)
        params = (m, query_heads, key_heads, head, quantize.ELEMENT_TYPES[rows.dtype], epsilon)
        kernel(rows.device.index).launch(
            (ceil_div(m * (query_heads + key_heads), _WARPS), 1, 1),
            _WARPS * 32,
            0,
            (*(tensor.data_ptr() for tensor in tensors), rows.stride(0), *params),
            launcher.current_stream(rows.device.index),
            pdl=True,
        )
    return queries, keys


def _paired(tensor: torch.Tensor) -> torch.Tensor:
    """Return the tensor with contiguous rows of which every second element is 4-byte aligned, a copy if need be."""
    fits = tensor.data_ptr() % 4 == 0 and tensor.stride(-1) == 1 and (tensor.dim() < 2 or tensor.stride(0) % 2 == 0)
    return tensor if fits else tensor.clone(memory_format=torch.contiguous_format)
