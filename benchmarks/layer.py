"""Time a dense layer, linears joined to what comes before them and apart, in one CUDA graph.

python -m benchmarks.layer [--m 8,64] [--layers 4] [--tokens 130] [--json layer.json]

The shapes are Qwen3-8B's. Attention is there where `--tokens` says how many each request has: between joined kernels
by the kernel of this package, with codes for the linear behind and without, and by FlashAttention. Apart, RMSNorm and
SiLU-and-multiply are vLLM's own CUDA kernels, which need vLLM; a compiled model has Triton kernels of torch in their
place.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks import attention as attention_alone
from fp8_backend.kernels import attention, fused_linear, gemm, layout, norm_rope, reference
from fp8_backend.kernels.attended_linear import attended_linear, leave_codes
from fp8_backend.measure.environment import environment, write_json
from fp8_backend.measure.timing import capture, interleaved_us

HIDDEN, QKV, INTERMEDIATE, EPSILON = 4096, 6144, 12288, 1e-6
QUERY_HEADS, KEY_HEADS = 32, 8
SHAPES = {
    "qkv": (QKV, HIDDEN),
    "out": (HIDDEN, HIDDEN),
    "gate_up": (2 * INTERMEDIATE, HIDDEN),
    "down": (HIDDEN, INTERMEDIATE),
}

Packed = tuple[torch.Tensor, torch.Tensor, int]
Rows = tuple[torch.Tensor, torch.Tensor]
Attend = Callable[[attention_alone.Layer], torch.Tensor]


class Cache(NamedTuple):
    """Of one layer: its tokens, where the newest ones go, their positions, and the angles of all positions."""

    layer: attention_alone.Layer
    kept: norm_rope.KeyValueCache
    positions: torch.Tensor
    angles: torch.Tensor


def make_caches(count: int, m: int, tokens: int) -> list[Cache]:
    """Return a cache for each layer, of m requests of so many tokens."""
    caches = []
    for layer in attention_alone.make_layers(QUERY_HEADS, KEY_HEADS, [tokens] * m, count):
        block = attention_alone.BLOCK
        slots = layer.table[:, (tokens - 1) // block].long() * block + (tokens - 1) % block
        kept = norm_rope.KeyValueCache(layer.keys, layer.values, slots)
        angles = torch.randn(tokens, attention.HEAD, device="cuda").bfloat16()
        caches.append(Cache(layer, kept, torch.full((m,), tokens - 1, device="cuda"), angles))
    return caches


def with_codes(layer: attention_alone.Layer) -> torch.Tensor:
    """Attend and leave codes for the linear behind."""
    out = torch.empty_like(layer.queries)
    attention.launch(*layer, attention.HEAD**-0.5, out, codes=leave_codes(out))
    return out


class Layer:
    """Four random weights whose outputs have about the variance of their inputs, and two norms."""

    def __init__(self) -> None:
        self.norms = [torch.rand(HIDDEN, device="cuda").bfloat16() + 0.5 for _ in range(2)]
        self.weights: dict[str, Packed] = {}
        for name, (n, k) in SHAPES.items():
            codes = (torch.randn(n, k, device="cuda") * 60).clamp(-448, 448).to(torch.float8_e4m3fn)
            scale = torch.rand(-(-n // 128), -(-k // 128), device="cuda") / (30 * k**0.5)
            self.weights[name] = layout.pack_weight(codes), layout.pack_scale(scale, n, k), n

    def joined(self, x: torch.Tensor, residual: torch.Tensor) -> Rows:
        """Return what the layer makes of hidden states and residual, by linears that begin a step earlier."""
        y, summed, _ = fused_linear.rms_norm_linear(x, residual, self.norms[0], EPSILON, *self.weights["qkv"])
        assert summed is not None
        y = gemm.fp8_linear(y[:, :HIDDEN], *self.weights["out"])
        y, summed, _ = fused_linear.rms_norm_linear(y, summed, self.norms[1], EPSILON, *self.weights["gate_up"])
        assert summed is not None
        return fused_linear.silu_mul_linear(y, *self.weights["down"]), summed

    def whole(self, attend: Attend, cache: Cache, x: torch.Tensor, residual: torch.Tensor) -> Rows:
        """Return what the layer makes of a decode step, its attention by `attend`."""
        y, summed, _ = fused_linear.rms_norm_linear(x, residual, self.norms[0], EPSILON, *self.weights["qkv"])
        weight = self.norms[0][: attention.HEAD]
        heads = weight, weight, cache.angles, EPSILON, QUERY_HEADS, KEY_HEADS, cache.kept
        queries, _ = norm_rope.qk_norm_rope(y, cache.positions, *heads)
        attended = attend(cache.layer._replace(queries=queries))
        y = attended_linear(attended.view(-1, HIDDEN), *self.weights["out"])
        y, summed, _ = fused_linear.rms_norm_linear(y, summed, self.norms[1], EPSILON, *self.weights["gate_up"])
        assert summed is not None
        return fused_linear.silu_mul_linear(y, *self.weights["down"]), summed

    def apart(self, x: torch.Tensor, residual: torch.Tensor) -> Rows:
        """Return the same by vLLM's kernels, which overwrite what they are given, and linears alone."""
        torch.ops._C.fused_add_rms_norm(x, residual, self.norms[0], EPSILON)
        y = gemm.fp8_linear(gemm.fp8_linear(x, *self.weights["qkv"])[:, :HIDDEN], *self.weights["out"])
        torch.ops._C.fused_add_rms_norm(y, residual, self.norms[1], EPSILON)
        gate_up = gemm.fp8_linear(y, *self.weights["gate_up"])
        product = gate_up.new_empty(gate_up.shape[0], INTERMEDIATE)
        torch.ops._C.silu_and_mul(product, gate_up)
        return gemm.fp8_linear(product, *self.weights["down"]), residual

    def linears(self, x: torch.Tensor, residual: torch.Tensor) -> Rows:
        """Return anything after the four linears alone: what no joining can go below but by its codes."""
        y = gemm.fp8_linear(gemm.fp8_linear(x, *self.weights["qkv"])[:, :HIDDEN], *self.weights["out"])
        gate_up = gemm.fp8_linear(y, *self.weights["gate_up"])
        return gemm.fp8_linear(gate_up[:, :INTERMEDIATE], *self.weights["down"]), residual


