"""Keep compiled kernels: in this process, and on disk under a name that holds a digest of all they depend on.

An entry `v1/<kernel>-<first 16 digits of its key>.cubin` is the cubin, then a line of JSON with the whole key and what
ptxas said, then the sha256 of all that: one file, so that no two halves can differ. It is still a valid ELF file.

A cache that cannot be used costs one warning and the time to compile, never an error. An entry appears under its name
whole or not at all, so that nothing has to wait for anything: the lock that `exclusive` takes saves the processes of
one host work, and nothing depends on it.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fp8_backend import counters, settings
from fp8_backend.errors import CacheError, CompileError
from fp8_backend.kernels import cache_folder
from fp8_backend.kernels.compiler import CompiledKernel, KernelSpec, cache_key, compile_kernel, read_sources

_DIGEST_LINE = 65  # sha256 in hex and a newline

_log = logging.getLogger(f"vllm.{__name__}")  # only vLLM's own loggers reach the log of each of its processes
_memory: dict[KernelSpec, CompiledKernel] = {}
_locks: dict[KernelSpec, threading.Lock] = {}
_warned: set[str] = set()
_warning = threading.Lock()  # kernels are compiled on many threads, and a full disk meets all of them at once
_ready = threading.Event()  # set once this process serves: whatever it compiles then stalls a request


def _forget_locks() -> None:
    """Start a forked child with locks of its own: a thread that held one of the parent's is not in the child."""
    global _warning
    _warning = threading.Lock()
    _locks.clear()


os.register_at_fork(after_in_child=_forget_locks)


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


def find(spec: KernelSpec) -> CompiledKernel | None:
    """Return a compiled kernel from this process, else from the disk, else None; nothing is compiled.

    Raises:
        CompileError: its sources or NVRTC, which are part of its key, cannot be read.
    """
    if (kernel := _memory.get(spec)) is None:
        key = cache_key(spec)
        kernel, _ = _look_up(_directory(settings.load()), entry_name(spec, key), key)
        if kernel is not None:
            kernel = _memory.setdefault(spec, kernel)
    return kernel


def mark_ready() -> None:
    """Say that this process has every kernel it should ever need: a compile is a fault from now on, and logged."""
    _ready.set()


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
    kernel = _compile(spec, sources)
    if directory is not None:
        try:
            cache_folder.publish(directory, entry_name(spec, key), _encode(kernel, key))
        except OSError as error:
            _warn_once(f"kernel cache {directory}", str(error))
    return kernel


def _compile(spec: KernelSpec, sources: dict[str, bytes]) -> CompiledKernel:
    if _ready.is_set():
        counters.late_compiles.append(spec.name)
        _log.warning(
            "kernel %s was not made ready before serving and is compiled now, which stalls requests; FP8_BACKEND_JIT="
            "forbid makes it an error; please report it",
            spec.name,
        )
    kernel = compile_kernel(spec, sources)
    counters.compiles.append(spec.name)
    return kernel


@contextmanager
def exclusive(patience_s: float, progress: Callable[[], object] = int) -> Iterator[bool]:
    """Hold the lock of the cache among the processes of this host; yield whether it is held, and go on either way.

    A lock that cannot be made (read-only directory, a file system without locks) is not waited for, and none is taken
    where nothing may be compiled. One that another process holds is waited for until what `progress` returns has stayed
    the same for `patience_s` seconds. It ends with the process that holds it.
    """
    current = settings.load()
    directory = _directory(current) if current.jit != "forbid" else None
    with ExitStack() as stack:
        held = False
        try:
            held = directory is not None and stack.enter_context(cache_folder.locked(directory, patience_s, progress))
        except OSError as error:
            _log.debug("kernel cache %s: no lock: %s", directory, error)
        yield held


@dataclass(frozen=True)
class Entry:
    """A file of the cache. size: bytes. modified: seconds since 1970. state: "current", "stale" or "damaged".

    A stale entry belongs to another version of the package or of NVRTC: it is not used and does no harm.
    """

    kernel: str
    key: str
    size: int
    modified: float
    state: str


