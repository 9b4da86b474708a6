"""From a problem to the kernel that solves it: pure arithmetic on frozen values, no torch, no GPU."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

from fp8_backend.kernels.problem import (
    MAX_DECODE_ROWS,
    MAX_DECODE_TOKENS,
    MAX_SHARED_BYTES,
    DecodeConfig,
    GemmConfig,
    GemmProblem,
)
from fp8_backend.kernels.reference import BLOCK, align, ceil_div

TOKENS = (8, 16, 32, 64)
SPLITS = (1, 2, 4, 8)
MAX_STAGES = 16
PREFETCH_BYTES = 48 * 1024
HALF_SHARED_BYTES = MAX_SHARED_BYTES // 2 - 1024  # of which a CTA with 1 KiB of the system's own fits twice

GEMM_CONFIGS = (
    GemmConfig(64, 64, 1, 8),
    GemmConfig(64, 128, 1, 8),
    GemmConfig(128, 64, 2, 8),
    GemmConfig(128, 128, 2, 6),
    GemmConfig(128, 128, 2, 6, cluster_m=2),
    GemmConfig(256, 128, 2, 4, cluster_m=2),
    GemmConfig(256, 128, 2, 4, cluster_n=2),
)
DECODE_CONFIGS = tuple(
    DecodeConfig(tokens, fused, split)
    for fused in (True, False)
    for tokens in TOKENS
    for split in SPLITS
    if not (fused and tokens == 64)  # 64 tokens of any useful range of k do not fit beside the weights
)


@dataclass(frozen=True)
class DecodeChoice:
    """A decode kernel and how it cuts the weight.

    rows: of the weight, a cluster; a multiple of 8, at most 128. prefetch: stages requested before the previous kernel ends.
    """

    config: DecodeConfig
    rows: int
    num_stages: int
    grid: int

    @property
    def prefetch(self) -> int:
        """Return how many stages of weights may be queued ahead of the activations."""
        return max(1, PREFETCH_BYTES // (self.rows * BLOCK))


@dataclass(frozen=True)
class GemmChoice:
    """A GEMM kernel, its grid, and how many cluster columns of tiles are walked before the next rows."""

    config: GemmConfig
    strip: int
    grid: int


def decode_stages(config: DecodeConfig, rows: int, k_blocks: int, shared_bytes: int) -> int:
    """Return how many stages fit into shared_bytes, at most MAX_STAGES; fewer than config.unroll means none do."""
    for stages in range(MAX_STAGES, config.unroll - 1, -1):
        if config.shared_bytes(rows, k_blocks, stages) <= shared_bytes:
            return stages
    return 0


def decode_choices(problem: GemmProblem, shared_bytes: int, ctas_per_sm: int) -> Iterator[tuple[float, DecodeChoice]]:
    """Yield every decode kernel that can solve the problem, with its predicted cost in bytes streamed by the busiest SM."""
    if problem.m > MAX_DECODE_TOKENS:
        return
    tokens = next(t for t in TOKENS if t >= problem.m)
    for config in DECODE_CONFIGS:
        if config.tokens != tokens or config.split > max(1, problem.k_blocks):
            continue
        for rows in range(8, min(MAX_DECODE_ROWS, align(problem.n, 8)) + 8, 8):
            tiles = ceil_div(problem.n, rows)
            if config.split > 1 and tiles > ctas_per_sm * problem.machine.max_clusters(config.split):
                continue
            num_stages = decode_stages(config, rows, problem.k_blocks, shared_bytes)
            if not num_stages:
                continue
            grid = min(tiles, ctas_per_sm * problem.machine.num_sms) if config.split == 1 else tiles * config.split
            tiles_per_sm = ceil_div(tiles, grid) if config.split == 1 else 1
            blocks = ceil_div(problem.k_blocks, config.split)
            token_bytes = problem.m * (2 if config.fused else 1)
            # Tokens come from L2, about three times as fast as weights from memory; a cluster's exchange costs about 0.7 us.
            cost = tiles_per_sm * blocks * 128.0 * (rows + token_bytes / 3) + (20_000 if config.split > 1 else 0)
            cost += 0 if config.fused else 50_000  # the quantisation launch
            yield cost, DecodeChoice(config, rows, num_stages, grid)


def gemm_choices(problem: GemmProblem) -> Iterator[tuple[float, GemmChoice]]:
    """Yield every GEMM kernel with its predicted cost in multiply-accumulates of the busiest SM."""
    for config in GEMM_CONFIGS:
        tiles_m = ceil_div(problem.m, config.block_m * config.cluster_m)
        tiles_n = ceil_div(problem.n, config.block_n * config.cluster_n)
        clusters = min(tiles_m * tiles_n, problem.machine.max_clusters(config.cluster))
        waves = ceil_div(tiles_m * tiles_n, clusters) if clusters else 0
        area = config.block_m * config.block_n
        # Small tiles fetch more bytes a multiply: measured cost a multiply relative to 256x128.
        penalty = 1.0 + 0.25 * (256 * 128 / area - 1) ** 0.5
        yield (
            waves * area * (problem.k_blocks + 4) * penalty,
            GemmChoice(config, max(1, 16 // config.cluster_n), clusters * config.cluster),
        )


@lru_cache(maxsize=65536)
def select(problem: GemmProblem) -> DecodeChoice | GemmChoice:
    """Return the kernel for a linear layer (16-bit activations in) of this shape."""
    decode = min(decode_choices(problem, MAX_SHARED_BYTES, 1), key=lambda pair: pair[0], default=None)
    return decode[1] if decode is not None else select_gemm(problem)


@lru_cache(maxsize=65536)
def select_gemm(problem: GemmProblem) -> GemmChoice:
    """Return the kernel for FP8 activations in of this shape."""
    return min(gemm_choices(problem), key=lambda pair: pair[0])[1]


def all_specs_configs() -> tuple[GemmConfig | DecodeConfig, ...]:
    """Every configuration that serving can need."""
    return GEMM_CONFIGS + DECODE_CONFIGS
