"""The bf16 twin of an FP8 checkpoint, written the plain way: what tests hold `fp8-backend dequantize` against."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from fp8_backend.kernels.reference import BLOCK, dequantize

INDEX = "model.safetensors.index.json"


def write_shards(folder: Path, shards: Iterable[tuple[str, dict[str, torch.Tensor]]]) -> None:
    """Save the shards one after the other, then the index where there is more than one."""
    weight_map: dict[str, str] = {}
    total = 0
    for name, tensors in shards:
        save_file(tensors, folder / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, name)
        total += sum(tensor.nbytes for tensor in tensors.values())
    if len(set(weight_map.values())) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        (folder / INDEX).write_text(json.dumps(index, indent=1) + "\n")


def dequantize_checkpoint(src: Path, out: Path) -> None:
    """Write the bf16 twin of an FP8 checkpoint: every weight is bf16(codes * scale), no quantization_config.

    Memory stays near two bf16 shards.
    """
    out.mkdir(parents=True, exist_ok=True)
    for path in src.iterdir():
        if path.suffix == ".json" and path.name != INDEX:
            shutil.copyfile(path, out / path.name)
    config = json.loads((src / "config.json").read_text())
    del config["quantization_config"]
    (out / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    paths = sorted(src.glob("*.safetensors"))
    homes = {name: path for path in paths for name in _tensor_names(path)}
    write_shards(out, ((path.name, dict(_dequantized(path, homes))) for path in paths))


def _tensor_names(path: Path) -> list[str]:
    with safe_open(path, "pt") as shard:
        return list(shard.keys())


def _dequantized(path: Path, homes: dict[str, Path]) -> Iterator[tuple[str, torch.Tensor]]:
    with safe_open(path, "pt") as shard:
        for name in shard.keys():
            if name.endswith("_scale_inv"):
                continue
            tensor = shard.get_tensor(name)
            if tensor.dtype == torch.float8_e4m3fn:
                scale_name = f"{name}_scale_inv"
                with safe_open(homes[scale_name], "pt") as scale_shard:
                    tensor = dequantize(tensor, scale_shard.get_tensor(scale_name), BLOCK).to(torch.bfloat16)
            yield name, tensor
