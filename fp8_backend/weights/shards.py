"""What a rank gets of every FP8 layer, and whether the kernels take it: from headers alone."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from fp8_backend.kernels.reference import BLOCK
from fp8_backend.weights.checkpoint import FP8, MERGED
from fp8_backend.weights.files import Checkpoint

# How vLLM splits a projection over ranks. Both lists hold the names of the models vLLM serves in FP8 blocks.
COLUMN = frozenset(
    (
        "q_proj",
        "k_proj",
        "v_proj",
        "qkv_proj",
        "gate_proj",
        "up_proj",
        "gate_up_proj",
        "w1",
        "w3",
        "q_b_proj",
        "kv_b_proj",
    )
)
ROW = frozenset(("o_proj", "down_proj", "w2"))
REPLICATED = frozenset(("q_a_proj", "kv_a_proj_with_mqa", "wq_b", "wk", "eh_proj"))
FUSED = frozenset(("qkv_proj", "gate_up_proj"))  # stored as one tensor of several projections
QKV = MERGED[0]


@dataclass(frozen=True)
class Layer:
    """One layer as vLLM builds it: projections stacked along n, or one."""

    stem: str  # what the names of its members begin with: "model.layers.0.self_attn."
    members: tuple[str, ...]  # projections, in vLLM's order
    widths: tuple[int, ...]  # n of each
    k: int

    @property
    def is_expert(self) -> bool:
        """Whether it is a routed expert's: those are split by other rules than a linear."""
        return ".experts." in f".{self.stem}"


def fp8_layers(checkpoint: Checkpoint) -> Iterable[Layer]:
    """Yield every FP8 layer of a checkpoint that is made of matrices."""
    group_of = {member: group for group in MERGED for member in group}
    for name, info in checkpoint.info.items():
        if info.dtype != FP8 or len(info.shape) != 2 or not name.endswith(".weight"):
            continue
        stem, _, projection = name.removesuffix(".weight").rpartition(".")
        stem = f"{stem}." if stem else ""
        present = [
            part
            for part in group_of.get(projection, (projection,))
            if (other := checkpoint.info.get(f"{stem}{part}.weight")) and len(other.shape) == 2
        ]
        if projection == present[0]:
            widths = tuple(checkpoint.info[f"{stem}{part}.weight"].shape[0] for part in present)
            yield Layer(stem, tuple(present), widths, info.shape[1])


def reason(layer: Layer, tp: int, config: dict[str, Any]) -> str | None:
    """Return why the kernels do not take this layer on one of `tp` ranks, or None."""
    last = layer.members[-1]
    if layer.is_expert:
        return _split_expert(layer, tp)
    if last in FUSED:
        return _split_fused(layer, tp, config)
    if tp == 1 or last in REPLICATED:
        return None
    if last in ROW:
        return _indivisible("input width", layer.k, tp)
    if last not in COLUMN:
        return f"unknown projection {last!r}: how vLLM splits it over {tp} ranks is not known here; try it at --tp 1"
    if layer.members == QKV:
        return _split_qkv(tp, config)
    return next((why for width in layer.widths if (why := _indivisible("output width", width, tp))), None)


def _split_expert(layer: Layer, tp: int) -> str | None:
    """Split as vLLM does; parts that cut a block are widened to it when they are loaded (`partition.ExpertPart`)."""
    return _indivisible("intermediate size", layer.k if layer.members[-1] in ROW else layer.widths[0], tp)


def _split_qkv(tp: int, config: dict[str, Any]) -> str | None:
    """Split as vLLM's QKVParallelLinear does: by heads, copying key and value heads where ranks outnumber them."""
    heads, kv_heads = _head_counts(config)
    if type(heads) is not int or type(kv_heads) is not int or min(heads, kv_heads) < 1:
        return f"config.json: {heads!r} attention heads and {kv_heads!r} key heads; expected whole numbers above 0"
    if heads % tp or max(kv_heads, tp) % min(kv_heads, tp):
        return f"{heads} attention heads and {kv_heads} key heads do not divide by {tp} ranks: vLLM itself refuses"
    return None


def _head_counts(config: dict[str, Any]) -> tuple[Any, Any]:
    nested = config.get("text_config")
    text = nested if isinstance(nested, dict) else config
    return text.get("num_attention_heads"), text.get("num_key_value_heads", text.get("num_attention_heads"))


def _split_fused(layer: Layer, tp: int, config: dict[str, Any]) -> str | None:
    """Split one tensor of several projections; where they meet within a block, its scale belongs to both."""
    seams = [layer.widths[0] // 2]
    if layer.members[0] == "qkv_proj":
        if why := _split_qkv(tp, config):
            return why
        heads, kv_heads = _head_counts(config)
        head = layer.widths[0] // (heads + 2 * kv_heads)
        seams = [heads * head, (heads + kv_heads) * head]
    elif why := _indivisible("output width", seams[0], tp):
        return why
    cut = next((row for row in seams if row % BLOCK), None)
    if cut is None:
        return None
    return (
        f"stored as one tensor whose projections meet at row {cut}, within a block of {BLOCK}; store its projections "
        "as tensors of their own"
    )


def _indivisible(what: str, width: int, tp: int) -> str | None:
    return f"{what} {width} does not divide by {tp} ranks: vLLM itself refuses" if width % tp else None
