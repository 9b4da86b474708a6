"""Read and check the header of a safetensors file before anything trusts it.

Format: 8 bytes little-endian header length, that many bytes of JSON, then the tensors' bytes without gaps.
https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fp8_backend.errors import CheckpointError

# The safetensors library refuses longer headers as well; a 671B-parameter model's shards stay under 1 MB.
MAX_HEADER_BYTES = 100_000_000
MAX_NUMBER = 2**63  # offsets of files are below; sizes of tensors too
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
            format, a dtype is unknown, or offsets overlap, leave gaps or disagree with the tensor's shape; or the file
            cannot be read.
    """
    return read_header_and_length(path)[0]


def read_header_and_length(path: Path) -> tuple[dict[str, TensorInfo], int]:
    """Return what `read_header` does, and the byte of the file where the tensors begin."""
    try:
        return _read_header_and_length(path)
    except OSError as error:
        raise unreadable(path, error) from None


def unreadable(path: Path, error: OSError) -> CheckpointError:
    """Return the error that says why a file cannot be read."""
    return CheckpointError(
        f"{path.name}: {error.strerror}; expected a readable file; check its permissions and the disk, or fetch it "
        "again"
    )


def _read_header_and_length(path: Path) -> tuple[dict[str, TensorInfo], int]:
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
    _check_metadata(path.name, header.pop("__metadata__", None))
    tensors = {name: _tensor_info(path.name, name, entry) for name, entry in header.items()}
    ordered = dict(sorted(tensors.items(), key=lambda item: (item[1].begin, item[1].end)))
    _check_offsets(path.name, ordered, data_bytes=size - 8 - length)
    return ordered, 8 + length


def _parse(file_name: str, text: bytes) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) != len(pairs):
            raise ValueError("a name appears twice")
        for name, value in pairs:  # half a surrogate pair is no text: nothing could print it, and safetensors refuses
            (name + value if isinstance(value, str) else name).encode("utf-8")
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


def _check_metadata(file_name: str, metadata: Any) -> None:
    """Refuse what the safetensors library does, with which vLLM loads: anything but texts under names."""
    if metadata is None:
        return
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise CheckpointError(
            f"{file_name}: __metadata__ is {str(metadata)[:100]!r}; expected texts under names; the header is corrupt: "
            "fetch the file again"
        )


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
    if _count(shape) * DTYPE_BITS[dtype] != 8 * (offsets[1] - offsets[0]):
        raise fail(f"data_offsets {offsets} hold {offsets[1] - offsets[0]} bytes; expected {dtype} {str(shape)[:100]}")
    return TensorInfo(dtype, tuple(shape), offsets[0], offsets[1])


def _naturals(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int and 0 <= item < MAX_NUMBER for item in value)


def _count(shape: list[int]) -> int:
    """Return the number of elements, or more than any file holds: half a million large sizes take hours to multiply."""
    count = 1
    for size in shape:
        count *= size
        if count >= MAX_NUMBER:
            break
    return count


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
