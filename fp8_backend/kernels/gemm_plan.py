"""The host half of gemm.cuh and gemm_stationary.cuh: a launch, prepared once, and with it those of a linear layer."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch

from fp8_backend.kernels import launcher, layout, quantize
from fp8_backend.kernels.heuristics import GemmChoice
from fp8_backend.kernels.layout import ROW_ALIGNMENT
from fp8_backend.kernels.prepared import Launch, PreparedLaunch
from fp8_backend.kernels.problem import GemmConfig, StationaryGemmConfig
from fp8_backend.kernels.quantize import ELEMENT_TYPES
from fp8_backend.kernels.reference import BLOCK, align, ceil_div
from fp8_backend.kernels.tensor_map import BYTES, MovableMap, Swizzle, row_major_map

# Maps of a, b and out; packed b, scale_a, scale_b, out, bias; then the row stride of out and 11 numbers.
_LAYOUT = launcher.ParamLayout(("map", "map", "map") + ("u64",) * 5 + ("i64",) + ("u32",) * 11)
_NO_MAP = bytes(BYTES)


@cache
def kernel(config: GemmConfig | StationaryGemmConfig, device: int) -> launcher.Kernel:
    """Return the loaded kernel of a configuration on the current device, whose index is part of the key only."""
    return launcher.load(config.spec(), _LAYOUT)


class GemmLaunch:
    """The launch of such a GEMM for tensors of one shape, stride and dtype; used by one thread at a time."""

    def __init__(
        self,
        choice: GemmChoice,
        k: int,
        code_stride: int,
        rows: torch.Tensor | None,
        out: torch.Tensor,
        bias: torch.Tensor | None,
    ) -> None:
        """Prepare for tensors like out [m, n] and bias; nothing is checked.

        code_stride: bytes from one row of codes to the next. rows: a weight [n, k] with contiguous rows, or None if it
        is packed.
        """
        config, (m, n), k_blocks = choice.config, out.shape, ceil_div(k, BLOCK)
        mapped = out.element_size() == 2 and out.data_ptr() % 16 == 0 and out.stride(0) % 8 == 0
        # Boxes have no rows that a does not have: the copy engine would write zeros for them.
        rows_a = min(config.block_m, align(m, ROW_ALIGNMENT))
        self._a = row_major_map(code_stride, m, k_blocks, rows_a)
        self._b = None
        if rows is not None:
            self._b = row_major_map(rows.stride(0), n, k_blocks, config.block_n)
        self._out = None
        if mapped:
            columns = config.stored_columns
            swizzle: Swizzle = "128B" if columns == 64 else "64B"
            self._out = MovableMap((n, m), (out.stride(0) * 2,), (columns, 16), 2, swizzle)
        params = (
            *(out.stride(0), m, n, k_blocks, align(m, 4), layout.packed_scale_shape(n, k)[1], choice.strip),
            *(ELEMENT_TYPES[out.dtype], 0 if bias is None else ELEMENT_TYPES[bias.dtype], int(mapped)),
            *(0 if rows is not None else layout.packed_weight_shape(n, k)[1], rows_a * BLOCK),
        )
        self._launch = Launch(
            kernel(config, out.device.index),
            (choice.grid, 1),
            config.threads,
            config.shared_bytes,
            params,
            choice.split,
        ).prepared()

    def __call__(
        self,
        stream: int,
        codes: int,
        scale_a: int,
        weight: torch.Tensor,
        scale: torch.Tensor,
        out: torch.Tensor,
        bias: torch.Tensor | None,
    ) -> None:
        """Launch on a raw stream of the current device.

        Args:
            stream: from `launcher.current_stream`.
            codes: address of codes [m, k_blocks * 128], a multiple of 16.
            scale_a: address of their scales [k_blocks, align(m, 4)], a multiple of 16.
            weight: packed by `pack_weight`, or like the rows prepared for.
            scale: packed by `pack_scale`.
            out: [m, n] like the one prepared for, also in its alignment to 16 bytes; overwritten.
            bias: [n] in the dtype prepared for, or None.
        """
        b, target = weight.data_ptr(), out.data_ptr()
        self._launch(
            stream,
            self._a.at(codes),
            _NO_MAP if self._b is None else self._b.at(b),
            _NO_MAP if self._out is None else self._out.at(target),
            b if self._b is None else 0,
            scale_a,
            scale.data_ptr(),
            target,
            0 if bias is None else bias.data_ptr(),
        )


class GemmPlan:
    """The launches of y = x @ weight^T + bias for tensors of one shape and dtype; used by one thread at a time."""

    tile_rows = 0  # of the codes, which lie in rows

    def __init__(
        self,
        choice: GemmChoice,
        x: torch.Tensor,
        out: torch.Tensor,
        bias: torch.Tensor | None,
        prepare: Callable[[torch.Tensor, int], PreparedLaunch] = quantize.prepare,
    ) -> None:
        """Prepare for tensors like x [m, k] and out [m, n], both with contiguous rows, and bias; nothing is checked.

        prepare: gives the launch that makes the codes of x.
        """
        (m, k), n = x.shape, out.shape[1]
        k_blocks = ceil_div(k, BLOCK)
        self.weight_shape, self.scale_shape = layout.packed_weight_shape(n, k), layout.packed_scale_shape(n, k)
        self._device = x.device.index
        self._quantise = prepare(x, 0)
        self._multiply = GemmLaunch(choice, k, k_blocks * BLOCK, None, out, bias)
        self._code_bytes = quantize.code_bytes(m, k, 0)
        # In elements of x: torch takes a dtype and a device from x faster than from arguments.
        self._buffer_elements = quantize.buffer_bytes(m, k, 0) // x.element_size()

    def __call__(
        self,
        x: torch.Tensor,
        weight: torch.Tensor,
        scale: torch.Tensor,
        out: torch.Tensor,
        bias: torch.Tensor | None,
        *others: int,
    ) -> None:
        """Launch on the current stream of the current device.

        Args:
            x: [m, k] like the one prepared for, also in its alignment to 16 bytes.
            weight: packed by `pack_weight`.
            scale: packed by `pack_scale`.
            out: [m, n] like the one prepared for, also in its alignment to 16 bytes; overwritten.
            bias: [n] in the dtype prepared for, or None.
            others: addresses that the launch which makes the codes takes behind that of x.
        """
        stream = launcher.current_stream(self._device)
        buffer = x.new_empty(self._buffer_elements)
        codes = buffer.data_ptr()
        self._quantise(stream, x.data_ptr(), *others, codes, codes + self._code_bytes)
        self.multiply(stream, codes, weight, scale, out, bias)

    def multiply(
        self,
        stream: int,
        codes: int,
        weight: torch.Tensor,
        scale: torch.Tensor,
        out: torch.Tensor,
        bias: torch.Tensor | None,
    ) -> None:
        """Launch the multiplication alone. codes: address of codes in rows and of their scales behind them."""
        self._multiply(stream, codes, codes + self._code_bytes, weight, scale, out, bias)
