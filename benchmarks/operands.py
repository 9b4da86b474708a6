"""Random operands, float64 truth and DeepGEMM on the same codes, for the correctness runs."""

from __future__ import annotations

import time
from collections import Counter
from types import ModuleType
from typing import Any

import torch

from fp8_backend.kernels import gemm, layout, reference
from fp8_backend.kernels.reference import BLOCK, align, ceil_div
from fp8_backend.measure.accuracy import verified

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def row(case: str, m: int, n: int, k: int, rel_err: float, deepgemm_rel_err: float | None = None) -> dict[str, Any]:
    """Return one line of the result; `rel_err` None stands for an output that is not finite."""
    found: dict[str, Any] = {"m": m, "n": n, "k": k, "case": case, "rel_err": rel_err if rel_err < 1e300 else None}
    if deepgemm_rel_err is not None:
        found["deepgemm_rel_err"] = deepgemm_rel_err
    return {**found, "verified": verified(rel_err, deepgemm_rel_err)}


class RandomWeight:
    """A weight [n, k] whose block scales differ by up to a factor of 11, as stored and as packed."""

    def __init__(self, n: int, k: int) -> None:
        self.n, self.k = n, k
        self.codes = (torch.randn(n, k, device=DEVICE) * 60).clamp(-448, 448).to(torch.float8_e4m3fn)
        self.scale = torch.rand(ceil_div(n, BLOCK), ceil_div(k, BLOCK), device=DEVICE) * 1e-3 + 1e-4
        self.packed = layout.pack_weight(self.codes)
        self.packed_scale = layout.pack_scale(self.scale, n, k)
        # [n, align(k, 128)], as fp8_gemm_nt wants plain codes on a GPU.
        missing = align(k, BLOCK) - k
        padded = torch.nn.functional.pad(self.codes.view(torch.uint8), (0, missing)) if missing else self.codes
        self.padded_codes = padded.view(torch.float8_e4m3fn)
        if DEVICE == "cuda":
            torch.cuda.synchronize()  # kernels fetch weights before earlier work of the stream ends

    def linear(self, x: torch.Tensor) -> torch.Tensor:
        """Return fp8_linear(x), with memory freed just before that held NaN, for its output to lie in."""
        torch.full((x.shape[0], self.n), float("nan"), dtype=x.dtype, device=DEVICE)
        return gemm.fp8_linear(x, self.packed, self.packed_scale, self.n)

    def multiply(self, codes: torch.Tensor, scale: torch.Tensor, packed: bool) -> torch.Tensor:
        """Return fp8_gemm_nt of activations quantised to [m, align(k, 128)], written over NaN."""
        out = torch.full((codes.shape[0], self.n), float("nan"), dtype=torch.bfloat16, device=DEVICE)
        b = (self.packed, self.packed_scale) if packed else (self.padded_codes, self.scale)
        gemm.fp8_gemm_nt((codes, scale), b, out)
        return out

    def truth(self, x: torch.Tensor) -> torch.Tensor:
        """Return the product of the codes that the reference quantises x to, [m, n] float64."""
        codes, scale = reference.per_token_group_quant(x)
        return reference.fp8_gemm_nt(codes[:, : self.k], scale, self.codes, self.scale, None, torch.float64)


class DeepGemm:
    """vLLM's copy of DeepGEMM, given `budget_s` seconds for what is not demanded; it compiles with nvcc as it goes."""

    def __init__(self, budget_s: float) -> None:
        self.budget_s, self.spent_s, self.calls = budget_s, 0.0, 0
        self.absent: Counter[str] = Counter()
        self.module: ModuleType | None = None
        try:
            import vllm.third_party.deep_gemm as module

            self.module = module
        except Exception as error:  # whatever stops it from loading is a reason to be written down
            self.import_error = f"cannot be imported: {error!r}"[:300]

    def _why_not(self, n: int, k: int, demanded: bool) -> str | None:
        if self.module is None:
            return self.import_error
        if k % BLOCK:
            return "k is not a multiple of 128, which it asserts"
        if n % 8:
            return "n is not a multiple of 8, so its output rows are not multiples of 16 bytes, which TMA needs"
        if self.spent_s > self.budget_s * (2 if demanded else 1):
            return "not compiled for this (m, n, k): its time was used up"
        return None

    def multiply(
        self, weight: RandomWeight, codes: torch.Tensor, scale: torch.Tensor, demanded: bool
    ) -> torch.Tensor | None:
        """Return its product of the same codes and scales, or None with the reason counted in `absent`."""
        if (reason := self._why_not(weight.n, weight.k, demanded)) is not None:
            self.absent[reason] += 1
            return None
        assert self.module is not None
        start = time.monotonic()
        out = torch.full((codes.shape[0], weight.n), float("nan"), dtype=torch.bfloat16, device=DEVICE)
        scale = self.module.get_mn_major_tma_aligned_tensor(scale.contiguous())
        try:
            # No dimension is compiled in: the same arithmetic, but one compilation for a tile size and not for a shape.
            self.module.fp8_gemm_nt((codes, scale), (weight.codes, weight.scale), out, compiled_dims="")
            if DEVICE == "cuda":
                torch.cuda.synchronize()
        except Exception as error:  # a failed peer is named in the result and does not end the run
            self.absent[repr(error)[:200]] += 1
            return None
        finally:
            self.spent_s += time.monotonic() - start
        self.calls += 1
        return out

    def report(self) -> dict[str, Any]:
        """Return how often it ran and why it did not."""
        version = getattr(self.module, "__version__", None)
        return {"version": version, "runs": self.calls, "seconds": round(self.spent_s, 1), "absent": dict(self.absent)}
