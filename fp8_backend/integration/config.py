"""The quantisation config behind `--quantization deepgemm_fp8`."""

from __future__ import annotations

import functools
import logging
from typing import Any, NamedTuple

import torch
from vllm.config import get_current_vllm_config
from vllm.distributed import get_tensor_model_parallel_rank
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.fused_moe import RoutedExperts
from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import UnquantizedFusedMoEMethod
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase
from vllm.model_executor.layers.quantization.fp8 import Fp8Config
from vllm.platforms import current_platform

from fp8_backend import settings
from fp8_backend.errors import CheckpointError, UnsupportedError
from fp8_backend.integration import attention, compat, fusion
from fp8_backend.integration.files import CheckedFiles
from fp8_backend.integration.plugin import NAME
from fp8_backend.integration.summary import LoadSummary
from fp8_backend.kernels.backend import capability_reason
from fp8_backend.kernels.reference import BLOCK
from fp8_backend.weights.formats import SCALE_SUFFIXES, Fp8Format, Method, read_format

BLOCK_SHAPE = [BLOCK, BLOCK]
EXPECTED = f"{NAME} serves checkpoints with quant_method 'fp8' or 'compressed-tensors' and blocks {BLOCK_SHAPE}"

logger = logging.getLogger("vllm.fp8_backend.integration.config")


class Backend(NamedTuple):
    """Whose kernels compute: "cuda" or "reference" are ours, "vllm" is vLLM's own FP8 path; and why not ours."""

    name: str
    reason: str = ""


@functools.cache
def select_backend() -> Backend:
    """Choose the kernels for this process from its device and the settings."""
    if settings.load().kernels == "reference" or current_platform.is_cpu():
        return Backend("reference")
    if not current_platform.is_cuda():
        device = current_platform.device_type or "unknown"
        return Backend("vllm", f"device {device!r}; the kernels need an NVIDIA Hopper GPU, the torch reference a CPU")
    capability = current_platform.get_device_capability()
    reason = "unknown compute capability" if capability is None else capability_reason(tuple(capability)[:2])
    return Backend("cuda") if reason is None else Backend("vllm", f"{current_platform.get_device_name()}: {reason}")


@functools.cache
def _warn_once(message: str) -> None:
    logger.warning(message)


