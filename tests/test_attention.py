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
LAYOUTS = {torch.bfloat16: "NHD", torch.float16: "HND"}  # rows of a slice apart, and in one piece
STEEP = 0.3  # of scores, of which some are then so much greater than those before them that sums are scaled anew
needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++ to compile the device code")


def operands(lengths, query_heads, key_heads, block, dtype, device="cpu", layout="NHD"):
    """Return queries, halves of a cache, table and lengths; rows that no token has are NaN, blocks in any order.

    layout: vLLM's name of what lies side by side, a token's heads or a head's tokens of a block.
    """
    torch.manual_seed(sum(lengths) + query_heads)
    m, width = len(lengths), max(1, *(-(-length // block) for length in lengths))
    order = (block, key_heads) if layout == "NHD" else (key_heads, block)
    cache = torch.full((m * width + 1, *order, 2 * HEAD), float("nan"), dtype=dtype, device=device)
    keys, values = (cache if layout == "NHD" else cache.transpose(1, 2)).split(HEAD, dim=-1)
    table = torch.randperm(m * width + 1, device=device)[: m * width].view(m, width).int()
    for request, length in enumerate(lengths):
        for first in range(0, length, block):
            tokens = min(block, length - first)
            rows = torch.randn(2, tokens, key_heads, HEAD, device=device)
            own = int(table[request, first // block])
            keys[own, :tokens], values[own, :tokens] = (rows[0] * 2).to(dtype), rows[1].to(dtype)
    queries = torch.randn(m, query_heads + 1, HEAD, device=device).to(dtype)[:, :query_heads]
    return queries, keys, values, table, torch.tensor(lengths, dtype=torch.int32, device=device)


def assert_attends(given, out, dtype, scale=HEAD**-0.5):
    expected = attention.reference(*given, scale, torch.float64)
    assert relative_error(out, expected) < ERROR[dtype]
    empty = given[4] == 0
    assert not out[empty].any()


# Requests of none, one, a slice, a tile and several units; groups of one, two, five and 8; more than a warp finds
# at once; rows that are cut anywhere, several pieces to a CTA.
GRID = [
    ([1], 1, 1, 16),
    ([0, 1, 16, 17], 4, 2, 16),
    ([64, 0, 130, 65, 5], 5, 1, 32),
    ([700, 3], 8, 1, 16),
    ([90, 400], 8, 1, 48),
    ([70, *range(38), 300], 2, 1, 16),
    ([37, 700, 690, 0, 705, 700, 700], 4, 2, 16),
    ([200, 1000, 20, 900, 700], 6, 1, 32),
]


@needs_compiler
@pytest.mark.parametrize(("lengths", "query_heads", "key_heads", "block"), GRID)
@pytest.mark.parametrize("dtype", attention.DTYPES)
def test_attention(lengths, query_heads, key_heads, block, dtype, tmp_path_factory):
    given = operands(lengths, query_heads, key_heads, block, dtype, layout=LAYOUTS[dtype])
    surroundings = torch.full((len(lengths), query_heads + 2, HEAD), float("nan"), dtype=dtype)
    out = surroundings[:, 1:-1]
    with emulated(tmp_path_factory.getbasetemp(), Machine(2, (1, 1, 1))) as machine:
        for machine.seed, scale in enumerate((HEAD**-0.5, STEEP)):
            out.fill_(float("nan"))
            attention.launch(*given, scale, out)
            assert_attends(given, out, dtype, scale)
            assert surroundings[:, 0].isnan().all() and surroundings[:, -1].isnan().all()


# What is planted: rows of 700 tokens are cut anywhere, and a CTA has several pieces.
FAULTS = {
    "slices are read at once": ("            barrier_wait(full + ring_out.stage * 8, ring_out.parity);\n", ""),
    "a stage is free while it is read": (
        "            ahead -= read;\n            read = 1;",
        "            ahead -= 1;",
    ),
    "the newest token is forgotten": (" && newest / kWarps < kStages) {", " && false) {"),
    "tokens past the last one count": ("i / 2 * 8 < now.end ?", "i / 2 * 8 < now.end + 99 ?"),
    "values past the last one stay": ("            if (tokens < kSlice) {", "            if (false) {"),
    "warps' sums are read at once": (
        "        __syncthreads();\n        ahead -= read;",
        "        ahead -= read;",
    ),
    "warps' sums are overwritten at once": (
        "        __syncthreads();  // sums have been read, and parts are written\n",
        "",
    ),
    "counters are left": ("                if (is_last[0]) *counter = 0;", ""),
    "the last piece is all": ("if (lane >= count) of_part", "if (lane != count - 1) of_part"),
    "pieces share a place": ("of_part * 2 + (part == 0)", "0"),
    "sums keep another scale": ("sum[part][i / 4][i % 4] *= kept[i % 2];", ";"),
    "queries stay": ("ask_for_queries(next, next_query);", ";"),
    "slices asked ahead are forgotten": ("        asked -= now.slices;", "        asked = 0;"),
    "blocks stay": ("        blocks = next_blocks;\n", ""),
}


@needs_compiler
@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults_are_found(fault, tmp_path, tmp_path_factory):
    given = operands([37, 700, 690, 0, 705, 700, 700], 4, 2, 16, torch.bfloat16)
    out = torch.empty_like(given[0]).contiguous()
    sources = planted(tmp_path, "attention.cuh", *FAULTS[fault])
    attention._workspaces.clear()
    with (
        emulated(tmp_path_factory.getbasetemp(), Machine(2, (1, 1, 1)), sources) as machine,
        pytest.raises((AssertionError, EmulationError)),
    ):
        for machine.seed in range(4):
            out.fill_(float("nan"))
            attention.launch(*given, STEEP, out)
            assert_attends(given, out, torch.bfloat16, STEEP)
    attention._workspaces.clear()


# A token of one request and of many; rows that one CTA has, that all share, that are cut anywhere; more than CTAs.
@pytest.mark.gpu
@pytest.mark.parametrize(("query_heads", "key_heads"), [(32, 8), (64, 8), (32, 4), (5, 1), (4, 4)])
@pytest.mark.parametrize(
    "lengths", [[1], [131], [9000], [130] * 32, [0, 3, 5000, 64, 1, 700] * 2, [2500] * 40, [17] * 300]
)
@pytest.mark.parametrize("dtype", attention.DTYPES)
def test_attention_on_a_gpu(query_heads, key_heads, lengths, dtype):
    given = operands(lengths, query_heads, key_heads, 16, dtype, "cuda", layout=LAYOUTS[dtype])
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
