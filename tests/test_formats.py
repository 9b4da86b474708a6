"""Which quantization_config is read how, and every other one's refusal."""

from __future__ import annotations

import time
from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest

from fp8_backend.errors import CheckpointError
from fp8_backend.quantize import written_config
from fp8_backend.weights.formats import Fp8Format, Method, read_format

COMPRESSED = written_config("compressed-tensors", "float32", ["lm_head", "re:.*mlp\\.gate$"])


def test_what_is_written_is_read() -> None:
    assert read_format({"quantization_config": COMPRESSED}) == Fp8Format(
        "compressed-tensors", ("lm_head", "re:.*mlp\\.gate$")
    )
    deepseek = written_config("fp8", "ue8m0", ["lm_head"])
    assert read_format({"quantization_config": deepseek}) == Fp8Format("fp8", ("lm_head",), power_of_two=True)
    # A multimodal model keeps it with the text model's config.
    assert read_format({"text_config": {"quantization_config": deepseek}}).power_of_two


def test_fields_left_at_their_defaults_are_read_as_such() -> None:
    config = deepcopy(COMPRESSED)
    for part in ("weights", "input_activations"):
        for field in ("num_bits", "symmetric"):
            del group(config)[part][field]
    del group(config)["weights"]["dynamic"]
    assert read_format({"quantization_config": config}).method == "compressed-tensors"


def group(config: dict[str, Any]) -> dict[str, Any]:
    return config["config_groups"]["group_0"]


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda config: group(config)["weights"].update(strategy="channel"), "strategy of weights is 'channel'"),
        (lambda config: group(config)["weights"].update(num_bits=4), "num_bits of weights is 4; expected 8"),
        (lambda config: group(config)["weights"].update(type="int"), "type of weights is 'int'"),
        (lambda config: group(config)["weights"].update(block_structure=[64, 128]), "block_structure of weights"),
        (lambda config: group(config)["input_activations"].update(dynamic=False), "dynamic of input_activations"),
        (lambda config: group(config)["input_activations"].update(group_size=64), "group_size of input_activations"),
        (lambda config: group(config).update(input_activations=None), "input_activations is None"),
        (lambda config: group(config).update(targets=["re:.*down_proj"]), "targets is ['re:.*down_proj']"),
        (lambda config: config["config_groups"].update(group_1={}), "expected one group"),
        (lambda config: config.update(config_groups=[]), "config_groups is []"),
        (lambda config: config.update(kv_cache_scheme={"num_bits": 8}), "kv_cache_scheme is {'num_bits': 8}"),
        (lambda config: config.update(ignore="lm_head"), "ignore is 'lm_head'; expected a list of names"),
        (lambda config: config.update(ignore=["re:("]), "ignore holds 're:('"),
        (lambda config: group(config)["weights"].update(dynamic=True), "dynamic of weights is True; expected False"),
        (lambda config: group(config)["input_activations"].pop("dynamic"), "dynamic of input_activations is False"),
        (lambda config: config.update(quant_method="awq"), "expected 'fp8' or 'compressed-tensors'"),
    ],
)
def test_compressed_tensors_that_are_not_fp8_blocks(change: Callable[[dict[str, Any]], Any], expected: str) -> None:
    config = deepcopy(COMPRESSED)
    change(config)
    with pytest.raises(CheckpointError) as caught:
        read_format({"quantization_config": config})
    assert expected in str(caught.value)


def test_names() -> None:
    fp8, compressed = Fp8Format("fp8", ()), Fp8Format("compressed-tensors", ())
    assert (fp8.scale_name("a.weight"), compressed.scale_name("a.weight")) == ("a.weight_scale_inv", "a.weight_scale")
    for form in (fp8, compressed):
        assert form.weight_name(form.scale_name("a.weight")) == "a.weight"
        assert form.weight_name("a.weight") is None
    assert compressed.weight_name("a.k_scale") is None  # of a KV cache


@pytest.mark.parametrize(
    ("method", "entry", "listed", "others"),
    [
        ("compressed-tensors", "lm_head", ["lm_head"], ["lm_head2", "model.lm_head"]),
        ("compressed-tensors", "re:.*mlp\\.gate$", ["layers.1.mlp.gate"], ["layers.1.mlp.gate_proj"]),
        ("fp8", "layers.1.mlp.gate", ["layers.1.mlp.gate", "model.layers.1.mlp.gate"], ["layers.11.mlp.gate"]),
        ("fp8", "gate", ["layers.1.mlp.gate", "gate"], ["layers.1.mlp.gate_proj", "layers.1.shared_gate"]),
        ("fp8", "visual", ["visual.blocks.0.qkv", "model.visual.merger"], ["visual2.blocks.0.qkv"]),
        ("fp8", r"model\.layers\.\d+\.mlp\.gate$", ["model.layers.31.mlp.gate"], ["model.layers.31.mlp.gate_proj"]),
        ("fp8", "re:.*shared.*", ["layers.1.mlp.shared_experts.up_proj"], ["layers.1.mlp.experts.0.up_proj"]),
        ("fp8", "", [], ["lm_head", "model.norm"]),
    ],
)
def test_modules_that_stay_unquantised(method: Method, entry: str, listed: list[str], others: list[str]) -> None:
    form = Fp8Format(method, (entry,))
    assert [module for module in listed + others if form.lists(module)] == listed


@pytest.mark.parametrize(
    ("method", "entries", "listed"),
    [
        ("fp8", ["layers.3.mlp.experts"], True),
        ("fp8", ["layers.3.mlp"], True),
        ("fp8", ["layers.3.mlp.shared_experts"], False),
        ("compressed-tensors", ["layers.3.mlp.experts.1.down_proj"], True),
        ("compressed-tensors", ["re:.*mlp\\.experts.*"], True),
        ("compressed-tensors", ["re:layers\\.3\\.mlp\\.experts\\.\\d+\\.w[123]$"], True),
        ("compressed-tensors", ["re:.*\\.shared_experts\\..*"], False),
    ],
)
def test_experts_that_stay_unquantised(method: Method, entries: list[str], listed: bool) -> None:
    """vLLM asks for the experts of a layer as one; a pattern may name none but the projections of each."""
    assert Fp8Format(method, tuple(entries)).lists_experts("layers.3.mlp.experts") is listed


def test_experts_of_which_a_part_stays_unquantised() -> None:
    form = Fp8Format("compressed-tensors", ("re:.*down_proj$",))
    with pytest.raises(
        CheckpointError, match=r"layers\.3\.mlp\.experts: config\.json leaves \['down_proj'\] unquantised"
    ):
        form.lists_experts("layers.3.mlp.experts")


def test_many_names_are_looked_up_fast() -> None:
    """As Qwen3-235B lists its routers and norms, for the projections of 94 layers of 128 experts."""
    form = Fp8Format("fp8", tuple(f"model.layers.{layer}.{name}" for layer in range(94) for name in "abcdefghij"))
    began = time.process_time()
    assert not any(form.lists(f"model.layers.{number % 94}.mlp.experts.{number}.up_proj") for number in range(36096))
    assert time.process_time() - began < 5
