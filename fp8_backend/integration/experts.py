"""Our experts as vLLM's modular MoE kernel calls them: on tokens (Standard), or on rows by expert (Batched)."""

from __future__ import annotations

from abc import ABC
from typing import Any

import torch
import vllm.model_executor.layers.fused_moe.modular_kernel as mk
from vllm.forward_context import get_forward_context, is_forward_context_available
from vllm.model_executor.layers.fused_moe.topk_weight_and_reduce import (
    TopKWeightAndReduceDelegate,
    TopKWeightAndReduceNoOP,
)

from fp8_backend.integration import ops
from fp8_backend.kernels.reference import ceil_div

Shapes = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]


class _PackedExperts(mk.FusedMoEExpertsModular, ABC):
    """What both forms share: packed weights, and the answers to vLLM's selection, which does not choose among us."""

    @staticmethod
    def _supports_current_device() -> bool:
        from fp8_backend.integration.config import select_backend

        return select_backend().name != "vllm"

    @staticmethod
    def _supports_no_act_and_mul() -> bool:
        return False

    @staticmethod
    def _supports_quant_scheme(weight_key: Any, activation_key: Any) -> bool:
        from vllm.model_executor.layers.quantization.utils import quant_utils

        return (weight_key, activation_key) == (quant_utils.kFp8Static128BlockSym, quant_utils.kFp8Dynamic128Sym)

    @staticmethod
    def _supports_activation(activation: Any) -> bool:
        return activation.value == "silu"

    @staticmethod
    def _supports_batch_invariance() -> bool:
        return True  # fp8_experts takes one form for all m then, and the masked GEMM has but one

    @staticmethod
    def _supports_parallel_config(moe_parallel_config: Any) -> bool:
        return True

    def moe_problem_size(
        self, a1: torch.Tensor, w1: torch.Tensor, w2: torch.Tensor, topk_ids: torch.Tensor
    ) -> tuple[int, int, int, int, int]:
        """Return (experts, rows, 2 * intermediate, hidden, top_k); vLLM's own reads them off plain weights."""
        return w1.shape[0], a1.shape[-2], w1.shape[2], a1.shape[-1], topk_ids.shape[1]


class DeepGemmFp8Experts(_PackedExperts):
    """Takes bf16 tokens with their ids and router weights; quantises, sorts, multiplies and combines by itself."""

    @staticmethod
    def activation_format() -> mk.FusedMoEActivationFormat:
        """Return that tokens come as [m, hidden]."""
        return mk.FusedMoEActivationFormat.Standard

    @property
    def expects_unquantized_inputs(self) -> bool:
        """Return True: tokens are quantised where they are gathered."""
        return True

    def workspace_shapes(self, m: int, n: int, k: int, *_: Any) -> Shapes:
        """Return that nothing but the output is wanted of vLLM: the kernels size their workspace themselves."""
        return (0,), (0,), (m, k)

    def finalize_weight_and_reduce_impl(self) -> mk.TopKWeightAndReduce:
        """Return that the output is combined."""
        return TopKWeightAndReduceNoOP()

    def apply(
        self,
        output: torch.Tensor,
        hidden_states: torch.Tensor,
        w1: torch.Tensor,
        w2: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        activation: Any,
        global_num_experts: int,
        expert_map: torch.Tensor | None,
        a1q_scale: torch.Tensor | None,
        a2_scale: torch.Tensor | None,
        workspace13: torch.Tensor,
        workspace2: torch.Tensor,
        expert_tokens_meta: mk.ExpertTokensMetadata | None,
        apply_router_weight_on_input: bool,
    ) -> None:
        """Write each token's weighted sum of its local experts, as `ops.experts`.

        vLLM's prepare step has multiplied the tokens by their weights where that is to happen on input.
        """
        assert a1q_scale is None and a2_scale is None
        if apply_router_weight_on_input:
            topk_weights = torch.ones_like(topk_weights)
        ops.experts(
            output, hidden_states, topk_weights, topk_ids, w1, self.w1_scale, w2, self.w2_scale, expert_map, False
        )


class DeepGemmFp8BatchedExperts(_PackedExperts):
    """Takes FP8 rows [experts, max rows, hidden] as low-latency all-to-all kernels deliver them, with their counts."""

    @staticmethod
    def activation_format() -> mk.FusedMoEActivationFormat:
        """Return that rows come by expert."""
        return mk.FusedMoEActivationFormat.BatchedExperts

    def workspace_shapes(
        self, m: int, n: int, k: int, top_k: int, global_num_experts: int, local_num_experts: int, *_: Any
    ) -> Shapes:
        """Return the shapes of the first GEMM's output and of the second's."""
        assert self.max_num_tokens is not None and self.num_dispatchers is not None
        rows = self.max_num_tokens * self.num_dispatchers
        return (0,), (local_num_experts, rows, n), (local_num_experts, rows, k)

    def finalize_weight_and_reduce_impl(self) -> mk.TopKWeightAndReduce:
        """Return that the step which brings rows back to their tokens combines them."""
        return TopKWeightAndReduceDelegate()

    def apply(
        self,
        output: torch.Tensor,
        hidden_states: torch.Tensor,
        w1: torch.Tensor,
        w2: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        activation: Any,
        global_num_experts: int,
        expert_map: torch.Tensor | None,
        a1q_scale: torch.Tensor | None,
        a2_scale: torch.Tensor | None,
        workspace13: torch.Tensor,
        workspace2: torch.Tensor,
        expert_tokens_meta: mk.ExpertTokensMetadata | None,
        apply_router_weight_on_input: bool,
    ) -> None:
        """Write w2 @ silu-and-multiply(w13 @ row) for the rows that each expert holds."""
        assert a1q_scale is not None and a2_scale is None and expert_tokens_meta is not None
        num_groups, max_m, _ = hidden_states.shape
        ops.masked_experts(
            output,
            workspace2.view(-1)[: num_groups * max_m * w1.shape[2]].view(num_groups, max_m, w1.shape[2]),
            hidden_states,
            a1q_scale,
            w1,
            self.w1_scale,
            w2,
            self.w2_scale,
            expert_tokens_meta.expert_num_tokens,
            _expected_rows(max_m, topk_ids.shape[1], global_num_experts),
        )


def _expected_rows(max_m: int, top_k: int, num_experts: int) -> int:
    """Return an expert's likely rows: those of even routing where the ranks' token counts are known, else the most."""
    metadata = get_forward_context().dp_metadata if is_forward_context_available() else None
    if metadata is None:
        return max_m
    rows = int(metadata.num_tokens_across_dp_cpu.sum()) * top_k
    return max(1, min(max_m, ceil_div(rows, num_experts)))
