"""A progress bar where tqdm is installed and a person is watching, lines elsewhere; and an end to what hangs."""

from __future__ import annotations

import importlib
import os
import sys
import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any


class Progress:
    """Counts steps on stderr; a context manager."""

    def __init__(self, total: int, unit: str) -> None:
        self.total, self.unit, self.done, self._said = total, unit, 0, 0.0
        self._bar: Any = None

    def __enter__(self) -> Progress:
        if sys.stderr.isatty():
            try:
                self._bar = importlib.import_module("tqdm").tqdm(total=self.total, unit=self.unit, dynamic_ncols=True)
            except ImportError:
                self._bar = None
        return self

    def __exit__(self, *exception: type[BaseException] | BaseException | TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.close()

    def step(self, text: str) -> None:
        """Count one step and say what it was; without a bar at most every ten seconds, and at the last step."""
        self.done += 1
        if self._bar is not None:
            self._bar.set_postfix_str(text, refresh=False)
            self._bar.update()
        elif time.monotonic() > self._said + 10 or self.done == self.total:
            self._said = time.monotonic()
            print(f"{self.done}/{self.total} {self.unit}: {text}", file=sys.stderr, flush=True)


class Watchdog:
    """Ends the process with status 3 where a step takes longer than its limit: a hung kernel cannot be interrupted."""

    def __init__(self, limit_s: float, exit_process: Callable[[int], None] = os._exit) -> None:
        self._limit_s, self._exit, self._timer = limit_s, exit_process, threading.Timer(0, lambda: None)

    def begin(self, step: str) -> None:
        """Start a step, which ends the one before it."""
        self.end()
        self._timer = threading.Timer(self._limit_s, self._give_up, (step,))
        self._timer.daemon = True
        self._timer.start()

    def end(self) -> None:
        """End the last step."""
        self._timer.cancel()

    def _give_up(self, step: str) -> None:
        print(f"\n{step}: not done after {self._limit_s:.0f} s; a kernel hangs; stopped", file=sys.stderr, flush=True)
        self._exit(3)
