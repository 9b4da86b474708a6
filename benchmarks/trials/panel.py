"""Time panel.cuh, every width and split of it, beside the linear in use and the floor, on a grid of shapes.

    python -m benchmarks.trials.panel [--m 16,32,64] [--shapes 24576x4096,...] [--json panel.json]

Weights cold from memory, quantisation included, the variants interleaved in CUDA-graph replays; each is verified
against float64 in the run that times it, its output poisoned before.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.trials import Measure, replay_into_nan, time_linears
from fp8_backend.bench.operands import RandomLinear
from fp8_backend.bench.stream import stream_us
from fp8_backend.kernels import gemm, launcher, layout, quantize
from fp8_backend.kernels.compiler import CUDA_FOLDER, KernelSpec
from fp8_backend.kernels.problem import MAX_SHARED_BYTES
from fp8_backend.kernels.reference import BLOCK, align, ceil_div, relative_error
from fp8_backend.measure.timing import capture, interleaved_us

HERE = Path(__file__).parent
COLUMNS, SPLITS = (64, 80, 96, 112, 128), (1, 2, 4)
TOKENS, THREADS, MAX_STAGES = 64, 384, 8
SHAPES = "24576x4096,36864x7168,24576x1536,10240x5120,7168x16384,4096x12288,6144x4096,4096x4096,2112x7168,51200x5120"
LAYOUT = launcher.ParamLayout(("u64",) * 6 + ("i64",) + ("u32",) * 11)
POINTERS = 6


@dataclass(frozen=True)
class PanelConfig:
    """One compiled form of panel.cuh.

    columns: of a math warpgroup, wgmma's N; a CTA owns twice as many rows of the weight. split: CTAs that share k.
    """

    columns: int
    split: int

    @property
    def _bytes(self) -> tuple[int, int]:
        """Shared memory of a stage with its scales and barriers, and of the sums with their barrier."""
        return (2 * self.columns + TOKENS) * BLOCK + (TOKENS + 8) * 4 + 16, self.columns // 8 * 4096 + 8

    @property
    def num_stages(self) -> int:
        """How many stages fit beside the sums."""
        stage, sums = self._bytes
        return min(MAX_STAGES, (MAX_SHARED_BYTES - sums) // stage)

    @property
    def shared_bytes(self) -> int:
        """Dynamic shared memory of a CTA, laid out as panel.cuh says."""
        stage, sums = self._bytes
        return self.num_stages * stage + sums

    def spec(self, folder: Path) -> KernelSpec:
        """Return what to compile, from a folder made by `sources`."""
        return KernelSpec("panel.cuh", "panel", (("COLUMNS", self.columns), ("SPLIT", self.split)), folder)


CONFIGS = tuple(
    PanelConfig(columns, split) for columns in COLUMNS for split in SPLITS if columns // 8 % split == 0
)  # fmt: skip


def sources(folder: Path) -> Path:
    """Write the device code of the package and of this trial into a folder; return it."""
    shutil.copytree(CUDA_FOLDER, folder, dirs_exist_ok=True)
    shutil.copy(HERE / "panel.cuh", folder)
    missing = [n for n in COLUMNS if n not in (64, 128)]  # those that wgmma.cuh does not have
    (folder / "wgmma_columns.cuh").write_text("#pragma once\n" + "".join(map(wgmma, missing)))
    return folder


def wgmma(n: int) -> str:
    """Return wgmma.cuh's struct for one more N."""
    count = n // 2
    values = ", ".join(f"%{i}" for i in range(count))
    operands = ", ".join(f'"+f"(d[{i}])' for i in range(count))
    return f"""
template <> struct Wgmma<{n}> {{
    DEVICE static void multiply(float (&d)[{count}], u64 a, u64 b, u32 accumulate) {{
        asm volatile(
            "{{ .reg .pred p; setp.ne.u32 p, %{count + 2}, 0; wgmma.mma_async.sync.aligned.m64n{n}k32.f32.e4m3.e4m3 "
            "{{{values}}}, %{count}, %{count + 1}, p, 1, 1; }}"
            : {operands} : "l"(a), "l"(b), "r"(accumulate));
    }}
}};
"""


