"""Attention of one new token of each request over a paged cache, as a decode step needs it."""

from __future__ import annotations

from functools import cache
from math import e, log2
from typing import NamedTuple

import torch

from fp8_backend.errors import ArgumentError
from fp8_backend.kernels import launcher, quantize
from fp8_backend.kernels.backend import is_current, num_sms, runs_cuda_kernels
from fp8_backend.kernels.compiler import KernelSpec
from fp8_backend.kernels.reference import ceil_div

DTYPES = (torch.bfloat16, torch.float16)
HEAD, MAX_GROUP, BLOCK_ALIGNMENT = 128, 8, 16  # of the kernel: elements, query heads a key head, tokens
SPECS = {
    dtype: KernelSpec("attention.cuh", "attention", (("ELEMENT_TYPE", quantize.ELEMENT_TYPES[dtype]),))
    for dtype in DTYPES
}
_LAYOUT = launcher.ParamLayout(("u64",) * 9 + ("i64",) * 6 + ("u32",) * 5 + ("f32",))
_WARPS, _CTAS_PER_SM = 4, 2
# Of a warp three slices of 16 tokens and their barriers, sums, greatest scores and weights of 8 heads; who was last.
_SHARED_BYTES = _WARPS * (3 * (8192 + 8) + 8 * (HEAD + 2) * 4) + 4
# Of units of one row, among which the kernel chooses: at most so many for each CTA, and one for each head of a request.
_SIZES = 4
_PARTIAL_STRIDE = HEAD + 4  # elements of a head of a piece: sums, their greatest score, their weight


@cache
def kernel(dtype: torch.dtype, device: int) -> launcher.Kernel:
    """Return the loaded kernel for elements of a dtype on the current device, which is only a key."""
    return launcher.load(SPECS[dtype], _LAYOUT)


class Codes(NamedTuple):
    """Codes of outputs [m, query_heads * 128] in groups of 128, a head each, and behind them their scales.

    buffer: uint8, 16-byte aligned, as `quantize.prepare` has it with tile_rows: codes, `quantize.code_bytes` of them,
    then [query_heads, align(m, 4)] float32.
    """

    buffer: torch.Tensor
    tile_rows: int


def empty_codes(m: int, query_heads: int, tile_rows: int, device: torch.device) -> Codes:
    """Return memory for codes of so many outputs."""
    size = quantize.buffer_bytes(m, query_heads * HEAD, tile_rows)
    return Codes(torch.empty(size, dtype=torch.uint8, device=device), tile_rows)


class Workspace(NamedTuple):
    """Memory for pieces of requests, of which a launch leaves nothing behind: one for all layers of a device.

    partial: float32. counters: [heads] int32, a key head of a request each, zero between launches.
    """

    partial: torch.Tensor
    counters: torch.Tensor


_workspaces: dict[torch.device, list[Workspace]] = {}  # the last one is the largest; graphs may hold those before it


def _partial_elements(device: torch.device, heads: int, group: int) -> int:
    return (_SIZES * num_sms(device.index) * _CTAS_PER_SM + heads) * group * _PARTIAL_STRIDE


def has_workspace(device: torch.device, heads: int, group: int) -> bool:
    """Return whether the workspace is there for so many key heads of requests, of so many query heads each."""
    if not (made := _workspaces.get(device)):
        return False
    return len(made[-1].counters) >= heads and len(made[-1].partial) >= _partial_elements(device, heads, group)


def workspace(device: torch.device, heads: int, group: int) -> Workspace:
    """Return the device's workspace, made anew if it is for less than `has_workspace` asks.

    A graph that is captured must find it: ask ahead, for as many requests as there may be.
    """
    made = _workspaces.setdefault(device, [])
    if not has_workspace(device, heads, group):
        elements = max(_partial_elements(device, heads, group), len(made[-1].partial) if made else 0)
        heads = max(heads, len(made[-1].counters) if made else 0)
        partial = torch.empty(elements, dtype=torch.float32, device=device)
        made.append(Workspace(partial, torch.zeros(heads, dtype=torch.int32, device=device)))
    return made[-1]


def serves(query_heads: int, key_heads: int, head: int, block: int, dtype: torch.dtype) -> bool:
    """Return whether the kernel takes attention of this kind."""
    whole = key_heads > 0 and query_heads % key_heads == 0 and query_heads // key_heads <= MAX_GROUP
    return whole and head == HEAD and block % BLOCK_ALIGNMENT == 0 and dtype in DTYPES


