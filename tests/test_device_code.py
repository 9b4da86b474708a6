"""The device code itself on an emulated multiprocessor (tests/emulation): right answers, no hang, no hazard.

Small problems with partial tiles everywhere, a few interleavings of each; the GPU tests have the large ones and the
hardware's own order of things.
"""

from __future__ import annotations

import shutil
from dataclasses import replace
from functools import partial

import pytest
import torch

from benchmarks import sanitize
from benchmarks.experts_parts import launches_up_to
from fp8_backend.kernels import (
    decode_heuristics,
    experts,
    experts_prefill_plan,
    gemm,
    grouped,
    grouped_sorted,
    heuristics,
    launcher,
    layout,
    m_grouped,
    masked,
    reference,
    routing,
)
from fp8_backend.kernels.compiler import CUDA_FOLDER
from fp8_backend.kernels.decode import DecodePlan
from fp8_backend.kernels.problem import DecodeConfig, GemmProblem, Machine
from fp8_backend.kernels.reference import BLOCK, ceil_div
from tests.emulation import EmulationError, emulated
from tests.routed import route

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++ to compile the device code for the CPU")
BF16_ERROR = 0.002  # rounding of the output: 0.0017
MACHINE = Machine(2, (1, 1, 1))  # so few that persistent CTAs take several tiles
# Two roundings to bfloat16, and between the GEMMs a code that is now and then its neighbour.
EXPERTS_ERROR = 0.008


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("device-code")


def make_weight(n, k):
    codes = (torch.randn(n, k) * 60).clamp(-448, 448).to(torch.float8_e4m3fn)
    return codes, torch.rand(ceil_div(n, BLOCK), ceil_div(k, BLOCK)) * 1e-3 + 1e-4


def make_experts(num_groups, n, k):
    codes = (torch.randn(num_groups, n, k) * 32).to(torch.float8_e4m3fn)
    scale = torch.rand(num_groups, ceil_div(n, BLOCK), ceil_div(k, BLOCK)) * 0.002 + 0.001
    packed = torch.stack([layout.pack_weight(each).view(torch.uint8) for each in codes]).view(codes.dtype)
    return codes, scale, packed, torch.stack([layout.pack_scale(each, n, k) for each in scale])


def truth(x, codes, scale, bias=None):
    q, s = reference.per_token_group_quant(x)
    return reference.fp8_gemm_nt(q[:, : codes.shape[1]], s, codes, scale, bias)


def gemm_problem(config, n, packed=True):
    """Return what gemm.launch_gemm takes of a problem whose k-blocks go around the ring of stages and on."""
    m, k = (300 if config.block_m == 256 else 140), (config.num_stages + 2) * BLOCK  # two tiles of rows at least
    (codes, scale), x, bias = make_weight(n, k), torch.randn(m, k, dtype=torch.bfloat16), torch.randn(n)
    rows = layout.pack_weight(codes) if packed else codes
    weight = gemm.Weight(rows, layout.arrange_scale(scale, n, k), n, k)
    choices = heuristics.gemm_choices(GemmProblem(m, n, k, MACHINE))
    of_config = [choice for _, choice in choices if choice.config == config]
    return reference.per_token_group_quant(x), weight, bias, truth(x, codes, scale, bias), of_config


@pytest.mark.parametrize("config", heuristics.GEMM_CONFIGS, ids=str)
@pytest.mark.parametrize("packed", [True, False])
def test_every_gemm_config(config, packed, folder):
    torch.manual_seed(0)
    # The wide ones in tiles that each cut a block of scales elsewhere.
    n = 136 if config.block_n <= 128 else 2 * config.block_n + 104
    a, weight, bias, expected, choices = gemm_problem(config, n, packed)
    with emulated(folder, MACHINE) as machine:
        for choice in choices if packed else [replace(choices[0], strip=2)]:
            # Other elements around the output; its rows are aligned for the copy engine with 16 bits, and not with 32.
            dtype = torch.bfloat16 if packed else torch.float32
            surroundings = torch.full((len(expected) + 2, n + 16), float("nan"), dtype=dtype)
            out = surroundings[1:-1, 8:-8]
            gemm.launch_gemm(choice, *a, weight, out, bias)
            assert reference.relative_error(out, expected) < BF16_ERROR, choice
            out.fill_(float("nan"))
            assert surroundings.isnan().all()
        assert not packed or machine.filled_rows() == 0  # the last tile of rows is a whole one


