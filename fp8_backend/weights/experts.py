"""From a checkpoint's experts to packed ones of one rank."""

from __future__ import annotations

from collections.abc import Callable

import torch

from fp8_backend.errors import UnsupportedError
from fp8_backend.kernels import expert_weights
from fp8_backend.kernels.reference import BLOCK
from fp8_backend.weights import loader
from fp8_backend.weights.partition import ExpertPart

# Called by vLLM as (parameter, tensor of the checkpoint, name, shard_id=, expert_id=, return_success=).
WeightLoader = Callable[..., bool | None]


def load_part(
    target: torch.Tensor, source: torch.Tensor, shard: str, part: ExpertPart, rows_per_element: int = 1
) -> None:
    """Copy this rank's part of one projection of one expert to its place among the zero rows.

    Args:
        target: of the expert: w13 [2 * padded, hidden] or w2 [hidden, padded], or their scales.
        source: of the whole projection, as the checkpoint holds it.
        shard: "w1" (gate), "w3" (up) or "w2" (down).
        part: which rows of w1 and w3, which columns of w2.
        rows_per_element: 1 for codes, 128 for scales.
    """
    dim = 1 if shard == "w2" else 0
    if shard != "w2":
        half = target.shape[0] // 2
        target = target.narrow(0, 0 if shard == "w1" else half, half)
    if rows_per_element == BLOCK:
        source = source.narrow(dim, part.first_block, target.shape[dim])
    else:
        source = source.narrow(dim, part.start, part.rows)
        target = target.narrow(dim, part.offset, part.rows)
    target.copy_(source)


def clear_padding(w13: torch.Tensor, w2: torch.Tensor, part: ExpertPart) -> None:
    """Set the rows of w13 and the columns of w2 that no tensor of the checkpoint fills to zero codes, in place.

    Args:
        w13: [experts, 2 * padded, hidden] float8_e4m3fn.
        w2: [experts, hidden, padded] float8_e4m3fn.
        part: what is filled.
    """
    first, last = part.offset, part.offset + part.rows
    for half in w13.view(torch.uint8).chunk(2, dim=1):
        half[:, :first] = 0
        half[:, last:] = 0
    columns = w2.view(torch.uint8)
    columns[:, :, :first] = 0
    columns[:, :, last:] = 0


def part_loader(local_expert: Callable[[int], int], part: ExpertPart, rows_per_element: int) -> WeightLoader:
    """Return a parameter's weight loader that cuts within blocks, which vLLM's own cannot.

    Args:
        local_expert: from a global expert id to its position on this rank, -1 where it is another's.
        part: of this rank.
        rows_per_element: 1 for codes, 128 for scales.
    """

    def load(
        param: torch.nn.Parameter,
        loaded_weight: torch.Tensor,
        weight_name: str,
        shard_id: str,
        expert_id: int,
        return_success: bool = False,
    ) -> bool | None:
        if loaded_weight.dim() != 2:
            raise UnsupportedError(
                f"{weight_name}: got {tuple(loaded_weight.shape)}; experts of one tensor for all, whose intermediate "
                f"size on one rank is no multiple of {BLOCK}, are not supported; use --enable-expert-parallel"
            )
        expert = local_expert(expert_id)
        if expert >= 0:
            load_part(param.data[expert], loaded_weight, shard_id, part, rows_per_element)
        return expert >= 0 if return_success else None

    load.supports_moe_loading = True  # type: ignore[attr-defined]  # vLLM's Llama 4 loader asks
    return load


def pack_experts(layer: str, name: str, weight: torch.Tensor, scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the weights and scales of a layer's experts in the kernels' layout, once both are checked.

    Args:
        layer: its name, for errors.
        name: of the scales in the layer, likewise.
        weight: [num_groups, n, k] float8_e4m3fn, overwritten (see `expert_weights.pack_experts`).
        scale: [num_groups, ceil(n / 128), ceil(k / 128)] float32.

    Returns:
        weight: [num_groups, ceil(k / 128), align(n, 8), 128] float8_e4m3fn.
        scale: [num_groups, ceil(k / 128), align(ceil(n / 128), 4) + 4] float32.

    Raises:
        CheckpointError: see `loader.check_scale` and `loader.check_codes`.
    """
    loader.check_scale(layer, name, scale)
    loader.check_codes(layer, f"{name.partition('_')[0]}_weight", weight)
    _, n, k = weight.shape
    return expert_weights.pack_experts(weight), expert_weights.pack_expert_scales(scale, n, k)
