"""One broken shard or index for each way in which files can be broken; every message names the file and its fault."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from demo.architectures import SIZES
from demo.checkpoint import write_checkpoint
from demo.twin import INDEX
from fp8_backend.errors import CheckpointError
from fp8_backend.weights.checkpoint import verify_checkpoint

UP = "model.layers.0.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pristine") / "model"
    write_checkpoint(folder, "qwen3", replace(SIZES["qwen3", "demo"], layers=2, hidden=256, intermediate=384, shards=2))
    return folder


@pytest.fixture
def folder(pristine: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(pristine, tmp_path / "model"))


def home(folder: Path, tensor: str) -> Path:
    return folder / json.loads((folder / INDEX).read_text())["weight_map"][tensor]


def edit_header(shard: Path, edit: Callable[[dict[str, Any]], Any]) -> None:
    data = shard.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    edit(header)
    text = json.dumps(header).encode()
    shard.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])


def refusal(folder: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        verify_checkpoint(folder)
    return str(caught.value)


def test_shard_truncated(folder: Path) -> None:
    shard = home(folder, UP)
    size = shard.stat().st_size
    with shard.open("r+b") as file:
        file.truncate(size - 1000)
    message = refusal(folder)
    assert message.startswith(f"{shard.name}: ")
    assert "the file is truncated: fetch it again" in message


@pytest.mark.parametrize("size", [0, 5, 8, 100])
def test_shard_truncated_within_its_header(folder: Path, size: int) -> None:
    shard = home(folder, UP)
    with shard.open("r+b") as file:
        file.truncate(size)
    assert f"in a file of {size}" in refusal(folder)


def test_shard_longer_than_its_header_says(folder: Path) -> None:
    with home(folder, UP).open("ab") as file:
        file.write(b"\0")
    assert "longer than its tensors" in refusal(folder)


def test_header_longer_than_the_limit(folder: Path) -> None:
    with home(folder, UP).open("r+b") as file:
        file.write((1 << 62).to_bytes(8, "little"))
    assert f"header of {1 << 62} bytes" in refusal(folder)


def test_header_of_more_numbers_than_can_be_multiplied(folder: Path) -> None:
    """The product of this shape has 25 million bits; multiplying on costs hours."""
    edit_header(home(folder, UP), lambda header: header[UP].update(shape=[2**62] * 400_000))
    began = time.process_time()
    message = refusal(folder)
    assert "expected F8_E4M3 [4611686018427387904, 46" in message
    assert len(message) < 500
    assert time.process_time() - began < 20


@pytest.mark.parametrize("metadata", [5, [], {"format": 1}, {"format": None}])
def test_metadata_that_the_safetensors_library_refuses(folder: Path, metadata: Any) -> None:
    shard = home(folder, UP)
    edit_header(shard, lambda header: header.update(__metadata__=metadata))
    assert refusal(folder).startswith(f"{shard.name}: __metadata__ is ")


def test_disk_that_fails(folder: Path) -> None:
    shard = home(folder, UP)
    shard.unlink()
    shard.symlink_to("/proc/self/mem")  # a file whose first bytes cannot be read
    assert refusal(folder).startswith(f"{shard.name}: Input/output error; expected a readable file")


@pytest.mark.parametrize(
    "text",
    [b"{]", b"[]", b"\xff\xfe", b"[" * 100_000, b'{"a": 1, "a": 2}', rb'{"\ud800": 1}', rb'{"a": {"dtype": "\udfff"}}'],
)
def test_header_is_not_json_of_the_format(folder: Path, text: bytes) -> None:
    shard = home(folder, UP)
    shard.write_bytes(len(text).to_bytes(8, "little") + text)
    assert refusal(folder).startswith(f"{shard.name}: header is")


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("dtype", "F8_MADE_UP", "dtype 'F8_MADE_UP'; expected one of"),
        ("dtype", ["F32"], "dtype"),
        ("dtype", "BF16", "hold 98304 bytes; expected BF16 [384, 256]"),
        ("shape", [-384, -256], "shape [-384, -256]; expected a list of integers >= 0"),
        ("shape", [384, 256.0], "shape [384, 256.0]; expected a list"),
        ("shape", [384, 255], "expected F8_E4M3 [384, 255]"),
        ("data_offsets", [98304, 0], "expected [begin, end] with 0 <= begin <= end"),
        ("data_offsets", [0, 98304], "begins at byte"),
        ("data_offsets", [1 << 40, (1 << 40) + 98304], "leaves a gap"),
        ("data_offsets", [True, 1], "expected [begin, end]"),
        ("offsets", [0, 1], "expected dtype, shape and data_offsets"),
    ],
)
def test_header_entry_is_corrupt(folder: Path, field: str, value: Any, expected: str) -> None:
    shard = home(folder, UP)
    edit_header(shard, lambda header: header[UP].update({field: value}))
    message = refusal(folder)
    assert message.startswith(f"{shard.name}: tensor '")
    assert expected in message


def test_offsets_overlap(folder: Path) -> None:
    shard = home(folder, UP)
    gate = UP.replace("up", "gate")
    edit_header(shard, lambda header: header[UP].update(data_offsets=header[gate]["data_offsets"]))
    assert "overlaps the tensor before it" in refusal(folder)


def test_shard_of_the_index_absent(folder: Path) -> None:
    shard = home(folder, UP)
    shard.unlink()
    assert refusal(folder).startswith(f"{shard.name}: absent, and the index places")


def test_tensor_of_the_index_not_in_its_shard(folder: Path) -> None:
    shard = home(folder, UP)
    tensors = load_file(shard)
    del tensors[UP]
    save_file(tensors, shard)
    assert refusal(folder).startswith(f"{UP}: not in {shard.name}, where the index places it")


def test_tensor_in_two_shards(folder: Path) -> None:
    shards = sorted(folder.glob("*.safetensors"))
    tensors = load_file(shards[1])
    with safe_open(shards[0], "pt") as first:
        tensors[UP] = first.get_tensor(UP)
    save_file(tensors, shards[1])
    assert refusal(folder).startswith(f"{UP}: in both {shards[0].name} and {shards[1].name}")


@pytest.mark.parametrize("value", ["../model.safetensors", "/etc/passwd", 3])
def test_index_leads_out_of_the_folder(folder: Path, value: Any) -> None:
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"][UP] = value
    (folder / INDEX).write_text(json.dumps(index))
    assert f"{UP} is in {value!r}; expected a file of the same folder" in refusal(folder)


def test_index_is_a_link_to_nothing(folder: Path) -> None:
    """Without its index, the model would be whatever shards happen to lie there."""
    (folder / INDEX).unlink()
    (folder / INDEX).symlink_to("../blobs/0")
    assert f"{INDEX}: absent" in refusal(folder)


@pytest.mark.parametrize("text", ["{", "{}", '{"weight_map": []}', '{"weight_map": {}}'])
def test_index_is_corrupt(folder: Path, text: str) -> None:
    (folder / INDEX).write_text(text)
    assert INDEX in refusal(folder)
