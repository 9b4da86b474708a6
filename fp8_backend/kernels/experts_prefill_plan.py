"""The launches of the experts op for many tokens, prepared once for each shape, and the workspace between them."""

from __future__ import annotations

from itertools import accumulate
from math import prod

import torch

from fp8_backend.kernels import (
    combine,
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
from fp8_backend.kernels.experts_plans import ExpertWeights
from fp8_backend.kernels.prepared import PreparedLaunch
from fp8_backend.kernels.reference import BLOCK, align, ceil_div
from fp8_backend.kernels.routing import Routing

_PART_ALIGNMENT = 128  # of each part of the workspace: a line of L2
_LIKELY_ENTRIES = 2  # entries an expert, from which on most experts have some
# Rows an expert on average, and columns of h, from which on rows are sorted before the first GEMM and not gathered in
# it: the more tiles of columns that has, the more it gains, while the quantisation has all the rows to write
# (experts_sorted.json in benchmarks/results/h100 and h200).
SORTED_ROWS, SORTED_INTERMEDIATE = 96, 1024


def all_specs() -> tuple[KernelSpec, ...]:
    """Return every kernel this form needs beside quantize.cuh."""
    return (*grouped.all_specs(), quantize_sorted.SPEC, quantize_sorted.SORT_SPEC, combine.SPEC)


def load_all() -> None:
    """Load every kernel on torch's current device."""
    device = torch.cuda.current_device()
    grouped.load_all()
    quantize_sorted.kernel(device)
    quantize_sorted.sort_kernel(device)
    combine.kernel(device)


def sorts_rows(entries: int, num_groups: int, intermediate: int, router_weight_on_input: bool = False) -> bool:
    """Return whether the rows of so many entries are sorted by expert when they are quantised.

    A row is then written for each entry, and the first GEMM fetches its rows by tensor copies. Otherwise it is written
    once, and the threads of the first GEMM gather what they need, which costs that a tenth of its time and more.
    """
    many = entries >= SORTED_ROWS * num_groups and intermediate >= SORTED_INTERMEDIATE
    return many and not router_weight_on_input


def workspace_parts(rows: int, entries: int, hidden: int, intermediate: int, num_groups: int, sorts: bool) -> list[int]:
    """Return the bytes of each part of the workspace, in order.

    Args:
        rows: of x that are quantised: tokens, or entries if each is weighted.
        entries: tokens times experts a token.
        hidden: columns of x.
        intermediate: columns of h.
        num_groups: experts on this rank.
        sorts: whether rows are sorted before the first GEMM.

    Returns:
        Of codes of h, and their scales; rows of the second GEMM in 16-bit elements; scales of x as the first GEMM reads
        them; codes of x, of none if rows are sorted: these lie where the second GEMM writes, which the first has read
        by then; scales of tokens, of none unless rows are sorted; the routing.
    """
    k_blocks, h_blocks = ceil_div(hidden, BLOCK), intermediate // BLOCK
    of_entries, scaled = entries * hidden * 2, entries if sorts else rows
    return [
        entries * intermediate,
        h_blocks * align(entries, 4) * 4,
        max(of_entries, entries * k_blocks * BLOCK) if sorts else of_entries,
        k_blocks * align(scaled, 4) * 4,
        0 if sorts else rows * k_blocks * BLOCK,
        prod(quantize_sorted.token_scales(rows, hidden)) * 4 if sorts else 0,
        routing.routing_bytes(entries, num_groups, with_places=sorts),
    ]


def workspace_bytes(parts: list[int]) -> int:
    """Return the bytes of a workspace of such parts."""
    return sum(align(part, _PART_ALIGNMENT) for part in parts)


def offsets_of(parts: list[int]) -> list[int]:
    """Return where each part of a workspace of such parts begins, in bytes."""
    return [0, *accumulate(align(part, _PART_ALIGNMENT) for part in parts)][: len(parts)]


class PrefillPlan:
    """The launches for tensors of one shape and dtype; used by one thread at a time.

    Five kernels: route and quantise at once, gated GEMM, GEMM, combine; six where rows are sorted first: route,
    quantise, sort the scales, and the same three.
    """

    def __init__(
        self,
        x: torch.Tensor,
        top_k: int,
        weights: ExpertWeights,
        out: torch.Tensor,
        map_length: int,
        weighted: bool,
        sorts: bool,
    ) -> None:
        """Prepare for tensors like these.

        Args:
            x: [m, hidden], or [m * top_k, hidden] of rows that have been weighted, contiguous columns.
            top_k: experts a token.
            weights: of the experts here.
            out: [m, hidden] in 16-bit elements, at least as the rows between are.
            map_length: of the map from global experts to those here; 0 without one.
            weighted: whether x's rows have been weighted.
            sorts: as `sorts_rows` has it.

        Raises:
            ArgumentError: more than 1024 experts.
        """
        w13, scale_13, w2, scale_2 = weights
        (m, hidden), num_groups, intermediate, device = out.shape, w13.shape[0], w13.shape[2] // 2, w13.device.index
        entries, rows, self._device, self._sorts = m * top_k, x.shape[0], device, sorts
        self._first: grouped_sorted.SortedLaunch | PreparedLaunch
        parts = workspace_parts(rows, entries, hidden, intermediate, num_groups, self._sorts)
        self._elements, self._offsets = workspace_bytes(parts) // out.element_size(), offsets_of(parts)
        self._routing = Routing(0, entries, num_groups, with_places=self._sorts)
        extra_rows = routing.EXTRA_ROWS if self._sorts else 0
        self._route = routing.launch_like(entries, map_length, num_groups, device, extra_rows).prepared()
        # Tensors like those between the launches, of which nothing but shape, strides and dtype is asked.
        between = torch.empty((entries, intermediate), dtype=torch.uint8, device="meta")
        between_scale = torch.empty((intermediate // BLOCK, align(entries, 4)), device="meta")[:, :entries]
        second = between, between_scale, w2, scale_2, out.new_empty((entries, hidden), device="meta"), None, hidden
        if self._sorts:
            plain, listed = self._prepare_sorted(x, top_k, w13, scale_13, between, between_scale)
        else:
            of_tokens = None if weighted else top_k
            plain, listed = self._prepare_gathered(x, of_tokens, w13, scale_13, between, between_scale)
        self._second = grouped_sorted.launch_like(plain, *second, self._routing, listed).prepared()
        self._combine = combine.launch_like(out, top_k, map_length, num_groups, device).prepared()

    def _prepare_sorted(
        self,
        x: torch.Tensor,
        top_k: int,
        w13: torch.Tensor,
        scale_13: torch.Tensor,
        between: torch.Tensor,
        between_scale: torch.Tensor,
    ) -> tuple[grouped_sorted.SortedConfig, int]:
        """Prepare all up to the first GEMM on sorted rows; return the second's form, and if weights may be early."""
        (entries, intermediate), k_blocks = between.shape, w13.shape[1]
        codes = torch.empty((entries, k_blocks * BLOCK), dtype=torch.uint8, device="meta")
        scale = torch.empty((k_blocks, align(entries, 4)), device="meta")[:, :entries]
        self._quantise = quantize_sorted.launch_like(x, top_k).prepared()
        self._sort = quantize_sorted.sort_like(x, top_k).prepared()
        first = codes, scale, w13, scale_13, between, between_scale
        self._first = grouped_sorted.launch_like(grouped_sorted.GATED, *first, intermediate, self._routing).prepared()
        return grouped_sorted.PLAIN, 1

    def _prepare_gathered(
        self,
        x: torch.Tensor,
        top_k: int | None,
        w13: torch.Tensor,
        scale_13: torch.Tensor,
        between: torch.Tensor,
        between_scale: torch.Tensor,
    ) -> tuple[grouped_sorted.SortedConfig, int]:
        """Do the same for rows that the first GEMM gathers; top_k: None if they are weighted."""
        rows, num_groups, k_blocks, entries = x.shape[0], w13.shape[0], w13.shape[1], between.shape[0]
        codes = torch.empty((rows, k_blocks * BLOCK), dtype=torch.uint8, device="meta")
        scale = torch.empty((k_blocks, align(rows, 4)), device="meta")
        # Beside the routing, which does not need codes, but not beside what weights the rows: that may still run.
        self._quantise = quantize.launch_like(x, beside=top_k is not None).prepared()
        likely = num_groups if _LIKELY_ENTRIES * num_groups <= entries else 0
        first = codes, scale, w13, scale_13, between, between_scale
        launch = grouped_gathered.launch_like(*first, self._routing, top_k or 1, likely)
        self._first = launch.prepared()
        # A CTA fills its multiprocessor: where there are so many, the next kernel's start when one has ended, and it
        # had waited for the routing. Elsewhere they may start before the tiles are listed.
        listed = int(launch.grid[0] == num_sms(self._device))
        return grouped_sorted.select_plain(entries, num_groups), listed

    def __call__(
        self,
        x: torch.Tensor,
        topk_weights: torch.Tensor | None,
        topk_ids: torch.Tensor,
        weights: ExpertWeights,
        out: torch.Tensor,
        expert_map: torch.Tensor | None,
    ) -> None:
        """As `ExpertsPlan` has it."""
        stream, routed = launcher.current_stream(self._device), self._routing
        workspace = out.new_empty(self._elements)
        base = workspace.data_ptr()
        between, between_scale, rows, scale, codes, token_scale, start = [base + offset for offset in self._offsets]
        ids, here = topk_ids.data_ptr(), 0 if expert_map is None else expert_map.data_ptr()
        tickets, tiles, entries = start + routed.ticket(0), start + routed.tiles, start + routed.sorted_entries
        listed = entries, tiles, start + routed.num_tiles
        if self._sorts:
            places, codes = start + routed.places, rows
            self._route(stream, ids, here, entries, places, *listed[1:], tickets)
            self._quantise(stream, x.data_ptr(), places, codes, token_scale)
            self._sort(stream, token_scale, *listed, scale)
        else:
            self._route(stream, ids, here, entries, 0, *listed[1:], tickets)
            self._quantise(stream, x.data_ptr(), codes, scale)
        pointers = weights.pointers()
        first, second = pointers[:2], pointers[2:]
        self._first(stream, codes, scale, *first, between, between_scale, *listed, tickets)
        self._second(stream, between, between_scale, *second, rows, 0, *listed, start + routed.ticket(1))
        of_router = 0 if topk_weights is None else topk_weights.data_ptr()
        self._combine(stream, ids, here, of_router, rows, out.data_ptr())
