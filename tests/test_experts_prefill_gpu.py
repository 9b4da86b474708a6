"""The experts op for many tokens and the contiguous grouped GEMM on a GPU, against the reference."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from fp8_backend.kernels import experts, grouped, reference
from fp8_backend.kernels.experts_prefill import experts_prefill, experts_prefill_workspace_bytes
from fp8_backend.kernels.grouped import launch_contiguous
from fp8_backend.kernels.reference import ceil_div, fp8_experts, relative_error
from tests.gpu_experts import LIMIT, draw_routing, make_weights
from tests.gpu_memory import requested_bytes
from tests.routed import route

pytestmark = pytest.mark.gpu


@pytest.fixture(params=["gathered", "sorted"])
def first_gemm(request, monkeypatch):
    """Have the first GEMM gather its rows, or sort them before it, wherever that can be."""
    least = 0 if request.param == "sorted" else 10**9
    monkeypatch.setattr("fp8_backend.kernels.experts_prefill_plan.SORTED_ROWS", least)
    monkeypatch.setattr("fp8_backend.kernels.experts_prefill_plan.SORTED_INTERMEDIATE", 0)


# Even and skewed routing; rows of one tile, of narrow tiles, of many bands; hidden of whole and broken blocks of 128.
@pytest.mark.parametrize(
    ("m", "top_k", "hidden", "intermediate", "num_groups", "kind"),
    [
        (1, 1, 128, 128, 1, "even"),
        (64, 8, 512, 256, 16, "even"),
        (64, 8, 1024, 256, 64, "even"),
        (300, 2, 272, 128, 5, "skipped"),
        (1000, 4, 1024, 384, 8, "one"),
        (777, 3, 640, 256, 6, "few"),
        # Three columns of the second GEMM: a pair of tiles has an item of no column, with which some walks begin.
        (2048, 4, 640, 256, 32, "even"),
        (1500, 10, 2048, 768, 32, "even"),
        (2100, 2, 7168, 256, 8, "skipped"),
    ],
)
def test_experts_are_the_references(m, top_k, hidden, intermediate, num_groups, kind, first_gemm):
    torch.manual_seed(m)
    w13, scale_13, packed_13, packed_scale_13 = make_weights(num_groups, 2 * intermediate, hidden)
    w2, scale_2, packed_2, packed_scale_2 = make_weights(num_groups, hidden, intermediate)
    x = torch.randn(m, hidden, device="cuda", dtype=torch.bfloat16)
    weights, ids = draw_routing(kind, m, top_k, num_groups)
    expected = fp8_experts(x, weights, ids, w13, scale_13, w2, scale_2)
    outs = [torch.full_like(x, float("nan")) for _ in range(3)]
    for out in outs:
        experts_prefill(x, weights, ids, packed_13, packed_scale_13, packed_2, packed_scale_2, out)
    assert relative_error(outs[0], expected) < LIMIT
    assert all(torch.equal(outs[0], out) for out in outs)


# A producer that was behind stages it had filled ahead waited for a phase that was over: now and then, and for ever.
@pytest.mark.parametrize("tokens", [512, 1000])
def test_calls_one_behind_the_other_end(tokens, first_gemm):
    torch.manual_seed(1)
    packed = [tensor for n, k in ((1536, 2048), (2048, 768)) for tensor in make_weights(64, n, k)[2:]]
    x = torch.randn(tokens, 2048, device="cuda", dtype=torch.bfloat16)
    outs = [torch.full_like(x, float("nan")) for _ in range(2)]
    for out in outs * 100:
        weights, ids = draw_routing("even", tokens, 8, 64)
        experts_prefill(x, weights, ids, *packed, out)
    experts_prefill(x, weights, ids, *packed, outs[0])
    assert torch.equal(*outs)


# A batch of 1 to 1500 tokens of one routing: row counts of narrow and wide tiles, and of either form without the mode.
def test_batch_invariant_tokens_do_not_depend_on_m(monkeypatch):
    monkeypatch.setattr(experts, "batch_invariant", lambda: True)
    torch.manual_seed(3)
    packed = [tensor for n, k in ((512, 1024), (1024, 256)) for tensor in make_weights(32, n, k)[2:]]
    x = torch.randn(1500, 1024, device="cuda", dtype=torch.bfloat16)
    weights, ids = draw_routing("even", 1500, 8, 32)
    whole = experts.fp8_experts(x, weights, ids, *packed)
    for m in (1, 2, 9, 64, 65, 300):
        assert torch.equal(experts.fp8_experts(x[:m], weights[:m], ids[:m], *packed), whole[:m]), m


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("on_input", [False, True])
def test_experts_of_one_rank(dtype, on_input, first_gemm):
    torch.manual_seed(0)
    m, top_k, hidden, intermediate, num_groups = 500, 1 if on_input else 6, 512, 256, 8
    w13, scale_13, packed_13, packed_scale_13 = make_weights(num_groups, 2 * intermediate, hidden)
    w2, scale_2, packed_2, packed_scale_2 = make_weights(num_groups, hidden, intermediate)
    x = torch.randn(m, hidden, device="cuda", dtype=dtype)
    weights, ids = draw_routing("skipped", m, top_k, 2 * num_groups)
    here = torch.full((2 * num_groups,), -1, dtype=torch.int32, device="cuda")
    here[3 : 3 + num_groups] = torch.randperm(num_groups, device="cuda").int()
    expected = fp8_experts(x, weights, ids, w13, scale_13, w2, scale_2, here, on_input)
    out, arguments = torch.full_like(x, float("nan")), (packed_13, packed_scale_13, packed_2, packed_scale_2)
    experts_prefill(x, weights, ids.long(), *arguments, out, here, on_input)
    assert relative_error(out, expected) < LIMIT
    assert not out[0].any()


def test_experts_are_captured_and_take_the_bytes_they_say(first_gemm):
    torch.manual_seed(0)
    m, top_k, hidden, intermediate, num_groups = 900, 4, 512, 256, 8
    _, _, packed_13, packed_scale_13 = make_weights(num_groups, 2 * intermediate, hidden)
    _, _, packed_2, packed_scale_2 = make_weights(num_groups, hidden, intermediate)
    x, out = (torch.randn(m, hidden, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    weights, ids = draw_routing("even", m, top_k, num_groups)
    arguments = (x, weights, ids, packed_13, packed_scale_13, packed_2, packed_scale_2, out)
    taken = requested_bytes(partial(experts_prefill, *arguments))
    assert taken == experts_prefill_workspace_bytes(m, top_k, hidden, intermediate, num_groups)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        experts_prefill(*arguments)
    other, other_ids = draw_routing("few", m, top_k, num_groups)
    x.normal_()
    weights.copy_(other)
    ids.copy_(other_ids)
    graph.replay()
    captured = out.clone()
    experts_prefill(*arguments)
    assert torch.equal(captured, out)


@pytest.mark.parametrize("counts", [[5], [0, 1, 0, 64, 65, 128, 129, 0, 700], [3000, 0, 1], [1] * 200, [300] * 1000])
def test_route_sorts_every_entry_once(counts):
    groups = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    ids = torch.cat([groups, torch.full((77,), -1)])[torch.randperm(len(groups) + 77)].int().cuda()
    routed = route(ids, None, len(counts))
    words = routed.storage.view(torch.int32).cpu()
    tiles = words[4 : 4 + 4 * int(words[2])].view(-1, 4).tolist()
    entries = words[(routed.sorted_entries - routed.storage.data_ptr()) // 4 :][: len(groups)]
    assert words[:2].tolist() == [0, 0]
    assert sorted(entries.tolist()) == (ids >= 0).nonzero().flatten().tolist()
    assert torch.equal(ids.cpu()[entries.long()].long(), groups)
    assert len(tiles) == sum(ceil_div(count, 128) for count in counts)
    for index, (group, first, packed, band) in enumerate(tiles):
        rows, width = packed & 0xFFFF, packed >> 16
        assert 0 < rows <= 128 and groups[first : first + rows].eq(group).all()
        assert band <= index < band + width <= len(tiles) and tiles[band][0] == tiles[band + width - 1][0] == group
    assert sum(packed & 0xFFFF for _, _, packed, _ in tiles) == len(groups)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    ("n", "k", "padded"), [(264, 256, False), (130, 128, True), (1024, 1536, True), (576, 7168, False)]
)
@pytest.mark.parametrize("tall_rows", [0, 512])
def test_contiguous(n, k, padded, dtype, tall_rows, monkeypatch):
    torch.manual_seed(n)
    counts = [0, 1, 130, 64, 0, 500, 65]
    monkeypatch.setattr(grouped, "TALL_ROWS", tall_rows)
    pieces = []
    for group, count in enumerate(counts):
        pieces += [group] * count + ([-1] * (-count % 128) if padded else [])
    m_indices = torch.tensor(pieces, dtype=torch.int32, device="cuda")
    codes_b, scale_b, packed, packed_scale = make_weights(len(counts), n, k)
    codes, scale_a = reference.per_token_group_quant(torch.randn(len(pieces), k, device="cuda"))
    out = torch.full((len(pieces), n), 7.0, device="cuda", dtype=dtype)
    launch_contiguous(codes, scale_a, packed, packed_scale, out, m_indices)
    for group in range(len(counts)):
        rows = m_indices == group
        if rows.any():
            wide = reference.fp8_gemm_nt(
                codes[rows], scale_a[rows], codes_b[group], scale_b[group], dtype=torch.float64
            )
            assert relative_error(out[rows], wide) < 0.002
    assert (out[m_indices < 0] == 7).all()


# In any order, too: a run of rows is a tile of its own then.
@pytest.mark.parametrize("tall_rows", [0, 5000])
def test_contiguous_rows_in_disorder(tall_rows, monkeypatch):
    torch.manual_seed(3)
    monkeypatch.setattr(grouped, "TALL_ROWS", tall_rows)
    groups, n, k = 5, 264, 640
    m_indices = torch.randint(-1, groups, (3000,), dtype=torch.int32, device="cuda")
    m_indices[500:1900] = 2
    codes_b, scale_b, packed, packed_scale = make_weights(groups, n, k)
    codes, scale_a = reference.per_token_group_quant(torch.randn(len(m_indices), k, device="cuda"))
    out = torch.full((len(m_indices), n), 7.0, device="cuda", dtype=torch.bfloat16)
    launch_contiguous(codes, scale_a, packed, packed_scale, out, m_indices)
    for group in range(groups):
        rows = m_indices == group
        wide = reference.fp8_gemm_nt(codes[rows], scale_a[rows], codes_b[group], scale_b[group], dtype=torch.float64)
        assert relative_error(out[rows], wide) < 0.002
    assert (out[m_indices < 0] == 7).all()
