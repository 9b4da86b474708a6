"""What one tensor-parallel rank holds of a layer, and how it is put back on the checkpoint's grid of 128x128 blocks.

A rank's part may begin and end inside a block. Its scales are then loaded on a finer grid, in which every boundary of
the part is one of the grid (`rows_per_scale`, `columns_per_scale`: 64, 32, ... 1), and packing pads the part with zero
codes until its blocks are the checkpoint's own again, for which kernels need one scale a 128x128 block:

- rows: each projection gets `lead` zero rows in front and, but for the last, zero rows behind up to a boundary. Their
  outputs are dropped.
- columns: `k_lead` zero columns in front. Activations are padded likewise, so that their groups of 128 are those of the
  unsplit layer; the part of a group that lies on another rank is quantised there, with a scale of its own.

Zero codes add exactly nothing, so a rank's product is that of its own codes and the checkpoint's own scales. All of
this is arithmetic on widths: no tensor, no vLLM.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from fp8_backend.kernels.reference import BLOCK, align, ceil_div


@dataclass(frozen=True)
class Span:
    """Rows or columns [start, start + size) of one projection of the checkpoint."""

    start: int
    size: int

    @property
    def lead(self) -> int:
        """Rows or columns between the last block boundary and the first one held: as many zeros go in front."""
        return self.start % BLOCK


@dataclass(frozen=True)
class LinearShard:
    """One rank's part of a linear: projections stacked along n, each a span of its own, and one span of k."""

    rows: tuple[Span, ...]
    columns: Span
    rows_per_scale: int  # of the grid on which scales are loaded; divides 128 and every boundary between spans
    columns_per_scale: int
    whole_widths: tuple[int, ...]  # rows of each projection on all ranks together

    @property
    def n(self) -> int:
        """Rows held, without padding."""
        return sum(span.size for span in self.rows)

    @property
    def k(self) -> int:
        """Columns held, without padding."""
        return self.columns.size

    @property
    def scale_shape(self) -> tuple[int, int]:
        """Shape of the scales as they are loaded."""
        return ceil_div(self.n, self.rows_per_scale), ceil_div(self.k, self.columns_per_scale)

    @property
    def outputs(self) -> tuple[tuple[int, int], ...]:
        """Where each projection's rows [first, last) lie once padded."""
        places, end = [], 0
        for span in self.rows:
            first = align(end, BLOCK) + span.lead
            end = first + span.size
            places.append((first, end))
        return tuple(places)

    @property
    def padded_n(self) -> int:
        """Rows of the weight that is packed."""
        return self.outputs[-1][1]

    @property
    def k_lead(self) -> int:
        """Zero columns in front of weight and activations."""
        return self.columns.lead

    @property
    def padded_k(self) -> int:
        """Columns of the weight that is packed."""
        return self.k_lead + self.k

    @property
    def pads_rows(self) -> bool:
        """Whether outputs lie elsewhere than the rows they belong to."""
        return self.padded_n != self.n

    def scale_rows(self) -> list[int]:
        """Return, for each 128 rows of the padded weight, the row of the loaded scales that holds theirs."""
        loaded, taken = 0, []
        for span in self.rows:
            for block in range(ceil_div(span.lead + span.size, BLOCK)):
                taken.append((loaded + max(block * BLOCK - span.lead, 0)) // self.rows_per_scale)
            loaded += span.size
        return taken

    def scale_columns(self) -> list[int]:
        """Return, for each 128 columns of the padded weight, the column of the loaded scales that holds theirs."""
        blocks = range(ceil_div(self.padded_k, BLOCK))
        return [max(block * BLOCK - self.k_lead, 0) // self.columns_per_scale for block in blocks]


def linear_shard(
    input_size: int, k: int, output_size: int, widths: Sequence[int], rank: int = 0, copies: Sequence[int] = ()
) -> LinearShard:
    """Return one rank's part of a linear.

    Args:
        input_size: columns of the whole layer.
        k: columns on one rank.
        output_size: rows of the whole layer, all ranks and projections together, copies counted.
        widths: rows on one rank, one number per projection.
        rank: which part.
        copies: ranks that hold the same rows, one number per projection (key and value heads, where ranks outnumber
            them); 1 each by default.
    """
    ranks = output_size // sum(widths)
    is_split = ranks > 1
    copies = copies or [1] * len(widths)
    rows = tuple(
        Span(rank // shared * width if is_split else 0, width) for width, shared in zip(widths, copies, strict=True)
    )
    columns = Span(rank * k if k != input_size else 0, k)
    # The last projection of an unsplit layer ends the grid and need not end on a boundary.
    return LinearShard(
        rows,
        columns,
        rows_per_scale=math.gcd(BLOCK, *(widths if is_split else widths[:-1])),
        columns_per_scale=BLOCK if k == input_size else math.gcd(BLOCK, k),
        whole_widths=tuple(width * ranks // shared for width, shared in zip(widths, copies, strict=True)),
    )


@dataclass(frozen=True)
class ExpertPart:
    """One rank's part of the experts' intermediate size, widened to the checkpoint's whole 128-row blocks.

    A part such as 192 of 768 starts or ends within a block. The kernels get the whole block: rows of gate and up and
    columns of w2 that belong to another rank are zero codes. Each block of the widened part is a block of the
    checkpoint, so it has one scale, exactly the checkpoint's. What was added contributes nothing: silu(0) * 0 = 0, and
    zero columns of w2 would hide anything else. So the ranks' answers add up to the whole layer's but for one thing:
    the 128 activations between the GEMMs that two ranks share are quantised by each with the largest of its own ones, a
    scale at most as large.

    start: the first row of the part in the whole. rows: of the part.
    """

    start: int
    rows: int

    @property
    def first_block(self) -> int:
        """Return the checkpoint's block in which the part starts."""
        return self.start // BLOCK

    @property
    def offset(self) -> int:
        """Return how many zero rows lie in front of the part."""
        return self.start % BLOCK

    @property
    def padded(self) -> int:
        """Return the widened part's rows, a multiple of 128."""
        return align(self.offset + self.rows, BLOCK)
