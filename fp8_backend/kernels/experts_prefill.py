"""The experts op for many tokens: rows sorted by expert, two grouped GEMMs over the real row counts, one sum."""

from __future__ import annotations

from functools import cache
from math import prod

import torch

from fp8_backend.errors import ArgumentError
from fp8_backend.kernels import (
    grouped,
    grouped_gathered,
    grouped_sorted,
    launcher,
    quantize,
    quantize_sorted,
    routing,
)
from fp8_backend.kernels.backend import num_sms
from fp8_backend.kernels.compiler import KernelSpec
from fp8_backend.kernels.quantize import ELEMENT_TYPES, per_token_group_quant
from fp8_backend.kernels.reference import BLOCK, align, ceil_div
from fp8_backend.kernels.routing import Routing

_COMBINE = KernelSpec("combine.cuh", "combine")
_COMBINE_LAYOUT = launcher.ParamLayout(("u64",) * 5 + ("i64",) + ("u32",) * 5)
_COMBINE_THREADS, _COMBINE_COLUMNS = 256, 256 * 8
_LIKELY_ENTRIES = 2  # entries an expert, from which on most experts have some
# Rows an expert on average, and columns of h, from which on rows are sorted before the first GEMM and not gathered in
# it: the more tiles of columns that has, the more it gains, while the quantisation has all the rows to write
# (experts_sorted.json in benchmarks/results/h100 and h200).
SORTED_ROWS, SORTED_INTERMEDIATE = 96, 1024


def all_specs() -> tuple[KernelSpec, ...]:
    """Return every kernel this form needs beside quantize.cuh."""
    return (*grouped.all_specs(), quantize_sorted.SPEC, quantize_sorted.SORT_SPEC, _COMBINE)


def load_all() -> None:
    """Load every kernel on torch's current device."""
    device = torch.cuda.current_device()
    grouped.load_all()
    quantize_sorted.kernel(device)
    quantize_sorted.sort_kernel(device)
    _combine_kernel(device)


@cache
def _combine_kernel(device: int) -> launcher.Kernel:
    return launcher.load(_COMBINE, _COMBINE_LAYOUT)


def experts_prefill_workspace_bytes(
    m: int, top_k: int, hidden: int, intermediate: int, num_groups: int, router_weight_on_input: bool = False
) -> int:
    """Return the bytes of all tensors that `experts_prefill` allocates for 16-bit activations and int32 ids."""
    entries, k_blocks = m * top_k, ceil_div(hidden, BLOCK)
    between = entries * intermediate + intermediate // BLOCK * align(entries, 4) * 4
    if sorts_rows(entries, num_groups, intermediate, router_weight_on_input):
        scales = (k_blocks * align(entries, 4) + prod(quantize_sorted.token_scales(m, hidden))) * 4
        room = entries * _sorted_row_bytes(hidden)
        return routing.routing_bytes(entries, num_groups, with_places=True) + scales + between + room
    rows = entries if router_weight_on_input else m
    weighted = entries * hidden * 4 if router_weight_on_input else 0
    quantised = k_blocks * (rows * BLOCK + align(rows, 4) * 4)
    return weighted + quantised + routing.routing_bytes(entries, num_groups) + between + entries * hidden * 2


def sorts_rows(entries: int, num_groups: int, intermediate: int, router_weight_on_input: bool = False) -> bool:
    """Return whether the rows of so many entries are sorted by expert when they are quantised.

    A row is then written for each entry, and the first GEMM fetches its rows by tensor copies. Otherwise it is written
    once, and the threads of the first GEMM gather what they need, which costs that a tenth of its time and more.
    """
    many = entries >= SORTED_ROWS * num_groups and intermediate >= SORTED_INTERMEDIATE
    return many and not router_weight_on_input


def _sorted_row_bytes(hidden: int) -> int:
    """Return the bytes of a row of x in codes, whole blocks, or of one in 16-bit elements, whichever is more."""
    return max(ceil_div(hidden, BLOCK) * BLOCK, hidden * 2)


