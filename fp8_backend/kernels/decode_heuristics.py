"""Ways to solve a problem of at most 16 tokens with a decode kernel, and what each costs: pure arithmetic."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from fp8_backend.kernels.problem import (
    MAX_DECODE_ROWS,
    MAX_DECODE_TOKENS,
    MAX_SHARED_BYTES,
    SPLITS,
    DecodeConfig,
    GemmProblem,
)
from fp8_backend.kernels.reference import BLOCK, align, ceil_div

TOKENS = (8, MAX_DECODE_TOKENS)
MAX_STAGES = 16
HALF_SHARED_BYTES = MAX_SHARED_BYTES // 2 - 1024  # two CTAs fit a multiprocessor, with 1 KiB of the system's own each
# CTAs a multiprocessor and the shared memory of each: all, or half, the other half to the next kernel or a second CTA.
RESIDENCIES = ((1, MAX_SHARED_BYTES), (1, HALF_SHARED_BYTES), (2, HALF_SHARED_BYTES))
PREFETCH_BYTES = 48 * 1024
# Of each of two CTAs on a multiprocessor that quantise by themselves (docs/kernel-notes.md, sweep of 2026-11-26).
PREFETCH_BYTES_OF_TWO = 32 * 1024
DECODE_CONFIGS = tuple(
    DecodeConfig(tokens, fused, split) for fused in (True, False) for tokens in TOKENS for split in SPLITS
)


@dataclass(frozen=True)
class DecodeChoice:
    """A decode kernel and how it cuts the weight.

    rows: of the weight, a CTA; a multiple of 8, at most 128. prefetch: stages of weights that may be in flight ahead of
    the activations.
    """

    config: DecodeConfig
    rows: int
    num_stages: int
    grid: int
    prefetch: int


def decode_stages(config: DecodeConfig, rows: int, k_blocks: int, shared_bytes: int = MAX_SHARED_BYTES) -> int:
    """Return how many stages fit a CTA's shared memory, at most MAX_STAGES; 0 if fewer than the kernel needs do."""
    for stages in range(MAX_STAGES, config.unroll - 1, -1):
        if config.shared_bytes(rows, k_blocks, stages) <= shared_bytes:
            return stages
    return 0


# The cost model, in nanoseconds. Its constants and those of heuristics.py were fitted together to sweeps on H100s, of
# linears back to back and in layers (docs/kernel-notes.md): they rank kernels, and do not predict.
_LAUNCH_NS = 1620  # from the start of a kernel to its first product, and its end
_FREE_NS = 3520  # what a kernel saves that leaves room on all multiprocessors to the next ones' weights; in proportion
STREAM_BYTES_PER_NS = 34.4  # a multiprocessor's share of memory bandwidth; by data sheet 25 (H100), 37 (H200)
_FILL_BYTES_PER_NS = 48.9  # what it gets from L2, weights on their way from memory included
_ROUND_TRIP_NS = 4160  # of a stage, from its release to new data in it, with all multiprocessors at work
_BLOCK_NS, _BLOCK_TOKEN_NS = 186, 8.9  # one k-block through a CTA, and more for each token
_BLOCK_ROWS_TOKEN_NS = 56.7  # and for each where both math warpgroups multiply every k-block
_SHARED_SM = 1.22  # how much longer a k-block takes beside another CTA
_EXCHANGE_NS, _EXCHANGE_CTA_NS, _EXCHANGE_TOKEN_NS = 204, 60, 7.0  # sums to another CTA of the cluster
_OUTPUT_TOKEN_NS = 6.3  # sums to the output without a cluster
_GROUPS_AT_ONCE, _GROUP_NS = 2.95, 1980  # groups of a half-warp whose latencies overlap; each more
_HALF_WARPS = 20  # that quantise
_SMALL_BYTES, _SMALL_TOKEN_NS = 8e6, 232  # each token and k-block of weights of fewer bytes
_LATE_TOKENS_NS, _LATE_GROUP_NS = 4080, 1.6  # tokens through a kernel of their own
_LATE_TOKEN_NS = 2900  # a single one, which is quantised inside by the time that this kernel needs to start


