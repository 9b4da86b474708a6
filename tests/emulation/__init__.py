"""The device code on a CPU: compiled as C++ on an emulated machine, so that tests run it where there is no GPU."""

from __future__ import annotations

import ctypes
import hashlib
import os
import re
import shutil
import struct
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

from fp8_backend.kernels import (
    activation,
    attended_linear,
    attention,
    combine,
    decode,
    experts,
    experts_decode,
    experts_joint,
    experts_prefill,
    experts_prefill_plan,
    experts_single,
    fused_linear,
    gemm,
    gemm_plan,
    gemm_quantize,
    grouped_gathered,
    grouped_sorted,
    grouped_tall,
    launcher,
    m_grouped,
    masked,
    norm,
    norm_rope,
    quantize,
    quantize_sorted,
    router,
    routing,
    silu,
    tensor_map,
)
from fp8_backend.kernels.compiler import KernelSpec
from fp8_backend.kernels.problem import Machine

HERE = Path(__file__).parent
STAND_INS = ("machine.h", "ptx.cuh", "wgmma.cuh")
FLAGS = ("-std=c++20", "-O2", "-shared", "-fPIC", "-w", "-fno-strict-aliasing", "-ffp-contract=off")
_MAP = struct.Struct("<Q3Q2Q3I3I56x")
_CONFIG = struct.Struct("<7I4xQQI4x")  # CUlaunchConfig, as launcher.py lays it out
_CLUSTER = struct.Struct("<I4xI")  # the head of a CUlaunchAttribute
_COOPERATIVE, _CLUSTER_DIMENSION = 2, 4
_ENTRY = """#include "{file}"
extern "C" const char* run(void** parameters, u32 seed, u32 x, u32 y, u32 z, u32 threads, u32 shared, u32 cluster) {{
    return emulation::run({entry}, parameters, seed, {{x, y, z}}, threads, shared, cluster);
}}
"""


class EmulationError(AssertionError):
    """What a kernel may not do in any interleaving."""


def shared_of_each_cta(source: str) -> str:
    """Return device code whose shared memory is that of the running CTA: C++ has no word for it."""

    def arrays(found: re.Match[str]) -> str:
        named = re.findall(r"(\w+)\[(\w+)\]", found[2])
        each = (f"auto& {name} = emulation::static_shared<{found[1]}, {size}, __COUNTER__>();" for name, size in named)
        return " ".join(each)

    dynamic = "extern __shared__ __align__(1024) u8 shared[];"
    source = source.replace(dynamic, "u8* const shared = emulation::cta().shared;")
    return re.sub(r"__shared__ (\w+) ([^;]+);", arrays, source)


