"""How an FP8 linear layer is created, packed and applied."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from vllm.config import get_current_vllm_config
from vllm.distributed import get_tensor_model_parallel_rank
from vllm.model_executor.layers.linear import LinearMethodBase, register_weight_loader_v2_supported_method
from vllm.model_executor.parameter import BlockQuantScaleParameter, ModelWeightParameter
from vllm.model_executor.utils import replace_parameter

from fp8_backend.errors import CheckpointError
from fp8_backend.integration import compat, ops, warmup
from fp8_backend.integration.files import naming_file
from fp8_backend.integration.scales import refining_loader
from fp8_backend.kernels.reference import BLOCK
from fp8_backend.weights import loader, partition

if TYPE_CHECKING:
    from fp8_backend.integration.config import DeepGemmFp8Config


def loads_dummy_weights() -> bool:
    """Return whether vLLM fills parameters with noise instead of reading a checkpoint (`--load-format dummy`)."""
    return get_current_vllm_config().load_config.load_format == "dummy"


def check_reload(layer: torch.nn.Module, prefix: str, padding: int = 0) -> None:
    """Refuse a weight reload that brought only a part of a layer.

    Args:
        layer: about to be packed.
        prefix: its name, for the error.
        padding: elements of its parameters that no checkpoint fills.

    Raises:
        CheckpointError: says how much is missing.
    """
    if (missing := compat.unloaded_elements(layer) - padding) > 0:
        raise CheckpointError(
            f"{prefix}: the weight reload left {missing} elements unset; expected every tensor of the layer; "
            "restart the server with a complete checkpoint (fp8-backend inspect MODEL tells)"
        )


# Not a subclass of vLLM's Fp8LinearMethod: that one fails where no stock kernel fits, and other parts of vLLM take its
# subclasses' scales for plain [n / 128, k / 128] tensors. vLLM looks the version 2 weight loaders up by class name.
@register_weight_loader_v2_supported_method
class DeepGemmFp8LinearMethod(LinearMethodBase):
    """Serves one linear layer: merged, QKV, column, row or replicated, with or without bias."""

    def __init__(self, config: DeepGemmFp8Config, prefix: str) -> None:
        super().__init__()
        self.config = config
        self.prefix = prefix
        self.dummy_weights = loads_dummy_weights()

    def create_weights(
        self,
        layer: torch.nn.Module,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """Register `weight` [n, k] float8_e4m3fn and its scales [ceil(n / 128), ceil(k / 128)] float32.

        The scales are called `weight_scale_inv`, or `weight_scale` where the checkpoint is of compressed-tensors. Where
        merging or splitting the layer cuts through 128x128 blocks, their grid is finer until they are packed.

        Raises:
            CompileError: a kernel does not compile, or is missing and FP8_BACKEND_JIT=forbid.
        """
        if self.config.backend_name == "cuda":
            # Here and not after loading: a kernel that is missing stops the start before gigabytes are read.
            warmup.warm_up_process(get_tensor_model_parallel_rank() == 0)
        n, k = sum(output_partition_sizes), input_size_per_partition
        shard = partition.linear_shard(
            input_size, k, output_size, output_partition_sizes, layer.tp_rank, row_copies(layer, output_partition_sizes)
        )
        layer.fp8_shard = shard
        layer.logical_widths = output_partition_sizes
        layer.input_size_per_partition = k  # read by MLA, which multiplies an identity of this size
        layer.output_size_per_partition = n
        layer.orig_dtype = params_dtype
        # Read by vLLM's loaders of merged layers' scales.
        layer.weight_block_size = [shard.rows_per_scale, shard.columns_per_scale]
        weight_loader: Callable[..., Any] | None = extra_weight_attrs.get("weight_loader")
        placement = {"input_dim": 1, "output_dim": 0, "weight_loader": weight_loader}
        weight = ModelWeightParameter(data=torch.empty(n, k, dtype=torch.float8_e4m3fn), **placement)
        if layer.weight_block_size != [BLOCK, BLOCK]:
            placement["weight_loader"] = refining_loader(weight_loader, shard, self.prefix)
        scale = BlockQuantScaleParameter(data=loader.unloaded_scale(*shard.scale_shape), **placement)
        layer.register_parameter("weight", weight)
        layer.register_parameter(self.config.scale_name, scale)
        self.config.summary.create("linear")

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        """Replace weight and scales by packed ones; the originals are freed before the next layer is packed.

        Raises:
            CheckpointError: a scale is not finite and above 0, a code is NaN, or a weight reload brought only a part of
                the layer.
        """
        if layer.weight.dim() == 3:  # vLLM calls again for layers that a weight update left alone
            return
        check_reload(layer, self.prefix)
        scale = getattr(layer, self.config.scale_name).data
        if self.dummy_weights:
            scale.abs_().clamp_min_(1e-6)
        with naming_file(self.config.model_config, f"{self.prefix.rpartition('.')[0]}."):
            weight, scale = loader.pack_linear(self.prefix, layer.weight.data, scale, layer.fp8_shard)
        replace_parameter(layer, "weight", weight)
        replace_parameter(layer, self.config.scale_name, scale)
        compat.keep_from_amx_mla(layer)
        self.config.summary.pack("linear", self.config.backend_name, get_tensor_model_parallel_rank() == 0)

    def apply(self, layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """Return x @ weight^T + bias.

        Args:
            layer: the packed layer.
            x: [..., k] bfloat16 or float16; or float8_e4m3fn codes of scale 1, as MLA's FP8 prefill passes.
            bias: [n], or None.

        Returns:
            [..., n] in x's dtype; in the model's dtype for float8 x.
        """
        shard: partition.LinearShard = layer.fp8_shard
        scale = getattr(layer, self.config.scale_name)
        if shard.k_lead:
            x = pad_front(x, shard.k_lead)
        if shard.pads_rows and bias is not None:
            bias = spread(bias, shard)
        y = ops.linear(x, layer.weight, scale, bias, shard.padded_n)
        if shard.pads_rows:
            y = torch.cat([y[..., first:last] for first, last in shard.outputs], dim=-1)
        return y.to(layer.orig_dtype) if x.dtype == torch.float8_e4m3fn else y


def row_copies(layer: torch.nn.Module, widths: list[int]) -> list[int]:
    """Return how many ranks hold the same rows of each projection: more than one for keys and values alone."""
    return [1] + [getattr(layer, "num_kv_head_replicas", 1)] * (len(widths) - 1)


def pad_front(x: torch.Tensor, columns: int) -> torch.Tensor:
    """Return x [..., k] behind so many zero columns; also for float8, which torch pads on no device."""
    if x.dtype == torch.float8_e4m3fn:
        return torch.nn.functional.pad(x.view(torch.uint8), (columns, 0)).view(x.dtype)
    return torch.nn.functional.pad(x, (columns, 0))


def spread(bias: torch.Tensor, shard: partition.LinearShard) -> torch.Tensor:
    """Return a bias [n] at the rows of the padded weight, [padded_n]; zero elsewhere."""
    padded = bias.new_zeros(shard.padded_n)
    row = 0
    for first, last in shard.outputs:
        padded[first:last] = bias[row : row + last - first]
        row += last - first
    return padded
