"""Config and tensors in each way in which they can be wrong, named by the message; and what the demo generates."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from demo.architectures import SIZES, TensorSpec
from demo.checkpoint import dequantize_checkpoint, generate, write_checkpoint
from demo.tokenizer import SPECIAL
from demo.twin import INDEX
from fp8_backend.errors import CheckpointError
from fp8_backend.kernels.reference import BLOCK, dequantize
from fp8_backend.weights.checkpoint import CheckpointSummary, verify_checkpoint

UP = "model.layers.0.mlp.up_proj.weight"
UP_SCALE = f"{UP}_scale_inv"
# The smallest model that has a dense and an MoE layer.
TINY = replace(
    SIZES["deepseek_v3", "demo"], layers=2, hidden=256, heads=2, kv_heads=2, intermediate=384, shards=2,
    experts=4, moe_intermediate=128, q_lora=128,
)  # fmt: skip


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pristine") / "model"
    write_checkpoint(folder, "deepseek_v3", TINY)
    return folder


@pytest.fixture
def folder(pristine: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(pristine, tmp_path / "model"))


def home(folder: Path, tensor: str) -> Path:
    return folder / json.loads((folder / INDEX).read_text())["weight_map"][tensor]


def edit_tensors(folder: Path, tensor: str, edit: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    """Rewrite the shard that holds `tensor`, and the index, after `edit` changed the shard's tensors in place."""
    shard = home(folder, tensor)
    tensors = load_file(shard)
    edit(tensors)
    save_file(tensors, shard)
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"] = {
        name: file for name, file in index["weight_map"].items() if file != shard.name
    } | dict.fromkeys(tensors, shard.name)
    (folder / INDEX).write_text(json.dumps(index))


def edit_config(folder: Path, edit: Callable[[dict[str, Any]], Any]) -> None:
    config = json.loads((folder / "config.json").read_text())
    edit(config)
    (folder / "config.json").write_text(json.dumps(config))


def refusal(folder: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        verify_checkpoint(folder)
    return str(caught.value)


@pytest.mark.parametrize("architecture", ["deepseek_v3", "qwen3", "qwen3_moe"])
def test_generated_checkpoints_pass(architecture: Any, tmp_path: Path) -> None:
    size = SIZES[architecture, "demo"]
    write_checkpoint(tmp_path / "model", architecture, size)
    summary = verify_checkpoint(tmp_path / "model")
    assert (summary.layers, summary.shards) == (size.layers, size.shards)
    assert summary.shards >= 2
    assert summary.fp8_bytes > summary.total_bytes // 2


def test_counts(pristine: Path) -> None:
    files = list(pristine.glob("*.safetensors"))
    tensors = {name: tensor for file in files for name, tensor in load_file(file).items()}
    fp8 = [tensor for tensor in tensors.values() if tensor.dtype == torch.float8_e4m3fn]
    assert verify_checkpoint(pristine) == CheckpointSummary(
        architecture="DeepseekV3ForCausalLM",
        shards=2,
        tensors=len(tensors),
        layers=2,
        fp8_weights=len(fp8),
        fp8_bytes=sum(tensor.nbytes for tensor in fp8),
        total_bytes=sum(tensor.nbytes for tensor in tensors.values()),
    )


def test_single_file_without_index(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, "deepseek_v3", replace(TINY, shards=1))
    assert [path.name for path in tmp_path.glob("*.safetensors*")] == ["model.safetensors"]
    assert verify_checkpoint(tmp_path).shards == 1


# Qwen's published checkpoints hold their scales in two bytes; float32 holds each exactly.
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_scales_of_two_bytes_pass(folder: Path, dtype: torch.dtype) -> None:
    edit_tensors(folder, UP_SCALE, lambda tensors: tensors.update({UP_SCALE: tensors[UP_SCALE].to(dtype)}))
    verify_checkpoint(folder)


def test_bf16_checkpoint(folder: Path, tmp_path: Path) -> None:
    dequantize_checkpoint(folder, tmp_path / "bf16")
    message = refusal(tmp_path / "bf16")
    assert "quantization_config is None: not an FP8 checkpoint (dtype bfloat16)" in message
    assert message.endswith("serve it without --quantization deepgemm_fp8")


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("quant_method", "awq", "quant_method is 'awq'; expected 'fp8'"),
        ("weight_block_size", None, "no weight_block_size: FP8 with one scale a tensor; expected [128, 128]"),
        ("weight_block_size", [64, 128], "weight_block_size is [64, 128]; expected [128, 128]"),
        ("weight_block_size", "128", "weight_block_size is '128'; expected [128, 128]"),
        ("activation_scheme", "static", "activation_scheme is 'static'; expected 'dynamic'"),
        ("fmt", "e5m2", "fmt is 'e5m2'; expected 'e4m3'"),
        ("modules_to_not_convert", "lm_head", "modules_to_not_convert is 'lm_head'; expected a list of names"),
    ],
)
def test_unsupported_quantization_config(folder: Path, field: str, value: Any, expected: str) -> None:
    edit_config(folder, lambda config: config["quantization_config"].update({field: value}))
    assert expected in refusal(folder)


