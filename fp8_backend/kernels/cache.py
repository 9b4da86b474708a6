"""Keep compiled kernels: in this process, then on disk by content. (first version: in this process only)."""

from __future__ import annotations

from fp8_backend.kernels.compiler import CompiledKernel, KernelSpec, compile_kernel

_memory: dict[KernelSpec, CompiledKernel] = {}


def get(spec: KernelSpec) -> CompiledKernel:
    """Return a compiled kernel."""
    if spec not in _memory:
        _memory[spec] = compile_kernel(spec)
    return _memory[spec]
