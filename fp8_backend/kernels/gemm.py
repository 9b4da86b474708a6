"""The dense GEMM entry points: check the arguments, choose a configuration, launch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, lru_cache

import torch

from fp8_backend.errors import ArgumentError
from fp8_backend.kernels import backend, decode, gemm_quantize, heuristics, launcher, layout, quantize, reference
from fp8_backend.kernels.arguments import check_gemm, check_linear
from fp8_backend.kernels.backend import is_current, runs_cuda_kernels
from fp8_backend.kernels.decode import DecodePlan
from fp8_backend.kernels.decode_heuristics import DecodeChoice
from fp8_backend.kernels.gemm_plan import GemmLaunch, GemmPlan
from fp8_backend.kernels.gemm_quantize import QuantizingGemmPlan
from fp8_backend.kernels.heuristics import Activations, Choice, GemmChoice, QuantizingGemmChoice
from fp8_backend.kernels.prepared import Prepared, PreparedLaunch
from fp8_backend.kernels.problem import (
    DECODE_THREADS,
    MAX_SHARED_BYTES,
    DecodeConfig,
    GemmProblem,
    Machine,
)
from fp8_backend.kernels.quantize import per_token_group_quant, rows_of
from fp8_backend.kernels.reference import BLOCK, ceil_div


@dataclass(frozen=True)
class Weight:
    """A weight [n, k] in either form a kernel reads.

    codes: [n, k] float8_e4m3fn row-major with 16-byte aligned rows, k % 128 == 0; or packed by `layout.pack_weight`.
    scale: packed by `layout.pack_scale`.
    """

    codes: torch.Tensor
    scale: torch.Tensor
    n: int
    k: int

    @property
    def packed(self) -> bool:
        """Whether codes are [k_blocks, n_aligned, 128]."""
        return self.codes.dim() == 3

    def plain(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return codes [n, k] and scale [ceil(n / 128), ceil(k / 128)], row-major."""
        codes = layout.unpack_weight(self.codes, self.n, self.k) if self.packed else self.codes
        return codes, layout.unpack_scale(self.scale, self.n)


@cache
def machine(device: int) -> Machine:
    """Return what the current device, of this index, can run at once."""

    def clusters(split: int) -> int:
        kernel = decode.kernel(DecodeConfig(8, True, split), device)
        return kernel.max_active_clusters(DECODE_THREADS, MAX_SHARED_BYTES, split)

    multiprocessors = torch.cuda.get_device_properties(device).multi_processor_count
    return Machine(multiprocessors, (clusters(2), clusters(4), clusters(8)))


@lru_cache(maxsize=65536)
def choose(m: int, n: int, k: int, device: int, activations: Activations, batch_invariant: bool) -> Choice:
    """Return the kernel for a linear layer on the current device, whose index is given; see `heuristics.select`."""
    return heuristics.select(GemmProblem(m, n, k, machine(device)), activations, batch_invariant)


_plans: Prepared[DecodePlan | GemmPlan | QuantizingGemmPlan] = Prepared()
_launches: Prepared[GemmLaunch] = Prepared()


def launch_gemm(
    choice: GemmChoice,
    codes: torch.Tensor,
    scale_a: torch.Tensor,
    weight: Weight,
    out: torch.Tensor,
    bias: torch.Tensor | None,
) -> None:
    """Launch gemm.cuh on codes [m, k_blocks * 128] and MN-major scale_a; arguments are not checked."""
    stride, rows = codes.stride(0), None if weight.packed else weight.codes
    types = out.dtype, None if bias is None else bias.dtype
    aligned, weight_stride = out.data_ptr() % 16, rows is None or rows.stride(0)
    key = (choice, weight.k, stride, weight_stride, out.shape, out.stride(), out.get_device(), types, aligned)
    if (launch := _launches.by_key.get(key)) is None:
        launch = GemmLaunch(choice, weight.k, stride, rows, out, bias)
        _launches.add(key, launch)
    stream = launcher.current_stream(out.device.index)
    launch(stream, codes.data_ptr(), scale_a.data_ptr(), weight.codes, weight.scale, out, bias)


