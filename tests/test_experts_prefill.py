"""The host half of the experts op for many tokens: what is compiled, and the arithmetic of its buffers."""

from __future__ import annotations

import itertools

import pytest
import torch

from fp8_backend.kernels import (
    combine,
    experts_prefill,
    experts_prefill_plan,
    grouped_gathered,
    grouped_sorted,
    grouped_tall,
    quantize_sorted,
    routing,
)
from fp8_backend.kernels.compiler import CUDA_FOLDER, compile_kernel
from fp8_backend.kernels.problem import MAX_SHARED_BYTES
from fp8_backend.kernels.reference import BLOCK, align, ceil_div
from tests.device_source import constants, parameter_kinds

SPECS = experts_prefill_plan.all_specs()


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_no_spills_no_stack_no_warnings(spec):
    compiled = compile_kernel(spec)
    assert (compiled.spill_bytes, compiled.stack_bytes, compiled.warnings) == (0, 0, ())


# A parameter more or less on one side would shift all that follow it.
@pytest.mark.parametrize(
    ("file", "layout"),
    [
        ("route.cuh", routing._LAYOUT),
        ("runs.cuh", routing._RUNS_LAYOUT),
        ("quantize_sorted.cuh", quantize_sorted._LAYOUT),
        ("sort_scales.cuh", quantize_sorted._SORT_LAYOUT),
        ("grouped_gathered.cuh", grouped_gathered.LAYOUT),
        ("grouped_sorted.cuh", grouped_sorted.LAYOUT),
        ("grouped_tall.cuh", grouped_tall.LAYOUT),
        ("counts.cuh", grouped_tall.COUNTS_LAYOUT),
        ("combine.cuh", combine.LAYOUT),
    ],
)
def test_launch_parameters_are_the_kernels(file, layout):
    assert parameter_kinds(file) == layout.kinds


def test_constants_shared_with_the_device_code():
    files = ("route", "scan", "counts", "grouped_gathered", "grouped_sorted", "grouped_tall", "combine")
    route, scan, counts, gathered, in_order, tall, of_combine = (constants(f"{name}.cuh") for name in files)
    assert route["kThreads"] == scan["kThreads"] == routing.MAX_GROUPS == routing._THREADS
    assert counts["kTileRows"] == tall["kTileRows"] == 2 * tall["kHalfRows"] == routing.TALL_TILE_ROWS
    assert tall["kTileColumns"] == BLOCK
    assert route["kTileRows"] == gathered["kTileRows"] == in_order["kTileRows"] == routing.TILE_ROWS
    assert in_order["kExtraRows"] == routing.EXTRA_ROWS and 2 * in_order["kNarrowRows"] == routing.TILE_ROWS
    scatter = constants("quantize_sorted.cuh")
    assert scatter["kThreads"] == quantize_sorted._THREADS and scatter["kWarpBlocks"] == quantize_sorted._WARP_BLOCKS
    sort = constants("sort_scales.cuh")
    assert sort["kThreads"] == quantize_sorted._SORT_THREADS
    assert sort["kThreadBlocks"] == quantize_sorted._THREAD_BLOCKS
    assert of_combine["kThreads"] == combine.THREADS


def test_routing_lets_the_quantisation_start_when_tokens_are_there():
    """It runs beside the routing without a wait for what came before, so the routing must have waited."""
    route = (CUDA_FOLDER / "route.cuh").read_text()
    assert 0 < route.index("wait_for_previous_kernel();") < route.index("launch_next_kernel();")


def test_grouped_kernels_fit_a_multiprocessor():
    forms = grouped_sorted.GATED, grouped_sorted.PLAIN, grouped_sorted.PLAIN_FEW
    assert all(config.shared_bytes <= MAX_SHARED_BYTES for config in forms)
    assert max(grouped_gathered.SHARED_BYTES, grouped_tall.SHARED_BYTES) <= MAX_SHARED_BYTES


def test_max_tiles_is_the_worst_routing():
    for entries, num_groups in itertools.product((1, 5, 129, 260), (1, 2, 3)):
        splits = (
            (*cut, entries - sum(cut))
            for cut in itertools.product(range(entries + 1), repeat=num_groups - 1)
            if sum(cut) <= entries
        )
        worst = max(sum(ceil_div(rows, routing.TILE_ROWS) for rows in split) for split in splits)
        assert routing.max_tiles(entries, num_groups) == worst


@pytest.mark.parametrize(
    ("row_tiles", "columns", "k_blocks", "run"),
    [(766, 28, 16, 1), (766, 28, 2, 7), (1, 28, 2, 1), (5000, 28, 1, 14), (5000, 3, 1, 3), (60, 28, 2, 2)],
)
def test_select_run(row_tiles, columns, k_blocks, run):
    assert grouped_sorted.select_run(row_tiles, columns, k_blocks, 132) == run


# Tokens of few entries an expert are quantised once; of many, once for each, in the memory of the second GEMM's rows,
# with scales of their own and of each entry.
def test_workspace_is_m_times_top_k_rows():
    widths = top_k, hidden, intermediate, num_groups = 8, 7168, 2048, 256
    for m, tokens, places in (
        (1024, 1024 * (hidden + hidden // 128 * 4), 0),
        (8192, 8192 * (top_k + 1) * hidden // 128 * 4, 1),
    ):
        size = experts_prefill.experts_prefill_workspace_bytes(m, *widths)
        rows = m * top_k * (intermediate + intermediate // 128 * 4 + hidden * 2)
        listed = align(routing.routing_bytes(m * top_k, num_groups, bool(places)), 128)  # a part starts in a line of L2
        assert size == rows + tokens + listed
        assert routing.routing_bytes(m * top_k, num_groups) < 300_000


@pytest.mark.parametrize(
    ("tokens", "intermediate", "on_input", "sorts"),
    [(4096, 2048, False, True), (4096, 2048, True, False), (2048, 2048, False, False), (8192, 768, False, False)],
)
def test_rows_are_sorted_where_that_pays(tokens, intermediate, on_input, sorts):
    assert experts_prefill_plan.sorts_rows(tokens * 8, 256, intermediate, on_input) == sorts


def test_many_rows_take_the_extended_form_of_the_plain_gemm():
    plain = grouped_sorted.select_plain
    assert (plain(8 * 95, 8), plain(8 * 96, 8)) == (grouped_sorted.PLAIN_FEW, grouped_sorted.PLAIN)


def test_the_set_is_bounded():
    assert len(set(SPECS)) == len(SPECS) <= 14


def test_tiles_take_scales_that_end_with_their_rows():
    """Others go through the kernels that fetch each scale alone: a bulk copy would read past the last row."""
    scale = torch.zeros(6, 40)
    assert grouped_tall.takes(scale) and grouped_tall.takes(scale[:, :39]) and grouped_tall.takes(scale.view(2, 3, 40))
    assert not any(map(grouped_tall.takes, (scale[:, 4:], scale[:, :36], scale[:, 1:], torch.zeros(6, 39), scale.t())))
