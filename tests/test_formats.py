"""Which quantization_config is read how, and every other one's refusal."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest

from fp8_backend.errors import CheckpointError
from fp8_backend.quantize import written_config
from fp8_backend.weights.formats import Fp8Format, is_listed, read_format

COMPRESSED = written_config("compressed-tensors", "float32", ["lm_head", "re:.*mlp\\.gate$"])


def test_what_is_written_is_read() -> None:
    assert read_format({"quantization_config": COMPRESSED}) == Fp8Format(
        "compressed-tensors", ("lm_head", "re:.*mlp\\.gate$")
    )
    deepseek = written_config("fp8", "ue8m0", ["lm_head"])
    assert read_format({"quantization_config": deepseek}) == Fp8Format("fp8", ("lm_head",), power_of_two=True)
    # A multimodal model keeps it with the text model's config.
    assert read_format({"text_config": {"quantization_config": deepseek}}).power_of_two


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
    entries = ["lm_head", "re:.*mlp\\.gate$"]
    names = ("lm_head", "lm_head2", "layers.1.mlp.gate", "layers.1.mlp.gate_proj")
    assert [is_listed(name, entries) for name in names] == [True, False, True, False]
