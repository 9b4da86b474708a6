"""The model architectures and sizes that `demo.checkpoint` can generate: configuration, tensor names and shapes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

Architecture = Literal["deepseek_v3", "qwen3", "qwen3_moe"]
EMBEDDING = "model.embed_tokens.weight"
Kind = Literal["fp8", "embedding", "head", "router", "norm", "router_bias"]


@dataclass(frozen=True)
class Size:
    """Widths and counts of one model; every width that tensor parallel 2 splits is a multiple of 256."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    intermediate: int
    vocab: int
    shards: int
    head_dim: int = 128  # DeepSeek: of v, and of q and k without their rotary part
    experts: int = 0  # 0: no MoE layers
    experts_per_token: int = 0
    moe_intermediate: int = 0
    # Multi-head latent attention. 512 + 64 is the only latent width Hopper's attention kernels in vLLM accept.
    q_lora: int = 0
    kv_lora: int = 512
    rope_dim: int = 64

    def is_moe_layer(self, layer: int, architecture: Architecture) -> bool:
        """Return whether a layer has experts: all but DeepSeek's first, where the model has any."""
        return self.experts > 0 and (layer > 0 or architecture != "deepseek_v3")


SIZES: dict[tuple[Architecture, str], Size] = {
    ("deepseek_v3", "demo"): Size(
        layers=3, hidden=512, heads=4, kv_heads=4, intermediate=768, vocab=1024, shards=3,
        experts=16, experts_per_token=4, moe_intermediate=256, q_lora=256,
    ),
    ("qwen3", "demo"): Size(layers=3, hidden=512, heads=4, kv_heads=2, intermediate=768, vocab=1024, shards=2),
    ("qwen3_moe", "demo"): Size(
        layers=3, hidden=512, heads=4, kv_heads=2, intermediate=768, vocab=1024, shards=3,
        experts=8, experts_per_token=2, moe_intermediate=256,
    ),
    # At least 1 GB of FP8 weights each, with the head widths of the real models.
    ("deepseek_v3", "large"): Size(
        layers=6, hidden=2048, heads=16, kv_heads=16, intermediate=8192, vocab=16384, shards=8,
        experts=32, experts_per_token=4, moe_intermediate=1024, q_lora=1536,
    ),
    ("qwen3", "large"): Size(layers=24, hidden=2048, heads=16, kv_heads=8, intermediate=6144, vocab=16384, shards=8),
    ("qwen3_moe", "large"): Size(
        layers=4, hidden=2048, heads=16, kv_heads=8, intermediate=6144, vocab=16384, shards=8,
        experts=64, experts_per_token=8, moe_intermediate=768,
    ),
}  # fmt: skip


