"""RMSNorm with the quantisation of what it gives, in one kernel."""

from __future__ import annotations

from functools import cache, partial
from typing import NamedTuple

import torch

from fp8_backend.errors import ArgumentError
from fp8_backend.kernels import launcher, quantize, reference
from fp8_backend.kernels.backend import is_current, runs_cuda_kernels
from fp8_backend.kernels.compiler import KernelSpec
from fp8_backend.kernels.prepared import Launch, PreparedLaunch
from fp8_backend.kernels.reference import BLOCK, align, ceil_div

# By parts of a row a thread has.
SPECS = {chunks: KernelSpec("rms_norm_quantize.cuh", "rms_norm_quantize", (("CHUNKS", chunks),)) for chunks in (1, 2)}
DTYPES = (torch.bfloat16, torch.float16)
_LAYOUT = launcher.ParamLayout(("u64",) * 7 + ("i64", "i64") + ("u32",) * 7 + ("f32",))
_ELEMENTS = 8  # neighbouring ones, a thread and part
_MAX_THREADS, _WARP = 1024, 32
MAX_K = _ELEMENTS * _MAX_THREADS * max(SPECS)  # the longest row that a CTA holds
# Shared memory asked for so that no CTA of the GEMM behind is put beside one of these, whose loads wait behind all the
# weights which that asks for: one H200, layers of Qwen3-8B at 17 to 128 rows 1.0 to 2.1 us of 64 to 79 less, 2.0 of 116
# more at 256 (docs/kernel-notes.md, 2026-11-28). Decode kernels ask for less at a time: 0.6 us more at 8 rows.
_ALONE_ROWS, _ALONE_BYTES = 128, 160 * 1024


@cache
def kernel(chunks: int, device: int) -> launcher.Kernel:
    """Return the loaded kernel of `chunks` parts on the current device, whose index is part of the key only."""
    return launcher.load(SPECS[chunks], _LAYOUT)


class NormedRows(NamedTuple):
    """What `rms_norm_quant` returns."""

    codes: torch.Tensor
    scale: torch.Tensor
    summed: torch.Tensor | None
    normed: torch.Tensor | None


def check(x: torch.Tensor, residual: torch.Tensor | None, norm_weight: torch.Tensor) -> None:
    """Check the operands of an RMSNorm, as `rms_norm_quant` describes them.

    Raises:
        ArgumentError: a dtype, shape or device that does not fit.
    """
    if x.dim() != 2 or x.dtype not in DTYPES or x.shape[1] > MAX_K:
        raise ArgumentError(
            f"x: got {list(x.shape)} {x.dtype}; expected [m, k] bfloat16 or float16 with k at most {MAX_K}; use "
            "another RMSNorm, and fp8_linear"
        )
    operands = (("residual", residual, x.shape), ("norm_weight", norm_weight, x.shape[1:]))
    for name, tensor, shape in operands:
        if tensor is None:
            continue
        if tensor.shape != shape or tensor.dtype != x.dtype or tensor.device != x.device:
            raise ArgumentError(
                f"{name}: got {list(tensor.shape)} {tensor.dtype} on {tensor.device}; expected {list(shape)} {x.dtype} "
                f"on {x.device}, as x has it; convert it"
            )


