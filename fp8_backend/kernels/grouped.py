"""The grouped GEMM of rows that lie group by group, DeepGEMM's contiguous layout, and all kernels of its kind."""

from __future__ import annotations

import torch

from fp8_backend.kernels import grouped_gathered, grouped_sorted, grouped_tall, launcher, routing
from fp8_backend.kernels.compiler import KernelSpec

# Rows a group on average from which on contiguous rows go to grouped_tall.cuh (one H100, 4096x7168, us in tiles of 128
# and of 256 rows: 8 groups of 512 201 and 181, 16 of 0 to 1500 502 and 507, 64 of 264 1227 and 1337).
TALL_ROWS = 512
_SORTED = grouped_sorted.GATED, grouped_sorted.PLAIN, grouped_sorted.PLAIN_FEW


def all_specs() -> tuple[KernelSpec, ...]:
    """Return every kernel that a grouped GEMM can need."""
    listed = (routing.SPEC, routing.RUNS_SPEC, grouped_gathered.SPEC)
    return (*listed, *(config.spec() for config in _SORTED), *grouped_tall.all_specs())


def load_all() -> None:
    """Load every kernel on torch's current device."""
    device = torch.cuda.current_device()
    routing.kernel(device)
    routing.runs_kernel(device)
    grouped_gathered.kernel(device)
    for config in _SORTED:
        grouped_sorted.kernel(config, device)
    grouped_tall.load_all()


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
        scale_a: [m, k / 128] float32, MN-major, as `reference.mn_major` lays it out.
        weight: [num_groups, k / 128, align(n, 8), 128] packed.
        scale_b: [num_groups, k / 128, align(ceil(n / 128), 4) + 4] packed.
        out: [m, n] bfloat16, float16 or float32, contiguous columns; rows of group -1 are not written.
        m_indices: [m] int32; rows of a group that are not neighbours cost time, and nothing else.
    """
    if codes.stride(1) != 1 or codes.stride(0) % 16 or codes.data_ptr() % 16:
        codes = codes.contiguous()
    groups, m_indices, scales = weight.shape[0], m_indices.contiguous(), scale_a.t()
    assert grouped_tall.takes(scales), f"scale_a of strides {scale_a.stride()}"
    if len(m_indices) >= TALL_ROWS * groups:
        routed = routing.route_in_order(m_indices, groups, routing.TALL_TILE_ROWS)
        grouped_tall.launch(codes, scales, weight, scale_b, out, routed)
        return
    config = grouped_sorted.select_plain(len(m_indices), groups)
    routed = routing.route_in_order(m_indices, groups, extra_rows=routing.EXTRA_ROWS if config.extended else 0)
    operands = codes, scales, weight, scale_b, out
    launch = grouped_sorted.launch_like(config, *operands, None, out.shape[1], routed)
    of_routing = routed.sorted_entries, routed.tiles, routed.num_tiles, routed.ticket(1)
    stream = launcher.current_stream(weight.device.index)
    launch(stream, *(operand.data_ptr() for operand in operands), 0, *of_routing)