def fp8_linear(
    x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, n: int, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """Quantise activations and multiply them by a packed FP8 weight: y = x @ weight^T + bias.

    On a GPU the weight may be fetched before earlier kernels of the stream have ended: it must have been written by
    work that is complete (`pack_weight` waits for its own).

    Args:
        x: [..., k] bfloat16, float16 or float32, quantised in groups of 128; or float8_e4m3fn, codes of scale 1.
        weight: [ceil(k / 128), align(n, 8), 128] float8_e4m3fn, from `pack_weight`.
        scale: [ceil(k / 128), align(ceil(n / 128), 4) + 4] float32, from `pack_scale`.
        n: rows of the unpacked weight.
        bias: [n] bfloat16, float16 or float32, or None.

    Returns:
        [..., n] in x's dtype (bfloat16 for float8 x).

    Raises:
        ArgumentError: a dtype or shape that does not fit.
        UnsupportedError: x is on a GPU for which there are no kernels.
    """
    # What a plan was made for; all else about a call may change.
    bias_kind = None if bias is None else (bias.dtype, bias.shape)
    key = (x.shape, x.stride(), x.dtype, x.get_device(), x.data_ptr() % 16, n, bias_kind)
    plan = _plans.by_key.get(key)
    if plan is None or weight.shape != plan.weight_shape or scale.shape != plan.scale_shape or not is_current(x.device):
        return _checked_linear(x, weight, scale, n, bias, key)
    out = x.new_empty((*x.shape[:-1], n))
    plan(x, weight, scale, out, bias)
    return out


def _checked_linear(
    x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, n: int, bias: torch.Tensor | None, key: object
) -> torch.Tensor:
    """Check the arguments of `fp8_linear` and compute it; remember the plan of its launches under `key`."""
    check_linear(x, weight, scale, n, bias)
    device, k = x.device, x.shape[-1]
    if x.is_cuda and not is_current(device):
        with torch.cuda.device(device):
            return fp8_linear(x, weight, scale, n, bias)
    rows, quantised = x.reshape(-1, k), x.dtype == torch.float8_e4m3fn
    packed, m = Weight(weight, scale, n, k), rows.shape[0]
    out = torch.empty((m, n), dtype=torch.bfloat16 if quantised else x.dtype, device=device)
    if quantised:
        _gemm(_padded(rows), _unit_scale(rows), packed, out, bias)
    elif not runs_cuda_kernels(device) or not m or not n or not k:
        _gemm(*per_token_group_quant(rows), packed, out, bias)
    else:
        rows = rows_of(rows, "x")
        activations = Activations(quantize.is_common(rows), gemm_quantize.mappable(rows))
        choice = choose(m, n, k, device.index, activations, backend.batch_invariant())
        plan = plan_of(choice, rows, out, bias)
        if rows.data_ptr() == x.data_ptr():  # not a copy, of which the key knows nothing
            _plans.add(key, plan)
        plan(rows, weight, scale, out, bias)
    return out.view(*x.shape[:-1], n)


def plan_of(
    choice: Choice, x: torch.Tensor, out: torch.Tensor, bias: torch.Tensor | None
) -> DecodePlan | GemmPlan | QuantizingGemmPlan:
    """Return the launches of x [m, k] @ weight^T + bias into out [m, n] by this kernel; nothing is checked."""
    if isinstance(choice, QuantizingGemmChoice):
        return QuantizingGemmPlan(choice, x, out, bias)
    return plan_behind(quantize.prepare, choice, x, out, bias)


def plan_behind(
    prepare: Callable[[torch.Tensor, int], PreparedLaunch],
    choice: DecodeChoice | GemmChoice,
    x: torch.Tensor,
    out: torch.Tensor,
    bias: torch.Tensor | None,
) -> DecodePlan | GemmPlan:
    """Return the launches by this kernel where `prepare` gives the one that makes the codes; nothing is checked.

    A kernel that quantises by itself has no such launch, and `prepare` is not called.
    """
    if isinstance(choice, GemmChoice):
        return GemmPlan(choice, x, out, bias, prepare)
    return DecodePlan(choice, x, out, bias, prepare)


def _unit_scale(codes: torch.Tensor) -> torch.Tensor:
    ones = torch.ones(codes.shape[0], ceil_div(codes.shape[1], BLOCK), dtype=torch.float32, device=codes.device)
    return reference.mn_major(ones)


def _padded(codes: torch.Tensor) -> torch.Tensor:
    """Return codes with contiguous rows whose length is a multiple of 128."""
    missing = -codes.shape[1] % BLOCK
    if missing:
        return torch.nn.functional.pad(codes.view(torch.uint8), (0, missing)).view(codes.dtype)
    return (
        codes
        if codes.stride(-1) == 1 and codes.stride(0) % 16 == 0 and codes.data_ptr() % 16 == 0
        else codes.contiguous()
    )


def fp8_gemm_nt(
    a: tuple[torch.Tensor, torch.Tensor],
    b: tuple[torch.Tensor, torch.Tensor],
    out: torch.Tensor,
    bias: torch.Tensor | None = None,
) -> None:
    """Multiply block-scaled FP8 matrices: out = a @ b^T + bias.

    Args:
        a: codes [m, k] float8_e4m3fn with contiguous columns, and scale [m, ceil(k / 128)] float32 (any strides;
            MN-major with stride (1, align(m, 4)), as `per_token_group_quant` gives it, is not copied).
        b: codes [n, k] float8_e4m3fn with contiguous columns (or packed by `pack_weight`), and scale
            [ceil(n / 128), ceil(k / 128)] float32 (any strides; packed by `pack_scale`, it is not copied).
        out: [m, n] bfloat16, float16 or float32 with contiguous columns; overwritten.
        bias: [n] bfloat16, float16 or float32, or None.

    Raises:
        ArgumentError: a dtype or shape that does not fit; on a GPU also k % 128 != 0 (pad a and b with zero codes).
        UnsupportedError: the tensors are on a GPU for which there are no kernels.
    """
    (codes, scale_a), (codes_b, scale_b) = a, b
    if out.is_cuda and not is_current(out.device):
        with torch.cuda.device(out.device):
            return fp8_gemm_nt(a, b, out, bias)
    m, k = codes.shape
    n = out.shape[1]
    if tuple(scale_b.shape) != layout.packed_scale_shape(n, k):
        scale_b = layout.arrange_scale(scale_b, n, k)
    weight = Weight(codes_b, scale_b, n, k)
    check_gemm(codes, scale_a, codes_b, scale_b, out, bias)
    _gemm(codes, reference.mn_major(scale_a), weight, out, bias)


def _gemm(
    codes: torch.Tensor, scale_a: torch.Tensor, weight: Weight, out: torch.Tensor, bias: torch.Tensor | None
) -> None:
    if not runs_cuda_kernels(out.device):
        plain, scale_b = weight.plain()
        out.copy_(reference.fp8_gemm_nt(codes[:, : weight.k], scale_a, plain, scale_b, bias))
        return
    if out.numel() == 0:
        return
    if weight.k == 0:
        out.zero_() if bias is None else out.copy_(bias.expand_as(out))
        return
    if codes.shape[1] % BLOCK or (not weight.packed and weight.k % BLOCK):
        raise ArgumentError(
            f"k={weight.k} is not a multiple of {BLOCK}; pad the columns of a and b with zero codes, or use fp8_linear"
        )
    problem = GemmProblem(codes.shape[0], weight.n, weight.k, machine(out.device.index))
    launch_gemm(heuristics.select_gemm(problem, backend.batch_invariant()), codes, scale_a, weight, out, bias)
