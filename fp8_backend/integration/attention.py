"""Attention of decode steps by a kernel of ours, in layers of vLLM's FlashAttention, which computes all else."""

from __future__ import annotations

import functools
import logging
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from fp8_backend import counters, settings
from fp8_backend.integration import compat
from fp8_backend.kernels import attended_linear, attention
from fp8_backend.kernels.backend import batch_invariant

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.model_executor.layers.attention import Attention

logger = logging.getLogger("vllm.fp8_backend.integration.attention")


class Served(NamedTuple):
    """What of an engine decides whether the kernel computes its decode steps.

    dtype: of the model. most_requests: of a step. own_cache: all tokens of the cache come from this process's steps.
    own_graphs: graphs of steps of one token a request are replayed for such alone.
    """

    dtype: torch.dtype
    most_requests: int
    own_cache: bool
    own_graphs: bool


def served_by(vllm_config: VllmConfig) -> Served | None:
    """Return what is known of an engine, or None where layers are made without a model."""
    if vllm_config.model_config is None:
        return None
    # What a connector brings is there as late as the step that reads it.
    own_cache = vllm_config.kv_transfer_config is None
    most_requests = vllm_config.scheduler_config.max_num_seqs
    return Served(vllm_config.model_config.dtype, most_requests, own_cache, compat.decodes_in_own_graphs(vllm_config))


def adopt(layer: Attention, served: Served | None, speak: bool) -> bool:
    """Have the kernel compute a layer's decode steps where it can, and return whether it does.

    The layer's implementation becomes one of a subclass, which hands on what is no decode step; a second call changes
    nothing.

    Args:
        layer: of a model that this package's config makes.
        served: of its engine.
        speak: whether this rank logs whose kernels are used.
    """
    impl = layer.impl
    if getattr(impl, "has_decode_kernel", False):
        return True
    # For the same bits in a batch of any size FlashAttention has a way of its own.
    if not settings.load().attention or batch_invariant() or served is None:
        return False
    heads = impl.num_heads, impl.num_kv_heads, impl.head_size
    any_block = attention.BLOCK_ALIGNMENT  # that of the cache is not known yet
    if not (served.own_cache and served.own_graphs and compat.attends_plainly(impl)):
        return False
    if not attention.serves(*heads, any_block, served.dtype):
        return False
    impl.__class__ = _with_decode_kernel(type(impl), served.most_requests)
    if speak:
        _say_once()
    return True


@functools.cache
def _say_once() -> None:
    logger.info("attention of decode steps: fp8_backend sm90; of other steps: vLLM's FlashAttention")


@functools.cache
def _with_decode_kernel(base: type[Any], most_requests: int) -> type[Any]:
    """Return vLLM's implementation with the kernel, for decode steps of at most so many requests."""

    class WithDecodeKernel(base):
        has_decode_kernel = True

        def forward(
            self,
            layer: Attention,
            query: torch.Tensor,
            key: torch.Tensor,
            value: torch.Tensor,
            kv_cache: torch.Tensor,
            attn_metadata: Any,
            output: torch.Tensor,
            *rest: Any,
            **options: Any,
        ) -> torch.Tensor:
            if attn_metadata is None:  # vLLM measures the memory that a step takes, ahead of any graph
                attention.workspace(query.device, most_requests * self.num_kv_heads, self.num_queries_per_kv)
            elif (halves := _halves_of_decode_step(layer, query, kv_cache, attn_metadata)) is not None:
                _decode(self, query, halves, attn_metadata, output)
                return output
            attended_linear.forget_codes()
            out: torch.Tensor = super().forward(
                layer, query, key, value, kv_cache, attn_metadata, output, *rest, **options
            )
            return out

    return WithDecodeKernel


def _halves_of_decode_step(
    layer: Attention, query: torch.Tensor, kv_cache: torch.Tensor, metadata: Any
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Return keys and values of a layer's cache if the kernel computes this step, and None if FlashAttention does."""
    m, impl = metadata.num_actual_tokens, layer.impl
    if not compat.is_decode_step(metadata) or len(metadata.seq_lens) < m or kv_cache.dtype != query.dtype:
        return None
    halves = compat.keys_and_values(layer, kv_cache)
    if halves is None or halves[0].shape[1] % attention.BLOCK_ALIGNMENT or not attention.fits(query, *halves):
        return None
    ready = attention.has_workspace(query.device, m * impl.num_kv_heads, impl.num_queries_per_kv)
    if not ready and torch.cuda.is_current_stream_capturing():
        return None  # a graph would zero the counters at each replay, and not before the first
    return halves


def _decode(
    impl: Any, query: torch.Tensor, halves: tuple[torch.Tensor, torch.Tensor], metadata: Any, output: torch.Tensor
) -> None:
    counters.calls["attention"] += 1
    m = metadata.num_actual_tokens
    out, tokens = output[:m], (metadata.block_table, metadata.seq_lens)
    attended_linear.forget_codes()
    codes = attended_linear.leave_codes(out) if compat.attention_runs_with_its_piece() else None
    attention.launch(query[:m], *halves, *tokens, impl.scale, out, codes)
