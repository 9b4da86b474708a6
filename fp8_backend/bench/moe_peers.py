"""Every other way to compute the same experts, called as vLLM calls it: bf16 in and out, quantisation included."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Sequence

import torch

from fp8_backend.bench.moe_operands import Experts, Routed
from fp8_backend.bench.moe_shapes import MoeShape
from fp8_backend.bench.peers import reason_of
from fp8_backend.kernels.reference import BLOCK

NAMES = ("triton", "deepgemm", "flashinfer", "cutlass")
# (x [m, hidden] bfloat16, router weights and ids, the layer as stored) -> [m, hidden] bfloat16
MoePeer = Callable[[torch.Tensor, Routed, Experts], torch.Tensor]
FUSED_MOE = "vllm.model_executor.layers.fused_moe"


def _triton(shape: MoeShape) -> MoePeer:
    importlib.import_module("vllm._custom_ops")
    fused_experts: Callable[..., torch.Tensor] = importlib.import_module(f"{FUSED_MOE}.fused_moe").fused_experts_impl

    def run(x: torch.Tensor, routed: Routed, layer: Experts) -> torch.Tensor:
        return fused_experts(
            x,
            layer.w13,
            layer.w2,
            *routed,
            use_fp8_w8a8=True,
            w1_scale=layer.scale_13,
            w2_scale=layer.scale_2,
            block_shape=[BLOCK, BLOCK],
        )

    return run


def _deepgemm(shape: MoeShape) -> MoePeer:
    """Return vLLM's DeepGEMM experts with exact scales and workspaces allocated by the call, so that they count."""
    os.environ["VLLM_USE_DEEP_GEMM_E8M0"] = "0"
    config = importlib.import_module(f"{FUSED_MOE}.config")
    module = importlib.import_module(f"{FUSED_MOE}.experts.deep_gemm_moe")
    utils = importlib.import_module(f"{FUSED_MOE}.utils")
    activation = importlib.import_module(f"{FUSED_MOE}.activation").MoEActivation.SILU
    deep_gemm = importlib.import_module("vllm.utils.deep_gemm")
    if not deep_gemm.is_deep_gemm_supported():
        raise RuntimeError("vLLM says that DeepGEMM is not supported here")
    deep_gemm.DeepGemmQuantScaleFMT.init_oracle_cache()
    moe = config.FusedMoEConfig(
        num_experts=shape.experts,
        experts_per_token=shape.top_k,
        hidden_dim=shape.hidden,
        intermediate_size=shape.intermediate,
        num_local_experts=shape.experts,
        num_logical_experts=shape.experts,
        activation=activation,
        device="cuda",
        routing_method=config.RoutingMethodType.Renormalize,
        moe_parallel_config=config.FusedMoEParallelConfig.make_no_parallel(),
        in_dtype=torch.bfloat16,
    )

    def run(x: torch.Tensor, routed: Routed, layer: Experts) -> torch.Tensor:
        quantisation = config.fp8_w8a8_moe_quant_config(layer.scale_13, layer.scale_2, block_shape=[BLOCK, BLOCK])
        experts = module.DeepGemmExperts(moe, quantisation)
        codes, scale = utils.moe_kernel_quantize_input(x, None, torch.float8_e4m3fn, False, [BLOCK, BLOCK])
        m, n = x.shape[0], layer.w13.shape[1]
        first, second, _ = experts.workspace_shapes(
            m, n, shape.hidden, shape.top_k, shape.experts, shape.experts, None, activation
        )
        out = torch.empty_like(x)
        experts.apply(
            output=out,
            hidden_states=codes,
            w1=layer.w13,
            w2=layer.w2,
            topk_weights=routed[0],
            topk_ids=routed[1],
            activation=activation,
            global_num_experts=shape.experts,
            expert_map=None,
            a1q_scale=scale,
            a2_scale=None,
            workspace13=torch.empty(first, dtype=x.dtype, device=x.device).view(-1),
            workspace2=torch.empty(second, dtype=x.dtype, device=x.device).view(-1),
            expert_tokens_meta=None,
            apply_router_weight_on_input=False,
        )
        return out

    return run


def _flashinfer(shape: MoeShape) -> MoePeer:
    fused_moe: Callable[..., list[torch.Tensor]] = importlib.import_module("flashinfer.fused_moe").cutlass_fused_moe
    swapped: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def run(x: torch.Tensor, routed: Routed, layer: Experts) -> torch.Tensor:
        if layer.w13.data_ptr() not in swapped:  # it wants up before gate, as vLLM lays its copy out at load
            halves = (torch.cat(t.view(torch.uint8).chunk(2, dim=1)[::-1], dim=1) for t in (layer.w13, layer.scale_13))
            swapped[layer.w13.data_ptr()] = next(halves).view(layer.w13.dtype), next(halves).view(torch.float32)
        w31, scale_31 = swapped[layer.w13.data_ptr()]
        return fused_moe(
            x,
            routed[1],
            routed[0],
            w31,
            layer.w2,
            x.dtype,
            quant_scales=[scale_31, layer.scale_2],
            use_deepseek_fp8_block_scale=True,
        )[0]

    return run


def _cutlass(shape: MoeShape) -> MoePeer:
    raise RuntimeError("vLLM's CUTLASS experts take no 128x128 block scales on sm_90")


_BUILDERS: dict[str, Callable[[MoeShape], MoePeer]] = {
    "triton": _triton,
    "deepgemm": _deepgemm,
    "flashinfer": _flashinfer,
    "cutlass": _cutlass,
}


def load(names: Sequence[str], shape: MoeShape) -> tuple[dict[str, MoePeer], dict[str, str]]:
    """Return the peers that are installed, and why the others are not there."""
    present, absent = {}, {}
    for name in names:
        try:
            present[name] = _BUILDERS[name](shape)
        except Exception as error:  # whatever stops a peer from loading is a reason to be written down
            absent[name] = reason_of(error)
    return present, absent