def decode_choices(problem: GemmProblem) -> Iterator[tuple[float, DecodeChoice]]:
    """Yield every way to solve the problem with a decode kernel, and its predicted cost in nanoseconds.

    There is none for more than MAX_DECODE_TOKENS tokens.
    """
    for residency in range(len(RESIDENCIES)):
        yield from resident_choices(problem, residency)


def resident_choices(problem: GemmProblem, residency: int) -> Iterator[tuple[float, DecodeChoice]]:
    """Yield those of one of `RESIDENCIES`."""
    ctas, shared_bytes = RESIDENCIES[residency]
    if problem.m > MAX_DECODE_TOKENS:
        return
    tokens = next(t for t in TOKENS if t >= problem.m)
    for config in DECODE_CONFIGS:
        if config.tokens != tokens or config.split > max(1, problem.k_blocks):
            continue
        most = ctas * problem.machine.max_clusters(config.split)
        for rows in range(8, min(MAX_DECODE_ROWS, align(problem.n, 8)) + 8, 8):
            tiles = ceil_div(problem.n, rows)
            num_stages = decode_stages(config, rows, problem.k_blocks, shared_bytes)
            if not num_stages or (config.split > 1 and tiles > most):
                continue
            # Fused, tokens wait in line with the weights; else they come later, through another kernel.
            prefetch = num_stages
            if config.fused:
                limit = PREFETCH_BYTES_OF_TWO if ctas > 1 else PREFETCH_BYTES
                prefetch = min(num_stages, max(1, limit // (rows * BLOCK)))
            choice = DecodeChoice(config, rows, num_stages, min(tiles, most) * config.split, prefetch)
            yield _decode_ns(problem, choice, residency), choice


def _decode_ns(problem: GemmProblem, choice: DecodeChoice, residency: int) -> float:
    config, rows, tokens, m = choice.config, choice.rows, choice.config.tokens, problem.m
    (ctas, shared_bytes), num_sms = RESIDENCIES[residency], problem.machine.num_sms
    fit = 2 if shared_bytes == HALF_SHARED_BYTES else 1  # of these CTAs, a multiprocessor
    blocks = ceil_div(problem.k_blocks, config.split)
    rounds = ceil_div(ceil_div(problem.n, rows) * config.split, choice.grid)
    both = tokens if rows > 64 else 0
    block_ns = max(
        rows * BLOCK / STREAM_BYTES_PER_NS * choice.grid / num_sms,
        (rows + (0 if config.fused else tokens)) * BLOCK / _FILL_BYTES_PER_NS * ctas,
        (_BLOCK_NS + _BLOCK_TOKEN_NS * tokens + _BLOCK_ROWS_TOKEN_NS * both) * (_SHARED_SM if ctas > 1 else 1),
        _ROUND_TRIP_NS / choice.num_stages,
    )
    cost = _LAUNCH_NS + rounds * blocks * block_ns - _FREE_NS * (1 - choice.grid / (fit * num_sms))
    if config.split > 1:
        cost += _EXCHANGE_NS + _EXCHANGE_CTA_NS * config.split + _EXCHANGE_TOKEN_NS * tokens * rows / 64
    else:
        cost += _OUTPUT_TOKEN_NS * tokens * rows / 64
    small = problem.n * problem.k < _SMALL_BYTES
    if config.fused:
        if small:
            cost += _SMALL_TOKEN_NS * m * blocks
        return cost + _GROUP_NS * max(0, ceil_div(m * blocks, _HALF_WARPS) - _GROUPS_AT_ONCE)
    late = _LATE_TOKENS_NS if m > 1 or small else _LATE_TOKEN_NS
    return cost + late + _LATE_GROUP_NS * m * problem.k_blocks
