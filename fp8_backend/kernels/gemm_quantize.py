"""The host half of gemm_quantize.cuh: the launch of a linear layer whose GEMM quantises by itself, prepared once."""

from __future__ import annotations

from functools import cache

import torch

from fp8_backend.kernels import launcher, layout
from fp8_backend.kernels.heuristics import QuantizingGemmChoice
from fp8_backend.kernels.prepared import Launch
from fp8_backend.kernels.problem import QuantizingGemmConfig
from fp8_backend.kernels.quantize import ELEMENT_TYPES
from fp8_backend.kernels.reference import BLOCK, ceil_div
from fp8_backend.kernels.tensor_map import MovableMap

# The map of x; packed b, scale_b, out, bias; then the row stride of out and 11 numbers.
_LAYOUT = launcher.ParamLayout(("map",) + ("u64",) * 4 + ("i64",) + ("u32",) * 11)


@cache
def kernel(config: QuantizingGemmConfig, device: int) -> launcher.Kernel:
    """Return the loaded kernel of a configuration on the current device, whose index is part of the key only."""
    return launcher.load(config.spec(), _LAYOUT)


def mappable(x: torch.Tensor) -> bool:
    """Return whether the copy engine can fetch rows of x [m, k]: of 16 bits, contiguous, at multiples of 16 bytes."""
    row_bytes = x.stride(0) * x.element_size()
    in_lines = x.data_ptr() % 16 == 0 and row_bytes % 16 == 0 and row_bytes > 0
    return x.element_size() == 2 and x.stride(1) == 1 and in_lines


class QuantizingGemmPlan:
    """The launch of y = x @ weight^T + bias for tensors of one shape and dtype; used by one thread at a time."""

    def __init__(
        self, choice: QuantizingGemmChoice, x: torch.Tensor, out: torch.Tensor, bias: torch.Tensor | None
    ) -> None:
        """Prepare for tensors like x [m, k], out [m, n] with contiguous rows, and bias; nothing is checked.

        x: of 16 bits, `mappable`.
        """
        config, (m, k), n = choice.config, x.shape, out.shape[1]
        self.weight_shape, self.scale_shape = layout.packed_weight_shape(n, k), layout.packed_scale_shape(n, k)
        self._device = x.device.index
        # Boxes have no rows that x does not have: the copy engine would write zeros for them.
        rows, stride = min(config.block_m, m), x.stride(0) * 2
        self._x = MovableMap((k, m, 1), (stride, stride), (BLOCK // 2, rows, 1), 2)
        halves = out.element_size() == 2
        vectorised = halves and out.data_ptr() % 16 == 0 and out.stride(0) % 8 == 0 and n % 8 == 0
        aligned = halves and out.data_ptr() % 8 == 0 and out.stride(0) % 4 == 0
        params = (
            *(out.stride(0), m, n, self.weight_shape[1], ceil_div(k, BLOCK), self.scale_shape[1], rows),
            *(ELEMENT_TYPES[x.dtype], ELEMENT_TYPES[out.dtype], 0 if bias is None else ELEMENT_TYPES[bias.dtype]),
            *(int(vectorised), int(aligned)),
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
        self, x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, out: torch.Tensor, bias: torch.Tensor | None
    ) -> None:
        """Launch on the current stream of the current device.

        Args:
            x: [m, k] like the one prepared for, also in its alignment to 16 bytes.
            weight: packed by `pack_weight`.
            scale: packed by `pack_scale`.
            out: [m, n] like the one prepared for, also in its alignment to 16 bytes; overwritten.
            bias: [n] in the dtype prepared for, or None.
        """
        self._launch(
            launcher.current_stream(self._device),
            self._x.at(x.data_ptr()),
            weight.data_ptr(),
            scale.data_ptr(),
            out.data_ptr(),
            0 if bias is None else bias.data_ptr(),
        )
