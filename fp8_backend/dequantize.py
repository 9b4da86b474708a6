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
from fp8_backend.weights.conversion import Conversion, convert
from fp8_backend.weights.files import open_checkpoint, read_config
from fp8_backend.weights.formats import read_format
from fp8_backend.weights.shard_conversion import ShardTask


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what the command takes."""
    add_folders(parser, "FP8 checkpoint with 128x128 blocks")


def run(arguments: argparse.Namespace) -> int:
    """Write bf16(code * scale) for every FP8 weight; everything else is copied."""
    config = read_config(arguments.source)
    fp8_format = read_format(config)
    checkpoint = open_checkpoint(arguments.source, config)
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
    conversion = Conversion(
        checkpoint=checkpoint,
        out=arguments.out,
        tasks=[
            ShardTask(shard, arguments.out / shard.name, {}, "float32", weights[shard], frozenset(scales[shard]))
            for shard in checkpoint.shards
        ],
        config=_without_quantization(config),
        options={"command": "dequantize"},
    )
    began = time.monotonic()
    converted = convert(conversion, arguments.workers)
    seconds = time.monotonic() - began
    if arguments.json:
        print(json.dumps(asdict(converted) | {"seconds": round(seconds, 2)}, indent=1))
    else:
        print(f"{arguments.out}: {summary(converted, seconds)}")
    return 0


def _without_quantization(config: dict[str, object]) -> dict[str, object]:
    result = {key: value for key, value in config.items() if key != "quantization_config"}
    if isinstance(text := result.get("text_config"), dict):
        result["text_config"] = {key: value for key, value in text.items() if key != "quantization_config"}
    return result
