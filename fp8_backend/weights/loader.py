"""From a loaded layer's parameters to packed ones."""

from __future__ import annotations

import torch

from fp8_backend.errors import CheckpointError
from fp8_backend.kernels import layout


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


def pack_linear(layer: str, weight: torch.Tensor, scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a linear's weight and scales in the kernels' layout, once their scales are checked.

    Args:
        layer: its name, for errors.
        weight: [n, k] float8_e4m3fn.
        scale: [ceil(n / 128), ceil(k / 128)] float32.

    Returns:
        weight: [ceil(k / 128), align(n, 8), 128] float8_e4m3fn.
        scale: [ceil(k / 128), align(ceil(n / 128), 4) + 4] float32.

    Raises:
        CheckpointError: see `check_scale`.
    """
    check_scale(layer, "weight_scale_inv", scale)
    n, k = weight.shape
    return layout.pack_weight(weight), layout.pack_scale(scale, n, k)
