"""The grouped GEMM over rows sorted by expert: its two forms, and DeepGEMM's contiguous layout on the plain one."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch

from fp8_backend.kernels import grouped_tall, launcher, routing
from fp8_backend.kernels.backend import num_sms
from fp8_backend.kernels.compiler import KernelSpec
from fp8_backend.kernels.quantize import ELEMENT_TYPES
from fp8_backend.kernels.reference import BLOCK, ceil_div
from fp8_backend.kernels.routing import TILE_ROWS, Routing
from fp8_backend.kernels.tensor_map import BYTES, row_major_map

_LAYOUT = launcher.ParamLayout(("map",) + ("u64",) * 10 + ("i64",) * 2 + ("u32",) * 11)
_BOX_ROWS = TILE_ROWS // 2  # kBoxRows of grouped.cuh
_THREADS = 384
_TICKET_BYTES, _EXCHANGE_READ_BYTES, _ROW_TABLE_BYTES = 64, 16, TILE_ROWS * 4
_K_BLOCKS_AT_ONCE = 16
_WAVES = 6  # items a CTA takes, so that the last ones end together
# Rows a group on average from which on contiguous rows go to grouped_tall.cuh (one H100, 4096x7168, us in tiles of 128
# and of 256 rows: 8 groups of 512 201 and 181, 16 of 0 to 1500 502 and 507, 64 of 264 1227 and 1337).
TALL_ROWS = 512


@dataclass(frozen=True)
class GroupedConfig:
    """One compiled form of grouped.cuh.

    gated: the first GEMM of experts, of rows that threads gather, with silu(gate) * up and its quantisation;
        otherwise a plain GEMM, of rows that lie in sorted order.
    """

    gated: bool
    num_stages: int = 4

    @property
    def tile_columns(self) -> int:
        """Columns of the output a tile has; the gated form multiplies twice as many."""
        return BLOCK if self.gated else 2 * BLOCK

    @property
    def shared_bytes(self) -> int:
        """Dynamic shared memory of a CTA, laid out as grouped.cuh says."""
        stage = (TILE_ROWS + 2 * BLOCK) * BLOCK + TILE_ROWS * 4 + 32 + 16 + 2 * 8
        gated = 64 * BLOCK * 4 + _EXCHANGE_READ_BYTES + _ROW_TABLE_BYTES if self.gated else 0
        return self.num_stages * stage + gated + _TICKET_BYTES

    def spec(self) -> KernelSpec:
        """Return what to compile."""
        return KernelSpec("grouped.cuh", "grouped", (("GATED", int(self.gated)), ("NUM_STAGES", self.num_stages)))


GATED, PLAIN = GroupedConfig(True), GroupedConfig(False)


def all_specs() -> tuple[KernelSpec, ...]:
    """Return every kernel that a grouped GEMM can need."""
    return (routing.SPEC, *routing.RUNS_SPECS.values(), GATED.spec(), PLAIN.spec(), *grouped_tall.all_specs())


def load_all() -> None:
    """Load every kernel on torch's current device."""
    device = torch.cuda.current_device()
    routing.kernel(device)
    for tile_rows in routing.RUNS_SPECS:
        routing.runs_kernel(tile_rows, device)
    for config in (GATED, PLAIN):
        kernel(config, device)
    grouped_tall.load_all()


@cache
def kernel(config: GroupedConfig, device: int) -> launcher.Kernel:
    """Return the loaded kernel of a form on the current device, whose index is part of the key only."""
    return launcher.load(config.spec(), _LAYOUT)


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


