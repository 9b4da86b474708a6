"""Random experts in cold copies, as stored and as packed, and the float64 truth of what they compute."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from fp8_backend.bench.moe_shapes import MoeShape
from fp8_backend.bench.operands import sampled_rows
from fp8_backend.kernels import reference
from fp8_backend.kernels.expert_weights import pack_expert_scales, pack_experts
from fp8_backend.kernels.experts import fp8_experts
from fp8_backend.kernels.reference import BLOCK, ceil_div
from fp8_backend.measure.timing import COLD_FACTOR

SAMPLED_TOKENS = 16
# Of free memory, for the copies: peers want theirs as stored, we ours packed.
MEMORY_SHARE = 0.6
Routed = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class Experts:
    """A copy of a layer: w13 [experts, 2 * intermediate, hidden] and w2 [experts, hidden, intermediate], or packed."""

    w13: torch.Tensor
    scale_13: torch.Tensor
    w2: torch.Tensor
    scale_2: torch.Tensor

    def clone(self) -> Experts:
        """Return another copy."""
        return Experts(*(getattr(self, name).clone() for name in ("w13", "scale_13", "w2", "scale_2")))


def copies_for(shape: MoeShape, l2_bytes: int, free_bytes: int, plain: bool) -> int:
    """Return how many copies to rotate among: those that one token's experts fill 8 L2 caches of, if memory holds them.

    With fewer, weights stay cold as far as routings differ from call to call.
    """
    cold = ceil_div(COLD_FACTOR * l2_bytes, shape.top_k * shape.expert_bytes)
    fitting = int(free_bytes * MEMORY_SHARE) // (shape.experts * shape.expert_bytes * (2 if plain else 1))
    return max(1, min(max(2, cold), fitting))


class RandomExperts:
    """A layer whose block scales differ by up to a factor of 11."""

    def __init__(self, shape: MoeShape, device: torch.device, copies: int, plain: bool = True, seed: int = 0) -> None:
        """Draw the layer.

        Args:
            shape: of the layer.
            device: where.
            copies: how many.
            plain: whether to hold as many copies as stored; one is held anyway.
            seed: of the weights.
        """
        self.shape = shape
        generator = torch.Generator(device).manual_seed(seed)
        w13, scale_13 = _draw(shape.experts, 2 * shape.intermediate, shape.hidden, generator)
        w2, scale_2 = _draw(shape.experts, shape.hidden, shape.intermediate, generator)
        stored = Experts(w13, scale_13, w2, scale_2)
        packed = Experts(
            pack_experts(w13.clone()),
            pack_expert_scales(scale_13, *w13.shape[1:]),
            pack_experts(w2.clone()),
            pack_expert_scales(scale_2, *w2.shape[1:]),
        )
        self.plain: Sequence[Experts] = [stored, *(stored.clone() for _ in range(copies - 1 if plain else 0))]
        self.ours: Sequence[Experts] = [packed, *(packed.clone() for _ in range(copies - 1))]
        if device.type == "cuda":
            torch.cuda.synchronize()  # kernels fetch weights before earlier work of the stream ends

    def run(self, x: torch.Tensor, routed: Routed, copy: int) -> torch.Tensor:
        """Return our op's answer from one copy."""
        layer = self.ours[copy % len(self.ours)]
        return fp8_experts(x, *routed, layer.w13, layer.scale_13, layer.w2, layer.scale_2)

    def truth(self, x: torch.Tensor, routed: Routed, rows: torch.Tensor) -> torch.Tensor:
        """Return the answer for some tokens from the same codes and routing, [rows, hidden] float64."""
        layer, (topk_weights, topk_ids) = self.plain[0], routed
        return reference.fp8_experts(
            x[rows],
            topk_weights[rows],
            topk_ids[rows],
            layer.w13,
            layer.scale_13,
            layer.w2,
            layer.scale_2,
            dtype=torch.float64,
        )


def _draw(experts: int, n: int, k: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    device = generator.device
    codes = torch.empty(experts, n, k, dtype=torch.float8_e4m3fn, device=device)
    for expert in codes:  # one at a time: the largest layer would take 45 GB as float32
        expert.copy_((torch.randn(n, k, generator=generator, device=device) * 60).clamp(-448, 448))
    scale = torch.rand(experts, ceil_div(n, BLOCK), ceil_div(k, BLOCK), generator=generator, device=device) + 0.1
    return codes, scale * (1.5 / (60 * k**0.5))


def sampled_tokens(tokens: int) -> torch.Tensor:
    """Return at most SAMPLED_TOKENS tokens, evenly spread, the first and the last among them."""
    return sampled_rows(tokens, SAMPLED_TOKENS)
