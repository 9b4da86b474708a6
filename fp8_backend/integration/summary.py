"""One line after loading that says which layers use whose kernels."""

from __future__ import annotations

import logging
from collections import Counter

KINDS = ("linear", "MoE layer")

logger = logging.getLogger("vllm.fp8_backend.integration.summary")


class LoadSummary:
    """Counts the FP8 layers of one model on one rank, from construction to packing."""

    def __init__(self) -> None:
        self.created: Counter[str] = Counter()
        self.packed: Counter[str] = Counter()
        self.fallbacks: Counter[tuple[str, str]] = Counter()

    def create(self, kind: str) -> None:
        """Count a layer that is to use our kernels."""
        self.created[kind] += 1

    def fall_back(self, kind: str, reason: str) -> None:
        """Count a layer that vLLM's own FP8 path serves."""
        self.fallbacks[kind, reason] += 1

    def pack(self, kind: str, backend: str, speak: bool) -> None:
        """Count a layer whose weights are packed; after the last one log the line, on the rank that is to speak."""
        self.packed[kind] += 1
        if speak and self.packed == self.created:
            logger.info(self.line(backend))

    def line(self, backend: str) -> str:
        """Return "27 of 27 linears and 2 of 2 MoE layers use fp8_backend (reference)", then fallbacks and reasons."""
        elsewhere: Counter[str] = Counter()
        for (kind, _), count in self.fallbacks.items():
            elsewhere[kind] += count
        parts = [
            f"{self.packed[kind]} of {self.created[kind] + elsewhere[kind]} {kind}s"
            for kind in KINDS
            if self.created[kind] + elsewhere[kind]
        ]
        line = f"{' and '.join(parts)} use fp8_backend ({backend})"
        for (kind, reason), count in self.fallbacks.items():
            line += f"; {count} {kind}s use vLLM's own FP8 path: {reason}"
        return line
