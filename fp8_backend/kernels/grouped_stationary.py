"""The grouped GEMM of few k-blocks, whose weights stay in shared memory (grouped_stationary.cuh)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import ClassVar

import torch

from fp8_backend.kernels import launcher, routing
from fp8_backend.kernels.backend import num_sms
from fp8_backend.kernels.compiler import KernelSpec
from fp8_backend.kernels.grouped_sorted import LAYOUT, SortedLaunch
from fp8_backend.kernels.prepared import Launch
from fp8_backend.kernels.problem import MAX_SHARED_BYTES
from fp8_backend.kernels.quantize import ELEMENT_TYPES
from fp8_backend.kernels.reference import BLOCK, ceil_div
from fp8_backend.kernels.routing import Routing
from fp8_backend.kernels.tensor_map import row_major_map

_ROWS = 64  # of a tile, kRows of stationary.cuh


@dataclass(frozen=True)
class StationaryConfig:
    """The compiled form of grouped_stationary.cuh.

    least_stages: of rows, a math warpgroup, however many k-blocks of weights there would be use for.
    """

    math_warpgroups: int = 2
    least_stages: int = 4
    # Of weights, so many k-blocks fit beside the stages.
    max_k_blocks: ClassVar[int] = 7

    @property
    def threads(self) -> int:
        """Threads of a CTA: one producer warpgroup and the math warpgroups."""
        return 128 * (1 + self.math_warpgroups)

    def spec(self) -> KernelSpec:
        """Return what to compile."""
        defines = ("MATH_WARPGROUPS", self.math_warpgroups), ("LEAST_STAGES", self.least_stages)
        return KernelSpec(
            "grouped_stationary.cuh", "grouped_stationary", (("SHARED_BYTES", MAX_SHARED_BYTES), *defines)
        )


CONFIG = StationaryConfig()
# Rows a group on average from which on weights stay.
LEAST_ROWS = 64


def takes(entries: int, num_groups: int, k_blocks: int) -> bool:
    """Return whether weights of so many k-blocks stay for the rows of so many entries."""
    return k_blocks <= CONFIG.max_k_blocks and entries >= LEAST_ROWS * num_groups


@cache
def kernel(device: int) -> launcher.Kernel:
    """Return the loaded kernel on the current device, whose index is part of the key only."""
    return launcher.load(CONFIG.spec(), LAYOUT)


def launch_like(
    a: torch.Tensor,
    scale_a: torch.Tensor,
    weight: torch.Tensor,
    scale_b: torch.Tensor,
    out: torch.Tensor,
    n: int,
    routed: Routing,
    early: int = 0,
) -> SortedLaunch:
    """Return the launch of grouped_stationary.cuh for tensors like these, as `grouped_sorted.launch_like` has them.

    out: [entries, n] in 16-bit elements, n % 8 == 0, 16-byte aligned rows.
    """
    device, k_blocks = weight.device.index, weight.shape[1]
    items = routing.max_tiles(routed.entries, routed.num_groups) * ceil_div(n, BLOCK)
    params = (
        *(out.stride(0), n, weight.shape[2], k_blocks, scale_a.stride(0), scale_b.stride(1)),
        *(0, 0, early, ELEMENT_TYPES[out.dtype], 1),
    )
    grid = min(num_sms(device), items), 1
    launch = Launch(kernel(device), grid, CONFIG.threads, MAX_SHARED_BYTES, params, 1)
    rows = row_major_map(a.stride(0), a.shape[0], k_blocks, _ROWS)
    return SortedLaunch(launch, [rows, rows])
