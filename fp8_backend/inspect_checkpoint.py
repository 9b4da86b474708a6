"""`fp8-backend inspect MODEL`: what a checkpoint holds and what the kernels take of it."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path

from fp8_backend.progress import Progress
from fp8_backend.weights.deep import Finding, check_values, deep_bytes
from fp8_backend.weights.files import open_checkpoint, read_config
from fp8_backend.weights.inventory import Inventory, Kind, kind_of, take_inventory

FINDINGS_SHOWN = 20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what the command takes."""
    parser.add_argument("model", type=Path, help="folder with config.json and safetensors")
    parser.add_argument("--tp", type=_ranks, default=1, metavar="N", help="judge layers split over N ranks")
    parser.add_argument("--deep", action="store_true", help="read every scale and code, not only the files' headers")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")


def run(arguments: argparse.Namespace) -> int:
    """Print what was found; 1 if the checkpoint cannot be served with these kernels at this --tp, else 0."""
    checkpoint = open_checkpoint(arguments.model, read_config(arguments.model))
    inventory, fp8_format = take_inventory(checkpoint, arguments.tp)
    findings: list[Finding] | None = None
    if arguments.deep and fp8_format is not None:
        with Progress("reading", deep_bytes(checkpoint, fp8_format)) as progress:
            findings, ranges = check_values(checkpoint, fp8_format, progress.advance)
        for weight, scales in ranges.items():
            if weight in checkpoint.info and (kind := kind_of(inventory, weight, checkpoint)):
                kind.widen(scales.smallest, scales.largest)
    is_servable = (
        inventory.problem is None
        and not any(kind.refused for kind in inventory.kinds)
        and not any(finding.fatal for finding in findings or ())
    )
    print(_as_json(inventory, findings, is_servable) if arguments.json else _as_text(inventory, findings, is_servable))
    return 0 if is_servable else 1


def _as_json(inventory: Inventory, findings: list[Finding] | None, is_servable: bool) -> str:
    value = asdict(inventory) | {"servable": is_servable}
    for kind in value["kinds"]:
        kind["shards"] = sorted(kind["shards"])
    value["findings"] = None if findings is None else [asdict(finding) for finding in findings]
    return json.dumps(value, indent=1)


def _as_text(inventory: Inventory, findings: list[Finding] | None, is_servable: bool) -> str:
    lines = [
        f"{inventory.folder}: {inventory.architecture}, {inventory.bytes / 1e9:.2f} GB in {inventory.shards} shards, "
        f"{inventory.tensors} tensors; {inventory.fp8_bytes / 1e9:.2f} GB are FP8 codes "
        f"(quant_method {inventory.method})",
        "",
        *_table(inventory),
    ]
    for why in dict.fromkeys(kind.refused for kind in inventory.kinds if kind.refused):
        patterns = [kind.pattern for kind in inventory.kinds if kind.refused == why]
        lines += ["", f"not taken at --tp {inventory.tp}: {', '.join(patterns)}", f"  {why}"]
    if inventory.problem:
        lines += ["", f"refused: {inventory.problem}"]
    if findings is not None:
        fatal = sum(finding.fatal for finding in findings)
        lines += ["", f"every scale and code read: {fatal} broken tensors, {len(findings) - fatal} suspicious ones"]
        lines += [
            f"  {'broken' if finding.fatal else 'suspicious'}: {finding.file}: {finding.tensor}: {finding.what}"
            for finding in sorted(findings, key=lambda finding: not finding.fatal)[:FINDINGS_SHOWN]
        ]
        if len(findings) > FINDINGS_SHOWN:
            lines.append(f"  ... and {len(findings) - FINDINGS_SHOWN} more (--json lists all)")
    verdict = "can" if is_servable else "cannot"
    flags = "--quantization deepgemm_fp8" + (f" --tensor-parallel-size {inventory.tp}" if inventory.tp > 1 else "")
    return "\n".join([*lines, "", f"{verdict} be served with {flags}"])


def _table(inventory: Inventory) -> list[str]:
    heads = ("tensors", "count", "shape", "dtype", "scales", "scale range", "MB", "shards", f"tp={inventory.tp}")
    rows = [heads, *(_row(kind) for kind in inventory.kinds)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(heads))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def _row(kind: Kind) -> tuple[str, ...]:
    scales, scale_range, verdict = "-", "-", "vLLM's own"
    if kind.scale_dtype and kind.block and kind.scale_shape:
        scales = f"{_extents(kind.scale_shape)} {kind.scale_dtype} a {_extents(kind.block)} block"
        scale_range = "(--deep)"
        verdict = "no" if kind.refused else "yes"
    if kind.smallest_scale is not None:
        scale_range = f"{kind.smallest_scale:.2e}..{kind.largest_scale:.2e}"
    return (
        kind.pattern,
        str(kind.count),
        _extents(kind.shape),
        kind.dtype,
        scales,
        scale_range,
        f"{kind.bytes / 1e6:.1f}",
        str(len(kind.shards)),
        verdict,
    )


def _extents(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape)) or "scalar"


def _ranks(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a whole number of at least 1")
    return int(text)
