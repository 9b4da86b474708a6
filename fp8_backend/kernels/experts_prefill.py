"""The experts op for many tokens: rows sorted by expert, two grouped GEMMs over the real row counts, one sum."""

from __future__ import annotations

import torch

from fp8_backend.kernels import experts_plans
from fp8_backend.kernels import experts_prefill_plan as prefill_plan
from fp8_backend.kernels.experts_plans import ExpertsPlan, ExpertWeights
from fp8_backend.kernels.experts_prefill_plan import PrefillPlan
from fp8_backend.kernels.prepared import Prepared

plans: Prepared[ExpertsPlan] = Prepared()


def experts_prefill_workspace_bytes(
    m: int, top_k: int, hidden: int, intermediate: int, num_groups: int, router_weight_on_input: bool = False
) -> int:
    """Return the bytes of all tensors that `experts_prefill` allocates for 16-bit activations and int32 ids."""
    entries = m * top_k
    rows, weighted = (entries, entries * hidden * 4) if router_weight_on_input else (m, 0)
    sorts = prefill_plan.sorts_rows(entries, num_groups, intermediate, router_weight_on_input)
    parts = prefill_plan.workspace_parts(rows, entries, hidden, intermediate, num_groups, sorts)
    return weighted + prefill_plan.workspace_bytes(parts)


def experts_prefill(
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
    """Write each token's weighted sum of w2 @ (silu(gate) * up) over its experts; gate and up are halves of w13 @ x.

    Nothing waits for the GPU; the same inputs give the same bits. Shapes are not checked. What is launched is prepared
    once for tensors of these shapes (`PrefillPlan`).

    Args:
        x: [m, hidden] bfloat16 or float16, contiguous columns, hidden % 8 == 0.
        topk_weights: [m, top_k] float32.
        topk_ids: [m, top_k] int32 or int64; -1 is skipped.
        w13: [num_groups, ceil(hidden / 128), 2 * intermediate, 128] packed, intermediate % 128 == 0.
        scale_13: packed scales of w13.
        w2: [num_groups, intermediate / 128, align(hidden, 8), 128] packed.
        scale_2: packed scales of w2.
        out: [m, hidden] in x's dtype, 16-byte aligned rows; overwritten.
        expert_map: [global experts] int32: an expert's position in w13 or -1; None if ids are positions.
        router_weight_on_input: scale a token by its weight before its experts instead of after them.

    Raises:
        ArgumentError: hidden % 8 != 0, rows of out that are not 16-byte aligned, or more than 1024 experts.
    """
    sorts = prefill_plan.sorts_rows(topk_ids.numel(), w13.shape[0], w13.shape[2] // 2, router_weight_on_input)
    weights = ExpertWeights(w13, scale_13, w2, scale_2)
    tensors = x, topk_weights, topk_ids, weights, out, expert_map
    experts_plans.run(plans, PrefillPlan, *tensors, router_weight_on_input, sorts)