def entries(specs: Iterable[KernelSpec]) -> list[Entry]:
    """Return what the directory holds, in the order of names; only entries of `specs` can be current.

    Raises:
        CacheError: the directory is refused or cannot be read.
        CompileError: NVRTC, which is part of the keys, cannot be loaded.
    """
    current = {}
    for spec in specs:
        key = cache_key(spec)
        current[entry_name(spec, key)] = key
    found = []
    for name, size, modified in _usable(cache_folder.files, ".cubin"):
        kernel, _, digits = name.removesuffix(".cubin").rpartition("-")
        state = "stale"
        if name in current:
            whole, _ = _look_up(_directory(settings.load()), name, current[name])
            state = "damaged" if whole is None else "current"
        found.append(Entry(kernel, digits, size, modified, state))
    return found


def require_writable() -> None:
    """Make the directory if need be and write into it, so that nobody compiles for minutes what cannot be kept.

    Raises:
        CacheError: the directory is refused or cannot be written.
    """
    _usable(lambda directory, _: cache_folder.try_to_write(directory))


def clear() -> list[Entry]:
    """Delete every entry, and what writers that were killed left behind; return the entries.

    Raises:
        CacheError: the directory is refused or a file cannot be deleted.
    """
    removed = entries(())
    _usable(cache_folder.delete, ".cubin", ".tmp")
    return removed


def _usable(act: Callable[..., Any], *endings: str) -> Any:
    """Act on the directory in force, with its errors made the user's."""
    directory = settings.load().resolved_cache_dir()
    try:
        return act(directory, endings)
    except OSError as error:
        raise CacheError(f"kernel cache {directory}: {error}") from error


def entry_name(spec: KernelSpec, key: str) -> str:
    """Return the file name of a kernel's entry; names too long for file systems are cut, the key tells them apart."""
    return f"{spec.name[:160]}-{key[:16]}.cubin"


def _directory(current: settings.Settings) -> Path | None:
    try:
        return current.resolved_cache_dir()
    except CacheError as error:  # a user without a home directory
        _warn_once("the kernel cache", str(error))
        return None


def _look_up(directory: Path | None, name: str, key: str) -> tuple[CompiledKernel | None, str]:
    """Return (the kernel, "") or (None, why there is none)."""
    if directory is None:
        return None, "there is no home directory"
    try:
        kernel = _decode(cache_folder.read(directory, name), key)
    except FileNotFoundError:
        return None, f"{cache_folder.LAYOUT}/{name} does not exist"
    except OSError as error:
        _warn_once(f"kernel cache {directory}", str(error))
        return None, str(error)
    return kernel, "" if kernel is not None else f"{cache_folder.LAYOUT}/{name} is damaged"


def _encode(kernel: CompiledKernel, key: str) -> bytes:
    facts = {name: value for name, value in asdict(kernel).items() if name != "cubin"}
    body = kernel.cubin + b"\n" + json.dumps({"key": key, **facts}).encode() + b"\n"
    return body + hashlib.sha256(body).hexdigest().encode() + b"\n"


def _decode(data: bytes, key: str) -> CompiledKernel | None:
    body, digest = data[:-_DIGEST_LINE], data[-_DIGEST_LINE:]
    if digest != hashlib.sha256(body).hexdigest().encode() + b"\n":
        return None
    cubin, _, line = body.removesuffix(b"\n").rpartition(b"\n")
    try:
        facts = json.loads(line)
        if facts.pop("key") != key:
            return None
        return CompiledKernel(cubin, **{**facts, "warnings": tuple(facts["warnings"])})
    except (ValueError, LookupError, TypeError, AttributeError):  # whole, and of a version that says other things
        return None


def _warn_once(place: str, problem: str) -> None:
    with _warning:
        first = place not in _warned
        _warned.add(place)
    if first:
        _log.warning("%s is not used, each process compiles its kernels anew: %s", place, problem)
