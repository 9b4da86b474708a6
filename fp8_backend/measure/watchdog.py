"""An end to what hangs."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable


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
