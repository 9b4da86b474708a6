"""Which parts of a layer the kernels can take: pure arithmetic on widths, before any tensor exists."""

from __future__ import annotations

from dataclasses import dataclass

from fp8_backend.kernels.reference import BLOCK, align


def linear_reason(input_size: int, k: int, output_size: int, widths: list[int]) -> str | None:
    """Return why a linear's part on one rank cannot be served, or None: a part must start at a block boundary.

    Args:
        input_size: of the whole layer.
        k: of this rank's part.
        output_size: of the whole layer, all ranks and merged parts together.
        widths: output widths on this rank, one per merged part.
    """
    if k != input_size and k % BLOCK:
        return (
            f"input width {k} of one tensor-parallel rank is not a multiple of {BLOCK} ({input_size} / "
            f"{input_size // k} ranks); use a smaller --tensor-parallel-size"
        )
    split = sum(widths) != output_size
    # The last part of an unsplit layer starts at a boundary if the others do: DeepSeek-V3 merges 1536 + 576.
    for width in widths if split else widths[:-1]:
        if width % BLOCK:
            kind = "merged shard width" if len(widths) > 1 else "shard width"
            step = (
                "use a smaller --tensor-parallel-size"
                if split and width * (output_size // sum(widths)) % BLOCK == 0
                else "requantise the model with these layers in modules_to_not_convert"
            )
            return (
                f"{kind} {width} is not a multiple of {BLOCK} (widths on one rank: {widths}), so one 128x128 block "
                f"would need two scales; {step}"
            )
    return None


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
