"""Attention of decode steps beside FlashAttention as vLLM calls it in its graphs, and beside what reading takes.

    python -m benchmarks.attention [--heads 32x8,32x4] [--batches 1,8,32] [--tokens 130,8000] [--json attention.json]

One call after the other in a graph, as layers follow each other, each with a cache of its own, cold from memory. Every
row is held against the same attention in float64.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from fp8_backend.bench.shapes import parse_ms
from fp8_backend.bench.stream import read_bytes_per_us
from fp8_backend.kernels import attention
from fp8_backend.kernels.reference import ceil_div, relative_error
from fp8_backend.measure.environment import environment, write_json
from fp8_backend.measure.timing import capture, copies_for, interleaved_us

BLOCK, MOST_TOKENS, MOST_SPLITS = 16, 32768, 32  # vLLM's block and splits; what it captures graphs for
LIMIT = 0.004  # bfloat16 weights and outputs
ROUNDS = 7


class Layer(NamedTuple):
    """One layer's tokens and queries."""

    queries: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor
    table: torch.Tensor
    lengths: torch.Tensor


def make_layers(
    query_heads: int, key_heads: int, lengths: Sequence[int], count: int | None = None, layout: str = "NHD"
) -> list[Layer]:
    """Return layers, by default enough for each to come from memory; tokens of a request lie in blocks anywhere.

    layout: vLLM's name for what lies side by side: NHD, its default, a token's heads; HND a head's tokens of a block.
    """
    head, m, width = attention.HEAD, len(lengths), ceil_div(max(lengths), BLOCK)
    size = sum(lengths) * key_heads * head * 2 * 2
    layers = []
    for _ in range(count or copies_for(size, most=32)):
        order = (BLOCK, key_heads) if layout == "NHD" else (key_heads, BLOCK)
        cache = torch.randn(m * width, *order, 2 * head, device="cuda", dtype=torch.bfloat16)
        keys, values = (cache if layout == "NHD" else cache.transpose(1, 2)).split(head, dim=-1)
        table = torch.randperm(m * width, device="cuda").view(m, width).int()
        queries = torch.randn(m, query_heads, head, device="cuda", dtype=torch.bfloat16)
        layers.append(Layer(queries, keys, values, table, torch.tensor(lengths, dtype=torch.int32, device="cuda")))
    return layers


def ours(layer: Layer) -> torch.Tensor:
    """Return what the kernel gives."""
    out = torch.empty_like(layer.queries)
    attention.launch(*layer, attention.HEAD**-0.5, out)
    return out


def flash_attention(lengths: Sequence[int], query_heads: int, key_heads: int) -> Callable[[Layer], torch.Tensor]:
    """Return FlashAttention 3 as vLLM calls it for decode steps in a graph, its schedule made ahead.

    Raises:
        ImportError: vLLM or its FlashAttention is not there.
    """
    from vllm.v1.attention.backends.fa_utils import flash_attn_varlen_func, get_scheduler_metadata

    m, head = len(lengths), attention.HEAD
    starts = torch.arange(m + 1, dtype=torch.int32, device="cuda")
    schedule = get_scheduler_metadata(
        batch_size=m,
        max_seqlen_q=1,
        max_seqlen_k=MOST_TOKENS,
        num_heads_q=query_heads,
        num_heads_kv=key_heads,
        headdim=head,
        cache_seqlens=torch.tensor(lengths, dtype=torch.int32, device="cuda"),
        qkv_dtype=torch.bfloat16,
        cu_seqlens_q=starts,
        page_size=BLOCK,
        causal=True,
        window_size=(-1, -1),
        num_splits=MOST_SPLITS,
    )

    def call(layer: Layer) -> torch.Tensor:
        out = torch.empty_like(layer.queries)
        flash_attn_varlen_func(
            q=layer.queries,
            k=layer.keys,
            v=layer.values,
            out=out,
            cu_seqlens_q=starts,
            max_seqlen_q=1,
            seqused_k=layer.lengths,
            max_seqlen_k=MOST_TOKENS,
            softmax_scale=head**-0.5,
            causal=True,
            window_size=[-1, -1],
            block_table=layer.table,
            softcap=0,
            scheduler_metadata=schedule,
            fa_version=3,
            num_splits=MOST_SPLITS,
        )
        return out

    return call


def measure(heads: tuple[int, int], lengths: Sequence[int], layout: str) -> dict[str, Any]:
    """Return a row: microseconds of each arm, its error, and what reading the tokens takes."""
    layers = make_layers(*heads, lengths, layout=layout)
    arms: dict[str, list[Callable[[], torch.Tensor]]] = {"ours": [partial(ours, layer) for layer in layers]}
    try:
        call = flash_attention(lengths, *heads)
        arms["flash_attention"] = [partial(call, layer) for layer in layers]
    except ImportError as error:
        print(f"FlashAttention is absent: {error}")
    captured = {name: capture(calls) for name, calls in arms.items()}
    us = interleaved_us(captured, ROUNDS)
    expected = attention.reference(*layers[-1], attention.HEAD**-0.5, torch.float64)
    errors = {name: relative_error(arm.outputs[-1], expected) for name, arm in captured.items()}
    size = sum(lengths) * heads[1] * attention.HEAD * 2 * 2
    return {
        "layout": layout,
        "query_heads": heads[0],
        "key_heads": heads[1],
        "batch": len(lengths),
        "tokens": sorted(set(lengths)),
        "us": {name: round(taken, 3) for name, taken in us.items()},
        "rel_err": {name: round(error, 6) for name, error in errors.items()},
        "floor_us": round(size / read_bytes_per_us(torch.cuda.current_device()), 3),
        "verified": all(error <= LIMIT for error in errors.values()),
    }


def parse_heads(text: str) -> list[tuple[int, int]]:
    """Return pairs of query and key heads of "32x8,32x4"."""
    return [(int(queries), int(keys)) for queries, keys in (pair.split("x") for pair in text.split(","))]


def main() -> None:
    """Measure and print; write the rows where asked."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.attention", description="Attention of decode steps.")
    parser.add_argument("--heads", type=parse_heads, default=parse_heads("32x8,32x4,64x8"), help="of queries x keys")
    parser.add_argument("--batches", type=parse_ms, default=[1, 8, 32, 64], help="requests")
    parser.add_argument("--tokens", type=parse_ms, default=[130, 1000, 4000, 16000], help="of each request")
    parser.add_argument("--layout", choices=("NHD", "HND"), default="NHD", help="of the cache")
    parser.add_argument("--json", type=Path, help="where to write the rows")
    parser.add_argument("--commit", help="of a tree without a repository")
    arguments = parser.parse_args()
    result: dict[str, Any] = {"env": environment(arguments.commit), "rows": []}
    for heads in arguments.heads:
        for batch in arguments.batches:
            even = [[tokens] * batch for tokens in arguments.tokens]
            # One request of many tokens among short ones.
            for lengths in (
                even if batch == 1 else [*even, [max(arguments.tokens), *[min(arguments.tokens)] * (batch - 1)]]
            ):
                result["rows"].append(measure(heads, lengths, arguments.layout))
                print(result["rows"][-1], flush=True)
                if arguments.json:
                    write_json(arguments.json, result)


if __name__ == "__main__":
    main()
