"""A routing in memory of its own, made by one launch: the experts op makes its own in its workspace."""

from __future__ import annotations

import torch

from fp8_backend.kernels import launcher
from fp8_backend.kernels.routing import Routing, launch_like, routing_bytes


def route(
    ids: torch.Tensor,
    expert_map: torch.Tensor | None,
    num_groups: int,
    extra_rows: int = 0,
    with_places: bool = False,
) -> Routing:
    """Sort entries by expert; ids: int32, contiguous, at least one."""
    storage = torch.empty(routing_bytes(ids.numel(), num_groups, with_places), dtype=torch.uint8, device=ids.device)
    routed = Routing(storage.data_ptr(), ids.numel(), num_groups, with_places=with_places, storage=storage)
    length, here = (0, 0) if expert_map is None else (expert_map.numel(), expert_map.data_ptr())
    launch_like(ids.numel(), length, num_groups, ids.device.index, extra_rows)(
        launcher.current_stream(ids.device.index),
        *(ids.data_ptr(), here, routed.sorted_entries, routed.places),
        *(routed.tiles, routed.num_tiles, routed.ticket(0)),
    )
    return routed
