"""`fp8-backend quantize` and `dequantize` on real checkpoints: values, files and what is kept."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from demo.architectures import SIZES
from demo.checkpoint import dequantize_checkpoint, write_checkpoint
from fp8_backend.cli import main
from fp8_backend.kernels.reference import BLOCK, dequantize, relative_error
from fp8_backend.weights.block_quant import block_errors, quantize_blocks
from fp8_backend.weights.checkpoint import verify_checkpoint
from fp8_backend.weights.files import INDEX, open_checkpoint
from fp8_backend.weights.formats import read_format
from fp8_backend.weights.selection import select

EXPERT = "model.layers.1.mlp.experts.3.up_proj.weight"


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def config(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


@pytest.fixture(scope="module")
def quantized(bf16: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("quantized") / "out"
    assert main(["quantize", str(bf16), str(out), "--workers", "2"]) == 0
    return out


def test_result_is_complete_and_close(bf16: Path, quantized: Path) -> None:
    summary = verify_checkpoint(quantized)
    assert (summary.shards, summary.fp8_weights) == (3, 2 * (4 + 4 * 3))
    before, after = tensors(bf16), tensors(quantized)
    assert set(before) == {name for name in after if not name.endswith("_scale_inv")}
    for name, weight in before.items():
        if after[name].dtype == torch.float8_e4m3fn:
            scale = after[f"{name}_scale_inv"]
            assert (scale.dtype, after[name].shape) == (torch.float32, weight.shape)
            assert relative_error(dequantize(after[name], scale, BLOCK), weight) < 0.03
        else:
            assert torch.equal(after[name], weight)
    written = config(quantized)
    assert written.pop("quantization_config") == {
        "quant_method": "fp8",
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "weight_block_size": [128, 128],
        "modules_to_not_convert": [
            "lm_head", "model.embed_tokens", "model.layers.0.mlp.gate", "model.layers.1.mlp.gate",
        ],
    }  # fmt: skip
    assert written == config(bf16)
    index = json.loads((quantized / INDEX).read_text())
    assert set(index["weight_map"]) == set(after)
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in after.values())
    assert (quantized / "tokenizer.json").read_bytes() == (bf16 / "tokenizer.json").read_bytes()
    assert not list(quantized.glob(".*"))


def test_dequantize_gives_codes_times_scale(quantized: Path, tmp_path: Path) -> None:
    assert main(["dequantize", str(quantized), str(tmp_path / "out"), "--workers", "1"]) == 0
    dequantize_checkpoint(quantized, tmp_path / "expected")
    expected, got = tensors(tmp_path / "expected"), tensors(tmp_path / "out")
    assert set(expected) == set(got)
    assert all(torch.equal(expected[name], got[name]) for name in expected)
    assert config(tmp_path / "out") == config(tmp_path / "expected")
    assert json.loads((tmp_path / "out" / INDEX).read_text()) == json.loads((tmp_path / "expected" / INDEX).read_text())


@pytest.mark.parametrize(("method", "scales"), [("fp8", "ue8m0"), ("fp8", "e8m0"), ("compressed-tensors", "ue8m0")])
def test_other_formats_pass_and_come_back_exactly(bf16: Path, tmp_path: Path, scales: str, method: str) -> None:
    out, back, again = tmp_path / "fp8", tmp_path / "bf16", tmp_path / "again"
    options = ["--scales", scales, "--format", method, "--workers", "1"]
    assert main(["quantize", str(bf16), str(out), *options]) == 0
    assert verify_checkpoint(out).fp8_weights == 32
    fp8_format = read_format(config(out))
    assert (fp8_format.method, fp8_format.power_of_two) == (method, method == "fp8")
    stored = tensors(out)
    scale = stored[fp8_format.scale_name(EXPERT)]
    assert scale.dtype == (torch.float32 if scales == "ue8m0" else torch.float8_e8m0fnu)
    assert (torch.frexp(scale.float())[0] == 0.5).all()
    # A code times a power of two is a bf16 number: nothing is lost on the way back, and quantising it again finds the
    # same values. (The scales may differ: a block need not use the last of its range.)
    assert main(["dequantize", str(out), str(back), "--workers", "1"]) == 0
    assert torch.equal(tensors(back)[EXPERT].double(), dequantize(stored[EXPERT], scale.double(), BLOCK, torch.float64))
    assert main(["quantize", str(back), str(again), *options]) == 0
    values = tensors(again)
    assert torch.equal(
        dequantize(values[EXPERT], values[fp8_format.scale_name(EXPERT)].float(), BLOCK),
        dequantize(stored[EXPERT], scale.float(), BLOCK),
    )


@pytest.mark.parametrize(("n", "k"), [(1, 1), (127, 129), (128, 128), (300, 200)])
def test_blocks(n: int, k: int) -> None:
    weight = torch.randn(n, k, generator=torch.Generator().manual_seed(n))
    weight[:1, :1] = 0 if n == 1 else 3e4  # a block of zeros, and a range that float16 would not hold
    codes, scale = quantize_blocks(weight, "float32")
    for row in range(0, n, BLOCK):
        for column in range(0, k, BLOCK):
            block = weight[row : row + BLOCK, column : column + BLOCK]
            amax = block.abs().max()
            assert scale[row // BLOCK, column // BLOCK] == (amax / 448 if amax > 0 else 1)
            part = codes[row : row + BLOCK, column : column + BLOCK].float()
            assert torch.equal(part, (block / scale[row // BLOCK, column // BLOCK]).to(torch.float8_e4m3fn).float())
    errors, norms = block_errors(weight, codes, scale)
    assert float(norms.sum()) == pytest.approx(float(weight.double().square().sum()))
    assert float(errors.sum()) == pytest.approx(
        float((dequantize(codes, scale, BLOCK) - weight).double().square().sum()), rel=1e-6, abs=1e-30
    )


def test_report_names_the_worst_block(bf16: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = copy(bf16, tmp_path / "source")
    shard = source / json.loads((source / INDEX).read_text())["weight_map"][EXPERT]
    held = load_file(shard)
    # The rest of the source was quantised before and comes out nearly exact; new numbers do not.
    held[EXPERT][128:256, 256:384] = torch.randn(128, 128, generator=torch.Generator().manual_seed(0)) / 100
    save_file(held, shard)
    assert main(["quantize", str(source), str(tmp_path / "out"), "--json", "--workers", "1"]) == 0
    report = json.loads(capsys.readouterr().out)
    by_name = {error["tensor"] for error in report["errors"]}
    worst = max(report["errors"], key=lambda error: error["worst_block_error"])
    assert (worst["tensor"], worst["worst_block"]) == (EXPERT, [1, 2])
    assert len(by_name) == 32
    assert report["kept"]["lm_head.weight"] == "lm_head"
    assert report["kept"]["model.layers.0.mlp.gate.weight"] == "router"
    assert main(["quantize", str(source), str(tmp_path / "text"), "--workers", "1"]) == 0
    said = capsys.readouterr().out
    assert "worst blocks" in said and "router: 2 tensors (model.layers.*.mlp.gate.weight)" in said


def copy(source: Path, out: Path) -> Path:
    out.mkdir()
    for path in source.iterdir():
        (out / path.name).write_bytes(path.read_bytes())
    return out


def test_kept_weights_take_the_rest_of_their_layer_along(bf16: Path) -> None:
    checkpoint = open_checkpoint(bf16, config(bf16))
    _, kept = select(checkpoint, re.compile(r"layers\.0\.self_attn\.k_proj|layers\.1\.mlp\.experts\.2\.down_proj"))
    also = [name for name, why in kept.items() if why == "served as one layer with weights that are kept"]
    assert sum("layers.0.self_attn" in name for name in also) == 2  # q and v
    assert sum("layers.1.mlp.experts" in name for name in also) == 11


def test_widths_that_vllm_cannot_merge_are_kept(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "fp8", "qwen3", replace(SIZES["qwen3", "demo"], layers=1, head_dim=64, kv_heads=1))
    dequantize_checkpoint(tmp_path / "fp8", tmp_path / "bf16")
    assert main(["quantize", str(tmp_path / "bf16"), str(tmp_path / "out"), "--workers", "1"]) == 0
    assert verify_checkpoint(tmp_path / "out").fp8_weights == 4  # o, gate, up, down
    assert (
        "model.layers.0.self_attn.q_proj" in config(tmp_path / "out")["quantization_config"]["modules_to_not_convert"]
    )


@pytest.mark.parametrize("method", ["fp8", "compressed-tensors"])
def test_experts_stored_as_one_tensor_are_kept_and_listed(tmp_path: Path, method: Any) -> None:
    """No tensor bears the name of vLLM's layer of experts, which would be built in FP8 and never filled."""
    source, out = tmp_path / "source", tmp_path / "out"
    source.mkdir()
    layer = "model.layers.0"
    weights = {
        f"{layer}.mlp.experts.gate_up_proj": torch.randn(4, 512, 256),
        f"{layer}.mlp.experts.down_proj": torch.randn(4, 256, 256),
        f"{layer}.self_attn.o_proj.weight": torch.randn(256, 256),
    }
    save_file({name: weight.bfloat16() for name, weight in weights.items()}, source / "model.safetensors")
    (source / "config.json").write_text("{}")
    assert main(["quantize", str(source), str(out), "--workers", "1", "--format", method]) == 0
    form = read_format(config(out))
    assert form.lists_experts(f"{layer}.mlp.experts")
    assert not form.lists(f"{layer}.mlp.shared_experts.up_proj") and not form.lists(f"{layer}.self_attn.o_proj")
    # How vLLM's own configurations read the list.
    entries = [entry for entry in form.skipped if "experts" in entry]
    if method == "fp8":
        assert entries == [f"{layer}.mlp.experts"]
    else:
        assert re.match(entries[0].removeprefix("re:"), f"{layer}.mlp.experts.0.gate_proj")