def fits(rows: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> bool:
    """Return whether the kernel can read 16 bytes at once of rows of heads, and keys with their values behind them."""
    alike = keys.shape == values.shape and keys.stride() == values.stride()
    beside = values.data_ptr() - keys.data_ptr() == HEAD * keys.element_size()
    # The stride of a dimension of one element says nothing.
    strides = [
        stride
        for tensor in (rows, keys)
        for size, stride in zip(tensor.shape, tensor.stride(), strict=True)
        if size > 1
    ]
    aligned = all(tensor.data_ptr() % 16 == 0 for tensor in (rows, keys, values))
    whole = rows.stride(2) == keys.stride(3) == 1 and (rows.shape[1] == 1 or rows.stride(1) == HEAD)
    return alike and beside and whole and aligned and not any(stride % 8 for stride in strides if stride != 1)


def check(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    table: torch.Tensor,
    lengths: torch.Tensor,
    out: torch.Tensor,
) -> None:
    """Check the operands of `decode_attention`.

    Raises:
        ArgumentError: a dtype, shape, stride or device that does not fit.
    """
    shaped = queries.dim() == 3 and keys.dim() == 4 and queries.shape[2] == keys.shape[3]
    if not shaped or not serves(queries.shape[1], keys.shape[2], keys.shape[3], keys.shape[1], queries.dtype):
        raise ArgumentError(
            f"queries: got {list(queries.shape)} {queries.dtype} for keys {list(keys.shape)}; expected [m, query heads,"
            f" {HEAD}] bfloat16 or float16 for [blocks, a multiple of {BLOCK_ALIGNMENT}, key heads, {HEAD}], at most "
            f"{MAX_GROUP} query heads a key head; use another attention"
        )
    if keys.dtype != queries.dtype or values.dtype != queries.dtype or not fits(queries, keys, values):
        raise ArgumentError(
            f"keys: got {keys.dtype} of strides {keys.stride()} and values {values.dtype} of {values.stride()}; "
            f"expected both {queries.dtype} in the same rows, values behind keys, strides multiples of 8 elements, "
            "16-byte aligned, and queries likewise; copy them"
        )
    m = queries.shape[0]
    if table.dim() != 2 or table.shape[0] < m or lengths.dim() != 1 or len(lengths) < m or table.stride(1) != 1:
        raise ArgumentError(
            f"table: got {list(table.shape)} of strides {table.stride()} and lengths {list(lengths.shape)}; expected "
            f"at least {m} contiguous rows of blocks and {m} lengths"
        )
    if table.dtype != torch.int32 or lengths.dtype != torch.int32 or not lengths.is_contiguous():
        raise ArgumentError(f"table: got {table.dtype} and lengths {lengths.dtype}; expected contiguous int32; convert")
    if out.shape != queries.shape or out.dtype != queries.dtype or not fits(out, keys, values):
        raise ArgumentError(
            f"out: got {list(out.shape)} {out.dtype} of strides {out.stride()}; expected {list(queries.shape)} "
            f"{queries.dtype}, contiguous heads"
        )
    if {tensor.device for tensor in (keys, values, table, lengths, out)} != {queries.device}:
        raise ArgumentError(f"keys: got {keys.device}; expected everything on {queries.device}; move it")


def decode_attention(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    table: torch.Tensor,
    lengths: torch.Tensor,
    scale: float,
    out: torch.Tensor,
) -> None:
    """Attend from one token of each request to all that its cache has, the token itself among them.

    out[r, h] is the sum over tokens t of softmax(scale * queries[r, h] . keys of t) times values of t, computed in
    float32 with weights of values rounded to 16 bits; a request of no token gets zeros. Sums are taken in one order for
    the same lengths of all requests. On a GPU the table, lengths and all tokens but the last of a request may be read
    before earlier kernels of the stream have ended, as `gemm.fp8_linear` says of its weight.

    Args:
        queries: [m, query_heads, 128] bfloat16 or float16, heads contiguous.
        keys: [blocks, block, key_heads, 128] in the queries' dtype; block is a multiple of 16.
        values: likewise, in the same rows: each token's behind its keys.
        table: [at least m, n] int32: token t of request r is row t % block of block table[r, t // block].
        lengths: [at least m] int32, tokens of each request.
        scale: of scores.
        out: as queries; overwritten.

    Raises:
        ArgumentError: a dtype, shape, stride or device that does not fit.
        UnsupportedError: the queries are on a GPU for which there are no kernels.
    """
    check(queries, keys, values, table, lengths, out)
    if not runs_cuda_kernels(queries.device):
        out.copy_(reference(queries, keys, values, table, lengths, scale))
    elif not is_current(queries.device):
        with torch.cuda.device(queries.device):
            launch(queries, keys, values, table, lengths, scale, out)
    else:
        launch(queries, keys, values, table, lengths, scale, out)


def launch(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    table: torch.Tensor,
    lengths: torch.Tensor,
    scale: float,
    out: torch.Tensor,
    codes: Codes | None = None,
) -> None:
    """Launch the kernel on the current device; operands as `decode_attention` has them, nothing is checked.

    codes: of the outputs, to be written, too.
    """
    (m, query_heads, _), (_, block, key_heads, _) = queries.shape, keys.shape
    if m == 0:
        return
    device, group = queries.device, query_heads // key_heads
    grid = num_sms(device.index) * _CTAS_PER_SM
    tensors = (queries, keys, table, lengths, out, *workspace(device, m * key_heads, group))
    strides = (queries.stride(0), out.stride(0), *keys.stride()[:3], table.stride(0))
    first, tile_rows = (0, 0) if codes is None else (codes.buffer.data_ptr(), codes.tile_rows)
    scales = first + quantize.code_bytes(m, query_heads * HEAD, tile_rows)
    numbers = (block, m, query_heads, key_heads, tile_rows)
    kernel(queries.dtype, device.index).launch(
        (grid, 1, 1),
        _WARPS * 32,
        _SHARED_BYTES,
        (*(tensor.data_ptr() for tensor in tensors), first, scales, *strides, *numbers, scale * log2(e)),
        launcher.current_stream(device.index),
        pdl=True,
    )


def reference(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    table: torch.Tensor,
    lengths: torch.Tensor,
    scale: float,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """Return what `decode_attention` computes, in `dtype`, weights not rounded."""
    out = torch.zeros(queries.shape, dtype=dtype, device=queries.device)
    for request, length in enumerate(lengths[: len(queries)].tolist()):
        if length == 0:
            continue
        own = table[request, : ceil_div(length, keys.shape[1])].long()
        k, v = (tensor[own].flatten(0, 1)[:length].to(dtype).transpose(0, 1) for tensor in (keys, values))
        grouped = queries[request].to(dtype).unflatten(0, (keys.shape[2], -1))
        weights = torch.softmax(grouped @ k.transpose(1, 2) * scale, -1)
        out[request] = (weights @ v).flatten(0, 1)
    return out
