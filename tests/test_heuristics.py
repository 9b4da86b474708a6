"""Every problem gets a kernel that exists, fits the chip and covers the output."""

from __future__ import annotations

import pytest
import torch

from fp8_backend.kernels import quantize
from fp8_backend.kernels.decode_heuristics import HALF_SHARED_BYTES, DecodeChoice, decode_choices
from fp8_backend.kernels.heuristics import (
    JOINED_CODES,
    STATIONARY_CONFIG,
    Activations,
    GemmChoice,
    QuantizingGemmChoice,
    adds_in_order,
    all_configs,
    gemm_choices,
    quantisation_ns,
    quantizing_choices,
    select,
    select_gemm,
)
from fp8_backend.kernels.problem import (
    H200,
    MAX_DECODE_ROWS,
    MAX_DECODE_TOKENS,
    MAX_SHARED_BYTES,
    GemmProblem,
    Machine,
)
from fp8_backend.kernels.reference import ceil_div

# Widths of DeepSeek-V3 and Qwen3 at several tensor-parallel sizes, and odd ones: below, at and off every tile width.
SHAPES = [
    (512, 7168), (7168, 256), (2112, 7168), (3072, 1536), (24576, 1536), (36864, 7168), (7168, 18432), (51200, 5120),
    (5120, 25600), (1, 128), (7, 200), (8, 1), (129, 129), (200_000, 128), (64, 131_072), (1000, 130),
]  # fmt: skip
ROWS = [1, 2, 8, 9, 16, 17, 33, 64, 65, 127, 128, 129, 1000, 4096, 100_000]
SMALLER = Machine(78, (36, 16, 6))
OTHER_ROWS = Activations(fusable=False, mappable=False)


def check_decode(problem, choice):
    config, k_blocks = choice.config, problem.k_blocks
    assert config.tokens >= problem.m and config.split <= max(1, k_blocks)
    assert choice.rows % 8 == 0 and 8 <= choice.rows <= MAX_DECODE_ROWS
    assert choice.num_stages >= config.unroll
    assert config.shared_bytes(choice.rows, k_blocks, choice.num_stages) <= MAX_SHARED_BYTES
    tiles = ceil_div(problem.n, choice.rows)
    alone = config.shared_bytes(choice.rows, k_blocks, choice.num_stages) > HALF_SHARED_BYTES
    most = problem.machine.max_clusters(config.split) * (1 if alone else 2)
    assert choice.grid % config.split == 0 and choice.grid // config.split <= min(tiles, most)
    if config.split > 1:  # a cluster has one tile, and all clusters run at once
        assert choice.grid == tiles * config.split


def check_gemm(problem, choice):
    config = choice.config
    assert config.shared_bytes * config.ctas_per_sm <= MAX_SHARED_BYTES - 1024 * (config.ctas_per_sm - 1)
    tiles_m = ceil_div(problem.m, config.block_m)
    tiles = tiles_m * ceil_div(problem.n, config.block_n)
    assert choice.grid > 0 and choice.grid % choice.split == 0 and choice.strip >= 0
    if choice.split > 1:  # a cluster has one tile, and each of its CTAs some of k
        assert config.split_k and choice.split <= problem.k_blocks
        assert choice.grid == tiles * choice.split
    else:
        most = problem.machine.max_clusters(choice.split) * config.ctas_per_sm
        assert choice.grid // choice.split <= min(tiles, most)


def check_quantizing(problem, choice):
    config = choice.config
    assert config.shared_bytes <= MAX_SHARED_BYTES
    tiles = ceil_div(problem.m, config.block_m) * ceil_div(problem.n, config.block_n)
    if choice.split > 1:
        assert choice.grid == tiles * choice.split and choice.split <= problem.k_blocks
    else:
        assert 0 < choice.grid <= min(tiles, problem.machine.num_sms)


@pytest.mark.parametrize("machine", [H200, SMALLER], ids=["132 SMs", "78 SMs"])
@pytest.mark.parametrize(("n", "k"), SHAPES)
def test_every_problem_gets_a_legal_kernel(n, k, machine):
    for m in ROWS:
        problem = GemmProblem(m, n, k, machine)
        for choice in (select(problem), select_gemm(problem)):
            assert choice.config in all_configs()
            if isinstance(choice, DecodeChoice):
                check_decode(problem, choice)
            elif isinstance(choice, QuantizingGemmChoice):
                check_quantizing(problem, choice)
            else:
                check_gemm(problem, choice)


def test_few_tokens_stream_and_many_multiply():
    assert isinstance(select(GemmProblem(1, 4096, 4096)), DecodeChoice)
    assert not isinstance(select(GemmProblem(65, 4096, 4096)), DecodeChoice)
    assert list(decode_choices(GemmProblem(MAX_DECODE_TOKENS, 4096, 4096)))
    assert not list(decode_choices(GemmProblem(MAX_DECODE_TOKENS + 1, 4096, 4096)))


