"""When a measured error is good."""

from __future__ import annotations

# Where there is no DeepGEMM to compare with: bf16 rounding gives 0.0017, the tensor core's FP8 accumulation up to 0.005
# on single rows (measured); a wrong scale or a lost block gives far more.
LIMIT_ALONE = 0.01
LIMIT_RATIO = 1.1
LIMIT_SLACK = 1e-6


def verified(rel_err: float, deepgemm_rel_err: float | None) -> bool:
    """Return whether an error is within the limit; NaN is not."""
    if deepgemm_rel_err is None:
        return rel_err <= LIMIT_ALONE
    return rel_err <= LIMIT_RATIO * deepgemm_rel_err + LIMIT_SLACK
