"""The kernels as torch custom ops, opaque to torch.compile; those of two layers in one are put in by fusion.py.

Registered under the platform's dispatch key by vLLM's helper: `torch.library.custom_op` costs more host time a call.
No `from __future__ import annotations` here: torch derives each op's schema from the annotations themselves.
"""

import torch
from torch.library import Library
from vllm.utils.torch_utils import LayerNameType, direct_register_custom_op

from fp8_backend import counters
from fp8_backend.integration import compat
from fp8_backend.kernels import attended_linear, fused_linear, gemm, norm_rope, router
from fp8_backend.kernels.activation import masked_silu_mul_quant
from fp8_backend.kernels.experts import fp8_experts
from fp8_backend.kernels.m_grouped import m_grouped_fp8_gemm_nt_masked

# An op lives as long as the library object it was defined in.
_LIBRARY = Library("fp8_backend", "FRAGMENT")


def _linear(
    x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None, n: int
) -> torch.Tensor:
    _begin("linear")
    return gemm.fp8_linear(x, weight, scale, n, bias)


def _linear_fake(
    x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None, n: int
) -> torch.Tensor:
    dtype = torch.bfloat16 if x.dtype == torch.float8_e4m3fn else x.dtype
    return x.new_empty((*x.shape[:-1], n), dtype=dtype)


def _begin(op: str) -> None:
    """Count a call, behind which nothing that attention has left is of what comes next."""
    counters.calls[op] += 1
    attended_linear.forget_codes()


def _attended_linear(
    x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None, n: int
) -> torch.Tensor:
    counters.calls["linear"] += 1  # one like the others, as a model sees it
    return attended_linear.attended_linear(x, weight, scale, n, bias)


