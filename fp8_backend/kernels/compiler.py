"""Compile a kernel of this package to a cubin with NVRTC: no nvcc, no host compiler, no GPU, no headers but our own."""

from __future__ import annotations

import hashlib
import json
import os
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from fp8_backend.errors import CompileError

CUDA_FOLDER = Path(__file__).parent / "cuda"
ARCH = "sm_90a"
# --no-source-include: an include that is not ours must fail instead of being found in the current directory.
# -default-device: lambdas with template parameters are of the device, too (elements.cuh).
FLAGS = (
    f"--gpu-architecture={ARCH}",
    "-std=c++20",
    "-default-device",
    "--no-source-include",
    "--no-cache",
    "--ptxas-options=-v",
)
# Raise it when the meaning of a cache entry changes without any of the other parts of the key changing.
SCHEMA = 1

_INCLUDE = re.compile(rb'^[ \t]*#[ \t]*include[ \t]*"([^"\n]+)"', re.MULTILINE)


@dataclass(frozen=True)
class KernelSpec:
    """One kernel to compile: a file of device code, its extern "C" entry and its compile-time constants.

    Includes are written relative to `folder`.
    """

    file: str
    entry: str
    defines: tuple[tuple[str, int], ...] = ()
    folder: Path = CUDA_FOLDER

    @property
    def name(self) -> str:
        """The spec as a person reads it and as a file name, such as gemm-BLOCK_M=64-NUM_STAGES=6."""
        stem = Path(self.file).stem
        entry = [self.entry] if self.entry != stem else []
        return "-".join([stem, *entry, *(f"{key}={int(value)}" for key, value in self.defines)])


@dataclass(frozen=True)
class CompiledKernel:
    """A cubin and what ptxas said about it.

    `registers` are per thread; `spill_bytes` (stores plus loads) and `stack_bytes` cover the entry and every function
    it calls. `warnings` holds NVRTC's warnings and each ptxas note with a code, such as C7508 (setmaxnreg ignored),
    C7510 and C7519 (wgmma serialised): they do not fail a compile and cost most of a kernel's speed.
    """

    cubin: bytes
    log: str
    registers: int
    spill_bytes: int
    stack_bytes: int
    warnings: tuple[str, ...] = ()


def read_sources(spec: KernelSpec) -> dict[str, bytes]:
    """Read the spec's file and every header it includes, directly or not; the file itself comes first.

    Raises:
        CompileError: the file or a header is missing.
    """
    sources: dict[str, bytes] = {}
    pending = [(spec.file, "the kernel's file")]
    while pending:
        name, wanted_by = pending.pop(0)
        if name in sources:
            continue
        try:
            sources[name] = (spec.folder / name).read_bytes()
        except OSError as error:
            raise CompileError(
                f"kernel {spec.name}: cannot read {spec.folder / name} ({wanted_by}): {error.strerror}; "
                "reinstall fp8-backend"
            ) from None
        pending += [(match.decode(), f"included by {name}") for match in _INCLUDE.findall(sources[name])]
    return sources


def source_digest(spec: KernelSpec) -> str:
    """Return the sha256 of the spec's file and of every header it includes, as hex."""
    return _digest_sources(read_sources(spec))


def cache_key(spec: KernelSpec, sources: dict[str, bytes] | None = None) -> str:
    """Return the sha256 (hex) of everything the cubin depends on.

    That is the spec without its folder, the bytes of its sources, the flags, the architecture and the NVRTC build.

    Args:
        spec: the kernel.
        sources: from `read_sources`, to compile later what is hashed now; read here by default.
    """
    digest = _digest_sources(read_sources(spec) if sources is None else sources)
    parts = [SCHEMA, spec.file, spec.entry, list(spec.defines), digest, nvrtc_version(), FLAGS, ARCH]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def compile_kernel(spec: KernelSpec, sources: dict[str, bytes] | None = None) -> CompiledKernel:
    """Compile one kernel for sm_90a; needs no GPU and no driver.

    Args:
        spec: the kernel.
        sources: from `read_sources`; read here by default.

    Raises:
        CompileError: NVRTC is missing, a source is missing, or NVRTC rejected the source; the message holds its whole
            log, with file names and lines.
    """
    try:
        return _compile(spec, read_sources(spec) if sources is None else sources)
    except RuntimeError as error:  # the binding's, of a library that lacks a function
        raise CompileError(
            f"kernel {spec.name}: NVRTC {nvrtc_version()} cannot be used: {error}; pip install --force-reinstall "
            "'nvidia-cuda-nvrtc>=13'"
        ) from error


