"""What a call asks of torch's allocator on a GPU."""

from __future__ import annotations

from collections.abc import Callable

import torch


def requested_bytes(call: Callable[[], object]) -> int:
    """Return the most bytes that a call has at once, as it asked for them; run before, so that nothing is made once."""
    call()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_stats()["requested_bytes.all.current"]
    call()
    return torch.cuda.memory_stats()["requested_bytes.all.peak"] - before