def test_config_says_fp8_and_weights_are_not(folder: Path, tmp_path: Path) -> None:
    dequantize_checkpoint(folder, tmp_path / "bf16")
    shutil.copyfile(folder / "config.json", tmp_path / "bf16" / "config.json")
    assert "none of" in refusal(tmp_path / "bf16")


@pytest.mark.parametrize("text", ["{", "[]", "\xff"])
def test_config_is_not_a_json_object(folder: Path, text: str) -> None:
    (folder / "config.json").write_text(text, encoding="latin-1")
    assert "config.json" in refusal(folder)


def test_files_absent(folder: Path) -> None:
    (folder / "config.json").rename(folder / "elsewhere.json")
    assert "config.json: absent" in refusal(folder)
    assert "not a folder" in refusal(folder / "config.json")
    (folder / "elsewhere.json").rename(folder / "config.json")
    for path in folder.glob("*.safetensors*"):
        path.unlink()
    assert "holds no *.safetensors file" in refusal(folder)


def test_scale_missing(folder: Path) -> None:
    edit_tensors(folder, UP_SCALE, lambda tensors: tensors.pop(UP_SCALE))
    assert refusal(folder).startswith(f"{UP}: F8_E4M3 [384, 256] without {UP_SCALE}")


def test_scale_without_fp8_weight(folder: Path) -> None:
    edit_tensors(folder, UP, lambda tensors: tensors.update({UP: tensors[UP].bfloat16()}))
    assert refusal(folder).startswith(f"{UP_SCALE}: a scale of a BF16 weight")
    edit_tensors(folder, UP_SCALE, lambda tensors: tensors.pop(UP))
    assert refusal(folder).startswith(f"{UP_SCALE}: a scale of no weight")


def test_scale_shape(folder: Path) -> None:
    edit_tensors(folder, UP_SCALE, lambda tensors: tensors.update({UP_SCALE: tensors[UP_SCALE].t().contiguous()}))
    assert refusal(folder).startswith(f"{UP_SCALE}: shape [2, 3]; expected [3, 2]")


def test_fp8_tensor_of_one_dimension(folder: Path) -> None:
    def flatten(tensors: dict[str, torch.Tensor]) -> None:
        tensors[UP] = tensors[UP].flatten()

    edit_tensors(folder, UP, flatten)
    assert refusal(folder).startswith(f"{UP}: F8_E4M3 of shape [98304]; expected [n, k] or [experts, n, k]")


def test_scale_dtype(folder: Path) -> None:
    edit_tensors(folder, UP_SCALE, lambda tensors: tensors.update({UP_SCALE: tensors[UP_SCALE].double()}))
    assert refusal(folder).startswith(f"{UP_SCALE}: dtype F64; expected one of F32, BF16, F16")