# A decode kernel quantises rows of bf16 that it can read 16 bytes at a time; codes of others come from a launch before.
@pytest.mark.parametrize(("dtype", "stride"), [(torch.float16, 1000), (torch.bfloat16, 1003)], ids=str)
def test_rows_that_a_decode_kernel_cannot_read(dtype, stride, folder):
    torch.manual_seed(5)
    n, k = 136, 1000
    (codes, scale), x = make_weight(n, k), torch.randn(2, stride, dtype=dtype)[:, :k]
    weight, expected = (layout.pack_weight(codes), layout.pack_scale(scale, n, k)), truth(x, codes, scale)
    with emulated(folder, MACHINE) as machine:
        assert reference.relative_error(gemm.fp8_linear(x, *weight, n), expected) < BF16_ERROR
        assert "quantize.cuh" in {spec.file for spec, _ in machine.loaded}
        before = len(machine.loaded)
        common = x.bfloat16().contiguous()
        assert reference.relative_error(gemm.fp8_linear(common, *weight, n), truth(common, codes, scale)) < BF16_ERROR
        assert {spec.file for spec, _ in list(machine.loaded)[before:]} == {"decode.cuh"}


# What racecheck watches (benchmarks/sanitize.py) must be right, too.
def test_every_lane_may_arrive(folder, monkeypatch):
    torch.manual_seed(4)
    n, k = 136, 1000
    (codes, scale), x = make_weight(n, k), torch.randn(70, k, dtype=torch.bfloat16)
    weight, expected = (layout.pack_weight(codes), layout.pack_scale(scale, n, k)), truth(x, codes, scale)
    with emulated(folder, MACHINE) as machine, monkeypatch.context() as patch:
        patch.setattr(launcher, "load", launcher.load)  # to be put back
        sanitize.let_every_lane_arrive()
        for m in (1, 70):
            assert reference.relative_error(gemm.fp8_linear(x[:m], *weight, n), expected[:m]) < BF16_ERROR
        call_of_pairs(monkeypatch)
        call_of_guess("an empty group")
        files = {"quantize.cuh", "decode.cuh", "gemm.cuh", "runs.cuh", "grouped_sorted.cuh", "masked.cuh"}
        assert {spec.file for spec, _ in machine.loaded} == files
        assert all(("EVERY_LANE_ARRIVES", 1) in spec.defines for spec, _ in machine.loaded)


@pytest.mark.parametrize(
    "config", [config for config in decode_heuristics.DECODE_CONFIGS if config.split in (1, 4)], ids=str
)
def test_decode_configs(config, folder):
    torch.manual_seed(1)
    m, n, k = config.tokens - 1, 200, 11 * BLOCK - 8
    (codes, scale), x = make_weight(n, k), torch.randn(m, k, dtype=torch.bfloat16)
    weight = layout.pack_weight(codes), layout.pack_scale(scale, n, k)
    with emulated(folder, MACHINE):
        for rows in (40, 72):
            stages = decode_heuristics.decode_stages(
                config, rows, ceil_div(k, BLOCK), decode_heuristics.HALF_SHARED_BYTES
            )
            tiles = ceil_div(n, rows)
            grid = min(tiles, MACHINE.num_sms) if config.split == 1 else tiles * config.split
            choice = decode_heuristics.DecodeChoice(config, rows, stages, grid, prefetch=2)
            out = torch.full((m, n), float("nan"), dtype=torch.bfloat16)
            DecodePlan(choice, x, out, None)(x, *weight, out, None)
            assert reference.relative_error(out, truth(x, codes, scale)) < BF16_ERROR, choice


# The whole way of a serving call: choice, plan, quantisation in the kernel or ahead of it, bias, k of no whole block.
@pytest.mark.parametrize(
    ("m", "dtype"), [(1, torch.bfloat16), (12, torch.bfloat16), (20, torch.float16), (70, torch.bfloat16)]
)
def test_linear(m, dtype, folder):
    torch.manual_seed(m)
    n, k = 136, 1000
    (codes, scale), x, bias = make_weight(n, k), torch.randn(m, k, dtype=dtype), torch.randn(n, dtype=dtype)
    weight = layout.pack_weight(codes), layout.pack_scale(scale, n, k)
    with emulated(folder, Machine(8, (4, 2, 1))) as machine:
        y = gemm.fp8_linear(x, *weight, n, bias)
        again = gemm.fp8_linear(x, *weight, n, bias)  # prepared, and another interleaving
    assert reference.relative_error(y, truth(x, codes, scale, bias)) < BF16_ERROR
    assert torch.equal(y, again) and machine.runs >= 2


