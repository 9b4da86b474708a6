"""How a layer of routed FP8 experts is created, checked and applied where the reference kernels serve."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from vllm.config import get_current_vllm_config
from vllm.distributed import get_tensor_model_parallel_rank
from vllm.model_executor.layers.fused_moe import FusedMoEMethodBase, RoutedExperts
from vllm.model_executor.layers.fused_moe.config import FusedMoEConfig, FusedMoEQuantConfig
from vllm.model_executor.layers.fused_moe.routed_experts import FusedMoeWeightScaleSupported
from vllm.model_executor.utils import set_weight_attrs

from fp8_backend.errors import UnsupportedError
from fp8_backend.integration import compat, ops
from fp8_backend.integration.linear import loads_dummy_weights
from fp8_backend.kernels.reference import BLOCK, ceil_div
from fp8_backend.weights import loader, partition

if TYPE_CHECKING:
    from fp8_backend.integration.config import DeepGemmFp8Config


class DeepGemmFp8MoEMethod(FusedMoEMethodBase):
    """Serves one layer of routed experts; routing, shared experts and reduction over ranks stay vLLM's.

    `moe_kernel` stays None: vLLM then calls `apply` with this rank's tokens. Tensor and expert parallel work so.
    """

    def __init__(self, config: DeepGemmFp8Config, layer: RoutedExperts, prefix: str) -> None:
        super().__init__(layer.moe_config)
        self.config = config
        self.prefix = prefix
        self.dummy_weights = loads_dummy_weights()
        # Kept, since a later weight update packs the layer again without a current config.
        self.compilation_config = get_current_vllm_config().compilation_config
        check_features(prefix, layer.moe_config, getattr(layer, "swiglu_limit", None))

    def create_weights(
        self,
        layer: RoutedExperts,
        num_experts: int,
        hidden_size: int,
        intermediate_size_per_partition: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """Register the weights [experts, n, k] float8_e4m3fn and scales [experts, n / 128, ceil(k / 128)] float32.

        Raises:
            UnsupportedError: an expert's intermediate size on one rank is not a multiple of 128.
        """
        intermediate = intermediate_size_per_partition
        if reason := partition.experts_reason(intermediate):
            raise UnsupportedError(f"{self.prefix}: {reason}")
        layer.num_experts = num_experts
        layer.orig_dtype = params_dtype
        layer.weight_block_size = [BLOCK, BLOCK]
        for name, n, k in (("w13", 2 * intermediate, hidden_size), ("w2", hidden_size, intermediate)):
            weight = torch.empty(num_experts, n, k, dtype=torch.float8_e4m3fn)
            scale = loader.unloaded_scale(num_experts, ceil_div(n, BLOCK), ceil_div(k, BLOCK))
            block = {"quant_method": FusedMoeWeightScaleSupported.BLOCK.value}
            for suffix, data, attributes in (("weight", weight, {}), (self.config.scale_name, scale, block)):
                parameter = torch.nn.Parameter(data, requires_grad=False)
                layer.register_parameter(f"{name}_{suffix}", parameter)
                set_weight_attrs(parameter, {**extra_weight_attrs, **attributes})
        self.config.summary.create("MoE layer")

    def process_weights_after_loading(self, layer: RoutedExperts) -> None:
        """Check the scales and make the layer opaque to the compiler; weights stay as they were loaded."""
        for name in (f"w13_{self.config.scale_name}", f"w2_{self.config.scale_name}"):
            scale = getattr(layer, name).data
            if self.dummy_weights:
                scale.abs_().clamp_min_(1e-6)
            loader.check_scale(self.prefix, name, scale)
        compat.hide_moe_from_compiler(layer, self.prefix, self.compilation_config)
        self.config.summary.pack("MoE layer", self.config.backend_name, get_tensor_model_parallel_rank() == 0)

    def get_fused_moe_quant_config(self, layer: RoutedExperts) -> FusedMoEQuantConfig | None:
        """Return None: the experts quantise their own activations."""
        return None

    def apply(
        self,
        layer: RoutedExperts,
        x: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        shared_experts: Any = None,
        shared_experts_input: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return the weighted sum of each token's local experts.

        Args:
            layer: the loaded layer.
            x: [m, hidden] bfloat16 or float16.
            topk_weights: [m, top_k], any float dtype.
            topk_ids: [m, top_k] global expert ids; -1 is skipped.
            shared_experts: run by vLLM, not here.
            shared_experts_input: likewise.

        Returns:
            [m, hidden] in x's dtype, of this rank's experts only.
        """
        return ops.experts(
            x,
            topk_weights,
            topk_ids,
            layer.w13_weight,
            getattr(layer, f"w13_{self.config.scale_name}"),
            layer.w2_weight,
            getattr(layer, f"w2_{self.config.scale_name}"),
            layer.expert_map,
            layer.apply_router_weight_on_input,
        )


def check_features(name: str, moe: FusedMoEConfig, swiglu_limit: float | None) -> None:
    """Refuse what the reference experts do not compute.

    Raises:
        UnsupportedError: names layer, feature and next step.
    """
    unsupported = {
        "LoRA on experts (--enable-lora)": moe.is_lora_enabled,
        "expert load balancing (--enable-eplb)": moe.moe_parallel_config.enable_eplb,
        "experts with bias": moe.has_bias,
        "experts without a gate": not moe.is_act_and_mul,
        f"activation {moe.activation.value!r}": moe.activation.value != "silu",
        f"clamped SwiGLU (limit {swiglu_limit})": swiglu_limit is not None,
    }
    for feature, present in unsupported.items():
        if present:
            raise UnsupportedError(
                f"{name}: {feature} is not supported by fp8_backend's MoE layers; turn it off, or drop "
                "--quantization deepgemm_fp8"
            )