def build(spec: KernelSpec, folder: Path) -> Path:
    """Compile a kernel of the package as C++; return the library, which is kept in `folder`."""
    sources = {path.name: path.read_text() for path in spec.folder.glob("*.cuh") if path.name not in STAND_INS}
    sources = {name: shared_of_each_cta(text) for name, text in sources.items()}
    sources |= {name: (HERE / name).read_text() for name in STAND_INS}
    defines = [f"-D{name}={int(value)}" for name, value in spec.defines]
    digest = hashlib.sha256(repr((sorted(sources.items()), spec.file, spec.entry, defines, FLAGS)).encode()).hexdigest()
    library = folder / f"{spec.name}-{digest[:16]}.so"
    if library.exists():
        return library
    work = folder / f"{digest[:16]}-{os.getpid()}"
    work.mkdir(parents=True)
    for name, text in sources.items():
        (work / name).write_text(text)
    (work / "entry.cpp").write_text(_ENTRY.format(file=spec.file, entry=spec.entry))
    command = ["g++", *FLAGS, *defines, "entry.cpp", "-o", "kernel.so"]
    done = subprocess.run(command, cwd=work, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    (work / "kernel.so").replace(library)
    shutil.rmtree(work)
    return library


class Emulated:
    """Kernels built so far, and the seed of the next run."""

    def __init__(self, folder: Path, sources: Path | None, seed: int, at_once: bool) -> None:
        self.folder, self.sources, self.seed, self.at_once, self.runs = folder, sources, seed, at_once, 0
        self.loaded: dict[tuple[KernelSpec, launcher.ParamLayout], launcher.Kernel] = {}
        self._libraries: list[ctypes.CDLL] = []

    def load(self, spec: KernelSpec, layout: launcher.ParamLayout) -> launcher.Kernel:
        """Return a kernel whose launches run here and now; stands for `launcher.load`."""
        key = (spec, layout)
        if key not in self.loaded:
            library = ctypes.CDLL(str(build(replace(spec, folder=self.sources or spec.folder), self.folder)))
            self._libraries.append(library)
            ctypes.c_uint.in_dll(library, "filled_rows").value = 0  # a library stays loaded, and has counted for others
            library.run.restype = ctypes.c_char_p
            library.run.argtypes = (ctypes.c_void_p, *[ctypes.c_uint] * 7)
            self.loaded[key] = launcher.Kernel(spec.name, 0, layout, launch=self._launch(spec.name, library.run))
        return self.loaded[key]

    def filled_rows(self) -> int:
        """Return how many rows that no tensor has were filled with zeros, by all launches so far."""
        return sum(ctypes.c_uint.in_dll(library, "filled_rows").value for library in self._libraries)

    def _launch(self, name: str, run: Callable[..., bytes]) -> Callable[..., int]:
        def launch(config: int, _function: int, parameters: int, _extra: None) -> int:
            *grid, threads, _, _, shared_bytes, _stream, attributes, count = _CONFIG.unpack(
                ctypes.string_at(config, _CONFIG.size)
            )
            cluster = 1
            for index in range(count):
                kind, size = _CLUSTER.unpack(ctypes.string_at(attributes + 64 * index + index * 8, _CLUSTER.size))
                # All CTAs of a cooperative grid run at once, as those of a cluster do.
                cluster = {_CLUSTER_DIMENSION: size, _COOPERATIVE: grid[0]}.get(kind, cluster)
            if self.at_once and cluster == 1:
                cluster = grid[0]
            self.runs += 1
            error = run(parameters, self.seed + 1000 * self.runs, *grid, threads, shared_bytes, cluster).decode()
            if error:
                raise EmulationError(f"{name}: {error}")
            return 0

        return launch


def encode_tiled(
    pointer: int,
    dims: tuple[int, ...],
    strides_bytes: tuple[int, ...],
    box: tuple[int, ...],
    swizzle: str,
    element_bytes: int,
    l2_promotion: int = 256,
) -> bytes:
    """Return the emulated tensor map, `TensorMap` of ptx.cuh beside this file; stands for `tensor_map.encode_tiled`."""
    rank, swizzled = len(dims), {"none": 0, "64B": 64, "128B": 128}[swizzle]
    dims, strides, box = (*dims, 1, 1)[:3], (*strides_bytes, 0, 0)[:2], (*box, 1, 1)[:3]
    return _MAP.pack(pointer, *dims, *strides, *box, element_bytes, swizzled, rank)


# Every module whose code launches kernels.
MODULES = (
    *(
        activation,
        attended_linear,
        attention,
        combine,
        decode,
        experts,
        experts_decode,
        experts_joint,
        experts_prefill,
        experts_prefill_plan,
        experts_single,
    ),
    *(fused_linear, gemm, gemm_plan),
    *(gemm_quantize, grouped_gathered, grouped_sorted, grouped_tall, launcher, m_grouped, masked, norm, norm_rope),
    *(quantize, quantize_sorted, router, routing, silu, tensor_map),
)


@contextmanager
def emulated(
    folder: Path, machine: Machine, sources: Path | None = None, seed: int = 0, at_once: bool = False
) -> Iterator[Emulated]:
    """Make CPU tensors go through the CUDA kernels and their host code, on the emulated machine.

    Args:
        folder: where compiled kernels are kept.
        machine: what the host code is told; a grid runs cluster after cluster, so few multiprocessors are faster.
        sources: of the device code, where it is not the package's.
        seed: of the interleavings.
        at_once: all CTAs of a grid run at once, also without a cluster, and not one after the other.
    """
    here = Emulated(folder, sources, seed, at_once)
    stand_ins = {
        "current_stream": lambda device: 0,
        "encode_tiled": encode_tiled,
        "is_current": lambda device: True,
        "load": here.load,
        "machine": lambda device: machine,
        "memory_bytes_per_us": lambda device: 3.35e6,  # of an H100
        "num_sms": lambda device: machine.num_sms,
        "runs_cuda_kernels": lambda device: True,
    }
    with ExitStack() as stack:
        for module in MODULES:
            for each in vars(module).values():
                if hasattr(each, "cache_clear"):  # of kernels, and of choices for another machine
                    each.cache_clear()
                    stack.callback(each.cache_clear)
            for name in stand_ins.keys() & vars(module).keys():
                stack.enter_context(patch.object(module, name, stand_ins[name]))
        kept = gemm._plans, gemm._launches, fused_linear._plans, attended_linear._plans
        for prepared in (*kept, experts_joint.plans, experts_prefill.plans):
            stack.enter_context(patch.dict(prepared.by_key, clear=True))
        stack.enter_context(patch.dict(attended_linear._wanted, clear=True))
        stack.enter_context(patch.object(attended_linear, "_asked", set()))
        yield here
