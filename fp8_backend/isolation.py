"""Run the doctor's probes in a child process: one that crashes, exits or hangs is one more thing found.

The child runs probe after probe and hands each result over at once. If it dies or says nothing for too long, that is
what is found of the probe at work, and a new child goes on with those behind it.
"""

from __future__ import annotations

import json
import os
import select
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from types import ModuleType
from typing import NoReturn

from fp8_backend.findings import Finding, Look, guarded

LIMIT_S = 120.0  # for one probe; importing torch from a cold network file system takes a minute
_REAP_S = 5.0  # a child within a call of a hung driver cannot even be killed
TORCH = "torch"
# A module that None stands for cannot be imported: a torch that crashed or hung once must not do so for each probe.
_HIDDEN: dict[str, ModuleType | None] = {TORCH: None}


@dataclass(frozen=True)
class Probe:
    """One line of the report or several: its name, how to look, what to do where looking fails."""

    what: str
    look: Look
    action: str
    needs_torch: bool = False


def examine(probes: Sequence[Probe]) -> list[Finding]:
    """Return what the probes find, in their order; those that need torch are not run where the torch probe fails."""
    found: list[Finding] = []
    ahead, torch_works = list(probes), True
    while ahead:
        runnable = [probe for probe in ahead if torch_works or not probe.needs_torch]
        with _Child(runnable, torch_works) as child:
            while ahead:
                probe = ahead.pop(0)
                if probe.needs_torch and not torch_works:
                    found.append(Finding(probe.what, "not examined: torch cannot be used", examined=False))
                    continue
                rows = child.next()
                found += rows or [Finding(probe.what, child.verdict(), probe.action)]
                if probe.what == TORCH and found[-1].action:
                    torch_works = False
                if rows is None or not torch_works:
                    break
    return found


class _Child:
    """A process that runs probes in turn; leaving the context ends it."""

    def __init__(self, probes: Sequence[Probe], torch_works: bool) -> None:
        self._answers, write = os.pipe()
        self._said = os.memfd_create("doctor")  # what libraries print must not get between the lines of the report
        self._pending = b""
        self._hangs = False
        self._status: int | None = None
        sys.stdout.flush()
        sys.stderr.flush()
        self._pid = os.fork()
        if self._pid == 0:
            _run(probes, torch_works, write, self._said)
        os.close(write)

    def __enter__(self) -> _Child:
        return self

    def __exit__(self, *_: object) -> None:
        if self._status is None:
            os.kill(self._pid, signal.SIGKILL)
            self._reap()
        os.close(self._answers)
        os.close(self._said)

    def next(self) -> list[Finding] | None:
        """Return what the next probe found, or None if the child died or hangs."""
        deadline = time.monotonic() + LIMIT_S
        while b"\n" not in self._pending:
            if not select.select([self._answers], [], [], max(0.0, deadline - time.monotonic()))[0]:
                self._hangs = True
                return None
            if not (data := os.read(self._answers, 1 << 16)):
                return None
            self._pending += data
        line, _, self._pending = self._pending.partition(b"\n")
        return [Finding(**row) for row in json.loads(line)]

    def verdict(self) -> str:
        """Say how a child that gave no answer ended, and the last line it printed."""
        if self._hangs:
            how = f"no answer within {LIMIT_S:.0f} s"
        elif (status := self._reap()) is not None and status < 0:
            how = f"ended by {signal.Signals(-status).name}"
        else:
            how = f"ended with status {status}"
        end = os.fstat(self._said).st_size
        said = os.pread(self._said, 4096, max(0, end - 4096)).decode(errors="replace").split("\n")
        last = next((line.strip() for line in reversed(said) if line.strip()), "")
        return how + (f"; it last printed: {last[:200]}" if last else "")

    def _reap(self) -> int | None:
        """Return the child's exit status, negative for a signal; None if not even SIGKILL ends it."""
        deadline = time.monotonic() + _REAP_S
        while self._status is None and time.monotonic() < deadline:
            pid, status = os.waitpid(self._pid, os.WNOHANG)
            if pid:
                self._status = os.waitstatus_to_exitcode(status)
            else:
                time.sleep(0.01)
        return self._status


def _run(probes: Sequence[Probe], torch_works: bool, answers: int, said: int) -> NoReturn:
    """Be the child: answer with one line of JSON a probe."""
    status = 1
    try:
        os.dup2(said, 1)
        os.dup2(said, 2)
        if not torch_works:
            sys.modules.update(_HIDDEN)  # type: ignore[arg-type]
        for probe in probes:
            rows = [asdict(finding) for finding in guarded(probe.what, probe.look, probe.action)]
            os.write(answers, json.dumps(rows).encode() + b"\n")
        status = 0
    finally:
        os._exit(status)  # nothing of the parent's, such as what it does at exit, may run here as well
