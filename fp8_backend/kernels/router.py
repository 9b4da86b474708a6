"""A linear layer of few columns that is not quantised, as routers of experts are, for few tokens."""

from __future__ import annotations

from functools import cache

import torch

from fp8_backend.errors import ArgumentError
from fp8_backend.kernels import backend, launcher, quantize
from fp8_backend.kernels.backend import is_current, runs_cuda_kernels
from fp8_backend.kernels.compiler import KernelSpec

SPEC = KernelSpec("router.cuh", "router")
DTYPES = (torch.bfloat16, torch.float16)
MAX_ROWS, MAX_COLUMNS = 64, 1024  # of the kernel; clusters beyond these wait for others
_LAYOUT = launcher.ParamLayout(("u64",) * 3 + ("i64",) + ("u32",) * 4)
_COLUMNS, _RANKS, _THREADS = 8, 8, 256  # of a cluster, which shares k; of a CTA


@cache
def kernel(device: int) -> launcher.Kernel:
    """Return the loaded kernel on the current device, whose index is part of the key only."""
    return launcher.load(SPEC, _LAYOUT)


def router_linear(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Multiply rows by a weight that is not quantised: x @ weight^T.

    Sums are in float32, and in one order for at most 64 rows; more are torch's matter. On a GPU the weight may be
    fetched before earlier kernels of the stream have ended, as `gemm.fp8_linear` says.

    Args:
        x: [m, k] bfloat16 or float16, any strides.
        weight: [n, k] in x's dtype, on its device, any strides.

    Returns:
        [m, n] in x's dtype, contiguous.

    Raises:
        ArgumentError: a dtype, shape or device that does not fit.
        UnsupportedError: x is on a GPU for which there are no kernels.
    """
    alike = x.dtype == weight.dtype and x.device == weight.device
    if x.dim() != 2 or weight.dim() != 2 or x.shape[1] != weight.shape[1] or not alike:
        raise ArgumentError(
            f"x: got {list(x.shape)} {x.dtype} on {x.device}; expected [m, k] for a weight [n, k], here "
            f"{list(weight.shape)} {weight.dtype} on {weight.device}; reshape, convert or move it"
        )
    if not _served(x, weight):
        return torch.nn.functional.linear(x, weight)
    if not is_current(x.device):
        with torch.cuda.device(x.device):
            return router_linear(x, weight)
    (m, k), n = x.shape, weight.shape[0]
    out = torch.empty((m, n), dtype=x.dtype, device=x.device)
    kernel(x.device.index).launch(
        (n // _COLUMNS * _RANKS, 1, 1),
        _THREADS,
        0,
        (*(each.data_ptr() for each in (x, weight, out)), x.stride(0), m, n, k, quantize.ELEMENT_TYPES[x.dtype]),
        launcher.current_stream(x.device.index),
        cluster=_RANKS,
        pdl=True,
    )
    return out


def _served(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Return whether the kernel computes this; not where more rows, which torch multiplies, must have the same bits."""
    (m, k), n = x.shape, weight.shape[0]
    if not runs_cuda_kernels(x.device) or backend.batch_invariant() or x.dtype not in DTYPES:
        return False
    whole = not k % 8 and not n % _COLUMNS and 0 < n <= MAX_COLUMNS and k > 0
    return 0 < m <= MAX_ROWS and whole and weight.is_contiguous() and all(map(quantize.vectorised, (x, weight)))
