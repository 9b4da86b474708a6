"""Time rows.cuh beside the linear in use and the floors, for few tokens, alone and in a chain of dependent linears.

    python -m benchmarks.trials.rows [--m 1,2,4,8] [--shapes 512x7168,...] [--json rows.json]

Weights cold from memory, quantisation included, the variants interleaved in CUDA-graph replays, where each launch may
start before the one ahead has ended; each is verified against float64 in the run that times it, its output poisoned
before.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.trials import Measure, replay_into_nan, time_linears
from fp8_backend.bench.operands import RandomLinear
from fp8_backend.bench.stream import stream_us
from fp8_backend.kernels import gemm, launcher, layout, quantize
from fp8_backend.kernels.compiler import CUDA_FOLDER, KernelSpec
from fp8_backend.kernels.problem import MAX_SHARED_BYTES
from fp8_backend.kernels.reference import BLOCK, ceil_div, relative_error
from fp8_backend.measure.timing import capture, interleaved_us

HERE = Path(__file__).parent
THREADS, MAX_TOKENS = 384, 8
SHAPES = "512x7168,7168x256,3072x1536,2112x7168,7168x2048,4096x4096,6144x4096,4096x7168,24576x1536,24576x4096"
LAYOUT = launcher.ParamLayout(("u64",) * 5 + ("i64",) * 2 + ("u32",) * 12)
POINTERS = 5


def spec(folder: Path) -> KernelSpec:
    """Return what to compile, from a folder made by `sources`."""
    return KernelSpec("rows.cuh", "rows", (), folder)


def sources(folder: Path) -> Path:
    """Write the device code of the package and of this trial into a folder; return it."""
    shutil.copytree(CUDA_FOLDER, folder, dirs_exist_ok=True)
    for name in ("rows.cuh", "mma.cuh"):
        shutil.copy(HERE / name, folder)
    return folder


def token_halves(k: int) -> int:
    """Return how far tokens lie apart in shared memory: 16 bytes more than they are long, for other banks."""
    return ceil_div(k, BLOCK) * BLOCK + 8


def shared_bytes(m: int, n: int, k: int, num_sms: int) -> int:
    """Return the dynamic shared memory of a CTA, laid out as rows.cuh says."""
    groups = ceil_div(ceil_div(n, 8), num_sms)
    return m * token_halves(k) * 2 + ceil_div(k, BLOCK) * 8 * 4 + groups * THREADS * 8


class RowsPlan:
    """The launch of a linear for tensors like x [m, k], at most 8 rows, 16 bits, and out [m, n]."""

    def __init__(self, kernel: launcher.Kernel, x: torch.Tensor, out: torch.Tensor) -> None:
        """Prepare; nothing is checked but that the tokens fit shared memory."""
        (m, k), n, sms = x.shape, out.shape[1], gemm.machine(x.device.index).num_sms
        groups, size = ceil_div(ceil_div(n, 8), sms), shared_bytes(m, n, k, sms)
        assert m <= MAX_TOKENS and size <= MAX_SHARED_BYTES
        rows, stride = layout.packed_weight_shape(n, k)[1], layout.packed_scale_shape(n, k)[1]
        params: tuple[int, ...] = (
            x.stride(0),
            out.stride(0),
            m,
            n,
            k,
            ceil_div(k, BLOCK),
            rows,
            stride,
            groups,
            token_halves(k),
        )
        params += (quantize.ELEMENT_TYPES[x.dtype], quantize.vectorised(x), quantize.ELEMENT_TYPES[out.dtype], 0)
        grid = (ceil_div(ceil_div(n, 8), groups), 1)
        self._launch = launcher.PreparedLaunch(kernel, grid, THREADS, size, POINTERS, params)
        self._device = x.device.index

    def __call__(self, x: torch.Tensor, weight: gemm.Weight, out: torch.Tensor) -> torch.Tensor:
        """Launch on the current stream; out is overwritten and returned."""
        pointers = (x.data_ptr(), out.data_ptr(), weight.codes.data_ptr(), weight.scale.data_ptr(), 0)
        self._launch(launcher.current_stream(self._device), *pointers)
        return out


def measure(kernel: launcher.Kernel, n: int, k: int, ms: tuple[int, ...]) -> Iterator[dict[str, Any]]:
    """Yield a row for each m that fits: microseconds of the linear in use, of the trial, and of the stream floors."""
    weight = RandomLinear(n, k, bf16=False, plain=False)
    alone, chained = stream_us([copy.codes for copy in weight.ours])
    num_sms = gemm.machine(torch.cuda.current_device()).num_sms
    for m in (m for m in ms if shared_bytes(m, n, k, num_sms) <= MAX_SHARED_BYTES):
        x = torch.randn(m, k, device="cuda", dtype=torch.bfloat16)
        outs = [torch.full((m, n), float("nan"), device="cuda", dtype=torch.bfloat16) for _ in weight.ours]
        plan = RowsPlan(kernel, x, outs[0])
        arms = {
            "in use": capture([partial(weight.linear, x, i) for i in range(len(weight.ours))]),
            "trial": capture([partial(plan, x, each, out) for each, out in zip(weight.ours, outs, strict=True)]),
        }
        replay_into_nan(arms["trial"], outs)
        error = max(relative_error(out, weight.truth(x)) for out in outs)
        us = {name: round(value, 2) for name, value in interleaved_us(arms).items()}
        yield {"m": m, "n": n, "k": k, "us": us, "stream_us": alone, "stream_pdl_us": chained, "rel_err": error}


def main() -> None:
    """Measure and print; write the rows where asked."""
    with tempfile.TemporaryDirectory() as scratch:

        def prepare() -> Measure:
            return partial(measure, launcher.load(spec(sources(Path(scratch))), LAYOUT))

        time_linears("rows", SHAPES, "1,2,4,8", prepare)


if __name__ == "__main__":
    main()