def _rms_norm_linear(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    norm_weight: torch.Tensor,
    epsilon: float,
    weight: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None,
    n: int,
    keep: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    _begin("rms_norm_linear")
    y, *others = fused_linear.rms_norm_linear(x, residual, norm_weight, epsilon, weight, scale, n, bias, keep)
    # An op's outputs are tensors: what is not wanted is empty.
    summed, normed = (x.new_empty(0) if other is None else other for other in others)
    return y, summed, normed


def _rms_norm_linear_fake(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    norm_weight: torch.Tensor,
    epsilon: float,
    weight: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None,
    n: int,
    keep: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    y = x.new_empty((x.shape[0], n))
    return y, x.new_empty(0 if residual is None else x.shape), x.new_empty(x.shape if keep else 0)


def _silu_mul_linear(
    x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None, n: int
) -> torch.Tensor:
    _begin("silu_mul_linear")
    return fused_linear.silu_mul_linear(x, weight, scale, n, bias)


def _silu_mul_linear_fake(
    x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None, n: int
) -> torch.Tensor:
    return x.new_empty((x.shape[0], n))


def _qk_norm_rope(
    rows: torch.Tensor,
    positions: torch.Tensor,
    query_weight: torch.Tensor,
    key_weight: torch.Tensor,
    cos_sin_cache: torch.Tensor,
    epsilon: float,
    query_heads: int,
    key_heads: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    _begin("qk_norm_rope")
    return norm_rope.qk_norm_rope(
        rows, positions, query_weight, key_weight, cos_sin_cache, epsilon, query_heads, key_heads
    )


def _qk_norm_rope_fake(
    rows: torch.Tensor,
    positions: torch.Tensor,
    query_weight: torch.Tensor,
    key_weight: torch.Tensor,
    cos_sin_cache: torch.Tensor,
    epsilon: float,
    query_heads: int,
    key_heads: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    m, head = rows.shape[0], query_weight.shape[0]
    return rows.new_empty((m, query_heads, head)), rows.new_empty((m, key_heads, head))


def _qk_norm_rope_cache(
    rows: torch.Tensor,
    positions: torch.Tensor,
    query_weight: torch.Tensor,
    key_weight: torch.Tensor,
    cos_sin_cache: torch.Tensor,
    epsilon: float,
    query_heads: int,
    key_heads: int,
    layer_name: LayerNameType,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    _begin("qk_norm_rope_cache")
    layer, kv_cache, slots = compat.cache_of(layer_name)
    halves = None if slots is None else compat.keys_and_values(layer, kv_cache)
    kept = None
    # More slots than rows are those of other ranks' tokens, too, which the backend gathers.
    if halves is not None and len(slots) <= rows.shape[0] and norm_rope.fits_cache(*halves, rows.dtype):
        kept = norm_rope.KeyValueCache(*halves, slots)
    queries, keys = norm_rope.qk_norm_rope(
        rows, positions, query_weight, key_weight, cos_sin_cache, epsilon, query_heads, key_heads, kept
    )
    if slots is not None and kept is None:
        values = norm_rope.values_behind(rows, query_heads, key_heads, query_weight.shape[0])
        layer.impl.do_kv_cache_update(layer, keys, values, kv_cache, slots)
    # What attention takes to run behind the update.
    return queries, keys, rows.new_empty(0)


def _qk_norm_rope_cache_fake(
    rows: torch.Tensor,
    positions: torch.Tensor,
    query_weight: torch.Tensor,
    key_weight: torch.Tensor,
    cos_sin_cache: torch.Tensor,
    epsilon: float,
    query_heads: int,
    key_heads: int,
    layer_name: LayerNameType,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    m, head = rows.shape[0], query_weight.shape[0]
    queries, keys = (rows.new_empty((m, heads, head)) for heads in (query_heads, key_heads))
    return queries, keys, rows.new_empty(0)


def _router_linear(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    _begin("router_linear")
    return router.router_linear(x, weight)


def _router_linear_fake(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return x.new_empty((x.shape[0], weight.shape[0]))


def _experts(
    out: torch.Tensor,
    x: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    w13: torch.Tensor,
    scale_13: torch.Tensor,
    w2: torch.Tensor,
    scale_2: torch.Tensor,
    expert_map: torch.Tensor | None,
    router_weight_on_input: bool,
) -> None:
    _begin("experts")
    fp8_experts(x, topk_weights, topk_ids, w13, scale_13, w2, scale_2, expert_map, router_weight_on_input, out)


def _experts_fake(
    out: torch.Tensor,
    x: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    w13: torch.Tensor,
    scale_13: torch.Tensor,
    w2: torch.Tensor,
    scale_2: torch.Tensor,
    expert_map: torch.Tensor | None,
    router_weight_on_input: bool,
) -> None:
    return None


def _masked_experts(
    out: torch.Tensor,
    hidden: torch.Tensor,
    codes: torch.Tensor,
    scale_a: torch.Tensor,
    w13: torch.Tensor,
    scale_13: torch.Tensor,
    w2: torch.Tensor,
    scale_2: torch.Tensor,
    masked_m: torch.Tensor,
    expected_m: int,
) -> None:
    _begin("masked_experts")
    m_grouped_fp8_gemm_nt_masked((codes, scale_a), (w13, scale_13), hidden, masked_m, expected_m)
    m_grouped_fp8_gemm_nt_masked(masked_silu_mul_quant(hidden, masked_m), (w2, scale_2), out, masked_m, expected_m)


def _masked_experts_fake(
    out: torch.Tensor,
    hidden: torch.Tensor,
    codes: torch.Tensor,
    scale_a: torch.Tensor,
    w13: torch.Tensor,
    scale_13: torch.Tensor,
    w2: torch.Tensor,
    scale_2: torch.Tensor,
    masked_m: torch.Tensor,
    expected_m: int,
) -> None:
    return None


direct_register_custom_op("linear", _linear, fake_impl=_linear_fake, target_lib=_LIBRARY)
direct_register_custom_op("attended_linear", _attended_linear, fake_impl=_linear_fake, target_lib=_LIBRARY)
direct_register_custom_op("rms_norm_linear", _rms_norm_linear, fake_impl=_rms_norm_linear_fake, target_lib=_LIBRARY)
direct_register_custom_op("silu_mul_linear", _silu_mul_linear, fake_impl=_silu_mul_linear_fake, target_lib=_LIBRARY)
direct_register_custom_op("qk_norm_rope", _qk_norm_rope, fake_impl=_qk_norm_rope_fake, target_lib=_LIBRARY)
direct_register_custom_op(
    "qk_norm_rope_cache", _qk_norm_rope_cache, fake_impl=_qk_norm_rope_cache_fake, target_lib=_LIBRARY
)
direct_register_custom_op("router_linear", _router_linear, fake_impl=_router_linear_fake, target_lib=_LIBRARY)
direct_register_custom_op("experts", _experts, mutates_args=["out"], fake_impl=_experts_fake, target_lib=_LIBRARY)
direct_register_custom_op(
    "masked_experts",
    _masked_experts,
    mutates_args=["out", "hidden"],
    fake_impl=_masked_experts_fake,
    target_lib=_LIBRARY,
)

linear = torch.ops.fp8_backend.linear
behind_attention = torch.ops.fp8_backend.attended_linear
rms_norm_linear = torch.ops.fp8_backend.rms_norm_linear
silu_mul_linear = torch.ops.fp8_backend.silu_mul_linear
qk_norm_rope = torch.ops.fp8_backend.qk_norm_rope
qk_norm_rope_cache = torch.ops.fp8_backend.qk_norm_rope_cache
router_linear = torch.ops.fp8_backend.router_linear
experts = torch.ops.fp8_backend.experts
masked_experts = torch.ops.fp8_backend.masked_experts
