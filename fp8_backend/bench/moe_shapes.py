"""Which layers of experts are measured: models, numbers of tokens, routings, and what is to be reached."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch

from fp8_backend.errors import ArgumentError

Routing = Literal["balanced", "zipf", "same"]
ROUTINGS: tuple[Routing, ...] = get_args(Routing)


@dataclass(frozen=True)
class MoeShape:
    """One layer of routed experts as one rank holds it."""

    name: str
    experts: int
    hidden: int
    intermediate: int
    top_k: int

    @property
    def expert_bytes(self) -> int:
        """Return the bytes of one expert's weights."""
        return 3 * self.hidden * self.intermediate

    def flops(self, tokens: int) -> int:
        """Return the operations of both GEMMs."""
        return 6 * tokens * self.top_k * self.hidden * self.intermediate


MODELS = {
    shape.name: shape
    for shape in (
        MoeShape("qwen3-30b", 128, 2048, 768, 8),
        MoeShape("dsv3-tp8", 256, 7168, 256, 8),
        MoeShape("qwen3-235b-tp4", 128, 4096, 384, 8),
        MoeShape("dsv3", 256, 7168, 2048, 8),
    )
}


@dataclass(frozen=True)
class MoeRegime:
    """A range of tokens and the geometric mean of best peer / ours to be reached in it."""

    name: str
    tokens: tuple[int, ...]
    geomean: float


REGIMES = (
    MoeRegime("1-4 tokens", (1, 2, 4), 1.7),
    MoeRegime("8-64 tokens", (8, 16, 32, 64), 1.12),
    MoeRegime("256-1024 tokens", (256, 1024), 1.3),
    MoeRegime("4096-8192 tokens", (4096, 8192), 1.8),
)
ALL_TOKENS = tuple(tokens for regime in REGIMES for tokens in regime.tokens)
CELL_LIMIT = 0.97  # 3 % below 1 is noise
FLOOR_REGIME, FLOOR_LIMIT = REGIMES[1], 1.2  # ours / weight floor
SKEW_LIMIT = 1.3  # time an operation of a skewed routing / that of the balanced one
BIGGEST, BIGGEST_TOKENS, BIGGEST_TFLOPS = "dsv3", 8192, 1000


def regime_of(tokens: int) -> MoeRegime:
    """Return the regime that a number of tokens belongs to, by its upper end."""
    return next((regime for regime in REGIMES if tokens <= regime.tokens[-1]), REGIMES[-1])


def parse_models(text: str | None) -> tuple[MoeShape, ...]:
    """Return the layers asked for; all by default.

    Args:
        text: names of MODELS, comma-separated; or experts,hidden,intermediate,top_k.

    Raises:
        ArgumentError: an unknown name, or four numbers that make no layer the kernels take.
    """
    if text is None:
        return tuple(MODELS.values())
    parts = text.split(",")
    if all(part.isdecimal() for part in parts):
        numbers = tuple(map(int, parts))
        if len(numbers) != 4 or min(numbers) < 1 or numbers[2] % 128 or numbers[3] > numbers[0]:
            raise ArgumentError(
                f"--model {text}: expected experts,hidden,intermediate,top_k above 0, intermediate a multiple of 128 "
                "and top_k at most experts, such as 128,2048,768,8"
            )
        return (MoeShape(text, *numbers),)
    for name in parts:
        if name not in MODELS:
            raise ArgumentError(
                f"--model {name}: unknown; with --moe give some of {', '.join(MODELS)}, or "
                "experts,hidden,intermediate,top_k"
            )
    return tuple(MODELS[name] for name in dict.fromkeys(parts))


def parse_routings(text: str) -> tuple[Routing, ...]:
    """Return the routings asked for, comma-separated, each once.

    Raises:
        ArgumentError: an unknown name.
    """
    for name in text.split(","):
        if name not in ROUTINGS:
            raise ArgumentError(f"--routing {name}: unknown; give some of {', '.join(ROUTINGS)}")
    return tuple(routing for routing in ROUTINGS if routing in text.split(","))


def route(shape: MoeShape, tokens: int, routing: Routing, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return router weights [tokens, top_k] float32, which sum to 1, and expert ids [tokens, top_k] int32.

    balanced: every expert is as likely. zipf: the one at place i is 1 / (i + 1) as likely as the first. same: all
    tokens take the same top_k experts, so that with a top_k of 1 all are on one.
    """
    generator = torch.Generator().manual_seed(seed)
    shuffled = torch.randperm(shape.experts, generator=generator)
    if routing == "same":
        ids = shuffled[: shape.top_k].expand(tokens, -1)
    else:
        # The largest of logits with Gumbel noise are a draw without replacement.
        noise = -torch.rand(tokens, shape.experts, generator=generator).clamp_min(1e-20).log()
        scores = -noise.clamp_min(1e-20).log()
        if routing == "zipf":
            scores = scores - (shuffled + 1).log()
        ids = scores.topk(shape.top_k, dim=1).indices
    weights = torch.rand(tokens, shape.top_k, generator=generator).add(0.1)
    return weights / weights.sum(dim=1, keepdim=True), ids.to(torch.int32).contiguous()
