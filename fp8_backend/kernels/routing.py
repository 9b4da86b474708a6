"""Sorting rows by expert on the device: what the grouped GEMMs walk, without the host knowing how many there are."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch

from fp8_backend.errors import ArgumentError
from fp8_backend.kernels import launcher
from fp8_backend.kernels.compiler import KernelSpec
from fp8_backend.kernels.prepared import Launch
from fp8_backend.kernels.reference import ceil_div

SPEC = KernelSpec("route.cuh", "route")
TILE_ROWS, TALL_TILE_ROWS = 128, 256  # kTileRows of route.cuh and grouped_sorted.cuh, of grouped_tall.cuh
EXTRA_ROWS = 16  # kExtraRows of grouped_sorted.cuh: how many rows more than 128 a tile may have
RUNS_SPEC = KernelSpec("runs.cuh", "runs")
MAX_GROUPS = 1024  # kThreads of route.cuh: a thread an expert
_LAYOUT = launcher.ParamLayout(("u64",) * 7 + ("u32",) * 4)
_RUNS_LAYOUT = launcher.ParamLayout(("u64",) * 5 + ("u32",) * 4)
_THREADS = 1024
TILE_BYTES, COUNTER_BYTES = 16, 16
# A cluster counts faster than one CTA from here on; below, its two barriers cost more than they save.
_CLUSTER_ENTRIES, _CLUSTER = 2048, 8


@cache
def kernel(device: int) -> launcher.Kernel:
    """Return the loaded kernel on the current device, whose index is part of the key only."""
    return launcher.load(SPEC, _LAYOUT)


@cache
def runs_kernel(device: int) -> launcher.Kernel:
    """Return the loaded kernel that lists runs on the current device, whose index is part of the key only."""
    return launcher.load(RUNS_SPEC, _RUNS_LAYOUT)


def max_tiles(entries: int, num_groups: int) -> int:
    """Return how many tiles of 128 rows any routing of so many rows to so many experts can have."""
    partial = min(entries, num_groups)
    return (entries - partial) // TILE_ROWS + partial


def routing_bytes(entries: int, num_groups: int, with_places: bool = False) -> int:
    """Return the bytes of a `Routing` of sorted entries."""
    return COUNTER_BYTES + max_tiles(entries, num_groups) * TILE_BYTES + entries * (8 if with_places else 4)


@dataclass(frozen=True)
class Routing:
    """Rows sorted by expert, on the device.

    address: of two tickets and the number of tiles, uint32; tiles of 16 bytes; unless in_order, entries, uint32; with
        places, the position of each entry among them, uint32. Or where in other memory all this begins: then what
        follows are not addresses either.
    in_order: the rows lie as their groups want them, and entries are rows.
    with_places: whether there are places; not if in_order.
    storage: holds the memory, if it is the routing's own.
    """

    address: int
    entries: int
    num_groups: int
    in_order: bool = False
    with_places: bool = False
    storage: torch.Tensor | None = None

    def ticket(self, index: int) -> int:
        """Return the address of the counter of the first (0) or second (1) GEMM."""
        return self.address + 4 * index

    @property
    def num_tiles(self) -> int:
        """Address of the number of tiles."""
        return self.address + 8

    @property
    def tiles(self) -> int:
        """Address of the tiles."""
        return self.address + COUNTER_BYTES

    @property
    def sorted_entries(self) -> int:
        """Address of the entries, sorted by expert; 0 if they are so already."""
        if self.in_order:
            return 0
        return self.tiles + max_tiles(self.entries, self.num_groups) * TILE_BYTES

    @property
    def places(self) -> int:
        """Address of each entry's position in sorted order, 0xffffffff if it is left out; 0 if they are not kept."""
        return self.sorted_entries + self.entries * 4 if self.with_places else 0


def launch_like(entries: int, map_length: int, num_groups: int, device: int, extra_rows: int = 0) -> Launch:
    """Return the launch that sorts entries by expert into a `Routing`.

    Its pointers: ids [entries] int32, of which those that are negative or have no expert here are left out; the map
    from ids to experts here or -1, int32, or 0 if ids are experts here; sorted entries; places, or 0 if they are not
    kept; tiles; the number of tiles; tickets.

    Args:
        entries: at least one.
        map_length: of the map; 0 without one.
        num_groups: experts here, at most 1024.
        device: index of the current device.
        extra_rows: how many rows more each of an expert's full tiles of 128 takes, less than 128, if no tile is needed
            beside them then.

    Raises:
        ArgumentError: more than 1024 experts.
    """
    if num_groups > MAX_GROUPS:
        raise ArgumentError(
            f"{num_groups} experts; the routing kernel takes at most {MAX_GROUPS}; use expert parallelism"
        )
    assert entries and 0 <= extra_rows < TILE_ROWS
    cluster = 1 if entries <= _CLUSTER_ENTRIES else min(_CLUSTER, ceil_div(entries, _THREADS))
    return Launch(kernel(device), (cluster, 1), _THREADS, 0, (entries, map_length, num_groups, extra_rows), cluster)


def route_in_order(
    m_indices: torch.Tensor, num_groups: int, tile_rows: int = TILE_ROWS, extra_rows: int = 0
) -> Routing:
    """List the tiles of rows whose groups' rows are neighbours, by work queued on the current stream.

    Args:
        m_indices: [m] int32, contiguous, at least one; rows of no group are left out. In any order the tiles are right,
            but each run of equal ids has its own.
        num_groups: groups.
        tile_rows: rows of a full tile, 128 or 256.
        extra_rows: how many rows more each full tile of a run takes, less than tile_rows, if no tile is needed beside
            them then.
    """
    rows = m_indices.numel()
    assert m_indices.dtype == torch.int32 and m_indices.is_contiguous() and rows
    listed = COUNTER_BYTES + rows * TILE_BYTES
    storage = torch.empty(listed + ceil_div(rows, 32) * 4, dtype=torch.uint8, device=m_indices.device)
    routing = Routing(storage.data_ptr(), rows, num_groups, in_order=True, storage=storage)
    runs_kernel(m_indices.device.index).launch(
        (1, 1, 1),
        _THREADS,
        0,
        (
            m_indices.data_ptr(),
            storage.data_ptr() + listed,
            routing.tiles,
            routing.num_tiles,
            routing.ticket(0),
            rows,
            num_groups,
            tile_rows,
            extra_rows,
        ),
        launcher.current_stream(m_indices.device.index),
        pdl=True,
    )
    return routing