@pytest.mark.parametrize("value", [float("nan"), -1.0, 0.0, float("inf")])
def test_scale_value(folder: Path, value: float) -> None:
    def poison(tensors: dict[str, torch.Tensor]) -> None:
        tensors[UP_SCALE][2, 1] = value

    edit_tensors(folder, UP_SCALE, poison)
    message = refusal(folder)
    assert message.startswith(f"{UP_SCALE}: {value:g} at [2, 1], 1 such in 6")
    assert home(folder, UP_SCALE).name in message


def test_weight_left_unquantised_in_one_layer(folder: Path) -> None:
    name = "model.layers.1.self_attn.o_proj.weight"

    def unquantise(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name] = tensors[name].bfloat16()
        del tensors[f"{name}_scale_inv"]

    edit_tensors(folder, name, unquantise)
    assert refusal(folder).startswith(f"{name}: BF16, and the same weight of other layers is F8_E4M3")
    edit_config(
        folder,
        lambda config: config["quantization_config"]["modules_to_not_convert"].append(name.removesuffix(".weight")),
    )
    verify_checkpoint(folder)


@pytest.mark.parametrize(
    ("architecture", "change"),
    [("qwen3", {"head_dim": 64, "heads": 3}), ("qwen3", {"intermediate": 576}), ("deepseek_v3", {"q_lora": 192})],
)
def test_merged_parts_may_end_within_a_block(architecture: Any, change: dict[str, int], tmp_path: Path) -> None:
    write_checkpoint(tmp_path, architecture, replace(SIZES[architecture, "demo"], layers=2, **change))
    verify_checkpoint(tmp_path)


def test_merged_layer_of_two_dtypes(folder: Path) -> None:
    def unquantise(tensors: dict[str, torch.Tensor]) -> None:
        tensors[UP] = tensors[UP].bfloat16()
        del tensors[UP_SCALE]

    edit_tensors(folder, UP, unquantise)
    assert f"{UP} BF16: merged into one layer" in refusal(folder)


def test_bf16_twin_holds_codes_times_scale(pristine: Path, tmp_path: Path) -> None:
    dequantize_checkpoint(pristine, tmp_path)
    fp8 = load_file(home(pristine, UP))
    with safe_open(home(tmp_path, UP), "pt") as twin:
        assert torch.equal(twin.get_tensor(UP), dequantize(fp8[UP], fp8[UP_SCALE], BLOCK).bfloat16())
    assert UP_SCALE not in json.loads((tmp_path / INDEX).read_text())["weight_map"]


@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.bfloat16])
def test_generated_weight_is_reproducible_and_scales_differ(scale_dtype: torch.dtype) -> None:
    spec = TensorSpec("w.weight", (200, 300), "fp8")  # neither width a multiple of the block
    first, second = (generate(spec, scale_dtype, 7, torch.device("cpu")) for _ in range(2))
    other = generate(spec, scale_dtype, 8, torch.device("cpu"))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["w.weight"].float(), other["w.weight"].float())
    scale = first["w.weight_scale_inv"]
    assert (scale.shape, scale.dtype) == ((2, 3), scale_dtype)
    assert scale.unique().numel() == 6
    # Every block uses e4m3's whole range; a scale rounded to bf16 moves the largest code by at most one step of 32.
    assert first["w.weight"].float().abs()[:128, :128].max() >= 416


def test_tokenizer_loads_offline_and_has_one_token_an_id(pristine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    transformers = pytest.importorskip("transformers", reason="transformers comes with vLLM, which is not installed")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    tokenizer = transformers.AutoTokenizer.from_pretrained(pristine)
    assert len(tokenizer) == TINY.vocab
    text = "the old man went down to the river"
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids) == text
    assert not set(ids) & set(tokenizer.convert_tokens_to_ids(list(SPECIAL)))
    assert tokenizer.decode([TINY.vocab - 1])
