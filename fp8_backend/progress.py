"""A progress line on standard error: redrawn on a terminal, one line every ten seconds in a log."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Self, TextIO

BAR = 30  # characters


class Progress:
    """Bytes done of a known total; use as a context manager, which ends the line."""

    def __init__(self, text: str, total: int, stream: TextIO | None = None) -> None:
        self.text = text
        self.total = total
        self.done = 0
        self.stream = stream or sys.stderr
        self.is_terminal = self.stream.isatty()
        self.began = self.drawn = time.monotonic()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._draw()
        if self.is_terminal:
            self.stream.write("\n")

    def advance_to(self, done: int) -> None:
        """Set how many bytes are done, and draw if the last drawing is old enough."""
        self.done = done
        if time.monotonic() - self.drawn >= (0.1 if self.is_terminal else 10):
            self._draw()

    def advance(self, count: int) -> None:
        """Add bytes to those done."""
        self.advance_to(self.done + count)

    def _draw(self) -> None:
        self.drawn = time.monotonic()
        share = self.done / self.total if self.total else 1.0
        rate = self.done / max(self.drawn - self.began, 1e-9)
        bar = "#" * int(BAR * share)
        left = (self.total - self.done) / rate if rate else 0.0
        line = (
            f"{self.text} [{bar:<{BAR}}] {share:4.0%} of {self.total / 1e9:.2f} GB, {rate / 1e9:.2f} GB/s, "
            f"{left:.0f} s left"
        )
        self.stream.write(f"\r\x1b[K{line}" if self.is_terminal else f"{line}\n")
        self.stream.flush()
