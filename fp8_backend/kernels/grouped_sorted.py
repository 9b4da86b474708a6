"""The grouped GEMM over rows that lie sorted by group, which the copy engine fetches (grouped_sorted.cuh)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch

from fp8_backend.kernels import grouped_tall, launcher, routing
from fp8_backend.kernels.backend import num_sms
from fp8_backend.kernels.compiler import KernelSpec
from fp8_backend.kernels.prepared import Launch, PreparedLaunch
from fp8_backend.kernels.quantize import ELEMENT_TYPES
from fp8_backend.kernels.reference import BLOCK, ceil_div
from fp8_backend.kernels.routing import EXTRA_ROWS, TILE_ROWS, Routing
from fp8_backend.kernels.tensor_map import MovableMap, row_major_map

LAYOUT = launcher.ParamLayout(("map",) * 2 + ("u64",) * 9 + ("i64",) + ("u32",) * 10)
_BOX_ROWS = TILE_ROWS // 2  # kNarrowRows of grouped_sorted.cuh
_THREADS = 384
_TICKET_BYTES, _ROOM_BYTES, _LARGEST_BYTES = 64, 8 * EXTRA_ROWS * 20 * 4, 2 * 2 * _BOX_ROWS * 4
_K_BLOCKS_AT_ONCE = 16
_WAVES = 6  # items a CTA takes, so that the last ones end together


@dataclass(frozen=True)
class SortedConfig:
    """One compiled form of grouped_sorted.cuh.

    gated: the first GEMM of experts, with silu(gate) * up and its quantisation; otherwise a plain GEMM.
    extended: for groups of many rows: tiles that take up to EXTRA_ROWS rows more, and clusters that take two of them;
        otherwise a shorter kernel, whose tiles have 128 rows at most.
    """

    gated: bool
    extended: bool = True
    num_stages: int = 4

    @property
    def cluster(self) -> int:
        """CTAs that share weights or rows."""
        return 2 if self.extended else 1

    @property
    def tile_columns(self) -> int:
        """Columns of the output a tile has; the gated form multiplies twice as many."""
        return BLOCK if self.gated else 2 * BLOCK

    @property
    def shared_bytes(self) -> int:
        """Dynamic shared memory of a CTA, laid out as grouped_sorted.cuh says."""
        rows = TILE_ROWS + EXTRA_ROWS
        stage = (rows + 2 * BLOCK) * BLOCK + (rows + 4 + 8) * 4 + 16 + 2 * 8
        return self.num_stages * stage + _TICKET_BYTES + _ROOM_BYTES + (_LARGEST_BYTES if self.gated else 0)

    def spec(self) -> KernelSpec:
        """Return what to compile."""
        form = ("GATED", int(self.gated)), ("EXTENDED", int(self.extended))
        defines = (*form, ("NUM_STAGES", self.num_stages), ("CLUSTER", self.cluster))
        return KernelSpec("grouped_sorted.cuh", "grouped_sorted", defines)


GATED, PLAIN, PLAIN_FEW = SortedConfig(True), SortedConfig(False), SortedConfig(False, extended=False)
# Rows a group on average from which on tiles may be extended, in a kernel of more code.
EXTENDED_ROWS = 96


def select_plain(rows: int, num_groups: int) -> SortedConfig:
    """Return the plain form for so many rows of all groups."""
    return PLAIN if rows >= EXTENDED_ROWS * num_groups else PLAIN_FEW


@cache
def kernel(config: SortedConfig, device: int) -> launcher.Kernel:
    """Return the loaded kernel of a form on the current device, whose index is part of the key only."""
    return launcher.load(config.spec(), LAYOUT)


def select_run(row_tiles: int, columns: int, k_blocks: int, sms: int) -> int:
    """Return how many neighbouring tiles of columns a CTA takes at once.

    To learn what its next tiles are costs a producer three round trips to L2, the time of about 4 k-blocks: that is
    hidden behind the stages in flight if it is rare.

    Args:
        row_tiles: tiles of rows there may be.
        columns: tiles of columns.
        k_blocks: k-blocks of a tile.
        sms: multiprocessors.
    """
    run = max(1, min(_K_BLOCKS_AT_ONCE // k_blocks, row_tiles * columns // (_WAVES * sms), columns))
    return ceil_div(columns, ceil_div(columns, run))


class SortedLaunch:
    """A launch of grouped_sorted.cuh, and the maps by which it fetches rows; used by one thread at a time."""

    def __init__(self, launch: Launch | PreparedLaunch, maps: Sequence[MovableMap]) -> None:
        """Take a launch and its maps of whole tiles' rows and of those past them."""
        self._launch, self._maps = launch, maps

    def prepared(self) -> SortedLaunch:
        """Return the same, of a prepared launch."""
        assert isinstance(self._launch, Launch)
        return SortedLaunch(self._launch.prepared(), self._maps)

    def __call__(self, stream: int, a: int, *others: int) -> None:
        """Launch on a raw stream of the current device.

        Args:
            stream: from `launcher.current_stream`.
            a: address of the rows.
            others: addresses of scale_a, weight, scale_b, out, out_scale or 0; of the routing's sorted entries, tiles,
                number of tiles and ticket, the first of the gated form, the second of a plain one.
        """
        rows, extra = self._maps
        self._launch(stream, rows.at(a), extra.at(a), *others)


def launch_like(
    config: SortedConfig,
    a: torch.Tensor,
    scale_a: torch.Tensor,
    weight: torch.Tensor,
    scale_b: torch.Tensor,
    out: torch.Tensor,
    out_scale: torch.Tensor | None,
    n: int,
    routed: Routing,
    early: int = 0,
) -> SortedLaunch:
    """Return the launch of grouped_sorted.cuh for tensors like these; nothing is checked.

    Args:
        config: the form.
        a: codes [rows, k_blocks * 128] in sorted order, 16-byte aligned rows.
        scale_a: [k_blocks, rows] float32, as `grouped_tall.takes` wants it.
        weight: [num_groups, k_blocks, n_aligned, 128] packed; on the device, as no other has to be.
        scale_b: [num_groups, k_blocks, scales] packed.
        out: plain form: [entries, n], contiguous columns; gated form: codes [entries, n] in sorted order.
        out_scale: gated form: [n / 128, at least entries] float32, contiguous rows.
        n: columns of out.
        routed: like the sorted rows, in tiles of at most 128 rows unless the form is extended.
        early: 1 if weights may be asked for before the previous kernel has ended: the tiles must be listed by then.
    """
    device, columns = weight.device.index, ceil_div(n, config.tile_columns)
    row_tiles, sms = routing.max_tiles(routed.entries, routed.num_groups), num_sms(device)
    # What a ticket of a cluster covers is as much, whether that is one tile of rows in two columns or two in one.
    run = config.cluster if config.cluster > 1 else select_run(row_tiles, columns, weight.shape[1], sms)
    params = (
        *(out.stride(0), n, weight.shape[2], weight.shape[1], scale_a.stride(0), scale_b.stride(1)),
        *(0 if out_scale is None else out_scale.stride(0), run, early, ELEMENT_TYPES.get(out.dtype, 0)),
        int(grouped_tall.is_vectorised(out)),
    )
    grid = min(sms // config.cluster, row_tiles * ceil_div(columns, run)) * config.cluster, 1
    launch = Launch(kernel(config, device), grid, _THREADS, config.shared_bytes, params, config.cluster)
    boxes = _BOX_ROWS, EXTRA_ROWS
    return SortedLaunch(launch, [row_major_map(a.stride(0), a.shape[0], weight.shape[1], rows) for rows in boxes])
