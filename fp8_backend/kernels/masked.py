"""The m-grouped masked GEMM: a block of rows for each group, of which the first masked_m[g] count; no host sync."""

from __future__ import annotations

import torch

from fp8_backend.kernels import launcher
from fp8_backend.kernels.compiler import KernelSpec
from fp8_backend.kernels.experts_decode import THREADS, UpConfig, num_sms, up_kernel
from fp8_backend.kernels.problem import MAX_SHARED_BYTES
from fp8_backend.kernels.quantize import ELEMENT_TYPES
from fp8_backend.kernels.reference import ceil_div

CONFIGS = (UpConfig(16, gated=False), UpConfig(64, gated=False))
MAX_UNITS = 8192  # pieces of up to 16 or 64 rows that a CTA can list in its shared memory
_TILE_GROUPS = 16  # of 8 rows of the weight: both halves of a tile's 64-row products


def all_specs() -> tuple[KernelSpec, ...]:
    """Return every kernel that the masked GEMM can need."""
    return tuple(config.spec() for config in CONFIGS)


def load_all() -> None:
    """Load every kernel of this file on torch's current device."""
    for config in CONFIGS:
        up_kernel(config, torch.cuda.current_device())


def select_config(num_groups: int, max_m: int, expected_m: int) -> UpConfig:
    """Return the kernel for about expected_m rows a group: the narrow one unless it would read weights twice."""
    narrow, wide = CONFIGS
    return narrow if expected_m <= narrow.rows and num_groups * ceil_div(max_m, narrow.rows) <= MAX_UNITS else wide


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

    Args:
        a: [num_groups, max_m, k] float8_e4m3fn, contiguous, k % 128 == 0.
        scale_a: [num_groups, max_m, k / 128] float32 with stride 1 between rows.
        weight: [num_groups, k / 128, align(n, 8), 128] float8_e4m3fn, packed.
        scale_b: [num_groups, k / 128, align(ceil(n / 128), 4) + 4] float32, packed.
        out: [num_groups, max_m, n] bfloat16, float16 or float32, contiguous; rows past masked_m are not written.
        masked_m: [num_groups] int32, on the device.
        expected_m: likely rows a group; chooses the kernel.
    """
    (num_groups, max_m, k), (_, k_blocks, n_aligned, _), device = a.shape, weight.shape, a.device.index
    config = select_config(num_groups, max_m, expected_m)
    most_units = num_groups * ceil_div(max_m, config.rows)
    assert scale_a.stride(1) == 1 and most_units <= MAX_UNITS
    ring_bytes = config.ring_bytes(MAX_SHARED_BYTES, num_groups, 0, most_units)
    params = (a.data_ptr(), scale_a.data_ptr(), weight.data_ptr(), scale_b.data_ptr(), out.data_ptr())
    params += (masked_m.data_ptr(), 0, 0, a.stride(1), a.stride(0), scale_a.stride(0), scale_a.stride(2))
    params += (weight.stride(0), scale_b.stride(0), 0, 1, num_groups, most_units, max_m, out.shape[2], n_aligned, k)
    params += (k_blocks, scale_b.stride(1), _TILE_GROUPS, ring_bytes, 0, 0, 0, ELEMENT_TYPES[out.dtype])
    stream = launcher.current_stream(device)
    up_kernel(config, device).launch((num_sms(device), 1, 1), THREADS, MAX_SHARED_BYTES, params, stream, pdl=True)