def experts_prefill(
    x: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    w13: torch.Tensor,
    scale_13: torch.Tensor,
    w2: torch.Tensor,
    scale_2: torch.Tensor,
    out: torch.Tensor,
    expert_map: torch.Tensor | None = None,
    router_weight_on_input: bool = False,
) -> None:
    """Write each token's weighted sum of w2 @ (silu(gate) * up) over its experts; gate and up are halves of w13 @ x.

    Five kernels: route and quantise at once, gated GEMM, GEMM, combine; six where rows are sorted first: route,
    quantise, sort the scales, and the same three. Nothing waits for the GPU; the same inputs give the same bits. Shapes
    are not checked.

    Args:
        x: [m, hidden] bfloat16 or float16, contiguous columns, hidden % 8 == 0.
        topk_weights: [m, top_k] float32.
        topk_ids: [m, top_k] int32 or int64; -1 is skipped.
        w13: [num_groups, ceil(hidden / 128), 2 * intermediate, 128] packed, intermediate % 128 == 0.
        scale_13: packed scales of w13.
        w2: [num_groups, intermediate / 128, align(hidden, 8), 128] packed.
        scale_2: packed scales of w2.
        out: [m, hidden] in x's dtype, 16-byte aligned rows; overwritten.
        expert_map: [global experts] int32: an expert's position in w13 or -1; None if ids are positions.
        router_weight_on_input: scale a token by its weight before its experts instead of after them.

    Raises:
        ArgumentError: hidden % 8 != 0, rows of out that are not 16-byte aligned, or more than 1024 experts.
    """
    (m, hidden), top_k, num_groups, intermediate = x.shape, topk_ids.shape[1], w13.shape[0], w13.shape[2] // 2
    if hidden % 8 or out.stride(0) % 8 or out.data_ptr() % 16:
        raise ArgumentError(
            f"hidden={hidden}, out's row stride {out.stride(0)} and address {out.data_ptr():#x}; the combining kernel "
            "takes multiples of 8 and a 16-byte aligned out; pad hidden with zero columns"
        )
    if m == 0 or top_k == 0:
        out.zero_()
        return
    device, entries = x.device, m * top_k
    ids, weights = topk_ids.to(torch.int32).contiguous(), topk_weights.float().contiguous()
    map_here = None if expert_map is None else expert_map.to(torch.int32).contiguous()
    between = torch.empty((entries, intermediate), dtype=torch.uint8, device=device)
    between_scale = torch.empty((intermediate // BLOCK, align(entries, 4)), dtype=torch.float32, device=device)
    gated = w13, scale_13, between, between_scale
    if sorts_rows(entries, num_groups, intermediate, router_weight_on_input):
        rows, routed = _first_of_sorted(x, ids, map_here, *gated)
        plain, listed = grouped_sorted.PLAIN, 1
    else:
        routed = routing.route(ids, map_here, num_groups)
        codes, scale = _quantise(x, weights if router_weight_on_input else None)
        divisor = 1 if router_weight_on_input else top_k
        likely = num_groups if _LIKELY_ENTRIES * num_groups <= entries else 0
        grid = grouped_gathered.launch(codes, scale.t(), *gated, routed, divisor, likely)
        # A CTA fills its multiprocessor: where there are so many, the next kernel's start when one has ended, and it
        # had waited for the routing. Elsewhere they may start before the tiles are listed.
        plain = grouped_sorted.select_plain(entries, num_groups)
        listed = int(grid == num_sms(device.index))
        rows = torch.empty((entries, hidden), dtype=x.dtype, device=device)
    second = between, between_scale[:, :entries], w2, scale_2, rows, None, hidden
    grouped_sorted.launch(plain, *second, routed, listed)
    _combine(ids, map_here, None if router_weight_on_input else weights, rows, out, num_groups)


def _quantise(x: torch.Tensor, weights: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Return codes and scales of tokens, or, where they are weighted, of a row for each of their experts."""
    if weights is None:
        return quantize.launch(x, beside=True)  # beside the routing, which does not need codes
    return per_token_group_quant((x.float()[:, None] * weights[:, :, None]).view(-1, x.shape[1]))


def _first_of_sorted(
    x: torch.Tensor,
    ids: torch.Tensor,
    expert_map: torch.Tensor | None,
    w13: torch.Tensor,
    scale_13: torch.Tensor,
    between: torch.Tensor,
    between_scale: torch.Tensor,
) -> tuple[torch.Tensor, Routing]:
    """Launch all up to the first GEMM on sorted rows; return room for the rows of the second, and where they belong."""
    (m, hidden), (entries, intermediate), k_blocks = x.shape, between.shape, w13.shape[1]
    routed = routing.route(ids, expert_map, w13.shape[0], routing.EXTRA_ROWS, with_places=True)
    # The first GEMM has read the codes when the second writes its rows: they share memory.
    room = torch.empty(entries * _sorted_row_bytes(hidden), dtype=torch.uint8, device=x.device)
    codes = room[: entries * k_blocks * BLOCK].view(entries, k_blocks * BLOCK)
    scale = torch.empty((k_blocks, align(entries, 4)), dtype=torch.float32, device=x.device)
    token_scale = torch.empty(quantize_sorted.token_scales(m, hidden), dtype=torch.float32, device=x.device)
    quantize_sorted.quantize_sorted(x, routed, entries // m, codes, token_scale)
    quantize_sorted.sort_scales(token_scale, routed, entries // m, scale)
    first = codes, scale[:, :entries], w13, scale_13, between, between_scale, intermediate
    grouped_sorted.launch(grouped_sorted.GATED, *first, routed)
    return room[: entries * hidden * 2].view(x.dtype).view(entries, hidden), routed


def _combine(
    ids: torch.Tensor,
    expert_map: torch.Tensor | None,
    weights: torch.Tensor | None,
    rows: torch.Tensor,
    out: torch.Tensor,
    num_groups: int,
) -> None:
    m, hidden = out.shape
    _combine_kernel(out.device.index).launch(
        (m, ceil_div(hidden, _COMBINE_COLUMNS), 1),
        _COMBINE_THREADS,
        0,
        (
            ids.data_ptr(),
            0 if expert_map is None else expert_map.data_ptr(),
            0 if weights is None else weights.data_ptr(),
            rows.data_ptr(),
            out.data_ptr(),
            out.stride(0),
            ids.shape[1],
            hidden,
            0 if expert_map is None else expert_map.numel(),
            num_groups,
            ELEMENT_TYPES[out.dtype],
        ),
        launcher.current_stream(out.device.index),
        pdl=True,
    )
