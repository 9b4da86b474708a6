"""What a GEMM asks for and how a kernel answers: frozen values, shared-memory arithmetic, hardware limits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from fp8_backend.kernels.compiler import KernelSpec
from fp8_backend.kernels.reference import BLOCK, ceil_div

MAX_SHARED_BYTES = 232448  # 227 KiB, the most a CTA may have on sm_90
MAX_DECODE_TOKENS = 16
DECODE_THREADS = 384
MAX_DECODE_ROWS = 128
SPLITS = (1, 2, 4, 8)  # CTAs of a cluster, up to the largest that is portable
_STAGE_EXTRA_BYTES = 8 * 4 + 16  # kScaleFloats weight scales, two barriers


@dataclass(frozen=True)
class Machine:
    """What a GPU can run at once: multiprocessors, and clusters of 2, 4 and 8 CTAs that fill one each.

    Multiprocessors come in groups of 16 or 18, some with one missing, and a cluster lies within a group: fewer clusters
    fit than num_sms / size. The defaults were read on an H200.
    """

    num_sms: int = 132
    clusters: tuple[int, int, int] = (66, 30, 15)

    def max_clusters(self, size: int) -> int:
        """Return how many clusters of 1, 2, 4 or 8 CTAs run at once."""
        return self.num_sms if size == 1 else self.clusters[size.bit_length() - 2]


H200 = Machine()


@dataclass(frozen=True)
class GemmProblem:
    """out[m, n] = a[m, k] @ b[n, k]^T."""

    m: int
    n: int
    k: int
    machine: Machine = H200

    @property
    def k_blocks(self) -> int:
        """128-wide blocks of k, the last one possibly padded."""
        return ceil_div(self.k, BLOCK)


@dataclass(frozen=True)
class GemmConfig:
    """One compiled form of gemm.cuh: FP8 activations, any m.

    split_k: can be launched in clusters that share the k-blocks of a tile. ctas_per_sm: CTAs that fit a multiprocessor.
    unrolled: the loop over k takes all stages a round. ahead: a product is issued before the last one is waited for; of
    one slice of 64 rows a math warpgroup, whose registers do for two.
    """

    block_m: int
    block_n: int
    math_warpgroups: int
    num_stages: int
    split_k: bool = False
    ctas_per_sm: int = 1
    unrolled: bool = False
    ahead: bool = False

    @property
    def threads(self) -> int:
        """Threads of a CTA: one producer warpgroup and the math warpgroups."""
        return 128 * (1 + self.math_warpgroups)

    @property
    def splits(self) -> tuple[int, ...]:
        """How many CTAs can share a tile's k-blocks: each owns as many groups of 8 columns x 64 rows of the sums."""
        groups = self.block_m * self.block_n // (512 * self.math_warpgroups)
        return tuple(split for split in SPLITS if groups % split == 0) if self.split_k else (1,)

    @property
    def stored_columns(self) -> int:
        """Columns of the boxes in which outputs are stored, kStored of gemm.cuh."""
        return 64 if self.block_n % 64 == 0 else 32

    @property
    def shared_bytes(self) -> int:
        """Dynamic shared memory of a CTA: tiles, scales, two barriers a stage; outputs or exchanged sums, a barrier."""
        room = self.block_m * self.block_n * (4 if self.split_k else 2)
        stage = (self.block_m + self.block_n) * BLOCK + self.block_m * 4 + _STAGE_EXTRA_BYTES
        return self.num_stages * stage + room + 8

    def spec(self) -> KernelSpec:
        """Return what to compile."""
        return KernelSpec(
            "gemm.cuh",
            "gemm",
            (
                ("BLOCK_M", self.block_m),
                ("BLOCK_N", self.block_n),
                ("MATH_WARPGROUPS", self.math_warpgroups),
                ("NUM_STAGES", self.num_stages),
                ("SPLIT_K", int(self.split_k)),
                ("CTAS_PER_SM", self.ctas_per_sm),
                ("UNROLLED", int(self.unrolled)),
                ("AHEAD", int(self.ahead)),
            ),
        )


@dataclass(frozen=True)
class StationaryGemmConfig:
    """gemm_stationary.cuh: FP8 activations, any m, few k-blocks; weights stay in shared memory for a run of tiles."""

    block_m: ClassVar[int] = 64
    block_n: ClassVar[int] = 128
    ctas_per_sm: ClassVar[int] = 1
    stored_columns: ClassVar[int] = 64
    threads: ClassVar[int] = 512
    shared_bytes: ClassVar[int] = MAX_SHARED_BYTES
    # Weights of 128 columns beside three stages and the outputs of three math warpgroups: what shared memory holds.
    max_k_blocks: ClassVar[int] = 6

    def spec(self) -> KernelSpec:
        """Return what to compile."""
        return KernelSpec("gemm_stationary.cuh", "gemm", (("SHARED_BYTES", self.shared_bytes),))


@dataclass(frozen=True)
class DecodeConfig:
    """One compiled form of decode.cuh: at most 16 tokens.

    tokens: wgmma's N, at least m. fused: activations arrive unquantised. split: CTAs of a cluster, which share k.
    unroll: k-blocks whose wgmma are in flight together; the least number of stages.
    """

    tokens: int
    fused: bool
    split: int
    unroll: ClassVar[int] = 4

    def shared_bytes(self, rows: int, k_blocks: int, num_stages: int) -> int:
        """Return the dynamic shared memory of a CTA, laid out as decode.cuh says.

        wgmma reads whole slices of 64 rows, past the last stage if that holds fewer: the bytes behind it must exist.
        """
        weight = rows * BLOCK
        stage = weight + (0 if self.fused else self.tokens * BLOCK)
        resident = ceil_div(k_blocks, self.split) if self.fused else 0
        slices, sources = (4, self.split * 2) if rows <= 64 else (8, self.split)
        exchange = ceil_div(slices * self.tokens // 8, self.split) * sources * 512
        scales = (resident if self.fused else num_stages) * self.tokens * 4
        laid_out = num_stages * (stage + _STAGE_EXTRA_BYTES) + resident * self.tokens * BLOCK + exchange + scales + 8
        return max(laid_out, (num_stages - 1) * stage + slices * 16 * BLOCK)

    def spec(self) -> KernelSpec:
        """Return what to compile."""
        return KernelSpec(
            "decode.cuh",
            "decode",
            (("TOKENS", self.tokens), ("FUSED", int(self.fused)), ("SPLIT", self.split)),
        )


@dataclass(frozen=True)
class QuantizingGemmConfig:
    """gemm_quantize.cuh: activations of 16 bits, a ring of stages for these and one for the weight."""

    stages_x: int
    stages_b: int
    block_m: ClassVar[int] = 128
    block_n: ClassVar[int] = 256
    threads: ClassVar[int] = 384

    @property
    def shared_bytes(self) -> int:
        """Dynamic shared memory of a CTA: both rings, weight scales, two barriers a stage, that of the exchange."""
        tiles = self.stages_x * self.block_m * 2 * BLOCK + self.stages_b * self.block_n * BLOCK
        return tiles + self.stages_x * 2 * 8 + self.stages_b * _STAGE_EXTRA_BYTES + 8

    def spec(self) -> KernelSpec:
        """Return what to compile."""
        stages = ("STAGES_X", self.stages_x), ("STAGES_B", self.stages_b)
        return KernelSpec("gemm_quantize.cuh", "gemm_quantize", stages)
