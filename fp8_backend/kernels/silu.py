"""SiLU-and-multiply with the quantisation of what it gives, in one kernel."""

from __future__ import annotations

from functools import cache

import torch

from fp8_backend.errors import ArgumentError
from fp8_backend.kernels import launcher, quantize, reference
from fp8_backend.kernels.backend import is_current, runs_cuda_kernels
from fp8_backend.kernels.compiler import KernelSpec
from fp8_backend.kernels.prepared import Launch, PreparedLaunch
from fp8_backend.kernels.reference import BLOCK, align, ceil_div

SPEC = KernelSpec("silu_mul_quantize.cuh", "silu_mul_quantize")
DTYPES = (torch.bfloat16, torch.float16)
_LAYOUT = launcher.ParamLayout(("u64", "u64", "u64", "i64") + ("u32",) * 8)
_ROWS_PER_CTA, _GROUPS_PER_CTA, _THREADS = 4, 2, 128


@cache
def kernel(device: int) -> launcher.Kernel:
    """Return the loaded kernel on the current device, whose index is part of the key only."""
    return launcher.load(SPEC, _LAYOUT)


def check(x: torch.Tensor) -> None:
    """Check the operand of `silu_mul_quant`.

    Raises:
        ArgumentError: a dtype or shape that does not fit.
    """
    if x.dim() != 2 or x.dtype not in DTYPES or x.shape[1] % 2:
        raise ArgumentError(
            f"x: got {list(x.shape)} {x.dtype}; expected [m, 2 * k] bfloat16 or float16, gate first; reshape or "
            "convert it"
        )


def silu_mul_quant(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return silu(gate) * up, rounded to x's dtype and quantised in groups of 128 columns to e4m3.

    Numerics: see `fp8_backend.kernels.reference.silu_mul` and `per_token_group_quant`; the exponential is good to a few
    units of float32, so that an element may differ by a unit of x's dtype.

    Args:
        x: [m, 2 * k] bfloat16 or float16, gate first, any row stride.

    Returns:
        codes: [m, align(k, 128)] float8_e4m3fn, row-major; columns past k are zero.
        scale: [m, ceil(k / 128)] float32, MN-major with stride (1, align(m, 4)).

    Raises:
        ArgumentError: a dtype or shape that does not fit.
        UnsupportedError: x is on a GPU for which there are no kernels.
    """
    check(x)
    if not runs_cuda_kernels(x.device):
        return reference.per_token_group_quant(reference.silu_mul(x).to(x.dtype))
    if not is_current(x.device):
        with torch.cuda.device(x.device):
            return silu_mul_quant(x)
    gate = halved(x)
    m, k = gate.shape
    k_blocks = ceil_div(k, BLOCK)
    codes = torch.empty((m, k_blocks * BLOCK), dtype=torch.float8_e4m3fn, device=x.device)
    scale = torch.empty((k_blocks, align(m, 4)), dtype=torch.float32, device=x.device)
    if codes.numel():
        stream = launcher.current_stream(x.device.index)
        prepare(gate)(stream, gate.data_ptr(), codes.data_ptr(), scale.data_ptr())
    return codes, scale.t()[:m]


def halved(x: torch.Tensor) -> torch.Tensor:
    """Return the gate's half of x [m, 2 * k], with contiguous rows: what a launch and its plan are told of x."""
    return quantize.rows_of(x, "x")[:, : x.shape[1] // 2]


def prepare(gate: torch.Tensor, tile_rows: int = 0) -> PreparedLaunch:
    """Return the launch for a tensor of which `gate` [m, k] is like the first half; nothing is checked.

    Its pointers: x; codes; scales [ceil(k / 128), align(m, 4)] float32. tile_rows: as of `quantize.prepare`.
    """
    m, k = gate.shape
    k_blocks = ceil_div(k, BLOCK)
    params = (
        *(gate.stride(0), m, k, k_blocks, align(m, 4)),
        *(quantize.ELEMENT_TYPES[gate.dtype], quantize.vectorised(gate), tile_rows, quantize.early(m, k)),
    )
    grid = ceil_div(m, _ROWS_PER_CTA), ceil_div(k_blocks, _GROUPS_PER_CTA)
    return Launch(kernel(gate.device.index), grid, _THREADS, 0, params).prepared()
