"""Write a shard piece by piece, in any order, and let it appear under its name only when it is whole."""

from __future__ import annotations

import ctypes
import json
import os
from collections.abc import Mapping
from math import prod
from pathlib import Path
from types import TracebackType
from typing import Self

import torch

from fp8_backend.weights.safetensors_header import DTYPE_BITS, TensorInfo

PARTIAL = ".partial"


class ShardWriter:
    """A context manager: an exception inside it deletes what was written, otherwise the shard is renamed into place.

    Args:
        path: of the finished shard.
        tensors: name -> (dtype as safetensors spells it, shape). Wide dtypes come first in the file, so that every
            tensor is aligned to its own width, as the safetensors library writes them.
    """

    def __init__(self, path: Path, tensors: Mapping[str, tuple[str, tuple[int, ...]]]) -> None:
        self.path = path
        # Another process may still hold a file of an earlier run open: the name is this process's own.
        self.partial = path.with_name(f".{path.name}.{os.getpid()}{PARTIAL}")
        self.info: dict[str, TensorInfo] = {}
        position = 0
        for name, (dtype, shape) in sorted(tensors.items(), key=lambda item: (-DTYPE_BITS[item[1][0]], item[0])):
            size = prod(shape) * DTYPE_BITS[dtype] // 8
            self.info[name] = TensorInfo(dtype, shape, position, position + size)
            position += size
        header = {"__metadata__": {"format": "pt"}} | {
            name: {"dtype": info.dtype, "shape": list(info.shape), "data_offsets": [info.begin, info.end]}
            for name, info in self.info.items()
        }
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        self.data_begin = 8 + len(text)
        self.file = self.partial.open("wb", buffering=0)
        self.file.write(len(text).to_bytes(8, "little") + text)
        self.file.truncate(self.data_begin + position)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            os.fsync(self.file.fileno())
        self.file.close()
        if error is None:
            self.partial.replace(self.path)
        else:
            self.partial.unlink(missing_ok=True)

    def write_bytes(self, name: str, begin: int, data: bytes | bytearray | memoryview) -> None:
        """Write bytes of a tensor, from byte `begin` of it."""
        info = self.info[name]
        assert begin + len(data) <= info.bytes, f"{name}: {begin} + {len(data)} bytes; it has {info.bytes}"
        self.file.seek(self.data_begin + info.begin + begin)
        view, written = memoryview(data), 0
        while written < len(data):
            written += self.file.write(view[written:])

    def write_rows(self, name: str, first: int, rows: torch.Tensor) -> None:
        """Write rows of a matrix, or a whole tensor with `first` 0; `rows` has the dtype the header promises."""
        rows = rows.contiguous()
        row_bytes = rows.nbytes // max(1, rows.shape[0] if rows.dim() else 1)
        # torch offers no buffer without numpy, which is no dependency of this package.
        data = (ctypes.c_ubyte * rows.nbytes).from_address(rows.data_ptr()) if rows.nbytes else b""
        self.write_bytes(name, first * row_bytes, memoryview(data).cast("B"))
