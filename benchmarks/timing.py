"""Time GPU work so that the numbers mean something: CUDA graphs, weights cold from memory, medians."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence

import torch

COLD_FACTOR = 8  # copies of a weight together exceed this many L2 caches, so that each comes from memory, as in serving


def copies_for(weight_bytes: int, most: int = 64) -> int:
    """Return how many copies of a weight to rotate among."""
    l2 = torch.cuda.get_device_properties(0).L2_cache_size
    return max(2, min(most, -(-COLD_FACTOR * l2 // weight_bytes)))


def graph_us(calls: Sequence[Callable[[], object]], repeats: int = 7) -> float:
    """Return the median time of one call in microseconds, over replays of a CUDA graph that holds every call once."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls[:2]:
            call()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    graph.replay()
    torch.cuda.synchronize()
    times = []
    for _ in range(repeats):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / len(calls))
    return statistics.median(times)
