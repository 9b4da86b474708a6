"""One layer of routed experts: tokens, expert ids and router weights in, combined tokens out."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any, Literal

import torch

from fp8_backend.errors import ArgumentError
from fp8_backend.kernels import layout, reference
from fp8_backend.kernels.backend import batch_invariant, is_current, memory_bytes_per_us, runs_cuda_kernels
from fp8_backend.kernels.expert_weights import UnpackedCodes, UnpackedScales
from fp8_backend.kernels.experts_decode import MAX_PAIRS, experts_decode
from fp8_backend.kernels.experts_joint import MAX_ENTRIES, experts_joint
from fp8_backend.kernels.experts_prefill import experts_prefill
from fp8_backend.kernels.experts_single import experts_single, fits
from fp8_backend.kernels.quantize import ELEMENT_TYPES
from fp8_backend.kernels.reference import BLOCK

Form = Literal["single", "decode", "joint", "prefill"]

# With more rows of an expert than this on average, tokens on wgmma's 64-row side waste less than weights there save.
DECODE_ROWS_PER_EXPERT = 8
# The decode form walks every (token, expert) pair; beyond this many tokens sorting them by expert is cheaper.
MAX_DECODE_TOKENS = 64
# Up to so many (token, expert) pairs, in all and an expert on average, both GEMMs are one launch: with more its gain is
# none (docs/kernel-notes-moe-decode.md, 2026-11-28), and its tiles have 64 rows where those of two launches have 128.
JOINT_ENTRIES, JOINT_ROWS_PER_EXPERT = 512, 32


@dataclass(frozen=True)
class FormLimits:
    """Where one form is the faster one, on GPUs of one kind of memory.

    prefill_columns: the decode form gives a CTA hidden / 132 rows of every expert hit, the prefill form tiles of 128
        columns of the first GEMM: the fewer the rows and the more the tiles, the sooner the second is faster. Columns
        of h, of all experts hit, for each column of x from where on it is.
    single_bytes, single_tokens: one launch saves a few microseconds, and streams large weights, and weights for more
        tokens, a little slower: bytes of the experts hit, and tokens, up to where it is faster.
    """

    prefill_columns: float
    single_bytes: int
    single_tokens: int


# Fitted to twelve layers at 1 to 64 tokens, on an H100 and an H200, when the prefill form served what the joint one
# does now, with tiles of as many columns. Faster memory leaves the forms for few tokens, bound by more than memory,
# less of their lead (docs/kernel-notes-moe-decode.md, 2026-11-27).
HBM3 = FormLimits(prefill_columns=5.5, single_bytes=150_000_000, single_tokens=8)
HBM3E = FormLimits(prefill_columns=1.5, single_bytes=90_000_000, single_tokens=3)
_FAST_MEMORY = 4.1e6  # bytes a microsecond: between an H100's 3.35 and an H200's 4.92 million


@cache
def form_limits(device: int) -> FormLimits:
    """Return the limits for a device."""
    return HBM3E if memory_bytes_per_us(device) > _FAST_MEMORY else HBM3


@lru_cache(maxsize=65536)
def select_form(
    m: int,
    top_k: int,
    num_groups: int,
    hidden: int,
    intermediate: int,
    batch_invariant: bool = False,
    router_weight_on_input: bool = False,
    limits: FormLimits = HBM3E,
) -> Form:
    """Return which kernels serve m tokens: for very few, for few or some rows an expert, or for many.

    Args:
        m: tokens.
        top_k: experts a token.
        num_groups: experts on this rank.
        hidden: columns of x.
        intermediate: columns of h, of one expert.
        batch_invariant: a token's bits must not depend on m: the form for many serves any m, in one order of sums.
        router_weight_on_input: a token's codes differ from expert to expert, which the form for very few cannot do.
        limits: of the GPU.
    """
    if batch_invariant:
        return "prefill"
    few = m <= MAX_DECODE_TOKENS and m * top_k <= min(MAX_PAIRS, DECODE_ROWS_PER_EXPERT * num_groups)
    hit = num_groups * (1 - (1 - min(1.0, top_k / num_groups)) ** m)  # experts, where all are as likely
    small = m <= limits.single_tokens and hit * 3 * hidden * intermediate <= limits.single_bytes
    if small and not router_weight_on_input and fits(m, top_k, hidden, intermediate):
        return "single"
    filled = hit * intermediate > limits.prefill_columns * hidden
    if m == 1 or (few and not filled):
        return "decode"
    some = m * top_k <= min(JOINT_ENTRIES, JOINT_ROWS_PER_EXPERT * num_groups)
    return "joint" if some else "prefill"


def fp8_experts(
    x: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    w13: torch.Tensor,
    scale_13: torch.Tensor,
    w2: torch.Tensor,
    scale_2: torch.Tensor,
    expert_map: torch.Tensor | None = None,
    router_weight_on_input: bool = False,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return each token's weighted sum of w2 @ (silu(gate) * up) over its experts; gate and up are halves of w13 @ x.

    Activations are quantised in groups of 128 before both GEMMs. The same inputs give the same bits. On a GPU weights
    may be fetched before earlier kernels of the stream have ended: they must have been written by work that is complete
    (`pack_experts` waits for its own); nothing waits for the GPU, so calls can be captured in a graph.

    Args:
        x: [m, hidden] bfloat16 or float16, contiguous columns.
        topk_weights: [m, top_k] float32.
        topk_ids: [m, top_k] int32 or int64 expert ids; -1 is skipped.
        w13: [num_groups, ceil(hidden / 128), 2 * intermediate, 128] float8_e4m3fn, from `pack_experts`: gate rows, then
            up rows; intermediate % 128 == 0 (pad other sizes with zero rows, and w2 with zero columns).
        scale_13: from `pack_expert_scales`.
        w2: [num_groups, intermediate / 128, align(hidden, 8), 128] float8_e4m3fn, from `pack_experts`.
        scale_2: from `pack_expert_scales`.
        expert_map: [global experts] int32: an expert's position in w13, or -1 if another rank holds it; None if ids are
            positions already.
        router_weight_on_input: scale a token by its weight before its experts instead of after them.
        out: [m, hidden] in x's dtype, contiguous; made here by default.

    Returns:
        out; zeros for a token without an expert here.

    Raises:
        ArgumentError: a dtype or shape that does not fit.
        UnsupportedError: x is on a GPU for which there are no kernels.
    """
    if x.is_cuda and not is_current(x.device):
        with torch.cuda.device(x.device):
            return fp8_experts(
                x, topk_weights, topk_ids, w13, scale_13, w2, scale_2, expert_map, router_weight_on_input, out
            )
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device) if out is None else out
    check_experts(x, topk_weights, topk_ids, w13, scale_13, w2, scale_2, out)
    if not runs_cuda_kernels(x.device):
        n, hidden = w13.shape[2], x.shape[1]
        y = reference.fp8_experts(
            x,
            topk_weights,
            topk_ids,
            UnpackedCodes(w13, n, hidden),
            UnpackedScales(scale_13, n),
            UnpackedCodes(w2, hidden, n // 2),
            UnpackedScales(scale_2, hidden),
            expert_map,
            router_weight_on_input,
        )
        return out.copy_(y)
    if x.shape[0] == 0:
        return out
    topk_weights, topk_ids = topk_weights.float().contiguous(), topk_ids.to(torch.int32).contiguous()
    expert_map = None if expert_map is None else expert_map.to(torch.int32)
    (m, hidden), top_k, intermediate = x.shape, topk_ids.shape[1], w13.shape[2] // 2
    widths = top_k, w13.shape[0], hidden, intermediate
    limits = form_limits(x.device.index)
    form = select_form(m, *widths, batch_invariant(), router_weight_on_input, limits)
    launch(form, x, topk_weights, topk_ids, w13, scale_13, w2, scale_2, out, expert_map, router_weight_on_input)
    return out


def check_experts(
    x: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    w13: torch.Tensor,
    scale_13: torch.Tensor,
    w2: torch.Tensor,
    scale_2: torch.Tensor,
    out: torch.Tensor,
) -> None:
    """Check the operands of `fp8_experts`.

    Raises:
        ArgumentError: names the tensor, what it is and what is expected.
    """
    if x.dim() != 2 or x.dtype not in ELEMENT_TYPES:
        raise ArgumentError(f"x: got {tuple(x.shape)} {x.dtype}; expected [m, hidden] bfloat16 or float16")
    if w13.dim() != 4 or w2.dim() != 4 or w13.shape[2] % (2 * BLOCK):
        raise ArgumentError(
            f"w13, w2: got {tuple(w13.shape)} and {tuple(w2.shape)}; expected weights packed by pack_experts, w13 of "
            f"2 * intermediate rows, intermediate a multiple of {BLOCK}; pad it with zero rows, and w2's columns"
        )
    operands, device = (topk_weights, topk_ids, w13, scale_13, w2, scale_2, out), x.device
    shapes = _operand_shapes(*x.shape, topk_ids.shape[-1], w13.shape[0], w13.shape[2])
    for tensor, (name, shape) in zip(operands, shapes, strict=True):
        if tensor.shape != shape or tensor.device != device:
            raise ArgumentError(f"{name}: got {tuple(tensor.shape)} on {tensor.device}; expected {shape} on {device}")
    if out.dtype != x.dtype or not out.is_contiguous():
        raise ArgumentError(f"out: got {out.dtype} of strides {out.stride()}; expected contiguous {x.dtype}, as x is")


@lru_cache(maxsize=4096)
def _operand_shapes(
    m: int, hidden: int, top_k: int, num_groups: int, n: int
) -> tuple[tuple[str, tuple[int, ...]], ...]:
    """Return the names and shapes of what is given beside x; n: 2 * intermediate."""
    return (
        ("topk_weights", (m, top_k)),
        ("topk_ids", (m, top_k)),
        ("w13", (num_groups, *layout.packed_weight_shape(n, hidden))),
        ("scale_13", (num_groups, *layout.packed_scale_shape(n, hidden))),
        ("w2", (num_groups, *layout.packed_weight_shape(hidden, n // 2))),
        ("scale_2", (num_groups, *layout.packed_scale_shape(hidden, n // 2))),
        ("out", (m, hidden)),
    )


def can_serve(form: Form, m: int, top_k: int, hidden: int, intermediate: int) -> bool:
    """Return whether a form can serve a call whose router weights are not on the input.

    Args:
        form: which kernels.
        m: tokens.
        top_k: experts a token.
        hidden: columns of x.
        intermediate: columns of h, of one expert; a multiple of 128.
    """
    pairs, single = m * top_k, fits(m, top_k, hidden, intermediate)
    return {"single": single, "decode": pairs <= MAX_PAIRS, "joint": pairs <= MAX_ENTRIES, "prefill": True}[form]


_LAUNCH = {"single": experts_single, "decode": experts_decode, "joint": experts_joint, "prefill": experts_prefill}


def launch(form: Form, *arguments: Any) -> None:
    """Launch one form of the experts on a GPU; the arguments, those of all forms, are not checked."""
    _LAUNCH[form](*arguments)
