"""Have every kernel that serving can need, before serving: nothing is compiled in the path of a request."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from fp8_backend import counters
from fp8_backend.errors import CompileError
from fp8_backend.kernels import (
    activation,
    attention,
    cache,
    experts_decode,
    experts_joint,
    experts_prefill_plan,
    experts_single,
    heuristics,
    masked,
    norm,
    norm_rope,
    quantize,
    router,
    silu,
)
from fp8_backend.kernels.compiler import KernelSpec
from fp8_backend.kernels.problem import GemmConfig, QuantizingGemmConfig, StationaryGemmConfig

# A kernel takes a core a second: whoever holds the lock this long without a new one is a process that hangs.
PATIENCE_S = 120.0

_EXPERTS = (experts_single, experts_decode, experts_joint, experts_prefill_plan, masked)

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class WarmUp:
    """What a warm-up did: kernels that are ready, how many of them this process compiled, seconds it took."""

    kernels: int
    compiled: int
    seconds: float

    def __str__(self) -> str:
        found = self.kernels - self.compiled
        return f"{self.kernels} kernels ready in {self.seconds:.1f} s: {found} from the cache, {self.compiled} compiled"


def all_specs() -> tuple[KernelSpec, ...]:
    """Return every kernel that serving can need."""
    experts = (spec for module in _EXPERTS for spec in module.all_specs())
    return (
        *(config.spec() for config in heuristics.all_configs()),
        *quantize.SPECS.values(),
        *norm.SPECS.values(),
        silu.SPEC,
        norm_rope.SPEC,
        router.SPEC,
        activation.SPEC,
        *attention.SPECS.values(),
        *experts,
    )


def warm_up(
    specs: Sequence[KernelSpec] | None = None,
    progress: Progress | None = None,
    patience_s: float = PATIENCE_S,
) -> WarmUp:
    """Take kernels from the cache into this process and compile those that are not there, one a thread; needs no GPU.

    Of the processes of a host that warm up at once one compiles and the others wait for its entries; where there can be
    no lock, each compiles.

    Args:
        specs: the kernels; all by default.
        progress: told (how many are made, how many are to be), also while another process makes them; not called when
            none is missing.
        patience_s: how long another process is waited for that makes no kernel before this one compiles, too.

    Raises:
        CompileError: a kernel does not compile, or is missing and FP8_BACKEND_JIT=forbid; the message counts them.
    """
    start, before = time.monotonic(), len(counters.compiles)
    specs = all_specs() if specs is None else specs
    if missing := _missing(specs):

        def tell(left: int) -> int:
            if progress is not None:
                progress(len(missing) - left, len(missing))
            return left

        with cache.exclusive(patience_s, lambda: tell(len(_missing(missing)))):
            # Whoever had the lock before may have compiled some or all.
            _compile(_missing(missing), tell)
    return WarmUp(len(specs), len(counters.compiles) - before, time.monotonic() - start)


def load_all() -> None:
    """Load every kernel on torch's current device, so that no launch has to, then or while a graph is captured.

    Raises:
        UnsupportedError: there is no CUDA device.
        DriverError: the driver refuses a kernel.
    """
    import torch

    from fp8_backend.kernels import decode, gemm_plan, gemm_quantize

    device = torch.cuda.current_device()
    for config in heuristics.all_configs():
        if isinstance(config, GemmConfig | StationaryGemmConfig):
            gemm_plan.kernel(config, device)
        elif isinstance(config, QuantizingGemmConfig):
            gemm_quantize.kernel(config, device)
        else:
            decode.kernel(config, device)
    for rows, zeros in quantize.SPECS:
        quantize.kernel(rows, zeros, device)
    for chunks in norm.SPECS:
        norm.kernel(chunks, device)
    silu.kernel(device)
    norm_rope.kernel(device)
    router.kernel(device)
    activation.kernel(device)
    for dtype in attention.SPECS:
        attention.kernel(dtype, device)
    for module in _EXPERTS:
        module.load_all()


def _missing(specs: Sequence[KernelSpec]) -> list[KernelSpec]:
    return [spec for spec in specs if cache.find(spec) is None]


def _compile(specs: Sequence[KernelSpec], tell: Callable[[int], object]) -> None:
    """Compile on all cores that this process may use, NVRTC lets go of Python's lock; `tell` how many are left."""
    tell(len(specs))
    if not specs:
        return
    errors: list[CompileError] = []
    pool = ThreadPoolExecutor(len(os.sched_getaffinity(0)), thread_name_prefix="fp8_backend-compile")
    try:
        for left, error in zip(reversed(range(len(specs))), pool.map(_error_of, specs), strict=True):
            if error is not None:
                errors.append(error)
            tell(left)
    finally:
        pool.shutdown(cancel_futures=True)  # an interrupt waits for the kernels at work, not for those behind them
    if errors:
        several = f"{len(errors)} kernels cannot be made ready; the first: " if len(errors) > 1 else ""
        raise CompileError(f"{several}{errors[0]}") from errors[0]


def _error_of(spec: KernelSpec) -> CompileError | None:
    try:
        cache.get(spec)
    except CompileError as error:
        return error
    return None
