"""What a vLLM log says about the kernels it chose."""

from __future__ import annotations

import re

# The plugin's line after loading.
SUMMARY = re.compile(r"\d+ of \d+ linears: fp8_backend .*")
# Lines in which vLLM says what it chose, and whether it compiled and captured.
SELECTION = re.compile(
    r"(Selected \S+ for|[Uu]sing .*(kernel|[Bb]ackend|MoE|GEMM)|vLLM's own FP8 path|torch\.compile (takes|took)|"
    r"Capturing CUDA graphs|Graph capturing finished|[Mm]odel loading took)"
)
LINEAR_KERNEL = re.compile(r"Selected \S*(Fp8|FP8)\S* for")


def selection_lines(log: str) -> list[str]:
    """Return the different lines of a log on kernels, compilation and graphs, without time and process."""
    said = [line for line in log.splitlines() if "%|" not in line]  # no progress bars
    wanted = [line for line in said if SELECTION.search(line) or SUMMARY.search(line)]
    lines = [line.rpartition("] ")[2].strip()[:300] for line in wanted]
    return list(dict.fromkeys(lines))[:30]


def names_ours(lines: list[str]) -> bool:
    """Return whether the lines say that layers of each kind, linears and MoE layers, use this package's kernels."""
    found = [SUMMARY.search(line) for line in lines]
    return any(match is not None and not re.search(r"\b0 of", match[0]) for match in found)


def names_fp8_kernel(lines: list[str]) -> bool:
    """Return whether the lines name the kernel of vLLM's own FP8 linears."""
    return any(LINEAR_KERNEL.search(line) for line in lines)
