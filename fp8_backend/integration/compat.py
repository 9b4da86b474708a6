"""The only file that knows vLLM versions: what differs from 0.26 to 0.33, and the failure each cure was written for."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from fp8_backend.errors import UnsupportedError

if TYPE_CHECKING:
    import torch
    from vllm.config import CompilationConfig, VllmConfig
    from vllm.model_executor.layers.attention import Attention
    from vllm.model_executor.layers.fused_moe import RoutedExperts
    from vllm.model_executor.layers.fused_moe.config import FusedMoEConfig, FusedMoEQuantConfig
    from vllm.model_executor.layers.fused_moe.modular_kernel import FusedMoEKernel
    from vllm.model_executor.layers.quantization.fp8 import Fp8Config

OLDEST, NEWEST = (0, 26), (0, 33)
TESTED = f"vLLM {OLDEST[0]}.{OLDEST[1]} to {NEWEST[0]}.{NEWEST[1]}"


def _release(version: str) -> tuple[int, int] | None:
    match = re.match(r"(\d+)\.(\d+)", version)
    return (int(match[1]), int(match[2])) if match else None


def untested_version(version: str | None = None) -> str | None:
    """Return a sentence about a vLLM that this package was never run with, or None; by default the one imported."""
    if version is None:
        import vllm

        version = vllm.__version__
    release = _release(version)
    if release is not None and OLDEST <= release <= NEWEST:
        return None
    return f"fp8_backend was not tested with vLLM {version}; tested: {TESTED}"


def is_skipped(config: Fp8Config, prefix: str) -> bool:
    """Return whether vLLM itself takes a layer for unquantised; False where it finds that of a part alone.

    0.26 fails on `match_mode=` with "unexpected keyword argument", and its config has no `ignored_layers_match_mode`;
    from 0.32 on a config may ask for another match than the exact one.
    """
    from vllm.model_executor.layers.quantization.utils.quant_utils import is_layer_skipped

    mode = getattr(config, "ignored_layers_match_mode", None)
    match = {} if mode is None else {"match_mode": mode}
    try:
        return is_layer_skipped(
            prefix=prefix, ignored_layers=config.ignored_layers, fused_mapping=config.packed_modules_mapping, **match
        )
    except ValueError:  # "some but not all shards": the caller's own look finds the same and says which
        return False


def names_are_inputs() -> bool:
    """Return whether the name of a layer is an input of the graphs that have it, so that layers share what is compiled.

    Without LayerName, of torch from 2.11 on, it is a constant, and each layer of a piece that has it compiles anew.
    """
    from vllm.utils import torch_utils

    return bool(getattr(torch_utils, "_USE_LAYERNAME", False))


def cache_of(layer_name: Any) -> tuple[Attention, torch.Tensor, torch.Tensor | None]:
    """Return an attention layer, its cache, and the slots of this step's tokens, as `unified_kv_cache_update` does."""
    from vllm.model_executor.layers.attention.attention import get_attention_context
    from vllm.utils.torch_utils import _resolve_layer_name

    _, layer, kv_cache, slots = get_attention_context(_resolve_layer_name(layer_name))
    return layer, kv_cache, slots


def attention_runs_with_its_piece() -> bool:
    """Return whether the host runs, or captures, attention together with the piece of a model behind it.

    A graph of the piece alone is replayed without the host, and does not take what attention would leave for it.
    """
    from vllm.config import CUDAGraphMode
    from vllm.forward_context import get_forward_context

    return get_forward_context().cudagraph_runtime_mode != CUDAGraphMode.PIECEWISE