def chain(layers: Sequence[Callable[[torch.Tensor, torch.Tensor], Rows]], x: torch.Tensor) -> Rows:
    """Return the rows behind all layers."""
    x, residual = x.clone(), torch.zeros_like(x)  # some layers overwrite theirs
    for layer in layers:
        x, residual = layer(x, residual)
    return x, residual


def main() -> None:
    """Print a line for each number of tokens: microseconds a layer of each arm, and how far their answers are apart."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.layer", description=__doc__)
    parser.add_argument("--m", default="1,2,4,8,16,32,64,128,512", help="numbers of tokens")
    parser.add_argument("--layers", type=int, default=4, help="each with weights of its own, together beyond L2")
    parser.add_argument("--tokens", type=int, default=0, help="of each request, for attention; 0: none")
    parser.add_argument("--json", type=Path, help="where to write the rows")
    parser.add_argument("--commit", help="of a tree without a repository")
    arguments = parser.parse_args()
    result: dict[str, Any] = {"env": environment(arguments.commit), "rows": []}
    import vllm._custom_ops  # noqa: F401  registers torch.ops._C

    layers = [Layer() for _ in range(arguments.layers)]
    for m in map(int, arguments.m.split(",")):
        x = torch.randn(m, HIDDEN, device="cuda", dtype=torch.bfloat16)
        kinds = {
            "joined": [layer.joined for layer in layers],
            "apart": [layer.apart for layer in layers],
            "linears": [layer.linears for layer in layers],
        }
        if arguments.tokens:
            caches = make_caches(len(layers), m, arguments.tokens)
            attends: dict[str, Attend] = {
                "attention with codes": with_codes,
                "attention of ours": attention_alone.ours,
                "FlashAttention": attention_alone.flash_attention([arguments.tokens] * m, QUERY_HEADS, KEY_HEADS),
            }
            kinds |= {
                name: [partial(layer.whole, attend, cache) for layer, cache in zip(layers, caches, strict=True)]
                for name, attend in attends.items()
            }
        arms = {name: capture([partial(chain, calls, x)] * 4) for name, calls in kinds.items()}
        taken = {name: us / len(layers) for name, us in interleaved_us(arms, 15).items()}
        said = ", ".join(f"{name} {us:.2f}" for name, us in taken.items())
        errors = [
            f"{one} and {other} {reference.relative_error(arms[one].outputs[0][1], arms[other].outputs[0][1]):.4f}"
            for one, other in (("joined", "apart"), ("attention with codes", "FlashAttention"))
            if one in arms
        ]
        result["rows"] += [{"m": m, "arm": name, "us": round(us, 3)} for name, us in taken.items()]
        if arguments.json:
            write_json(arguments.json, result)
        print(f"m={m}, us a layer: {said}; residuals differ by: {', '.join(errors)}", flush=True)


if __name__ == "__main__":
    main()
