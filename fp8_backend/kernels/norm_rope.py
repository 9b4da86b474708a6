"""RMSNorm of each query's and key's head, the rotary embedding and the write to the cache behind it, in one kernel."""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch

from fp8_backend.errors import ArgumentError
from fp8_backend.kernels import launcher, quantize, reference
from fp8_backend.kernels.backend import is_current, runs_cuda_kernels
from fp8_backend.kernels.compiler import KernelSpec
from fp8_backend.kernels.reference import ceil_div

SPEC = KernelSpec("norm_rope.cuh", "norm_rope")
DTYPES = (torch.bfloat16, torch.float16)
MAX_HEAD, HEAD_ALIGNMENT = 256, 4  # elements that a warp holds; pairs, in each half of a head
_LAYOUT = launcher.ParamLayout(("u64",) * 10 + ("i64",) * 4 + ("u32",) * 7 + ("f32",))
_WARPS = 8


class KeyValueCache(NamedTuple):
    """Where keys and values of tokens are kept.

    keys, values: [blocks, block, heads, head] in the rows' dtype, of the same strides, which are even but for that of
    the elements, 1. slots: [at most m] int64, of the first tokens: slot s is row s % block of block s // block, and
    below 0 there is none.
    """

    keys: torch.Tensor
    values: torch.Tensor
    slots: torch.Tensor


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
    kept: KeyValueCache | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Normalise every query's and key's head and rotate its halves by the token's position (NeoX style).

    Numerics: see `fp8_backend.kernels.reference.qk_norm_rope`, which rounds every step; the kernel rounds once. On a
    GPU all but the rows may be read before earlier kernels of the stream have ended, as `gemm.fp8_linear` says of its
    weight.

    Args:
        rows: [m, n] bfloat16 or float16, any row stride: query heads, key heads, and what is left alone.
        positions: [m] int64, rows of the cache.
        query_weight: [head] in the rows' dtype; head is a multiple of 4, at most 256.
        key_weight: likewise.
        cos_sin_cache: [positions, head] in the rows' dtype, contiguous: head / 2 cosines, then as many sines.
        epsilon: added to the mean of squares.
        query_heads: heads at the start of a row.
        key_heads: heads behind them.
        kept: where the keys are written, too, and the values: as many heads as there are keys, behind these in a row.

    Returns:
        queries [m, query_heads, head] and keys [m, key_heads, head], contiguous in the rows' dtype.

    Raises:
        ArgumentError: a dtype, shape or device that does not fit.
        UnsupportedError: the rows are on a GPU for which there are no kernels.
    """
    operands = rows, positions, query_weight, key_weight, cos_sin_cache
    check(*operands, query_heads, key_heads)
    head = query_weight.shape[0]
    check_cache(rows, kept, head, query_heads, key_heads)
    if not runs_cuda_kernels(rows.device):
        queries, keys = reference.qk_norm_rope(*operands, epsilon, query_heads, key_heads)
        if kept is not None:
            reference.keep(keys, values_behind(rows, query_heads, key_heads, head), *kept)
        return queries, keys
    if not is_current(rows.device):
        with torch.cuda.device(rows.device):
            return qk_norm_rope(*operands, epsilon, query_heads, key_heads, kept)
    return _launch(operands, epsilon, query_heads, key_heads, kept)


def values_behind(rows: torch.Tensor, query_heads: int, key_heads: int, head: int) -> torch.Tensor:
    """Return the values [m, key_heads, head] that lie behind queries and keys in rows [m, n], a view."""
    first = (query_heads + key_heads) * head
    return rows[:, first : first + key_heads * head].view(rows.shape[0], key_heads, head)


def _launch(
    operands: tuple[torch.Tensor, ...],
    epsilon: float,
    query_heads: int,
    key_heads: int,
    kept: KeyValueCache | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Launch the kernel on the current device; operands: the tensors of `qk_norm_rope` in order, nothing is checked."""
    rows, positions, query_weight, key_weight, cos_sin_cache = operands
    head, value_heads = query_weight.shape[0], 0 if kept is None else key_heads
    # Only the heads: a copy of whole rows would keep an odd length, and every second row would lie two bytes off.
    rows = _paired(rows[:, : (query_heads + key_heads + value_heads) * head])
    weights = [_paired(weight.contiguous()) for weight in (query_weight, key_weight)]
    cosines, places = _paired(cos_sin_cache.contiguous()), positions.contiguous()
    m = rows.shape[0]
    queries, keys = (rows.new_empty((m, heads, head)) for heads in (query_heads, key_heads))
    if m and query_heads + key_heads:
        tensors = (rows, places, *weights, cosines, queries, keys)
        cached: tuple[int, ...] = (0, 0, 0)
        strides: tuple[int, ...] = (0, 0, 0, 1, 0)
        if kept is not None:
            slots = kept.slots.contiguous()
            cached = kept.keys.data_ptr(), kept.values.data_ptr(), slots.data_ptr()
            strides = (*kept.keys.stride()[:3], kept.keys.shape[1], len(slots))
        params = (m, query_heads, key_heads, head, quantize.ELEMENT_TYPES[rows.dtype], epsilon)
        kernel(rows.device.index).launch(
            (ceil_div(m * (query_heads + key_heads + value_heads), _WARPS), 1, 1),
            _WARPS * 32,
            0,
            (*(tensor.data_ptr() for tensor in tensors), *cached, rows.stride(0), *strides, *params),
            launcher.current_stream(rows.device.index),
            pdl=True,
        )
    return queries, keys


