"""Time and verify one layer of experts at a time: ours and every peer, in turns, weights cold."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from fp8_backend.bench.moe_operands import RandomExperts, Routed, copies_for, sampled_tokens
from fp8_backend.bench.moe_peers import NAMES, MoePeer, load
from fp8_backend.bench.moe_shapes import MoeShape, Routing, route
from fp8_backend.bench.peers import reason_of
from fp8_backend.bench.stream import read_bytes_per_us
from fp8_backend.errors import DriverError
from fp8_backend.kernels.experts import form_limits, select_form
from fp8_backend.kernels.reference import relative_error
from fp8_backend.measure.accuracy import LIMIT_RATIO, LIMIT_SLACK
from fp8_backend.measure.timing import Captured, capture, interleaved_us

# A graph holds as many calls as take about this long, at least MIN_CALLS and at most MAX_CALLS.
REPLAY_US, MIN_CALLS, MAX_CALLS = 3000, 3, 16
OPERATIONS_PER_US = 6e8  # what a call reaches at least where it is long
# Where the Triton path did not run: both activations are quantised, and where one differs in its last bit before the
# second quantisation, its code may be the next one.
LIMIT_ALONE = 0.03
PEER_LIMIT = 0.1  # a peer quantises by its own rules; more than this is another product
Row = dict[str, Any]


@dataclass
class Plan:
    """What to measure, with what, and what was missing on the way.

    absent: peer -> why it is not there. failures: "peer: reason" -> the cells where it holds.
    """

    shapes: tuple[MoeShape, ...]
    tokens: tuple[int, ...]
    routings: tuple[Routing, ...]
    peers: tuple[str, ...]
    absent: dict[str, str] = field(default_factory=dict)
    failures: dict[str, list[str]] = field(default_factory=dict)

    def fail(self, name: str, cell: str, reason: str) -> None:
        """Note that a peer did not run in a cell."""
        self.failures.setdefault(f"{name}: {reason}", []).append(cell)

    @property
    def cells(self) -> int:
        """Return how many rows there will be."""
        return len(self.shapes) * len(self.tokens) * len(self.routings)


def calls_for(shape: MoeShape, tokens: int, hit: int, bytes_per_us: float) -> int:
    """Return how many calls a graph holds, each with a routing of its own."""
    us = max(floor_us(shape, hit, bytes_per_us), shape.flops(tokens) / OPERATIONS_PER_US)
    return max(MIN_CALLS, min(MAX_CALLS, int(REPLAY_US / us)))


def floor_us(shape: MoeShape, hit: float, bytes_per_us: float) -> float:
    """Return the time of reading the weights of the experts hit once, at the memory's rate."""
    return hit * shape.expert_bytes / bytes_per_us


def run(plan: Plan) -> Iterator[Row]:
    """Yield one row a cell, layer by layer."""
    device = torch.device("cuda", torch.cuda.current_device())
    for shape in plan.shapes:
        peers, absent = load(plan.peers, shape)
        plan.absent |= absent
        l2 = torch.cuda.get_device_properties(device).L2_cache_size
        copies = copies_for(shape, l2, torch.cuda.mem_get_info()[0], bool(peers))
        layer = RandomExperts(shape, device, copies, plain=bool(peers))
        for routing in plan.routings:
            for tokens in plan.tokens:
                yield {**measure(plan, layer, peers, tokens, routing), "copies": copies}
        del layer
        torch.cuda.empty_cache()


