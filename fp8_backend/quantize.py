"""`fp8-backend quantize SRC OUT`: a bf16 checkpoint to FP8 with one scale a 128x128 block."""

from __future__ import annotations

import argparse
import json
import os
import re
import time
from collections import defaultdict
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fp8_backend.errors import CheckpointError
from fp8_backend.kernels.reference import BLOCK
from fp8_backend.weights.block_quant import ScaleKind
from fp8_backend.weights.conversion import Conversion, Converted, convert
from fp8_backend.weights.files import Checkpoint, open_checkpoint, read_config
from fp8_backend.weights.formats import (
    COMPRESSED_ACTIVATIONS,
    COMPRESSED_WEIGHTS,
    Fp8Format,
    Method,
    quantization_config,
)
from fp8_backend.weights.selection import select, unquantised_modules
from fp8_backend.weights.shard_conversion import LayerError, ShardTask

WORST_SHOWN = 5
MAX_WORKERS = 8  # disks saturate before


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what the command takes."""
    add_folders(parser, "bfloat16, float16 or float32 checkpoint")
    parser.add_argument("--keep", type=_pattern, metavar="REGEX", help="leave weights whose names it finds as they are")
    parser.add_argument(
        "--scales",
        choices=("float32", "ue8m0", "e8m0"),
        default="float32",
        help="ue8m0: powers of two in float32, as DeepSeek-V3.1; e8m0: powers of two in one byte (default: float32)",
    )
    parser.add_argument(
        "--format", choices=("fp8", "compressed-tensors"), default="fp8", help="names and config (default: fp8)"
    )


def add_folders(parser: argparse.ArgumentParser, source: str) -> None:
    """Declare what quantize and dequantize share."""
    parser.add_argument("source", type=Path, metavar="SRC", help=source)
    parser.add_argument("out", type=Path, metavar="OUT", help="folder to write; a killed run is continued")
    cores = len(os.sched_getaffinity(0))
    default = min(MAX_WORKERS, cores)
    parser.add_argument(
        "--workers", type=_workers, default=default, metavar="N", help=f"processes (default: {default})"
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of text")


def run(arguments: argparse.Namespace) -> int:
    """Convert and print what it cost."""
    checkpoint = open_checkpoint(arguments.source, read_config(arguments.source))
    if quantization := quantization_config(checkpoint.config):
        raise CheckpointError(
            f"{arguments.source}: has a quantization_config ({str(quantization)[:100]}); expected an unquantised "
            "checkpoint; dequantize it first"
        )
    chosen, kept = select(checkpoint, arguments.keep)
    if not chosen:
        reasons = "; ".join(dict.fromkeys(kept.values()))
        raise CheckpointError(f"{arguments.source}: none of {len(kept)} tensors is a weight to quantise ({reasons})")
    began = time.monotonic()
    converted = convert(plan(checkpoint, chosen, kept, arguments), arguments.workers)
    seconds = time.monotonic() - began
    print(_as_json(converted, kept, seconds) if arguments.json else _as_text(converted, kept, arguments.out, seconds))
    return 0


def plan(checkpoint: Checkpoint, chosen: list[str], kept: dict[str, str], arguments: argparse.Namespace) -> Conversion:
    """Return the conversion the command line asks for."""
    modules = unquantised_modules(checkpoint, kept)
    if arguments.format == "compressed-tensors":  # where experts are named by their projections alone
        modules = [rf"re:{re.escape(name)}\..*" if name.endswith(".experts") else name for name in modules]
    names = Fp8Format(arguments.format, tuple(modules))
    by_shard: dict[Path, dict[str, str]] = defaultdict(dict)
    for name in chosen:
        by_shard[checkpoint.home[name]][name] = names.scale_name(name)
    return Conversion(
        checkpoint=checkpoint,
        out=arguments.out,
        tasks=[
            ShardTask(shard, arguments.out / shard.name, by_shard[shard], arguments.scales, {}, frozenset())
            for shard in checkpoint.shards
        ],
        config=checkpoint.config | {"quantization_config": written_config(arguments.format, arguments.scales, modules)},
        options={
            "command": "quantize",
            "--scales": arguments.scales,
            "--format": arguments.format,
            "--keep": arguments.keep.pattern if arguments.keep else None,
        },
    )


def written_config(method: Method, scales: ScaleKind, modules: list[str]) -> dict[str, Any]:
    """Return the quantization_config of the result."""
    if method == "compressed-tensors":
        group = {
            "targets": ["Linear"],
            "weights": COMPRESSED_WEIGHTS,
            "input_activations": COMPRESSED_ACTIVATIONS,
            "output_activations": None,
        }
        return {
            "quant_method": method,
            "format": "float-quantized",
            "quantization_status": "compressed",
            "config_groups": {"group_0": group},
            "ignore": modules,
        }
    return {
        "quant_method": method,
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        **({} if scales == "float32" else {"scale_fmt": "ue8m0"}),
        "weight_block_size": [BLOCK, BLOCK],
        "modules_to_not_convert": modules,
    }


def _as_json(converted: Converted, kept: dict[str, str], seconds: float) -> str:
    value = asdict(converted) | {"seconds": round(seconds, 2), "kept": kept}
    return json.dumps(value, indent=1)


def _as_text(converted: Converted, kept: dict[str, str], out: Path, seconds: float) -> str:
    groups: dict[str, list[LayerError]] = defaultdict(list)
    for error in converted.errors:
        groups[re.sub(r"\d+", "*", error.tensor)].append(error)
    width = max(len(pattern) for pattern in groups)
    lines = [f"{'weights':<{width}}  count  relative error: mean  largest  worst block"]
    for pattern, errors in groups.items():
        mean = sum(error.relative_error for error in errors) / len(errors)
        largest = max(error.relative_error for error in errors)
        worst = max(error.worst_block_error for error in errors)
        lines.append(f"{pattern:<{width}}  {len(errors):5}  {mean:20.5f}  {largest:.5f}  {worst:11.5f}")
    lines.append("\nworst blocks")
    for error in sorted(converted.errors, key=lambda error: -error.worst_block_error)[:WORST_SHOWN]:
        row, column = (BLOCK * index for index in error.worst_block)
        lines.append(f"  {error.worst_block_error:.5f}  {error.tensor}[{row}:{row + BLOCK}, {column}:{column + BLOCK}]")
    lines.append("\nkept as they were")
    reasons: dict[str, list[str]] = defaultdict(list)
    for name, reason in kept.items():
        reasons[reason].append(name)
    for reason, names in reasons.items():
        patterns = list(dict.fromkeys(re.sub(r"\d+", "*", name) for name in names))
        lines.append(f"  {reason}: {len(names)} tensors ({', '.join(patterns)})")
    lines.append(f"\n{out}: {summary(converted, seconds)}")
    return "\n".join(lines)


def summary(converted: Converted, seconds: float) -> str:
    """Return bytes and time in words."""
    resumed = f", {converted.resumed_shards} shards were there already" if converted.resumed_shards else ""
    read, written = converted.bytes_read / 1e9, converted.bytes_written / 1e9
    return f"{read:.2f} GB became {written:.2f} GB in {seconds:.1f} s{resumed}"


def _pattern(text: str) -> re.Pattern[str]:
    try:
        return re.compile(text)
    except re.error as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not a regular expression: {error}") from None


def _workers(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a whole number of at least 1")
    return int(text)
