"""One line after loading that says which layers use whose kernels."""

from __future__ import annotations

import logging
from collections import Counter

from fp8_backend import counters

KINDS = ("linear", "MoE layer")
# What the line calls whose kernels serve: ours for compute capability 9.0, or their plain torch form.
NAMES = {"cuda": "sm90", "reference": "reference"}

logger = logging.getLogger("vllm.fp8_backend.integration.summary")


class LoadSummary:
    """Counts the FP8 layers of one model on one rank, from construction to packing."""

    def __init__(self) -> None:
        self.created: Counter[str] = Counter()
        self.packed: Counter[str] = Counter()
        self.fallbacks: Counter[tuple[str, str]] = Counter()

    def create(self, kind: str) -> None:
        """Count a layer that is to use our kernels."""
        counters.log_at_exit()
        self.created[kind] += 1

    def fall_back(self, kind: str, reason: str) -> None:
        """Count a layer that vLLM's own FP8 path serves."""
        counters.log_at_exit()
        self.fallbacks[kind, reason] += 1
        counters.fallbacks[f"{kind}: {reason}"] += 1

    def pack(self, kind: str, backend: str, speak: bool) -> None:
        """Count a layer whose weights are packed; after the last one log the line, on the rank that is to speak."""
        self.packed[kind] += 1
        if speak and self.packed == self.created:
            logger.info(self.line(backend))

    def line(self, backend: str) -> str:
        """Return "27 of 27 linears: fp8_backend sm90; 2 of 2 MoE layers: fp8_backend sm90; fell back: none"."""
        elsewhere: Counter[str] = Counter()
        for (kind, _), count in self.fallbacks.items():
            elsewhere[kind] += count
        parts = [
            f"{self.packed[kind]} of {self.created[kind] + elsewhere[kind]} {kind}s: fp8_backend {NAMES[backend]}"
            for kind in KINDS
            if self.created[kind] + elsewhere[kind]
        ]
        fell = [
            f"{count} {kind}s to vLLM's own FP8 path ({reason})" for (kind, reason), count in self.fallbacks.items()
        ]
        return "; ".join([*parts, f"fell back: {', '.join(fell) or 'none'}"])