class DeepGemmFp8Config(Fp8Config):
    """What a checkpoint's `quantization_config` says, and which method serves each layer.

    Raises:
        CheckpointError: the checkpoint is not FP8 with one scale per 128x128 block.
        SettingsError: an `FP8_BACKEND_*` variable is unknown or malformed.
    """

    def __init__(
        self,
        is_checkpoint_fp8_serialized: bool = False,
        activation_scheme: str = "dynamic",
        ignored_layers: list[str] | None = None,
        weight_block_size: list[int] | None = None,
        method: Method = "fp8",
    ) -> None:
        settings.load()
        if not is_checkpoint_fp8_serialized:
            # vLLM calls the class without arguments when config.json has no quantization_config.
            raise CheckpointError(
                f"config.json has no quantization_config: the checkpoint is not quantised; {EXPECTED}; "
                "use the model's FP8 version, or drop the flag"
            )
        super().__init__(
            is_checkpoint_fp8_serialized=True,
            activation_scheme=activation_scheme,
            ignored_layers=ignored_layers,
            weight_block_size=weight_block_size,
        )
        self.method = method
        self.scale_name = f"weight{SCALE_SUFFIXES[method]}"  # vLLM finds a parameter by its name in the checkpoint
        self.summary = LoadSummary()
        self.files = CheckedFiles()
        self.model_config: Any = None  # vLLM's, of the model that this config's layers make
        self.served: attention.Served | None = None  # of its engine

    @property
    def backend_name(self) -> str:
        """Return "cuda" or "reference": whose kernels serve the layers that use ours."""
        return select_backend().name

    @classmethod
    def get_name(cls) -> str:
        """Return the name users give."""
        return NAME

    @classmethod
    def get_supported_act_dtypes(cls) -> list[torch.dtype]:
        """Return the dtypes `--dtype` may take."""
        return [torch.bfloat16, torch.float16]

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> DeepGemmFp8Config:
        """Read a checkpoint's `quantization_config`."""
        fp8_format = read_format({"quantization_config": config})
        if store_dtype := config.get("store_dtype"):
            raise CheckpointError(
                f"config.json: store_dtype is {store_dtype!r}; expected none; {EXPECTED}; drop the flag"
            )
        return cls(
            is_checkpoint_fp8_serialized=True,
            activation_scheme="dynamic",
            ignored_layers=list(fp8_format.skipped),
            weight_block_size=BLOCK_SHAPE,
            method=fp8_format.method,
        )

    def maybe_update_config(self, model_name: str, hf_config: Any = None, revision: str | None = None) -> None:
        """Check device and files; vLLM calls this once an engine, in its first process, before anything is loaded."""
        if message := compat.untested_version():
            _warn_once(message)
        backend = select_backend()
        if backend.name == "vllm" and settings.load().strict:
            raise UnsupportedError(f"{backend.reason}; unset FP8_BACKEND_STRICT to use vLLM's FP8 path")
        # Where files are yet to be fetched, scales are checked when a layer is packed, as they are in any case.
        if (checked := self.files.check(model_name, revision)) is not None:
            logger.info(
                "checkpoint is complete: %s, %d FP8 weights (%.2f GB) in %d shards",
                checked.architecture,
                checked.fp8_weights,
                checked.fp8_bytes / 1e9,
                checked.shards,
            )

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> QuantizeMethodBase | None:
        """Return the method of a layer, or None where vLLM's default is meant."""
        if self.model_config is None:
            vllm_config = get_current_vllm_config()
            self.model_config = vllm_config.model_config
            self.served = attention.served_by(vllm_config)
            if select_backend().name != "vllm":
                fusion.install(vllm_config)
        if isinstance(layer, LinearBase):
            return self._skipped_method(prefix) if self.is_skipped(prefix) else self._linear_method(layer, prefix)
        if isinstance(layer, RoutedExperts):
            if self.is_skipped(prefix):
                return UnquantizedFusedMoEMethod(layer.moe_config)
            return self._moe_method(layer, prefix)
        if isinstance(layer, Attention) and select_backend().name == "cuda":
            attention.adopt(layer, self.served, get_tensor_model_parallel_rank() == 0)
        return super().get_quant_method(layer, prefix)

    def get_cache_scale_mapper(self) -> Any:
        """Return vLLM's own; it asks as it begins to load, before the first tensor, also when it loads again."""
        if self.model_config is not None and compat.is_reloading():
            self.files.check_reload(self.model_config)
        return super().get_cache_scale_mapper()

    def is_skipped(self, prefix: str) -> bool:
        """Return whether the checkpoint leaves a layer unquantised.

        Raises:
            CheckpointError: it does so with some of the projections that vLLM merges into this layer.
        """
        # Not the one that was read: vLLM has translated the entries to its own names by now.
        checkpoint = Fp8Format(self.method, tuple(self.ignored_layers))
        stem, _, name = prefix.rpartition(".")
        if checkpoint.lists(prefix) or (self.method == "fp8" and compat.is_skipped(self, prefix)):
            return True
        if name == "experts":
            return checkpoint.lists_experts(prefix)
        parts = self.packed_modules_mapping.get(name, [name])
        skipped = [checkpoint.lists(f"{stem}.{part}".lstrip(".")) for part in parts]
        if any(skipped) != all(skipped):
            raise CheckpointError(
                f"{prefix}: config.json leaves some of {parts} unquantised, which vLLM merges; expected all or none; "
                "requantise the model"
            )
        return all(skipped)

    def _skipped_method(self, prefix: str) -> QuantizeMethodBase:
        # The linear in front of experts takes longer to start than to run.
        if not prefix.endswith(".gate") or select_backend().name == "vllm":
            return UnquantizedLinearMethod()
        from fp8_backend.integration.router import RouterLinearMethod

        return RouterLinearMethod()

    def _linear_method(self, layer: LinearBase, prefix: str) -> QuantizeMethodBase | None:
        backend = select_backend()
        if backend.name == "vllm":
            return self._stock_method(layer, prefix, "linear", backend.reason)
        from fp8_backend.integration.linear import DeepGemmFp8LinearMethod

        return DeepGemmFp8LinearMethod(self, prefix)

    def _moe_method(self, layer: RoutedExperts, prefix: str) -> QuantizeMethodBase | None:
        backend = select_backend()
        if backend.name == "vllm":
            return self._stock_method(layer, prefix, "MoE layer", backend.reason)
        from fp8_backend.integration.moe import DeepGemmFp8MoEMethod

        return DeepGemmFp8MoEMethod(self, layer, prefix)

    def _stock_method(self, layer: torch.nn.Module, prefix: str, kind: str, reason: str) -> QuantizeMethodBase | None:
        if settings.load().strict:
            raise UnsupportedError(
                f"{prefix}: {reason}; unset FP8_BACKEND_STRICT to let vLLM's FP8 path serve this {kind}"
            )
        # One line for a GPU that is not ours, whatever kinds of layers the model has.
        whole = reason == select_backend().reason
        _warn_once(f"{'this model' if whole else f'each {kind}'} uses vLLM's own FP8 path: {reason}")
        self.summary.fall_back(kind, reason)
        return super().get_quant_method(layer, prefix)
