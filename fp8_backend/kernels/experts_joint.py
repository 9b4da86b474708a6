"""The experts op for tens of tokens: quantisation, both GEMMs in one launch that sorts the rows itself, one sum."""

from __future__ import annotations

from functools import cache, lru_cache

import torch

from fp8_backend.errors import ArgumentError
from fp8_backend.kernels import combine, experts_plans, launcher, quantize
from fp8_backend.kernels.backend import num_sms
from fp8_backend.kernels.compiler import KernelSpec
from fp8_backend.kernels.experts_plans import ExpertsPlan, ExpertWeights
from fp8_backend.kernels.experts_prefill_plan import offsets_of, workspace_bytes
from fp8_backend.kernels.prepared import Launch, Prepared
from fp8_backend.kernels.quantize import ELEMENT_TYPES
from fp8_backend.kernels.reference import BLOCK, align, ceil_div

_STAGES = 4  # five are slower (docs/kernel-notes-moe-decode.md, 2026-11-28)
# By whether tiles of the first GEMM beyond the last whole round may be cut in k.
SPECS = {
    cuts: KernelSpec("experts_joint.cuh", "experts_joint", (("NUM_STAGES", _STAGES), ("CUTS", int(cuts))))
    for cuts in (False, True)
}
LAYOUT = launcher.ParamLayout(("u64",) * 13 + ("u32",) * 14)
THREADS, MAX_ENTRIES, TILE_ROWS, TICKETS = 384, 1024, 64, 4  # of experts_joint.cuh
MAX_GROUPS = 1024  # for each a bit of every entry, where stages lie later
# Where tiles beyond the first whole round are so many rounds in all, they are cut in k: else few multiprocessors fetch
# them while the others have nothing left to multiply. Sums of a cut take room, and the end of a cut time: one H200, us
# without and with cuts, Qwen3-235B at TP4 at 8 tokens (1.2 rounds) 71.2 and 66.3, Qwen3-30B at 4 (1.3) 46.1 and 45.5,
# but at 8 (2.4) 64.6 and 66.2, and 0.3 to 3.8 % more for less than a round and for more than two
# (docs/kernel-notes-moe-decode.md, 2026-11-28, leads).
CUT_ROUNDS, MAX_CUTS, _LEAST_K_BLOCKS = (1.1, 1.5), 4, 4
_STAGE_BYTES = (TILE_ROWS + 2 * BLOCK) * BLOCK
_SHARED_BYTES = _STAGES * (_STAGE_BYTES + TILE_ROWS * 4 + 32 + 16 + 2 * 8) + TICKETS * (2 * 8 + 16)


def all_specs() -> tuple[KernelSpec, ...]:
    """Return every kernel this form needs beside quantize.cuh and combine.cuh."""
    return tuple(SPECS.values())


def load_all() -> None:
    """Load every kernel on torch's current device."""
    for cuts in SPECS:
        _kernel(cuts, torch.cuda.current_device())


@cache
def _kernel(cuts: bool, device: int) -> launcher.Kernel:
    return launcher.load(SPECS[cuts], LAYOUT)


