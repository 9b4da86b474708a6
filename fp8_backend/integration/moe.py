"""How a layer of routed FP8 experts is created, loaded, packed and applied."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from vllm.config import get_current_vllm_config
from vllm.distributed import get_tensor_model_parallel_rank
from vllm.model_executor.layers.fused_moe import FusedMoEMethodBase, RoutedExperts
from vllm.model_executor.layers.fused_moe.config import (
    FusedMoEConfig,
    FusedMoEQuantConfig,
    fp8_w8a8_moe_quant_config,
)
from vllm.model_executor.layers.fused_moe.routed_experts import FusedMoeWeightScaleSupported
from vllm.model_executor.utils import replace_parameter, set_weight_attrs

from fp8_backend.errors import UnsupportedError
from fp8_backend.integration import compat, ops, warmup
from fp8_backend.integration.files import naming_file
from fp8_backend.integration.linear import check_reload, loads_dummy_weights
from fp8_backend.kernels.reference import BLOCK, ceil_div
from fp8_backend.weights import experts, loader
from fp8_backend.weights.partition import ExpertPart

if TYPE_CHECKING:
    from fp8_backend.integration.config import DeepGemmFp8Config


class DeepGemmFp8MoEMethod(FusedMoEMethodBase):
    """Serves one layer of routed experts; routing, shared experts and reduction over ranks stay vLLM's.

    Where vLLM's modular kernel is of use (`compat.modular_kernel`) it brings tokens to our experts and back; elsewhere
    `moe_kernel` stays None and `apply` calls them itself.
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

        A part of the intermediate size that starts or ends within a 128-row block is widened to the block.

        Raises:
            UnsupportedError: vLLM pads the hidden size for its all-to-all kernels.
            CompileError: a kernel does not compile, or is missing and FP8_BACKEND_JIT=forbid.
        """
        unpadded = extra_weight_attrs.get("unpadded_hidden_size") or hidden_size
        if unpadded != hidden_size:
            raise UnsupportedError(
                f"{self.prefix}: the all-to-all backend pads the hidden size {unpadded} to {hidden_size}, which "
                "fp8_backend's MoE layers do not support; choose another --all2all-backend"
            )
        if self.config.backend_name == "cuda":
            # Here and not after loading: a kernel that is missing stops the start before gigabytes are read.
            warmup.warm_up_process(get_tensor_model_parallel_rank() == 0)
        rows = intermediate_size_per_partition
        part = ExpertPart(self.moe.tp_rank * rows, rows)
        layer.fp8_part = part
        layer.num_experts = num_experts
        layer.orig_dtype = params_dtype
        layer.weight_block_size = [BLOCK, BLOCK]
        for name, n, k in (("w13", 2 * part.padded, hidden_size), ("w2", hidden_size, part.padded)):
            weight = torch.empty(num_experts, n, k, dtype=torch.float8_e4m3fn)
            scale = loader.unloaded_scale(num_experts, ceil_div(n, BLOCK), ceil_div(k, BLOCK))
            block = {"quant_method": FusedMoeWeightScaleSupported.BLOCK.value}
            for suffix, data, attributes in (("weight", weight, {}), (self.config.scale_name, scale, block)):
                parameter = torch.nn.Parameter(data, requires_grad=False)
                layer.register_parameter(f"{name}_{suffix}", parameter)
                set_weight_attrs(parameter, {**extra_weight_attrs, **attributes})
                if part.padded != part.rows:
                    local = layer._map_global_expert_id_to_local_expert_id
                    parameter.weight_loader = experts.part_loader(  # type: ignore[attr-defined]
                        local, part, 1 if data is weight else BLOCK
                    )
        self.config.summary.create("MoE layer")

    def process_weights_after_loading(self, layer: RoutedExperts) -> None:
        """Replace weights and scales by packed ones, expert by expert, and make the layer opaque to the compiler.

        Raises:
            CheckpointError: as a linear's does.
        """
        if layer.w13_weight.dim() == 4:  # vLLM calls again for layers that a weight update left alone
            return
        experts_held, hidden, padded = layer.w2_weight.shape
        check_reload(layer, self.prefix, 3 * experts_held * hidden * (padded - layer.fp8_part.rows))
        # Rows of other ranks in a block that is shared are never loaded, not even where a reload allocates anew.
        experts.clear_padding(layer.w13_weight.data, layer.w2_weight.data, layer.fp8_part)
        for name in ("w13", "w2"):
            scale_name = f"{name}_{self.config.scale_name}"
            scale = getattr(layer, scale_name).data
            if self.dummy_weights:
                scale.abs_().clamp_min_(1e-6)
            weight = getattr(layer, f"{name}_weight").data
            with naming_file(self.config.model_config, f"{self.prefix}."):
                weight, scale = experts.pack_experts(self.prefix, scale_name, weight, scale)
            replace_parameter(layer, f"{name}_weight", weight)
            replace_parameter(layer, scale_name, scale)
        compat.hide_moe_from_compiler(layer, self.prefix, self.compilation_config)
        self.moe_quant_config = self.get_fused_moe_quant_config(layer)
        self.moe_kernel = compat.modular_kernel(layer, self.moe, self.moe_quant_config)
        self.config.summary.pack("MoE layer", self.config.backend_name, get_tensor_model_parallel_rank() == 0)

    def get_fused_moe_quant_config(self, layer: RoutedExperts) -> FusedMoEQuantConfig:
        """Return FP8 weights and activations in blocks: all-to-all kernels that quantise do so in groups of 128."""
        scales = (getattr(layer, f"{name}_{self.config.scale_name}") for name in ("w13", "w2"))
        return fp8_w8a8_moe_quant_config(*scales, block_shape=[BLOCK, BLOCK])

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
            shared_experts: run by vLLM; by its modular kernel, where that hides all-to-all behind them.
            shared_experts_input: likewise.

        Returns:
            [m, hidden] in x's dtype, of this rank's experts only.
        """
        if self.moe_kernel is not None:
            return self.moe_kernel.apply(
                x,
                layer.w13_weight,
                layer.w2_weight,
                topk_weights,
                topk_ids,
                activation=layer.activation,
                global_num_experts=layer.global_num_experts,
                expert_map=layer.expert_map,
                apply_router_weight_on_input=layer.apply_router_weight_on_input,
                shared_experts=shared_experts,
                shared_experts_input=shared_experts_input,
            )
        out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        ops.experts(
            out,
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
        return out


def check_features(name: str, moe: FusedMoEConfig, swiglu_limit: float | None) -> None:
    """Refuse what the experts do not compute.

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
