"""`fp8-backend dequantize SRC OUT`: an FP8 block checkpoint back to bf16."""

from __future__ import annotations

import argparse
import json
import time
from collections import defaultdict
from dataclasses import asdict
from pathlib import Path

from fp8_backend.quantize import add_folders, summary
from fp8_backend.weights.checkpoint import FP8, check_headers
from fp8_backend.weights.conversion import Conversion, Converted, convert
from fp8_backend.weights.files import open_checkpoint, read_config
from fp8_backend.weights.formats import read_format
from fp8_backend.weights.shard_conversion import ShardTask


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what the command takes."""
    add_folders(parser, "FP8 checkpoint with 128x128 blocks")


def run(arguments: argparse.Namespace) -> int:
    """Write bf16(code * scale) for every FP8 weight; everything else is copied."""
    began = time.monotonic()
    converted = dequantize_checkpoint(arguments.source, arguments.out, arguments.workers)
    seconds = time.monotonic() - began
    if arguments.json:
        print(json.dumps(asdict(converted) | {"seconds": round(seconds, 2)}, indent=1))
    else:
        print(f"{arguments.out}: {summary(converted, seconds)}")
    return 0


def dequantize_checkpoint(source: Path, out: Path, workers: int = 1) -> Converted:
    """Write the bf16 twin of an FP8 checkpoint: every weight is bf16(code * scale), config.json says no quantisation.

    Raises:
        CheckpointError: the source is broken or not FP8 with 128x128 blocks, or the target cannot take it.
    """
    config = read_config(source)
    fp8_format = read_format(config)
    checkpoint = open_checkpoint(source, config)
    check_headers(checkpoint, fp8_format)
    weights: dict[Path, dict[str, tuple[str, Path]]] = defaultdict(dict)
    for name, info in checkpoint.info.items():
        if info.dtype == FP8:
            scale = fp8_format.scale_name(name)
            weights[checkpoint.home[name]][name] = (scale, checkpoint.home[scale])
    scales: dict[Path, set[str]] = defaultdict(set)
    for name in checkpoint.info:
        if fp8_format.weight_name(name) is not None:
            scales[checkpoint.home[name]].add(name)
    tasks = [
        ShardTask(shard, out / shard.name, {}, "float32", weights[shard], frozenset(scales[shard]))
        for shard in checkpoint.shards
    ]
    options = {"command": "dequantize"}
    return convert(Conversion(checkpoint, out, tasks, _without_quantization(config), options), workers)


def _without_quantization(config: dict[str, object]) -> dict[str, object]:
    result = {key: value for key, value in config.items() if key != "quantization_config"}
    if isinstance(text := result.get("text_config"), dict):
        result["text_config"] = {key: value for key, value in text.items() if key != "quantization_config"}
    return result