def rms_norm_quant(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    norm_weight: torch.Tensor,
    epsilon: float,
    keep: bool = False,
) -> NormedRows:
    """Add a residual, normalise each row and quantise it in groups of 128 columns to e4m3.

    Numerics: see `fp8_backend.kernels.reference.rms_norm` and `per_token_group_quant`; the sum of squares is added in
    another order than there, so that a row's elements may differ by a unit of x's dtype. On a GPU the norm's weight may
    be fetched before earlier kernels of the stream have ended, as `gemm.fp8_linear` says of its weight.

    Args:
        x: [m, k] bfloat16 or float16, any row stride, k at most 16384.
        residual: [m, k] in x's dtype, any row stride, or None.
        norm_weight: [k] in x's dtype.
        epsilon: added to the mean of squares.
        keep: whether the normalised rows themselves are wanted, too.

    Returns:
        codes: [m, align(k, 128)] float8_e4m3fn, row-major; columns past k are zero.
        scale: [m, ceil(k / 128)] float32, MN-major with stride (1, align(m, 4)).
        summed: [m, k] x + residual in x's dtype, contiguous; None without a residual.
        normed: [m, k] in x's dtype, contiguous; None unless kept.

    Raises:
        ArgumentError: a dtype, shape or device that does not fit.
        UnsupportedError: x is on a GPU for which there are no kernels.
    """
    check(x, residual, norm_weight)
    if not runs_cuda_kernels(x.device):
        normed, summed = reference.rms_norm(x, residual, norm_weight, epsilon)
        return NormedRows(*reference.per_token_group_quant(normed), summed, normed if keep else None)
    if not is_current(x.device):
        with torch.cuda.device(x.device):
            return rms_norm_quant(x, residual, norm_weight, epsilon, keep)
    rows = Rows(x, residual, norm_weight, keep)
    m, k_blocks = x.shape[0], ceil_div(x.shape[1], BLOCK)
    codes = torch.empty((m, k_blocks * BLOCK), dtype=torch.float8_e4m3fn, device=x.device)
    scale = torch.empty((k_blocks, align(m, 4)), dtype=torch.float32, device=x.device)
    if codes.numel():
        launch = rows.prepare(epsilon)(rows.x)
        launch(launcher.current_stream(x.device.index), *rows.pointers(), codes.data_ptr(), scale.data_ptr())
    return NormedRows(codes, scale.t()[:m], rows.summed, rows.normed)


class Rows:
    """The operands of one call with contiguous rows, and its outputs but for codes and scales."""

    def __init__(self, x: torch.Tensor, residual: torch.Tensor | None, norm_weight: torch.Tensor, keep: bool) -> None:
        """Allocate the outputs that are wanted; nothing is checked."""
        self.x = quantize.rows_of(x, "x")
        self.residual = None if residual is None else quantize.rows_of(residual, "residual")
        self.norm_weight = norm_weight.contiguous()
        self.summed = None if residual is None else torch.empty(x.shape, dtype=x.dtype, device=x.device)
        self.normed = torch.empty(x.shape, dtype=x.dtype, device=x.device) if keep else None

    def pointers(self) -> tuple[int, ...]:
        """Return the addresses that a launch takes before those of codes and scales."""
        tensors = (self.x, self.residual, self.norm_weight, self.summed, self.normed)
        return tuple(0 if tensor is None else tensor.data_ptr() for tensor in tensors)

    def prepare(self, epsilon: float) -> partial[PreparedLaunch]:
        """Return `prepare` for operands like these."""
        inputs = [tensor for tensor in (self.x, self.residual) if tensor is not None]
        vectorised = all(map(quantize.vectorised, inputs)) and self.norm_weight.data_ptr() % 16 == 0
        stride = 0 if self.residual is None else self.residual.stride(0)
        return partial(prepare, residual_stride=stride, epsilon=epsilon, vectorised=vectorised)


def prepare(
    x: torch.Tensor, tile_rows: int = 0, *, residual_stride: int, epsilon: float, vectorised: bool
) -> PreparedLaunch:
    """Return the launch that normalises and quantises a tensor like x [m, k]; nothing is checked.

    Its pointers: x; the residual or 0; the norm's weight; the sums, or 0; the normalised rows, or 0; codes; scales
    [ceil(k / 128), align(m, 4)] float32. tile_rows: as of `quantize.prepare`. vectorised: whether the rows of all of
    them can be read and written 16 bytes at a time.
    """
    m, k = x.shape
    k_blocks = ceil_div(k, BLOCK)
    parts = k_blocks * BLOCK // _ELEMENTS
    chunks = next(chunks for chunks in SPECS if parts <= chunks * _MAX_THREADS)
    threads = align(ceil_div(parts, chunks), _WARP)
    params = (
        *(x.stride(0), residual_stride, k, k_blocks, align(m, 4)),
        *(quantize.ELEMENT_TYPES[x.dtype], int(vectorised), tile_rows, quantize.early(m, k), epsilon),
    )
    return Launch(kernel(chunks, x.device.index), (m, 1), threads, shared_bytes(m, tile_rows), params).prepared()


def shared_bytes(m: int, tile_rows: int) -> int:
    """Return the dynamic shared memory of a CTA; tile_rows: as of `quantize.prepare`, 0 if a GEMM is behind."""
    return _ALONE_BYTES if tile_rows == 0 and m <= _ALONE_ROWS else 0
