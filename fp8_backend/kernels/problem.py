"""What a GEMM asks for and how a kernel is shaped to answer: frozen values, shared-memory arithmetic, hardware limits."""

from __future__ import annotations

from dataclasses import dataclass

from fp8_backend.kernels.compiler import KernelSpec
from fp8_backend.kernels.reference import BLOCK, ceil_div

MAX_SHARED_BYTES = 232448  # 227 KiB, the most a CTA may have on sm_90
MAX_DECODE_TOKENS = 64
DECODE_THREADS = 384
_DECODE_ROWS = 128
_EXCHANGE_FLOATS_PER_TOKEN = 8 * 20  # 8 slices of 16 rows, padded to 20 (decode.cuh)


@dataclass(frozen=True)
class GemmProblem:
    """out[m, n] = a[m, k] @ b[n, k]^T on a GPU with num_sms multiprocessors."""

    m: int
    n: int
    k: int
    num_sms: int = 132

    @property
    def k_blocks(self) -> int:
        """128-wide blocks of k, the last one possibly padded."""
        return ceil_div(self.k, BLOCK)


@dataclass(frozen=True)
class GemmConfig:
    """One compiled form of gemm.cuh: FP8 activations, any m."""

    block_m: int
    block_n: int
    math_warpgroups: int
    num_stages: int
    cluster_m: int = 1
    cluster_n: int = 1

    @property
    def cluster(self) -> int:
        """CTAs of a cluster."""
        return self.cluster_m * self.cluster_n

    @property
    def threads(self) -> int:
        """Threads of a CTA: one producer warpgroup and the math warpgroups."""
        return 128 * (1 + self.math_warpgroups)

    @property
    def shared_bytes(self) -> int:
        """Dynamic shared memory of a CTA: tiles, activation scales and two barriers a stage."""
        return self.num_stages * ((self.block_m + self.block_n) * BLOCK + self.block_m * 4 + 16)

    def spec(self) -> KernelSpec:
        """What to compile."""
        return KernelSpec(
            "gemm.cuh",
            "gemm",
            (
                ("BLOCK_M", self.block_m),
                ("BLOCK_N", self.block_n),
                ("MATH_WARPGROUPS", self.math_warpgroups),
                ("NUM_STAGES", self.num_stages),
                ("CLUSTER_M", self.cluster_m),
                ("CLUSTER_N", self.cluster_n),
            ),
        )


@dataclass(frozen=True)
class DecodeConfig:
    """One compiled form of decode.cuh: at most 64 tokens.

    tokens: wgmma's N, at least m. fused: activations arrive unquantised. split: CTAs of a cluster, which share k.
    """

    tokens: int
    fused: bool
    split: int
    num_stages: int

    @property
    def cluster(self) -> int:
        """CTAs of a cluster."""
        return self.split

    @property
    def threads(self) -> int:
        """Threads of a CTA."""
        return DECODE_THREADS

    def shared_bytes(self, k_blocks: int) -> int:
        """Dynamic shared memory of a CTA; with fused quantisation it holds the tokens of its whole range of k."""
        resident = ceil_div(k_blocks, self.split) if self.fused else 0
        stage = _DECODE_ROWS * BLOCK + (0 if self.fused else self.tokens * BLOCK)
        scales = (resident if self.fused else self.num_stages) * self.tokens * 4
        exchange = _EXCHANGE_FLOATS_PER_TOKEN * self.tokens * 4
        return self.num_stages * (stage + 16) + resident * self.tokens * BLOCK + exchange + scales

    def spec(self) -> KernelSpec:
        """What to compile."""
        return KernelSpec(
            "decode.cuh",
            "decode",
            (
                ("TOKENS", self.tokens),
                ("FUSED", int(self.fused)),
                ("SPLIT", self.split),
                ("NUM_STAGES", self.num_stages),
            ),
        )


def fits_shared_memory(shared_bytes: int) -> bool:
    """Whether a CTA may have that much dynamic shared memory on sm_90."""
    return shared_bytes <= MAX_SHARED_BYTES