@dataclass(frozen=True)
class TensorSpec:
    """One tensor of a checkpoint; kind `fp8` is stored as e4m3 with a `_scale_inv` beside it."""

    name: str
    shape: tuple[int, ...]
    kind: Kind

    @property
    def stored_bytes(self) -> int:
        """Bytes in the file, block scales included."""
        elements = 1
        for extent in self.shape:
            elements *= extent
        if self.kind == "fp8":
            rows, columns = self.shape
            return elements + 4 * -(-rows // 128) * -(-columns // 128)
        return elements * (4 if self.kind == "router_bias" else 2)


def tensor_specs(architecture: Architecture, size: Size) -> Iterator[TensorSpec]:
    """Yield every tensor of the model under the name Hugging Face checkpoints give it."""
    yield TensorSpec(EMBEDDING, (size.vocab, size.hidden), "embedding")
    for layer in range(size.layers):
        prefix = f"model.layers.{layer}"
        yield TensorSpec(f"{prefix}.input_layernorm.weight", (size.hidden,), "norm")
        yield TensorSpec(f"{prefix}.post_attention_layernorm.weight", (size.hidden,), "norm")
        attention = _latent_attention if architecture == "deepseek_v3" else _grouped_query_attention
        yield from attention(f"{prefix}.self_attn", size)
        if size.is_moe_layer(layer, architecture):
            yield from _experts(f"{prefix}.mlp", architecture, size)
        else:
            yield from _mlp(f"{prefix}.mlp", size.hidden, size.intermediate)
    yield TensorSpec("model.norm.weight", (size.hidden,), "norm")
    yield TensorSpec("lm_head.weight", (size.vocab, size.hidden), "head")


def _latent_attention(prefix: str, size: Size) -> Iterator[TensorSpec]:
    qk_dim = size.head_dim + size.rope_dim
    yield TensorSpec(f"{prefix}.q_a_proj.weight", (size.q_lora, size.hidden), "fp8")
    yield TensorSpec(f"{prefix}.q_a_layernorm.weight", (size.q_lora,), "norm")
    yield TensorSpec(f"{prefix}.q_b_proj.weight", (size.heads * qk_dim, size.q_lora), "fp8")
    yield TensorSpec(f"{prefix}.kv_a_proj_with_mqa.weight", (size.kv_lora + size.rope_dim, size.hidden), "fp8")
    yield TensorSpec(f"{prefix}.kv_a_layernorm.weight", (size.kv_lora,), "norm")
    yield TensorSpec(f"{prefix}.kv_b_proj.weight", (size.heads * 2 * size.head_dim, size.kv_lora), "fp8")
    yield TensorSpec(f"{prefix}.o_proj.weight", (size.hidden, size.heads * size.head_dim), "fp8")


def _grouped_query_attention(prefix: str, size: Size) -> Iterator[TensorSpec]:
    yield TensorSpec(f"{prefix}.q_proj.weight", (size.heads * size.head_dim, size.hidden), "fp8")
    yield TensorSpec(f"{prefix}.k_proj.weight", (size.kv_heads * size.head_dim, size.hidden), "fp8")
    yield TensorSpec(f"{prefix}.v_proj.weight", (size.kv_heads * size.head_dim, size.hidden), "fp8")
    yield TensorSpec(f"{prefix}.o_proj.weight", (size.hidden, size.heads * size.head_dim), "fp8")
    yield TensorSpec(f"{prefix}.q_norm.weight", (size.head_dim,), "norm")
    yield TensorSpec(f"{prefix}.k_norm.weight", (size.head_dim,), "norm")


def _mlp(prefix: str, hidden: int, intermediate: int) -> Iterator[TensorSpec]:
    yield TensorSpec(f"{prefix}.gate_proj.weight", (intermediate, hidden), "fp8")
    yield TensorSpec(f"{prefix}.up_proj.weight", (intermediate, hidden), "fp8")
    yield TensorSpec(f"{prefix}.down_proj.weight", (hidden, intermediate), "fp8")


def _experts(prefix: str, architecture: Architecture, size: Size) -> Iterator[TensorSpec]:
    yield TensorSpec(f"{prefix}.gate.weight", (size.experts, size.hidden), "router")
    for expert in range(size.experts):
        yield from _mlp(f"{prefix}.experts.{expert}", size.hidden, size.moe_intermediate)
    if architecture == "deepseek_v3":
        yield TensorSpec(f"{prefix}.gate.e_score_correction_bias", (size.experts,), "router_bias")
        yield from _mlp(f"{prefix}.shared_experts", size.hidden, size.moe_intermediate)


def model_config(architecture: Architecture, size: Size) -> dict[str, Any]:
    """Return config.json of the model."""
    skipped = ["lm_head"]
    if architecture == "qwen3_moe":
        # vLLM hands Qwen3-MoE's router the quantisation config: unlisted, it is an FP8 layer whose scales never load.
        skipped += [f"model.layers.{layer}.mlp.gate" for layer in range(size.layers)]
    specific = {"deepseek_v3": _deepseek_config, "qwen3": _qwen_config, "qwen3_moe": _qwen_moe_config}[architecture]
    return {
        "model_type": architecture,
        "torch_dtype": "bfloat16",
        "vocab_size": size.vocab,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "hidden_size": size.hidden,
        "intermediate_size": size.intermediate,
        "num_hidden_layers": size.layers,
        "num_attention_heads": size.heads,
        "num_key_value_heads": size.kv_heads,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "rope_scaling": None,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": False,
        "attention_bias": False,
        **specific(size),
        "quantization_config": {
            "quant_method": "fp8",
            "activation_scheme": "dynamic",
            "fmt": "e4m3",
            "weight_block_size": [128, 128],
            "modules_to_not_convert": skipped,
        },
    }


def _deepseek_config(size: Size) -> dict[str, Any]:
    return {
        "architectures": ["DeepseekV3ForCausalLM"],
        "q_lora_rank": size.q_lora,
        "kv_lora_rank": size.kv_lora,
        "qk_nope_head_dim": size.head_dim,
        "qk_rope_head_dim": size.rope_dim,
        "v_head_dim": size.head_dim,
        "first_k_dense_replace": 1,
        "moe_layer_freq": 1,
        "moe_intermediate_size": size.moe_intermediate,
        "n_routed_experts": size.experts,
        "n_shared_experts": 1,
        "num_experts_per_tok": size.experts_per_token,
        "n_group": 4,
        "topk_group": 2,
        "topk_method": "noaux_tc",
        "scoring_func": "sigmoid",
        "norm_topk_prob": True,
        "routed_scaling_factor": 1.0,
        "num_nextn_predict_layers": 0,
    }


def _qwen_config(size: Size) -> dict[str, Any]:
    return {
        "architectures": ["Qwen3ForCausalLM"],
        "head_dim": size.head_dim,
        "sliding_window": None,
        "use_sliding_window": False,
    }


def _qwen_moe_config(size: Size) -> dict[str, Any]:
    return {
        **_qwen_config(size),
        "architectures": ["Qwen3MoeForCausalLM"],
        "moe_intermediate_size": size.moe_intermediate,
        "num_experts": size.experts,
        "num_experts_per_tok": size.experts_per_token,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    }
