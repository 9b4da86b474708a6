"""The first GEMM of experts that have few rows each: rows gathered by token, silu(gate) * up, quantisation."""

from __future__ import annotations

from functools import cache

import torch

from fp8_backend.kernels import launcher, routing
from fp8_backend.kernels.backend import num_sms
from fp8_backend.kernels.compiler import KernelSpec
from fp8_backend.kernels.grouped_sorted import select_run
from fp8_backend.kernels.prepared import Launch
from fp8_backend.kernels.reference import BLOCK, ceil_div
from fp8_backend.kernels.routing import TILE_ROWS, Routing

_STAGES = 4
SPEC = KernelSpec("grouped_gathered.cuh", "grouped_gathered", (("NUM_STAGES", _STAGES),))
LAYOUT = launcher.ParamLayout(("u64",) * 10 + ("i64",) + ("u32",) * 9)
_THREADS = 384
_STAGE_BYTES = (TILE_ROWS + 2 * BLOCK) * BLOCK + TILE_ROWS * 4 + 32 + 16 + 2 * 8
_TICKET_BYTES, _EXCHANGE_BYTES, _ROW_TABLE_BYTES = 64, 64 * BLOCK * 4 + 16, TILE_ROWS * 4
SHARED_BYTES = _STAGES * _STAGE_BYTES + _TICKET_BYTES + _EXCHANGE_BYTES + _ROW_TABLE_BYTES


@cache
def kernel(device: int) -> launcher.Kernel:
    """Return the loaded kernel on the current device, whose index is part of the key only."""
    return launcher.load(SPEC, LAYOUT)


def launch_like(
    a: torch.Tensor,
    scale_a: torch.Tensor,
    weight: torch.Tensor,
    scale_b: torch.Tensor,
    out: torch.Tensor,
    out_scale: torch.Tensor,
    routed: Routing,
    divisor: int,
    likely: int,
) -> Launch:
    """Return the launch of grouped_gathered.cuh for tensors like these; nothing is checked.

    Its pointers: the six tensors; sorted entries, tiles, number of tiles and first ticket of the routing.

    Args:
        a: codes [rows, k_blocks * 128] with 16-byte aligned rows.
        scale_a: [k_blocks, at least rows] float32, contiguous rows.
        weight: [num_groups, k_blocks, 2 * n, 128] packed, gate and up; on the device, as no other has to be.
        scale_b: [num_groups, k_blocks, scales] packed.
        out: codes [entries, n] in sorted order.
        out_scale: [n / 128, at least entries] float32, contiguous rows.
        routed: like the sorted rows.
        divisor: entry e reads row e // divisor of a.
        likely: groups that are likely to have rows: the first weights of so many are asked for before the previous
            kernel has ended.
    """
    device, n = weight.device.index, out.shape[1]
    row_tiles, sms, columns = routing.max_tiles(routed.entries, routed.num_groups), num_sms(device), n // BLOCK
    run = select_run(row_tiles, columns, weight.shape[1], sms)
    grid = min(sms, row_tiles * ceil_div(columns, run))
    params = (
        *(a.stride(0), divisor, n, weight.shape[2], weight.shape[1], scale_a.stride(0), scale_b.stride(1)),
        *(out_scale.stride(0), run, likely),
    )
    return Launch(kernel(device), (grid, 1), _THREADS, SHARED_BYTES, params)
