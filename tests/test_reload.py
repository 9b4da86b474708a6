"""vLLM's weight reload on one packed layer, and which folder of a named model is checked."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

pytest.importorskip("vllm", reason="needs vLLM; vllm is not installed")

from vllm.config import VllmConfig, set_current_vllm_config
from vllm.model_executor.layers.linear import MergedColumnParallelLinear
from vllm.model_executor.model_loader.reload import layerwise

from demo.architectures import SIZES
from demo.checkpoint import write_checkpoint
from fp8_backend.errors import CheckpointError
from fp8_backend.integration import config as config_module
from fp8_backend.integration import files, hub
from fp8_backend.integration.config import DeepGemmFp8Config
from fp8_backend.quantize import written_config


@pytest.fixture(autouse=True)
def vllm_config(one_rank: VllmConfig) -> Iterator[None]:
    config_module.select_backend.cache_clear()
    with set_current_vllm_config(one_rank):
        yield


def part(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(192, 256, generator=generator).to(torch.float8_e4m3fn), torch.rand(2, 2, generator=generator) + 1


@pytest.fixture
def model() -> torch.nn.Module:
    """A model of one loaded and packed layer whose two parts meet within a block."""
    config = DeepGemmFp8Config.from_config(written_config("fp8", "float32", []))
    layer = MergedColumnParallelLinear(
        256, [192, 192], bias=False, quant_config=config, prefix="gate_up", params_dtype=torch.bfloat16
    )
    model = torch.nn.Sequential(layer)
    layerwise.record_metadata_for_reloading(model)
    load(layer, {0: part(0), 1: part(1)})
    layer.quant_method.process_weights_after_loading(layer)
    return model


def load(layer: Any, parts: dict[int, tuple[torch.Tensor, torch.Tensor]]) -> None:
    for index, (codes, scale) in parts.items():
        layer.weight.weight_loader(layer.weight, codes, index)
        layer.weight_scale_inv.weight_loader(layer.weight_scale_inv, scale, index)


def packed_bytes(layer: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return layer.weight.view(torch.uint8).clone(), layer.weight_scale_inv.data.clone()


def test_reload_fills_the_same_memory(model: torch.nn.Module) -> None:
    layer, places = model[0], [parameter.data_ptr() for parameter in model.parameters()]
    before = packed_bytes(layer)
    layerwise.initialize_layerwise_reload(model)
    load(layer, {0: part(2), 1: part(3)})
    layerwise.finalize_layerwise_reload(model, SimpleNamespace(dtype=torch.bfloat16))
    assert not torch.equal(packed_bytes(layer)[0], before[0])
    layerwise.initialize_layerwise_reload(model)
    load(layer, {1: part(1), 0: part(0)})
    layerwise.finalize_layerwise_reload(model, SimpleNamespace(dtype=torch.bfloat16))
    assert all(map(torch.equal, packed_bytes(layer), before))
    assert [parameter.data_ptr() for parameter in model.parameters()] == places  # captured graphs read them there


def test_reload_of_a_part_is_refused(model: torch.nn.Module) -> None:
    layerwise.initialize_layerwise_reload(model)
    load(model[0], {0: part(2)})
    with pytest.raises(CheckpointError, match="gate_up: the weight reload left 49158 elements unset"):
        layerwise.finalize_layerwise_reload(model, SimpleNamespace(dtype=torch.bfloat16))


def test_reload_of_nothing_keeps_the_weights(model: torch.nn.Module) -> None:
    before = packed_bytes(model[0])
    layerwise.initialize_layerwise_reload(model)
    layerwise.finalize_layerwise_reload(model, SimpleNamespace(dtype=torch.bfloat16))
    assert all(map(torch.equal, packed_bytes(model[0]), before))


def served(model: torch.nn.Module, name: Path) -> DeepGemmFp8Config:
    """Return the config of the layer in the state it has in an engine that serves a checkpoint."""
    config = model[0].quant_method.config
    config.files.check(str(name), None)
    config.model_config = SimpleNamespace(model=str(name), revision=None, dtype=torch.bfloat16)
    return config


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    write_checkpoint(tmp_path / "model", "qwen3", replace(SIZES["qwen3", "demo"], layers=1))
    return tmp_path / "model"


def test_reload_from_broken_files_leaves_every_layer_as_it_was(
    model: torch.nn.Module, checkpoint: Path, tmp_path: Path
) -> None:
    config = served(model, checkpoint)
    before, places = packed_bytes(model[0]), [parameter.data_ptr() for parameter in model.parameters()]
    broken = Path(shutil.copytree(checkpoint, tmp_path / "broken"))
    shard = sorted(broken.glob("*.safetensors"))[0]
    shard.write_bytes(shard.read_bytes()[:-1])
    config.model_config.model = str(broken)  # as a reload with `weights_path` begins
    layerwise.initialize_layerwise_reload(model)
    assert model[0].weight.is_meta
    with pytest.raises(CheckpointError, match=f"{shard.name}: .* file is truncated.*; nothing was reloaded"):
        config.get_cache_scale_mapper()
    assert all(map(torch.equal, packed_bytes(model[0]), before))
    assert [parameter.data_ptr() for parameter in model.parameters()] == places
    assert config.model_config.model == str(checkpoint)  # what the next reload reads
    test_reload_fills_the_same_memory(model)


def test_files_that_did_not_change_are_checked_once(
    model: torch.nn.Module, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Trainers hand over new weights every few seconds, and the files stay."""
    config = served(model, checkpoint)
    checked: list[Path] = []
    monkeypatch.setattr(files, "verify_checkpoint", checked.append)
    for _ in range(2):
        layerwise.initialize_layerwise_reload(model)
        config.get_cache_scale_mapper()
        layerwise.finalize_layerwise_reload(model, config.model_config)
    assert checked == []
    config.get_cache_scale_mapper()  # no reload: a draft model that is loaded, say
    shard = sorted(checkpoint.glob("*.safetensors"))[0]
    os.utime(shard, (0, 0))
    layerwise.initialize_layerwise_reload(model)
    config.get_cache_scale_mapper()
    assert checked == [checkpoint]