def fits_cache(keys: torch.Tensor, values: torch.Tensor, dtype: torch.dtype) -> bool:
    """Return whether the kernel can write rows of a dtype to caches [blocks, block, heads, head] like these."""
    aligned = all(tensor.data_ptr() % 4 == 0 for tensor in (keys, values))
    even = keys.stride(3) == 1 and not any(stride % 2 for stride in keys.stride()[:3])
    same = keys.shape == values.shape and keys.stride() == values.stride()
    return keys.dtype == values.dtype == dtype and same and even and aligned


def check_cache(rows: torch.Tensor, kept: KeyValueCache | None, head: int, query_heads: int, key_heads: int) -> None:
    """Check where keys and values are to be written; the rest as `check` has it.

    Raises:
        ArgumentError: a dtype, shape, stride or device that does not fit.
    """
    if kept is None:
        return
    keys, values, slots = kept
    if keys.dim() != 4 or keys.shape[2:] != (key_heads, head) or not fits_cache(keys, values, rows.dtype):
        raise ArgumentError(
            f"kept: got keys {list(keys.shape)} {keys.dtype} of strides {keys.stride()} and values "
            f"{list(values.shape)} {values.dtype} of strides {values.stride()}; expected [blocks, block, {key_heads}, "
            f"{head}] {rows.dtype} of the same even strides, contiguous heads; write another cache apart"
        )
    if slots.dim() != 1 or len(slots) > rows.shape[0] or slots.dtype != torch.int64:
        raise ArgumentError(
            f"kept: got slots {list(slots.shape)} {slots.dtype}; expected [at most {rows.shape[0]}] torch.int64, one "
            "for each of the first tokens; cut or convert them"
        )
    if rows.shape[1] < (query_heads + 2 * key_heads) * head:
        raise ArgumentError(
            f"rows: got {rows.shape[1]} columns; expected {key_heads} values behind {query_heads} queries and "
            f"{key_heads} keys of {head}; leave `kept` out where values lie elsewhere"
        )
    if {keys.device, values.device, slots.device} != {rows.device}:
        raise ArgumentError(
            f"kept: got {keys.device}, {values.device} and {slots.device}; expected all on {rows.device}; move them"
        )


def _paired(tensor: torch.Tensor) -> torch.Tensor:
    """Return the tensor with contiguous rows of which every second element is 4-byte aligned, a copy if need be."""
    fits = tensor.data_ptr() % 4 == 0 and tensor.stride(-1) == 1 and (tensor.dim() < 2 or tensor.stride(0) % 2 == 0)
    return tensor if fits else tensor.clone(memory_format=torch.contiguous_format)
