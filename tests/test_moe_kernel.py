"""Our experts in vLLM's modular MoE kernel, without an engine: tokens as they are, and rows by expert."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

pytest.importorskip("vllm", reason="needs vLLM; vllm is not installed")

import vllm.model_executor.layers.fused_moe.modular_kernel as mk
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.model_executor.layers.fused_moe.activation import MoEActivation
from vllm.model_executor.layers.fused_moe.config import (
    FusedMoEConfig,
    FusedMoEParallelConfig,
    FusedMoEQuantConfig,
    RoutingMethodType,
    fp8_w8a8_moe_quant_config,
)
from vllm.model_executor.layers.fused_moe.prepare_finalize import (
    BatchedPrepareAndFinalize,
    make_moe_prepare_and_finalize_no_dp_ep,
)
from vllm.model_executor.layers.quantization.utils import quant_utils

from fp8_backend import counters
from fp8_backend.bench.moe_operands import RandomExperts
from fp8_backend.bench.moe_shapes import MoeShape, route
from fp8_backend.integration import experts as experts_module
from fp8_backend.integration import ops
from fp8_backend.integration.experts import DeepGemmFp8BatchedExperts, DeepGemmFp8Experts
from fp8_backend.kernels import reference
from fp8_backend.kernels.reference import BLOCK, relative_error

SHAPE = MoeShape("small", 8, 256, 128, 2)
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(autouse=True)
def vllm_config(one_rank: VllmConfig) -> Iterator[None]:
    with set_current_vllm_config(one_rank):
        yield


@pytest.fixture(scope="module")
def layer() -> RandomExperts:
    return RandomExperts(SHAPE, DEVICE, copies=1)


def configs(layer: RandomExperts) -> tuple[FusedMoEConfig, FusedMoEQuantConfig]:
    moe = FusedMoEConfig(
        num_experts=SHAPE.experts,
        experts_per_token=SHAPE.top_k,
        hidden_dim=SHAPE.hidden,
        intermediate_size=SHAPE.intermediate,
        num_local_experts=SHAPE.experts,
        num_logical_experts=SHAPE.experts,
        activation=MoEActivation.SILU,
        device=DEVICE,
        routing_method=RoutingMethodType.Renormalize,
        moe_parallel_config=FusedMoEParallelConfig.make_no_parallel(),
        in_dtype=torch.bfloat16,
    )
    packed = layer.ours[0]
    return moe, fp8_w8a8_moe_quant_config(packed.scale_13, packed.scale_2, block_shape=[BLOCK, BLOCK])


class QuantisingBatches(BatchedPrepareAndFinalize):
    """vLLM's reference for kernels that deliver rows by expert, with a quantisation that CPUs have."""

    def prepare(self, a1, topk_weights, topk_ids, num_experts, *_, **__):  # type: ignore[override]
        rows = torch.full((num_experts, self.max_num_tokens), -1)
        counts = torch.zeros(num_experts, dtype=torch.int32)
        for expert in range(num_experts):
            tokens = (topk_ids.cpu() == expert).any(dim=1).nonzero()[:, 0]
            rows[expert, : len(tokens)], counts[expert] = tokens, len(tokens)
        codes, scale = reference.per_token_group_quant(a1[rows.clamp_min(0).flatten().to(a1.device)])
        shape = (num_experts, self.max_num_tokens, -1)
        meta = mk.ExpertTokensMetadata(expert_num_tokens=counts.to(a1.device), expert_num_tokens_cpu=None)
        return codes.view(shape), scale.reshape(shape), meta, None, None


def run(kernel: mk.FusedMoEKernel, layer: RandomExperts, x: torch.Tensor, routed: tuple, **named) -> torch.Tensor:
    packed, (topk_weights, topk_ids) = layer.ours[0], routed
    return kernel.apply(
        x,
        packed.w13,
        packed.w2,
        topk_weights,
        topk_ids,
        activation=MoEActivation.SILU,
        global_num_experts=SHAPE.experts,
        expert_map=named.get("expert_map"),
        apply_router_weight_on_input=named.get("on_input", False),
    )


