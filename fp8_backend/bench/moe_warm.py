"""Compile the kernels of experts' and grouped GEMMs' peers before they are timed, in processes with a time limit.

    python -m fp8_backend.bench.moe_warm experts PEER EXPERTS,HIDDEN,INTERMEDIATE,TOP_K TOKENS
    python -m fp8_backend.bench.moe_warm grouped N K GROUPS

The peers compile inside a call and keep what they made on disk. FlashInfer builds a module of its own for many minutes:
a peer that is not done in time is left out of the run, with that reason, instead of stopping it at the first cell.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from fp8_backend.bench import warm
from fp8_backend.bench.moe_shapes import MoeShape, parse_models

# In the order in which they are started: the one that may not end last.
COMPILED_AT_CALL = ("deepgemm", "triton", "flashinfer")


@dataclass(frozen=True)
class Portion:
    """What one process compiles: a peer's kernels for one layer, or for the groups of one weight."""

    peer: str
    arguments: tuple[str, ...]

    @property
    def command(self) -> list[str]:
        """This module and its arguments."""
        return ["fp8_backend.bench.moe_warm", *self.arguments]

    def __str__(self) -> str:
        return " ".join((self.peer, *self.arguments[-2:]))


def experts_portions(names: Sequence[str], shapes: Sequence[MoeShape], tokens: Sequence[int]) -> list[Portion]:
    """Return every layer for each peer that compiles in a call."""
    return [
        Portion(name, ("experts", name, _numbers(shape), ",".join(map(str, tokens))))
        for name in COMPILED_AT_CALL
        if name in names
        for shape in shapes
    ]


def grouped_portions(names: Sequence[str]) -> list[Portion]:
    """Return every weight of the grouped GEMMs for DeepGEMM, the only peer they have."""
    from fp8_backend.bench.moe_grouped import CELLS, SHAPES

    groups = sorted({len(cell.counts) for cell in CELLS})
    found = [("grouped", str(n), str(k), str(count)) for n, k in SHAPES for count in groups]
    return [Portion("deepgemm", arguments) for arguments in found if "deepgemm" in names]


def compile_peers(
    portions: Sequence[Portion], limit_s: float, say: Callable[[str], None]
) -> tuple[list[str], dict[str, str]]:
    """Run the portions; return a line for each that failed, and why a peer that is not done is left out."""
    problems, late = warm.run_portions(portions, limit_s, say)
    return problems, {each.peer: f"its kernels were not compiled after {limit_s:.0f} s" for each in late}


def _numbers(shape: MoeShape) -> str:
    return f"{shape.experts},{shape.hidden},{shape.intermediate},{shape.top_k}"


def _experts(peer: str, numbers: str, tokens: str) -> None:
    import torch

    from fp8_backend.bench import moe_peers
    from fp8_backend.bench.moe_operands import Experts
    from fp8_backend.bench.moe_shapes import route
    from fp8_backend.kernels.reference import BLOCK, ceil_div

    (shape,) = parse_models(numbers)
    present, absent = moe_peers.load([peer], shape)
    if peer in absent:
        sys.exit(absent[peer])

    def zeros(n: int, k: int) -> tuple[torch.Tensor, torch.Tensor]:
        codes = torch.zeros(shape.experts, n, k, dtype=torch.float8_e4m3fn, device="cuda")
        return codes, torch.ones(shape.experts, ceil_div(n, BLOCK), ceil_div(k, BLOCK), device="cuda")

    layer = Experts(*zeros(2 * shape.intermediate, shape.hidden), *zeros(shape.hidden, shape.intermediate))
    for m in map(int, tokens.split(",")):
        weights, ids = route(shape, m, "balanced", 0)
        x = torch.zeros(m, shape.hidden, device="cuda", dtype=torch.bfloat16)
        present[peer](x, (weights.cuda(), ids.cuda()), layer)
    torch.cuda.synchronize()


def _grouped(n: int, k: int, groups: int) -> None:
    import torch

    from fp8_backend.bench import moe_grouped
    from fp8_backend.bench.peers import deepgemm_module

    weight, module = moe_grouped.GroupedWeight(groups, n, k, copies=1), deepgemm_module()
    for cell in moe_grouped.CELLS:
        if len(cell.counts) == groups:
            moe_grouped.call_deepgemm(cell, weight, module)
    torch.cuda.synchronize()


def main() -> None:
    """Compile one portion; a peer that fails says so again when it is timed."""
    kind, *arguments = sys.argv[1:]
    if kind == "experts":
        _experts(*arguments)
    else:
        _grouped(*map(int, arguments))


if __name__ == "__main__":
    main()