class PanelPlan:
    """The two launches of a linear for tensors like x [m, k], at most 64 rows, and out [m, n]."""

    def __init__(self, config: PanelConfig, kernel: launcher.Kernel, x: torch.Tensor, out: torch.Tensor) -> None:
        (m, k), n, k_blocks = x.shape, out.shape[1], ceil_div(x.shape[1], BLOCK)
        tiles = ceil_div(n, 2 * config.columns)
        machine = gemm.machine(x.device.index)
        grid = min(tiles, machine.num_sms) if config.split == 1 else tiles * config.split
        paired = out.element_size() == 2 and out.data_ptr() % 4 == 0 and out.stride(0) % 2 == 0 and n % 2 == 0
        rows, strides = layout.packed_weight_shape(n, k)[1], layout.packed_scale_shape(n, k)[1]
        kind = quantize.ELEMENT_TYPES[out.dtype]
        params = (out.stride(0), m, n, k_blocks, rows, align(m, 4), strides, config.num_stages, config.num_stages)
        self._multiply = launcher.PreparedLaunch(
            *(kernel, (grid, 1), THREADS, config.shared_bytes, POINTERS),
            (*params, kind, 0, int(paired)),
            config.split,
        )
        self._quantise = quantize.prepare(x, TOKENS)
        self._code_bytes = k_blocks * TOKENS * BLOCK
        self._buffer_bytes = self._code_bytes + k_blocks * align(m, 4) * 4
        self._device = x.device.index

    def __call__(self, x: torch.Tensor, weight: gemm.Weight, out: torch.Tensor) -> torch.Tensor:
        """Launch on the current stream; out is overwritten and returned."""
        stream = launcher.current_stream(self._device)
        buffer = torch.empty(self._buffer_bytes, dtype=torch.uint8, device=x.device)
        codes = buffer.data_ptr()
        scale_a = codes + self._code_bytes
        self._quantise(stream, x.data_ptr(), codes, scale_a)
        pointers = (codes, scale_a, out.data_ptr(), weight.codes.data_ptr(), weight.scale.data_ptr(), 0)
        self._multiply(stream, *pointers)
        return out


def measure(kernel: Any, n: int, k: int, ms: tuple[int, ...]) -> Iterator[dict[str, Any]]:
    """Yield a row for each m: microseconds of the linear in use, of every configuration, and of the stream floor."""
    weight = RandomLinear(n, k, bf16=False, plain=False)
    alone, chained = stream_us([copy.codes for copy in weight.ours])
    for m in ms:
        x = torch.randn(m, k, device="cuda", dtype=torch.bfloat16)
        truth = weight.truth(x)
        arms, errors = {"in use": capture([partial(weight.linear, x, i) for i in range(len(weight.ours))])}, {}
        machine = gemm.machine(x.device.index)
        for config in CONFIGS:
            tiles = ceil_div(n, 2 * config.columns)
            if config.split > 1 and (tiles > machine.max_clusters(config.split) or k < config.split * BLOCK):
                continue
            plan = PanelPlan(config, kernel(config), x, torch.empty(m, n, device="cuda", dtype=torch.bfloat16))
            outs = [torch.full((m, n), float("nan"), device="cuda", dtype=torch.bfloat16) for _ in weight.ours]
            name = f"{config.columns} columns, split {config.split}"
            arms[name] = capture([partial(plan, x, each, out) for each, out in zip(weight.ours, outs, strict=True)])
            replay_into_nan(arms[name], outs)
            errors[name] = max(relative_error(out, truth) for out in outs)
        us = {name: round(value, 2) for name, value in interleaved_us(arms).items()}
        yield {"m": m, "n": n, "k": k, "us": us, "stream_us": alone, "stream_pdl_us": chained, "rel_err": errors}


def main() -> None:
    """Measure and print; write the rows where asked."""
    with tempfile.TemporaryDirectory() as scratch:

        def prepare() -> Measure:
            folder = sources(Path(scratch))
            kernel = cache(lambda config: launcher.load(config.spec(folder), LAYOUT))
            return partial(measure, kernel)

        time_linears("panel", SHAPES, "8,16,32,64", prepare)


if __name__ == "__main__":
    main()