@lru_cache(maxsize=4096)
def most_cuts(entries: int, num_ids: int, num_groups: int, hidden: int, intermediate: int, sms: int) -> int:
    """Return in how many parts of k a tile of the first GEMM may be cut, where all experts are as likely.

    Args:
        entries: tokens times experts a token.
        num_ids: experts in all.
        num_groups: experts on this rank.
        hidden: columns of x.
        intermediate: columns of h.
        sms: multiprocessors.
    """
    hit = num_groups * (1 - (1 - 1 / max(num_ids, 1)) ** entries)
    least, most = CUT_ROUNDS
    if not least <= hit * (intermediate // BLOCK) / sms <= most:
        return 1
    return max(1, min(MAX_CUTS, ceil_div(hidden, BLOCK) // _LEAST_K_BLOCKS))


def workspace_parts(rows: int, entries: int, hidden: int, intermediate: int, cuts: int, sms: int) -> list[int]:
    """Return the bytes of each part of the workspace, in order.

    Args:
        rows: of x that are quantised: tokens, or entries if each is weighted.
        entries: tokens times experts a token.
        hidden: columns of x.
        intermediate: columns of h.
        cuts: of a tile, at most.
        sms: multiprocessors.

    Returns:
        Of codes of h, and their scales; what each entry gives in 16-bit elements; codes of x; their scales, and behind
        these a ticket, a counter for each tile of rows and, where tiles may be cut, one for each of these; sums of all
        cuts but the last.
    """
    k_blocks = ceil_div(hidden, BLOCK)
    return [
        entries * intermediate,
        intermediate // BLOCK * align(entries, 4) * 4,
        entries * hidden * 2,
        rows * k_blocks * BLOCK,
        k_blocks * align(rows, 4) * 4 + num_counters(entries, cuts, sms) * 4,
        (cuts - 1) * entries * 2 * intermediate * 4,
    ]


def num_counters(entries: int, cuts: int, sms: int) -> int:
    """Return how many words of 4 bytes the kernel counts in; arguments as of `workspace_parts`."""
    return 1 + entries + (sms if cuts > 1 else 0)


def experts_joint_workspace_bytes(
    m: int, top_k: int, hidden: int, intermediate: int, num_groups: int, sms: int, router_weight_on_input: bool = False
) -> int:
    """Return the bytes of all tensors that `experts_joint` allocates for 16-bit activations, int32 ids and no map.

    Args:
        m: tokens.
        top_k: experts a token.
        hidden: columns of x.
        intermediate: columns of h.
        num_groups: experts, all on this rank.
        sms: multiprocessors.
        router_weight_on_input: whether each entry has a weighted row of its own.
    """
    entries = m * top_k
    cuts = most_cuts(entries, num_groups, num_groups, hidden, intermediate, sms)
    rows, weighted = (entries, entries * hidden * 4) if router_weight_on_input else (m, 0)
    return weighted + workspace_bytes(workspace_parts(rows, entries, hidden, intermediate, cuts, sms))


class JointPlan:
    """The launches for tensors of one shape and dtype; used by one thread at a time."""

    def __init__(
        self,
        x: torch.Tensor,
        top_k: int,
        weights: ExpertWeights,
        out: torch.Tensor,
        map_length: int,
        weighted: bool,
    ) -> None:
        """Prepare for tensors like these.

        Args:
            x: [m, hidden], or [m * top_k, hidden] of rows that have been weighted, contiguous columns.
            top_k: experts a token.
            weights: of the experts here.
            out: [m, hidden] in 16-bit elements.
            map_length: of the map from global experts to those here; 0 without one.
            weighted: whether x's rows have been weighted.

        Raises:
            ArgumentError: more than 1024 experts.
        """
        w13, scale_13, w2, scale_2 = weights
        (m, hidden), (num_groups, k_blocks), rows = out.shape, w13.shape[:2], x.shape[0]
        if num_groups > MAX_GROUPS:
            raise ArgumentError(f"{num_groups} experts; the kernel sorts at most {MAX_GROUPS}; use expert parallelism")
        entries, intermediate, device = m * top_k, w13.shape[2] // 2, w13.device.index
        sms = num_sms(device)
        cuts = most_cuts(entries, map_length or num_groups, num_groups, hidden, intermediate, sms)
        parts = workspace_parts(rows, entries, hidden, intermediate, cuts, sms)
        self._elements, self._offsets = workspace_bytes(parts) // out.element_size(), offsets_of(parts)
        self._counters, self._device = k_blocks * align(rows, 4) * 4, device
        # The routing needs no codes, but what came before: the GEMMs start when that has ended.
        self._quantise = quantize.launch_like(x, zeros=num_counters(entries, cuts, sms)).prepared()
        params = (
            *(entries, map_length, num_groups, 1 if weighted else top_k, k_blocks, intermediate, hidden, w2.shape[2]),
            *(align(rows, 4), scale_13.stride(1), align(entries, 4), scale_2.stride(1), cuts, ELEMENT_TYPES[out.dtype]),
        )
        tiles = min(entries, num_groups) * max(intermediate // BLOCK * cuts, ceil_div(hidden, 2 * BLOCK))
        grid = min(sms, tiles), 1
        self._gemms = Launch(_kernel(cuts > 1, device), grid, THREADS, _SHARED_BYTES, params).prepared()
        self._combine = combine.launch_like(out, top_k, map_length, num_groups, device).prepared()

    def __call__(
        self,
        x: torch.Tensor,
        topk_weights: torch.Tensor | None,
        topk_ids: torch.Tensor,
        weights: ExpertWeights,
        out: torch.Tensor,
        expert_map: torch.Tensor | None,
    ) -> None:
        """As `ExpertsPlan` has it."""
        stream, workspace = launcher.current_stream(self._device), out.new_empty(self._elements)
        between, between_scale, rows, codes, scale, sums = [workspace.data_ptr() + offset for offset in self._offsets]
        ids, here = topk_ids.data_ptr(), 0 if expert_map is None else expert_map.data_ptr()
        self._quantise(stream, x.data_ptr(), codes, scale)
        written = between, between_scale, rows, sums
        self._gemms(stream, codes, scale, *weights.pointers(), *written, ids, here, scale + self._counters)
        self._combine(stream, ids, here, 0 if topk_weights is None else topk_weights.data_ptr(), rows, out.data_ptr())


plans: Prepared[ExpertsPlan] = Prepared()


def experts_joint(
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
    """Launch the experts op on a GPU in three kernels; arguments, results and errors are those of `experts_prefill`.

    Args:
        x: [m, hidden]; m * top_k is at most `MAX_ENTRIES`.
        topk_weights: [m, top_k].
        topk_ids: [m, top_k].
        w13: packed weight of the first GEMM.
        scale_13: its packed scales.
        w2: packed weight of the second GEMM.
        scale_2: its packed scales.
        out: [m, hidden]; overwritten.
        expert_map: from ids to positions in w13.
        router_weight_on_input: scale a token by its weight before its experts.

    Raises:
        ArgumentError: as there.
    """
    assert topk_ids.numel() <= MAX_ENTRIES
    weights = ExpertWeights(w13, scale_13, w2, scale_2)
    tensors = x, topk_weights, topk_ids, weights, out, expert_map
    experts_plans.run(plans, JointPlan, *tensors, router_weight_on_input)
