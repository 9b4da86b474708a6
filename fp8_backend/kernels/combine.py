"""The last launch of the experts op: each token's weighted sum of what its experts gave."""

from __future__ import annotations

from functools import cache

import torch

from fp8_backend.errors import ArgumentError
from fp8_backend.kernels import launcher
from fp8_backend.kernels.compiler import KernelSpec
from fp8_backend.kernels.prepared import Launch
from fp8_backend.kernels.quantize import ELEMENT_TYPES
from fp8_backend.kernels.reference import ceil_div

SPEC = KernelSpec("combine.cuh", "combine")
LAYOUT = launcher.ParamLayout(("u64",) * 5 + ("i64",) + ("u32",) * 5)
THREADS, _COLUMNS = 256, 256 * 8


@cache
def kernel(device: int) -> launcher.Kernel:
    """Return the loaded kernel on the current device, whose index is part of the key only."""
    return launcher.load(SPEC, LAYOUT)


def check(hidden: int, out: torch.Tensor) -> None:
    """Check that the kernel can write rows of `hidden` columns to out.

    Raises:
        ArgumentError: hidden % 8 != 0, or rows of out that are not 16-byte aligned.
    """
    stride = out.stride(0)
    if hidden % 8 or stride % 8 or out.data_ptr() % 16:
        raise ArgumentError(
            f"hidden={hidden}, out's row stride {stride} and address {out.data_ptr():#x}; the combining kernel "
            "takes multiples of 8 and a 16-byte aligned out; pad hidden with zero columns"
        )


def launch_like(out: torch.Tensor, top_k: int, map_length: int, num_groups: int, device: int) -> Launch:
    """Return the launch for a tensor like out; nothing is checked.

    Its pointers: ids [m, top_k] int32; the map from ids to experts here or -1, int32, or 0 without one; weights [m,
    top_k] float32, or 0 for ones; rows [m * top_k, hidden] in out's dtype; out.

    Args:
        out: like [m, hidden] in 16-bit elements with contiguous columns.
        top_k: experts a token.
        map_length: of the map; 0 without one.
        num_groups: experts here.
        device: index of the current device.
    """
    m, hidden = out.shape
    params = out.stride(0), top_k, hidden, map_length, num_groups, ELEMENT_TYPES[out.dtype]
    return Launch(kernel(device), (m, ceil_div(hidden, _COLUMNS)), THREADS, 0, params)
