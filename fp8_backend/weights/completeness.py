"""Whether names and shapes of a checkpoint make whole layers: what vLLM would leave as memory held it, or trip over."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

from fp8_backend.errors import CheckpointError
from fp8_backend.weights.files import Checkpoint
from fp8_backend.weights.formats import EXPERT_PROJECTIONS

FETCH = "fetch the missing shard and its index, or export again"


def check_complete(checkpoint: Checkpoint) -> None:
    """Check that no layer, expert, part of a gated MLP, norm, router or embedding is missing, and MLPs' shapes agree.

    Raises:
        CheckpointError: names what is missing or disagrees.
    """
    for check in (_layers, _experts, _gated, _beside, _outside):
        for problem in check(checkpoint):
            raise CheckpointError(problem)


def _text_config(config: dict[str, Any]) -> dict[str, Any]:
    nested = config.get("text_config")
    return nested if isinstance(nested, dict) else config


def _layers(checkpoint: Checkpoint) -> Iterator[str]:
    count = _text_config(checkpoint.config).get("num_hidden_layers")
    seen = {int(found[1]) for name in checkpoint.info if (found := re.search(r"(?:^|\.)layers\.(\d{1,6})\.", name))}
    if type(count) is not int or not seen or count > 100_000:
        return
    if missing := [layer for layer in range(count) if layer not in seen]:
        yield f"layers.{missing[0]}: no tensor; config.json: num_hidden_layers is {count}, {len(missing)} lack; {FETCH}"


def _experts(checkpoint: Checkpoint) -> Iterator[str]:
    """Layers of one model have equally many experts."""
    held: dict[str, set[int]] = defaultdict(set)
    for name in checkpoint.info:
        stem, found, rest = name.partition(".experts.")
        number = rest.partition(".")[0]
        if found and number.isdecimal() and len(number) < 7:
            held[stem].add(int(number))
    # A model of several parts, such as text and speech, may have another number in each.
    most: dict[str, int] = defaultdict(int)
    for stem, numbers in held.items():
        part = re.sub(r"\d+", "*", stem)
        most[part] = max(most[part], *(number + 1 for number in numbers))
    for stem, numbers in held.items():
        count = most[re.sub(r"\d+", "*", stem)]
        if len(numbers) < count:
            first = next(number for number in range(count) if number not in numbers)
            yield f"{stem}.experts.{first}: no tensor; {len(numbers)} of {count} experts are there; {FETCH}"


def _gated(checkpoint: Checkpoint) -> Iterator[str]:
    for group in EXPERT_PROJECTIONS:  # dense ones have the same names
        stems: dict[str, dict[str, tuple[int, ...]]] = defaultdict(dict)
        for name, info in checkpoint.info.items():
            stem, _, projection = name.removesuffix(".weight").rpartition(".")
            if projection in group and name.endswith(".weight") and len(info.shape) == 2:
                stems[stem][projection] = info.shape
        # Without a gate anywhere, these are the names of a plain MLP.
        if not any(group[0] in shapes for shapes in stems.values()):
            continue
        for stem, shapes in stems.items():
            if lacking := [projection for projection in group if projection not in shapes]:
                yield f"{stem}.{lacking[0]}.weight: absent, and {stem} has {', '.join(shapes)}; {FETCH}"
                continue
            gate, up, down = (shapes[projection] for projection in group)
            if not gate == up == down[::-1]:
                said = ", ".join(f"{projection} {list(shapes[projection])}" for projection in group)
                yield f"{stem}: {said}; expected gate and up of one shape and down of its transpose; export again"


def _beside(checkpoint: Checkpoint) -> Iterator[str]:
    """What stands in one layer of the decoder, under the same name, stands in all: norms, and routers of experts."""
    stems: dict[str, dict[str, set[str]]] = defaultdict(lambda: defaultdict(set))
    for name in checkpoint.info:
        if found := re.match(r"((?:.*\.)?layers)\.(\d+)\.(.*)", name):
            stems[found[1]][found[2]].add(found[3])
    for stem, layers in stems.items():
        for norm in ("input_layernorm.weight", "post_attention_layernorm.weight"):
            yield from _lacking(stem, norm, layers)
        with_experts = {layer: names for layer, names in layers.items() if any(".experts." in name for name in names)}
        yield from _lacking(stem, "mlp.gate.weight", with_experts)


def _lacking(stem: str, name: str, layers: dict[str, set[str]]) -> Iterator[str]:
    if any(name in names for names in layers.values()):
        yield from (f"{stem}.{layer}.{name}: absent; {FETCH}" for layer, names in layers.items() if name not in names)


def _outside(checkpoint: Checkpoint) -> Iterator[str]:
    """Embeddings, last norm and output embeddings of a language model, under any of the names in use."""
    if not checkpoint.architecture.endswith("ForCausalLM"):
        return
    outside = [name for name in checkpoint.info if not re.search(r"(^|\.)(layers|h)\.\d", name)]
    for what, names in (("embedding", "embed|wte"), ("last norm", "norm|ln_f")):
        if not any(re.search(names, name) for name in outside):
            yield f"the model's {what}: absent; no tensor outside of the layers is called {names}; {FETCH}"
    ties = [config.get("tie_word_embeddings") for config in (checkpoint.config, _text_config(checkpoint.config))]
    if False in ties and True not in ties and not any(re.search(r"head|output|embed_out", name) for name in outside):
        yield f"lm_head.weight: absent, and config.json: tie_word_embeddings is false; {FETCH}"
