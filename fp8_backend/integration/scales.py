"""Parameters that vLLM's loaders fill with a layer's block scales."""

from __future__ import annotations

from typing import Any

import torch
from vllm.model_executor.parameter import BlockQuantScaleParameter

from fp8_backend.weights.loader import refine_scale
from fp8_backend.weights.partition import LinearShard


class RefinedScaleParameter(BlockQuantScaleParameter):
    """Scales of a part that cuts through 128x128 blocks, on the grid of `LinearShard.scale_shape`.

    vLLM computes which scales a rank gets from the layer's `weight_block_size`. That of a refined layer is the finer
    one, so the numbers come out exact; the checkpoint's scales are repeated to the same grid before they are cut. A
    class, and not a wrapped loader: vLLM's weight reload copies parameters with class and attributes.
    """

    def __init__(self, *, shard: LinearShard, **placement: Any) -> None:
        super().__init__(**placement)
        self.shard = shard

    def load_column_parallel_weight(self, loaded_weight: torch.Tensor) -> None:
        """Load the rows of a layer of one projection."""
        super().load_column_parallel_weight(self._refined_rows(loaded_weight))

    def load_merged_column_weight(self, loaded_weight: torch.Tensor, **where: Any) -> None:
        """Load the rows of one projection of several."""
        super().load_merged_column_weight(self._refined_rows(loaded_weight), **where)

    def load_qkv_weight(self, loaded_weight: torch.Tensor, **where: Any) -> None:
        """Load the rows of queries, keys or values."""
        super().load_qkv_weight(self._refined_rows(loaded_weight), **where)

    def load_row_parallel_weight(self, loaded_weight: torch.Tensor) -> None:
        """Load the columns of a layer whose input is split."""
        super().load_row_parallel_weight(refine_scale(loaded_weight, 1, self.shard.columns_per_scale))

    def _refined_rows(self, scale: torch.Tensor) -> torch.Tensor:
        return refine_scale(scale, 0, self.shard.rows_per_scale)