def test_code_that_is_nan_is_found_in_its_file(checkpoint: Path) -> None:
    """The layer is two tensors of the checkpoint, cut and merged; who has the files needs the place there."""
    stem = "model.layers.0.mlp."
    shard = next(path for path in checkpoint.glob("*.safetensors") if f"{stem}up_proj.weight" in load_file(path))
    tensors = load_file(shard)
    tensors[f"{stem}up_proj.weight"].view(torch.uint8)[300, 5] = 0x7F
    save_file(tensors, shard)
    config = DeepGemmFp8Config.from_config(written_config("fp8", "float32", []))
    layer = MergedColumnParallelLinear(
        512, [768, 768], bias=False, quant_config=config, prefix=f"{stem}gate_up_proj", params_dtype=torch.bfloat16
    )
    config.model_config = SimpleNamespace(model=str(checkpoint), revision=None)
    held = {name: tensor for path in checkpoint.glob("*.safetensors") for name, tensor in load_file(path).items()}
    parts = (f"{stem}{part}_proj.weight" for part in ("gate", "up"))
    load(layer, {index: (held[name], held[f"{name}_scale_inv"]) for index, name in enumerate(parts)})
    with pytest.raises(CheckpointError) as caught:
        layer.quant_method.process_weights_after_loading(layer)
    assert f"{stem}gate_up_proj.weight[1068, 5] is nan" in str(caught.value)
    place = re.search(rf"broken: {shard.name}: {stem}up_proj\.weight: .* \(byte (\d+)\)", str(caught.value))
    assert shard.read_bytes()[int(place[1])] == 0x7F


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache as huggingface_hub lays it out, with one model of two shards, the second yet to come."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    snapshot = tmp_path / "models--some--model" / "snapshots" / ("a" * 40)
    snapshot.mkdir(parents=True)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("a" * 40)
    (snapshot / "config.json").write_text("{}")
    weight_map = {"x": "model-1.safetensors", "y": "model-2.safetensors"}
    (snapshot / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (snapshot / "model-1.safetensors").touch()
    return snapshot


def test_a_named_model_is_checked_once_all_of_it_is_in_the_cache(cache: Path) -> None:
    assert hub.local_folder("some/model", None) is None
    (cache / "model-2.safetensors").touch()
    assert hub.local_folder("some/model", None) == cache
    assert hub.local_folder("some/model", "a" * 40) == cache
    assert hub.local_folder("some/model", "other-branch") is None
    assert hub.local_folder("other/model", None) is None
    (cache / "model.safetensors.index.json").unlink()
    assert hub.local_folder("some/model", None) is None
    (cache / "model.safetensors").touch()
    assert hub.local_folder("some/model", None) == cache


@pytest.mark.parametrize("name", ["s3://bucket/model", "/no/such/folder", "a/b/c", "--"])
def test_other_names_are_left_to_vllm(cache: Path, name: str) -> None:
    assert hub.local_folder(name, None) is None


def test_a_broken_model_in_the_cache_is_refused_by_name(cache: Path) -> None:
    (cache / "model-2.safetensors").touch()
    config = DeepGemmFp8Config.from_config(written_config("fp8", "float32", []))
    (cache / "config.json").write_text(json.dumps({"quantization_config": written_config("fp8", "float32", [])}))
    with pytest.raises(CheckpointError, match="model-1.safetensors"):
        config.maybe_update_config("some/model")