def given(tokens: int) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor]]:
    x = torch.randn(tokens, SHAPE.hidden, generator=torch.Generator().manual_seed(3)).to(DEVICE, torch.bfloat16)
    topk_weights, topk_ids = route(SHAPE, tokens, "balanced", 1)
    return x, (topk_weights.to(DEVICE), topk_ids.to(DEVICE))


def test_tokens_as_they_are(layer: RandomExperts) -> None:
    kernel = mk.FusedMoEKernel(make_moe_prepare_and_finalize_no_dp_ep(False), DeepGemmFp8Experts(*configs(layer)))
    x, routed = given(19)
    routed[1][3] = -1
    y = run(kernel, layer, x, routed)
    assert not y[3].any()
    assert relative_error(y, layer.truth(x, routed, torch.arange(19, device=DEVICE))) < 0.005
    local = torch.arange(SHAPE.experts, dtype=torch.int32, device=DEVICE)
    local[5] = -1
    routed[1][routed[1] == 5] = -1
    assert torch.equal(run(kernel, layer, x, given(19)[1], expert_map=local)[4:], run(kernel, layer, x, routed)[4:])


def test_router_weights_on_input(layer: RandomExperts) -> None:
    kernel = mk.FusedMoEKernel(make_moe_prepare_and_finalize_no_dp_ep(False), DeepGemmFp8Experts(*configs(layer)))
    x, (topk_weights, topk_ids) = given(6)
    routed = topk_weights[:, :1].contiguous(), topk_ids[:, :1].contiguous()
    ones = torch.ones_like(routed[0]), routed[1]
    scaled = x * routed[0].to(x.dtype)
    expected = layer.truth(scaled, ones, torch.arange(6, device=DEVICE))
    assert relative_error(run(kernel, layer, x, routed, on_input=True), expected) < 0.005


def test_rows_by_expert(layer: RandomExperts) -> None:
    moe, quantisation = configs(layer)
    dispatch = QuantisingBatches(max_num_tokens=24, num_local_experts=SHAPE.experts, num_dispatchers=1, rank=0)
    ours = DeepGemmFp8BatchedExperts(moe, quantisation, max_num_tokens=24, num_dispatchers=1)
    x, routed = given(19)
    before = counters.calls["masked_experts"]
    y = run(mk.FusedMoEKernel(dispatch, ours), layer, x, routed)
    assert counters.calls["masked_experts"] == before + 1
    # The first GEMM's output is rounded to bf16 before it is quantised: a code here and there is the next one.
    assert relative_error(y, layer.truth(x, routed, torch.arange(19, device=DEVICE))) < 0.02


def test_expected_rows_without_other_ranks() -> None:
    assert experts_module._expected_rows(64, 8, 256) == 64


@pytest.mark.parametrize("cls", [DeepGemmFp8Experts, DeepGemmFp8BatchedExperts])
def test_what_the_experts_say_they_support(cls: type, layer: RandomExperts) -> None:
    keys = quant_utils.kFp8Static128BlockSym, quant_utils.kFp8Dynamic128Sym
    moe, _ = configs(layer)
    assert cls.is_supported_config(cls, moe, *keys, cls.activation_format()) == (True, None)
    assert cls.is_supported_config(cls, moe, keys[1], keys[0], cls.activation_format())[0] is False
    moe.is_lora_enabled = True
    assert "LoRA" in str(cls.is_supported_config(cls, moe, *keys, cls.activation_format()))


def test_ops_have_faithful_fakes(layer: RandomExperts) -> None:
    packed, (x, routed) = layer.ours[0], given(5)
    weights = packed.w13, packed.scale_13, packed.w2, packed.scale_2
    arguments = (torch.empty_like(x), x, *routed, *weights, None, False)
    torch.library.opcheck(ops.experts, arguments, test_utils="test_faketensor")
    codes, scale = reference.per_token_group_quant(torch.randn(8 * 4, SHAPE.hidden, device=DEVICE))
    hidden, out = (torch.empty(8, 4, n, dtype=torch.bfloat16, device=DEVICE) for n in (256, SHAPE.hidden))
    masked_m = torch.full((8,), 4, dtype=torch.int32, device=DEVICE)
    rows = codes.view(8, 4, -1), scale.reshape(8, 4, -1)
    arguments = (out, hidden, *rows, *weights, masked_m, 4)
    torch.library.opcheck(ops.masked_experts, arguments, test_utils="test_faketensor")
