"""From a loaded layer's parameters to packed ones."""

from __future__ import annotations

import torch

from fp8_backend.errors import CheckpointError
from fp8_backend.kernels import layout
from fp8_backend.kernels.reference import BLOCK
from fp8_backend.weights.partition import LinearShard

CODES_AT_ONCE = 1 << 26  # bytes; bounds the copy that looking for NaN needs
PADDED_AT_ONCE = 16  # k-blocks; bounds the copy that padding needs to 2048 columns of one layer


def unloaded_scale(*shape: int) -> torch.Tensor:
    """Return float32 scales that `check_scale` refuses until a checkpoint has filled them: a missing tensor shows."""
    return torch.full(shape, float("nan"), dtype=torch.float32)


def check_scale(layer: str, tensor: str, scale: torch.Tensor) -> None:
    """Refuse scales no FP8 quantiser writes.

    Args:
        layer: name of the layer in the model.
        tensor: name of the scales in the layer.
        scale: any shape, float32, on any device.

    Raises:
        CheckpointError: a scale is NaN (also: was never loaded), infinite, zero or negative; names the first.
    """
    bad = ~(torch.isfinite(scale) & (scale > 0))
    if not bad.any():
        return
    index = tuple(bad.nonzero()[0].tolist())
    value = float(scale[index])
    missing = " (in the checkpoint, or missing from it)" if value != value else ""
    raise CheckpointError(
        f"{layer}.{tensor}{list(index)} is {value}{missing}; a block's scale must be finite and above 0 "
        f"({int(bad.sum())} of {scale.numel()} are not); get the checkpoint again, or requantise this layer"
    )


def check_codes(layer: str, tensor: str, weight: torch.Tensor) -> None:
    """Refuse codes that are NaN, 0x7f with either sign: one makes every answer NaN that it has a part in.

    Args:
        layer: name of the layer in the model.
        tensor: name of the weight in the layer.
        weight: any shape, float8_e4m3fn, on any device.

    Raises:
        CheckpointError: names the first.
    """
    codes = weight.view(torch.uint8).reshape(-1)
    pieces = codes.split(CODES_AT_ONCE)
    if not pieces or not torch.stack([_holds_nan(piece) for piece in pieces]).any():
        return
    bad = (codes & 0x7F) == 0x7F
    index = torch.unravel_index(bad.nonzero()[0, 0], weight.shape)
    raise CheckpointError(
        f"{layer}.{tensor}{[int(each) for each in index]} is nan; a code must be a number ({int(bad.sum())} of "
        f"{codes.numel()} are not); get the checkpoint again (fp8-backend inspect MODEL --deep names the file)"
    )


def _holds_nan(codes: torch.Tensor) -> torch.Tensor:
    """Return whether uint8 codes hold 0x7f or 0xff, 8 at once: adding 1 carries into the sign of no other code."""
    if codes.numel() % 8 or codes.storage_offset() % 8:
        return ((codes & 0x7F) == 0x7F).any()
    words = codes.view(torch.int64) & 0x7F7F7F7F7F7F7F7F
    return words.add_(0x0101010101010101).bitwise_and_(-0x7F7F7F7F7F7F7F80).any()


def refine_scale(scale: torch.Tensor, dim: int, per_scale: int) -> torch.Tensor:
    """Return a checkpoint's scales on a finer grid: each repeated for the 128 / per_scale parts of its block.

    Args:
        scale: [.., blocks, ..], any dtype scales are stored in; they become float32, exactly.
        dim: along which blocks are cut.
        per_scale: rows or columns of the weight that share a scale of the result; divides 128.
    """
    return scale.float().repeat_interleave(BLOCK // per_scale, dim)


def pack_linear(
    layer: str, weight: torch.Tensor, scale: torch.Tensor, shard: LinearShard
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a linear's weight and scales in the kernels' layout, once their scales are checked.

    Args:
        layer: its name, for errors.
        weight: [shard.n, shard.k] float8_e4m3fn.
        scale: shard.scale_shape float32.
        shard: what this rank holds; n and k below are `shard.padded_n` and `shard.padded_k`.

    Returns:
        weight: [ceil(k / 128), align(n, 8), 128] float8_e4m3fn.
        scale: [ceil(k / 128), align(ceil(n / 128), 4) + 4] float32.

    Raises:
        CheckpointError: see `check_scale` and `check_codes`.
    """
    sound = _sound(weight, scale)
    n, k = shard.padded_n, shard.padded_k
    packed_scale = layout.arrange_scale(_spread_scale(scale, shard), n, k)
    if (n, k) == (shard.n, shard.k) and n % layout.ROW_ALIGNMENT == 0 and k % BLOCK == 0:
        packed = layout.arrange_weight(weight)
    else:
        packed = torch.empty(layout.packed_weight_shape(n, k), dtype=weight.dtype, device=weight.device)
        for first in range(0, len(packed), PADDED_AT_ONCE):
            blocks = packed[first : first + PADDED_AT_ONCE]
            blocks.copy_(layout.arrange_weight(_padded(weight, shard, first * BLOCK, len(blocks) * BLOCK)))
    if not sound:
        check_scale(layer, "weight_scale_inv", scale)
        check_codes(layer, "weight", weight)
    return layout.complete(packed), packed_scale


def _sound(weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Return whether `check_scale` and `check_codes` accept a layer, as a bool on its device: nothing waits for it."""
    if not weight.numel() or not scale.numel():
        return torch.tensor(True)
    lowest, highest = torch.aminmax(scale)  # both NaN if one is
    pieces = weight.view(torch.uint8).reshape(-1).split(CODES_AT_ONCE)
    with_nan = [_holds_nan(piece) for piece in pieces]
    return torch.stack([lowest > 0, highest < torch.inf, *(~each for each in with_nan)]).all()


def _spread_scale(scale: torch.Tensor, shard: LinearShard) -> torch.Tensor:
    """Return the scale of each 128x128 block of the padded weight."""
    rows, columns = shard.scale_rows(), shard.scale_columns()
    if (rows, columns) == (list(range(scale.shape[0])), list(range(scale.shape[1]))):
        return scale
    at = torch.tensor(rows, device=scale.device)[:, None], torch.tensor(columns, device=scale.device)[None, :]
    return scale[at]


def _padded(weight: torch.Tensor, shard: LinearShard, start: int, size: int) -> torch.Tensor:
    """Return columns [start, start + size) of the padded weight; those beyond its end are zero."""
    padded = torch.zeros(shard.padded_n, size, dtype=torch.uint8, device=weight.device)
    held = weight.view(torch.uint8)[:, max(start - shard.k_lead, 0) : start - shard.k_lead + size]
    column, row = max(shard.k_lead - start, 0), 0
    for first, last in shard.outputs:
        padded[first:last, column : column + held.shape[1]] = held[row : row + last - first]
        row += last - first
    return padded.view(weight.dtype)