def launch_grouped(
    config: GroupedConfig,
    a: torch.Tensor,
    scale_a: torch.Tensor,
    weight: torch.Tensor,
    scale_b: torch.Tensor,
    out: torch.Tensor,
    out_scale: torch.Tensor | None,
    n: int,
    routed: Routing,
    divisor: int = 1,
    early: int = 0,
) -> int:
    """Launch grouped.cuh and return the number of CTAs; nothing is checked.

    Args:
        config: the form.
        a: codes [rows, k_blocks * 128] with 16-byte aligned rows; plain form: in sorted order.
        scale_a: [k_blocks, at least rows] float32, contiguous rows.
        weight: [num_groups, k_blocks, n_aligned, 128] packed.
        scale_b: [num_groups, k_blocks, scales] packed.
        out: plain form: [entries, n], contiguous columns; gated form: codes [entries, n] in sorted order.
        out_scale: gated form: [n / 128, at least entries] float32, contiguous rows.
        n: columns of out.
        routed: the sorted rows; the gated form uses its first ticket, the plain one its second.
        divisor: gated form: entry e reads row e // divisor of a.
        early: what is asked for before the previous kernel has ended. Gated form: the first weights of so many groups,
            which are likely to have rows. Plain form, 1: those of the tiles, which must be listed by then.
    """
    assert not (config.gated and routed.in_order)
    device, columns = out.device.index, ceil_div(n, config.tile_columns)
    row_tiles, sms = routing.max_tiles(routed.entries, routed.num_groups), num_sms(device)
    run = select_run(row_tiles, columns, weight.shape[1], sms)
    grid = min(sms, row_tiles * ceil_div(columns, run))
    map_a = bytes(BYTES)
    if not config.gated:
        map_a = row_major_map(a.stride(0), a.shape[0], weight.shape[1], _BOX_ROWS).at(a.data_ptr())
    kernel(config, device).launch(
        (grid, 1, 1),
        _THREADS,
        config.shared_bytes,
        (
            map_a,
            a.data_ptr(),
            scale_a.data_ptr(),
            weight.data_ptr(),
            scale_b.data_ptr(),
            out.data_ptr(),
            0 if out_scale is None else out_scale.data_ptr(),
            routed.sorted_entries,
            routed.tiles,
            routed.num_tiles,
            routed.ticket(0 if config.gated else 1),
            a.stride(0),
            out.stride(0),
            divisor,
            n,
            weight.shape[2],
            weight.shape[1],
            scale_a.stride(0),
            scale_b.stride(1),
            0 if out_scale is None else out_scale.stride(0),
            run,
            early,
            ELEMENT_TYPES.get(out.dtype, 0),
            int(grouped_tall.is_vectorised(out)),
        ),
        launcher.current_stream(device),
        pdl=True,
    )
    return grid


def launch_contiguous(
    codes: torch.Tensor,
    scale_a: torch.Tensor,
    weight: torch.Tensor,
    scale_b: torch.Tensor,
    out: torch.Tensor,
    m_indices: torch.Tensor,
) -> None:
    """Multiply each row by the weight of its group, by work queued on the current stream; nothing is checked.

    Args:
        codes: [m, k] float8_e4m3fn, contiguous columns, k % 128 == 0.
        scale_a: [m, k / 128] float32, MN-major.
        weight: [num_groups, k / 128, align(n, 8), 128] packed.
        scale_b: [num_groups, k / 128, align(ceil(n / 128), 4) + 4] packed.
        out: [m, n] bfloat16, float16 or float32, contiguous columns; rows of group -1 are not written.
        m_indices: [m] int32; rows of a group that are not neighbours cost time, and nothing else.
    """
    if codes.stride(1) != 1 or codes.stride(0) % 16 or codes.data_ptr() % 16:
        codes = codes.contiguous()
    groups, m_indices, scales = weight.shape[0], m_indices.contiguous(), scale_a.t()
    if len(m_indices) >= TALL_ROWS * groups and grouped_tall.takes(scales):
        routed = routing.route_in_order(m_indices, groups, routing.TALL_TILE_ROWS)
        grouped_tall.launch(codes, scales, weight, scale_b, out, routed)
        return
    routed = routing.route_in_order(m_indices, groups)
    launch_grouped(PLAIN, codes, scales, weight, scale_b, out, None, out.shape[1], routed)
