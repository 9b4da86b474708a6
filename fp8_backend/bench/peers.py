"""Every other way to compute the same linear, called as vLLM calls it: bf16 in and out, quantisation included."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import cast

import torch

from fp8_backend.bench.shapes import DECODE_M
from fp8_backend.errors import ArgumentError
from fp8_backend.kernels.reference import BLOCK, align

NAMES = ("deepgemm", "flashinfer", "cutlass", "triton", "cublaslt", "bf16")
FP8_NAMES = NAMES[:-1]
Product = Callable[..., torch.Tensor]


@dataclass(frozen=True)
class Weights:
    """Cold copies of one weight, as its checkpoint holds it and dequantised.

    codes: each [n, k] float8_e4m3fn. scales: each [ceil(n / 128), ceil(k / 128)] float32. bf16: each [n, k] bfloat16.
    padded_scales: the scales with rows 16-byte aligned, as cuBLASLt wants them.
    """

    codes: Sequence[torch.Tensor]
    scales: Sequence[torch.Tensor]
    bf16: Sequence[torch.Tensor]
    padded_scales: Sequence[torch.Tensor]


def padded_scale(scale: torch.Tensor) -> torch.Tensor:
    """Return a copy of scale [rows, columns] float32 whose row stride is a multiple of 4."""
    rows, columns = scale.shape
    storage = torch.ones(rows, align(columns, 4), device=scale.device)
    storage[:, :columns] = scale
    return storage[:, :columns]


# (activations [m, k] bfloat16, weights, copy) -> output [m, n] bfloat16
Linear = Callable[[torch.Tensor, Weights, int], torch.Tensor]


def reason_of(error: BaseException) -> str:
    """Return an error in one line."""
    return f"{type(error).__name__}: {error}".splitlines()[0][:200]


def deepgemm_module() -> ModuleType:
    """Return DeepGEMM, installed by itself or vLLM's copy, with dependent launches on, as vLLM sets it."""
    try:
        module = importlib.import_module("deep_gemm")
    except ImportError:
        module = importlib.import_module("vllm.third_party.deep_gemm")
    if hasattr(module, "set_pdl"):
        module.set_pdl(True)
    return module


def deepgemm_gemm(
    module: ModuleType, a: tuple[torch.Tensor, torch.Tensor], b: tuple[torch.Tensor, torch.Tensor]
) -> torch.Tensor:
    """Return DeepGEMM's product of codes and scales, [m, n] bfloat16; scale_a with stride (1, align(m, 4))."""
    out = torch.empty((a[0].shape[0], b[0].shape[0]), dtype=torch.bfloat16, device=a[0].device)
    module.fp8_gemm_nt(a, b, out, disable_ue8m0_cast=True)
    return out


def _quantiser() -> Callable[..., tuple[torch.Tensor, torch.Tensor]]:
    importlib.import_module("vllm._custom_ops")  # loads the ops of vllm._C
    module = importlib.import_module("vllm.model_executor.layers.quantization.utils.fp8_utils")
    quantise: Callable[..., tuple[torch.Tensor, torch.Tensor]] = module.per_token_group_quant_fp8
    return quantise


def _deepgemm() -> Linear:
    module, quantise = deepgemm_module(), _quantiser()

    def linear(x: torch.Tensor, weights: Weights, copy: int) -> torch.Tensor:
        a = quantise(x, BLOCK, column_major_scales=True, tma_aligned_scales=True, use_ue8m0=False)
        return deepgemm_gemm(module, a, (weights.codes[copy], weights.scales[copy]))

    return linear


def _flashinfer() -> Linear:
    gemm: Product = importlib.import_module("flashinfer.gemm").fp8_blockscale_gemm_sm90

    def linear(x: torch.Tensor, weights: Weights, copy: int) -> torch.Tensor:
        return gemm(input=x, weight=weights.codes[copy], weight_scale=weights.scales[copy], out_dtype=torch.bfloat16)

    return linear


