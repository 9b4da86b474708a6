"""How a checkpoint's block scales reach a layer whose part cuts through blocks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from fp8_backend.errors import UnsupportedError
from fp8_backend.kernels.reference import BLOCK
from fp8_backend.weights.loader import refine_scale
from fp8_backend.weights.partition import LinearShard


def refining_loader(load: Callable[..., Any], shard: LinearShard, prefix: str) -> Callable[..., Any]:
    """Return a loader of scales on the grid of `LinearShard.scale_shape`.

    vLLM computes which scales a rank gets from the layer's `weight_block_size`. That of a refined layer is the finer
    one, so the numbers come out exact, also where one tensor holds several projections: the checkpoint's scales are
    repeated to the same grid before vLLM cuts them. The loader holds no parameter, since vLLM's weight reload makes new
    ones and keeps their loaders.

    Args:
        load: vLLM's own.
        shard: what this rank holds.
        prefix: of the layer, for errors.
    """

    def refined(param: torch.nn.Parameter, loaded_weight: torch.Tensor, *place: Any, **named: Any) -> Any:
        part = place[0] if place else named.get("loaded_shard_id")
        if part is None or isinstance(part, tuple):
            check_seams(prefix, [shard.whole_widths[index] for index in part or range(len(shard.rows))])
        scale = refine_scale(loaded_weight, 0, shard.rows_per_scale)
        return load(param, refine_scale(scale, 1, shard.columns_per_scale), *place, **named)

    return refined


def check_seams(prefix: str, widths: list[int]) -> None:
    """Refuse one tensor of several projections that meet within a block, whose scale belongs to both.

    Raises:
        UnsupportedError: names the layer and the row.
    """
    row = 0
    for width in widths[:-1]:
        row += width
        if row % BLOCK:
            raise UnsupportedError(
                f"{prefix}: stored as one tensor whose projections meet at row {row}, within a block of {BLOCK}, "
                "which is not supported; store its projections as tensors of their own"
            )
