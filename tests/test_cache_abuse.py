"""The kernel cache and a hostile folder: what none of ours wrote, no locks, a holder of the lock that is stopped."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from fp8_backend import counters
from fp8_backend.errors import CacheError
from fp8_backend.kernels import cache, cache_folder, warmup
from fp8_backend.kernels.compiler import cache_key
from tests.test_warmup import SPECS, counts, hear, start, tell

SAXPY = SPECS[0]


@pytest.fixture(autouse=True)
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FP8_BACKEND_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.delenv("FP8_BACKEND_JIT", raising=False)
    for name, empty in (("_memory", {}), ("_warned", set()), ("_ready", threading.Event())):
        monkeypatch.setattr(cache, name, empty)
    monkeypatch.setattr(counters, "compiles", [])
    return tmp_path / "cache"


@pytest.fixture
def entry(directory: Path) -> Path:
    """The path of a kernel's entry, which holds the kernel."""
    cache.load_or_compile(SAXPY)
    return directory / "v1" / cache.entry_name(SAXPY, cache_key(SAXPY))


def test_file_of_terabytes_in_place_of_an_entry_is_not_read_and_is_replaced(entry: Path) -> None:
    os.truncate(entry, 1 << 40)  # sparse: whoever reads it runs out of memory
    assert [e.state for e in cache.entries([SAXPY])] == ["damaged"]
    assert cache.load_or_compile(SAXPY).cubin[:4] == b"\x7fELF"
    assert [e.state for e in cache.entries([SAXPY])] == ["current"]


def test_folder_in_place_of_an_entry_costs_one_warning(entry: Path) -> None:
    entry.unlink()
    entry.mkdir()
    for _ in range(3):
        assert cache.load_or_compile(SAXPY).cubin[:4] == b"\x7fELF"
    assert len(cache._warned) == 1


@pytest.mark.parametrize(
    "facts", [["a list"], {}, {"key": 1, "more": 2}, {"warnings": None}, {"warnings": [], "new": 1}]
)
def test_sealed_entry_that_says_other_things_is_compiled_again(entry: Path, facts: object) -> None:
    """As a version may write it that keeps other facts of a kernel under the same key."""
    if isinstance(facts, dict):
        facts = {"key": cache_key(SAXPY), **facts}
    body = b"\x7fELF\n" + json.dumps(facts).encode() + b"\n"
    entry.write_bytes(body + hashlib.sha256(body).hexdigest().encode() + b"\n")
    assert len(cache.load_or_compile(SAXPY).cubin) > 1000
    assert len(counters.compiles) == 2


def test_many_threads_and_a_full_disk_cost_one_warning(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Slow(set):
        def __contains__(self, item: object) -> bool:
            found = super().__contains__(item)
            time.sleep(0.01)  # another thread comes between the look and what follows from it
            return found

    said: list[str] = []
    monkeypatch.setattr(cache, "_warned", Slow())
    monkeypatch.setattr(cache._log, "warning", lambda *arguments: said.append(arguments[0]))
    threads = [threading.Thread(target=cache._warn_once, args=("place", "full")) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(said) == 1


@pytest.mark.parametrize("error", [OSError(38, "Function not implemented"), OSError(37, "No locks available")])
def test_file_system_without_locks_costs_nothing_but_the_lock(error: OSError, monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(*_: object) -> None:
        raise error

    monkeypatch.setattr(cache_folder.fcntl, "flock", flock)
    with cache.exclusive(60) as held:
        assert not held
    assert counts(warmup.warm_up(SPECS)) == (3, 3)
    assert cache._warned == set()


def test_nobody_is_waited_for_where_nothing_may_be_compiled(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    holder = start("hold")
    try:
        assert hear(holder) == "ready"
        tell(holder)
        assert hear(holder) == "True"
        monkeypatch.setenv("FP8_BACKEND_JIT", "forbid")
        begin = time.monotonic()
        with pytest.raises(warmup.CompileError, match="3 kernels cannot be made ready"):
            warmup.warm_up(SPECS)
        assert time.monotonic() - begin < 30
    finally:
        holder.kill()
        holder.wait()
    monkeypatch.setenv("FP8_BACKEND_CACHE_DIR", str(directory.parent / "none"))
    with pytest.raises(warmup.CompileError):
        warmup.warm_up(SPECS)
    assert not (directory.parent / "none").exists()


def test_stopped_holder_is_waited_for_while_kernels_appear_and_no_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache_folder, "_PROGRESS_POLL_S", 0.01)
    holder = start("hold")
    seen: list[tuple[int, int]] = []

    def progress(done: int, total: int) -> None:
        seen.append((done, total))
        if len(seen) in (1, 60):  # as a slow holder does it, every so often
            cache.load_or_compile(SPECS[0] if len(seen) == 1 else SPECS[1])

    try:
        assert hear(holder) == "ready"
        tell(holder)
        assert hear(holder) == "True"
        holder.send_signal(signal.SIGSTOP)
        warmup.warm_up(SPECS, progress, patience_s=3)
    finally:
        holder.kill()
        holder.wait()
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)  # a bar never goes back
    assert {total for _, total in seen} == {3} and {done for done, _ in seen} == {0, 1, 2, 3}
    assert len(counters.compiles) == 3  # none of those that appeared was compiled again


def test_cache_that_cannot_be_written_is_known_before_anything_is_compiled(directory: Path) -> None:
    cache.require_writable()
    assert list((directory / "v1").iterdir()) == []
    (directory / "v1").chmod(0o777)
    with pytest.raises(CacheError, match="chmod go-w"):
        cache.require_writable()


FORK = """
import os, signal, sys, threading
from pathlib import Path
from fp8_backend.kernels import cache
from fp8_backend.kernels.compiler import KernelSpec, compile_kernel
spec = KernelSpec("saxpy.cuh", "saxpy", (("OFFSET", 3),), Path(sys.argv[1]))
compiling, done = threading.Event(), threading.Event()
def slow(*arguments):
    if threading.current_thread() is thread:
        compiling.set()
        done.wait()
    return compile_kernel(*arguments)
cache.compile_kernel = slow
thread = threading.Thread(target=cache.get, args=(spec,))
thread.start()
compiling.wait()
child = os.fork()
if child == 0:
    signal.alarm(30)
    os._exit(cache.get(spec).cubin[:4] != b"\\x7fELF")
status = os.waitpid(child, 0)[1]
done.set()
thread.join()
sys.exit(os.waitstatus_to_exitcode(status) != 0)
"""


def test_child_forked_while_a_kernel_is_compiled_does_not_wait_for_the_parents_thread() -> None:
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-c", FORK, str(Path(__file__).parent)]
    assert subprocess.run(command, timeout=120, env=environ).returncode == 0
