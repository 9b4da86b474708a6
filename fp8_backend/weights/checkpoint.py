"""What a checkpoint holds, and whether its FP8 weights can be served exactly; checked before any weight is loaded."""

from __future__ import annotations

import re
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import torch

from fp8_backend.errors import CheckpointError
from fp8_backend.kernels.reference import BLOCK, ceil_div
from fp8_backend.weights.completeness import check_complete
from fp8_backend.weights.files import Checkpoint, open_checkpoint, read_config
from fp8_backend.weights.formats import Fp8Format, read_format
from fp8_backend.weights.safetensors_header import TensorInfo
from fp8_backend.weights.tensor_reader import ShardReader

FP8 = "F8_E4M3"
# What converts to the kernels' float32 without rounding: DeepSeek stores F32, Qwen BF16 or F16; F8_E8M0 holds powers
# of two.
SCALE_DTYPES = ("F32", "BF16", "F16", "F8_E8M0")
# What other formats keep beside a weight.
FOREIGN_SCALES = ("weight_scale", "weight_scale_inv", "input_scale", "activation_scale")
# Layers that vLLM stacks along n into one, in this order: one method serves the stack, so all are FP8 or none is.
MERGED = (
    ("q_proj", "k_proj", "v_proj"),
    ("gate_proj", "up_proj"),
    ("w1", "w3"),
    ("q_a_proj", "kv_a_proj_with_mqa"),
)


# Input and output embeddings, under the names in use.
EMBEDDINGS = ("lm_head", "embed_tokens", "word_embeddings", "embed_out", "wte")


@dataclass(frozen=True)
class CheckpointSummary:
    """Counts of a checkpoint that passed every check."""

    architecture: str
    shards: int
    tensors: int
    layers: int
    fp8_weights: int
    fp8_bytes: int
    total_bytes: int


def verify_checkpoint(folder: Path) -> CheckpointSummary:
    """Check that a checkpoint is complete and that its FP8 weights can be served exactly.

    Reads the config, the index, every shard's header and the values of the scales (1/16384 of the weights); no weight.

    Args:
        folder: holds config.json and safetensors, with or without an index.

    Raises:
        CheckpointError: names the tensor, file or config field at fault, its value, the limit and the next step.
    """
    config = read_config(folder)
    fp8_format = read_format(config)
    checkpoint = open_checkpoint(folder, config)
    check_headers(checkpoint, fp8_format)
    _check_scale_values(checkpoint, fp8_format)
    fp8 = {name: info for name, info in checkpoint.info.items() if info.dtype == FP8}
    return CheckpointSummary(
        architecture=checkpoint.architecture,
        shards=len(checkpoint.shards),
        tensors=len(checkpoint.info),
        layers=len({match[1] for name in fp8 if (match := re.search(r"\blayers\.(\d+)\.", name))}),
        fp8_weights=len(fp8),
        fp8_bytes=sum(info.bytes for info in fp8.values()),
        total_bytes=sum(info.bytes for info in checkpoint.info.values()),
    )


def check_headers(checkpoint: Checkpoint, fp8_format: Fp8Format) -> None:
    """Check everything that names, shapes and dtypes tell; reads no tensor.

    Raises:
        CheckpointError: see `verify_checkpoint`.
    """
    fp8 = {name: info for name, info in checkpoint.info.items() if info.dtype == FP8}
    if not fp8:
        raise CheckpointError(
            f"{checkpoint.folder.name}: config.json says FP8, and none of {len(checkpoint.info)} tensors is {FP8}; "
            "serve it without --quantization deepgemm_fp8"
        )
    _check_weights(checkpoint, fp8, fp8_format)
    _check_merged_dtypes(checkpoint, fp8)
    check_complete(checkpoint)


