"""Time and verify one linear at a time: ours, every peer, and the stream floor, in turns."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from types import ModuleType
from typing import Any

import torch

from fp8_backend.bench import peers
from fp8_backend.bench.operands import RandomLinear, sampled_rows
from fp8_backend.bench.shapes import DECODE_M, Shape
from fp8_backend.bench.stream import stream_us
from fp8_backend.errors import DriverError
from fp8_backend.kernels import gemm, heuristics, reference
from fp8_backend.kernels.gemm import machine
from fp8_backend.kernels.problem import GemmProblem
from fp8_backend.kernels.quantize import per_token_group_quant
from fp8_backend.measure.accuracy import verified
from fp8_backend.measure.timing import Captured, capture, interleaved_us

REPLAY_US = 3000  # a graph holds as many cold copies as take about this long, at least MIN_CALLS
MIN_CALLS = 3
OUTPUT_BYTES = 3 << 30  # of one graph, which keeps the outputs of all its calls; up to nine graphs live at once
# What a call takes at least, to choose the number of calls by: bytes a us and operations a us of an H200.
BYTES_PER_US, OPERATIONS_PER_US = 4.0e6, 1.3e9
PEER_LIMIT = 0.05  # a peer quantises by its own rules; more than this is another product
ROW = dict[str, Any]


@dataclass
class Plan:
    """What to measure, with what, and what was missing on the way.

    failures: "peer: reason" -> the cells where it holds. batch_invariant: also time ours in that mode.
    """

    shapes: tuple[Shape, ...]
    ms: tuple[int, ...]
    peers: dict[str, peers.Linear]
    deepgemm: ModuleType | None
    failures: dict[str, list[str]] = field(default_factory=dict)
    batch_invariant: bool = False

    def fail(self, name: str, m: int, n: int, k: int, reason: str) -> None:
        """Note that a peer did not run in a cell."""
        self.failures.setdefault(f"{name}: {reason}", []).append(f"{m} {n}x{k}")


def calls_for(m: int, n: int, k: int, copies: int) -> int:
    """Return how many calls a graph holds: every copy, or as many as take REPLAY_US or fill OUTPUT_BYTES."""
    us = max(n * k / BYTES_PER_US, 2 * m * n * k / OPERATIONS_PER_US)
    return max(min(MIN_CALLS, copies), min(copies, int(REPLAY_US / us), OUTPUT_BYTES // (2 * m * n)))


def run(plan: Plan) -> Iterator[ROW]:
    """Yield one row a cell, shape by shape."""
    for n, k in plan.shapes:
        weight = RandomLinear(n, k, bf16="bf16" in plan.peers, plain=bool(set(plan.peers) - {"bf16"}))
        alone, chained = stream_us([copy.codes for copy in weight.ours])
        for m in plan.ms:
            row = measure(plan, weight, m)
            yield {**row, "stream_us": round(alone, 3), "stream_pdl_us": round(chained, 3)}
        del weight
        torch.cuda.empty_cache()


def measure(plan: Plan, weight: RandomLinear, m: int) -> ROW:
    """Return the row of one cell, without the stream floor, which does not depend on m.

    Raises:
        DriverError: the CUDA context is lost; the message names the cell.
    """
    n, k = weight.n, weight.k
    x = torch.randn(m, k, device="cuda", dtype=torch.bfloat16)
    rows = sampled_rows(m).cuda()
    truth = weight.truth(x[rows])
    count = calls_for(m, n, k, len(weight.ours))
    arms = {"ours": capture([_ours(weight, x, copy) for copy in range(count)])}
    arms |= _peer_arms(plan, weight, x, rows, truth, count)
    codes, scale = per_token_group_quant(x)
    torch.cuda.synchronize()
    deepgemm_error = _deepgemm_error(plan, weight, (codes, scale), rows, truth)
    if m > DECODE_M:
        arms |= _gemm_arms(plan, weight, (codes, scale), count, deepgemm_error is not None)
    problem = GemmProblem(m, n, k, machine(x.device.index))
    if plan.batch_invariant:
        arms["our invariant"] = capture(_invariant(weight, x, problem, count))
    row: ROW = {"m": m, "n": n, "k": k, **_verify(arms["ours"], rows, truth, deepgemm_error)}
    us = interleaved_us(arms)
    row["us"] = round(us.pop("ours"), 3)
    if plan.batch_invariant:
        row["batch_invariant"] = _invariant_row(arms["our invariant"], rows, truth, us.pop("our invariant"))
        row["verified"] = row["verified"] and row["batch_invariant"]["verified"]
    for name, key in (("our gemm", "gemm_us"), ("deepgemm gemm", "deepgemm_gemm_us")):
        if name in us:
            row[key] = round(us.pop(name), 3)
    row["peers"] = {name: round(us[name], 3) for name in peers.NAMES if name in us}
    row["calls"], row["kernel"] = count, str(heuristics.select(problem))
    return row


def _ours(weight: RandomLinear, x: torch.Tensor, copy: int) -> Callable[[], torch.Tensor]:
    return lambda: weight.linear(x, copy)


def _invariant(
    weight: RandomLinear, x: torch.Tensor, problem: GemmProblem, count: int
) -> list[Callable[[], torch.Tensor]]:
    """Return the calls of ours in batch-invariant mode."""
    choice = heuristics.select(problem, batch_invariant=True)
    plan = gemm.plan_of(choice, x, x.new_empty((problem.m, problem.n)), None)

    def call(copy: int) -> torch.Tensor:
        packed, out = weight.ours[copy], x.new_empty((problem.m, problem.n))
        plan(x, packed.codes, packed.scale, out, None)
        return out

    return [partial(call, copy) for copy in range(count)]


def _invariant_row(captured: Captured, rows: torch.Tensor, truth: torch.Tensor, us: float) -> ROW:
    return {"us": round(us, 3), **_verify(captured, rows, truth, None)}


def _peer_arms(
    plan: Plan, weight: RandomLinear, x: torch.Tensor, rows: torch.Tensor, truth: torch.Tensor, count: int
) -> dict[str, Captured]:
    """Return the peers that run here and give the right product."""
    m, n, k = x.shape[0], weight.n, weight.k
    arms = {}
    for name, linear in plan.peers.items():
        if (reason := peers.why_not(name, m, n, k)) is None:
            out, reason = peers.try_call(linear, x, weight.plain)
            error = reference.relative_error(out[rows], truth) if out is not None else 0.0
            if not error <= PEER_LIMIT:
                reason = f"relative error {error:.3g}"
        if reason is None:
            try:
                arms[name] = capture([peers.call(linear, x, weight.plain, copy) for copy in range(count)])
            except Exception as error:  # a peer that cannot be captured is a line in the result
                reason = f"not captured: {error}".splitlines()[0][:200]
        if reason is not None:
            plan.fail(name, m, n, k, reason)
            _still_alive(name, m, n, k, reason)
    return arms


def _still_alive(name: str, m: int, n: int, k: int, reason: str) -> None:
    try:
        torch.cuda.synchronize()
    except Exception as error:
        raise DriverError(
            f"{name} at m={m} n={n} k={k} ended the CUDA context ({reason}); leave it out with --peers"
        ) from error


def _gemm_arms(
    plan: Plan, weight: RandomLinear, a: tuple[torch.Tensor, torch.Tensor], count: int, with_deepgemm: bool
) -> dict[str, Captured]:
    """Return the GEMM alone, FP8 in: ours, and DeepGEMM's where it runs."""

    def ours(copy: int) -> Callable[[], torch.Tensor]:
        b = weight.ours[copy]

        def call() -> torch.Tensor:
            out = torch.empty(a[0].shape[0], weight.n, dtype=torch.bfloat16, device="cuda")
            gemm.fp8_gemm_nt(a, (b.codes, b.scale), out)
            return out

        return call

    def deepgemm(copy: int) -> Callable[[], torch.Tensor]:
        b = weight.plain.codes[copy], weight.plain.scales[copy]
        assert plan.deepgemm is not None
        return partial(peers.deepgemm_gemm, plan.deepgemm, a, b)

    arms = {"our gemm": capture([ours(copy) for copy in range(count)])}
    if with_deepgemm:
        arms["deepgemm gemm"] = capture([deepgemm(copy) for copy in range(count)])
    return arms


