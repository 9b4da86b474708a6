"""Whether names and shapes of a checkpoint make whole layers: what vLLM would leave as memory held it, or trip over."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from fp8_backend.errors import CheckpointError
from fp8_backend.weights.files import Checkpoint
from fp8_backend.weights.formats import EXPERT_PROJECTIONS, MAX_PARTS

FETCH = "fetch the missing shard and its index, or export again"
LAYER = re.compile(r"((?:.*\.)?layers)\.(\d+)\.(.*)", re.DOTALL)


def check_complete(checkpoint: Checkpoint) -> None:
    """Check that no layer, expert, part of a gated MLP, norm, bias, router or embedding is missing, and MLPs are whole.

    Raises:
        CheckpointError: names what is missing or disagrees.
    """
    for check in (_layers, _experts, _gated, _routers, _vectors, _outside):
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


def _routers(checkpoint: Checkpoint) -> Iterator[str]:
    """Where one layer's experts have a router, all have one."""
    stems: dict[str, set[str]] = defaultdict(set)
    for name in checkpoint.info:
        if (found := LAYER.match(name)) and ".experts." in name:
            stems[found[1]].add(found[2])
    for stem, layers in stems.items():
        lacking = [layer for layer in layers if f"{stem}.{layer}.mlp.gate.weight" not in checkpoint.info]
        if len(lacking) < len(layers):
            yield from (f"{stem}.{layer}.mlp.gate.weight: absent; {FETCH}" for layer in lacking)


@dataclass(frozen=True)
class _Module:
    """What one module of one layer holds: names and shapes of matrices and of modules within; names of vectors."""

    matrices: set[tuple[str, tuple[int, ...]]] = field(default_factory=set)
    vectors: set[str] = field(default_factory=set)


def _vectors(checkpoint: Checkpoint) -> Iterator[str]:
    """Modules of the same matrices, one in each layer, have the same norms and biases.

    vLLM's own are ones, zeros or whatever memory held, and no scale shows that.
    """
    modules: dict[tuple[str, str], dict[str, _Module]] = defaultdict(lambda: defaultdict(_Module))
    for name, info in checkpoint.info.items():
        if not (found := LAYER.match(name)) or name.endswith(("_scale_inv", "_scale")):
            continue
        stem, layer, within = found.groups()
        outside, experts, _ = within.partition(".experts.")
        parts = [*outside.split("."), "experts", ""] if experts else within.split(".")
        if len(parts) > MAX_PARTS:
            continue
        module = modules[stem, ".".join(parts[:-2])][layer]
        if experts:
            module.matrices.add(("experts", ()))
        elif len(info.shape) < 2:
            module.vectors.add(".".join(parts[-2:]))
            continue
        else:
            module.matrices.add((".".join(parts[-2:]), info.shape))
        for depth, within in enumerate(parts[:-2]):
            modules[stem, ".".join(parts[:depth])][layer].matrices.add((within, ()))
    for (stem, parent), layers in modules.items():
        alike: dict[frozenset[Any], dict[str, set[str]]] = defaultdict(dict)
        for layer, module in layers.items():
            alike[frozenset(module.matrices)][f"{stem}.{layer}.{parent}".rstrip(".")] = module.vectors
        for peers in alike.values():
            yield from _lacking(peers)


def _lacking(peers: dict[str, set[str]]) -> Iterator[str]:
    having = Counter(vector for vectors in peers.values() for vector in vectors)
    for module, vectors in peers.items():
        # What most of them lack, models may leave out by design.
        if lacking := [vector for vector, count in having.items() if vector not in vectors and 2 * count >= len(peers)]:
            yield f"{module}.{lacking[0]}: absent, and {having[lacking[0]]} layers like it have it; {FETCH}"


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
