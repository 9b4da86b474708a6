"""The experts op for few tokens: two kernels that stream the weights of the experts hit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import accumulate

import torch

from fp8_backend.kernels import launcher
from fp8_backend.kernels.backend import num_sms
from fp8_backend.kernels.compiler import KernelSpec
from fp8_backend.kernels.layout import ROW_ALIGNMENT
from fp8_backend.kernels.problem import MAX_SHARED_BYTES
from fp8_backend.kernels.quantize import ELEMENT_TYPES, vectorised
from fp8_backend.kernels.reference import BLOCK, align, ceil_div

THREADS = 384  # kThreads of expert_units.cuh
MAX_PAIRS = 1024  # (token, expert) pairs, each of which every CTA sorts
MAX_GROUPS = 2048  # counts of all groups lie in each CTA's shared memory

UP_TILE_GROUPS = 8  # of 8 gate and 8 up rows: a tile fills the 64 rows of both products
_STAGE_BYTES = 16 * 1024  # of weights a stage, about
_MAX_DOWN_ROWS = 64  # wgmma's 64-row side
BARRIER_BYTES = 2 * 64 * 8  # kMaxStages
_RING_UNIT = 1024  # the period of the 128-byte swizzle
# One CTA of each GEMM fits a multiprocessor's 228 KiB (1 KiB of it reserved for each CTA), two of the second do not.
_UP_SHARED_BYTES, _DOWN_SHARED_BYTES = 102 * 1024, 118 * 1024

UP_LAYOUT = launcher.ParamLayout(("u64",) * 7 + ("i64",) * 3 + ("u32",) * 10)
_DOWN_LAYOUT = launcher.ParamLayout(("u64",) * 8 + ("i64",) * 3 + ("u32",) * 12)
_QUANTIZE_LAYOUT = launcher.ParamLayout(("u64",) * 3 + ("i64",) + ("u32",) * 7)
_QUANTIZE_SPEC = KernelSpec("experts_quantize.cuh", "experts_quantize")
_QUANTIZE_THREADS, _GROUPS_PER_CTA = 256, 16


@dataclass(frozen=True)
class UpConfig:
    """One compiled form of experts_up.cuh. rows: of activations a unit, wgmma's N."""

    rows: int

    def spec(self) -> KernelSpec:
        """Return what to compile."""
        return KernelSpec("experts_up.cuh", "experts_up", (("ROWS", self.rows),))

    def ring_bytes(self, shared_bytes: int, num_groups: int, pairs: int) -> int:
        """Return how much of `shared_bytes` of a CTA is left for the ring of stages."""
        sums = self.rows * 512
        taken = BARRIER_BYTES + sums + units_bytes(num_groups, pairs, pairs)
        return (shared_bytes - taken) // _RING_UNIT * _RING_UNIT


@dataclass(frozen=True)
class DownConfig:
    """One compiled form of experts_down.cuh. rows: of h a unit, wgmma's N."""

    rows: int

    def spec(self) -> KernelSpec:
        """Return what to compile."""
        return KernelSpec("experts_down.cuh", "experts_down", (("ROWS", self.rows),))

    def ring_bytes(self, shared_bytes: int, num_groups: int, m: int, pairs: int, rows: int) -> int:
        """Return how much of `shared_bytes` of a CTA that owns `rows` rows of the output is left for the ring."""
        taken = BARRIER_BYTES + 2 * m * rows * 4 + pairs * 8 + units_bytes(num_groups, pairs, pairs)
        return (shared_bytes - taken) // _RING_UNIT * _RING_UNIT


UP_CONFIGS = (UpConfig(8), UpConfig(16))
DOWN_CONFIGS = (DownConfig(8), DownConfig(16))


def units_bytes(num_groups: int, pairs: int, most_units: int) -> int:
    """Return the shared memory of `Units` in expert_units.cuh."""
    return align(32 * 4 + num_groups * 8 + most_units * 4 + pairs * 6, 16)


def all_specs() -> tuple[KernelSpec, ...]:
    """Return every kernel that the experts op can need for few tokens."""
    return (*(config.spec() for config in UP_CONFIGS + DOWN_CONFIGS), _QUANTIZE_SPEC)


@cache
def up_kernel(config: UpConfig, device: int) -> launcher.Kernel:
    """Return the loaded kernel of the first GEMM on the current device, whose index is part of the key only."""
    return launcher.load(config.spec(), UP_LAYOUT)


@cache
def _down_kernel(config: DownConfig, device: int) -> launcher.Kernel:
    return launcher.load(config.spec(), _DOWN_LAYOUT)


@cache
def _quantize_kernel(device: int) -> launcher.Kernel:
    return launcher.load(_QUANTIZE_SPEC, _QUANTIZE_LAYOUT)


