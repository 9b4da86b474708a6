"""The host half of decode.cuh: the launches of a linear layer for few tokens, prepared once a shape."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch

from fp8_backend.kernels import launcher, layout, quantize
from fp8_backend.kernels.decode_heuristics import DecodeChoice
from fp8_backend.kernels.prepared import Launch, PreparedLaunch
from fp8_backend.kernels.problem import DECODE_THREADS, DecodeConfig
from fp8_backend.kernels.reference import BLOCK, align, ceil_div

# x, scale_a, out, weight, scale_b, bias; then the row strides of x and out, and 13 numbers.
_LAYOUT = launcher.ParamLayout(("u64",) * 6 + ("i64", "i64") + ("u32",) * 13)
_SCALE_ALIGNMENT = 16  # bytes, of what a bulk copy reads


@cache
def kernel(config: DecodeConfig, device: int) -> launcher.Kernel:
    """Return the loaded kernel of a configuration on the current device, whose index is part of the key only."""
    return launcher.load(config.spec(), _LAYOUT)


class DecodePlan:
    """The launches of y = x @ weight^T + bias for tensors of one shape and dtype; used by one thread at a time."""

    def __init__(
        self,
        choice: DecodeChoice,
        x: torch.Tensor,
        out: torch.Tensor,
        bias: torch.Tensor | None,
        prepare: Callable[[torch.Tensor, int], PreparedLaunch] = quantize.prepare,
    ) -> None:
        """Prepare for tensors like x [m, k] and out [m, n], both with contiguous rows, and bias; nothing is checked.

        prepare: gives the launch that makes the codes of x, where the kernel of this choice does not.
        """
        config, (m, k), n = choice.config, x.shape, out.shape[1]
        assert quantize.is_common(x) or not config.fused
        k_blocks, device = ceil_div(k, BLOCK), x.device.index
        self.weight_shape, self.scale_shape = layout.packed_weight_shape(n, k), layout.packed_scale_shape(n, k)
        self._device, self.tile_rows = device, config.tokens
        # Bytes of a row of 16-bit outputs that can be written together; 0: by element.
        places = (out.data_ptr(), out.stride(0) * out.element_size())
        paired = out.element_size() == 2 and n % 2 == 0
        aligned = next((size for size in (8, 4) if paired and all(place % size == 0 for place in places)), 0)
        types = quantize.ELEMENT_TYPES
        params = (
            *(x.stride(0), out.stride(0), m, n, k, k_blocks, self.weight_shape[1], align(m, 4), self.scale_shape[1]),
            *(choice.rows, choice.num_stages, choice.prefetch),
            *(types[out.dtype], 0 if bias is None else types[bias.dtype], aligned),
        )
        shared_bytes = config.shared_bytes(choice.rows, k_blocks, choice.num_stages)
        decode = Launch(kernel(config, device), (choice.grid, 1), DECODE_THREADS, shared_bytes, params, config.split)
        self._multiply = decode.prepared()
        self._quantise = None if config.fused else prepare(x, config.tokens)
        self._code_bytes = quantize.code_bytes(m, k, config.tokens)
        assert self._code_bytes % _SCALE_ALIGNMENT == 0
        # In elements of x: torch takes a dtype and a device from x faster than from arguments.
        self._buffer_elements = quantize.buffer_bytes(m, k, config.tokens) // x.element_size()

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
            out: [m, n] like the one prepared for, also in its alignment to 8 bytes; overwritten.
            bias: [n] in the dtype prepared for, or None.
            others: addresses that the launch which makes the codes takes behind that of x.
        """
        stream = launcher.current_stream(self._device)
        source, buffer = x.data_ptr(), None
        if self._quantise is not None:
            buffer = x.new_empty(self._buffer_elements)
            codes = buffer.data_ptr()
            self._quantise(stream, source, *others, codes, codes + self._code_bytes)
            source = codes
        self.multiply(stream, source, weight, scale, out, bias)

    def multiply(
        self,
        stream: int,
        source: int,
        weight: torch.Tensor,
        scale: torch.Tensor,
        out: torch.Tensor,
        bias: torch.Tensor | None,
    ) -> None:
        """Launch the multiplication alone. source: address of codes in tiles, their scales behind them, or of x."""
        bias_pointer, scale_a = 0 if bias is None else bias.data_ptr(), source + self._code_bytes
        self._multiply(stream, source, scale_a, out.data_ptr(), weight.data_ptr(), scale.data_ptr(), bias_pointer)
