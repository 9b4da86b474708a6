"""The m-grouped masked GEMM: a block of rows for each group, of which the first masked_m[g] count; no host sync."""

from __future__ import annotations

from functools import cache

import torch

from fp8_backend.kernels import grouped_tall, launcher
from fp8_backend.kernels.backend import num_sms
from fp8_backend.kernels.compiler import KernelSpec
from fp8_backend.kernels.experts_decode import BARRIER_BYTES, THREADS, units_bytes
from fp8_backend.kernels.problem import MAX_SHARED_BYTES
from fp8_backend.kernels.quantize import ELEMENT_TYPES
from fp8_backend.kernels.reference import BLOCK, align, ceil_div
from fp8_backend.kernels.routing import MAX_GROUPS
from fp8_backend.kernels.tensor_map import encode_tiled

SPEC = KernelSpec("masked.cuh", "masked")
LAYOUT = launcher.ParamLayout(("map",) + ("u64",) * 5 + ("i64",) * 4 + ("u32",) * 12)
MAX_UNITS = 8192  # pieces of up to 128 rows that a CTA can list in its shared memory
_UNIT_ROWS = 128
# Rows a group that are expected from which on grouped_tall.cuh is the faster one (8 groups of 256, 7168x2048, one H100:
# 73 us in masked.cuh, 67 there).
TALL_ROWS = 256
# Expected rows a group for which masked.cuh asks for weights on the guess that every group has 1 to 128: with so many a
# group is hardly ever empty, nor above 128 (docs/kernel-notes-moe.md, 2026-11-28).
_GUESSED_ROWS = range(4, 97)


def all_specs() -> tuple[KernelSpec, ...]:
    """Return every kernel that the masked GEMM can need."""
    return (SPEC,)


@cache
def _kernel(device: int) -> launcher.Kernel:
    return launcher.load(SPEC, LAYOUT)


def load_all() -> None:
    """Load every kernel of this file on torch's current device."""
    _kernel(torch.cuda.current_device())


def launch_masked(
    a: torch.Tensor,
    scale_a: torch.Tensor,
    weight: torch.Tensor,
    scale_b: torch.Tensor,
    out: torch.Tensor,
    masked_m: torch.Tensor,
    expected_m: int,
) -> None:
    """Launch out[g, :masked_m[g]] = a[g, :masked_m[g]] @ weight[g]^T on a GPU; arguments are not checked.

    Both kernels that can be launched give the same bits.

    Args:
        a: [num_groups, max_m, k] float8_e4m3fn, contiguous, k % 128 == 0.
        scale_a: [num_groups, max_m, k / 128] float32 with stride 1 between rows.
        weight: [num_groups, k / 128, align(n, 8), 128] float8_e4m3fn, packed.
        scale_b: [num_groups, k / 128, align(ceil(n / 128), 4) + 4] float32, packed.
        out: [num_groups, max_m, n] bfloat16, float16 or float32, contiguous; rows past masked_m are not written.
        masked_m: [num_groups] int32, on the device.
        expected_m: likely rows a group, which decides between the kernels, and what masked.cuh asks for on a guess.
    """
    scales = scale_a.transpose(1, 2)
    if expected_m >= TALL_ROWS and a.shape[0] <= MAX_GROUPS and grouped_tall.takes(scales):
        routed = grouped_tall.list_counts(masked_m, a.shape[1])
        grouped_tall.launch(a.flatten(0, 1), scales, weight, scale_b, out.flatten(0, 1), routed)
        return
    (num_groups, max_m, k), (_, k_blocks, n_aligned, _), device = a.shape, weight.shape, a.device.index
    n, most_units = out.shape[2], num_groups * ceil_div(max_m, _UNIT_ROWS)
    assert scale_a.stride(1) == 1 and most_units <= MAX_UNITS, f"{num_groups} groups of {max_m} rows"
    box_rows = min(_UNIT_ROWS, align(max_m, 8))
    dims, box = (BLOCK, num_groups * max_m, k_blocks), (BLOCK, box_rows, 1)
    map_a = encode_tiled(a.data_ptr(), dims, (k, BLOCK), box, "128B", 1)
    params: tuple[int | bytes, ...] = (map_a, scale_a.data_ptr(), weight.data_ptr())
    params += (scale_b.data_ptr(), out.data_ptr(), masked_m.data_ptr(), scale_a.stride(0), scale_a.stride(2))
    params += (weight.stride(0), scale_b.stride(0), num_groups, most_units, max_m, n, n_aligned, k_blocks)
    taken = BARRIER_BYTES + units_bytes(num_groups, 0, most_units)
    ring_bytes = (MAX_SHARED_BYTES - taken) // 1024 * 1024
    store_16_bytes = out.element_size() == 2 and n % 8 == 0 and out.data_ptr() % 16 == 0
    params += (scale_b.stride(1), box_rows, ring_bytes, ELEMENT_TYPES[out.dtype], int(store_16_bytes))
    params += (int(expected_m in _GUESSED_ROWS),)
    stream = launcher.current_stream(device)
    _kernel(device).launch((num_sms(device), 1, 1), THREADS, MAX_SHARED_BYTES, params, stream, pdl=True)