def _compile(spec: KernelSpec, sources: dict[str, bytes]) -> CompiledKernel:
    headers = {name: text for name, text in sources.items() if name != spec.file}
    nvrtc = _nvrtc()
    flags = [flag.encode() for flag in (*FLAGS, *(f"-D{key}={int(value)}" for key, value in spec.defines))]
    # Sources travel as bytes, so that what the cache hashed is what is compiled even while somebody edits the files.
    program = _checked(
        spec,
        nvrtc.nvrtcCreateProgram(
            sources[spec.file],
            spec.file.encode(),
            len(headers),
            list(headers.values()),
            [name.encode() for name in headers],
        ),
    )
    try:
        (status,) = nvrtc.nvrtcCompileProgram(program, len(flags), flags)
        log = (
            _fetch(program, spec, nvrtc.nvrtcGetProgramLogSize, nvrtc.nvrtcGetProgramLog)
            .rstrip(b"\0")
            .decode(errors="replace")
        )
        if status != nvrtc.nvrtcResult.NVRTC_SUCCESS:
            raise CompileError(
                f"kernel {spec.name} ({spec.folder / spec.file}): {status.name} from NVRTC {nvrtc_version()} "
                f"for {ARCH}; its log:\n{log.strip()}"
            )
        cubin = _fetch(program, spec, nvrtc.nvrtcGetCUBINSize, nvrtc.nvrtcGetCUBIN)
    finally:
        nvrtc.nvrtcDestroyProgram(program)
    return CompiledKernel(cubin, log, *parse_log(log, spec.entry), warnings=parse_warnings(log))


def parse_log(log: str, entry: str) -> tuple[int, int, int]:
    """Return (registers, spill bytes, stack bytes) of one entry from the output of `ptxas -v`.

    Raises:
        CompileError: the log has no such entry.
    """
    sections = re.split(r"Compiling entry function '([^']+)'", log)
    section = dict(zip(sections[1::2], sections[2::2], strict=True)).get(entry)
    registers = re.search(r"Used (\d+) registers", section) if section is not None else None
    if section is None or registers is None:
        raise CompileError(
            f"entry {entry!r} is not in the compiled file (it has: {', '.join(sections[1::2]) or 'none'}); "
            f'declare it extern "C" __global__; log:\n{log.strip()}'
        )
    spills = re.findall(r"(\d+) bytes spill (?:stores|loads)", section)
    stacks = re.findall(r"(\d+) bytes stack frame", section)
    return int(registers[1]), sum(map(int, spills)), max(map(int, stacks), default=0)


def parse_warnings(log: str) -> tuple[str, ...]:
    """Return the lines of a log that hold a compiler warning or a ptxas note with a code such as (C7510)."""
    lines = (line.strip() for line in log.splitlines())
    return tuple(line for line in lines if re.search(r"\bwarning\b|\(C\d{4}\)", line))


@cache
def nvrtc_version() -> str:
    """Return major.minor of the NVRTC in use and the size of its file, which tells patch releases apart.

    Raises:
        CompileError: NVRTC cannot be loaded.
    """
    nvrtc = _nvrtc()
    from cuda import pathfinder

    try:
        _, major, minor = nvrtc.nvrtcVersion()
        path = pathfinder.load_nvidia_dynamic_lib("nvrtc").abs_path
    except (RuntimeError, pathfinder.DynamicLibNotFoundError) as error:
        raise CompileError(f"NVRTC cannot be loaded: {error}; pip install 'nvidia-cuda-nvrtc>=13'") from error
    size = os.path.getsize(path) if path is not None else 0
    return f"{major}.{minor}+{size}"


def _digest_sources(sources: dict[str, bytes]) -> str:
    digest = hashlib.sha256()
    for name, text in sources.items():
        digest.update(f"{name} {len(text)}\n".encode())  # the length keeps two files from running into each other
        digest.update(text)
    return digest.hexdigest()


def _nvrtc() -> Any:
    try:
        from cuda.bindings import nvrtc
    except ImportError as error:
        raise CompileError(f"cuda-bindings cannot be imported: {error}; pip install 'cuda-bindings>=13'") from error
    return nvrtc


def _checked(spec: KernelSpec, result: tuple[Any, ...]) -> Any:
    status, *values = result
    if status.value != 0:
        raise CompileError(f"kernel {spec.name}: {status.name} from NVRTC {nvrtc_version()}; run `fp8-backend doctor`")
    return values[0] if values else None


def _fetch(program: Any, spec: KernelSpec, get_size: Any, get: Any) -> bytes:
    buffer = bytes(_checked(spec, get_size(program)))  # the binding takes bytes alone, and writes into them
    _checked(spec, get(program, buffer))
    return buffer
