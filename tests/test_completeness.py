"""Checkpoints whose files are whole and whose layers are not, or that hold what no layer of vLLM takes."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from demo.architectures import SIZES
from demo.checkpoint import write_checkpoint
from fp8_backend.errors import CheckpointError
from fp8_backend.weights.checkpoint import verify_checkpoint
from fp8_backend.weights.files import INDEX

Tensors = dict[str, torch.Tensor]
MLP = "model.layers.1.mlp"
EXPERTS = "model.layers.1.mlp.experts"


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pristine")
    for architecture, layers in (("qwen3", 2), ("qwen3_moe", 2), ("deepseek_v3", 3)):
        write_checkpoint(folder / architecture, architecture, replace(SIZES[architecture, "demo"], layers=layers))
    return folder


@pytest.fixture
def folder(pristine: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(pristine / "qwen3", tmp_path / "model"))


def rewrite(folder: Path, change: Callable[[Tensors], Any]) -> None:
    """Change the tensors of a checkpoint and write them as one file without an index."""
    tensors: Tensors = {}
    for shard in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(shard)
        shard.unlink()
    (folder / INDEX).unlink(missing_ok=True)
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def without(*stems: str) -> Callable[[Tensors], None]:
    def drop(tensors: Tensors) -> None:
        for name in [name for name in tensors if name.startswith(stems)]:
            del tensors[name]

    return drop


def set_config(folder: Path, **fields: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] |= fields.pop("quantization_config", {})
    (folder / "config.json").write_text(json.dumps(config | fields))


def narrow(tensors: Tensors) -> None:
    name = f"{MLP}.down_proj.weight"
    tensors[name] = tensors[name].view(torch.uint8)[:256].view(torch.float8_e4m3fn)
    tensors[f"{name}_scale_inv"] = tensors[f"{name}_scale_inv"][:2].contiguous()


@pytest.mark.parametrize(
    ("architecture", "change", "expected"),
    [
        ("qwen3", without("model.layers.1."), r"layers\.1: no tensor; .*num_hidden_layers is 2, 1 lack"),
        ("qwen3", without(f"{MLP}.up_proj"), rf"{MLP}\.up_proj\.weight: absent, and {MLP} has down_proj, gate_proj"),
        ("qwen3", without("lm_head."), r"lm_head\.weight: absent, and config\.json: tie_word_embeddings is false"),
        ("qwen3", narrow, rf"{MLP}: gate_proj \[768, 512\], up_proj \[768, 512\], down_proj \[256, 768\]; expected"),
        ("qwen3", without("model.embed_tokens."), "the model's embedding: absent"),
        ("qwen3", without("model.norm."), "the model's last norm: absent"),
        ("qwen3", without("model.layers.0.input_layernorm"), r"model\.layers\.0\.input_layernorm\.weight: absent"),
        ("qwen3", without("model.layers.1.self_attn.k_norm"), r"layers\.1\.self_attn\.k_norm\.weight: absent"),
        ("deepseek_v3", without("model.layers.0.post_attention"), r"0\.post_attention_layernorm\.weight: absent"),
        ("deepseek_v3", without("model.layers.2.self_attn.kv_a_l"), r"2\.self_attn\.kv_a_layernorm\.weight: absent"),
        ("deepseek_v3", without("model.layers.1.mlp.gate.e_"), r"1\.mlp\.gate\.e_score_correction_bias: absent"),
        ("qwen3_moe", without("model.layers.0.mlp.gate."), r"model\.layers\.0\.mlp\.gate\.weight: absent"),
        ("qwen3_moe", without(f"{EXPERTS}.7."), rf"{EXPERTS}\.7: no tensor; 7 of 8 experts are there"),
        ("qwen3_moe", without(f"{EXPERTS}.2.down_proj"), rf"{EXPERTS}\.2\.down_proj\.weight: absent"),
    ],
)
def test_layers_that_are_not_whole(
    pristine: Path, tmp_path: Path, architecture: str, change: Callable[[Tensors], None], expected: str
) -> None:
    folder = Path(shutil.copytree(pristine / architecture, tmp_path / "model"))
    rewrite(folder, lambda tensors: None)
    verify_checkpoint(folder)
    rewrite(folder, change)
    with pytest.raises(CheckpointError, match=expected):
        verify_checkpoint(folder)


def test_layers_of_other_modules_may_have_other_norms(folder: Path) -> None:
    """As where some layers attend by a recurrence and are normalised elsewhere."""

    def rename(tensors: Tensors) -> None:
        for name in [name for name in tensors if name.startswith("model.layers.1.self_attn.")]:
            tensors[name.replace("self_attn", "linear_attn")] = tensors.pop(name)
        del tensors["model.layers.1.input_layernorm.weight"], tensors["model.layers.1.linear_attn.k_norm.weight"]

    rewrite(folder, rename)
    verify_checkpoint(folder)


def test_a_vector_that_most_layers_lack_is_not_missing(pristine: Path, tmp_path: Path) -> None:
    """As the sinks of attention in some layers."""
    folder = Path(shutil.copytree(pristine / "deepseek_v3", tmp_path / "model"))
    rewrite(folder, lambda tensors: tensors.update({"model.layers.1.self_attn.sinks": torch.ones(4)}))
    verify_checkpoint(folder)
    rewrite(folder, lambda tensors: tensors.update({"model.layers.2.self_attn.sinks": torch.ones(4)}))
    with pytest.raises(CheckpointError, match=r"model\.layers\.0\.self_attn\.sinks: absent, and 2 layers like it have"):
        verify_checkpoint(folder)


@pytest.mark.parametrize("module", ["lm_head", "model.embed_tokens", "model.layers.2.shared_head.head"])
def test_codes_where_vllm_builds_an_unquantised_layer(folder: Path, module: str) -> None:
    def quantise(tensors: Tensors) -> None:
        tensors[f"{module}.weight"] = torch.zeros(1024, 512, dtype=torch.float8_e4m3fn)
        tensors[f"{module}.weight_scale_inv"] = torch.ones(8, 4)

    rewrite(folder, quantise)
    with pytest.raises(CheckpointError, match=rf"{module}\.weight: F8_E4M3; expected BF16: vLLM builds embeddings"):
        verify_checkpoint(folder)


def test_tied_embeddings_need_no_head(folder: Path) -> None:
    rewrite(folder, without("lm_head."))
    set_config(folder, tie_word_embeddings=True)
    verify_checkpoint(folder)


def test_mlp_without_a_gate_is_whole(folder: Path) -> None:
    rewrite(folder, without(*(f"model.layers.{layer}.mlp.gate_proj" for layer in range(2))))
    verify_checkpoint(folder)


@pytest.mark.parametrize("name", ["weight_scale", "input_scale"])
def test_scales_of_another_format_beside_ours(folder: Path, name: str) -> None:
    rewrite(folder, lambda tensors: tensors.update({f"{MLP}.gate_proj.{name}": torch.ones(6, 4)}))
    with pytest.raises(CheckpointError, match=rf"{MLP}\.gate_proj\.{name}: beside {MLP}\.gate_proj\.weight_scale_inv"):
        verify_checkpoint(folder)


def test_module_that_is_quantised_and_listed_as_not(folder: Path) -> None:
    set_config(folder, quantization_config={"modules_to_not_convert": ["lm_head", f"{MLP}.gate_proj"]})
    with pytest.raises(CheckpointError, match=rf"{MLP}\.gate_proj\.weight: F8_E4M3, and config.json lists"):
        verify_checkpoint(folder)


def test_names_of_files(folder: Path) -> None:
    index = json.loads((folder / INDEX).read_text())
    first, second = sorted(folder.glob("*.safetensors"))

    def rename(name: str) -> None:
        (folder / name).write_bytes(second.read_bytes())
        renamed = {tensor: name if shard == second.name else shard for tensor, shard in index["weight_map"].items()}
        (folder / INDEX).write_text(json.dumps({"weight_map": renamed}))

    rename("an odd näme.part.safetensors")
    verify_checkpoint(folder)
    rename("weights.bin")  # vLLM looks for *.safetensors alone
    with pytest.raises(
        CheckpointError, match=r"in 'weights\.bin'; expected a file of the same folder, \*\.safetensors"
    ):
        verify_checkpoint(folder)


def test_file_that_vllm_would_load_instead(folder: Path) -> None:
    save_file({"norm.weight": torch.ones(1)}, folder / "old.safetensors")  # not in the index: nobody reads it
    verify_checkpoint(folder)
    save_file({"norm.weight": torch.ones(1)}, folder / "consolidated.safetensors")
    with pytest.raises(CheckpointError, match="consolidated.safetensors: Mistral's own format"):
        verify_checkpoint(folder)


@pytest.mark.parametrize("what", ["absent", "folder", "pipe", "dangling link", "Git LFS"])
def test_shard_that_is_no_file_without_an_index(folder: Path, what: str) -> None:
    (folder / INDEX).unlink()
    shard = sorted(folder.glob("*.safetensors"))[1]
    shard.unlink()
    match what:
        case "folder":
            shard.mkdir()
        case "pipe":
            os.mkfifo(shard)
        case "dangling link":
            shard.symlink_to("../blobs/0")
        case "Git LFS":
            shard.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    expected = {"absent": "fetch the missing shard", "Git LFS": "run `git lfs pull`"}.get(what, "not a file, or a link")
    with pytest.raises(CheckpointError, match=f"model-00002-of-00002.safetensors: .*{expected}"):
        verify_checkpoint(folder)


def test_snapshot_of_links_in_a_folder_that_cannot_be_written(folder: Path, tmp_path: Path) -> None:
    """As Hugging Face's cache lays files out."""
    snapshot = tmp_path / "snapshots" / "0"
    snapshot.mkdir(parents=True)
    for number, file in enumerate(sorted(folder.iterdir())):
        blob = tmp_path / f"{number:040x}"
        shutil.copy(file, blob)
        (snapshot / file.name).symlink_to(blob)
    snapshot.chmod(0o555)
    verify_checkpoint(snapshot)
    assert len(list(snapshot.iterdir())) == len(list(folder.iterdir()))
    snapshot.chmod(0o755)
