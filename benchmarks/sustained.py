"""Run GPU work on end, as a long prefill does, and tell its time beside the GPU's clock and power."""

from __future__ import annotations

import statistics
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

INTERVAL_MS = 50  # between two samples


@dataclass(frozen=True)
class Sample:
    """When, by time.monotonic(), and what nvidia-smi said: MHz of the multiprocessors, watts."""

    time: float
    mhz: float
    watts: float


@dataclass(frozen=True)
class Sustained:
    """Microseconds of a call, and the mean clock and power meanwhile; None where no sample fell into that time."""

    us: float
    mhz: int | None
    watts: int | None


@contextmanager
def sampling() -> Iterator[list[Sample]]:
    """Yield a list that fills with samples of torch's current device meanwhile."""
    query = "nvidia-smi --query-gpu=clocks.sm,power.draw.instant --format=csv,noheader,nounits".split()
    which = [f"--loop-ms={INTERVAL_MS}", f"--id={torch.cuda.current_device()}"]
    process = subprocess.Popen([*query, *which], stdout=subprocess.PIPE, text=True)
    found: list[Sample] = []

    def read() -> None:
        assert process.stdout is not None
        for line in process.stdout:
            mhz, watts = map(float, line.split(","))
            found.append(Sample(time.monotonic(), mhz, watts))

    threading.Thread(target=read, daemon=True).start()
    try:
        yield found
    finally:
        process.kill()
        process.wait()


def sustain(call: Callable[[], object], seconds: float, samples: list[Sample]) -> Sustained:
    """Make calls for so many seconds, of which the second half counts."""
    call()
    torch.cuda.synchronize()
    start = time.monotonic()
    while time.monotonic() < start + seconds / 2:
        call()
        torch.cuda.synchronize()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    calls, middle = 0, time.monotonic()
    begin.record()
    while time.monotonic() < middle + seconds / 2:
        for _ in range(4):  # so that the GPU does not wait for the host
            call()
        calls += 4
        torch.cuda.synchronize()
    end.record()
    torch.cuda.synchronize()
    during = [sample for sample in samples if middle < sample.time < time.monotonic()]
    us = float(begin.elapsed_time(end)) / calls * 1e3
    if not during:
        return Sustained(us, None, None)
    mhz, watts = (round(statistics.fmean(getattr(sample, name) for sample in during)) for name in ("mhz", "watts"))
    return Sustained(us, mhz, watts)
