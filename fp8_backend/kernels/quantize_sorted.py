"""Quantisation of activations that are rows of several experts each: written where sorting has put every entry."""

from __future__ import annotations

from functools import cache

import torch

from fp8_backend.kernels import launcher
from fp8_backend.kernels.compiler import KernelSpec
from fp8_backend.kernels.prepared import Launch
from fp8_backend.kernels.quantize import ELEMENT_TYPES, vectorised
from fp8_backend.kernels.reference import BLOCK, align, ceil_div

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


def launch_like(x: torch.Tensor, top_k: int) -> Launch:
    """Return the launch that quantises each token once and writes its codes to the place of each of its entries.

    `sort_like` has to come next. Numerics: see `fp8_backend.kernels.reference.per_token_group_quant`, bit for bit. Its
    pointers: x; places of m * top_k entries, of which those left out are written nowhere; codes [at least as many rows
    as entries, ceil(hidden / 128) * 128], 16-byte aligned, columns past hidden zero, rows past the last place as they
    are; scales of tokens as `token_scales` has them, float32, 16-byte aligned.

    Args:
        x: like [m, hidden] bfloat16, float16 or float32, contiguous columns, any row stride.
        top_k: entries of a token, which are neighbours.
    """
    m, hidden = x.shape
    k_blocks = ceil_div(hidden, BLOCK)
    params = x.stride(0), m, top_k, hidden, k_blocks, ELEMENT_TYPES[x.dtype], vectorised(x)
    grid = ceil_div(m * ceil_div(k_blocks, _WARP_BLOCKS), _THREADS // 32), 1
    return Launch(kernel(x.device.index), grid, _THREADS, 0, params)


def sort_like(x: torch.Tensor, top_k: int) -> Launch:
    """Return the launch that writes the scales of each token to the place of each of its entries.

    The one before it on the stream must be that of `launch_like`, and the routing older, which is read without waiting
    for that launch to end. Its pointers: scales of tokens; sorted entries, tiles and number of tiles of the routing;
    scales [ceil(hidden / 128), align(entries, 4)] float32, columns past the last place as they are.
    """
    (m, hidden), entries = x.shape, x.shape[0] * top_k
    k_blocks, token_stride = ceil_div(hidden, BLOCK), token_scales(m, hidden)[1]
    grid = ceil_div(entries, _SORT_THREADS), ceil_div(k_blocks, _THREAD_BLOCKS)
    params = top_k, k_blocks, token_stride, align(entries, 4)
    return Launch(sort_kernel(x.device.index), grid, _SORT_THREADS, 0, params)