def keys_and_values(layer: Attention, kv_cache: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Return both halves of FlashAttention's cache [blocks, heads, block, 2 * head] as [blocks, block, heads, head].

    None for the caches of others, and for encoders, which have none.
    """
    impl = layer.impl
    if not is_flash_attention(impl) or impl.attn_type != "decoder":
        return None
    if kv_cache.dim() != 4 or kv_cache.shape[3] != 2 * impl.head_size:
        return None
    keys, values = kv_cache.transpose(1, 2).split(impl.head_size, dim=-1)
    return keys, values


def is_flash_attention(impl: Any) -> bool:
    """Return whether a layer's attention is that of vLLM's FlashAttention, with a decode kernel of ours or without."""
    base = type(impl).__mro__[1] if getattr(impl, "has_decode_kernel", False) else type(impl)
    return base.__name__ == "FlashAttentionImpl"


def attends_plainly(impl: Any) -> bool:
    """Return whether a layer attends to all tokens before it, in a cache of its model's dtype on one rank alone."""
    if not is_flash_attention(impl) or impl.attn_type != "decoder":
        return False
    special = impl.alibi_slopes is not None or impl.sinks is not None or bool(impl.logits_soft_cap)
    return (
        not special and impl.dcp_world_size == 1 and impl.sliding_window == (-1, -1) and impl.kv_cache_dtype == "auto"
    )


def decodes_in_own_graphs(vllm_config: VllmConfig) -> bool:
    """Return whether a graph that was captured with one token a request is replayed for such steps alone.

    With cudagraph_mode=FULL 0.26 captures graphs of any step so, and replays them for prompts, too, whose tokens would
    be taken for requests.
    """
    from vllm.config import CUDAGraphMode

    mode = vllm_config.compilation_config.cudagraph_mode
    return mode is None or mode.mixed_mode() != CUDAGraphMode.FULL


def is_decode_step(metadata: Any) -> bool:
    """Return whether each request has one token in a step, and attends to all that it has; as FlashAttention says it.

    From 0.33 on there is no cascade, and the window is not the step's.
    """
    cut = getattr(metadata, "use_cascade", False) or getattr(metadata, "sliding_window", None) not in (None, (-1, -1))
    names = "mm_prefix_range_tensor", "mm_prefix_query_range_tensor", "rswa_prefix_lens"
    masked = any(getattr(metadata, name, None) is not None for name in names)
    return metadata.max_query_len == 1 and metadata.causal is True and not cut and not masked


def keep_from_amx_mla(layer: torch.nn.Module) -> None:
    """Make MLA on a CPU with AMX take a packed `kv_b_proj` through the layer's own method.

    From 0.32 on AMXMLAImpl reads an e4m3 weight that has a `weight_block_size` as a plain [n, k] matrix: "ValueError:
    too many values to unpack (expected 2)"; it would also requantise it with one scale per tensor. Without the
    attribute it multiplies an identity by the layer, as MLA does on GPUs. vLLM's mark tells the layers it reads from
    all others, which keep the attribute for later weight updates.
    """
    if getattr(layer, "_cpu_skip_gemm_dispatch", False):
        layer.weight_block_size = None


def unloaded_elements(layer: torch.nn.Module) -> int:
    """Return how many elements of a layer a weight reload leaves as they were allocated; 0 outside a reload.

    From 0.26 on a reload allocates each layer anew and packs it once all its tensors came, or, at the end, with those
    that did: a tensor that is missing then leaves whatever the memory held, and vLLM says so at debug level alone.
    """
    from vllm.model_executor.model_loader.reload import layerwise

    info = layerwise.get_layerwise_info(layer)
    return max(0, info.load_numel_total - info.load_numel) if info.can_load() else 0


def is_reloading() -> bool:
    """Return whether a weight reload has begun: layers are empty, and what they held waits to be copied to."""
    from vllm.model_executor.model_loader.reload import layerwise

    return any(info.can_load() and info.kernel_tensors is not None for info in layerwise.LAYERWISE_INFO.values())


def undo_reload() -> None:
    """Give every layer back what it held before a weight reload of which no tensor came yet.

    From 0.26 on a reload empties all layers first, and an exception after that leaves them so.
    """
    from vllm.model_executor.model_loader.reload import layerwise

    for layer, info in list(layerwise.LAYERWISE_INFO.items()):
        if info.can_load() and info.kernel_tensors is not None:
            layerwise._place_kernel_tensors(layer, info)
            info.reset()


def hide_moe_from_compiler(layer: RoutedExperts, prefix: str, config: CompilationConfig) -> None:
    """Make torch.compile on a CPU take a whole MoE layer, its router included, as one opaque op, as vLLM does on GPUs.

    From 0.26 on vLLM lets the compiler see the router on CPUs. A compiled DeepSeek-V3 then answered with NaN, or with
    finite nonsense (vLLM 0.32, torch 2.13, AMX): the C++ backend read the router's logits before the op that writes
    them, `_C.weight_packed_linear(out, ...)`, had run. When it recomputes a node's loops to fuse it with another's,
    `SchedulerNode.recompute_size_and_body` drops the node's mutation renames unless it has other fake dependencies, and
    with them the order after the writer. Whether that shows depends on the rest of the graph: a bf16 twin came out
    right.

    Raises:
        UnsupportedError: the layer is compiled and vLLM has no runner for it whose forward can be replaced.
    """
    import torch
    import vllm
    from vllm.config import CompilationMode

    for runner in config.static_forward_context.values():
        entry = getattr(runner, "_forward_entry", None)
        if entry is None or getattr(runner, "routed_experts", None) is not layer:
            continue
        if entry.__name__ in ("_moe_forward", "_moe_forward_shared"):
            entry = runner._forward_entry = getattr(torch.ops.vllm, entry.__name__.removeprefix("_"))
        if isinstance(entry, torch._ops.OpOverloadPacket):
            return
    if config.mode not in (None, CompilationMode.NONE) and layer.w13_weight.device.type == "cpu":
        raise UnsupportedError(
            f"{prefix}: this vLLM ({vllm.__version__}) gives no way to keep the router of an MoE layer from "
            "torch.compile, which miscompiles it on a CPU; use --enforce-eager"
        )


def modular_kernel(
    layer: RoutedExperts, moe: FusedMoEConfig, quant_config: FusedMoEQuantConfig
) -> FusedMoEKernel | None:
    """Return vLLM's modular kernel around our experts, or None where they are better called without it.

    Up to 0.31 it lets experts write into a workspace of its own and copies that to the output: one more kernel in every
    layer, about 2 us on a GPU, which is a tenth of a small layer; on a CPU it fails with "WorkspaceManager not
    initialized". Without data parallelism it does nothing else for us there.
    """
    import vllm
    from vllm.model_executor.layers.fused_moe import modular_kernel as mk
    from vllm.model_executor.layers.fused_moe.all2all_utils import maybe_make_prepare_finalize

    from fp8_backend.integration.experts import DeepGemmFp8BatchedExperts, DeepGemmFp8Experts

    parallel = moe.moe_parallel_config
    alone = parallel.dp_size == 1 and not parallel.use_all2all_kernels and not parallel.is_sequence_parallel
    if alone and (_release(vllm.__version__) or NEWEST) < (0, 32):
        return None
    # Keywords that 0.26 and 0.33 share.
    dispatch = maybe_make_prepare_finalize(
        moe=moe, quant_config=quant_config, routing_tables=layer._expert_routing_tables(), allow_new_interface=True
    )
    if dispatch is None:
        return None
    if dispatch.activation_format == mk.FusedMoEActivationFormat.Standard:
        experts = DeepGemmFp8Experts(moe_config=moe, quant_config=quant_config)
    else:
        experts = DeepGemmFp8BatchedExperts(
            moe_config=moe,
            quant_config=quant_config,
            max_num_tokens=dispatch.max_num_tokens_per_rank(),
            num_dispatchers=dispatch.num_dispatchers(),
        )
    return mk.FusedMoEKernel(dispatch, experts)
