"""From a problem to the kernel that solves it: pure arithmetic on frozen values, no torch, no GPU."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

from fp8_backend.kernels.decode_heuristics import DECODE_CONFIGS, STREAM_BYTES_PER_NS, DecodeChoice, decode_choices
from fp8_backend.kernels.problem import (
    SPLITS,
    DecodeConfig,
    GemmConfig,
    GemmProblem,
    QuantizingGemmConfig,
    StationaryGemmConfig,
)
from fp8_backend.kernels.reference import BLOCK, ceil_div

# Rows of tiles up to which the CTAs beside each other share a tile of b, which comes from memory, and columns in a
# strip where there are more: 16 read half as much from memory as 4 (8192 x 7168x16384: 1.15 and 2.15 GB) and on end
# are from 1 % slower to 7 % faster (one H100, leads; docs/kernel-notes-power.md, 2026-11-28).
FEW_TILES_M, STRIP = 8, 16
# Rows of the lowest tiles: up to these a GEMM has one tile of rows, and takes as long as the weights from memory.
FEW_ROWS = 64

GEMM_CONFIGS = (
    GemmConfig(64, 32, 1, 8, split_k=True, ctas_per_sm=2, ahead=True),
    GemmConfig(64, 64, 1, 5, split_k=True, ctas_per_sm=2),
    GemmConfig(64, 96, 1, 4, split_k=True, ctas_per_sm=2),
    GemmConfig(64, 128, 1, 8, split_k=True, ahead=True),
    GemmConfig(128, 64, 2, 7, split_k=True, unrolled=True),
    GemmConfig(128, 96, 2, 6, split_k=True),
    GemmConfig(128, 128, 2, 5, split_k=True, ahead=True),
    GemmConfig(128, 160, 2, 5, unrolled=True),
    GemmConfig(128, 192, 2, 4, unrolled=True),
    GemmConfig(256, 128, 2, 3, unrolled=True),
)
STATIONARY_CONFIG = StationaryGemmConfig()
QUANTIZING_CONFIG = QuantizingGemmConfig(4, 3)
# Where the GEMM that quantises by itself is a candidate: every further tile of columns quantises the rows again, and
# the codes of few rows stay in L2.
QUANTIZING_ROWS, QUANTIZING_COLUMNS = 2048, 512
# Into how many runs of tiles a column may be cut where its weights stay.
MAX_RUNS = 64


@dataclass(frozen=True)
class GemmChoice:
    """A GEMM kernel, its grid, and the order of tiles.

    strip: columns of tiles that are walked before the next rows of them; 0: every column from top to bottom. Where
    weights stay, rows of tiles that a CTA takes of a column before it goes on to another. split: CTAs that share the
    k-blocks of a tile; more than 1 only with a CTA for every one of these shares.
    """

    config: GemmConfig | StationaryGemmConfig
    strip: int
    grid: int
    split: int = 1


@dataclass(frozen=True)
class QuantizingGemmChoice:
    """A GEMM kernel that quantises by itself, and its grid.

    split: CTAs that share the k-blocks of a tile; more than 1 only with a CTA for every one of these shares.
    """

    config: QuantizingGemmConfig
    grid: int
    split: int = 1


Choice = DecodeChoice | GemmChoice | QuantizingGemmChoice


class Activations(NamedTuple):
    """What a linear layer begins with, as far as the choice of its kernel hangs on it.

    fusable: a decode kernel can read the rows and quantise by itself (CommonRows of elements.cuh). mappable: a GEMM can
    quantise by itself, for the copy engine can fetch the rows. joined: neither, for a kernel in front that does
    something else, too, makes the codes.
    """

    fusable: bool
    mappable: bool
    joined: bool = False


COMMON_ROWS, JOINED_CODES = Activations(True, True), Activations(False, False, joined=True)


# The cost model of decode_heuristics.py goes on here, in nanoseconds.

# Quantisation ahead of a GEMM; for more than 16 and at most FEW_ROWS tokens it is behind the weights' way.
_QUANTISE_NS, _QUANTISE_FEW_NS = 2960, 296
_QUANTISED_ELEMENTS_PER_NS = 1170  # of many rows
# More, for at most 16 tokens whose codes come from a kernel that does something else, too: a GEMM's CTAs leave it no
# room, nor those of the linear behind it (one H100, a layer of Qwen3-8B at m = 1 and 8: 77.4 and 79.7 us without this,
# 74.6 and 76.7 with it; at 17 to 64 tokens the GEMM is faster all the same). Enough to outweigh tiles of 64 x 96 for
# 24576 columns (one H200: a layer with these was no faster at m = 16).
_JOINED_TOKENS, _JOINED_NS = 16, 7000
_GEMM_LAUNCH_NS = 418
# More, for at most FEW_ROWS tokens, where one CTA fills a multiprocessor: it leaves the next weights no room, either (a
# layer of Qwen3-8B at m = 48: 88.4 us with tiles of 128 x 192 for its largest weight, 86.5 with 64 x 64).
_FULL_NS = 2860
# One k-block of a tile with all multiprocessors at work, its start and epilogue, and what sharing k adds to these
# (fitted again to sweeps on an H200).
_GEMM_NS: dict[tuple[int, int], tuple[float, float, float]] = {
    (64, 32): (331, 85, 2280),
    (64, 64): (475, 237, 3690),
    (64, 96): (625, 500, 10100),
    (64, 128): (334, 1000, 11700),
    (128, 64): (245, 4400, 3020),
    (128, 96): (393, 900, 4840),
    (128, 128): (447, 856, 9030),
    (128, 160): (500, 1240, 0),
    (128, 192): (531, 1990, 0),
    (256, 128): (713, 1900, 0),
}
# One k-block of a tile of gemm_stationary.cuh, its end, a k-block of new weights, and the launch. So choices between it
# and the tiles above lose least (eight shapes on one H200, 2026-11-29, docs/kernel-notes-gemm.md).
_STATIONARY_NS = (185.0, 250.0, 300.0, 1500.0)
# The same of the GEMM that quantises by itself, and its launch (one H100, 2026-11-27, docs/kernel-notes-gemm.md).
_QUANTIZING_NS, _QUANTIZING_LAUNCH_NS = (1180, 1800, 9200), 2500
_ALONE = 0.77  # of a wave's time, where two CTAs would fit a multiprocessor and one is there
# Operands that L2 does not hold, in more waves than this: what a multiprocessor is sent then.
_BEYOND_L2_BYTES, _BEYOND_L2_WAVES, _BEYOND_L2_BYTES_PER_NS = 100e6, 8, 66


def gemm_choices(problem: GemmProblem) -> Iterator[tuple[float, GemmChoice]]:
    """Yield every way to solve the problem with a GEMM kernel and its predicted cost in nanoseconds.

    The quantisation of a is left out.
    """
    for config in GEMM_CONFIGS:
        tiles_m = ceil_div(problem.m, config.block_m)
        tiles_n = ceil_div(problem.n, config.block_n)
        for split in config.splits:
            if split > max(1, problem.k_blocks // 2):
                continue
            most = problem.machine.max_clusters(split) * config.ctas_per_sm
            clusters = min(tiles_m * tiles_n, most) if split == 1 else tiles_m * tiles_n
            strip = 0 if tiles_m <= FEW_TILES_M else STRIP
            choice = GemmChoice(config, strip, clusters * split, split)
            yield _gemm_ns(problem, choice, tiles_m * tiles_n, most), choice
    if 0 < problem.k_blocks <= STATIONARY_CONFIG.max_k_blocks:
        tiles_m = ceil_div(problem.m, STATIONARY_CONFIG.block_m)
        cuts = range(1, min(tiles_m, MAX_RUNS) + 1)
        yield min((_stationary(problem, ceil_div(tiles_m, runs)) for runs in cuts), key=lambda pair: pair[0])


def _stationary(problem: GemmProblem, run: int) -> tuple[float, GemmChoice]:
    """Return the cost and the choice of a GEMM whose CTAs take `run` rows of tiles of a column at a time."""
    config, num_sms = STATIONARY_CONFIG, problem.machine.num_sms
    runs = ceil_div(ceil_div(problem.m, config.block_m), run) * ceil_div(problem.n, config.block_n)
    block_ns, tile_ns, weights_ns, launch_ns = _STATIONARY_NS
    run_ns = run * (problem.k_blocks * block_ns + tile_ns) + problem.k_blocks * weights_ns
    cost = launch_ns + max(ceil_div(runs, num_sms) * run_ns, _weights_ns(problem))
    return cost, GemmChoice(config, run, min(runs, num_sms))


def _gemm_ns(problem: GemmProblem, choice: GemmChoice, tiles: int, most: int) -> float:
    """most: tiles at once. The choice is of gemm.cuh."""
    config, split = choice.config, choice.split
    block_ns, tile_ns, split_ns = _GEMM_NS[config.block_m, config.block_n]
    num_sms, waves = problem.machine.num_sms, ceil_div(tiles, most)
    if (problem.m + problem.n) * problem.k > _BEYOND_L2_BYTES and waves > _BEYOND_L2_WAVES:
        block_ns = max(block_ns, (config.block_m + config.block_n) * BLOCK / _BEYOND_L2_BYTES_PER_NS)
    last = (tiles - (waves - 1) * most) * split  # CTAs of the last wave
    full_waves = waves - 1 + (_ALONE if config.ctas_per_sm > 1 and last <= num_sms else 1)
    products_ns = max(full_waves * ceil_div(problem.k_blocks, split) * block_ns, _weights_ns(problem))
    cost = _GEMM_LAUNCH_NS + products_ns + waves * tile_ns
    if split > 1:
        cost += waves * split_ns
    return cost + (_FULL_NS if config.ctas_per_sm == 1 and problem.m <= FEW_ROWS else 0)


def _weights_ns(problem: GemmProblem) -> float:
    """Return the time of the weights' way from memory, which decides where there are few rows of tiles."""
    return problem.n * problem.k_blocks * BLOCK / (STREAM_BYTES_PER_NS * problem.machine.num_sms)


