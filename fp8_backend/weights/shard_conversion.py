"""Convert one shard, a stripe of rows at a time: memory does not grow with the tensors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from fp8_backend.errors import CheckpointError
from fp8_backend.kernels.reference import BLOCK, ceil_div, dequantize
from fp8_backend.weights.block_quant import SCALE_DTYPES, ScaleKind, block_errors, quantize_blocks
from fp8_backend.weights.loader import check_scale
from fp8_backend.weights.safetensors_header import TensorInfo
from fp8_backend.weights.safetensors_writer import ShardWriter
from fp8_backend.weights.tensor_reader import ShardReader, rows_at_once

STRIPE_BYTES = 1 << 22  # of the source; float32 copies of a stripe make that about ten times
COPIED_AT_ONCE = 1 << 24
Advance = Callable[[int], None]


@dataclass(frozen=True)
class ShardTask:
    """What to make of one shard; every tensor not named is copied."""

    source: Path
    out: Path
    quantized: dict[str, str]  # weight -> name of its scales
    scale_kind: ScaleKind
    dequantized: dict[str, tuple[str, Path]]  # weight -> name of its scales, and the shard that holds them
    dropped: frozenset[str]  # scales of dequantised weights


@dataclass(frozen=True)
class LayerError:
    """What quantising one weight cost: Frobenius norms of the error over those of the weight."""

    tensor: str
    shape: tuple[int, ...]
    relative_error: float
    worst_block: tuple[int, int]  # row and column of the block, in blocks
    worst_block_error: float


def convert_shard(task: ShardTask, advance: Advance) -> list[LayerError]:
    """Write the converted shard and return the error of each weight that was quantised.

    Raises:
        CheckpointError: a weight or scale holds what cannot be converted; names file, tensor and place.
    """
    errors: list[LayerError] = []
    with ShardReader(task.source) as reader, ShardWriter(task.out, contents(task, reader.info)) as writer:
        for name, info in reader.info.items():
            if name in task.dropped:
                advance(info.bytes)
            elif name in task.quantized:
                errors.append(_quantize(task, name, reader, writer, advance))
            elif name in task.dequantized:
                _dequantize(task, name, reader, writer, advance)
            else:
                for begin in range(0, info.bytes, COPIED_AT_ONCE):
                    data = reader.read_bytes(name, begin, min(COPIED_AT_ONCE, info.bytes - begin))
                    writer.write_bytes(name, begin, data)
                    advance(len(data))
    return errors


def contents(task: ShardTask, source: dict[str, TensorInfo]) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Return dtype and shape of every tensor of the converted shard.

    Args:
        task: what to make of the shard.
        source: what its header says.
    """
    made: dict[str, tuple[str, tuple[int, ...]]] = {}
    for name, info in source.items():
        if name in task.quantized:
            n, k = info.shape
            made[name] = ("F8_E4M3", info.shape)
            made[task.quantized[name]] = (SCALE_DTYPES[task.scale_kind], (ceil_div(n, BLOCK), ceil_div(k, BLOCK)))
        elif name in task.dequantized:
            made[name] = ("BF16", info.shape)
        elif name not in task.dropped:
            made[name] = (info.dtype, info.shape)
    return made


def _quantize(task: ShardTask, name: str, reader: ShardReader, writer: ShardWriter, advance: Advance) -> LayerError:
    info = reader.info[name]
    step = rows_at_once(info, STRIPE_BYTES, BLOCK)
    grid = tuple(ceil_div(width, BLOCK) for width in info.shape)
    scales = torch.empty(grid, dtype=torch.uint8 if task.scale_kind == "e8m0" else torch.float32)
    error_norms, weight_norms = torch.empty(2, *grid, dtype=torch.float64)
    for row in range(0, info.shape[0], step):
        weight = reader.read_rows(name, row, min(step, info.shape[0] - row))
        finite = torch.isfinite(weight)
        if not finite.all():
            position = (~finite).nonzero()[0].tolist()
            raise CheckpointError(
                f"{reader.path.name}: {name}: {weight[tuple(position)]:g} at [{position[0] + row}, {position[1]}]; "
                "expected finite weights; fetch the shard again"
            )
        codes, scale = quantize_blocks(weight, task.scale_kind)
        writer.write_rows(name, row, codes)
        blocks = slice(row // BLOCK, ceil_div(row + len(weight), BLOCK))
        scales[blocks] = scale.view(scales.dtype)
        error_norms[blocks], weight_norms[blocks] = block_errors(weight, codes, scale)
        advance(weight.nbytes)
    writer.write_rows(task.quantized[name], 0, scales)
    return _layer_error(name, info.shape, error_norms, weight_norms)


def _layer_error(name: str, shape: tuple[int, ...], errors: torch.Tensor, norms: torch.Tensor) -> LayerError:
    relative = (errors / norms.clamp_min(1e-300)).sqrt()
    worst = int(relative.argmax()) if relative.numel() else 0
    k_blocks = max(1, relative.shape[1])
    return LayerError(
        tensor=name,
        shape=shape,
        relative_error=float((errors.sum() / norms.sum().clamp_min(1e-300)).sqrt()),
        worst_block=(worst // k_blocks, worst % k_blocks),
        worst_block_error=float(relative.flatten()[worst]) if relative.numel() else 0.0,
    )


def _dequantize(task: ShardTask, name: str, reader: ShardReader, writer: ShardWriter, advance: Advance) -> None:
    scale_name, scale_home = task.dequantized[name]
    with ShardReader(scale_home) as scale_reader:
        scale = scale_reader.read(scale_name).float()
    check_scale(scale_home.name, scale_name, scale)
    info = reader.info[name]
    *experts, n, k = info.shape
    step = rows_at_once(info, STRIPE_BYTES, BLOCK) if not experts else 1
    for row in range(0, info.shape[0], step):
        codes = reader.read_rows(name, row, min(step, info.shape[0] - row))
        if experts:
            weight = dequantize(codes.view(n, k), scale[row], BLOCK).view(1, n, k)
        else:
            weight = dequantize(codes, scale[row // BLOCK : ceil_div(row + len(codes), BLOCK)], BLOCK)
        writer.write_rows(name, row, weight.to(torch.bfloat16))
        advance(codes.nbytes)
