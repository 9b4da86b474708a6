"""Which parts of a layer the kernels can take: pure arithmetic on widths, before any tensor exists."""

from __future__ import annotations

from fp8_backend.kernels.reference import BLOCK


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


def experts_reason(intermediate: int) -> str | None:
    """Return why experts of this intermediate size on one rank cannot be served, or None."""
    if intermediate % BLOCK == 0:
        return None
    return (
        f"merged shard width {intermediate} of an expert's gate and up projections is not a multiple of {BLOCK}; use "
        "--enable-expert-parallel or a smaller --tensor-parallel-size"
    )
