"""Which weights of a bf16 checkpoint are quantised: those vLLM serves as FP8 linears or experts, and no other."""

from __future__ import annotations

import re

from fp8_backend.kernels.reference import BLOCK
from fp8_backend.weights.checkpoint import MERGED
from fp8_backend.weights.files import Checkpoint
from fp8_backend.weights.shards import COLUMN, FUSED, ROW, Layer, reason

# Indexers and the multi-token head's eh_proj are left out: vLLM builds some of them without a quantisation method.
QUANTISED = COLUMN | ROW | {"q_a_proj", "kv_a_proj_with_mqa"}
SOURCE_DTYPES = ("BF16", "F16", "F32")
OTHER_MODELS = ("visual", "vision", "audio")  # parts of a multimodal model that are served in bf16


def select(checkpoint: Checkpoint, keep: re.Pattern[str] | None) -> tuple[list[str], dict[str, str]]:
    """Choose the weights to quantise.

    Layers that vLLM merges, and the experts of one layer, are quantised together or not at all: vLLM builds one layer
    of them.

    Args:
        checkpoint: of a bf16, float16 or float32 model.
        keep: weights whose names it finds are left as they are.

    Returns:
        names of the weights to quantise, and for every other tensor why it is not.
    """
    kept: dict[str, str] = {}
    for name in checkpoint.info:
        if why := _why_kept(name, checkpoint, keep):
            kept[name] = why
    chosen = [name for name in checkpoint.info if name not in kept]
    while spoiled := {_group(name) for name in chosen if (why := _merged_width(name, checkpoint))} | {
        _group(name) for name in kept if _projection(name) in QUANTISED
    } & {_group(name) for name in chosen}:
        for name in chosen:
            if _group(name) in spoiled:
                kept[name] = _merged_width(name, checkpoint) or "served as one layer with weights that are kept"
        chosen = [name for name in chosen if name not in kept]
    return chosen, kept


def unquantised_modules(checkpoint: Checkpoint, kept: dict[str, str]) -> list[str]:
    """Return the modules for modules_to_not_convert: every kept weight that vLLM may otherwise take for FP8.

    Experts that are stored in one tensor for all have no module of that name in vLLM, but one that ends in `experts`.
    """
    modules = set()
    for name in kept:
        shape = checkpoint.info[name].shape
        outside, found, _ = name.partition(".experts.")
        if found and len(shape) == 3:
            modules.add(f"{outside}.experts")
        elif name.endswith(".weight") and len(shape) > 1:
            modules.add(name.removesuffix(".weight"))
    return sorted(modules)


def _why_kept(name: str, checkpoint: Checkpoint, keep: re.Pattern[str] | None) -> str | None:
    info = checkpoint.info[name]
    parts = name.split(".")
    if len(info.shape) < 2 or not name.endswith(".weight"):
        return "norm, bias or other vector" if len(info.shape) < 2 else "not a weight matrix"
    if "embed" in name:
        return "embedding"
    if parts[-2] == "lm_head":
        return "lm_head"
    if parts[-2] in ("gate", "router", "shared_expert_gate"):
        return "router"
    if info.dtype not in SOURCE_DTYPES or len(info.shape) != 2 or 0 in info.shape:
        return f"{info.dtype} of {len(info.shape)} dimensions"
    in_decoder = re.search(r"(^|\.)layers\.\d+\.", name) and not any(part.startswith(OTHER_MODELS) for part in parts)
    if not in_decoder or _projection(name) not in QUANTISED:
        return "not a projection that vLLM serves in FP8 blocks"
    if info.shape[1] % BLOCK:
        return f"{info.shape[1]} columns: vLLM's own FP8 kernels take multiples of {BLOCK}"
    return "--keep" if keep is not None and keep.search(name) else None


def _projection(name: str) -> str:
    return name.removesuffix(".weight").rpartition(".")[2]


def _group(name: str) -> str:
    """Return one name for all weights of which vLLM builds one layer."""
    stem, experts, _ = name.partition(".experts.")
    if experts:
        return stem + experts
    stem, _, projection = name.removesuffix(".weight").rpartition(".")
    return f"{stem}.{next((group[0] for group in MERGED if projection in group), projection)}"


def _merged_width(name: str, checkpoint: Checkpoint) -> str | None:
    projection, rows = _projection(name), checkpoint.info[name].shape[0]
    stem = name.removesuffix(f"{projection}.weight")
    group = next((group for group in MERGED if projection in group), (projection,))
    after = [part for part in group[group.index(projection) + 1 :] if f"{stem}{part}.weight" in checkpoint.info]
    if projection in FUSED:
        layer = Layer(stem, (projection,), (rows,), checkpoint.info[name].shape[1])
        return reason(layer, 1, checkpoint.config)
    if rows % BLOCK == 0 or not after:
        return None
    return f"{rows} rows, merged by vLLM before {after[0]}: not a multiple of {BLOCK}"
