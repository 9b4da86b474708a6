"""The FP8 block formats that checkpoints come in: what config.json says, and how tensors are named."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from fp8_backend.errors import CheckpointError
from fp8_backend.kernels.reference import BLOCK

STOCK = "serve it without --quantization deepgemm_fp8"
Method = Literal["fp8", "compressed-tensors"]
# What follows a weight's name in the name of its scales.
SCALE_SUFFIXES: dict[Method, str] = {"fp8": "_scale_inv", "compressed-tensors": "_scale"}
# llm-compressor's FP8_BLOCK scheme: fields that decide how a weight and its activations are read, and their values.
COMPRESSED_WEIGHTS = {
    "num_bits": 8, "type": "float", "strategy": "block", "block_structure": [BLOCK, BLOCK], "symmetric": True,
    "dynamic": False,
}  # fmt: skip
COMPRESSED_ACTIVATIONS = {
    "num_bits": 8, "type": "float", "strategy": "group", "group_size": BLOCK, "symmetric": True, "dynamic": True,
}  # fmt: skip
# What a field that is absent stands for.
COMPRESSED_DEFAULTS = {"num_bits": 8, "symmetric": True, "dynamic": False}
MAX_PARTS = 32  # of a module's name, between dots, that are compared with a list; no model has half as many
# Gate, up and down of one expert, by the two sets of names in use.
EXPERT_PROJECTIONS = (("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2"))
# A list of unquantised modules may name the layer that vLLM makes of a projection and its neighbours.
MERGED_INTO = dict.fromkeys(("q_proj", "k_proj", "v_proj"), "qkv_proj") | dict.fromkeys(
    ("gate_proj", "up_proj"), "gate_up_proj"
)


@dataclass(frozen=True)
class Fp8Format:
    """How one checkpoint stores its 128x128 blocks; every format holds e4m3 codes, and weight = code * scale."""

    method: Method
    skipped: tuple[str, ...]  # modules that are not quantised, see `lists`
    power_of_two: bool = False  # the checkpoint promises scales that are powers of two

    def scale_name(self, weight: str) -> str:
        """Return the name of the scales of a weight."""
        return weight + SCALE_SUFFIXES[self.method]

    def weight_name(self, tensor: str) -> str | None:
        """Return the weight whose scales a tensor is named after, or None; KV-cache scales are nobody's."""
        suffix = SCALE_SUFFIXES[self.method]
        if not tensor.endswith(suffix) or (
            self.method == "compressed-tensors" and not tensor.endswith(".weight_scale")
        ):
            return None
        return tensor.removesuffix(suffix)

    def lists(self, module: str) -> bool:
        """Return whether the config leaves a module unquantised.

        compressed-tensors' `ignore` names modules whole, or by a pattern after `re:`. `modules_to_not_convert` is
        written by several tools: with whole names, with the end or the beginning of a name ("mlp.gate", "visual"), and
        by transformers with regular expressions, which match from the beginning of a name.
        """
        if module in self._listed or any(pattern.match(module) for pattern in self._patterns):
            return True
        if self.method == "compressed-tensors":
            return False
        parts = module.split(".", MAX_PARTS)
        runs = (".".join(parts[first : end + 1]) for end in range(len(parts)) for first in range(end + 1))
        return not self._listed.isdisjoint(runs)

    def skips(self, weight: str) -> bool:
        """Return whether the config leaves a weight unquantised: lists its module, or the one vLLM merges it into."""
        module = weight.rpartition(".")[0]
        stem, _, projection = module.rpartition(".")
        return self.lists(module) or (projection in MERGED_INTO and self.lists(f"{stem}.{MERGED_INTO[projection]}"))

    def lists_experts(self, module: str) -> bool:
        """Return whether the config leaves a layer's routed experts unquantised.

        It may list them as one, each projection of each expert, or a pattern for those.

        Args:
            module: of the experts, such as "model.layers.0.mlp.experts".

        Raises:
            CheckpointError: it lists some of the projections of an expert.
        """
        if self.lists(module) or any(entry.startswith(f"{module}.") for entry in self.skipped):
            return True
        for names in EXPERT_PROJECTIONS:
            listed = [name for name in names if self.lists(f"{module}.0.{name}")]
            if len(listed) == len(names):
                return True
            if listed:
                raise CheckpointError(
                    f"{module}: config.json leaves {listed} unquantised and no other of {list(names)}, of which vLLM "
                    "makes one layer; expected all or none; requantise the model"
                )
        return False

    @cached_property
    def _listed(self) -> frozenset[str]:
        return frozenset(entry for entry in self.skipped if _pattern(entry, self.method) is None)

    @cached_property
    def _patterns(self) -> list[re.Pattern[str]]:
        found = (_pattern(entry, self.method) for entry in self.skipped)
        return [re.compile(pattern) for pattern in found if pattern is not None]


