"""A progress line on standard error: redrawn on a terminal, at most one line every ten seconds in a log."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from types import TracebackType
from typing import Self, TextIO

BAR = 30  # characters
BYTES = "GB"


class Progress:
    """Steps, or bytes, done of a known total; use as a context manager, which ends the line."""

    def __init__(self, text: str, total: int, unit: str = BYTES, stream: TextIO | None = None) -> None:
        self.text = text
        self.total = total
        self.unit = unit
        self.done = 0
        self.note = ""
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
        """Set how much is done, and draw if the last drawing is old enough."""
        self.done = done
        if time.monotonic() - self.drawn >= (0.1 if self.is_terminal else 10):
            self._draw()

    def advance(self, count: int) -> None:
        """Add to what is done."""
        self.advance_to(self.done + count)

    def step(self, note: str) -> None:
        """Count one step and say what it was."""
        self.note = note
        self.advance(1)

    def _draw(self) -> None:
        self.drawn = time.monotonic()
        share = self.done / self.total if self.total else 1.0
        rate = self.done / max(self.drawn - self.began, 1e-9)
        bar = "#" * int(BAR * share)
        left = (self.total - self.done) / rate if rate else 0.0
        if self.unit == BYTES:
            amount = f"{share:4.0%} of {self.total / 1e9:.2f} GB, {rate / 1e9:.2f} GB/s"
        else:
            amount = f"{self.done}/{self.total} {self.unit}"
        line = f"{self.text} [{bar:<{BAR}}] {amount}, {left:.0f} s left" + (f": {self.note}" if self.note else "")
        self.stream.write(f"\r\x1b[K{line}" if self.is_terminal else f"{line}\n")
        self.stream.flush()


class ProgressOnDemand:
    """A progress line that appears with the first call of what entering it returns: callback(done, total)."""

    def __init__(self, text: str, unit: str) -> None:
        self.text = text
        self.unit = unit
        self.line: Progress | None = None

    def __enter__(self) -> Callable[[int, int], None]:
        return self._show

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.line is not None:
            self.line.__exit__(kind, error, trace)

    def _show(self, done: int, total: int) -> None:
        if self.line is None:
            self.line = Progress(self.text, total, self.unit)
        self.line.advance_to(done)