def measure(plan: Plan, layer: RandomExperts, peers: dict[str, MoePeer], tokens: int, routing: Routing) -> Row:
    """Return the row of one cell.

    Raises:
        DriverError: the CUDA context is lost; the message names the cell.
    """
    shape, cell = layer.shape, f"{layer.shape.name} {tokens} {routing}"
    x = torch.randn(tokens, shape.hidden, device="cuda", dtype=torch.bfloat16)
    first = route_on_gpu(shape, tokens, routing, 0)
    rate = read_bytes_per_us(x.device.index)
    count = calls_for(shape, tokens, len(first[1].unique()), rate)
    routed = [first, *(route_on_gpu(shape, tokens, routing, seed) for seed in range(1, count))]
    hit = sum(len(ids.unique()) for _, ids in routed) / count
    rows = sampled_tokens(tokens).cuda()
    truth = layer.truth(x, first, rows)
    ours = [partial(layer.run, x, given, copy) for copy, given in enumerate(routed)]
    arms, extra, errors = {"ours": capture(ours)}, {"ours": extra_bytes(ours[0])}, {}
    for name, peer in peers.items():
        calls = [partial(peer, x, given, layer.plain[copy % len(layer.plain)]) for copy, given in enumerate(routed)]
        try:
            error = relative_error(calls[0]()[rows], truth)
            if not error <= PEER_LIMIT:
                raise ValueError(f"relative error {error:.3g}")
            errors[name], extra[name], arms[name] = error, extra_bytes(calls[0]), capture(calls)
        except Exception as failure:  # a peer that fails is a line in the result
            plan.fail(name, cell, reason_of(failure))
            arms.pop(name, None)
            _still_alive(name, cell, failure)
    verified = verify(arms["ours"], rows, truth, errors.get("triton"))
    us = interleaved_us(arms)
    ours_us, widths = us["ours"], (shape.top_k, shape.experts, shape.hidden, shape.intermediate)
    return {
        "model": shape.name,
        "tokens": tokens,
        "routing": routing,
        "us": round(ours_us, 3),
        "floor_us": round(floor_us(shape, hit, rate), 3),
        "tflops": round(shape.flops(tokens) / ours_us / 1e6, 1),
        "peers": {name: round(us[name], 3) for name in NAMES if name in us},
        "extra_bytes": extra["ours"],
        "peer_extra_bytes": {name: extra[name] for name in NAMES if name in extra},
        **verified,
        "peer_rel_err": {name: errors[name] for name in NAMES if name in errors},
        "experts_hit": round(hit, 1),
        "form": select_form(tokens, *widths, limits=form_limits(x.device.index)),
        "calls": count,
    }


def route_on_gpu(shape: MoeShape, tokens: int, routing: Routing, seed: int) -> Routed:
    """Return what `moe_shapes.route` does, on the current GPU."""
    weights, ids = route(shape, tokens, routing, seed)
    return weights.cuda(), ids.cuda()


def extra_bytes(call: Callable[[], torch.Tensor]) -> int:
    """Return the most memory that a call takes from torch's allocator beside its output."""
    call()  # what is made once is not of a call
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    out = call()
    torch.cuda.synchronize()
    return max(0, torch.cuda.max_memory_allocated() - before - out.nbytes)


def verify(ours: Captured, rows: torch.Tensor, truth: torch.Tensor, triton_error: float | None) -> Row:
    """Poison every output of the graph, replay it twice, judge what it wrote: no NaN, the same bits, a small error."""
    replays = []
    for _ in range(2):
        for out in ours.outputs:
            out.fill_(float("nan"))
        ours.graph.replay()
        torch.cuda.synchronize()
        replays.append([out.clone() for out in ours.outputs])
    # NaN is unequal to itself: nothing is left unwritten.
    same = all(torch.equal(once, again) for once, again in zip(*replays, strict=True))
    error = relative_error(replays[0][0][rows], truth)
    limit = LIMIT_ALONE if triton_error is None else LIMIT_RATIO * triton_error + LIMIT_SLACK
    return {"rel_err": error if error < 1e300 else None, "bitwise": same, "verified": same and error <= limit}


def _still_alive(name: str, cell: str, failure: Exception) -> None:
    try:
        torch.cuda.synchronize()
    except Exception as error:
        raise DriverError(
            f"{name} at {cell} ended the CUDA context ({reason_of(failure)}); leave it out with --peers"
        ) from error
