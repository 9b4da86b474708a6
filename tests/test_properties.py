"""Layouts are bijections for any size and shard, and mutated files end in a typed error or are read."""

from __future__ import annotations

import json
import random
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from demo.architectures import SIZES
from demo.checkpoint import write_checkpoint
from fp8_backend.errors import CheckpointError
from fp8_backend.kernels import layout
from fp8_backend.kernels.reference import BLOCK, ceil_div
from fp8_backend.weights.checkpoint import verify_checkpoint
from fp8_backend.weights.files import INDEX
from fp8_backend.weights.safetensors_header import read_header

WIDTH = st.one_of(st.integers(1, 300), st.sampled_from([8, 120, 127, 128, 129, 256, 384, 512]))


def codes_of(n: int, k: int, seed: int) -> torch.Tensor:
    """Return every byte an e4m3 tensor may hold, NaN codes included."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (n, k), generator=generator, dtype=torch.uint8).view(torch.float8_e4m3fn)


def same_bytes(a: torch.Tensor, b: torch.Tensor) -> bool:
    integers = {1: torch.uint8, 4: torch.int32}[a.element_size()]
    return a.shape == b.shape and a.dtype == b.dtype and torch.equal(a.view(integers), b.view(integers))


@settings(max_examples=200, deadline=None)
@given(n=WIDTH, k=WIDTH, seed=st.integers(0, 2**32 - 1))
def test_unpacking_undoes_packing(n: int, k: int, seed: int) -> None:
    codes = codes_of(n, k, seed)
    packed = layout.pack_weight(codes)
    assert packed.shape == layout.packed_weight_shape(n, k)
    assert same_bytes(layout.unpack_weight(packed, n, k), codes)
    # Strides do not matter, and the padding is zero, so that it adds nothing to a product.
    assert same_bytes(
        layout.pack_weight(codes.view(torch.uint8).t().contiguous().t().view(torch.float8_e4m3fn)), packed
    )
    assert int((packed.view(torch.uint8) != 0).sum()) == int((codes.view(torch.uint8) != 0).sum())
    scale = torch.rand(ceil_div(n, BLOCK), ceil_div(k, BLOCK), generator=torch.Generator().manual_seed(seed)) + 1e-3
    packed_scale = layout.pack_scale(scale, n, k)
    assert packed_scale.shape == layout.packed_scale_shape(n, k)
    assert same_bytes(layout.unpack_scale(packed_scale, n), scale)


@settings(max_examples=100, deadline=None)
@given(
    ranks=st.sampled_from([1, 2, 3, 4, 8]),
    blocks=st.integers(1, 3),
    other=WIDTH,
    split_k=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
)
def test_packed_shards_make_the_packed_whole(ranks: int, blocks: int, other: int, split_k: bool, seed: int) -> None:
    split = ranks * blocks * BLOCK
    n, k = (other, split) if split_k else (split, other)
    codes = codes_of(n, k, seed)
    scale = torch.rand(ceil_div(n, BLOCK), ceil_div(k, BLOCK), generator=torch.Generator().manual_seed(seed)) + 1e-3
    dim = 1 if split_k else 0
    codes_parts, scale_parts = codes.view(torch.uint8).chunk(ranks, dim), scale.chunk(ranks, dim)
    packed = [layout.pack_weight(part.view(torch.float8_e4m3fn)) for part in codes_parts]
    # A block of k or a multiple of 8 rows is contiguous in the layout: shards of the packed whole are packed shards.
    joined = torch.cat([part.view(torch.uint8) for part in packed], dim=0 if split_k else 1)
    assert same_bytes(joined, layout.pack_weight(codes).view(torch.uint8))
    for part, part_scale, packed_part in zip(codes_parts, scale_parts, packed, strict=True):
        assert same_bytes(layout.unpack_weight(packed_part, *part.shape).view(torch.uint8), part)
        assert same_bytes(layout.unpack_scale(layout.pack_scale(part_scale, *part.shape), part.shape[0]), part_scale)


# Values that have broken parsers before: limits of integers, nesting, wrong types, names that lead elsewhere.
HOSTILE = [
    None, True, -1, 0, 2**31, 2**63 - 1, 2**63, 2**64, 10**40, 1.5, 1e400, "", "F8_E4M3", "\x00", "\ud800", "../x",
    "/dev/zero", ".", "a" * 300, [], [[]], {}, [2**62, 2**62], [-1, 5], [0, 0], [5, 0], [0] * 1000,
]  # fmt: skip


def mutate_json(value: object, choice: random.Random) -> object:
    """Return a copy with one place changed: replaced, dropped, renamed or swapped."""
    if not isinstance(value, dict | list) or not value or choice.random() < 0.1:
        return choice.choice(HOSTILE)
    if isinstance(value, list):
        at = choice.randrange(len(value))
        return [mutate_json(item, choice) if index == at else item for index, item in enumerate(value)]
    key = choice.choice(list(value))
    match choice.randrange(4):
        case 0:
            return {name: item for name, item in value.items() if name != key}
        case 1:
            return {str(choice.choice(HOSTILE)) if name == key else name: item for name, item in value.items()}
        case _:
            return {name: mutate_json(item, choice) if name == key else item for name, item in value.items()}


def mutate_bytes(data: bytes, choice: random.Random) -> bytes:
    """Return the bytes with a few changed, cut, doubled or inserted."""
    changed = bytearray(data)
    for _ in range(choice.randint(1, 4)):
        at = choice.randrange(len(changed) + 1)
        match choice.randrange(4):
            case 0:
                changed[at : at + 1] = bytes([choice.randrange(256)])
            case 1:
                del changed[at : at + choice.randint(1, 64)]
            case 2:
                changed[at:at] = changed[at : at + choice.randint(1, 64)]
            case _:
                changed[at:at] = choice.choice([b"[", b"{", b'"', b"\xff", b"9" * 50, b"\x00", b"-", b"1e999"])
    return bytes(changed)


def survives(read: object, argument: Path) -> bool:
    """Return whether an input was read; anything but success or a CheckpointError fails the test."""
    try:
        read(argument)  # type: ignore[operator]
    except CheckpointError as error:
        assert str(error)
        return False
    return True


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fuzz")
    size = replace(SIZES["qwen3", "demo"], layers=1, hidden=128, heads=1, kv_heads=1, intermediate=128, vocab=256)
    write_checkpoint(folder, "qwen3", size)
    return folder


def test_mutated_headers(tiny: Path, tmp_path: Path) -> None:
    shard = sorted(tiny.glob("*.safetensors"))[0]
    data = shard.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header, tail = data[8 : 8 + length], data[8 + length :]
    header = json.dumps({"__metadata__": {"format": "pt"}} | json.loads(header)).encode()
    data, length = len(header).to_bytes(8, "little") + header + tail, len(header)
    choice, path, read = random.Random(1), tmp_path / "x.safetensors", 0
    began = time.process_time()
    for number in range(8000):
        if number % 2:
            text = json.dumps(mutate_json(json.loads(header), choice)).encode("utf-8", "surrogatepass")
            if choice.random() < 0.3:
                text = mutate_bytes(text, choice)
            path.write_bytes(len(text).to_bytes(8, "little") + text + tail)
        else:
            path.write_bytes(mutate_bytes(data[: 8 + length], choice) + tail[: choice.choice([0, 7, len(tail)])])
        if survives(read_header, path):
            read += 1
            with safe_open(path, "pt"):  # what passes here must open in vLLM
                pass
    assert time.process_time() - began < 120
    assert 0 < read < 4000  # some changes are harmless (a tensor's name), most are not


@pytest.mark.parametrize("name", [INDEX, "config.json"])
def test_mutated_index_and_config(tiny: Path, tmp_path: Path, name: str) -> None:
    for path in tiny.iterdir():
        (tmp_path / path.name).symlink_to(path)
    original = (tiny / name).read_bytes()
    (tmp_path / name).unlink()
    choice, read = random.Random(2), 0
    for number in range(1500):
        if number % 2:
            text = json.dumps(mutate_json(json.loads(original), choice)).encode("utf-8", "surrogatepass")
        else:
            text = mutate_bytes(original, choice)
        (tmp_path / name).write_bytes(text)
        read += survives(verify_checkpoint, tmp_path)
    assert 0 < read < 1500
