"""Run a program that may crash or hang without crashing or hanging with it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path


def stop_children_on_signals() -> None:
    """Make SIGTERM and SIGHUP unwind the stack as Ctrl-C does, so that children are ended on the way."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_: sys.exit("stopped by a signal"))


def run_child(command: list[str], log: Path, timeout_s: float, environment: dict[str, str] | None = None) -> str | None:
    """Run a command to its end; return None, or why it did not end with status 0.

    Its output goes to `log` and its whole process group is killed afterwards, whatever happened.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    start = time.monotonic()
    with log.open("w") as stream:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=subprocess.STDOUT,
            env={**os.environ, **(environment or {})},
            start_new_session=True,
        )
    try:
        process.wait(timeout=max(1.0, timeout_s))
    except subprocess.TimeoutExpired:
        return f"not finished after {time.monotonic() - start:.0f} s; {end_of(log)}"
    finally:
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        process.wait()
    return None if process.returncode == 0 else f"status {process.returncode}; {end_of(log)}"


def end_of(log: Path, characters: int = 600) -> str:
    """Return the end of a log in one string."""
    return f"its log ends: {log.read_text(errors='replace').strip()[-characters:]}"
