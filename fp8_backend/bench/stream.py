"""The time of streaming a weight once, alone and in a chain of dependent launches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

import torch

from fp8_backend.kernels import launcher
from fp8_backend.kernels.backend import memory_bytes_per_us
from fp8_backend.kernels.compiler import KernelSpec
from fp8_backend.kernels.launcher import current_stream
from fp8_backend.measure.timing import capture, interleaved_us

SPEC = KernelSpec("stream.cuh", "stream", (), Path(__file__).parent)
TILE_BYTES = 16384
THREADS = 64
# (CTAs an SM, stages): either keeps 192 KiB of an SM in flight; the faster of the two for a weight is its floor.
SHAPES = ((1, 12), (2, 6))
# Of what clock and width of the memory allow, the part that kernels were seen to read: 4.5 of 4.92 TB/s on an H200,
# 3.07 of 3.35 on an H100.
READ_SHARE = 0.915
_LAYOUT = launcher.ParamLayout(("u64", "u64", "u64", "u32"))


def read_bytes_per_us(device: int) -> float:
    """Return how many bytes a microsecond the GPU of this index reads from its memory at most.

    Raises:
        DriverError: the driver does not tell clock and width of the memory.
    """
    return READ_SHARE * memory_bytes_per_us(device)


@cache
def _sink(device: int) -> torch.Tensor:
    sink = torch.zeros(16, dtype=torch.int32, device=f"cuda:{device}")
    torch.cuda.synchronize(device)
    return sink


def stream_call(weight: torch.Tensor, ctas_per_sm: int, stages: int, pdl: bool) -> Callable[[], None]:
    """Return a call that reads a contiguous tensor, whose size is a multiple of 16 bytes, from memory once."""
    device = weight.device.index
    kernel, sink = launcher.load(SPEC, _LAYOUT), _sink(device)
    sms = torch.cuda.get_device_properties(device).multi_processor_count
    size = weight.numel() * weight.element_size()
    assert weight.is_contiguous() and size % 16 == 0
    grid = (ctas_per_sm * sms, 1, 1)
    params = (weight.data_ptr(), size, sink.data_ptr(), stages)

    def call() -> None:
        kernel.launch(grid, THREADS, stages * TILE_BYTES, params, current_stream(weight.device.index), pdl=pdl)

    return call


def stream_us(weights: Sequence[torch.Tensor]) -> tuple[float, float]:
    """Return microseconds to stream one of the weights, all of them taken in turn: launched alone, and chained.

    Chained, a launch may start before the one ahead of it has ended, as the kernels of this package do.
    """
    arms = {
        (shape, pdl): capture([stream_call(weight, *shape, pdl) for weight in weights])
        for shape in SHAPES
        for pdl in (False, True)
    }
    found = interleaved_us({f"{shape} {pdl}": arm for (shape, pdl), arm in arms.items()}, rounds=9)
    alone, chained = (min(found[f"{shape} {pdl}"] for shape in SHAPES) for pdl in (False, True))
    return alone, chained
