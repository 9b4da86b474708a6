"""`fp8-backend inspect` on generated checkpoints, on poisoned ones, and on headers of 700 GB without their bytes."""

from __future__ import annotations

import io
import json
import re
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from demo.architectures import SIZES
from demo.checkpoint import dequantize_checkpoint, write_checkpoint
from fp8_backend.cli import main
from fp8_backend.errors import CheckpointError
from fp8_backend.progress import Progress
from fp8_backend.weights.files import INDEX
from fp8_backend.weights.shards import Layer, reason
from fp8_backend.weights.tensor_reader import ShardReader

GATE = "model.layers.*.mlp.gate_proj.weight"
SIZE = replace(SIZES["qwen3", "demo"], layers=2)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    write_checkpoint(tmp_path / "model", "qwen3", SIZE)
    return tmp_path / "model"


def inspect(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> tuple[int, dict[str, Any]]:
    code = main(["inspect", *map(str, arguments), "--json"])
    return code, json.loads(capsys.readouterr().out)


def kinds(report: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {kind["pattern"]: kind for kind in report["kinds"]}


def test_counts_each_kind_of_layer(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, report = inspect(capsys, model)
    assert (code, report["servable"], report["problem"], report["findings"]) == (0, True, None, None)
    files = [load_file(path) for path in model.glob("*.safetensors")]
    stored = {name: tensor for file in files for name, tensor in file.items()}
    assert report["bytes"] == sum(tensor.nbytes for tensor in stored.values())
    assert report["tensors"] == len(stored)
    gate = kinds(report)[GATE]
    assert (gate["count"], gate["dtype"], gate["shape"], gate["scale_dtype"]) == (2, "F8_E4M3", [768, 512], "BF16")
    assert (gate["scale_shape"], gate["block"]) == ([6, 4], [128, 128])
    assert gate["bytes"] == 2 * (768 * 512 + 2 * 6 * 4)
    assert kinds(report)["lm_head.weight"]["scale_dtype"] is None


def test_headers_alone_are_read_unless_asked(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for path in model.glob("*.safetensors"):
        data = path.read_bytes()
        begin = 8 + int.from_bytes(data[:8], "little")
        path.write_bytes(data[:begin] + b"\xff" * (len(data) - begin))  # every float NaN
    assert inspect(capsys, model)[0] == 0
    code, report = inspect(capsys, model, "--deep")
    assert code == 1
    assert sum("code NaN" in finding["what"] for finding in report["findings"]) == 14
    assert sum("scale NaN" in finding["what"] for finding in report["findings"]) == 14


def test_deep_finds_one_bad_value_and_its_place(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    home = json.loads((model / INDEX).read_text())["weight_map"][name]
    tensors = load_file(model / home)
    assert inspect(capsys, model, "--deep")[1]["findings"] == []
    tensors[name].view(torch.uint8)[700, 3] = 0xFF
    scale = tensors[f"{name}_scale_inv"]
    scale[0, 0], scale[1, 1], scale[2, 2], scale[3, 3], scale[4, 0], scale[5, 0] = -1.0, 0.0, float("inf"), 2e-13, 90, 1
    save_file(tensors, model / home)
    code, report = inspect(capsys, model, "--deep")
    assert code == 1
    assert all(finding["file"] == home and finding["tensor"].startswith(name) for finding in report["findings"])
    said = sorted((finding["what"], finding["fatal"]) for finding in report["findings"])
    assert [(what.partition("(")[0].strip(), fatal) for what, fatal in said] == [
        ("code NaN at [700, 3]", True),
        ("scale Inf", True),
        ("scale above 1: a reciprocal?", False),
        ("scale below 1e-12: a lost block?", False),
        ("scale negative", True),
        ("scale zero", True),
    ]
    data = (model / home).read_bytes()
    place = re.search(r"\(byte (\d+)\), 1 such in 393216$", said[0][0])
    assert data[int(place[1])] == 0xFF
    place = re.search(r"\(90 at \[4, 0\] \(byte (\d+)\), 1 such in 24\)$", said[2][0])
    assert torch.frombuffer(bytearray(data[int(place[1]) :][:2]), dtype=torch.bfloat16) == 90
    assert kinds(report)["model.layers.*.mlp.up_proj.weight"]["smallest_scale"] == -1.0


def test_range_of_scales_keeps_a_zero(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Zero is the smallest scale of all layers, also where it is not the last layer's."""
    for path in model.glob("*.safetensors"):
        tensors = load_file(path)
        for name in [name for name in tensors if name == "model.layers.0.mlp.gate_proj.weight_scale_inv"]:
            tensors[name][0, 0] = 0
        save_file(tensors, path)
    _, report = inspect(capsys, model, "--deep")
    assert kinds(report)[GATE]["smallest_scale"] == 0


def test_text_says_what_is_not_taken_and_why(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(model), "--tp", "5", "--deep"]) == 1
    said = capsys.readouterr()
    assert f"{GATE}, model.layers.*.mlp.up_proj.weight\n  output width 768 does not divide by 5 ranks" in said.out
    assert "input width 768 does not divide by 5 ranks: vLLM itself refuses" in said.out
    assert "cannot be served with --quantization deepgemm_fp8 --tensor-parallel-size 5" in said.out
    assert "reading [##############################] 100%" in said.err
    assert main(["inspect", str(model), "--tp", "4"]) == 0  # parts of 192 rows and columns, within blocks


def test_bf16_checkpoint_is_described_and_refused(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dequantize_checkpoint(model, tmp_path / "bf16")
    code, report = inspect(capsys, tmp_path / "bf16")
    assert (code, kinds(report)[GATE]["dtype"]) == (1, "BF16")
    assert "not an FP8 checkpoint" in report["problem"]


def test_broken_files_end_without_a_traceback(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    next(model.glob("*.safetensors")).unlink()
    assert main(["inspect", str(model)]) == 2
    assert capsys.readouterr().err.startswith("fp8-backend inspect: model-0000")


CONFIG = {"num_attention_heads": 12, "num_key_value_heads": 2}


@pytest.mark.parametrize(
    ("layer", "tp", "expected"),
    [
        # 12 heads of 128 over 4 ranks: 3 query heads each, and one of the 2 key heads, which two ranks share.
        (Layer("a.", ("q_proj", "k_proj", "v_proj"), (1536, 256, 256), 512), 4, None),
        (Layer("a.", ("q_proj", "k_proj", "v_proj"), (768, 128, 128), 512), 2, None),  # 64 rows of each key head
        (Layer("a.", ("q_proj", "k_proj", "v_proj"), (1536, 256, 256), 512), 8, "vLLM itself refuses"),
        (Layer("a.", ("q_proj", "k_proj", "v_proj"), (1536, 256, 256), 512), 3, "vLLM itself refuses"),
        (Layer("a.", ("q_a_proj", "kv_a_proj_with_mqa"), (1536, 576), 7168), 8, None),  # replicated
        (Layer("m.experts.0.", ("w1", "w3"), (1536, 1536), 4096), 7, "intermediate size 1536 does not divide by 7"),
        (Layer("m.experts.0.", ("w2",), (4096,), 1536), 8, None),
        (Layer("m.", ("down_proj",), (7168,), 18432), 8, None),
        (Layer("m.", ("down_proj",), (7168,), 18432), 5, "does not divide by 5 ranks"),
        (Layer("m.", ("gate_up_proj",), (2 * 768,), 256), 3, None),
        (Layer("m.", ("gate_up_proj",), (2 * 768,), 256), 4, None),  # cut within blocks, which meet at none
        (Layer("m.", ("gate_up_proj",), (2 * 768,), 256), 7, "does not divide by 7 ranks"),
        (Layer("m.", ("gate_up_proj",), (2 * 576,), 256), 1, "meet at row 576, within a block of 128"),
        (Layer("m.", ("qkv_proj",), (16 * 64,), 256), 2, None),
        (Layer("m.", ("qkv_proj",), (16 * 80,), 256), 2, "meet at row 960, within a block of 128"),
        (Layer("m.", ("qkv_proj",), (16 * 64,), 256), 8, "vLLM itself refuses"),
        (Layer("m.", ("made_up",), (256,), 256), 2, "unknown projection 'made_up'"),
        (Layer("m.", ("made_up",), (72,), 200), 1, None),
    ],
)
def test_parts_of_one_rank(layer: Layer, tp: int, expected: str | None) -> None:
    said = reason(layer, tp, CONFIG)
    assert said is None if expected is None else expected in str(said)


def huge(folder: Path) -> Iterator[str]:
    """Write the headers of DeepSeek-V3's experts in 2000 shards of 327 MB that occupy no disk; yield tensor names."""
    experts = [
        (f"model.layers.{layer}.mlp.experts.{expert}.{projection}.weight", shape)
        for layer in range(3, 61)
        for expert in range(256)
        for projection, shape in (("gate_proj", (2048, 7168)), ("up_proj", (2048, 7168)), ("down_proj", (7168, 2048)))
    ]
    index: dict[str, str] = {}
    for shard in range(2000):
        header, position, file_name = {}, 0, f"model-{shard + 1:05d}-of-02000.safetensors"
        for name, (n, k) in experts[shard::2000]:
            for tensor, dtype, shape, size in (
                (name, "F8_E4M3", [n, k], n * k),
                (f"{name}_scale_inv", "F32", [n // 128, k // 128], n * k // 4096),
            ):
                header[tensor] = {"dtype": dtype, "shape": shape, "data_offsets": [position, position + size]}
                position += size
                index[tensor] = file_name
                yield tensor
        text = json.dumps(header).encode()
        with (folder / file_name).open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            file.truncate(8 + len(text) + position)
    (folder / INDEX).write_text(json.dumps({"weight_map": index}))


def test_700_gb_are_inspected_in_seconds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tensors = sum(1 for _ in huge(tmp_path))
    quantization = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": quantization}))
    began = time.process_time()
    code, report = inspect(capsys, tmp_path, "--tp", "16")
    seconds = time.process_time() - began
    assert (code, report["tensors"], tensors, report["shards"]) == (0, tensors, 89088, 2000)
    assert report["bytes"] > 650e9
    # Processor time, 1 s on one 2-core machine. Reading a byte of data per tensor would not show here, but
    # test_headers_alone_are_read_unless_asked would.
    assert seconds < 10


def test_file_cut_while_it_is_read(model: Path) -> None:
    shard = sorted(model.glob("*.safetensors"))[0]
    with ShardReader(shard) as reader:
        name = list(reader.info)[-1]
        with shard.open("r+b") as file:
            file.truncate(shard.stat().st_size - 100)
        with pytest.raises(CheckpointError, match=f"{shard.name}: {name}: ends at byte .* expected 100 more"):
            reader.read(name)


def test_progress_in_a_log_is_a_line_at_the_end() -> None:
    stream = io.StringIO()
    with Progress("packing", 2_000_000_000, stream=stream) as progress:
        for _ in range(4):
            progress.advance(500_000_000)
    assert stream.getvalue().count("\n") == 1
    assert stream.getvalue().startswith(f"packing [{'#' * 30}] 100% of 2.00 GB")