def _check_weights(checkpoint: Checkpoint, fp8: dict[str, TensorInfo], fp8_format: Fp8Format) -> None:
    for name, weight in fp8.items():
        _check_kind(name)
        scale_name = fp8_format.scale_name(name)
        scale = checkpoint.info.get(scale_name)
        if scale is None:
            raise CheckpointError(
                f"{name}: {FP8} {list(weight.shape)} without {scale_name}; expected one scale a 128x128 block; "
                "fetch the missing tensor or re-export the checkpoint"
            )
        _check_scale_form(name, weight, scale_name, scale)
        if fp8_format.skips(name):
            raise CheckpointError(
                f"{name}: {FP8}, and config.json lists {name.rpartition('.')[0]} as not quantised; expected one of "
                "both; take it off the list, or re-export the checkpoint"
            )
        # Nothing of vLLM's layers has such a name: it ends with a bare KeyError.
        for other in FOREIGN_SCALES:
            if (extra := name.removesuffix("weight") + other) != scale_name and extra in checkpoint.info:
                raise CheckpointError(
                    f"{extra}: beside {scale_name}; expected that one alone, activations being scaled as they come; "
                    "re-export the checkpoint"
                )
    fp8_patterns = {re.sub(r"\d+", "*", name) for name in fp8}
    for name, info in checkpoint.info.items():
        weight_name = fp8_format.weight_name(name)
        if weight_name is not None and weight_name not in fp8:
            beside = checkpoint.info.get(weight_name)
            raise CheckpointError(
                f"{name}: a scale of {f'a {beside.dtype} weight' if beside else 'no weight'}; expected {weight_name} "
                f"as {FP8}; re-export the checkpoint"
            )
        # vLLM would cast such a weight to e4m3 and leave its scales unset.
        is_like_fp8 = info.dtype != FP8 and re.sub(r"\d+", "*", name) in fp8_patterns
        if is_like_fp8 and not fp8_format.skips(name):
            raise CheckpointError(
                f"{name}: {info.dtype}, and the same weight of other layers is {FP8}; expected {FP8}, or its module in "
                "modules_to_not_convert; add it there"
            )


def _check_kind(name: str) -> None:
    """Refuse codes where vLLM builds an unquantised layer: it would take them for weights."""
    module = name.removesuffix(".weight")
    if module.rpartition(".")[2] in EMBEDDINGS or module.endswith("shared_head.head"):
        raise CheckpointError(
            f"{name}: {FP8}; expected BF16: vLLM builds embeddings and lm_head unquantised for this format; export "
            "again without quantising them"
        )


def _check_scale_form(name: str, weight: TensorInfo, scale_name: str, scale: TensorInfo) -> None:
    if len(weight.shape) not in (2, 3):
        raise CheckpointError(f"{name}: {FP8} of shape {list(weight.shape)}; expected [n, k] or [experts, n, k]")
    *experts, n, k = weight.shape
    expected = (*experts, ceil_div(n, BLOCK), ceil_div(k, BLOCK))
    if scale.shape != expected:
        raise CheckpointError(
            f"{scale_name}: shape {list(scale.shape)}; expected {list(expected)}, one scale a 128x128 block of "
            f"{list(weight.shape)}; re-export the checkpoint"
        )
    if scale.dtype not in SCALE_DTYPES:
        raise CheckpointError(
            f"{scale_name}: dtype {scale.dtype}; expected one of {', '.join(SCALE_DTYPES)}; re-export it"
        )


def _check_merged_dtypes(checkpoint: Checkpoint, fp8: dict[str, TensorInfo]) -> None:
    for group in MERGED:
        for first in [name for name in checkpoint.info if name.endswith(f".{group[0]}.weight")]:
            stem = first.removesuffix(f"{group[0]}.weight")
            members = [name for part in group if (name := f"{stem}{part}.weight") in checkpoint.info]
            if len({name in fp8 for name in members}) > 1:
                dtypes = ", ".join(f"{name} {checkpoint.info[name].dtype}" for name in members)
                raise CheckpointError(f"{dtypes}: merged into one layer by vLLM; expected one dtype; re-export")


def _check_scale_values(checkpoint: Checkpoint, fp8_format: Fp8Format) -> None:
    by_shard: dict[Path, list[str]] = defaultdict(list)
    for name, shard in checkpoint.home.items():
        if fp8_format.weight_name(name) is not None:
            by_shard[shard].append(name)
    for shard, names in by_shard.items():
        with ShardReader(shard) as reader:
            for name in names:
                scale = reader.read(name).float()
                bad = ~(torch.isfinite(scale) & (scale > 0))
                if bad.any():
                    position = bad.nonzero()[0].tolist()
                    raise CheckpointError(
                        f"{name}: {scale[tuple(position)]:g} at {position}, {int(bad.sum())} such in {scale.numel()}; "
                        "expected every scale finite and > 0; fetch or re-export the shard "
                        f"{shard.name} (byte {reader.offset_of(name, position)})"
                    )
