"""Activation quantisation: one float32 scale for each row and 128 columns."""

from __future__ import annotations

from functools import cache

import torch

from fp8_backend.errors import ArgumentError
from fp8_backend.kernels import launcher, reference
from fp8_backend.kernels.backend import is_current, runs_cuda_kernels
from fp8_backend.kernels.compiler import KernelSpec
from fp8_backend.kernels.prepared import Launch, PreparedLaunch
from fp8_backend.kernels.reference import BLOCK, align, ceil_div

SPECS = {  # by rows a thread, and whether words behind the scales become zero
    (rows, zeros): KernelSpec("quantize.cuh", "quantize", (("ROWS", rows), ("ZEROS", zeros)))
    for rows in (1, 2)
    for zeros in (False, True)
}
ELEMENT_TYPES = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2}  # ElementType of elements.cuh
_LAYOUT = launcher.ParamLayout(("u64", "u64", "u64", "i64") + ("u32",) * 10)
_ROWS_PER_CTA, _GROUPS_PER_CTA = 4, 2
_THREADS = 16 * _ROWS_PER_CTA * _GROUPS_PER_CTA
# From here on the kernel is bound by the loads it has in flight (128 x 7168: 2.3 and 2.5 us with 1 and 2 rows a thread;
# 4096 x 2048: 10.9 and 8.3).
_MANY_ELEMENTS = 2_000_000
# From here on the GEMM behind starts when this kernel has ended. If it is let in earlier, its CTAs take multiprocessors
# in the order in which these become free, and share less in L2: one H100, us early and late, 8192 x 36864x7168 4330 and
# 3630, 4096 x 36864x7168 1951 and 1807, 2048 x 512x7168 36.8 and 31.5; but 1024 x 7168x2048 33.9 and 35.0.
_LATE_ELEMENTS = 5_000_000


@cache
def kernel(rows: int, zeros: bool, device: int) -> launcher.Kernel:
    """Return the loaded kernel of SPECS on the current device, whose index is part of the key only."""
    return launcher.load(SPECS[rows, zeros], _LAYOUT)


def code_bytes(m: int, k: int, tile_rows: int) -> int:
    """Return how many bytes codes of [m, k] are in a launch's own memory: in rows, or in tiles of so many rows.

    Whole groups of columns; with tiles, of m <= tile_rows. Scales [ceil(k / 128), align(m, 4)] float32 lie behind.
    """
    return ceil_div(k, BLOCK) * BLOCK * (tile_rows or m)


def buffer_bytes(m: int, k: int, tile_rows: int) -> int:
    """Return how many bytes codes and the scales behind them are together."""
    return code_bytes(m, k, tile_rows) + ceil_div(k, BLOCK) * align(m, 4) * 4


def rows_of(x: torch.Tensor, name: str) -> torch.Tensor:
    """Return x [m, k] with contiguous rows, copying only if its columns are strided."""
    if x.dim() != 2 or x.dtype not in ELEMENT_TYPES:
        raise ArgumentError(
            f"{name}: got {tuple(x.shape)} {x.dtype}; expected [m, k] bfloat16, float16 or float32; reshape or convert "
            "it"
        )
    return x if x.stride(1) == 1 or x.shape[1] <= 1 else x.contiguous()


def vectorised(x: torch.Tensor) -> int:
    """Return 1 if rows of x can be read 16 bytes at a time: 16-bit elements, 16-byte aligned rows, k % 8 == 0."""
    return int(x.element_size() == 2 and x.data_ptr() % 16 == 0 and x.stride(0) % 8 == 0 and x.shape[1] % 8 == 0)


def is_common(x: torch.Tensor) -> bool:
    """Return whether x [m, k] has CommonRows (elements.cuh): bfloat16 that can be read 16 bytes at a time."""
    return x.dtype == torch.bfloat16 and vectorised(x) == 1


def per_token_group_quant(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantise each row in groups of 128 columns to e4m3 with one float32 scale a group.

    Numerics: see `fp8_backend.kernels.reference.per_token_group_quant`; every backend gives the same bits.

    Args:
        x: [m, k] bfloat16, float16 or float32, any row stride.

    Returns:
        codes: [m, align(k, 128)] float8_e4m3fn, row-major; columns past k are zero.
        scale: [m, ceil(k / 128)] float32, MN-major with stride (1, align(m, 4)).

    Raises:
        ArgumentError: x is not a matrix of such a dtype.
        UnsupportedError: x is on a GPU for which there are no kernels.
    """
    x = rows_of(x, "x")
    if not runs_cuda_kernels(x.device):
        return reference.per_token_group_quant(x)
    if not is_current(x.device):
        with torch.cuda.device(x.device):
            return per_token_group_quant(x)
    m, k = x.shape
    k_blocks = ceil_div(k, BLOCK)
    codes = torch.empty((m, k_blocks * BLOCK), dtype=torch.float8_e4m3fn, device=x.device)
    scale = torch.empty((k_blocks, align(m, 4)), dtype=torch.float32, device=x.device)
    if m and k:
        stream = launcher.current_stream(x.device.index)
        launch_like(x)(stream, x.data_ptr(), codes.data_ptr(), scale.data_ptr())
    return codes, scale.t()[:m]


def launch_like(x: torch.Tensor, tile_rows: int = 0, beside: bool = False, zeros: int = 0) -> Launch:
    """Return the launch that quantises a tensor like x [m, k]; nothing is checked.

    Its pointers: x; codes; scales [ceil(k / 128), align(m, 4)] float32. Codes are [m, align(k, 128)]; with tile_rows
    (at least m) what decode.cuh reads: [ceil(k / 128), tile_rows, 128], each tile swizzled, rows past m not written.

    Args:
        x: like [m, k] bfloat16, float16 or float32, contiguous columns.
        tile_rows: 0, or rows of a tile for decode.cuh.
        beside: run at the same time as the kernel launched last, which must have waited for x before it let others
            start; this one ends behind it.
        zeros: how many words of 4 bytes behind the scales become zero. Where there are any, the kernel launched next
            may start as soon as what came before this one has ended, else when `early` says.
    """
    m, k = x.shape
    rows = 2 if not tile_rows and m * k >= _MANY_ELEMENTS else 1
    k_blocks, type_ = ceil_div(k, BLOCK), ELEMENT_TYPES[x.dtype]
    grid = ceil_div(m, _ROWS_PER_CTA * rows), ceil_div(k_blocks, _GROUPS_PER_CTA)
    shape = x.stride(0), m, k, k_blocks, align(m, 4), type_, vectorised(x), tile_rows, early(m, k), int(beside), zeros
    return Launch(kernel(rows, zeros > 0, x.device.index), grid, _THREADS, 0, shape)


def prepare(x: torch.Tensor, tile_rows: int = 0) -> PreparedLaunch:
    """Return `launch_like` prepared."""
    return launch_like(x, tile_rows).prepared()


def early(m: int, k: int) -> int:
    """Return 1 if the kernel behind one that makes codes [m, k] should start before that has ended, else 0."""
    return int(m * k < _LATE_ELEMENTS)
