"""What attention of decode steps takes over: norm and rotation of what it is given, codes for the linear behind."""

from __future__ import annotations

import pytest
import torch

from fp8_backend.kernels import attended_linear, attention, gemm, layout, norm_rope, quantize, reference
from fp8_backend.kernels.problem import Machine
from fp8_backend.kernels.reference import relative_error
from tests.emulation import emulated
from tests.test_attention import ERROR, HEAD, assert_attends, needs_compiler, operands


# Codes in rows and in tiles; heads that one CTA ends, and heads that the last of several does.
@needs_compiler
@pytest.mark.parametrize("tile_rows", [0, 8, 16])
@pytest.mark.parametrize("dtype", attention.DTYPES)
def test_codes_are_those_of_the_outputs(tile_rows, dtype, tmp_path_factory):
    given = operands([0, 37, 700, 5, 64], 6, 2, 16, dtype)
    out = torch.empty_like(given[0]).contiguous()
    with emulated(tmp_path_factory.getbasetemp(), Machine(2, (1, 1, 1))):
        codes = attention.empty_codes(5, 6, tile_rows, out.device)
        codes.buffer.fill_(255)
        attention.launch(*given, HEAD**-0.5, out, codes=codes)
        expected = torch.full_like(codes.buffer, 255)
        size = attention.code_bytes(5, 6 * HEAD, tile_rows)
        scales = expected[size:].data_ptr()
        quantize.prepare(out.view(5, -1), tile_rows)(0, out.data_ptr(), expected.data_ptr(), scales)
    assert_attends(given, out, dtype)
    assert torch.equal(codes.buffer, expected)


