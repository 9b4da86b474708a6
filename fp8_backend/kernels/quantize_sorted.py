"""Quantisation of activations that are rows of several experts each: written where sorting has put every entry."""

from __future__ import annotations

from functools import cache

import torch

from fp8_backend.kernels import launcher
from fp8_backend.kernels.compiler import KernelSpec
from fp8_backend.kernels.quantize import ELEMENT_TYPES, vectorised
from fp8_backend.kernels.reference import BLOCK, ceil_div
from fp8_backend.kernels.routing import Routing

SPEC = KernelSpec("quantize_sorted.cuh", "quantize_sorted")
_LAYOUT = launcher.ParamLayout(("u64",) * 4 + ("i64",) + ("u32",) * 7)
_THREADS, _WARP_BLOCKS = 256, 4  # kThreads and kWarpBlocks of quantize_sorted.cuh


@cache
def kernel(device: int) -> launcher.Kernel:
    """Return the loaded kernel on the current device, whose index is part of the key only."""
    return launcher.load(SPEC, _LAYOUT)


def quantize_sorted(x: torch.Tensor, routed: Routing, top_k: int, codes: torch.Tensor, scale: torch.Tensor) -> None:
    """Quantise each token once and write it to the place of each of its entries, by work queued on the current stream.

    Nothing is checked. Numerics: see `fp8_backend.kernels.reference.per_token_group_quant`, bit for bit.

    Args:
        x: [m, hidden] bfloat16, float16 or float32, contiguous columns, any row stride.
        routed: m * top_k entries with their places, made on the same stream; those left out are written nowhere.
        top_k: entries of a token, which are neighbours.
        codes: [rows, ceil(hidden / 128) * 128] float8_e4m3fn or uint8, contiguous, 16-byte aligned, at least as many
            rows as entries; columns past hidden are zero, rows past the last place stay as they are.
        scale: [ceil(hidden / 128), at least as many columns as entries] float32, contiguous.
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
            scale.data_ptr(),
            x.stride(0),
            m,
            top_k,
            hidden,
            k_blocks,
            scale.stride(0),
            ELEMENT_TYPES[x.dtype],
            vectorised(x),
        ),
        launcher.current_stream(device),
        pdl=True,
    )
