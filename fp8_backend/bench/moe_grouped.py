"""Grouped GEMMs alone, contiguous and masked, beside DeepGEMM's, on even and ragged numbers of rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch

from fp8_backend.bench.peers import deepgemm_module, reason_of
from fp8_backend.bench.stream import read_bytes_per_us
from fp8_backend.kernels import reference
from fp8_backend.kernels.expert_weights import pack_expert_scales, pack_experts
from fp8_backend.kernels.m_grouped import (
    m_grouped_fp8_gemm_nt_contiguous,
    m_grouped_fp8_gemm_nt_masked,
    mn_major_groups,
)
from fp8_backend.kernels.reference import BLOCK, align, ceil_div
from fp8_backend.measure.accuracy import verified
from fp8_backend.measure.timing import capture, copies_for, interleaved_us

SHAPES = ((4096, 7168), (7168, 2048))
PEAK_OPERATIONS_PER_US = 1.494e9  # per-tensor FP8, 8192^3, on an H200
DEEPGEMM_ROWS = 128  # to which its contiguous layout pads every group
Row = dict[str, Any]


@dataclass(frozen=True)
class GroupedCell:
    """A layout and the rows of each group; max_m: of the masked layout's buffers."""

    layout: Literal["contiguous", "masked"]
    rows: str
    counts: tuple[int, ...]

    @property
    def max_m(self) -> int:
        """Return the rows of a masked buffer: DeepGEMM wants at least 64."""
        return max(64, align(max(self.counts), 8))


def ragged_counts(groups: int, total: int) -> tuple[int, ...]:
    """Return `groups` numbers that sum to `total`: one is about 1 / i of the largest for each i, in mixed order."""
    weights = [1 / (index + 1) for index in range(groups)]
    counts = [int(total * weight / sum(weights)) for weight in weights]
    counts[0] += total - sum(counts)
    order = torch.randperm(groups, generator=torch.Generator().manual_seed(0)).tolist()
    return tuple(counts[index] for index in order)


CELLS = (
    *(
        GroupedCell("masked", str(rows), (rows,) * groups)
        for groups, rows in ((256, 2), (256, 16), (32, 16), (8, 64), (8, 256))
    ),
    GroupedCell("masked", "ragged, 512", ragged_counts(32, 512)),
    GroupedCell("masked", "ragged, 1024", ragged_counts(256, 1024)),
    *(
        GroupedCell("contiguous", str(rows), (rows,) * groups)
        for groups, rows in ((256, 2), (32, 128), (8, 1024), (4, 8192))
    ),
    GroupedCell("contiguous", "ragged, 4096", ragged_counts(32, 4096)),
    GroupedCell("contiguous", "ragged, 16384", ragged_counts(256, 16384)),
    GroupedCell("contiguous", "one group", (0, 0, 0, 4096, 0, 0, 0, 0)),
)