def _pattern(entry: str, method: Method) -> str | None:
    """Return the regular expression that an entry of a list of modules is, or None if it is a name."""
    if entry.startswith("re:"):
        return entry[3:]
    return entry if method == "fp8" and not re.fullmatch(r"[\w.-]*", entry) else None


def read_format(config: dict[str, Any]) -> Fp8Format:
    """Return the FP8 format that config.json's quantization_config describes.

    Raises:
        CheckpointError: anything but block-scaled e4m3 with 128x128 blocks and dynamic activation scales.
    """
    quantization = quantization_config(config)
    if not isinstance(quantization, dict):
        raise CheckpointError(
            f"config.json: quantization_config is {quantization!r}: not an FP8 checkpoint (dtype "
            f"{config.get('torch_dtype') or config.get('dtype')}); expected quant_method 'fp8'; {STOCK}"
        )
    match quantization.get("quant_method"):
        case "fp8":
            return _read_fp8(quantization)
        case "compressed-tensors":
            return _read_compressed(quantization)
        case method:
            raise CheckpointError(
                f"config.json: quant_method is {method!r}; expected 'fp8' or 'compressed-tensors'; {STOCK}"
            )


def quantization_config(config: dict[str, Any]) -> Any:
    """Return the quantization_config of a model or of the text part of a multimodal one; None where there is none."""
    text_config = config.get("text_config")
    nested = text_config.get("quantization_config") if isinstance(text_config, dict) else None
    return config.get("quantization_config") or nested


def _read_fp8(quantization: dict[str, Any]) -> Fp8Format:
    if (block := quantization.get("weight_block_size")) is None:
        raise CheckpointError(
            f"config.json: no weight_block_size: FP8 with one scale a tensor; expected [{BLOCK}, {BLOCK}]; {STOCK}"
        )
    if block != [BLOCK, BLOCK]:
        raise CheckpointError(f"config.json: weight_block_size is {block!r}; expected [{BLOCK}, {BLOCK}]; {STOCK}")
    if (scheme := quantization.get("activation_scheme", "dynamic")) != "dynamic":
        raise CheckpointError(f"config.json: activation_scheme is {scheme!r}; expected 'dynamic'; {STOCK}")
    if (fmt := quantization.get("fmt", "e4m3")) not in ("e4m3", "float8_e4m3fn"):
        raise CheckpointError(f"config.json: fmt is {fmt!r}; expected 'e4m3'; {STOCK}")
    if (scale_fmt := quantization.get("scale_fmt")) not in (None, "ue8m0", "float"):
        raise CheckpointError(f"config.json: scale_fmt is {scale_fmt!r}; expected 'ue8m0' or none; {STOCK}")
    skipped = quantization.get("ignored_layers") or quantization.get("modules_to_not_convert") or []
    return Fp8Format("fp8", _entries("modules_to_not_convert", skipped, "fp8"), scale_fmt == "ue8m0")


def _read_compressed(quantization: dict[str, Any]) -> Fp8Format:
    groups = quantization.get("config_groups")
    if not isinstance(groups, dict) or len(groups) != 1 or not isinstance(group := next(iter(groups.values())), dict):
        raise CheckpointError(
            f"config.json: config_groups is {str(groups)[:100]}; expected one group, of FP8 blocks for all; {STOCK}"
        )
    if (targets := group.get("targets")) != ["Linear"]:
        raise CheckpointError(f"config.json: targets is {targets!r}; expected ['Linear']; {STOCK}")
    for part, expected in (("weights", COMPRESSED_WEIGHTS), ("input_activations", COMPRESSED_ACTIVATIONS)):
        given = group.get(part)
        if not isinstance(given, dict):
            raise CheckpointError(f"config.json: {part} is {given!r}; expected {expected}; {STOCK}")
        for field, value in expected.items():
            if (found := given.get(field, COMPRESSED_DEFAULTS.get(field))) != value:
                raise CheckpointError(f"config.json: {field} of {part} is {found!r}; expected {value!r}; {STOCK}")
    for field in ("output_activations", "sparsity_config", "transform_config", "kv_cache_scheme"):
        if value := group.get(field) or quantization.get(field):
            raise CheckpointError(f"config.json: {field} is {str(value)[:100]}; expected none; {STOCK}")
    skipped = _entries("ignore", quantization.get("ignore") or [], "compressed-tensors")
    return Fp8Format("compressed-tensors", skipped)


def _entries(field: str, value: Any, method: Method) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        raise CheckpointError(f"config.json: {field} is {value!r}; expected a list of names; correct it")
    for entry in value:
        try:
            re.compile(_pattern(entry, method) or "")
        except re.error as error:
            raise CheckpointError(
                f"config.json: {field} holds {entry!r} ({error}); expected a name or a pattern; correct it"
            ) from None
    return tuple(value)
