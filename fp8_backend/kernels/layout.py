"""How weights and their scales lie in memory once packed for the kernels.

A weight [n, k] of e4m3 codes becomes [k_blocks, n_aligned, 128] bytes: for each 128-wide block of k, all rows of n one
after the other. The 16-byte chunks of a row are permuted as Hopper's 128-byte swizzle does it (chunk c of row r lies at
c ^ (r % 8)), so any run of rows that starts at a multiple of 8 is one contiguous copy that lands in shared memory ready
for wgmma: one layout serves every tile width. k is padded with zero codes to a multiple of 128, n to a multiple of 8.

Scales [ceil(n / 128), ceil(k / 128)] are transposed, so that the scales of neighbouring rows in one block of k are
neighbours, and padded so that the 8 that a kernel fetches with a tile start at a multiple of 16 bytes and exist.
"""

from __future__ import annotations

import torch

from fp8_backend.errors import ArgumentError
from fp8_backend.kernels.reference import BLOCK, align, ceil_div

ROW_ALIGNMENT = 8  # rows in one period of the 128-byte swizzle
SCALE_ALIGNMENT = 4  # float32 values in 16 bytes, the granularity of bulk copies
SCALES_FETCHED = 8  # kScaleFloats of ptx.cuh


def packed_weight_shape(n: int, k: int) -> tuple[int, int, int]:
    """Return the shape [k_blocks, n_aligned, 128] of a packed weight [n, k]."""
    return ceil_div(k, BLOCK), align(n, ROW_ALIGNMENT), BLOCK


def packed_scale_shape(n: int, k: int) -> tuple[int, int]:
    """Return the shape [k_blocks, align(n_blocks, 4) + 4] of the packed scales of a weight [n, k]."""
    return ceil_div(k, BLOCK), align(ceil_div(n, BLOCK), SCALE_ALIGNMENT) + SCALES_FETCHED - SCALE_ALIGNMENT


def _word(device: torch.device) -> torch.dtype:
    """Return the dtype as which codes are moved: on a CPU 16 bytes at once, three times as fast as 8."""
    return torch.complex128 if device.type == "cpu" else torch.int64


def _chunk_order(device: torch.device) -> torch.Tensor:
    # Not kept: while vLLM loads, memory may come from a pool that its sleep level 2 forgets.
    c = torch.arange(8, device=device)
    return c[:, None] ^ c[None, :]


def _swizzled(words: torch.Tensor) -> torch.Tensor:
    """Exchange the 16-byte chunks of each row: chunk c of row r goes to c ^ (r % 8); doing it twice undoes it.

    Args:
        words: [k_blocks, n, 128 / size of a word], n % 8 == 0, any strides.

    Returns:
        The same shape, contiguous.
    """
    index = _chunk_order(words.device)  # of one period of rows, repeated without being stored
    _, n, width = words.shape
    chunks = words.unflatten(1, (n // ROW_ALIGNMENT, ROW_ALIGNMENT)).unflatten(3, (8, width // 8))
    return torch.gather(chunks, 3, index[None, None, :, :, None].expand(chunks.shape)).view(words.shape)


def arrange_weight(weight: torch.Tensor) -> torch.Tensor:
    """Return a weight in the kernels' layout, by work queued on the current stream.

    Args:
        weight: [n, k] float8_e4m3fn, any strides.

    Returns:
        [ceil(k / 128), align(n, 8), 128] float8_e4m3fn, contiguous, on the same device.

    Raises:
        ArgumentError: weight is no matrix or of another dtype.
    """
    if weight.dim() != 2 or weight.dtype != torch.float8_e4m3fn:
        raise ArgumentError(
            f"weight: got {tuple(weight.shape)} {weight.dtype}; expected [n, k] float8_e4m3fn; pass the checkpoint's "
            "codes"
        )
    n, k = weight.shape
    k_blocks, n_aligned, _ = packed_weight_shape(n, k)
    source = weight.view(torch.uint8)
    if (n_aligned, k_blocks * BLOCK) != (n, k):
        source = torch.nn.functional.pad(source, (0, k_blocks * BLOCK - k, 0, n_aligned - n))
    elif not source.is_contiguous() or source.storage_offset() % 16:
        source = source.clone(memory_format=torch.contiguous_format)  # so that it can be viewed as words
    word = _word(source.device)
    words = source.view(word).view(n_aligned, k_blocks, BLOCK // word.itemsize).transpose(0, 1)
    return _swizzled(words).view(torch.float8_e4m3fn)


def pack_weight(weight: torch.Tensor) -> torch.Tensor:
    """Return what `arrange_weight` does, complete in memory."""
    return complete(arrange_weight(weight))


def unpack_weight(packed: torch.Tensor, n: int, k: int) -> torch.Tensor:
    """Return the row-major weight [n, k] float8_e4m3fn that `pack_weight` packed, bit for bit."""
    if packed.dim() != 3 or tuple(packed.shape) != packed_weight_shape(n, k):
        raise ArgumentError(
            f"packed weight: got {tuple(packed.shape)}; expected {packed_weight_shape(n, k)} for n={n}, k={k}; "
            "use pack_weight"
        )
    k_blocks, n_aligned, _ = packed.shape
    word = _word(packed.device)
    words = packed.view(word).view(k_blocks, n_aligned, BLOCK // word.itemsize)
    rows = _swizzled(words).transpose(0, 1).flatten(1).view(torch.uint8)
    return rows[:n, :k].contiguous().view(torch.float8_e4m3fn)


def arrange_scale(scale: torch.Tensor, n: int, k: int) -> torch.Tensor:
    """Return the block scales of a weight [n, k] in the kernels' layout, by work queued on the current stream.

    Args:
        scale: [ceil(n / 128), ceil(k / 128)] float32, any strides.
        n: rows of the weight.
        k: columns of the weight.

    Returns:
        [ceil(k / 128), align(ceil(n / 128), 4) + 4] float32, contiguous; the padding is zero.

    Raises:
        ArgumentError: scale has another shape or dtype.
    """
    blocks = (ceil_div(n, BLOCK), ceil_div(k, BLOCK))
    if tuple(scale.shape) != blocks or scale.dtype != torch.float32:
        raise ArgumentError(
            f"scale: got {list(scale.shape)} {scale.dtype}; expected {list(blocks)} float32 for a weight [{n}, {k}]; "
            "pass one scale per 128x128 block"
        )
    padding = packed_scale_shape(n, k)[1] - blocks[0]
    return torch.nn.functional.pad(scale.t(), (0, padding)).contiguous()


def pack_scale(scale: torch.Tensor, n: int, k: int) -> torch.Tensor:
    """Return what `arrange_scale` does, complete in memory."""
    return complete(arrange_scale(scale, n, k))


def unpack_scale(packed: torch.Tensor, n: int) -> torch.Tensor:
    """Return the scales [ceil(n / 128), k_blocks] float32 that `pack_scale` packed."""
    return packed[:, : ceil_div(n, BLOCK)].t().contiguous()


def complete(packed: torch.Tensor) -> torch.Tensor:
    """Wait until a tensor is written: kernels fetch weights before earlier work of their stream has ended."""
    if packed.is_cuda:
        torch.cuda.current_stream(packed.device).synchronize()
    return packed
