"""What a checkpoint holds, and whether its FP8 weights can be served exactly; checked before any weight is loaded."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from fp8_backend.errors import CheckpointError
from fp8_backend.kernels.reference import BLOCK, ceil_div
from fp8_backend.weights.safetensors_header import TensorInfo, read_header

INDEX = "model.safetensors.index.json"
FP8 = "F8_E4M3"
SCALE_SUFFIX = "_scale_inv"
# What converts to the kernels' float32 without rounding. DeepSeek stores F32, Qwen BF16 or F16.
SCALE_DTYPES = ("F32", "BF16", "F16")
# Layers that vLLM stacks along n into one, in this order. One grid of block scales covers the stack, so every layer but
# the last must end on a block boundary.
MERGED = (
    ("q_proj", "k_proj", "v_proj"),
    ("gate_proj", "up_proj"),
    ("w1", "w3"),
    ("q_a_proj", "kv_a_proj_with_mqa"),
)


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


@dataclass(frozen=True)
class _Tensors:
    """Every tensor of the checkpoint and the shard that holds it."""

    info: dict[str, TensorInfo]
    home: dict[str, Path]


def verify_checkpoint(folder: Path) -> CheckpointSummary:
    """Check that a checkpoint is complete and that its FP8 weights can be served exactly.

    Reads the config, the index, every shard's header and the values of the scales (1/16384 of the weights); no weight.

    Args:
        folder: holds config.json and safetensors, with or without an index.

    Raises:
        CheckpointError: names the tensor, file or config field at fault, its value, the limit and the next step.
    """
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: not a folder; name one that holds config.json and safetensors")
    config = _read_json(folder / "config.json")
    skipped = check_quantization_config(config)
    shards, index = _find_shards(folder)
    tensors = _read_tensors(shards, index)
    fp8 = {name: info for name, info in tensors.info.items() if info.dtype == FP8}
    if not fp8:
        raise CheckpointError(
            f"{folder.name}: config.json says FP8, and none of {len(tensors.info)} tensors is {FP8}; serve it without "
            "--quantization deepgemm_fp8"
        )
    _check_weights(tensors, fp8, skipped)
    _check_merged_widths(tensors, fp8)
    _check_scale_values(tensors)
    return CheckpointSummary(
        architecture=str((config.get("architectures") or ["unknown"])[0]),
        shards=len(shards),
        tensors=len(tensors.info),
        layers=len({match[1] for name in fp8 if (match := re.search(r"\blayers\.(\d+)\.", name))}),
        fp8_weights=len(fp8),
        fp8_bytes=sum(info.end - info.begin for info in fp8.values()),
        total_bytes=sum(info.end - info.begin for info in tensors.info.values()),
    )


def check_quantization_config(config: dict[str, Any]) -> list[str]:
    """Check config.json's quantization_config and return its modules_to_not_convert.

    Raises:
        CheckpointError: anything but block-scaled e4m3 with 128x128 blocks and dynamic activation scales.
    """
    text_config = config.get("text_config")
    nested = text_config.get("quantization_config") if isinstance(text_config, dict) else None
    quantization = config.get("quantization_config") or nested
    stock = "serve it without --quantization deepgemm_fp8"
    if not isinstance(quantization, dict):
        raise CheckpointError(
            f"config.json: quantization_config is {quantization!r}: not an FP8 checkpoint (dtype "
            f"{config.get('torch_dtype') or config.get('dtype')}); expected quant_method 'fp8'; {stock}"
        )
    if (method := quantization.get("quant_method")) != "fp8":
        raise CheckpointError(f"config.json: quant_method is {method!r}; expected 'fp8'; {stock}")
    if (block := quantization.get("weight_block_size")) is None:
        raise CheckpointError(
            f"config.json: no weight_block_size: FP8 with one scale a tensor; expected [{BLOCK}, {BLOCK}]; {stock}"
        )
    if block != [BLOCK, BLOCK]:
        raise CheckpointError(f"config.json: weight_block_size is {block!r}; expected [{BLOCK}, {BLOCK}]; {stock}")
    if (scheme := quantization.get("activation_scheme", "dynamic")) != "dynamic":
        raise CheckpointError(f"config.json: activation_scheme is {scheme!r}; expected 'dynamic'; {stock}")
    if (fmt := quantization.get("fmt", "e4m3")) not in ("e4m3", "float8_e4m3fn"):
        raise CheckpointError(f"config.json: fmt is {fmt!r}; expected 'e4m3'; {stock}")
    skipped = quantization.get("ignored_layers") or quantization.get("modules_to_not_convert") or []
    if not isinstance(skipped, list) or not all(isinstance(name, str) for name in skipped):
        raise CheckpointError(
            f"config.json: modules_to_not_convert is {skipped!r}; expected a list of names; correct it"
        )
    return skipped


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path}: absent; expected a complete checkpoint; fetch the file") from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not valid JSON ({error}); fetch the file again") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: a JSON {type(value).__name__}; expected an object; fetch the file again")
    return value


def _find_shards(folder: Path) -> tuple[list[Path], dict[str, str]]:
    """Return the shards vLLM would load, and the index's weight_map (empty where there is no index)."""
    if not (folder / INDEX).exists():
        shards = sorted(folder.glob("*.safetensors"))
        if not shards:
            raise CheckpointError(f"{folder}: holds no *.safetensors file; fetch the weights")
        return shards, {}
    weight_map = _read_json(folder / INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(
            f"{INDEX}: weight_map is {str(weight_map)[:100]}; expected tensor names and files; fetch it again"
        )
    for tensor, shard in weight_map.items():
        # The index comes with the download: a name must not lead out of the folder.
        if not isinstance(shard, str) or Path(shard).name != shard:
            raise CheckpointError(
                f"{INDEX}: {tensor} is in {shard!r}; expected a file of the same folder; fetch it again"
            )
        if not (folder / shard).is_file():
            raise CheckpointError(f"{shard}: absent, and the index places {tensor} in it; fetch the missing shard")
    return sorted({folder / shard for shard in weight_map.values()}), weight_map


def _read_tensors(shards: list[Path], index: dict[str, str]) -> _Tensors:
    tensors = _Tensors({}, {})
    for shard in shards:
        for name, info in read_header(shard).items():
            if name in tensors.home:
                raise CheckpointError(
                    f"{name}: in both {tensors.home[name].name} and {shard.name}; expected once; delete the stale one"
                )
            tensors.info[name] = info
            tensors.home[name] = shard
    for name, shard_name in index.items():
        if name not in tensors.home or tensors.home[name].name != shard_name:
            raise CheckpointError(
                f"{name}: not in {shard_name}, where the index places it; fetch shard and index of one version"
            )
    return tensors


def _check_weights(tensors: _Tensors, fp8: dict[str, TensorInfo], skipped: list[str]) -> None:
    for name, weight in fp8.items():
        scale = tensors.info.get(name + SCALE_SUFFIX)
        if scale is None:
            raise CheckpointError(
                f"{name}: {FP8} {list(weight.shape)} without {name}{SCALE_SUFFIX}; expected one scale a 128x128 block; "
                "fetch the missing tensor or re-export the checkpoint"
            )
        _check_scale_form(name, weight, scale)
    fp8_patterns = {re.sub(r"\d+", "*", name) for name in fp8}
    for name, info in tensors.info.items():
        weight_name = name.removesuffix(SCALE_SUFFIX)
        if weight_name != name and weight_name not in fp8:
            beside = tensors.info.get(weight_name)
            raise CheckpointError(
                f"{name}: a scale of {f'a {beside.dtype} weight' if beside else 'no weight'}; expected {weight_name} "
                f"as {FP8}; re-export the checkpoint"
            )
        # vLLM would cast such a weight to e4m3 and leave its scales unset.
        is_like_fp8 = info.dtype != FP8 and re.sub(r"\d+", "*", name) in fp8_patterns
        if is_like_fp8 and not any(entry in name for entry in skipped):
            raise CheckpointError(
                f"{name}: {info.dtype}, and the same weight of other layers is {FP8}; expected {FP8}, or its module in "
                "modules_to_not_convert; add it there"
            )


def _check_scale_form(name: str, weight: TensorInfo, scale: TensorInfo) -> None:
    if len(weight.shape) not in (2, 3):
        raise CheckpointError(f"{name}: {FP8} of shape {list(weight.shape)}; expected [n, k] or [experts, n, k]")
    *experts, n, k = weight.shape
    expected = (*experts, ceil_div(n, BLOCK), ceil_div(k, BLOCK))
    if scale.shape != expected:
        raise CheckpointError(
            f"{name}{SCALE_SUFFIX}: shape {list(scale.shape)}; expected {list(expected)}, one scale a 128x128 block of "
            f"{list(weight.shape)}; re-export the checkpoint"
        )
    if scale.dtype not in SCALE_DTYPES:
        raise CheckpointError(
            f"{name}{SCALE_SUFFIX}: dtype {scale.dtype}; expected one of {', '.join(SCALE_DTYPES)}; re-export it"
        )


def _check_merged_widths(tensors: _Tensors, fp8: dict[str, TensorInfo]) -> None:
    for group in MERGED:
        for first in [name for name in tensors.info if name.endswith(f".{group[0]}.weight")]:
            stem = first.removesuffix(f"{group[0]}.weight")
            members = [name for part in group if (name := f"{stem}{part}.weight") in tensors.info]
            if len({name in fp8 for name in members}) > 1:
                dtypes = ", ".join(f"{name} {tensors.info[name].dtype}" for name in members)
                raise CheckpointError(f"{dtypes}: merged into one layer by vLLM; expected one dtype; re-export")
            for name in members[:-1]:
                width = tensors.info[name].shape[0]
                if name in fp8 and width % BLOCK:
                    raise CheckpointError(
                        f"{name}: {width} rows, merged by vLLM before {members[-1]}; expected a multiple of {BLOCK} so "
                        "that block scales line up; serve this model without --quantization deepgemm_fp8"
                    )


def _check_scale_values(tensors: _Tensors) -> None:
    by_shard: dict[Path, list[str]] = defaultdict(list)
    for name, shard in tensors.home.items():
        if name.endswith(SCALE_SUFFIX):
            by_shard[shard].append(name)
    for shard, names in by_shard.items():
        with safe_open(shard, "pt") as file:
            for name in names:
                scale = file.get_tensor(name).float()
                bad = ~(torch.isfinite(scale) & (scale > 0))
                if bad.any():
                    position = bad.nonzero()[0].tolist()
                    raise CheckpointError(
                        f"{name}: {scale[tuple(position)]:g} at {position}, {int(bad.sum())} such in {scale.numel()}; "
                        "expected every scale finite and > 0; fetch or re-export the shard " + shard.name
                    )
