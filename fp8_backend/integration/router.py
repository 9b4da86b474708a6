"""How the linear that routes tokens to experts is applied: unquantised, by a kernel of ours for few tokens."""

from __future__ import annotations

import torch
from vllm.model_executor.layers.linear import UnquantizedLinearMethod

from fp8_backend.integration import ops
from fp8_backend.kernels import router
from fp8_backend.kernels.backend import batch_invariant


class RouterLinearMethod(UnquantizedLinearMethod):
    """vLLM's own method but for rows of 16 bits on a GPU, without a bias."""

    def apply(self, layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """Return x @ weight^T + bias."""
        weight = layer.weight  # on a CPU vLLM keeps an empty one
        rows = x.is_cuda and x.dim() == 2 and x.dtype in router.DTYPES
        # For the same bits in any batch vLLM has a linear of its own.
        if not rows or bias is not None or weight.dtype != x.dtype or batch_invariant():
            return super().apply(layer, x, bias)
        product: torch.Tensor = ops.router_linear(x, weight)
        return product
