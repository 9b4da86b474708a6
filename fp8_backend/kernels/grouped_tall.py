"""The plain grouped GEMM for groups of many rows: tiles of 256 rows x 128 columns (grouped_tall.cuh)."""

from __future__ import annotations

from functools import cache, lru_cache

import torch

from fp8_backend.kernels import launcher
from fp8_backend.kernels.backend import num_sms
from fp8_backend.kernels.compiler import KernelSpec
from fp8_backend.kernels.quantize import ELEMENT_TYPES
from fp8_backend.kernels.reference import BLOCK, align, ceil_div
from fp8_backend.kernels.routing import COUNTER_BYTES, MAX_GROUPS, TALL_TILE_ROWS, TILE_BYTES, Routing
from fp8_backend.kernels.tensor_map import BYTES, MovableMap, row_major_map

_STAGES = 3
SPEC = KernelSpec("grouped_tall.cuh", "grouped_tall", (("NUM_STAGES", _STAGES),))
COUNTS_SPEC = KernelSpec("counts.cuh", "counts")
LAYOUT = launcher.ParamLayout(("map",) * 2 + ("u64",) * 7 + ("i64",) * 2 + ("u32",) * 9)
COUNTS_LAYOUT = launcher.ParamLayout(("u64",) * 3 + ("u32",) * 2)
_BOX_ROWS = TALL_TILE_ROWS // 2  # kHalfRows of grouped_tall.cuh
_OUT_BOX = (64, 16)  # what a warp hands to the copy engine at a time
_THREADS, _COUNTS_THREADS = 384, 1024
_STAGE_BYTES = (TALL_TILE_ROWS + BLOCK) * BLOCK + (TALL_TILE_ROWS + 8) * 4 + 16 + 2 * 8
SHARED_BYTES = _STAGES * _STAGE_BYTES + TALL_TILE_ROWS * BLOCK * 2


def all_specs() -> tuple[KernelSpec, ...]:
    """Return every kernel of this file."""
    return SPEC, COUNTS_SPEC


def load_all() -> None:
    """Load every kernel on torch's current device."""
    device = torch.cuda.current_device()
    _kernel(device)
    _counts_kernel(device)


@cache
def _kernel(device: int) -> launcher.Kernel:
    return launcher.load(SPEC, LAYOUT)


@cache
def _counts_kernel(device: int) -> launcher.Kernel:
    return launcher.load(COUNTS_SPEC, COUNTS_LAYOUT)


@lru_cache(maxsize=1024)
def _map_out(n: int, rows: int, row_bytes: int) -> MovableMap:
    return MovableMap((n, rows), (row_bytes,), _OUT_BOX, 2)


def is_vectorised(out: torch.Tensor) -> bool:
    """Return whether rows of out [m, n] can be written 16 bytes at a time: 16-bit elements, all rows so aligned."""
    aligned = out.data_ptr() % 16 == 0 and out.stride(0) % 8 == 0 and out.shape[1] % 8 == 0
    return aligned and out.element_size() == 2


def takes(scale_a: torch.Tensor) -> bool:
    """Return whether scale_a [..., k_blocks, rows] lies so that bulk copies can fetch it, and end with a row's padding.

    Rows must be contiguous, 16-byte aligned and padded to a multiple of 4, as `reference.mn_major` lays them out.
    """
    aligned = scale_a.data_ptr() % 16 == 0 and all(stride % 4 == 0 for stride in scale_a.stride()[:-1])
    return aligned and scale_a.stride(-1) == 1 and scale_a.stride(-2) == align(scale_a.shape[-1], 4)


def list_counts(masked_m: torch.Tensor, max_m: int) -> Routing:
    """List the tiles of rows of blocks of which the first ones count, by work queued on the current stream.

    Args:
        masked_m: [num_groups] int32, contiguous, at most 1024 groups.
        max_m: rows of a block.
    """
    num_groups = len(masked_m)
    assert num_groups <= MAX_GROUPS
    listed = COUNTER_BYTES + num_groups * ceil_div(max_m, TALL_TILE_ROWS) * TILE_BYTES
    storage = torch.empty(listed, dtype=torch.uint8, device=masked_m.device)
    routed = Routing(storage.data_ptr(), num_groups * max_m, num_groups, in_order=True, storage=storage)
    _counts_kernel(masked_m.device.index).launch(
        (1, 1, 1),
        _COUNTS_THREADS,
        0,
        (masked_m.data_ptr(), routed.tiles, routed.num_tiles, num_groups, max_m),
        launcher.current_stream(masked_m.device.index),
        pdl=True,
    )
    return routed


def launch(
    a: torch.Tensor,
    scale_a: torch.Tensor,
    weight: torch.Tensor,
    scale_b: torch.Tensor,
    out: torch.Tensor,
    routed: Routing,
) -> None:
    """Launch grouped_tall.cuh; nothing is checked.

    Args:
        a: codes [rows, k_blocks * 128] in sorted order, 16-byte aligned rows.
        scale_a: [k_blocks, rows] float32, or [num_groups, k_blocks, rows / num_groups] where all groups have as many
            rows; see `takes`.
        weight: [num_groups, k_blocks, n_aligned, 128] packed.
        scale_b: [num_groups, k_blocks, scales] packed.
        out: [entries, n] bfloat16, float16 or float32, contiguous columns.
        routed: the sorted rows in tiles of 256.
    """
    device, (rows, n), k_blocks = out.device.index, out.shape, weight.shape[1]
    most_tiles = ceil_div(routed.entries, TALL_TILE_ROWS) + routed.num_groups
    in_blocks, vectorised = scale_a.dim() == 3, is_vectorised(out)
    # n % 8 is no matter to the copy engine, but one condition is easier to keep than two.
    mapped_out = vectorised and routed.in_order
    _kernel(device).launch(
        (min(num_sms(device), most_tiles * ceil_div(n, BLOCK)), 1, 1),
        _THREADS,
        SHARED_BYTES,
        (
            row_major_map(a.stride(0), rows, k_blocks, _BOX_ROWS).at(a.data_ptr()),
            _map_out(n, rows, out.stride(0) * 2).at(out.data_ptr()) if mapped_out else bytes(BYTES),
            scale_a.data_ptr(),
            weight.data_ptr(),
            scale_b.data_ptr(),
            out.data_ptr(),
            routed.sorted_entries,
            routed.tiles,
            routed.num_tiles,
            out.stride(0),
            scale_a.stride(0) if in_blocks else 0,
            n,
            weight.shape[2],
            k_blocks,
            rows // routed.num_groups if in_blocks else 0,
            scale_a.stride(-2),
            scale_b.stride(1),
            ELEMENT_TYPES[out.dtype],
            int(vectorised),
            int(mapped_out),
        ),
        launcher.current_stream(device),
        pdl=True,
    )
