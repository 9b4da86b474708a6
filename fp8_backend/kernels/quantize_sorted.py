"""Quantisation of activations that are rows of several experts each: written where sorting has put every entry."""

from __future__ import annotations

from functools import cache

import torch

from fp8_backend.kernels import launcher
from fp8_backend.kernels.compiler import KernelSpec
from fp8_backend.kernels.quantize import ELEMENT_TYPES, vectorised
from fp8_backend.kernels.reference import BLOCK, align, ceil_div
from fp8_backend.kernels.routing import Routing

SPEC = KernelSpec("quantize_sorted.cuh", "quantize_sorted")
SORT_SPEC = KernelSpec("sort_scales.cuh", "sort_scales")
_LAYOUT = launcher.ParamLayout(("u64",) * 4 + ("i64",) + ("u32",) * 6)
_SORT_LAYOUT = launcher.ParamLayout(("u64",) * 5 + ("u32",) * 4)
_THREADS, _WARP_BLOCKS = 256, 4  # kThreads and kWarpBlocks of quantize_sorted.cuh
_SORT_THREADS, _THREAD_BLOCKS = 256, 8  # kThreads and kThreadBlocks of sort_scales.cuh


@cache
def kernel(device: int) -> launcher.Kernel:
    """Return the loaded kernel on the current device, whose index is part of the key only."""
    return launcher.load(SPEC, _LAYOUT)


@cache
def sort_kernel(device: int) -> launcher.Kernel:
    """Return the loaded kernel that sorts scales on the current device, whose index is part of the key only."""
    return launcher.load(SORT_SPEC, _SORT_LAYOUT)


def token_scales(m: int, hidden: int) -> tuple[int, int]:
    """Return the shape of the scales of m tokens as `quantize_sorted` writes them, a token's side by side."""
    return m, align(ceil_div(hidden, BLOCK), _WARP_BLOCKS)


def quantize_sorted(
    x: torch.Tensor, routed: Routing, top_k: int, codes: torch.Tensor, token_scale: torch.Tensor
) -> None:
    """Quantise each token once and write its codes to the place of each of its entries.

    By work queued on the current stream; `sort_scales` has to come next. Nothing is checked. Numerics: see
    `fp8_backend.kernels.reference.per_token_group_quant`, bit for bit.

    Args:
        x: [m, hidden] bfloat16, float16 or float32, contiguous columns, any row stride.
        routed: m * top_k entries with their places, made on the same stream; those left out are written nowhere.
        top_k: entries of a token, which are neighbours.
        codes: [rows, ceil(hidden / 128) * 128] float8_e4m3fn or uint8, contiguous, 16-byte aligned, at least as many
            rows as entries; columns past hidden are zero, rows past the last place stay as they are.
        token_scale: [m, align(ceil(hidden / 128), 4)] float32, contiguous, 16-byte aligned, as `token_scales` has it.
    """
    (m, hidden), device = x.shape, x.device.index
    assert routed.with_places and routed.entries == m * top_k
    k_blocks = ceil_div(hidden, BLOCK)
    kernel(device).launch(
        (ceil_div(m * ceil_div(k_blocks, _WARP_BLOCKS), _THREADS // 32), 1, 1),
        _THREADS,
        0,
        (
            x.data_ptr(),
            routed.places,
            codes.data_ptr(),
            token_scale.data_ptr(),
            x.stride(0),
            m,
            top_k,
            hidden,
            k_blocks,
            ELEMENT_TYPES[x.dtype],
            vectorised(x),
        ),
        launcher.current_stream(device),
        pdl=True,
    )


def sort_scales(token_scale: torch.Tensor, routed: Routing, top_k: int, scale: torch.Tensor) -> None:
    """Write the scales of each token to the place of each of its entries, by work queued on the current stream.

    Nothing is checked. The launch before this one on the stream must be that of `quantize_sorted` with this routing,
    which is read without waiting for that launch to end.

    Args:
        token_scale: [m, align(k_blocks, 4)] float32, as `quantize_sorted` wrote it.
        routed: m * top_k entries; those left out are written nowhere.
        top_k: entries of a token, which are neighbours.
        scale: [k_blocks, at least as many columns as entries] float32, contiguous; columns past the last place stay as
            they are.
    """
    device, k_blocks = scale.device.index, scale.shape[0]
    sort_kernel(device).launch(
        (ceil_div(routed.entries, _SORT_THREADS), ceil_div(k_blocks, _THREAD_BLOCKS), 1),
        _SORT_THREADS,
        0,
        (
            token_scale.data_ptr(),
            routed.sorted_entries,
            routed.tiles,
            routed.num_tiles,
            scale.data_ptr(),
            top_k,
            k_blocks,
            token_scale.stride(0),
            scale.stride(0),
        ),
        launcher.current_stream(device),
        pdl=True,
    )
