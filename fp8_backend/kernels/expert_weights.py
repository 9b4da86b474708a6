"""How the weights of one layer's experts lie in memory: each expert as a dense weight is packed, one after the other.

A weight [num_groups, n, k] becomes [num_groups, k_blocks, align(n, 8), 128] and its scales [num_groups, k_blocks,
align(n_blocks, 4) + 4]; see layout.py. Packing takes place where the weight lies if nothing has to be padded: the peak
of memory at load is one expert, not one layer.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fp8_backend.errors import ArgumentError
from fp8_backend.kernels import layout
from fp8_backend.kernels.reference import BLOCK, ceil_div


def pack_experts(weight: torch.Tensor) -> torch.Tensor:
    """Return the experts' weights in the kernels' layout, complete in memory; expert by expert, on their device.

    Args:
        weight: [num_groups, n, k] float8_e4m3fn. Where it is contiguous, n % 8 == 0 and k % 128 == 0, it is overwritten
            and the result shares its memory.

    Returns:
        [num_groups, ceil(k / 128), align(n, 8), 128] float8_e4m3fn.

    Raises:
        ArgumentError: another dtype or number of dimensions.
    """
    if weight.dim() != 3 or weight.dtype != torch.float8_e4m3fn:
        raise ArgumentError(
            f"weight: got {tuple(weight.shape)} {weight.dtype}; expected [num_groups, n, k] float8_e4m3fn; pass the "
            "checkpoint's codes"
        )
    num_groups, n, k = weight.shape
    shape = layout.packed_weight_shape(n, k)
    if shape[0] * shape[1] * shape[2] == n * k and weight.is_contiguous():
        packed = weight.view(num_groups, *shape)
    else:
        packed = torch.empty(num_groups, *shape, dtype=weight.dtype, device=weight.device)
    for source, target in zip(weight, packed, strict=True):
        target.copy_(layout.arrange_weight(source))
    return layout.complete(packed)


def pack_expert_scales(scale: torch.Tensor, n: int, k: int) -> torch.Tensor:
    """Return the experts' block scales in the kernels' layout, complete in memory.

    Args:
        scale: [num_groups, ceil(n / 128), ceil(k / 128)] float32.
        n: rows of an expert's weight.
        k: its columns.

    Returns:
        [num_groups, ceil(k / 128), align(ceil(n / 128), 4) + 4] float32; the padding is zero.

    Raises:
        ArgumentError: another shape or dtype.
    """
    return layout.complete(arrange_expert_scales(scale, n, k))


def arrange_expert_scales(scale: torch.Tensor, n: int, k: int) -> torch.Tensor:
    """Return what `pack_expert_scales` does, by work queued on the current stream."""
    blocks = (ceil_div(n, BLOCK), ceil_div(k, BLOCK))
    if scale.dim() != 3 or tuple(scale.shape[1:]) != blocks or scale.dtype != torch.float32:
        raise ArgumentError(
            f"scale: got {list(scale.shape)} {scale.dtype}; expected [num_groups, {blocks[0]}, {blocks[1]}] float32 "
            f"for weights [{n}, {k}]; pass one scale per 128x128 block"
        )
    padding = layout.packed_scale_shape(n, k)[1] - blocks[0]
    return torch.nn.functional.pad(scale.transpose(1, 2), (0, padding)).contiguous()


@dataclass(frozen=True)
class UnpackedCodes:
    """The weights [n, k] of packed experts, unpacked one at a time when indexed."""

    packed: torch.Tensor
    n: int
    k: int

    def __getitem__(self, group: int) -> torch.Tensor:
        return layout.unpack_weight(self.packed[group], self.n, self.k)


@dataclass(frozen=True)
class UnpackedScales:
    """The scales [ceil(n / 128), ceil(k / 128)] of packed experts, unpacked one at a time when indexed."""

    packed: torch.Tensor
    n: int

    def __getitem__(self, group: int) -> torch.Tensor:
        return layout.unpack_scale(self.packed[group], self.n)
