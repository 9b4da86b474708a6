"""Codes that attention of decode steps leaves for the linear behind it, and who takes them."""

from __future__ import annotations

import pytest
import torch

from fp8_backend.kernels import attended_linear, attention, gemm, layout, quantize
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
        size = quantize.code_bytes(5, 6 * HEAD, tile_rows)
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
