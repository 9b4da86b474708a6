"""The linear layer behind attention, whose decode kernel leaves codes of what it gives beside it.

Both are called on their own, by a model that knows nothing of codes. So a linear says of each number of tokens how it
would have them, attention of as many leaves them so, and if the linear is called next, with what they are of, it takes
them.
"""

from __future__ import annotations

import threading
from typing import NamedTuple

import torch

from fp8_backend.kernels import attention, backend, gemm, launcher, quantize
from fp8_backend.kernels.arguments import check_linear
from fp8_backend.kernels.attention import Codes
from fp8_backend.kernels.backend import is_current
from fp8_backend.kernels.decode import DecodePlan
from fp8_backend.kernels.gemm_plan import GemmPlan
from fp8_backend.kernels.heuristics import JOINED_CODES, QuantizingGemmChoice
from fp8_backend.kernels.prepared import Prepared

_plans: Prepared[DecodePlan | GemmPlan] = Prepared()
_asked: set[tuple[torch.device, int, int]] = set()  # device, m and k of what attention would have left codes of
_wanted: dict[tuple[torch.device, int, int], int] = {}  # by device, m and k: rows of a tile of codes, 0 for rows


class Left(NamedTuple):
    """What attention left, and of which rows [m, k], by their address."""

    codes: Codes
    rows: tuple[int, int, int]


class _Last(threading.local):
    left: Left | None = None


_last = _Last()


def leave_codes(out: torch.Tensor) -> Codes | None:
    """Return memory for the codes of an output of attention [m, heads, 128], or None where no linear wants them."""
    m, heads, head = out.shape
    tile_rows = _wanted.get(kind := (out.device, m, heads * head))
    _last.left = None
    if tile_rows is None:
        _asked.add(kind)
    if tile_rows is None or head != attention.HEAD or not out.is_contiguous():
        return None
    codes = attention.empty_codes(m, heads, tile_rows, out.device)
    _last.left = Left(codes, (m, heads * head, out.data_ptr()))
    return codes


def forget_codes() -> None:
    """Say that something else came behind attention, or other attention: codes may not be of what comes next."""
    _last.left = None


def attended_linear(
    x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, n: int, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """Multiply what attention gave by a packed FP8 weight, as `gemm.fp8_linear` does with any rows.

    Codes are taken where the last thing that happened is that attention left some for x. Nothing else may have
    written to x.

    Args:
        x: [m, k] bfloat16 or float16; other x are `gemm.fp8_linear`'s.
        weight: [ceil(k / 128), align(n, 8), 128] float8_e4m3fn, from `pack_weight`.
        scale: [ceil(k / 128), align(ceil(n / 128), 4) + 4] float32, from `pack_scale`.
        n: rows of the unpacked weight.
        bias: [n] bfloat16, float16 or float32, or None.

    Returns:
        [m, n] in x's dtype, contiguous.

    Raises:
        ArgumentError: a dtype or shape that does not fit.
        UnsupportedError: x is on a GPU for which there are no kernels.
    """
    left, _last.left = _last.left, None
    whole = x.dim() == 2 and x.is_contiguous() and x.dtype in attention.DTYPES and 0 < x.numel() and n > 0
    asked = left is not None or (whole and (x.device, *x.shape) in _asked)
    if not asked or not whole or not is_current(x.device):
        return gemm.fp8_linear(x, weight, scale, n, bias)
    plan = _plan(x, weight, scale, n, bias)
    same = weight.shape == plan.weight_shape and scale.shape == plan.scale_shape
    if left is None or left.rows != (*x.shape, x.data_ptr()) or left.codes.tile_rows != plan.tile_rows or not same:
        return gemm.fp8_linear(x, weight, scale, n, bias)
    out = x.new_empty((x.shape[0], n))
    plan.multiply(launcher.current_stream(x.device.index), left.codes.buffer.data_ptr(), weight, scale, out, bias)
    return out


def _plan(
    x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, n: int, bias: torch.Tensor | None
) -> DecodePlan | GemmPlan:
    """Return the launch that multiplies codes of rows like x; a new one says how it wants them."""
    (m, k), device = x.shape, x.device
    key = (x.shape, x.dtype, device.index, n, None if bias is None else (bias.dtype, bias.shape))
    if (plan := _plans.by_key.get(key)) is None:
        check_linear(x, weight, scale, n, bias)
        choice = gemm.choose(m, n, k, device.index, JOINED_CODES, backend.batch_invariant())
        assert not isinstance(choice, QuantizingGemmChoice)  # attention makes the codes
        plan = gemm.plan_behind(quantize.prepare, choice, x, x.new_empty((m, n)), bias)
        _plans.add(key, plan)
        _wanted[device, m, k] = plan.tile_rows
    return plan