# Ids that are skipped, experts of other ranks, a hidden size of no whole block; units of several rows.
@pytest.mark.parametrize("form", ["decode", "joint", "prefill"])
@pytest.mark.parametrize("on_input", [False, True])
def test_experts(form, on_input, folder):
    torch.manual_seed(2)
    m, hidden, intermediate, num_groups, top_k = 20, 272, 128, 3, 1 if on_input else 2
    w13, scale_13, *packed_13 = make_experts(num_groups, 2 * intermediate, hidden)
    w2, scale_2, *packed_2 = make_experts(num_groups, hidden, intermediate)
    x, weights = torch.randn(m, hidden, dtype=torch.bfloat16), torch.rand(m, top_k)
    ids = torch.rand(m, 5).topk(top_k, dim=1).indices.int()
    ids[0] = -1
    here = torch.tensor([1, -1, 0, 2, -1], dtype=torch.int32)
    expected = reference.fp8_experts(x, weights, ids, w13, scale_13, w2, scale_2, here, on_input)
    with emulated(folder, MACHINE) as machine:
        for machine.seed in (0, 1):
            out = torch.full_like(x, float("nan"))
            experts.launch(form, x, weights, ids, *packed_13, *packed_2, out, here, on_input)
            assert reference.relative_error(out, expected) < EXPERTS_ERROR and (out[0] == 0).all()


# Rows that have been weighted are float32 whatever the tokens are, so they do not tell what the outputs are.
@pytest.mark.parametrize("form", ["joint", "prefill"])
def test_weighted_rows_of_both_dtypes(form, folder):
    torch.manual_seed(10)
    w13, scale_13, *packed_13 = make_experts(2, 256, 128)
    w2, scale_2, *packed_2 = make_experts(2, 128, 128)
    weights, ids = torch.rand(3, 1), torch.tensor([[0], [1], [0]], dtype=torch.int32)
    with emulated(folder, MACHINE):
        for dtype in (torch.float16, torch.bfloat16):
            x = torch.randn(3, 128, dtype=dtype)
            expected, out = reference.fp8_experts(x, weights, ids, w13, scale_13, w2, scale_2, None, True), x * 0
            experts.launch(form, x, weights, ids, *packed_13, *packed_2, out, None, True)
            assert reference.relative_error(out, expected) < EXPERTS_ERROR, dtype


# Tiles of all forms, rings of stages that are gone around, entries that are left out, a hidden size of no whole block.
@pytest.mark.parametrize("sorted_rows", [1, 1000])
def test_experts_of_many_rows(sorted_rows, folder, monkeypatch):
    monkeypatch.setattr(experts_prefill_plan, "SORTED_ROWS", sorted_rows)
    monkeypatch.setattr(experts_prefill_plan, "SORTED_INTERMEDIATE", 128)
    torch.manual_seed(9)
    counts, hidden, intermediate, num_groups, top_k = [141, 40, 100, 272], 656, 256, 4, 1
    w13, scale_13, *packed_13 = make_experts(num_groups, 2 * intermediate, hidden)
    w2, scale_2, *packed_2 = make_experts(num_groups, hidden, intermediate)
    ids = torch.cat([torch.full((count,), i) for i, count in enumerate([*counts, 7])]).int()
    ids = ids[torch.randperm(len(ids))].view(-1, top_k)
    here = torch.tensor([2, 0, 1, 3, -1], dtype=torch.int32)
    x, weights = torch.randn(len(ids), hidden, dtype=torch.bfloat16), torch.rand(len(ids), top_k)
    expected = reference.fp8_experts(x, weights, ids, w13, scale_13, w2, scale_2, here)
    out = torch.full_like(x, float("nan"))
    with emulated(folder, MACHINE), launches_up_to() as names:
        experts.launch("prefill", x, weights, ids, *packed_13, *packed_2, out, here, False)
    launches = {
        1: ["route", "quantize_sorted", "sort_scales", "grouped_sorted", "grouped_sorted", "combine"],
        1000: ["route", "quantize", "grouped_gathered", "grouped_sorted", "combine"],
    }
    assert [name.partition("-")[0] for name in names] == launches[sorted_rows]
    for expert in range(5):
        rows = ids[:, 0] == expert
        error = reference.relative_error(out[rows], expected[rows]) if expert < 4 else out[rows].abs().max()
        assert error < EXPERTS_ERROR, expert


# Tokens, experts a token, columns of x and of h, experts, CTAs: stages of 1, 2 and 4 k-blocks of both GEMMs, tiles of
# all widths, one and several of them a CTA, rings that are gone around more than once, rows of x that are not aligned.
SINGLE_CALLS = [
    (8, 8, 272, 128, 8, 3),
    (5, 2, 1028, 256, 4, 2),
    (3, 2, 200, 384, 3, 8),
    (2, 1, 600, 128, 1, 6),
    (1, 2, 320, 128, 2, 8),
    (1, 1, 600, 128, 1, 16),
    (4, 1, 64, 640, 1, 8),
    (2, 2, 128, 512, 2, 8),
    (7, 1, 192, 384, 2, 8),
]


