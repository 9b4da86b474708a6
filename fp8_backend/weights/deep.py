"""Read every scale and every code of a checkpoint and say what no quantiser writes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from fp8_backend.weights.checkpoint import FP8, SCALE_DTYPES
from fp8_backend.weights.files import Checkpoint
from fp8_backend.weights.formats import Fp8Format
from fp8_backend.weights.tensor_reader import ShardReader, rows_at_once

READ_AT_ONCE = 1 << 26  # bytes of codes
# A scale is a block's largest magnitude / 448. Trained weights stay far below 448, so a scale above 1 is likely the
# reciprocal of one; below 1e-12 the whole block is under 1e-9 and only a lost tensor or an epsilon looks like that.
LARGEST_SCALE, SMALLEST_SCALE = 1.0, 1e-12
E4M3_NAN = 0x7F  # with either sign: e4m3fn has no other


@dataclass(frozen=True)
class Finding:
    """One thing wrong with one tensor; `fatal` if it cannot be served, otherwise only suspicious."""

    tensor: str
    file: str
    what: str
    fatal: bool


@dataclass(frozen=True)
class ScaleRange:
    """Smallest and largest scale of one weight that are numbers."""

    smallest: float
    largest: float


def deep_bytes(checkpoint: Checkpoint, fp8_format: Fp8Format) -> int:
    """Return how many bytes `check_values` reads."""
    return sum(info.bytes for name, info in checkpoint.info.items() if _is_read(name, info.dtype, fp8_format))


def check_values(
    checkpoint: Checkpoint, fp8_format: Fp8Format, advance: Callable[[int], None], prefix: str = ""
) -> tuple[list[Finding], dict[str, ScaleRange]]:
    """Read every FP8 weight and its scales, one piece at a time.

    Args:
        checkpoint: whose headers passed.
        fp8_format: how its scales are named.
        advance: is called with the bytes read since the last call.
        prefix: of the names of the tensors to read; all by default.

    Returns:
        findings, in the order of files and offsets; and the range of each weight's scales.
    """
    findings: list[Finding] = []
    ranges: dict[str, ScaleRange] = {}
    homes = {home for name, home in checkpoint.home.items() if name.startswith(prefix)}
    for shard in [shard for shard in checkpoint.shards if shard in homes]:
        with ShardReader(shard) as reader:
            for name, info in reader.info.items():
                if not name.startswith(prefix) or not _is_read(name, info.dtype, fp8_format):
                    continue
                if info.dtype == FP8:
                    findings += _check_codes(reader, name, shard, advance)
                else:
                    scale = reader.read(name).float()
                    advance(info.bytes)
                    usable = scale[torch.isfinite(scale)]
                    if usable.numel():
                        weight = str(fp8_format.weight_name(name))
                        ranges[weight] = ScaleRange(float(usable.min()), float(usable.max()))
                    findings += [
                        Finding(name, shard.name, what, fatal)
                        for what, fatal in _check_scale(reader, name, scale, fp8_format.power_of_two)
                    ]
    return findings, ranges


def _is_read(name: str, dtype: str, fp8_format: Fp8Format) -> bool:
    return dtype == FP8 or (fp8_format.weight_name(name) is not None and dtype in SCALE_DTYPES)


def _check_codes(reader: ShardReader, name: str, shard: Path, advance: Callable[[int], None]) -> Iterator[Finding]:
    info = reader.info[name]
    step = rows_at_once(info, READ_AT_ONCE, 1)
    count, first = 0, list[int]()
    for row in range(0, info.shape[0] if info.shape else 0, step):
        codes = reader.read_rows(name, row, min(step, info.shape[0] - row)).view(torch.uint8)
        bad = (codes & E4M3_NAN) == E4M3_NAN
        if found := int(bad.sum()):
            if not count:
                position = bad.nonzero()[0].tolist()
                first = [position[0] + row, *position[1:]]
            count += found
        advance(codes.numel())
    if count:
        where = f"{first} (byte {reader.offset_of(name, first)})"
        yield Finding(name, shard.name, f"code NaN at {where}, {count} such in {info.bytes}", fatal=True)


def _check_scale(reader: ShardReader, name: str, scale: torch.Tensor, power_of_two: bool) -> Iterator[tuple[str, bool]]:
    positive = torch.isfinite(scale) & (scale > 0)
    mantissa, _ = torch.frexp(scale)
    kinds = (
        ("NaN", torch.isnan(scale), True),
        ("Inf", torch.isinf(scale), True),
        ("zero", scale == 0, True),
        ("negative", torch.isfinite(scale) & (scale < 0), True),
        (f"above {LARGEST_SCALE:g}: a reciprocal?", positive & (scale > LARGEST_SCALE), False),
        (f"below {SMALLEST_SCALE:g}: a lost block?", positive & (scale < SMALLEST_SCALE), False),
        ("no power of two, and scale_fmt is ue8m0", positive & (mantissa != 0.5) & power_of_two, False),
    )
    for what, bad, fatal in kinds:
        if count := int(bad.sum()):
            position = bad.nonzero()[0].tolist()
            where = f"{position} (byte {reader.offset_of(name, position)})"
            yield f"scale {what} ({scale[tuple(position)]:g} at {where}, {count} such in {scale.numel()})", fatal