class GroupedWeight:
    """Random weights of some groups, as stored and packed, in copies that are cold."""

    def __init__(self, groups: int, n: int, k: int, copies: int | None = None) -> None:
        """Draw the weights on the current GPU; copies: by default enough to be cold."""
        self.n, self.k = n, k
        codes = torch.empty(groups, n, k, dtype=torch.float8_e4m3fn, device="cuda")
        for group in codes:
            group.copy_((torch.randn(n, k, device="cuda") * 60).clamp(-448, 448))
        scale = (torch.rand(groups, ceil_div(n, BLOCK), k // BLOCK, device="cuda") + 0.1) / (60 * k**0.5)
        copies = copies_for(groups * n * k, 8) if copies is None else copies
        self.plain = [(codes.clone(), scale.clone()) for _ in range(copies)]
        packed = pack_experts(codes), pack_expert_scales(scale, n, k)
        self.packed = [packed, *((packed[0].clone(), packed[1].clone()) for _ in range(copies - 1))]
        torch.cuda.synchronize()


def floor_us(cell: GroupedCell, n: int, k: int, bytes_per_us: float) -> float:
    """Return the larger of the times of reading the weights hit at the memory's rate and of the operations at peak."""
    hit = sum(count > 0 for count in cell.counts)
    return max(hit * n * k / bytes_per_us, 2 * sum(cell.counts) * n * k / PEAK_OPERATIONS_PER_US)


def run(failures: dict[str, list[str]], peers: Sequence[str]) -> Iterator[Row]:
    """Yield one row a cell."""
    module = None
    if "deepgemm" in peers:
        try:
            module = deepgemm_module()
        except ImportError as error:
            failures[f"deepgemm: {reason_of(error)}"] = ["all"]
    for n, k in SHAPES:
        for groups in sorted({len(cell.counts) for cell in CELLS}):
            weight = GroupedWeight(groups, n, k)
            for cell in CELLS:
                if len(cell.counts) == groups:
                    yield measure(cell, weight, module, failures)
            del weight
            torch.cuda.empty_cache()


def measure(cell: GroupedCell, weight: GroupedWeight, module: Any, failures: dict[str, list[str]]) -> Row:
    """Return the row of one cell."""
    problem = _masked if cell.layout == "masked" else _contiguous
    ours, theirs, outputs, truth = problem(cell, weight, module)
    copies = range(len(weight.packed))
    arms = {"ours": capture([partial(ours, weight.packed[copy]) for copy in copies])}
    errors = {"ours": reference.relative_error(*outputs(ours(weight.packed[0]), truth, False))}
    if theirs is not None:
        try:
            errors["deepgemm"] = reference.relative_error(*outputs(theirs(weight.plain[0]), truth, True))
            arms["deepgemm"] = capture([partial(theirs, weight.plain[copy]) for copy in copies])
        except Exception as error:  # a peer that fails is a line in the result
            failures.setdefault(f"deepgemm: {reason_of(error)}", []).append(f"{cell.layout} {cell.rows}")
            torch.cuda.synchronize()
    us = interleaved_us(arms)
    rate = read_bytes_per_us(torch.cuda.current_device())
    return {
        "layout": cell.layout,
        "groups": len(cell.counts),
        "rows": cell.rows,
        "n": weight.n,
        "k": weight.k,
        "us": round(us["ours"], 3),
        "floor_us": round(floor_us(cell, weight.n, weight.k, rate), 3),
        "peers": {"deepgemm": round(us["deepgemm"], 3)} if "deepgemm" in us else {},
        "rel_err": errors["ours"] if errors["ours"] < 1e300 else None,
        "deepgemm_rel_err": errors.get("deepgemm"),
        "verified": verified(errors["ours"], errors.get("deepgemm")),
    }


def call_deepgemm(cell: GroupedCell, weight: GroupedWeight, module: Any) -> None:
    """Let DeepGEMM compute a cell once."""
    theirs = (_masked if cell.layout == "masked" else _contiguous)(cell, weight, module)[1]
    if theirs is not None:
        theirs(weight.plain[0])


Call = Callable[[tuple[torch.Tensor, torch.Tensor]], torch.Tensor]


def _quantised(rows: int, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    codes, scale = reference.per_token_group_quant(torch.randn(rows, k, device="cuda"))
    return codes, scale


def _truth(a: torch.Tensor, scale_a: torch.Tensor, weight: GroupedWeight, group: int) -> torch.Tensor:
    codes, scale = weight.plain[0]
    return reference.fp8_gemm_nt(a, scale_a, codes[group], scale[group], dtype=torch.float64)


def _sampled(counts: Sequence[int]) -> list[int]:
    """Return up to four groups that have rows: the fullest, the emptiest, the first and the last."""
    held = [group for group, count in enumerate(counts) if count]
    return list(
        dict.fromkeys((max(held, key=counts.__getitem__), min(held, key=counts.__getitem__), held[0], held[-1]))
    )


def _contiguous(cell: GroupedCell, weight: GroupedWeight, module: Any) -> tuple[Call, Call | None, Any, Any]:
    counts, n, k = cell.counts, weight.n, weight.k
    m = sum(counts)
    a, scale_a = _quantised(m, k)
    m_indices = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts)).int().cuda()
    # DeepGEMM's layout: each group starts at a multiple of 128 rows.
    padded = [align(count, DEEPGEMM_ROWS) for count in counts]
    starts = torch.tensor([0, *padded]).cumsum(0)[:-1]
    within = torch.cat([torch.arange(count) for count in counts])
    place = (starts.repeat_interleave(torch.tensor(counts)) + within).cuda()
    wide = torch.zeros(sum(padded), k, dtype=torch.uint8, device="cuda")
    wide[place] = a.view(torch.uint8)
    wide_scale = torch.ones(sum(padded), k // BLOCK, device="cuda")
    wide_scale[place] = scale_a
    wide_pair = wide.view(torch.float8_e4m3fn), reference.mn_major(wide_scale)
    wide_indices = torch.full((sum(padded),), -1, dtype=torch.int32, device="cuda")
    wide_indices[place] = m_indices

    def ours(b: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        out = torch.empty(m, n, dtype=torch.bfloat16, device="cuda")
        m_grouped_fp8_gemm_nt_contiguous((a, scale_a), b, out, m_indices)
        return out

    def theirs(b: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        out = torch.empty(sum(padded), n, dtype=torch.bfloat16, device="cuda")
        module.m_grouped_fp8_gemm_nt_contiguous(wide_pair, b, out, wide_indices, disable_ue8m0_cast=True)
        return out

    begin = [sum(counts[:group]) for group in range(len(counts))]
    rows = {group: slice(begin[group], begin[group] + min(counts[group], 256)) for group in _sampled(counts)}
    truth = torch.cat([_truth(a[part], scale_a[part], weight, group) for group, part in rows.items()])

    def outputs(out: torch.Tensor, truth: torch.Tensor, is_padded: bool) -> tuple[torch.Tensor, torch.Tensor]:
        out = out[place] if is_padded else out
        return torch.cat([out[part] for part in rows.values()]), truth

    return ours, theirs if module is not None else None, outputs, truth


def _masked(cell: GroupedCell, weight: GroupedWeight, module: Any) -> tuple[Call, Call | None, Any, Any]:
    counts, n, k, max_m = cell.counts, weight.n, weight.k, cell.max_m
    groups = len(counts)
    a, scale = _quantised(groups * max_m, k)
    a, scale_a = a.view(groups, max_m, k), mn_major_groups(scale.reshape(groups, max_m, k // BLOCK))
    masked_m = torch.tensor(counts, dtype=torch.int32, device="cuda")
    expected_m = ceil_div(sum(counts), groups)
    theirs_of = module and getattr(module, "m_grouped_fp8_gemm_nt_masked", None)
    theirs_of = theirs_of or (module and module.fp8_m_grouped_gemm_nt_masked)

    def ours(b: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        out = torch.empty(groups, max_m, n, dtype=torch.bfloat16, device="cuda")
        m_grouped_fp8_gemm_nt_masked((a, scale_a), b, out, masked_m, expected_m)
        return out

    def theirs(b: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        out = torch.empty(groups, max_m, n, dtype=torch.bfloat16, device="cuda")
        theirs_of((a, scale_a), b, out, masked_m, expected_m, disable_ue8m0_cast=True)
        return out

    rows = {group: slice(0, min(counts[group], 256)) for group in _sampled(counts)}
    parts = [_truth(a[group, part], scale_a[group, part], weight, group) for group, part in rows.items()]

    def outputs(out: torch.Tensor, truth: torch.Tensor, _: bool) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.cat([out[group, part] for group, part in rows.items()]), truth

    return ours, theirs if theirs_of else None, outputs, torch.cat(parts)