def linear_of(n, k):
    codes, scale = torch.randn(n, k).to(torch.float8_e4m3fn), torch.rand(-(-n // 128), k // 128) + 0.1
    return layout.pack_weight(codes), layout.pack_scale(scale, n, k)


# A kernel for few tokens, whose codes lie in tiles, and one that takes them in rows.
@needs_compiler
@pytest.mark.parametrize("m", [3, 20])
def test_the_linear_behind_takes_codes(m, tmp_path_factory):
    given, n = operands([5 + each for each in range(m)], 4, 2, 16, torch.bfloat16), 72
    out, (weight, scale) = torch.empty_like(given[0]).contiguous(), linear_of(n, 4 * HEAD)
    rows = out.view(m, -1)

    def attend():
        codes = attended_linear.leave_codes(out)
        attention.launch(*given, HEAD**-0.5, out, codes=codes)
        return codes

    with emulated(tmp_path_factory.getbasetemp(), Machine(2, (1, 1, 1))) as machine:

        def launched(x=rows):
            before = machine.runs
            found = attended_linear.attended_linear(x, weight, scale, n)
            return machine.runs - before, found

        assert attend() is None  # nobody has said how
        count, expected = launched()
        assert attend() is not None
        assert torch.equal(launched()[1], expected) and launched()[0] == count  # once
        quantised = attend() is not None and launched()
        assert quantised[0] == 1 and torch.equal(quantised[1], expected)
        attend()
        attended_linear.forget_codes()
        assert launched()[0] == count
        attend()
        assert launched(rows.clone())[0] == count  # of other rows
        attend()
        assert launched(rows[: m - 1])[0] >= 1 and launched()[0] == count


@pytest.mark.gpu
@pytest.mark.parametrize("m", [1, 8, 16, 17, 48, 300])
def test_the_linear_behind_takes_codes_on_a_gpu(m):
    """In a graph, behind attention that starts early: outputs of this replay, and the bits of rows quantised apart."""
    given, n = operands([100 + each for each in range(m)], 32, 8, 16, torch.bfloat16, "cuda"), 4096
    weight, scale = (each.cuda() for each in linear_of(n, 32 * HEAD))
    out = torch.empty(m, 32, HEAD, device="cuda", dtype=torch.bfloat16)

    def call():
        attention.launch(*given, HEAD**-0.5, out, codes=attended_linear.leave_codes(out))
        return attended_linear.attended_linear(out.view(m, -1), weight, scale, n)

    call()
    assert attended_linear.leave_codes(out) is not None
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = [call() for _ in range(3)]
    for seed in range(5):
        torch.manual_seed(seed)
        given[0].normal_()
        graph.replay()
        codes, scales = quantize.per_token_group_quant(out.view(m, -1))
        expected = torch.empty_like(found[0])
        gemm.fp8_gemm_nt((codes, scales), (weight, scale), expected)
        assert_attends(given, out, torch.bfloat16)
        assert all(relative_error(each, expected) < ERROR[torch.bfloat16] for each in found)
        assert all(torch.equal(each, found[0]) for each in found)


def raw_operands(lengths, query_heads, key_heads, block, device="cpu"):
    """Return rows of a linear in place of queries, what makes heads of them, and the operands that they are to give."""
    dtype, m = torch.bfloat16, len(lengths)
    _, keys, values, table, counts = operands(lengths, query_heads, key_heads, block, dtype, device)
    wide = torch.randn(m, (query_heads + 2 * key_heads + 1) * HEAD, device=device).to(dtype)
    rows = wide[:, : (query_heads + 2 * key_heads) * HEAD]
    weights = torch.rand(2, HEAD, device=device).to(dtype) + 0.5
    angles = torch.randn(max(lengths) + 3, HEAD, device=device).to(dtype)
    positions = (counts.long() - 1).clamp_min(0)
    queries, made = reference.qk_norm_rope(rows, positions, *weights, angles, 1e-6, query_heads, key_heads)
    slots = table.gather(1, (positions // block)[:, None])[:, 0].long() * block + positions % block
    slots = torch.where(counts > 0, slots, -1)
    raw = attention.RawHeads(positions, slots, weights[0], weights[1], angles, 1e-6)
    true = [tensor.clone() for tensor in (keys, values)]
    reference.keep(made, rows[:, (query_heads + key_heads) * HEAD :].unflatten(1, (key_heads, HEAD)), *true, slots)
    new = slots[slots >= 0]
    for tensor in (keys, values):  # the newest tokens are not there yet
        tensor[new // block, new % block] = float("nan")
    given = rows[:, : query_heads * HEAD].unflatten(1, (query_heads, HEAD)), keys, values, table, counts
    return rows, raw, given, (queries, *true, table, counts)


def bits(tensor):
    return tensor.contiguous().view(torch.int16)


def assert_kept(found, true, dtype=torch.bfloat16):
    """Compare halves of a cache of which most rows are nobody's."""
    for one, other in zip(found, true, strict=True):
        assert torch.equal(one.isnan(), other.isnan())
        assert relative_error(one.nan_to_num(), other.nan_to_num()) < ERROR[dtype]


# The newest token first of all, first of a slice, of a tile, of a chunk; in a slice that is fetched late.
@needs_compiler
@pytest.mark.parametrize(("query_heads", "key_heads"), [(4, 2), (10, 1)])
@pytest.mark.parametrize("lengths", [[1, 0, 17, 65], [257, 16, 3], [449, 900, 64]])
def test_norm_and_rotation_are_joined(lengths, query_heads, key_heads, tmp_path_factory):
    rows, raw, given, true = raw_operands(lengths, query_heads, key_heads, 16)
    assert attention.takes_raw(rows, raw)
    out = torch.empty_like(true[0]).contiguous()
    with emulated(tmp_path_factory.getbasetemp(), Machine(2, (1, 1, 1))) as machine:
        for machine.seed, least_tiles in enumerate((attention.LEAST_TILES, 1)):
            out.fill_(float("nan"))
            attention.launch(*given, HEAD**-0.5, out, least_tiles, raw=raw)
            expected = attention.reference(*true, HEAD**-0.5, torch.float64)
            assert relative_error(out, expected) < 3 * ERROR[torch.bfloat16]  # the reference rounds every step
            assert_kept(given[1:3], true[1:3])
        before = [tensor.clone() for tensor in given[1:3]]
        again = torch.empty_like(out)
        rows.mul_(-1)
        attention.launch(*given, HEAD**-0.5, again, raw=raw._replace(slots=torch.full_like(raw.slots, -1)))
        assert all(torch.equal(*pair) for pair in zip(map(bits, before), map(bits, given[1:3]), strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize(("query_heads", "key_heads"), [(32, 8), (64, 4), (6, 3)])
@pytest.mark.parametrize("lengths", [[1, 2, 64, 65], [130] * 32, [5000, 3, 0, 900], [33] * 300])
def test_norm_and_rotation_are_joined_on_a_gpu(lengths, query_heads, key_heads):
    """In a graph, behind the linear that gives the rows, while which it starts."""
    rows, raw, given, true = raw_operands(lengths, query_heads, key_heads, 16, "cuda")
    m, n = rows.shape
    weight, scale = (each.cuda() for each in linear_of(n, 1024))
    x = torch.randn(m, 1024, device="cuda").bfloat16()
    out = torch.empty(m, query_heads, HEAD, device="cuda", dtype=torch.bfloat16)

    def call():
        made = gemm.fp8_linear(x, weight, scale, n)
        queries = made[:, : query_heads * HEAD].unflatten(1, (query_heads, HEAD))
        attention.launch(queries, *given[1:], HEAD**-0.5, out, raw=raw)
        return made

    call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(3):
            made = call()
    keys, values = (tensor.clone() for tensor in true[1:3])
    kept = norm_rope.KeyValueCache(keys, values, raw.slots)
    for seed in range(10):
        torch.manual_seed(seed)
        x.normal_()
        graph.replay()
        operands_of_heads = raw.positions, raw.query_weight, raw.key_weight, raw.angles, 1e-6, query_heads, key_heads
        queries, _ = norm_rope.qk_norm_rope(made, *operands_of_heads, kept)
        expected = attention.reference(queries, keys, values, *given[3:], HEAD**-0.5, torch.float64)
        assert relative_error(out, expected) < 2 * ERROR[torch.bfloat16]
        assert_kept(given[1:3], (keys, values))
