"""The experts op for very few tokens: one kernel, which streams the weights of all experts hit."""

from __future__ import annotations

from functools import cache

import torch

from fp8_backend.kernels import launcher
from fp8_backend.kernels.backend import num_sms
from fp8_backend.kernels.compiler import KernelSpec
from fp8_backend.kernels.experts_decode import down_rows
from fp8_backend.kernels.problem import MAX_SHARED_BYTES
from fp8_backend.kernels.quantize import ELEMENT_TYPES, vectorised
from fp8_backend.kernels.reference import BLOCK, align, ceil_div

SPEC = KernelSpec("experts_single.cuh", "experts_single")
LAYOUT = launcher.ParamLayout(("u64",) * 10 + ("i64",) * 5 + ("u32",) * 13)
_THREADS = 640  # kThreads of experts_single.cuh
_SLOT_BYTES, _SLOT_SCALE_BYTES, _BARRIER_BYTES = 8192, 256, 16  # of a stage: kSlotBytes, kSlotScales, two barriers
_SUM_BYTES = 2 * 4 * 8 * 32 * 8  # two buffers of kPartials
_GROUP_BYTES = BLOCK + 4  # of 128 codes and their scale
_TEAMS = 4  # kTeams: the number of stages is a multiple
_MIN_STAGES = 8  # every team one, and as many on their way
MAX_TOKENS = 8  # their sums of the second GEMM take the place of those of the first
MAX_PAIRS = 128  # (token, expert) pairs, which as many threads sort
_ROUTED_BYTES = align(MAX_PAIRS * (4 * 4 + MAX_TOKENS * 5) + 20, 16)  # Routed of experts_single.cuh


def all_specs() -> tuple[KernelSpec, ...]:
    """Return the kernel of this form."""
    return (SPEC,)


def load_all() -> None:
    """Load the kernel on torch's current device."""
    _kernel(torch.cuda.current_device())


@cache
def _kernel(device: int) -> launcher.Kernel:
    return launcher.load(SPEC, LAYOUT)


@cache
def num_stages(m: int, top_k: int, hidden: int, intermediate: int) -> int:
    """Return how many stages of weights fit beside the codes of all activations.

    Args:
        m: tokens.
        top_k: experts a token.
        hidden: columns of x.
        intermediate: columns of h, of one expert.
    """
    groups = max(m * ceil_div(hidden, BLOCK), m * top_k * (intermediate // BLOCK))
    left = MAX_SHARED_BYTES - _SUM_BYTES - groups * _GROUP_BYTES - _ROUTED_BYTES
    return max(0, left // (_SLOT_BYTES + _SLOT_SCALE_BYTES + _BARRIER_BYTES)) // _TEAMS * _TEAMS


def fits(m: int, top_k: int, hidden: int, intermediate: int) -> bool:
    """Return whether this form can serve a call; arguments as for `num_stages`."""
    if m > MAX_TOKENS or m * top_k > MAX_PAIRS:
        return False
    return num_stages(m, top_k, hidden, intermediate) >= _MIN_STAGES


def experts_single_workspace_bytes(m: int, top_k: int, intermediate: int) -> int:
    """Return the bytes that `experts_single` allocates beside its output: h as float32."""
    return m * top_k * intermediate * 4


def experts_single(
    x: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    w13: torch.Tensor,
    scale_13: torch.Tensor,
    w2: torch.Tensor,
    scale_2: torch.Tensor,
    out: torch.Tensor,
    expert_map: torch.Tensor | None = None,
    router_weight_on_input: bool = False,
) -> None:
    """Launch the experts op on a GPU in one kernel; arguments are those of `fp8_experts`, not checked.

    All thread blocks run at once, each with a multiprocessor of its own: where other work holds some, the kernel waits.

    Args:
        x: [m, hidden] bfloat16 or float16, contiguous columns; `fits` must be true.
        topk_weights: [m, top_k] float32, contiguous.
        topk_ids: [m, top_k] int32 or int64; -1 is skipped.
        w13: [num_groups, ceil(hidden / 128), 2 * intermediate, 128] float8_e4m3fn, packed, gate rows first.
        scale_13: [num_groups, ceil(hidden / 128), align(2 * intermediate / 128, 4) + 4] float32, packed.
        w2: [num_groups, intermediate / 128, align(hidden, 8), 128] float8_e4m3fn, packed.
        scale_2: [num_groups, intermediate / 128, align(ceil(hidden / 128), 4) + 4] float32, packed.
        out: [m, hidden] in x's dtype, contiguous; overwritten, with zeros for a token without an expert here.
        expert_map: [global experts] int32, -1 for an expert of another rank; None if ids are positions in w13.
        router_weight_on_input: must be false: codes of x are those of a token, whichever its expert.

    Raises:
        DriverError: the driver refused the launch, as where this process may not use all multiprocessors at once.
    """
    (m, hidden), top_k, device = x.shape, topk_ids.shape[1], x.device.index
    (num_groups, k_blocks, _, _), intermediate = w13.shape, w13.shape[2] // 2
    assert fits(m, top_k, hidden, intermediate) and intermediate % BLOCK == 0 and not router_weight_on_input
    if m == 0:
        return
    h = torch.empty(m * top_k * intermediate, dtype=torch.float32, device=x.device)
    ids, sms = topk_ids.to(torch.int32).contiguous(), num_sms(device)
    weights = w13.data_ptr(), scale_13.data_ptr(), w2.data_ptr(), scale_2.data_ptr()
    routing = ids.data_ptr(), 0 if expert_map is None else expert_map.data_ptr(), topk_weights.data_ptr()
    strides = x.stride(0), w13.stride(0), scale_13.stride(0), w2.stride(0), scale_2.stride(0)
    sizes = m, top_k, num_groups, hidden, k_blocks, intermediate, w2.shape[2], scale_13.stride(1), scale_2.stride(1)
    choices = down_rows(hidden, sms), num_stages(m, top_k, hidden, intermediate)
    elements = ELEMENT_TYPES[x.dtype], vectorised(x)
    _kernel(device).launch(
        (sms, 1, 1),
        _THREADS,
        MAX_SHARED_BYTES,
        (x.data_ptr(), *weights, out.data_ptr(), h.data_ptr(), *routing, *strides, *sizes, *choices, *elements),
        launcher.current_stream(device),
        pdl=True,
        cooperative=True,
    )
