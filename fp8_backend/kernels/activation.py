"""SiLU-and-multiply with quantisation between two masked GEMMs."""

from __future__ import annotations

from functools import cache

import torch

from fp8_backend.errors import ArgumentError
from fp8_backend.kernels import launcher, reference
from fp8_backend.kernels.backend import is_current, runs_cuda_kernels
from fp8_backend.kernels.compiler import KernelSpec
from fp8_backend.kernels.quantize import ELEMENT_TYPES
from fp8_backend.kernels.reference import BLOCK, align, ceil_div

SPEC = KernelSpec("activation.cuh", "activation")
_LAYOUT = launcher.ParamLayout(("u64", "u64", "u64", "u64", "u32", "u32", "u32", "u32"))
_ROWS_PER_CTA = _GROUPS_PER_CTA = 4
_THREADS = 256
_MOST_CTAS_OF_ROWS = 32  # of one group of rows and four of columns: enough to fill a GPU with a few groups


@cache
def kernel(device: int) -> launcher.Kernel:
    """Return the loaded kernel on the current device, whose index is part of the key only."""
    return launcher.load(SPEC, _LAYOUT)


def masked_silu_mul_quant(hidden: torch.Tensor, masked_m: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return silu(gate) * up of the first masked_m[g] rows of each group g, quantised in groups of 128 columns.

    Args:
        hidden: [num_groups, max_m, 2 * intermediate] bfloat16 or float16, contiguous, gate first;
            intermediate % 128 == 0.
        masked_m: [num_groups] int32, on the device; it is not waited for.

    Returns:
        codes: [num_groups, max_m, intermediate] float8_e4m3fn.
        scale: [num_groups, max_m, intermediate / 128] float32, of stride (k_blocks * align(max_m, 4), 1,
            align(max_m, 4)). Rows beyond masked_m hold anything in both.

    Raises:
        ArgumentError: a dtype, shape or stride that does not fit.
        UnsupportedError: hidden is on a GPU for which there are no kernels.
    """
    if hidden.dim() != 3 or hidden.shape[2] % (2 * BLOCK) or not hidden.is_contiguous() or hidden.element_size() != 2:
        raise ArgumentError(
            f"hidden: got {tuple(hidden.shape)} {hidden.dtype} of strides {hidden.stride()}; expected contiguous "
            f"[num_groups, max_m, 2 * intermediate] bfloat16, intermediate a multiple of {BLOCK}"
        )
    if not runs_cuda_kernels(hidden.device):
        return _reference(hidden, masked_m)
    if not is_current(hidden.device):
        with torch.cuda.device(hidden.device):
            return masked_silu_mul_quant(hidden, masked_m)
    (num_groups, max_m, n), k = hidden.shape, hidden.shape[2] // 2
    k_blocks, m_aligned = n // 2 // BLOCK, align(max_m, 4)
    codes = torch.empty((num_groups, max_m, k), dtype=torch.float8_e4m3fn, device=hidden.device)
    scale = torch.empty((num_groups, k_blocks, m_aligned), dtype=torch.float32, device=hidden.device)
    if codes.numel():
        kernel(hidden.device.index).launch(
            (
                min(ceil_div(max_m, _ROWS_PER_CTA), _MOST_CTAS_OF_ROWS),
                ceil_div(k_blocks, _GROUPS_PER_CTA),
                num_groups,
            ),
            _THREADS,
            0,
            (hidden.data_ptr(), codes.data_ptr(), scale.data_ptr(), masked_m.data_ptr())
            + (max_m, k_blocks, m_aligned, ELEMENT_TYPES[hidden.dtype]),
            launcher.current_stream(hidden.device.index),
            pdl=True,
        )
    return codes, scale.transpose(1, 2)[:, :max_m]


def _reference(hidden: torch.Tensor, masked_m: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    num_groups, max_m, n = hidden.shape
    held = torch.arange(max_m, device=hidden.device)[None, :, None] < masked_m[:, None, None]
    product = torch.where(held, reference.silu_mul(hidden), 0.0)
    codes, scale = reference.per_token_group_quant(product.view(num_groups * max_m, n // 2))
    return codes.view(num_groups, max_m, n // 2), scale.reshape(num_groups, max_m, -1)
