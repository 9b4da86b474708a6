"""Linear layers together with what comes before them: RMSNorm or SiLU-and-multiply writes the codes that they multiply.

A layer alone quantises its activations itself, for more than a few tokens in a launch of its own, which here is saved.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from fp8_backend.kernels import backend, gemm, norm, reference, silu
from fp8_backend.kernels.arguments import check_linear
from fp8_backend.kernels.backend import is_current, runs_cuda_kernels
from fp8_backend.kernels.decode import DecodePlan
from fp8_backend.kernels.gemm_plan import GemmPlan
from fp8_backend.kernels.heuristics import JOINED_CODES, QuantizingGemmChoice
from fp8_backend.kernels.prepared import Prepared, PreparedLaunch

Prepare = Callable[[torch.Tensor, int], PreparedLaunch]
_plans: Prepared[DecodePlan | GemmPlan] = Prepared()


def rms_norm_linear(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    norm_weight: torch.Tensor,
    epsilon: float,
    weight: torch.Tensor,
    scale: torch.Tensor,
    n: int,
    bias: torch.Tensor | None = None,
    keep: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """Multiply normalised rows by a packed FP8 weight: y = rms_norm(x + residual) @ weight^T + bias.

    On a GPU both weights may be fetched before earlier kernels of the stream have ended, as `gemm.fp8_linear` says.

    Args:
        x: [m, k] bfloat16 or float16, k at most 16384.
        residual: [m, k] in x's dtype, or None.
        norm_weight: [k] in x's dtype.
        epsilon: added to the mean of squares.
        weight: [ceil(k / 128), align(n, 8), 128] float8_e4m3fn, from `pack_weight`.
        scale: [ceil(k / 128), align(ceil(n / 128), 4) + 4] float32, from `pack_scale`.
        n: rows of the unpacked weight.
        bias: [n] bfloat16, float16 or float32, or None.
        keep: whether the normalised rows are wanted, too.

    Returns:
        y [m, n]; x + residual [m, k], or None without a residual; the normalised rows [m, k], or None unless kept. All
        contiguous in x's dtype.

    Raises:
        ArgumentError: a dtype, shape or device that does not fit.
        UnsupportedError: x is on a GPU for which there are no kernels.
    """
    norm.check(x, residual, norm_weight)
    if x.is_cuda and not is_current(x.device):
        with torch.cuda.device(x.device):
            return rms_norm_linear(x, residual, norm_weight, epsilon, weight, scale, n, bias, keep)
    if not x.numel() or not n or not runs_cuda_kernels(x.device):
        normed, summed = reference.rms_norm(x, residual, norm_weight, epsilon)
        return gemm.fp8_linear(normed, weight, scale, n, bias), summed, normed if keep else None
    rows = norm.Rows(x, residual, norm_weight, keep)
    layout_of_residual = None if rows.residual is None else (rows.residual.stride(), rows.residual.data_ptr() % 16)
    key = ("norm", epsilon, layout_of_residual, rows.norm_weight.data_ptr() % 16)
    y = _linear(key, rows.x, rows.pointers(), lambda: rows.prepare(epsilon), weight, scale, n, bias)
    return y, rows.summed, rows.normed


def silu_mul_linear(
    x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, n: int, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """Multiply gated rows by a packed FP8 weight: y = (silu(gate) * up) @ weight^T + bias.

    On a GPU the weight may be fetched before earlier kernels of the stream have ended, as `gemm.fp8_linear` says.

    Args:
        x: [m, 2 * k] bfloat16 or float16, gate first.
        weight: [ceil(k / 128), align(n, 8), 128] float8_e4m3fn, from `pack_weight`.
        scale: [ceil(k / 128), align(ceil(n / 128), 4) + 4] float32, from `pack_scale`.
        n: rows of the unpacked weight.
        bias: [n] bfloat16, float16 or float32, or None.

    Returns:
        [m, n] in x's dtype, contiguous.

    Raises:
        ArgumentError: a dtype, shape or device that does not fit.
        UnsupportedError: x is on a GPU for which there are no kernels.
    """
    silu.check(x)
    if x.is_cuda and not is_current(x.device):
        with torch.cuda.device(x.device):
            return silu_mul_linear(x, weight, scale, n, bias)
    if not x.numel() or not n or not runs_cuda_kernels(x.device):
        return gemm.fp8_linear(reference.silu_mul(x).to(x.dtype), weight, scale, n, bias)
    gate = silu.halved(x)
    return _linear(("silu",), gate, (gate.data_ptr(),), lambda: silu.prepare, weight, scale, n, bias)


def _linear(
    kind: tuple[object, ...],
    x: torch.Tensor,
    pointers: tuple[int, ...],
    prepare: Callable[[], Prepare],
    weight: torch.Tensor,
    scale: torch.Tensor,
    n: int,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    """Launch the kernel that makes codes [m, k] of x, and others, and the multiplication of these.

    kind: what, beside x's layout, the launch was prepared for. pointers: of its operands, x first. prepare: called for
    a new layout.
    """
    bias_kind = None if bias is None else (bias.dtype, bias.shape)
    key = (kind, x.shape, x.stride(), x.dtype, x.get_device(), x.data_ptr() % 16, n, bias_kind)
    plan, m = _plans.by_key.get(key), x.shape[0]
    out = torch.empty((m, n), dtype=x.dtype, device=x.device)
    if plan is None or weight.shape != plan.weight_shape or scale.shape != plan.scale_shape:
        check_linear(x, weight, scale, n, bias)
        choice = gemm.choose(m, n, x.shape[1], x.device.index, JOINED_CODES, backend.batch_invariant())
        assert not isinstance(choice, QuantizingGemmChoice)  # it is the kernel in front that makes the codes
        plan = gemm.plan_behind(prepare(), choice, x, out, bias)
        _plans.add(key, plan)
    plan(x, weight, scale, out, bias, *pointers[1:])
    return out
