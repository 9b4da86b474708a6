"""What both arms have in common, and what the default arm is on this machine."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fp8_backend.ab.worker import Request
from fp8_backend.dequantize import dequantize_checkpoint
from fp8_backend.errors import CheckpointError
from fp8_backend.integration.plugin import NAME
from fp8_backend.weights.formats import read_format

MAX_MODEL_LEN, MAX_BATCHED_TOKENS, MAX_SEQS = 4096, 8192, 64


@dataclass(frozen=True)
class Setup:
    """A model and its two arms.

    default_model: what the default arm loads. default_is_fp8: whether that goes through FP8 kernels of vLLM.
    """

    model: Path
    default_model: Path
    default_text: str
    default_is_fp8: bool
    has_weights: bool
    vocab: int
    max_model_len: int
    kv_bytes: int
    on_gpu: bool


def stock_fp8_runs() -> bool:
    """Return whether vLLM's own FP8 linears run here: on a GPU, and on a CPU with AMX tiles, which they ask for."""
    return torch.cuda.is_available() or bool(torch.cpu._is_amx_tile_supported())


def prepare(model: Path, kv_gib: float | None, scratch: Path) -> Setup:
    """Read the model's config and, where vLLM's own FP8 cannot run, write the bf16 twin into `scratch`.

    Raises:
        CheckpointError: no config.json, or not an FP8 checkpoint with one scale per 128x128 block.
    """
    if not (model / "config.json").is_file():
        raise CheckpointError(f"{model}: no config.json; give the folder of a checkpoint, or of a config alone")
    config = json.loads((model / "config.json").read_text())
    read_format(config)
    on_gpu, stock = torch.cuda.is_available(), stock_fp8_runs()
    has_weights = any(model.glob("*.safetensors"))
    default_model, text = model, "vLLM's own FP8 path, no --quantization"
    if not stock:
        default_model, text = scratch / "twin", "the bf16 twin: vLLM's own FP8 linears need AMX tiles on a CPU"
        if has_weights:
            dequantize_checkpoint(model, default_model)
        else:
            default_model.mkdir(parents=True)
            plain = {key: value for key, value in config.items() if key != "quantization_config"}
            (default_model / "config.json").write_text(json.dumps(plain))
    kv_gib = kv_gib if kv_gib is not None else (8.0 if on_gpu else 0.25)
    return Setup(
        model=model,
        default_model=default_model,
        default_text=text,
        default_is_fp8=stock,
        has_weights=has_weights,
        vocab=config["vocab_size"],
        max_model_len=min(MAX_MODEL_LEN, config.get("max_position_embeddings", MAX_MODEL_LEN)),
        kv_bytes=int(kv_gib * 2**30),
        on_gpu=on_gpu,
    )


def engine_arguments(setup: Setup, arm: str, request: Request) -> dict[str, Any]:
    """Return the arguments of vllm.LLM: the same for both arms but for the model of a twin and the quantisation."""
    common: dict[str, Any] = {
        "model": str(setup.model if arm == "ours" else setup.default_model),
        "load_format": "auto" if setup.has_weights else "dummy",
        "skip_tokenizer_init": True,
        "max_model_len": setup.max_model_len,
        "max_num_batched_tokens": MAX_BATCHED_TOKENS,
        "max_num_seqs": max(MAX_SEQS, *request.batches),
        "enable_prefix_caching": False,
        "disable_log_stats": False,  # when each token came is known only so
        "max_logprobs": -1,
        "seed": 0,
        # The same for both and given: peak memory then shows what an arm needs beside it.
        "kv_cache_memory_bytes": setup.kv_bytes,
    }
    if arm == "ours":
        common["quantization"] = NAME
    if setup.on_gpu:
        sizes = sorted(set(request.batches))
        # The share is only checked to be free: what the cache takes is given, and the run before has just been ended.
        return common | {"gpu_memory_utilization": 0.6, "compilation_config": {"cudagraph_capture_sizes": sizes}}
    # On the CPU, despite its name, a share of the machine's memory.
    return common | {"gpu_memory_utilization": 0.05, "enforce_eager": True}


@dataclass(frozen=True)
class Conditions:
    """How the runs of both arms are started.

    deepgemm_warmup: whether vLLM may compile DeepGEMM's kernels for every number of tokens as it starts.
    caches: where the caches of compiled kernels stay; None: each run has its own, which is gone after it.
    even_routing: whether vLLM draws the experts of a token at random, and does not ask the router.
    """

    deepgemm_warmup: bool = True
    caches: Path | None = None
    even_routing: bool = False

    @property
    def start_up(self) -> str:
        """What a start-up time is called: its name says what such a start leaves out."""
        kept, left_out = self.caches is not None, not self.deepgemm_warmup
        return " ".join(["start-up", *["with kept caches"] * kept, *["without DeepGEMM's warm-up"] * left_out])

    @property
    def routing(self) -> str:
        """Who chooses a token's experts."""
        return "experts drawn at random, evenly" if self.even_routing else "experts as the model's routers choose"


def child_environment(caches: Path, conditions: Conditions) -> dict[str, str]:
    """Return what a run's environment adds: where its compile caches are, and nothing asked online."""
    return {
        **({} if conditions.deepgemm_warmup else {"VLLM_DEEP_GEMM_WARMUP": "skip"}),
        # Said in either case: the caller's environment may have it, and the report says who chooses.
        "VLLM_MOE_ROUTING_SIMULATION_STRATEGY": "uniform_random" if conditions.even_routing else "",
        "VLLM_CACHE_ROOT": str(caches / "vllm"),
        "DG_JIT_CACHE_DIR": str(caches / "deep_gemm"),
        "TRTLLM_DG_CACHE_DIR": str(caches / "tensorrt_llm"),
        "FLASHINFER_WORKSPACE_BASE": str(caches / "flashinfer"),
        "TRITON_CACHE_DIR": str(caches / "triton"),
        "TORCHINDUCTOR_CACHE_DIR": str(caches / "inductor"),
        "FP8_BACKEND_CACHE_DIR": str(caches / "fp8_backend"),
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
        # Lets the engine's processes be asked for their peak memory; they are our own children.
        "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",
    }
