"""Models measured by name, with dummy weights: what their config.json says, cut to layers that one GPU holds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fp8_backend.errors import CheckpointError

_COMMON: dict[str, Any] = {
    "attention_bias": False,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_scaling": None,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "bos_token_id": 0,
    "eos_token_id": 1,
    "quantization_config": {
        "quant_method": "fp8",
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "weight_block_size": [128, 128],
    },
}
_QWEN3 = _COMMON | {
    "vocab_size": 151936,
    "max_position_embeddings": 40960,
    "rope_theta": 1000000,
    "head_dim": 128,
    "num_attention_heads": 32,
    "sliding_window": None,
    "use_sliding_window": False,
}
_QWEN3_MOE_LAYERS = 48
CONFIGS: dict[str, dict[str, Any]] = {
    "qwen3-8b": _QWEN3
    | {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "num_hidden_layers": 36,
        "num_key_value_heads": 8,
    },
    "qwen3-32b": _QWEN3
    | {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "hidden_size": 5120,
        "intermediate_size": 25600,
        "num_attention_heads": 64,
        "num_hidden_layers": 64,
        "num_key_value_heads": 8,
    },
    "qwen3-30b-a3b": _QWEN3
    | {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "moe_intermediate_size": 768,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "num_hidden_layers": _QWEN3_MOE_LAYERS,
        "num_key_value_heads": 4,
        # The router is not quantised; vLLM takes it for FP8 unless it is listed.
        "quantization_config": _COMMON["quantization_config"]
        | {"modules_to_not_convert": ["lm_head", *(f"model.layers.{i}.mlp.gate" for i in range(_QWEN3_MOE_LAYERS))]},
    },
    # All widths of DeepSeek-V3, 6 of its 61 layers: one dense, five of experts (58 GB).
    "deepseek-v3-6-layers": _COMMON
    | {
        "architectures": ["DeepseekV3ForCausalLM"],
        "model_type": "deepseek_v3",
        "vocab_size": 129280,
        "max_position_embeddings": 4096,
        "rope_theta": 10000,
        "hidden_size": 7168,
        "intermediate_size": 18432,
        "moe_intermediate_size": 2048,
        "n_routed_experts": 256,
        "n_shared_experts": 1,
        "num_experts_per_tok": 8,
        "n_group": 8,
        "topk_group": 4,
        "topk_method": "noaux_tc",
        "scoring_func": "sigmoid",
        "norm_topk_prob": True,
        "routed_scaling_factor": 2.5,
        "first_k_dense_replace": 1,
        "moe_layer_freq": 1,
        "q_lora_rank": 1536,
        "kv_lora_rank": 512,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
        "num_attention_heads": 128,
        "num_key_value_heads": 128,
        "num_hidden_layers": 6,
        "num_nextn_predict_layers": 0,
    },
}


def find_model(model: Path, scratch: Path) -> Path:
    """Return a model's folder; a name of CONFIGS gets one in `scratch`, unless there is a folder of that name.

    Raises:
        CheckpointError: neither a folder nor such a name.
    """
    if model.is_dir():
        return model.resolve()
    if str(model) not in CONFIGS:
        raise CheckpointError(
            f"{model}: no folder; give that of a checkpoint, of a config alone, or a name with dummy weights: "
            f"{', '.join(CONFIGS)}"
        )
    folder = scratch / str(model)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIGS[str(model)], indent=1) + "\n")
    return folder