def test_narrow_weights_are_split_along_k():
    choice = select(GemmProblem(1, 512, 7168))
    assert choice.config.split == 8 and choice.grid >= 64


# Behind a norm a GEMM's CTAs are in the way of the kernels around it.
def test_few_tokens_behind_a_norm_keep_decode_kernels():
    for m in (1, 16):
        assert isinstance(select(GemmProblem(m, 24576, 4096), JOINED_CODES), DecodeChoice)
    assert not isinstance(select(GemmProblem(32, 24576, 4096), JOINED_CODES), DecodeChoice)


# One that fills a multiprocessor leaves the weights behind it no room.
def test_gemms_of_few_tokens_share_a_multiprocessor():
    assert select(GemmProblem(48, 24576, 4096), JOINED_CODES).config.ctas_per_sm == 2


# A decode kernel reads rows of bfloat16, 16 bytes at a time, and no others.
def test_rows_that_a_decode_kernel_cannot_read_are_quantised_before_it():
    rows = torch.zeros(2, 264, dtype=torch.bfloat16)
    assert quantize.is_common(rows) and quantize.is_common(rows[:, :256])
    for others in (rows.half(), rows.float(), rows[:, 1:257], rows[:, :260], torch.zeros(2, 260, dtype=torch.bfloat16)):
        assert not quantize.is_common(others)
    for m in (1, 2, 4, 8, 16):
        for n, k in ((512, 7168), (4096, 4096), (24576, 4096)):
            choice = select(GemmProblem(m, n, k), OTHER_ROWS)
            assert not isinstance(choice, DecodeChoice) or not choice.config.fused
    assert select(GemmProblem(1, 4096, 4096)).config.fused


# The kernel that makes their codes has no more to do than before any GEMM.
def test_rows_that_a_decode_kernel_cannot_read_are_not_taken_for_codes_of_a_norm():
    for problem in (GemmProblem(9, 6144, 4096), GemmProblem(16, 6144, 4096)):
        assert quantisation_ns(problem) < quantisation_ns(problem, joined=True)
    others = [select(GemmProblem(m, n, k), OTHER_ROWS) for m in range(2, 17) for n, k in ((6144, 4096), (24576, 4096))]
    assert any(isinstance(choice, GemmChoice) for choice in others)


def test_large_codes_are_written_before_the_gemm_starts():
    assert quantize.early(1024, 4096) == 1 and quantize.early(8192, 4096) == 0


# Where L2 bounds the GEMM, and no deeper than two tiles' weights fit; one candidate a problem, of runs that cover it.
def test_weights_of_few_k_blocks_stay():
    assert all(select(GemmProblem(4096, n, k)).config == STATIONARY_CONFIG for n, k in ((7168, 256), (32768, 512)))
    assert select(GemmProblem(4096, 7168, 640)).config != STATIONARY_CONFIG != select(GemmProblem(64, 7168, 256)).config
    for m in ROWS:
        found = [choice for _, choice in gemm_choices(GemmProblem(m, 7168, 256)) if choice.config == STATIONARY_CONFIG]
        assert len(found) == 1 and 1 <= found[0].strip <= ceil_div(m, 64)


# Where few columns make the codes as dear as the products, and nowhere else.
def test_few_columns_of_many_rows_are_quantised_on_their_way():
    for m in (4096, 8192, 16384):
        assert isinstance(select(GemmProblem(m, 512, 7168)), QuantizingGemmChoice)
    for problem in (GemmProblem(2048, 512, 7168), GemmProblem(8192, 4096, 4096), GemmProblem(4096, 512, 2048)):
        assert not isinstance(select(problem), QuantizingGemmChoice)
    assert not list(quantizing_choices(GemmProblem(16, 512, 7168)))


# Another kernel makes the codes anyway, or rows lie where no copy engine can fetch them.
def test_rows_that_are_codes_or_unaligned_take_other_kernels():
    problem = GemmProblem(8192, 512, 7168)
    for activations in (JOINED_CODES, Activations(fusable=True, mappable=False)):
        assert not isinstance(select(problem, activations), QuantizingGemmChoice)


def test_every_quantizing_choice_is_legal():
    seen = set()
    for m in (2048, 2100, 8192):
        problem = GemmProblem(m, 392, 1160)
        for cost, choice in quantizing_choices(problem):
            check_quantizing(problem, choice)
            assert cost > 0
            seen.add(choice.split)
    assert seen == {1, 2, 4}


# Small enough that the fastest kernels split k: the mode must change the choice, and never to a kernel that does.
@pytest.mark.parametrize("m", [1, 16, 33, 64, 65, 128, 4096])
def test_batch_invariant_choices_add_in_order(m):
    problem = GemmProblem(m, 512, 7168)
    assert adds_in_order(select(problem, batch_invariant=True)) and adds_in_order(select_gemm(problem, True))
    if m <= 128:
        assert not adds_in_order(select(problem)) and not adds_in_order(select_gemm(problem))