def _deepgemm_error(
    plan: Plan,
    weight: RandomLinear,
    a: tuple[torch.Tensor, torch.Tensor],
    rows: torch.Tensor,
    truth: torch.Tensor,
) -> float | None:
    """Return the error of DeepGEMM's product of our codes, or None where it does not run."""
    m, n, k = a[0].shape[0], weight.n, weight.k
    if plan.deepgemm is None or peers.why_not("deepgemm", m, n, k) is not None:
        return None
    try:
        out = peers.deepgemm_gemm(plan.deepgemm, a, (weight.plain.codes[0], weight.plain.scales[0]))
        torch.cuda.synchronize()
    except Exception as error:
        reason = f"GEMM alone: {error}".splitlines()[0][:200]
        plan.fail("deepgemm", m, n, k, reason)
        _still_alive("deepgemm", m, n, k, reason)
        return None
    return reference.relative_error(out[rows], truth)


def _verify(ours: Captured, rows: torch.Tensor, truth: torch.Tensor, deepgemm_error: float | None) -> ROW:
    """Poison every output of the graph, replay it, and judge what it wrote.

    Copies hold the same weight, so all outputs must be the same bits, in this replay and in the next.
    """
    for out in ours.outputs:
        out.fill_(float("nan"))
    ours.graph.replay()
    torch.cuda.synchronize()
    first = ours.outputs[0].clone()
    error = reference.relative_error(first[rows], truth)
    same = all(torch.equal(out, first) for out in ours.outputs)  # NaN is unequal to itself: nothing is left unwritten
    ours.graph.replay()
    torch.cuda.synchronize()
    same = same and torch.equal(ours.outputs[-1], first)
    found: ROW = {"rel_err": error if error < 1e300 else None}
    if deepgemm_error is not None:
        found["deepgemm_rel_err"] = deepgemm_error
    return {**found, "bitwise": same, "verified": same and verified(error, deepgemm_error)}