def quantizing_choices(problem: GemmProblem) -> Iterator[tuple[float, QuantizingGemmChoice]]:
    """Yield every way to solve the problem with a GEMM that quantises by itself, and its predicted cost in nanoseconds.

    There is none for less than QUANTIZING_ROWS rows or more than QUANTIZING_COLUMNS columns.
    """
    if problem.m < QUANTIZING_ROWS or problem.n > QUANTIZING_COLUMNS:
        return
    # Rows of activations come from memory once, whatever the number of tiles that they are part of.
    memory_ns = problem.m * problem.k * 2 / (STREAM_BYTES_PER_NS * problem.machine.num_sms)
    config, (block_ns, tile_ns, split_ns) = QUANTIZING_CONFIG, _QUANTIZING_NS
    tiles = ceil_div(problem.m, config.block_m) * ceil_div(problem.n, config.block_n)
    for split in SPLITS:
        if split > max(1, problem.k_blocks // 2):
            continue
        most = problem.machine.max_clusters(split)
        waves = ceil_div(tiles, most)
        choice = QuantizingGemmChoice(config, min(tiles, most) if split == 1 else tiles * split, split)
        products_ns = max(waves * ceil_div(problem.k_blocks, split) * block_ns, memory_ns)
        ends_ns = waves * (tile_ns + (split_ns if split > 1 else 0))
        yield _QUANTIZING_LAUNCH_NS + products_ns + ends_ns, choice


def quantisation_ns(problem: GemmProblem, joined: bool = False) -> float:
    """Return the predicted cost in nanoseconds of the codes that a GEMM multiplies; joined: see `Activations`."""
    if 16 < problem.m <= FEW_ROWS:
        return _QUANTISE_FEW_NS
    quantise = max(_QUANTISE_NS, problem.m * problem.k // _QUANTISED_ELEMENTS_PER_NS)
    return quantise + _JOINED_NS if joined and problem.m <= _JOINED_TOKENS else quantise


def adds_in_order(choice: Choice) -> bool:
    """Return whether an output is one sum over the k-blocks in ascending order, not a sum of partial ones.

    Decode kernels with at most 64 rows a CTA share the k-blocks between their math warpgroups.
    """
    if not isinstance(choice, DecodeChoice):
        return choice.split == 1
    return choice.config.split == 1 and choice.rows > 64


@lru_cache(maxsize=65536)
def select(problem: GemmProblem, activations: Activations = COMMON_ROWS, batch_invariant: bool = False) -> Choice:
    """Return the kernel for a linear layer of this shape; batch_invariant: a row's bits must not depend on m."""
    choices: list[tuple[float, Choice]] = [
        (cost, choice) for cost, choice in decode_choices(problem) if activations.fusable or not choice.config.fused
    ]
    quantise = quantisation_ns(problem, activations.joined)
    choices += [(cost + quantise, choice) for cost, choice in gemm_choices(problem)]
    if activations.mappable:
        choices += quantizing_choices(problem)
    if batch_invariant:
        choices = [(cost, choice) for cost, choice in choices if adds_in_order(choice)]
    return min(choices, key=lambda pair: pair[0])[1]


@lru_cache(maxsize=65536)
def select_gemm(problem: GemmProblem, batch_invariant: bool = False) -> GemmChoice:
    """Return the kernel for FP8 activations in of this shape; batch_invariant: a row's bits must not depend on m."""
    choices = [pair for pair in gemm_choices(problem) if not batch_invariant or adds_in_order(pair[1])]
    return min(choices, key=lambda pair: pair[0])[1]


def all_configs() -> tuple[GemmConfig | StationaryGemmConfig | DecodeConfig | QuantizingGemmConfig, ...]:
    """Return every configuration that serving can need."""
    return (*GEMM_CONFIGS, STATIONARY_CONFIG, *DECODE_CONFIGS, QUANTIZING_CONFIG)
