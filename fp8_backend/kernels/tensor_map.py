"""Tensor maps: the 128-byte descriptions by which Hopper's copy engine (TMA) finds the boxes of a tensor."""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Iterator
from functools import lru_cache
from typing import Literal

from fp8_backend.errors import ArgumentError
from fp8_backend.kernels import driver
from fp8_backend.kernels.reference import BLOCK

BYTES = 128
Swizzle = Literal["none", "64B", "128B"]
_ALIGNMENT = 64  # of the map itself

# Values of cuda.h (13.0). Elements are described as unsigned integers of their size: the engine only moves them.
_DATA_TYPE = {1: 0, 2: 1, 4: 2}
_SWIZZLE = {"none": 0, "64B": 2, "128B": 3}
_L2_PROMOTION = {0: 0, 64: 1, 128: 2, 256: 3}
_NO_INTERLEAVE = _FILL_WITH_ZEROS = 0

_head = struct.Struct("<Q").pack
_TWO_ADDRESSES = (0x7F12_3456_7000, 0x5A_0BCD_EF10)  # never read


@lru_cache(maxsize=4096)
def encode_tiled(
    pointer: int,
    dims: tuple[int, ...],
    strides_bytes: tuple[int, ...],
    box: tuple[int, ...],
    swizzle: Swizzle,
    element_bytes: int,
    l2_promotion: int = 256,
) -> bytes:
    """Return the tensor map of a strided tensor; boxes that reach out of it read zeros and write nothing there.

    A map is a pure function of the arguments, so the last 4096 are kept.

    Args:
        pointer: address of element 0.
        dims: elements of each dimension, the contiguous one first; 1 to 5 dimensions.
        strides_bytes: bytes from one element to the next in dimension 1, 2, ...; one fewer than dims.
        box: elements of a box in each dimension.
        swizzle: how a box lies in shared memory; "64B" and "128B" take rows of at most so many bytes.
        element_bytes: 1, 2 or 4.
        l2_promotion: bytes of an L2 fetch: 0, 64, 128 or 256.

    Raises:
        ArgumentError: a limit of the hardware is not met; the limits are those of cuTensorMapEncodeTiled (CUDA 13.0).
        DriverError: the driver refuses it all the same.
    """
    for holds, message in _limits(pointer, dims, strides_bytes, box, swizzle, element_bytes, l2_promotion):
        if not holds:
            raise ArgumentError(f"tensor map: {message}")
    memory = ctypes.create_string_buffer(BYTES + _ALIGNMENT)
    address = ctypes.addressof(memory) + -ctypes.addressof(memory) % _ALIGNMENT
    rank = len(dims)
    driver.ensure_context()  # without one the driver refuses to encode
    driver.call(
        "cuTensorMapEncodeTiled",
        address,
        _DATA_TYPE[element_bytes],
        rank,
        pointer,
        (ctypes.c_uint64 * rank)(*dims),
        (ctypes.c_uint64 * rank)(*strides_bytes),
        (ctypes.c_uint32 * rank)(*box),
        (ctypes.c_uint32 * rank)(*[1] * rank),
        _NO_INTERLEAVE,
        _SWIZZLE[swizzle],
        _L2_PROMOTION[l2_promotion],
        _FILL_WITH_ZEROS,
        subject=f"tensor map of dims {dims}, strides {strides_bytes} bytes, box {box}, swizzle {swizzle}",
    )
    return ctypes.string_at(address, BYTES)


class MovableMap:
    """The map of a tensor whose address changes from call to call and nothing else does.

    The address is the first 8 bytes of a map on Hopper GPUs. That is seen and not documented: so two maps are encoded
    and compared, and where more than these bytes differs, each map comes from the driver.
    """

    def __init__(
        self,
        dims: tuple[int, ...],
        strides_bytes: tuple[int, ...],
        box: tuple[int, ...],
        size: int,
        swizzle: Swizzle = "128B",
    ) -> None:
        """Describe a tensor of elements of `size` bytes; for the rest see `encode_tiled`."""
        self._described = (dims, strides_bytes, box, swizzle, size)
        first, second = (encode_tiled(address, *self._described) for address in _TWO_ADDRESSES)
        self._tail = first[8:]
        self._patched = (first, second) == tuple(_head(address) + self._tail for address in _TWO_ADDRESSES)

    def at(self, pointer: int) -> bytes:
        """Return the map of the tensor at a 16-byte aligned address."""
        return _head(pointer) + self._tail if self._patched else encode_tiled(pointer, *self._described)


@lru_cache(maxsize=1024)
def row_major_map(row_bytes: int, rows: int, k_blocks: int, box_rows: int) -> MovableMap:
    """Return the map of row-major codes, kept for the next call.

    Args:
        row_bytes: from one row to the next, a multiple of 16.
        rows: of the codes [rows, k_blocks * 128].
        k_blocks: of 128 codes each.
        box_rows: a box has 128 codes of so many rows, at most 256.

    Raises:
        ArgumentError: see `encode_tiled`.
    """
    return MovableMap((BLOCK, rows, k_blocks), (row_bytes, BLOCK), (BLOCK, box_rows, 1), 1)


def _limits(
    pointer: int,
    dims: tuple[int, ...],
    strides_bytes: tuple[int, ...],
    box: tuple[int, ...],
    swizzle: str,
    element_bytes: int,
    l2_promotion: int,
) -> Iterator[tuple[bool, str]]:
    yield element_bytes in _DATA_TYPE, f"elements of {element_bytes} bytes; 1, 2 or 4 can be described"
    yield swizzle in _SWIZZLE, f"swizzle {swizzle!r}; known: {', '.join(_SWIZZLE)}"
    yield (
        l2_promotion in _L2_PROMOTION,
        f"L2 promotion of {l2_promotion} bytes; known: {', '.join(map(str, _L2_PROMOTION))}",
    )
    yield 1 <= len(dims) <= 5, f"{len(dims)} dimensions {dims}; 1 to 5 can be described"
    yield len(box) == len(dims), f"box {box} and dims {dims} differ in length"
    yield len(strides_bytes) == len(dims) - 1, f"strides {strides_bytes} for dims {dims}; one fewer than dims is needed"
    yield pointer != 0 and pointer % 16 == 0, f"address {pointer:#x} is not a multiple of 16 bytes; copy the tensor"
    yield all(1 <= dim <= 2**32 for dim in dims), f"dims {dims}; each must be in 1..2^32"
    yield (
        all(0 < stride < 2**40 and stride % 16 == 0 for stride in strides_bytes),
        f"strides {strides_bytes} bytes; each must be a positive multiple of 16 below 2^40; pad the rows",
    )
    yield all(1 <= extent <= 256 for extent in box), f"box {box}; each extent must be in 1..256"
    row = box[0] * element_bytes
    yield row % 16 == 0, f"box rows of {row} bytes; must be a multiple of 16"
    most = int(swizzle.removesuffix("B")) if swizzle in _SWIZZLE and swizzle != "none" else row
    yield row <= most, f"box rows of {row} bytes; swizzle {swizzle} takes at most {most}"