def load_all() -> None:
    """Load every kernel of this file on torch's current device."""
    device = torch.cuda.current_device()
    for up in UP_CONFIGS:
        up_kernel(up, device)
    for down in DOWN_CONFIGS:
        _down_kernel(down, device)
    _quantize_kernel(device)


@dataclass(frozen=True)
class _Plan:
    """Which kernels serve a call, and the bytes of each part of its workspace.

    parts: h as float32; codes of x and their scales; codes of h and their scales.
    """

    up: UpConfig
    down: DownConfig
    parts: tuple[int, int, int, int, int]
    up_shared_bytes: int
    down_shared_bytes: int

    @property
    def offsets(self) -> list[int]:
        """Where each part starts, and the sum of all."""
        return [0, *accumulate(align(part, 16) for part in self.parts)]


@cache
def _plan(m: int, top_k: int, hidden: int, intermediate: int, on_input: bool) -> _Plan:
    pairs, x_blocks, h_blocks = m * top_k, ceil_div(hidden, BLOCK), intermediate // BLOCK
    rows = pairs if on_input else m
    index = 0 if m <= 8 else 1
    x_parts = rows * x_blocks * BLOCK, x_blocks * align(rows, 4) * 4
    h_parts = pairs * intermediate, h_blocks * align(pairs, 4) * 4
    # Up to 8 tokens both GEMMs share a multiprocessor, so that the second streams weights while the first ends and h is
    # quantised: 1 to 9 % faster than all shared memory for each (docs/kernel-notes-moe-decode.md).
    shared = (_UP_SHARED_BYTES, _DOWN_SHARED_BYTES) if index == 0 else (MAX_SHARED_BYTES, MAX_SHARED_BYTES)
    return _Plan(UP_CONFIGS[index], DOWN_CONFIGS[index], (pairs * intermediate * 4, *x_parts, *h_parts), *shared)


def experts_decode_workspace_bytes(
    m: int, top_k: int, hidden: int, intermediate: int, num_groups: int, router_weight_on_input: bool = False
) -> int:
    """Return the bytes that `experts_decode` allocates beside its output.

    Args:
        m: tokens.
        top_k: experts a token.
        hidden: columns of x.
        intermediate: columns between the two GEMMs, on this rank.
        num_groups: experts on this rank; changes nothing, because room is made for all pairs.
        router_weight_on_input: as given to `experts_decode`.
    """
    weighted = m * top_k * hidden * 4 if router_weight_on_input else 0
    return weighted + _plan(m, top_k, hidden, intermediate, router_weight_on_input).offsets[-1] if m else 0


def _workspace(size: int, device: torch.device) -> torch.Tensor:
    return torch.empty(size, dtype=torch.uint8, device=device)


def down_rows(hidden: int, sms: int) -> int:
    """Return how many rows of the output a CTA of the second GEMM owns: as many as fill the GPU most evenly."""
    waves = ceil_div(hidden, _MAX_DOWN_ROWS * sms)
    return min(_MAX_DOWN_ROWS, align(ceil_div(hidden, waves * sms), ROW_ALIGNMENT))


def experts_decode(
    x: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    w13: torch.Tensor,
    scale_13: torch.Tensor,
    w2: torch.Tensor,
    scale_2: torch.Tensor,
    out: torch.Tensor,
    expert_map: torch.Tensor | None = None,
    router_weight_on_input: bool = False,
) -> None:
    """Launch the experts op on a GPU in the form for few tokens; arguments are those of `fp8_experts`, not checked.

    Weights are fetched before earlier kernels of the stream have ended. topk_ids and topk_weights may be written by the
    kernel just ahead.

    Args:
        x: [m, hidden] bfloat16 or float16, contiguous columns; m * top_k at most `MAX_PAIRS`.
        topk_weights: [m, top_k] float32, contiguous.
        topk_ids: [m, top_k] int32 or int64, contiguous; -1 is skipped.
        w13: [num_groups, ceil(hidden / 128), 2 * intermediate, 128] float8_e4m3fn, packed, gate rows first.
        scale_13: [num_groups, ceil(hidden / 128), align(2 * intermediate / 128, 4) + 4] float32, packed.
        w2: [num_groups, intermediate / 128, align(hidden, 8), 128] float8_e4m3fn, packed.
        scale_2: [num_groups, intermediate / 128, align(ceil(hidden / 128), 4) + 4] float32, packed.
        out: [m, hidden] in x's dtype, contiguous; overwritten, with zeros for a token without an expert here.
        expert_map: [global experts] int32, -1 for an expert of another rank; None if ids are positions in w13.
        router_weight_on_input: scale a token by its weight before its experts instead of after them.
    """
    m, top_k, intermediate = x.shape[0], topk_ids.shape[1], w13.shape[2] // 2
    if m == 0 or top_k == 0:
        out.zero_()
        return
    assert m * top_k <= MAX_PAIRS and w13.shape[0] <= MAX_GROUPS and intermediate % BLOCK == 0
    on_input = router_weight_on_input
    # A weight on the input makes a token's codes differ from expert to expert: a row for each.
    rows = (x[:, None] * topk_weights[:, :, None]).view(-1, x.shape[1]) if on_input else x
    plan = _plan(m, top_k, x.shape[1], intermediate, on_input)
    workspace = _workspace(plan.offsets[-1], x.device)
    h, x_codes, x_scale, h_codes, h_scale, _ = (workspace.data_ptr() + offset for offset in plan.offsets)
    routing = (topk_ids.data_ptr(), 0 if expert_map is None else expert_map.data_ptr())
    weights, wide = 0 if on_input else topk_weights.data_ptr(), int(topk_ids.dtype == torch.int64)
    vectors = 0 if on_input else vectorised(x)
    _quantize(rows.data_ptr(), rows.dtype, rows.shape, rows.stride(0), vectors, x_codes, x_scale, x.device.index)
    _launch_up(plan, (x_codes, x_scale), w13, scale_13, h, routing, m * top_k, len(rows), wide)
    shape = (m * top_k, intermediate)
    _quantize(h, torch.float32, shape, intermediate, 0, h_codes, h_scale, x.device.index, early=True)
    _launch_down(plan, (h_codes, h_scale), w2, scale_2, out, (*routing, weights), top_k, wide)


