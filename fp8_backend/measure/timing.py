"""Time GPU work so that the numbers mean something: CUDA graphs, weights cold, arms interleaved, medians."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

COLD_FACTOR = 8  # copies of a weight together exceed this many L2 caches, so that each comes from memory, as in serving
# An arm that has taken this many microseconds in LEAST_ROUNDS rounds leaves the others: a long time is a steady one.
ENOUGH_US = 60_000
LEAST_ROUNDS = 3


def copies_for(weight_bytes: int, most: int = 256) -> int:
    """Return how many copies of a weight to rotate among."""
    l2 = torch.cuda.get_device_properties(0).L2_cache_size
    return max(2, min(most, -(-COLD_FACTOR * l2 // weight_bytes)))


@dataclass(frozen=True)
class Captured:
    """A CUDA graph of several calls, and what each of them returned."""

    graph: torch.cuda.CUDAGraph
    outputs: list[Any]

    def replay_us(self) -> float:
        """Return the time of one call in microseconds, over one replay."""
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        self.graph.replay()
        end.record()
        torch.cuda.synchronize()
        return float(start.elapsed_time(end)) * 1e3 / len(self.outputs)


def capture(calls: Sequence[Callable[[], object]]) -> Captured:
    """Run two of the calls, capture all of them and replay once.

    The results live as long as the graph, so that no call writes where another did.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls[:2]:
            call()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = [call() for call in calls]
    graph.replay()
    torch.cuda.synchronize()
    return Captured(graph, outputs)


def interleaved_us(arms: Mapping[str, Captured], rounds: int = 7) -> dict[str, float]:
    """Return each arm's median time of one call in microseconds; the arms take turns, one timed replay each.

    A replay before it is not timed: it leaves clock and caches as this arm does, whichever arm was before it.
    """
    times: dict[str, list[float]] = {name: [] for name in arms}
    for _ in range(rounds):
        for name, arm in arms.items():
            spent = sum(times[name]) * len(arm.outputs)
            if len(times[name]) < LEAST_ROUNDS or spent < ENOUGH_US:
                arm.graph.replay()
                times[name].append(arm.replay_us())
    return {name: statistics.median(taken) for name, taken in times.items()}


def graph_us(calls: Sequence[Callable[[], object]], repeats: int = 7) -> float:
    """Return the median time of one call in microseconds, over replays of a CUDA graph that holds every call once."""
    return interleaved_us({"": capture(calls)}, repeats)[""]
