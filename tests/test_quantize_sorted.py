"""Codes and scales at the sorted places of all entries of a token, bit for bit those of the reference."""

from __future__ import annotations

import shutil

import pytest
import torch

from fp8_backend.kernels import launcher, quantize_sorted, reference, routing
from fp8_backend.kernels.problem import Machine
from fp8_backend.kernels.reference import BLOCK, align, ceil_div
from tests.emulation import emulated
from tests.routed import route

POISON = 0xA5


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("device-code")


def make_x(m, hidden, row_stride):
    """Return rows of different magnitudes, one of zeros, one with an infinity, one with a NaN."""
    x = torch.randn(m, row_stride) * torch.logspace(-6, 3, m)[:, None]
    x[m // 2], x[1, hidden - 1], x[2, 0] = 0, float("inf"), float("nan")
    return x


def make_ids(m, top_k, num_ids):
    """Return ids with a token that goes nowhere, entries that are skipped and an id of no expert."""
    ids = torch.randint(0, num_ids, (m, top_k), dtype=torch.int32)
    ids[0], ids[m // 3, 0], ids[-1, -1] = -1, -1, num_ids + 3
    return ids


def placed_entries(ids, positions):
    """Return which entries have an expert, if ids have these positions or -1."""
    known = (ids >= 0) & (ids < len(positions))
    return (known & (positions[ids.clamp(0, len(positions) - 1)] >= 0)).flatten().nonzero().flatten()


def check(x, ids, here, num_groups, extra_rows=0):
    """Route and quantise x and sort its scales; compare all of each output."""
    (m, top_k), k_blocks = ids.shape, ceil_div(x.shape[1], BLOCK)
    codes = torch.full((m * top_k + 3, k_blocks * BLOCK), POISON, dtype=torch.uint8, device=x.device)
    scale = torch.full((k_blocks, align(m * top_k, 4)), -1.0, device=x.device)
    surroundings = torch.full((m + 2, align(k_blocks, 4)), -1.0, device=x.device)
    token_scale = surroundings[1:-1]
    assert token_scale.shape == quantize_sorted.token_scales(m, x.shape[1])
    routed = route(ids, here, num_groups, extra_rows, with_places=True)
    stream, tokens = launcher.current_stream(x.device.index), token_scale.data_ptr()
    quantize_sorted.launch_like(x, top_k)(stream, x.data_ptr(), routed.places, codes.data_ptr(), tokens)
    of_routing = routed.sorted_entries, routed.tiles, routed.num_tiles
    quantize_sorted.sort_like(x, top_k)(stream, tokens, *of_routing, scale.data_ptr())
    start = (routed.places - routed.storage.data_ptr()) // 4
    places = routed.storage.view(torch.int32)[start:].long().cpu()
    placed = placed_entries(ids.cpu(), torch.arange(num_groups) if here is None else here.cpu())
    assert torch.equal((places >= 0).nonzero().flatten(), placed)
    assert sorted(places[placed].tolist()) == list(range(len(placed)))
    q, s = reference.per_token_group_quant(x.cpu())
    q = q.view(torch.uint8)
    q[q == 0xFF] = 0x7F  # the reference keeps the sign of a NaN
    expected_codes, expected_scale = torch.full_like(codes, POISON).cpu(), torch.full_like(scale, -1.0).cpu()
    expected_codes[places[placed]] = q[placed // top_k]
    expected_scale[:, places[placed]] = s[placed // top_k].t()
    assert torch.equal(codes.cpu(), expected_codes)
    assert torch.equal(token_scale[:, :k_blocks].cpu().view(torch.int32), s.view(torch.int32))
    assert (token_scale[:, k_blocks:] > 0).all() and (surroundings[[0, -1]] == -1).all()
    assert torch.equal(scale.cpu().view(torch.int32), expected_scale.view(torch.int32))


HERE = torch.tensor([2, -1, 0, 3, -1, 1], dtype=torch.int32)


# Rows that are read 16 bytes at a time and others; warps that have a token's last blocks alone, and threads that have
# few of the 8 whose scales they sort; slots past a warp's 8.
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++ to compile the device code for the CPU")
@pytest.mark.parametrize("with_map", [False, True])
@pytest.mark.parametrize(
    ("m", "top_k", "hidden", "row_stride", "dtype"),
    [
        (37, 1, 272, 280, torch.bfloat16),
        (13, 3, 1024, 1024, torch.float16),
        (21, 8, 1024, 1027, torch.bfloat16),
        (11, 8, 640, 640, torch.bfloat16),
        (10, 5, 1288, 1288, torch.bfloat16),
        (5, 19, 272, 272, torch.float16),
        (9, 2, 128, 136, torch.float32),
    ],
)
def test_codes_and_scales_at_their_places(m, top_k, hidden, row_stride, dtype, with_map, folder):
    torch.manual_seed(m)
    x, ids = make_x(m, hidden, row_stride).to(dtype), make_ids(m, top_k, 6 if with_map else 4)
    with emulated(folder, Machine(2, (1, 1, 1))):
        check(x[:, :hidden], ids, HERE if with_map else None, 4)


# Experts of several tiles, of which the last one may have a few rows more; no entry that is routed at all.
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++ to compile the device code for the CPU")
@pytest.mark.parametrize("extra_rows", [0, routing.EXTRA_ROWS])
@pytest.mark.parametrize(
    ("counts", "top_k"), [([141, 0, 272, 3], 2), ([3, 129, 145], 3), ([0, 0, 256], 8), ([0, 0], 8)]
)
def test_tiles_of_many_rows(counts, top_k, extra_rows, folder):
    torch.manual_seed(4)
    left_out = 48 + -sum(counts) % top_k  # up to whole tokens, for 48 is some of each top_k
    ids = torch.repeat_interleave(torch.arange(-1, len(counts)), torch.tensor([left_out, *counts]))
    ids = ids[torch.randperm(len(ids))].int().view(-1, top_k)
    x = make_x(len(ids), 272, 272).to(torch.bfloat16)
    with emulated(folder, Machine(2, (1, 1, 1))):
        check(x, ids, None, len(counts), extra_rows)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(("m", "top_k", "hidden"), [(5, 8, 7168), (333, 1, 272), (2049, 8, 2048), (700, 11, 1032)])
def test_on_the_gpu(m, top_k, hidden, dtype):
    torch.manual_seed(m)
    x, ids = make_x(max(m, 3), hidden, hidden + 8)[:m], make_ids(m, top_k, 60)
    here = torch.where(torch.arange(60) % 5 < 4, torch.arange(60), -1).int()
    check(x.to("cuda", dtype)[:, :hidden], ids.cuda(), here.cuda(), 60, routing.EXTRA_ROWS)
