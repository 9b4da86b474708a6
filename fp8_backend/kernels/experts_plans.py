"""What the forms of the experts op whose launches are prepared have in common: a call finds its plan, or makes it."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch

from fp8_backend.kernels import combine
from fp8_backend.kernels.prepared import Prepared


class ExpertWeights(NamedTuple):
    """The packed weights of a layer's experts, on one device, as `pack_experts` and `pack_expert_scales` make them.

    w13: [num_groups, ceil(hidden / 128), 2 * intermediate, 128] float8_e4m3fn, gate and up rows. scale_13: [num_groups,
    ceil(hidden / 128), scales] float32. w2: [num_groups, intermediate / 128, align(hidden, 8), 128] float8_e4m3fn.
    scale_2: [num_groups, intermediate / 128, scales] float32.
    """

    w13: torch.Tensor
    scale_13: torch.Tensor
    w2: torch.Tensor
    scale_2: torch.Tensor

    def pointers(self) -> tuple[int, int, int, int]:
        """Return the addresses of the four, in order."""
        return self.w13.data_ptr(), self.scale_13.data_ptr(), self.w2.data_ptr(), self.scale_2.data_ptr()


class ExpertsPlan(Protocol):
    """Launches that are prepared for tensors of one shape and dtype."""

    def __call__(
        self,
        x: torch.Tensor,
        topk_weights: torch.Tensor | None,
        topk_ids: torch.Tensor,
        weights: ExpertWeights,
        out: torch.Tensor,
        expert_map: torch.Tensor | None,
    ) -> None:
        """Launch on the current stream of the current device, on tensors like those prepared for.

        Args:
            x: also like the one prepared for in its alignment to 16 bytes.
            topk_weights: [m, top_k] float32, contiguous; None if x has been weighted.
            topk_ids: [m, top_k] int32, contiguous.
            weights: of the experts here.
            out: 16-byte aligned; overwritten.
            expert_map: int32, contiguous, or None.
        """


def run(
    plans: Prepared[ExpertsPlan],
    make: Callable[..., ExpertsPlan],
    x: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    weights: ExpertWeights,
    out: torch.Tensor,
    expert_map: torch.Tensor | None,
    router_weight_on_input: bool,
    *choices: object,
) -> None:
    """Run the plan for such tensors, and prepare it if this is the first call with them.

    Args:
        plans: of this thread, where a new one is added.
        make: makes a plan of rows, top_k, weights, out, the length of the map (0 without one), whether rows are
            weighted, and `choices`.
        x: this and all below as for `experts_prefill`.
        topk_weights: [m, top_k].
        topk_ids: [m, top_k].
        weights: of the experts here.
        out: [m, hidden]; overwritten.
        expert_map: from ids to positions in w13.
        router_weight_on_input: scale a token by its weight before its experts.
        choices: what else distinguishes plans.

    Raises:
        ArgumentError: hidden % 8 != 0, rows of out that are not 16-byte aligned, or what `make` raises.
    """
    (m, hidden), top_k = x.shape, topk_ids.shape[1]
    combine.check(hidden, out)
    if m == 0 or top_k == 0:
        out.zero_()
        return
    ids, of_router = topk_ids.to(torch.int32).contiguous(), topk_weights.float().contiguous()
    here = None if expert_map is None else expert_map.to(torch.int32).contiguous()
    length, rows = 0 if here is None else here.numel(), x
    if router_weight_on_input:
        rows = (x.float()[:, None] * of_router[:, :, None]).view(-1, hidden)
    of_x, of_out = (rows.shape, rows.stride(0), rows.dtype, rows.data_ptr() % 16), (out.dtype, out.get_device())
    key = (
        *of_x,
        *of_out,
        out.stride(0),
        top_k,
        weights.w13.shape,
        weights.w2.shape,
        length,
        router_weight_on_input,
        *choices,
    )
    if (plan := plans.by_key.get(key)) is None:
        plan = make(rows, top_k, weights, out, length, router_weight_on_input, *choices)
        plans.add(key, plan)
    plan(rows, None if router_weight_on_input else of_router, ids, weights, out, here)
