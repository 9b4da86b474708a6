"""What a checkpoint holds, one row for each kind of layer, as `fp8-backend inspect` shows it."""

from __future__ import annotations

import re
from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

from fp8_backend.errors import CheckpointError
from fp8_backend.kernels.reference import BLOCK
from fp8_backend.weights import shards
from fp8_backend.weights.checkpoint import FP8, check_headers
from fp8_backend.weights.files import Checkpoint
from fp8_backend.weights.formats import Fp8Format, quantization_config, read_format


@dataclass
class Kind:
    """Tensors whose names differ in numbers alone and whose shapes and dtypes agree; scales count with their weight."""

    pattern: str
    dtype: str
    shape: tuple[int, ...]
    scale_dtype: str | None = None
    scale_shape: tuple[int, ...] | None = None
    block: tuple[int, int] | None = None
    count: int = 0
    bytes: int = 0
    shards: set[str] = field(default_factory=set)
    smallest_scale: float | None = None
    largest_scale: float | None = None
    refused: str | None = None  # why the kernels do not take it at the --tp asked for

    def widen(self, smallest: float, largest: float) -> None:
        """Take the scales of one more weight into the range."""
        self.smallest_scale = smallest if self.smallest_scale is None else min(self.smallest_scale, smallest)
        self.largest_scale = largest if self.largest_scale is None else max(self.largest_scale, largest)


@dataclass
class Inventory:
    """Everything headers tell, and whether it can be served."""

    folder: str
    architecture: str
    method: str | None  # of the quantization_config
    tp: int
    shards: int
    tensors: int
    bytes: int
    fp8_bytes: int
    problem: str | None  # the first reason for which `--quantization deepgemm_fp8` refuses the whole checkpoint
    kinds: list[Kind]


def take_inventory(checkpoint: Checkpoint, tp: int) -> tuple[Inventory, Fp8Format | None]:
    """Group the tensors of a checkpoint and judge each FP8 layer at a tensor-parallel size; reads no tensor."""
    fp8_format, problem = None, None
    try:
        fp8_format = read_format(checkpoint.config)
        check_headers(checkpoint, fp8_format)
    except CheckpointError as error:
        problem = str(error)
    kinds = _group(checkpoint, fp8_format)
    for layer in shards.fp8_layers(checkpoint):
        kind_keys = [_key(f"{layer.stem}{member}.weight", checkpoint) for member in layer.members]
        rows = [kinds[key] for key in kind_keys if key in kinds and kinds[key].refused is None]
        # Every layer is judged: the same projection may be merged with others elsewhere.
        if rows and (why := shards.reason(layer, tp, checkpoint.config)):
            for row in rows:
                row.refused = why
    for kind in kinds.values():
        if kind.dtype == FP8 and len(kind.shape) != 2 and tp > 1:
            kind.refused = f"{len(kind.shape)} dimensions: how vLLM splits such a tensor over {tp} ranks is not known"
    quantization = quantization_config(checkpoint.config)
    inventory = Inventory(
        folder=str(checkpoint.folder),
        architecture=checkpoint.architecture,
        method=str(quantization.get("quant_method")) if isinstance(quantization, dict) else None,
        tp=tp,
        shards=len(checkpoint.shards),
        tensors=len(checkpoint.info),
        bytes=sum(info.bytes for info in checkpoint.info.values()),
        fp8_bytes=sum(info.bytes for info in checkpoint.info.values() if info.dtype == FP8),
        problem=problem,
        kinds=sorted(kinds.values(), key=lambda kind: (kind.dtype != FP8, -kind.bytes)),
    )
    return inventory, fp8_format


def kind_of(inventory: Inventory, weight: str, checkpoint: Checkpoint) -> Kind | None:
    """Return the row a weight is counted in."""
    pattern, dtype, shape = _key(weight, checkpoint)[:3]
    same = (kind for kind in inventory.kinds if (kind.pattern, kind.dtype, kind.shape) == (pattern, dtype, shape))
    return next(same, None)


def _key(name: str, checkpoint: Checkpoint) -> tuple[Any, ...]:
    info = checkpoint.info[name]
    return re.sub(r"\d+", "*", name), info.dtype, info.shape


def _group(checkpoint: Checkpoint, fp8_format: Fp8Format | None) -> dict[tuple[Any, ...], Kind]:
    kinds: dict[tuple[Any, ...], Kind] = {}
    scales: dict[str, str] = defaultdict(str)
    if fp8_format is not None:
        for name in checkpoint.info:
            weight = fp8_format.weight_name(name)
            if weight in checkpoint.info:
                scales[weight] = name
    counted = set(scales.values())
    for name, info in checkpoint.info.items():
        if name in counted:
            continue
        key = _key(name, checkpoint)
        kind = kinds.setdefault(key, Kind(key[0], info.dtype, info.shape))
        kind.count += 1
        kind.bytes += info.bytes
        kind.shards.add(checkpoint.home[name].name)
        if name in scales:
            scale = checkpoint.info[scales[name]]
            kind.bytes += scale.bytes
            kind.scale_dtype, kind.scale_shape, kind.block = scale.dtype, scale.shape, (BLOCK, BLOCK)
    return kinds
