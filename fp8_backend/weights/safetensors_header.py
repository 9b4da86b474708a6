"""Read and check the header of a safetensors file before anything trusts it.

Format: 8 bytes little-endian header length, that many bytes of JSON, then the tensors' bytes without gaps.
https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from fp8_backend.errors import CheckpointError

# The safetensors library refuses longer headers as well; a 671B-parameter model's shards stay under 1 MB.
MAX_HEADER_BYTES = 100_000_000
DTYPE_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
    "U16": 16, "I16": 16, "F16": 16, "BF16": 16, "U32": 32, "I32": 32, "F32": 32,
    "U64": 64, "I64": 64, "F64": 64, "C64": 64,
}  # fmt: skip


@dataclass(frozen=True)
class TensorInfo:
    """What a header says of one tensor; begin and end count bytes from the end of the header."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def bytes(self) -> int:
        """Size of the tensor in the file."""
        return self.end - self.begin


def read_header(path: Path) -> dict[str, TensorInfo]:
    """Return what the header of a safetensors file says of each tensor, in the order of their bytes.

    Raises:
        CheckpointError: the file is shorter or longer than its header says, the header is not valid JSON of the
            format, a dtype is unknown, or offsets overlap, leave gaps or disagree with the tensor's shape.
    """
    return read_header_and_length(path)[0]


def read_header_and_length(path: Path) -> tuple[dict[str, TensorInfo], int]:
    """Return what `read_header` does, and the byte of the file where the tensors begin."""
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        length = int.from_bytes(start, "little")
        if start == b"version ":
            raise CheckpointError(f"{path.name}: a pointer of Git LFS, not its file; run `git lfs pull`")
        if size < 8 or length > min(MAX_HEADER_BYTES, size - 8):
            raise CheckpointError(
                f"{path.name}: header of {length} bytes in a file of {size}; the limit is {MAX_HEADER_BYTES} and what "
                "the file holds; it is truncated or not safetensors: fetch it again"
            )
        header = _parse(path.name, file.read(length))
    tensors = {name: _tensor_info(path.name, name, entry) for name, entry in header.items() if name != "__metadata__"}
    ordered = dict(sorted(tensors.items(), key=lambda item: (item[1].begin, item[1].end)))
    _check_offsets(path.name, ordered, data_bytes=size - 8 - length)
    return ordered, 8 + length


def _parse(file_name: str, text: bytes) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) != len(pairs):
            raise ValueError("a name appears twice")
        return result

    try:
        header = json.loads(text.decode("utf-8"), object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file_name}: header is not valid JSON ({error}); fetch the file again") from None
    if not isinstance(header, dict):
        raise CheckpointError(
            f"{file_name}: header is a JSON {type(header).__name__}; expected an object; fetch it again"
        )
    return header


def _tensor_info(file_name: str, name: str, entry: Any) -> TensorInfo:
    def fail(what: str) -> CheckpointError:
        return CheckpointError(f"{file_name}: tensor {name!r}: {what}; the header is corrupt: fetch the file again")

    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise fail(f"header entry {str(entry)[:100]!r}; expected dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        raise fail(f"dtype {str(dtype)[:100]!r}; expected one of {', '.join(DTYPE_BITS)}")
    if not _naturals(shape):
        raise fail(f"shape {str(shape)[:100]}; expected a list of integers >= 0")
    if not _naturals(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise fail(f"data_offsets {str(offsets)[:100]}; expected [begin, end] with 0 <= begin <= end")
    if prod(shape) * DTYPE_BITS[dtype] != 8 * (offsets[1] - offsets[0]):
        raise fail(f"data_offsets {offsets} hold {offsets[1] - offsets[0]} bytes; expected {dtype} {shape}")
    return TensorInfo(dtype, tuple(shape), offsets[0], offsets[1])


def _naturals(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int and 0 <= item < 2**63 for item in value)


def _check_offsets(file_name: str, ordered: dict[str, TensorInfo], data_bytes: int) -> None:
    position = 0
    for name, tensor in ordered.items():
        if tensor.begin != position:
            what = "overlaps the tensor before it" if tensor.begin < position else "leaves a gap"
            raise CheckpointError(
                f"{file_name}: tensor {name!r}: begins at byte {tensor.begin} and {what}; expected {position}; "
                "the header is corrupt: fetch the file again"
            )
        position = tensor.end
    if position > data_bytes:
        name, cut = next((name, tensor) for name, tensor in ordered.items() if tensor.end > data_bytes)
        raise CheckpointError(
            f"{file_name}: {data_bytes} bytes of tensor data; the header asks for {position}: tensor {name!r}, bytes "
            f"{cut.begin} to {cut.end}, is the first that is not whole; the file is truncated: fetch it again"
        )
    if position < data_bytes:
        raise CheckpointError(
            f"{file_name}: {data_bytes} bytes of tensor data; the header asks for {position}; the file is longer than "
            "its tensors: fetch it again"
        )
