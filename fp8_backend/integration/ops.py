"""The kernels as torch custom ops, opaque to torch.compile.

Registered under the platform's dispatch key by vLLM's helper: `torch.library.custom_op` costs more host time a call.
No `from __future__ import annotations` here: torch derives each op's schema from the annotations themselves.
"""

import torch
from torch.library import Library
from vllm.utils.torch_utils import direct_register_custom_op

from fp8_backend import counters
from fp8_backend.kernels import gemm, reference

# An op lives as long as the library object it was defined in.
_LIBRARY = Library("fp8_backend", "FRAGMENT")


def _linear(
    x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None, n: int
) -> torch.Tensor:
    counters.calls["linear"] += 1
    return gemm.fp8_linear(x, weight, scale, n, bias)


def _linear_fake(
    x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None, n: int
) -> torch.Tensor:
    dtype = torch.bfloat16 if x.dtype == torch.float8_e4m3fn else x.dtype
    return x.new_empty((*x.shape[:-1], n), dtype=dtype)


def _experts(
    x: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    w13: torch.Tensor,
    scale_13: torch.Tensor,
    w2: torch.Tensor,
    scale_2: torch.Tensor,
    expert_map: torch.Tensor | None,
    router_weight_on_input: bool,
) -> torch.Tensor:
    counters.calls["experts"] += 1
    return reference.fp8_experts(
        x, topk_weights, topk_ids, w13, scale_13, w2, scale_2, expert_map, router_weight_on_input
    )


def _experts_fake(
    x: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    w13: torch.Tensor,
    scale_13: torch.Tensor,
    w2: torch.Tensor,
    scale_2: torch.Tensor,
    expert_map: torch.Tensor | None,
    router_weight_on_input: bool,
) -> torch.Tensor:
    return x.new_empty(x.shape)  # contiguous, as the real one, whatever the strides of x


direct_register_custom_op("linear", _linear, fake_impl=_linear_fake, target_lib=_LIBRARY)
direct_register_custom_op("experts", _experts, fake_impl=_experts_fake, target_lib=_LIBRARY)

linear = torch.ops.fp8_backend.linear
experts = torch.ops.fp8_backend.experts