def _quantize(
    x: int,
    dtype: torch.dtype,
    shape: Sequence[int],
    stride: int,
    vectors: int,
    codes: int,
    scale: int,
    device: int,
    early: bool = False,
) -> None:
    """Quantise x of this shape, all at these addresses; early: let the kernel behind start before x is complete."""
    (rows, k), k_blocks = shape, ceil_div(shape[1], BLOCK)
    params = (x, codes, scale, stride, rows, k, k_blocks, align(rows, 4), ELEMENT_TYPES[dtype], vectors, int(early))
    grid = (ceil_div(rows * k_blocks, _GROUPS_PER_CTA), 1, 1)
    stream = launcher.current_stream(device)
    _quantize_kernel(device).launch(grid, _QUANTIZE_THREADS, 0, params, stream, pdl=True)


def _launch_up(
    plan: _Plan,
    source: tuple[int, int],
    w13: torch.Tensor,
    scale_13: torch.Tensor,
    h: int,
    routing: tuple[int, int],
    pairs: int,
    rows: int,
    wide_ids: int,
) -> None:
    """Launch the first GEMM on so many rows of codes: one for each pair, or for each token."""
    (num_groups, k_blocks, n_13, _), device = w13.shape, w13.device.index
    ring_bytes = plan.up.ring_bytes(plan.up_shared_bytes, num_groups, pairs)
    params: tuple[int, ...] = (*source, w13.data_ptr(), scale_13.data_ptr(), h, *routing)
    params += (align(rows, 4), w13.stride(0), scale_13.stride(0))
    params += (pairs, pairs // rows, num_groups, n_13 // 2, k_blocks, scale_13.stride(1))
    params += (UP_TILE_GROUPS, ring_bytes, _STAGE_BYTES, wide_ids)
    stream = launcher.current_stream(device)
    up_kernel(plan.up, device).launch((num_sms(device), 1, 1), THREADS, plan.up_shared_bytes, params, stream, pdl=True)


def _launch_down(
    plan: _Plan,
    source: tuple[int, int],
    w2: torch.Tensor,
    scale_2: torch.Tensor,
    out: torch.Tensor,
    routing: tuple[int, int, int],
    top_k: int,
    wide_ids: int,
) -> None:
    (m, hidden), (num_groups, k_blocks, n_aligned, _), device = out.shape, w2.shape, out.device.index
    pairs, rows = m * top_k, down_rows(hidden, num_sms(device))
    ring_bytes = plan.down.ring_bytes(plan.down_shared_bytes, num_groups, m, pairs, rows)
    params: tuple[int, ...] = (*source, w2.data_ptr(), scale_2.data_ptr(), out.data_ptr(), *routing)
    params += (w2.stride(0), scale_2.stride(0), align(pairs, 4), m, top_k, num_groups, hidden, n_aligned, k_blocks)
    params += (scale_2.stride(1), rows, ring_bytes, _STAGE_BYTES, wide_ids, ELEMENT_TYPES[out.dtype])
    grid, stream = min(num_sms(device), ceil_div(hidden, rows)), launcher.current_stream(device)
    _down_kernel(plan.down, device).launch((grid, 1, 1), THREADS, plan.down_shared_bytes, params, stream, pdl=True)
