"""Keep compiled kernels: in this process, and on disk under a name that holds a digest of all they depend on.

An entry `v1/<kernel>-<first 16 digits of its key>.cubin` is the cubin, then a line of JSON with the whole key and what
ptxas said, then the sha256 of all that: one file, so that no two halves can differ. It is still a valid ELF file.

An entry is code that will run with the rights of the process that reads it. Directories and entries that another user
(but root) owns, or that group or others may write, are therefore not used. A cache that cannot be used costs one
warning and the time to compile, never an error. Processes do not wait for each other: each compiles a kernel at most
once, and an entry appears under its name whole or not at all.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import secrets
import stat
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path

from fp8_backend import settings
from fp8_backend.errors import CompileError
from fp8_backend.kernels.compiler import CompiledKernel, KernelSpec, cache_key, compile_kernel, read_sources

_LAYOUT = "v1"
_DIGEST_LINE = 65  # sha256 in hex and a newline
# Readable by all, so that root can bake a cache into an image; writable by the owner alone, whatever the umask.
_DIRECTORY_MODE, _ENTRY_MODE = 0o755, 0o644

_log = logging.getLogger(__name__)
_memory: dict[KernelSpec, CompiledKernel] = {}
_locks: dict[KernelSpec, threading.Lock] = {}
_warned: set[str] = set()


def get(spec: KernelSpec) -> CompiledKernel:
    """Return a compiled kernel from this process, else from the disk, else from the compiler.

    Raises:
        CompileError: it does not compile; or it is not cached and FP8_BACKEND_JIT=forbid.
    """
    if (kernel := _memory.get(spec)) is None:
        with _locks.setdefault(spec, threading.Lock()):  # two threads that need one kernel compile it once
            if (kernel := _memory.get(spec)) is None:
                kernel = _memory[spec] = load_or_compile(spec)
    return kernel


def load_or_compile(spec: KernelSpec) -> CompiledKernel:
    """Return a compiled kernel from the disk, else from the compiler; then publish it.

    Raises:
        CompileError: as for `get`.
    """
    sources = read_sources(spec)
    key = cache_key(spec, sources)
    current = settings.load()
    directory = _directory(current)
    kernel, problem = _look_up(directory, entry_name(spec, key), key)
    if kernel is not None:
        return kernel
    if current.jit == "forbid":
        raise CompileError(
            f"kernel {spec.name} (key {key[:16]}) is not in the cache {directory} ({problem}), and "
            "FP8_BACKEND_JIT=forbid: unset it to compile the kernel, or set FP8_BACKEND_CACHE_DIR to a directory that "
            "this version filled"
        )
    kernel = compile_kernel(spec, sources)
    if directory is not None:
        try:
            _publish(directory, entry_name(spec, key), _encode(kernel, key))
        except OSError as error:
            _warn_once(f"kernel cache {directory}", str(error))
    return kernel


def entry_name(spec: KernelSpec, key: str) -> str:
    """Return the file name of a kernel's entry; names too long for file systems are cut, the key tells them apart."""
    return f"{spec.name[:160]}-{key[:16]}.cubin"


def _directory(current: settings.Settings) -> Path | None:
    try:
        return current.resolved_cache_dir()
    except RuntimeError as error:  # a user without a home directory
        _warn_once("the kernel cache", str(error))
        return None


def _look_up(directory: Path | None, name: str, key: str) -> tuple[CompiledKernel | None, str]:
    """Return (the kernel, "") or (None, why there is none)."""
    if directory is None:
        return None, "there is no home directory"
    try:
        kernel = _decode(_read(directory, name), key)
    except FileNotFoundError:
        return None, f"{_LAYOUT}/{name} does not exist"
    except OSError as error:
        _warn_once(f"kernel cache {directory}", str(error))
        return None, str(error)
    return kernel, "" if kernel is not None else f"{_LAYOUT}/{name} is damaged"


def _encode(kernel: CompiledKernel, key: str) -> bytes:
    facts = {name: value for name, value in asdict(kernel).items() if name != "cubin"}
    body = kernel.cubin + b"\n" + json.dumps({"key": key, **facts}).encode() + b"\n"
    return body + hashlib.sha256(body).hexdigest().encode() + b"\n"


def _decode(data: bytes, key: str) -> CompiledKernel | None:
    body, digest = data[:-_DIGEST_LINE], data[-_DIGEST_LINE:]
    if digest != hashlib.sha256(body).hexdigest().encode() + b"\n":
        return None
    cubin, _, line = body.removesuffix(b"\n").rpartition(b"\n")
    facts = json.loads(line)
    if facts.pop("key") != key:
        return None
    return CompiledKernel(cubin, **{**facts, "warnings": tuple(facts["warnings"])})


@contextmanager
def _opened(directory: Path, create: bool = False) -> Iterator[int]:
    """Open the folder of entries; all accesses go through this one, so that it cannot be exchanged after the check."""
    flags = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
    root = os.open(directory, flags)
    try:
        _require_private(root, str(directory))
        if create:
            with suppress(FileExistsError):
                os.mkdir(_LAYOUT, _DIRECTORY_MODE, dir_fd=root)
        folder = os.open(_LAYOUT, flags | os.O_NOFOLLOW, dir_fd=root)
    finally:
        os.close(root)
    try:
        _require_private(folder, str(directory / _LAYOUT))
        yield folder
    finally:
        os.close(folder)


def _require_private(descriptor: int, name: str) -> None:
    status = os.fstat(descriptor)
    if status.st_uid not in (os.geteuid(), 0):
        raise PermissionError(
            f"{name} belongs to user {status.st_uid}, not to {os.geteuid()} or root; "
            "set FP8_BACKEND_CACHE_DIR to a directory of your own"
        )
    if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise PermissionError(
            f"{name} can be written by other users (mode {stat.S_IMODE(status.st_mode):o}) and its contents are run; "
            f"chmod go-w {name}"
        )


def _read(directory: Path, name: str) -> bytes:
    with _opened(directory) as folder:
        # O_NONBLOCK: opening a FIFO must not hang.
        descriptor = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=folder)
        with os.fdopen(descriptor, "rb") as file:
            _require_private(descriptor, str(directory / _LAYOUT / name))
            return file.read()


def _publish(directory: Path, name: str, data: bytes) -> None:
    directory.parent.mkdir(parents=True, exist_ok=True)
    with suppress(FileExistsError):
        directory.mkdir(mode=_DIRECTORY_MODE)
    temporary = f".{secrets.token_hex(8)}.tmp"
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
    with _opened(directory, create=True) as folder:
        descriptor = os.open(temporary, flags, _ENTRY_MODE, dir_fd=folder)
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(descriptor)  # a crash of the machine must not leave a name with no bytes behind it
            os.replace(temporary, name, src_dir_fd=folder, dst_dir_fd=folder)
        except BaseException:
            with suppress(OSError):
                os.unlink(temporary, dir_fd=folder)
            raise


def _warn_once(place: str, problem: str) -> None:
    if place not in _warned:
        _warned.add(place)
        _log.warning("%s is not used, each process compiles its kernels anew: %s", place, problem)
