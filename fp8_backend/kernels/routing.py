"""Sorting rows by expert on the device: what the grouped GEMMs walk, without the host knowing how many there are."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch

from fp8_backend.errors import ArgumentError
from fp8_backend.kernels import launcher
from fp8_backend.kernels.compiler import KernelSpec
from fp8_backend.kernels.reference import ceil_div

SPEC = KernelSpec("route.cuh", "route")
TILE_ROWS = 128  # kTileRows of route.cuh and grouped.cuh
MAX_GROUPS = 1024  # kThreads of route.cuh: a thread an expert
_LAYOUT = launcher.ParamLayout(("u64",) * 6 + ("u32",) * 3)
_THREADS = 1024
_TILE_BYTES, _COUNTER_BYTES = 16, 16
# A cluster counts faster than one CTA from here on; below, its two barriers cost more than they save.
_CLUSTER_ENTRIES, _CLUSTER = 2048, 8


@cache
def kernel(device: int) -> launcher.Kernel:
    """Return the loaded kernel on the current device, whose index is part of the key only."""
    return launcher.load(SPEC, _LAYOUT)


def max_tiles(entries: int, num_groups: int) -> int:
    """Return how many tiles of 128 rows any routing of so many rows to so many experts can have."""
    partial = min(entries, num_groups)
    return (entries - partial) // TILE_ROWS + partial


def routing_bytes(entries: int, num_groups: int) -> int:
    """Return the bytes of a `Routing`."""
    return _COUNTER_BYTES + max_tiles(entries, num_groups) * _TILE_BYTES + entries * 4


@dataclass(frozen=True)
class Routing:
    """Rows sorted by expert, on the device.

    storage: [routing_bytes] uint8: two tickets and the number of tiles, uint32; tiles of 16 bytes; entries, uint32.
    """

    storage: torch.Tensor
    entries: int
    num_groups: int

    def ticket(self, index: int) -> int:
        """Return the address of the counter of the first (0) or second (1) GEMM."""
        return self.storage.data_ptr() + 4 * index

    @property
    def num_tiles(self) -> int:
        """Address of the number of tiles."""
        return self.storage.data_ptr() + 8

    @property
    def tiles(self) -> int:
        """Address of the tiles."""
        return self.storage.data_ptr() + _COUNTER_BYTES

    @property
    def sorted_entries(self) -> int:
        """Address of the entries, sorted by expert."""
        return self.tiles + max_tiles(self.entries, self.num_groups) * _TILE_BYTES


def route(ids: torch.Tensor, expert_map: torch.Tensor | None, num_groups: int) -> Routing:
    """Sort entries by expert, by work queued on the current stream.

    Args:
        ids: [...] int32, contiguous, at least one; ids that are negative or have no expert here are left out.
        expert_map: [global experts] int32 from an id to an expert here or -1, or None if ids are experts here.
        num_groups: experts here, at most 1024.
    """
    if num_groups > MAX_GROUPS:
        raise ArgumentError(
            f"{num_groups} experts; the routing kernel takes at most {MAX_GROUPS}; use expert parallelism"
        )
    entries = ids.numel()
    assert ids.dtype == torch.int32 and ids.is_contiguous() and entries
    storage = torch.empty(routing_bytes(entries, num_groups), dtype=torch.uint8, device=ids.device)
    routing = Routing(storage, entries, num_groups)
    cluster = 1 if entries <= _CLUSTER_ENTRIES else min(_CLUSTER, ceil_div(entries, _THREADS))
    kernel(ids.device.index).launch(
        (cluster, 1, 1),
        _THREADS,
        0,
        (
            ids.data_ptr(),
            0 if expert_map is None else expert_map.data_ptr(),
            routing.sorted_entries,
            routing.tiles,
            routing.num_tiles,
            routing.ticket(0),
            entries,
            0 if expert_map is None else expert_map.numel(),
            num_groups,
        ),
        launcher.current_stream(ids.device.index),
        cluster,
        True,
    )
    return routing