def _cutlass() -> Linear:
    ops, quantise = importlib.import_module("vllm._custom_ops"), _quantiser()
    if not ops.cutlass_scaled_mm_supports_block_fp8(90):
        raise RuntimeError("this vLLM's CUTLASS has no block-scaled FP8 for sm_90")
    multiply: Product = ops.cutlass_scaled_mm

    def linear(x: torch.Tensor, weights: Weights, copy: int) -> torch.Tensor:
        codes, scale = quantise(x, BLOCK, column_major_scales=True, use_ue8m0=False)
        b, scale_b = weights.codes[copy].T, weights.scales[copy].T
        return multiply(codes, b, out_dtype=torch.bfloat16, scale_a=scale, scale_b=scale_b)

    return linear


def _triton() -> Linear:
    module = importlib.import_module("vllm.model_executor.layers.quantization.utils.fp8_utils")
    quantise, multiply = _quantiser(), cast(Product, module.w8a8_triton_block_scaled_mm)

    def linear(x: torch.Tensor, weights: Weights, copy: int) -> torch.Tensor:
        codes, scale = quantise(x, BLOCK, column_major_scales=False, use_ue8m0=False)
        b, scale_b = weights.codes[copy], weights.scales[copy]
        return multiply(codes, b, scale, scale_b, [BLOCK, BLOCK], torch.bfloat16)

    return linear


def _cublaslt() -> Linear:
    quantise = _quantiser()

    def linear(x: torch.Tensor, weights: Weights, copy: int) -> torch.Tensor:
        codes, scale = quantise(x, BLOCK, column_major_scales=True, use_ue8m0=False)
        b, scale_b = weights.codes[copy].t(), weights.padded_scales[copy].t()
        return torch._scaled_mm(codes, b, scale, scale_b, out_dtype=torch.bfloat16)

    return linear


def _bf16() -> Linear:
    return lambda x, weights, copy: x @ weights.bf16[copy % len(weights.bf16)].t()


_BUILDERS: dict[str, Callable[[], Linear]] = {
    "deepgemm": _deepgemm,
    "flashinfer": _flashinfer,
    "cutlass": _cutlass,
    "triton": _triton,
    "cublaslt": _cublaslt,
    "bf16": _bf16,
}


def parse_peers(text: str, names: Sequence[str] = NAMES) -> tuple[str, ...]:
    """Return which of `names` are asked for: auto (all), none, or some, comma-separated.

    Raises:
        ArgumentError: an unknown name.
    """
    if text in ("auto", "none"):
        return tuple(names) if text == "auto" else ()
    for name in text.split(","):
        if name not in names:
            raise ArgumentError(f"--peers {name}: unknown; give auto, none or some of {', '.join(names)}")
    return tuple(name for name in names if name in text.split(","))


def load(names: Sequence[str]) -> tuple[dict[str, Linear], dict[str, str]]:
    """Return the peers that are installed, and why the others are not there."""
    present, absent = {}, {}
    for name in names:
        try:
            present[name] = _BUILDERS[name]()
        except Exception as error:  # whatever stops a peer from loading is a reason to be written down
            absent[name] = reason_of(error)
    return present, absent


def why_not(name: str, m: int, n: int, k: int) -> str | None:
    """Return why vLLM would not call this peer for such a linear, or None."""
    if name == "flashinfer" and m > DECODE_M:
        return f"m > {DECODE_M}: vLLM calls it for small m alone"
    if name in FP8_NAMES and k % BLOCK:
        return "k is not a multiple of 128"
    if name in ("deepgemm", "flashinfer") and n % 64:
        return "n is not a multiple of 64"
    return None


def call(linear: Linear, x: torch.Tensor, weights: Weights, copy: int) -> Callable[[], torch.Tensor]:
    """Return the call of one peer on one copy of the weight."""
    return lambda: linear(x, weights, copy)


def try_call(linear: Linear, x: torch.Tensor, weights: Weights) -> tuple[torch.Tensor | None, str | None]:
    """Return the peer's output on the first copy, or None and why it failed."""
    try:
        out = linear(x, weights, 0)
        torch.cuda.synchronize()
    except Exception as error:  # a peer's failure is a line in the result
        return None, reason_of(error)
    return out, None
