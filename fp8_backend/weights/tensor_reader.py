"""Read a tensor or some of its rows from a shard without mapping the file: memory holds what was asked for, no more."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

import torch

from fp8_backend.errors import CheckpointError
from fp8_backend.weights.safetensors_header import DTYPE_BITS, TensorInfo, read_header_and_length, unreadable

TORCH_DTYPES = {
    "F8_E4M3": torch.float8_e4m3fn, "F8_E8M0": torch.float8_e8m0fnu, "BF16": torch.bfloat16, "F16": torch.float16,
    "F32": torch.float32, "F64": torch.float64, "U8": torch.uint8,
}  # fmt: skip


class ShardReader:
    """One open shard whose header was checked; a context manager."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.info, self.data_begin = read_header_and_length(path)
        try:
            self.file = path.open("rb", buffering=0)
        except OSError as error:
            raise unreadable(path, error) from None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.file.close()

    def read_bytes(self, name: str, begin: int, count: int) -> bytearray:
        """Return `count` bytes of a tensor, from byte `begin` of it.

        Raises:
            CheckpointError: the file ends before them, or the disk fails; names file, tensor and offset.
        """
        offset = self.data_begin + self.info[name].begin + begin
        buffer = bytearray(count)
        view, filled = memoryview(buffer), 0
        self.file.seek(offset)
        while filled < count:
            try:
                got = self.file.readinto(view[filled:])
            except OSError as error:
                raise CheckpointError(
                    f"{self.path.name}: {name}: {error.strerror} at byte {offset + filled}; check the disk, or fetch "
                    "the file again"
                ) from None
            if not got:
                raise CheckpointError(
                    f"{self.path.name}: {name}: ends at byte {offset + filled}; expected {count - filled} more; the "
                    "file is truncated: fetch it again"
                )
            filled += got
        return buffer

    def offset_of(self, name: str, position: Sequence[int]) -> int:
        """Return the byte of the file at which an element of a tensor begins."""
        info = self.info[name]
        element = 0
        for size, index in zip(info.shape, position, strict=True):
            element = element * size + index
        return self.data_begin + info.begin + element * DTYPE_BITS[info.dtype] // 8

    def read(self, name: str) -> torch.Tensor:
        """Return a whole tensor."""
        info = self.info[name]
        return self._tensor(name, self.read_bytes(name, 0, info.bytes), info.shape)

    def read_rows(self, name: str, first: int, rows: int) -> torch.Tensor:
        """Return some rows of a matrix."""
        info = self.info[name]
        row_bytes = info.bytes // max(1, info.shape[0])
        data = self.read_bytes(name, first * row_bytes, rows * row_bytes)
        return self._tensor(name, data, (rows, *info.shape[1:]))

    def _tensor(self, name: str, data: bytearray, shape: tuple[int, ...]) -> torch.Tensor:
        dtype = TORCH_DTYPES[self.info[name].dtype]
        # frombuffer refuses empty buffers.
        return torch.frombuffer(data, dtype=dtype).view(shape) if data else torch.empty(shape, dtype=dtype)


def rows_at_once(info: TensorInfo, budget: int, multiple: int) -> int:
    """Return how many rows of a matrix fill about `budget` bytes, in multiples of `multiple` and at least that."""
    row_bytes = max(1, info.bytes // max(1, info.shape[0]))
    return max(1, budget // (row_bytes * multiple)) * multiple