def single_call(m, top_k, hidden, intermediate, num_groups, seed=0):
    """Return a call of experts with an expert of another rank, a skipped token and a repeated expert; its answer."""
    torch.manual_seed(seed)
    w13, scale_13, *packed_13 = make_experts(num_groups, 2 * intermediate, hidden)
    w2, scale_2, *packed_2 = make_experts(num_groups, hidden, intermediate)
    x = torch.randn(m, hidden, dtype=torch.float16 if m % 2 else torch.bfloat16)
    weights, ids = torch.rand(m, top_k), torch.rand(m, num_groups + 1).topk(top_k, dim=1).indices.int()
    ids[0], ids[-1, :2] = -1, 0
    here = torch.tensor([*torch.randperm(num_groups), -1], dtype=torch.int32)
    expected = reference.fp8_experts(x, weights, ids, w13, scale_13, w2, scale_2, here)
    return (x, weights, ids, *packed_13, *packed_2), here, expected


def serve(given, here):
    """Return what the op makes of a call, with the form that is chosen."""
    (m, hidden), dtype = given[0].shape, given[0].dtype
    surroundings = torch.full((m + 2, hidden), float("nan"), dtype=dtype)
    out = experts.fp8_experts(*given, here, out=surroundings[1:-1])
    assert surroundings[0].isnan().all() and surroundings[-1].isnan().all()
    return out


@pytest.mark.parametrize("call", SINGLE_CALLS, ids=str)
def test_experts_in_one_launch(call, folder):
    *sizes, ctas = call
    given, here, expected = single_call(*sizes)
    with emulated(folder, Machine(ctas, (1, 1, 1))) as machine:
        for machine.seed in (0, 1):
            out = serve(given, here)
            assert reference.relative_error(out, expected) < EXPERTS_ERROR
            assert sizes[0] == 1 or (out[0] == 0).all()
        given[2].fill_(-1)  # no expert here: the CTAs do not meet
        assert (serve(given, here) == 0).all()
        assert machine.runs == 3


@pytest.mark.parametrize(
    ("form", "kernels"),
    [
        ("single", ["experts_single"]),
        ("decode", ["experts_quantize", "experts_up", "experts_quantize", "experts_down"]),
        ("joint", ["quantize", "experts_joint", "combine"]),
        ("prefill", ["route", "quantize", "grouped_gathered", "grouped_sorted", "combine"]),
    ],
)
def test_experts_are_cut_launch_by_launch(form, kernels, folder):
    """What benchmarks.experts_parts times: the op as far as it has come."""
    packed_13, packed_2 = make_experts(3, 256, 256)[2:], make_experts(3, 256, 128)[2:]
    x, ids = torch.randn(2, 256, dtype=torch.bfloat16), torch.tensor([[0], [2]], dtype=torch.int32)
    out = torch.full_like(x, float("nan"))
    with emulated(folder, MACHINE):
        call = partial(experts.launch, form, x, torch.rand(2, 1), ids, *packed_13, *packed_2, out, None, False)
        with launches_up_to(len(kernels) - 1) as begun:
            call()
        assert out.isnan().all()
        with launches_up_to() as names:
            call()
    assert [name.partition("-")[0] for name in names] == kernels and begun == names[:-1]
    assert out.isfinite().all()


def tile_sizes(rows, extra_rows):
    """Return the rows of each tile of an expert: full ones take a few more if all rows find a place so."""
    full, rest = divmod(rows, routing.TILE_ROWS)
    if rest > full * extra_rows:
        return [routing.TILE_ROWS] * full + [rest]
    taken = [min(extra_rows, max(0, rest - t * extra_rows)) for t in range(full)]
    return [routing.TILE_ROWS + more for more in taken]


def tiles_of(counts, extra_rows):
    """Return what route.cuh lists for so many rows of each expert, in bands of 16 tiles."""
    tiles, first_row = [], 0
    for expert, rows in enumerate(counts):
        sizes = tile_sizes(rows, extra_rows)
        for t, size in enumerate(sizes):
            band = t // 16 * 16
            tiles.append([expert, first_row, size | min(len(sizes) - band, 16) << 16, len(tiles) - t % 16])
            first_row += size
    return tiles


