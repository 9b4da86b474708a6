"""When vLLM's processes get their kernels: before weights are read, once a process."""

from __future__ import annotations

import functools
import logging
import time
from contextlib import nullcontext
from dataclasses import replace

from fp8_backend.kernels import cache, warmup
from fp8_backend.progress import ProgressOnDemand

logger = logging.getLogger("vllm.fp8_backend.integration.warmup")


@functools.cache
def warm_up_process(speak: bool) -> warmup.WarmUp:
    """Compile or find every kernel and load it on this process's device; a second call returns the first one's result.

    Args:
        speak: whether this rank shows a bar while it compiles, and logs what was done.

    Raises:
        CompileError: a kernel does not compile, or is missing and FP8_BACKEND_JIT=forbid.
        DriverError: the driver refuses a kernel.
    """
    start = time.monotonic()
    with ProgressOnDemand("compiling fp8_backend", "kernels") if speak else nullcontext() as progress:
        done = warmup.warm_up(progress=progress)
    warmup.load_all()
    cache.mark_ready()
    done = replace(done, seconds=time.monotonic() - start)
    if speak:
        logger.info("%s", done)
    return done