def test_columns_that_vllm_does_not_take_are_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """vLLM's own quantisation of activations asserts whole groups of 128; experts of one layer are kept together."""
    source, experts = tmp_path / "source", "model.layers.0.mlp.experts"
    source.mkdir()
    weights = {
        f"{experts}.{expert}.{name}.weight": torch.randn(*shape)
        for expert in range(2)
        for name, shape in (("gate_proj", (192, 256)), ("up_proj", (192, 256)), ("down_proj", (256, 192)))
    }
    save_file(weights, source / "model.safetensors")
    (source / "config.json").write_text("{}")
    assert main(["quantize", str(source), str(tmp_path / "none"), "--workers", "1"]) == 2
    assert "none of 6 tensors is a weight to quantise (192 columns: vLLM's own FP8" in capsys.readouterr().err
    weights["model.layers.0.self_attn.o_proj.weight"] = torch.randn(200, 256)  # rows may end anywhere
    save_file(weights, source / "model.safetensors")
    assert main(["quantize", str(source), str(tmp_path / "out"), "--workers", "1"]) == 0
    assert verify_checkpoint(tmp_path / "out").fp8_weights == 1
    assert read_format(config(tmp_path / "out")).lists_experts(experts)


def test_projections_of_one_tensor_that_meet_within_a_block_are_kept(tmp_path: Path) -> None:
    """A block's scale would belong to gate and up, which no rank can then split."""
    source, out = tmp_path / "source", tmp_path / "out"
    source.mkdir()
    widths = {"0": 192, "1": 256}
    weights = {f"model.layers.{layer}.mlp.gate_up_proj.weight": torch.randn(2 * n, 256) for layer, n in widths.items()}
    save_file(weights, source / "model.safetensors")
    (source / "config.json").write_text("{}")
    assert main(["quantize", str(source), str(out), "--workers", "1"]) == 0
    dtypes = {name: tensor.dtype for name, tensor in tensors(out).items() if name.endswith(".weight")}
    assert list(dtypes.values()) == [torch.float32, torch.float8_e4m3fn]
    assert config(out)["quantization_config"]["modules_to_not_convert"] == ["model.layers.0.mlp.gate_up_proj"]


@pytest.mark.parametrize("magnitude", [1e-25, 1.0, 1e25])
def test_error_of_weights_whose_squares_leave_the_range_of_float32(magnitude: float) -> None:
    weight = torch.randn(256, 256, generator=torch.Generator().manual_seed(0)) * magnitude
    errors, norms = block_errors(weight, *quantize_blocks(weight, "float32"))
    assert ((errors / norms).sqrt() - 0.0265).abs().max() < 0.001