def items_of(tiles, runs):
    """Return the tile and the run of columns of each index, as item_at of tiles.cuh finds them."""
    for index in range(len(tiles) * runs):
        _, _, packed, first = tiles[index // runs]
        local = index - first * runs
        yield first + local % (packed >> 16), local // (packed >> 16)


def poisoned(size, dtype, device):
    """Stand for torch.empty, with bytes behind that must not be written, either."""
    return torch.full((size + 256,), 0xA5, dtype=dtype, device=device)[:size]


# Rows of an expert: a few, about one and two tiles, about a band of tiles; one CTA, and a cluster that counts together.
@pytest.mark.parametrize(
    "counts",
    [[0, 1, 16, 17, 127, 128, 0, 129, 144, 145, 272, 288, 289], [0, 2048, 2064, 3, 2065, 2304, 4485], [130, 0, 259]],
    ids=["one CTA", "cluster", "few"],
)
@pytest.mark.parametrize(("extra_rows", "with_places"), [(0, False), (0, True), (16, True)])
def test_route(counts, extra_rows, with_places, folder, monkeypatch):
    torch.manual_seed(5)
    groups = torch.repeat_interleave(torch.arange(-1, len(counts)), torch.tensor([77, *counts]))
    ids, here = groups[torch.randperm(len(groups))].int(), sum(counts)
    with emulated(folder, MACHINE), monkeypatch.context() as patch:
        patch.setattr(torch, "empty", poisoned)
        routed = route(ids, None, len(counts), extra_rows, with_places)
    assert (routed.storage._base[len(routed.storage) :] == 0xA5).all()
    words, start = routed.storage.view(torch.int32), routed.storage.data_ptr()
    tiles = words[4 : 4 + 4 * int(words[2])].view(-1, 4).tolist()
    order = words[(routed.sorted_entries - start) // 4 :][:here].long()
    assert words[:2].tolist() == [0, 0] and tiles == tiles_of(counts, extra_rows)
    assert len(tiles) <= routing.max_tiles(len(ids), len(counts))
    assert sorted(items_of(tiles, 3)) == [(tile, run) for tile in range(len(tiles)) for run in range(3)]
    assert torch.equal(ids[order].long(), groups[77:])
    assert sorted(order.tolist()) == (ids >= 0).nonzero().flatten().tolist()
    if with_places:
        places = torch.full_like(ids, -1)  # 0xffffffff
        places[order] = torch.arange(here).int()
        assert torch.equal(words[(routed.places - start) // 4 :], places)
    else:
        assert routed.places == 0 and routed.sorted_entries + 4 * len(ids) == start + len(routed.storage)


# Runs longer than a band of tiles and than a thread's rows, of one row, cut by rows of no group and by other groups.
@pytest.mark.parametrize("counts", [[5], [300, 0, 2200, 128, 1, 144], [1] * 7, [4100], [145], [3, 288, 289, 2340]])
def test_runs_are_listed_in_tiles(counts, folder):
    torch.manual_seed(7)
    ids = torch.cat([torch.full((count,), i % 4 - (i == 3) * 9) for i, count in enumerate(counts)]).int()
    with emulated(folder, MACHINE):
        routed = routing.route_in_order(ids, 3, extra_rows=routing.EXTRA_ROWS)
    words = routed.storage.view(torch.int32)
    tiles = words[4 : 4 + 4 * int(words[2])].view(-1, 4).tolist()
    starts = [i for i in range(len(ids)) if i == 0 or ids[i] != ids[i - 1]]
    expected = []
    for start, end in zip(starts, [*starts[1:], len(ids)], strict=True):
        if not 0 <= ids[start] < 3:
            continue
        sizes, row = tile_sizes(end - start, routing.EXTRA_ROWS), start
        for t, rows in enumerate(sizes):
            rows_and_width = rows | min(len(sizes) - t // 8 * 8, 8) << 16
            expected.append([int(ids[start]), row, rows_and_width, len(expected) - t % 8])
            row += rows
    assert words[:2].tolist() == [0, 0] and tiles == expected


# DeepGEMM's padded layout with rows of group -1 between the groups, and groups that end anywhere.
# Tiles of 256 rows, of 128 and up to 16 more, of 128; elements that are written by 8, and one by one.
@pytest.mark.parametrize(
    ("tall_rows", "extended_rows", "n", "dtype"),
    [(0, 0, 264, torch.bfloat16), (512, 0, 264, torch.bfloat16), (512, 512, 264, torch.bfloat16)]
    + [(0, 0, 261, torch.float32), (512, 0, 203, torch.float32), (512, 512, 261, torch.float16)],
)
def test_contiguous_grouped_gemm(tall_rows, extended_rows, n, dtype, folder, monkeypatch):
    torch.manual_seed(6)
    monkeypatch.setattr(grouped, "TALL_ROWS", tall_rows)
    monkeypatch.setattr(grouped_sorted, "EXTENDED_ROWS", extended_rows)
    indices = torch.tensor([0] * 70 + [-1] * 58 + [1] * 3 + [2] * 144 + [3] * 265, dtype=torch.int32)
    k = 6 * BLOCK
    codes, scale, packed, packed_scale = make_experts(4, n, k)
    x = torch.randn(len(indices), k, dtype=torch.bfloat16)
    out = torch.full((len(indices), n), float("nan"), dtype=dtype)
    with emulated(folder, MACHINE):
        a = reference.per_token_group_quant(x)
        m_grouped.m_grouped_fp8_gemm_nt_contiguous(a, (packed, packed_scale), out, indices)
    for group in range(4):
        rows = indices == group
        assert reference.relative_error(out[rows], truth(x[rows], codes[group], scale[group])) < BF16_ERROR
    assert out[indices < 0].isnan().all()


def call_of_blocks(counts, max_m, n, k, expected_m):
    """Multiply so many of max_m rows of each group; return the output, which has been compared with the truth."""
    torch.manual_seed(3)
    codes, scale, *packed = make_experts(len(counts), n, k)
    x = torch.randn(len(counts), max_m, k, dtype=torch.bfloat16)
    q, s = (torch.stack(each) for each in zip(*(reference.per_token_group_quant(rows) for rows in x), strict=True))
    out = torch.full((len(counts), max_m, n), float("nan"), dtype=torch.bfloat16)
    m_grouped.m_grouped_fp8_gemm_nt_masked((q, s), packed, out, torch.tensor(counts).int(), expected_m)
    for group, rows in enumerate(counts):
        if rows:
            expected = truth(x[group, :rows], codes[group], scale[group])
            assert reference.relative_error(out[group, :rows], expected) < BF16_ERROR
        assert out[group, rows:].isnan().all()
    return out


# Groups of no row, of a few, of more than a narrow tile holds, of more than a tile.
@pytest.mark.parametrize("expected_m", [8, 256])
def test_masked_grouped_gemm(expected_m, folder):
    counts, max_m = ([0, 3, 100], 104) if expected_m == 8 else ([3, 0, 300], 301)
    with emulated(folder, MACHINE):
        call_of_blocks(counts, max_m, 264, 256, expected_m)


# Rows of the groups, columns of the output, k-blocks (a ring has four stages), CTAs. Tiles have 256 columns.
GUESSES = {
    "right": ([3, 100, 64], 264, 6, 2),
    "right, for few k-blocks": ([3, 100, 64], 264, 2, 2),
    "right, the last round cut": ([5, 9, 100], 264, 6, 5),
    "right, all tiles cut": ([5, 100], 256, 6, 4),
    "right, halves of no column": ([5, 100], 128, 5, 4),
    "right, tiles for three CTAs of four": ([3, 7, 9], 256, 5, 4),
    "an empty group": ([0, 3, 100], 264, 6, 2),
    "an empty group, few k-blocks": ([0, 3, 100], 264, 2, 2),
    "a group of two units": ([130, 3, 7], 256, 5, 4),
    "whole tiles are cut": ([3, 7, 0], 256, 5, 4),
    "cut tiles are whole": ([5, 130], 256, 6, 4),
    "no rows": ([0, 0, 0], 264, 6, 2),
}


def call_of_guess(name):
    """Run the masked GEMM as GUESSES has it."""
    counts, n, k_blocks, _ = GUESSES[name]
    return call_of_blocks(counts, max(*counts, 2), n, k_blocks * BLOCK, 64)


@pytest.mark.parametrize("name", GUESSES)
def test_masked_weights_are_guessed(name, folder, monkeypatch):
    with emulated(folder, Machine(GUESSES[name][-1], (1, 1, 1))) as machine:
        guessed = [call_of_guess(name) for machine.seed in (0, 1)]
        monkeypatch.setattr(masked, "_GUESSED_ROWS", range(0))
        out = call_of_guess(name)
    assert all(torch.equal(each.view(torch.int16), out.view(torch.int16)) for each in guessed)


BEHIND = "barrier_wait(full + 8 * ring.stage, ring.parity);\n" + 24 * " "
RING, EXCHANGE = 0, -1  # which choice of a configuration: k by one CTA, or by as many as can be
AHEAD, PLAIN = (next(c for c in heuristics.GEMM_CONFIGS if c.block_m == 64 and c.ahead == at) for at in (True, False))
FAULTS = {
    "a stage is filled before it is free": (PLAIN, RING, "barrier_wait(empty + 8 * s, ring.parity ^ 1);", ""),
    "a stage is free when one warp has read it": (PLAIN, RING, "MATH_WARPGROUPS * 4 * kArrivalsOfWarp;", "1;"),
    "a stage is read at once": (PLAIN, RING, "if (!full_already) barrier_wait(full + 8 * s, ring.parity);", ""),
    "half of the sums are waited for": (PLAIN, EXCHANGE, "kShares * kShareBytes);", "kShares * kShareBytes / 2);"),
    "the next product is issued at once": (AHEAD, RING, BEHIND + "issue(next", "issue(next"),
    "a product is promoted before it has ended": (AHEAD, RING, "wgmma_wait<1>();", "wgmma_wait<2>();"),
}


def planted(tmp_path, file, right, wrong, count=1):
    """Return a folder of the device code with a text of one file replaced."""
    shutil.copytree(CUDA_FOLDER, tmp_path, dirs_exist_ok=True)
    source = (tmp_path / file).read_text()
    assert source.count(right) == count
    (tmp_path / file).write_text(source.replace(right, wrong))
    return tmp_path


# What the emulation is for: each of these is wrong in some interleaving, and one of a few shows it.
@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults_are_found(fault, folder, tmp_path):
    torch.manual_seed(4)
    config, which, right, wrong = FAULTS[fault]
    sources = planted(tmp_path, "gemm.cuh", right, wrong)
    a, weight, _, expected, choices = gemm_problem(config, 136)
    out = torch.full(expected.shape, float("nan"), dtype=torch.bfloat16)
    with emulated(folder, MACHINE, sources) as machine, pytest.raises(AssertionError):
        for machine.seed in range(4):
            gemm.launch_gemm(choices[which], *a, weight, out, None)
            assert reference.relative_error(out, expected) < BF16_ERROR


DRAINED = "for (; fetched > 0; --fetched, ring.advance(stages.number)) {"
# What is planted, and in which of the calls it shows.
GUESS_FAULTS = {
    "a guess is of other weights": (
        "fetch_weights(guessed.unit, guessed, s, s)",
        "fetch_weights(guessed.unit, guessed, 0, s)",
        "right",
    ),
    "a wrong guess is not waited for": (DRAINED, "for (fetched = 0; fetched > 0;) {", "an empty group"),
    "nor is it without rows": (DRAINED, "for (fetched = 0; fetched > 0;) {", "no rows"),
    "its stages are not released": ("barrier_arrive(stages.empty + 8 * ring.stage);", "", "an empty group"),
    "every guess is right": ("const bool right = ", "const bool right = true || ", "a group of two units"),
    "a half is as good as all": (" && first.half == guessed.half;", ";", "cut tiles are whole"),
    "what is over is waited for": (
        "--fetched;\n",
        "--fetched; barrier_wait(stages.empty + 8 * ring.stage, ring.parity ^ 1);\n",
        "right, tiles for three CTAs of four",
    ),
}


@pytest.mark.parametrize("fault", GUESS_FAULTS)
def test_planted_faults_of_masked_guesses_are_found(fault, folder, tmp_path):
    right, wrong, name = GUESS_FAULTS[fault]
    sources = planted(tmp_path, "masked.cuh", right, wrong)
    with emulated(folder, Machine(GUESSES[name][-1], (1, 1, 1)), sources) as machine, pytest.raises(AssertionError):
        for machine.seed in range(16):
            call_of_guess(name)


MEETING = "if (thread == 0) meet_grid(&grid_arrivals, round, blockIdx.x == 0, gridDim.x);\n"
# What is planted, and in which of the calls it shows.
SINGLE_FAULTS = {
    "the grid does not meet": (MEETING, "", 2),
    "one thread alone knows that the grid has met": (MEETING + " " * 8 + "named_barrier(3, kMathThreads);", MEETING, 2),
    "sums are overwritten by the next tile's": ("buffer ^= 1", "buffer ^= 0", 2),
    "a stage is filled before it is free": ("barrier_wait(empty + 8 * at.stage, at.parity ^ 1);", "", 1),
}


@pytest.mark.parametrize("fault", SINGLE_FAULTS)
def test_planted_faults_of_one_launch_are_found(fault, folder, tmp_path):
    right, wrong, number = SINGLE_FAULTS[fault]
    *sizes, ctas = SINGLE_CALLS[number]
    sources = planted(tmp_path, "experts_single.cuh", right, wrong)
    with emulated(folder, Machine(ctas, (1, 1, 1)), sources) as machine, pytest.raises(AssertionError):
        for machine.seed in range(4):
            given, here, expected = single_call(*sizes, machine.seed)  # h of the call before has other values
            assert reference.relative_error(serve(given, here), expected) < EXPERTS_ERROR


# Ten tiles of a k-block each: one math warpgroup can be tiles ahead of the other, which takes its sums from it.
def call_of_narrow_tiles(seed):
    torch.manual_seed(seed)
    m, hidden, intermediate, num_groups = 6, 128, 640, 2
    w13, scale_13, *packed_13 = make_experts(num_groups, 2 * intermediate, hidden)
    w2, scale_2, *packed_2 = make_experts(num_groups, hidden, intermediate)
    x, weights, ids = torch.randn(m, hidden, dtype=torch.bfloat16), torch.rand(m, 1), torch.arange(m)[:, None].int() % 2
    expected, out = reference.fp8_experts(x, weights, ids, w13, scale_13, w2, scale_2), torch.full_like(x, float("nan"))
    experts.launch("prefill", x, weights, ids, *packed_13, *packed_2, out, None, False)
    assert reference.relative_error(out, expected) < EXPERTS_ERROR


def test_sums_cross_between_warpgroups_tile_by_tile(folder):
    with emulated(folder, Machine(1, (1, 1, 1))) as machine:
        for machine.seed in range(2):
            call_of_narrow_tiles(machine.seed)


def test_sums_overwritten_before_they_are_read_are_found(folder, tmp_path):
    sources = planted(tmp_path, "grouped_gathered.cuh", "barrier_wait(exchange_read, exchange_parity);", "")
    with emulated(folder, Machine(1, (1, 1, 1)), sources) as machine:
        with pytest.raises((AssertionError, EmulationError)):
            for machine.seed in range(4):
                call_of_narrow_tiles(machine.seed)


# What a producer has filled ahead may have been read and emptied before it comes to it: the phase to wait for is over.
def test_producers_that_wait_for_what_is_over_are_found(folder, tmp_path):
    right, wait = "--fetched;\n", "barrier_wait(empty + 8 * s, ring.parity ^ 1);\n"
    sources = planted(tmp_path, "grouped_sorted.cuh", right, right + wait)
    with (
        emulated(folder, Machine(1, (1, 1, 1)), sources) as machine,
        pytest.raises(EmulationError, match="nothing moves"),
    ):
        for machine.seed in range(64):
            call_of_narrow_tiles(machine.seed)


# Three and two tiles of 128 rows: clusters that share weights, and, for the third, rows.
def call_of_pairs(monkeypatch):
    monkeypatch.setattr(grouped_sorted, "EXTENDED_ROWS", 0)
    indices, (n, k) = torch.tensor([0] * 300 + [1] * 150, dtype=torch.int32), (520, 7 * BLOCK)
    codes, scale, *packed = make_experts(2, n, k)
    x, out = torch.randn(len(indices), k, dtype=torch.bfloat16), torch.full((len(indices), n), float("nan"))
    m_grouped.m_grouped_fp8_gemm_nt_contiguous(reference.per_token_group_quant(x), packed, out, indices)
    for group in range(2):
        rows = indices == group
        assert reference.relative_error(out[rows], truth(x[rows], codes[group], scale[group])) < BF16_ERROR


# What one CTA of a cluster fetches lands in the other, too.
def test_stages_that_the_other_cta_still_reads_are_found(folder, tmp_path, monkeypatch):
    right = "arrive_for_warp_at_ranks<CLUSTER>(at.empty + 8 * s, low, high, lane);"
    wrong = "barrier_arrive_after_words(at.empty + 8 * s, low, high, lane < CLUSTER);"
    sources = planted(tmp_path, "grouped_sorted.cuh", right, wrong)
    with emulated(folder, MACHINE, sources) as machine, pytest.raises((AssertionError, EmulationError)):
        for machine.seed in range(4):
            call_of_pairs(monkeypatch)


# Lanes of a warp need not go on together: the one that releases a stage for all must not leave others at its barrier.
def test_lanes_left_behind_are_found(folder, tmp_path):
    sources = planted(tmp_path, "decode.cuh", "__syncwarp();  // one lane arrives for all\n", "", count=2)
    n, k, config = 136, 11 * BLOCK, DecodeConfig(8, False, 1)
    x, out = torch.randn(8, k, dtype=torch.bfloat16), torch.empty(8, n, dtype=torch.bfloat16)
    codes, scale = make_weight(n, k)
    weight = layout.pack_weight(codes), layout.pack_scale(scale, n, k)
    choice = decode_heuristics.DecodeChoice(config, rows=40, num_stages=4, grid=1, prefetch=4)
    with emulated(folder, MACHINE, sources) as machine, pytest.raises(EmulationError):
        for machine.seed in range(8):
            DecodePlan(choice, x, out, None)(x, *weight, out, None)
