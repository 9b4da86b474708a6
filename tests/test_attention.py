"""Attention of decode steps: the kernel on the emulated multiprocessor and on a GPU, and who is given it."""

from __future__ import annotations

import shutil

import pytest
import torch

from fp8_backend.errors import ArgumentError
from fp8_backend.kernels import attention
from fp8_backend.kernels.problem import Machine
from fp8_backend.kernels.reference import relative_error
from tests.emulation import EmulationError, emulated
from tests.test_device_code import planted

HEAD = attention.HEAD
ERROR = {torch.bfloat16: 0.004, torch.float16: 0.0006}  # rounding of weights and outputs
needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++ to compile the device code")


def operands(lengths, query_heads, key_heads, block, dtype, device="cpu", split=True):
    """Return queries, halves of a cache, table and lengths; rows that no token has are NaN, blocks in any order."""
    torch.manual_seed(sum(lengths) + query_heads)
    m, width = len(lengths), max(1, *(-(-length // block) for length in lengths))
    cache = torch.full((m * width + 1, key_heads, block, 2 * HEAD), float("nan"), dtype=dtype, device=device)
    if not split:  # keys of a token beside those of its other heads
        cache = torch.full((m * width + 1, block, key_heads, 2 * HEAD), float("nan"), dtype=dtype, device=device)
        cache = cache.transpose(1, 2)
    keys, values = cache.transpose(1, 2).split(HEAD, dim=-1)
    table = torch.randperm(m * width + 1, device=device)[: m * width].view(m, width).int()
    for request, length in enumerate(lengths):
        for first in range(0, length, block):
            tokens = min(block, length - first)
            rows = torch.randn(2, tokens, key_heads, HEAD, device=device)
            own = int(table[request, first // block])
            keys[own, :tokens], values[own, :tokens] = (rows[0] * 2).to(dtype), rows[1].to(dtype)
    queries = torch.randn(m, query_heads + 1, HEAD, device=device).to(dtype)[:, :query_heads]
    return queries, keys, values, table, torch.tensor(lengths, dtype=torch.int32, device=device)


def assert_attends(given, out, dtype):
    expected = attention.reference(*given, HEAD**-0.5, torch.float64)
    assert relative_error(out, expected) < ERROR[dtype]
    empty = given[4] == 0
    assert not out[empty].any()


# Requests of none, one, a slice, a tile and several chunks; groups of one, of five, of 8 and 16; more than a warp finds
# at once.
GRID = [
    ([1], 1, 1, 16),
    ([0, 1, 16, 17], 4, 2, 16),
    ([64, 0, 130, 65, 5], 5, 1, 32),
    ([700, 3], 8, 1, 16),
    ([90, 400], 16, 1, 48),
    ([70, *range(38), 300], 2, 1, 16),
]


@needs_compiler
@pytest.mark.parametrize(("lengths", "query_heads", "key_heads", "block"), GRID)
@pytest.mark.parametrize("dtype", attention.DTYPES)
def test_attention(lengths, query_heads, key_heads, block, dtype, tmp_path_factory):
    given = operands(lengths, query_heads, key_heads, block, dtype, split=query_heads % 2 == 0)
    surroundings = torch.full((len(lengths), query_heads + 2, HEAD), float("nan"), dtype=dtype)
    out = surroundings[:, 1:-1]
    with emulated(tmp_path_factory.getbasetemp(), Machine(2, (1, 1, 1))) as machine:
        for machine.seed, least_tiles in enumerate((attention.LEAST_TILES, 1)):
            out.fill_(float("nan"))
            attention.launch(*given, HEAD**-0.5, out, least_tiles)
            assert_attends(given, out, dtype)
            assert surroundings[:, 0].isnan().all() and surroundings[:, -1].isnan().all()


# What is planted: 700 tokens are three chunks of four slices for each warp.
FAULTS = {
    "slices are read at once": ("            wait_for_copies<kStages - 1>();\n", ""),
    "slices are read when a lane's copies are there": (
        "            __syncwarp();  // all lanes' copies are there\n",
        "",
    ),
    "the newest token is forgotten": ("if (has_newest && newest_slice < kStages) {", "if (false) {"),
    "tokens past the last one count": ("+ i < end ? own * scale : nothing", "+ i < end + 99 ? own * scale : nothing"),
    "warps' sums are read at once": (
        "        __syncthreads();\n        // A warp adds up a head",
        "        // A warp adds",
    ),
    "counters are left": ("            if (is_last[0]) *counter = 0;", ""),
    "the last chunk is all": ("for (u32 c = 0; c < chunks; ++c) {", "for (u32 c = chunks - 1; c < chunks; ++c) {"),
    "sums keep another scale": ("sum[h][part][i] *= kept;", ";"),
}


@needs_compiler
@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults_are_found(fault, tmp_path, tmp_path_factory):
    given = operands([37, 700], 4, 2, 16, torch.bfloat16)
    out = torch.empty_like(given[0]).contiguous()
    sources = planted(tmp_path, "attention.cuh", *FAULTS[fault])
    attention._workspaces.clear()
    with (
        emulated(tmp_path_factory.getbasetemp(), Machine(2, (1, 1, 1)), sources) as machine,
        pytest.raises((AssertionError, EmulationError)),
    ):
        for machine.seed in range(4):
            out.fill_(float("nan"))
            attention.launch(*given, HEAD**-0.5, out)
            assert_attends(given, out, torch.bfloat16)
    attention._workspaces.clear()


# A token of one request and of many; contexts that one CTA has and that all share; requests beyond the CTAs.
@pytest.mark.gpu
@pytest.mark.parametrize(("query_heads", "key_heads"), [(32, 8), (64, 8), (32, 4), (64, 4), (5, 1), (4, 4)])
@pytest.mark.parametrize("lengths", [[1], [131], [9000], [130] * 32, [0, 3, 12000, 64, 1, 700] * 2, [17] * 300])
@pytest.mark.parametrize("dtype", attention.DTYPES)
def test_attention_on_a_gpu(query_heads, key_heads, lengths, dtype):
    given = operands(lengths, query_heads, key_heads, 16, dtype, "cuda", split=key_heads != 4)
    out = torch.full((len(lengths), query_heads, HEAD), float("nan"), dtype=dtype, device="cuda")
    attention.decode_attention(*given, HEAD**-0.5, out)
    assert_attends(given, out, dtype)
    again = torch.full_like(out, float("nan"))
    for _ in range(5):
        attention.decode_attention(*given, HEAD**-0.5, again)
        assert torch.equal(out, again)


@pytest.mark.gpu
@pytest.mark.parametrize("length", [5, 64, 65, 300, 3000])
def test_it_waits_for_the_newest_token_on_a_gpu(length):
    """It starts while the kernel before it runs: in a graph, what it reads must be this replay's."""
    from fp8_backend.kernels import norm_rope

    m, query_heads, key_heads, dtype = 3, 32, 8, torch.bfloat16
    given = operands([length] * m, query_heads, key_heads, 16, dtype, "cuda")
    queries, keys, values, table, lengths = given
    rows = torch.randn(m, (query_heads + 2 * key_heads) * HEAD, device="cuda").to(dtype)
    positions = torch.full((m,), length - 1, device="cuda")
    cosines = torch.randn(length, HEAD, device="cuda").to(dtype)
    slots = table[torch.arange(m), (length - 1) // 16].long() * 16 + (length - 1) % 16
    ones = torch.ones(HEAD, device="cuda", dtype=dtype)
    kept = norm_rope.KeyValueCache(keys, values, slots)
    out = torch.empty(m, query_heads, HEAD, device="cuda", dtype=dtype)

    def call():
        made, _ = norm_rope.qk_norm_rope(rows, positions, ones, ones, cosines, 1e-6, query_heads, key_heads, kept)
        attention.decode_attention(made, keys, values, table, lengths, HEAD**-0.5, out)
        return made

    call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(3):
            made = call()
    for seed in range(20):
        torch.manual_seed(seed)
        rows.normal_()
        out.fill_(float("nan"))
        graph.replay()
        assert_attends((made, keys, values, table, lengths), out, dtype)


def test_operands_that_do_not_fit_are_refused():
    queries, keys, values, table, lengths = operands([3, 20], 4, 2, 16, torch.bfloat16)
    out = torch.empty_like(queries).contiguous()
    wrong = {
        "queries": (queries[:, :3], keys, values, table, lengths, 1.0, out[:, :3]),
        "keys": (queries, keys, values.float(), table, lengths, 1.0, out),
        "table": (queries, keys, values, table[:1], lengths, 1.0, out),
        "out": (queries, keys, values, table, lengths, 1.0, out[:1]),
    }
    for name, arguments in wrong.items():
        with pytest.raises(ArgumentError, match=f"^{name}: got .*; "):
            attention.decode_attention(*arguments)
    with pytest.raises(ArgumentError, match="expected contiguous int32; convert"):
        attention.decode_attention(queries, keys, values, table.long(), lengths, 1.0, out)


def test_what_runs_where_there_is_no_gpu():
    given = operands([3, 0, 20], 4, 2, 16, torch.bfloat16)
    out = torch.empty_like(given[0]).contiguous()
    attention.decode_attention(*given, HEAD**-0.5, out)
    assert_attends(given, out, torch.bfloat16)
