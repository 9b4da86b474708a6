"""FP8 block-scaled kernels for vLLM on NVIDIA Hopper.

Importing this package imports neither vLLM nor CUDA and creates nothing on disk.
"""

from __future__ import annotations

import importlib
from importlib.metadata import version
from typing import Any

_PUBLIC = {
    "fp8_gemm_nt": "fp8_backend.kernels.gemm",
    "fp8_linear": "fp8_backend.kernels.gemm",
    "fp8_experts": "fp8_backend.kernels.experts",
    "m_grouped_fp8_gemm_nt_contiguous": "fp8_backend.kernels.m_grouped",
    "m_grouped_fp8_gemm_nt_masked": "fp8_backend.kernels.m_grouped",
    "per_token_group_quant": "fp8_backend.kernels.quantize",
    "pack_weight": "fp8_backend.kernels.layout",
    "pack_experts": "fp8_backend.kernels.expert_weights",
    "pack_expert_scales": "fp8_backend.kernels.expert_weights",
    "unpack_weight": "fp8_backend.kernels.layout",
}

__all__ = ["__version__", *_PUBLIC]  # noqa: PLE0604


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return version("fp8-backend")
    if name in _PUBLIC:
        return getattr(importlib.import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'fp8_backend' has no attribute {name!r}")
