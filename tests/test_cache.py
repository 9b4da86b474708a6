"""The kernel cache in one process, on real files, with real compiles."""

from __future__ import annotations

import dataclasses
import logging
import os
import resource
import shutil
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from fp8_backend import counters
from fp8_backend.errors import CompileError
from fp8_backend.kernels import cache
from fp8_backend.kernels.compiler import CompiledKernel, KernelSpec, cache_key, compile_kernel

SAXPY = KernelSpec("saxpy.cuh", "saxpy", (("OFFSET", 3),), Path(__file__).parent)
NOBODY = 65534


@pytest.fixture(autouse=True)
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> Path:
    # vLLM, once another test has imported it, keeps its loggers' lines from the one that pytest listens to.
    monkeypatch.setattr(cache._log, "handlers", [caplog.handler])
    monkeypatch.setattr(cache._log, "propagate", False)
    monkeypatch.setattr(cache, "_ready", threading.Event())
    monkeypatch.setenv("FP8_BACKEND_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.delenv("FP8_BACKEND_JIT", raising=False)
    monkeypatch.setattr(cache, "_memory", {})
    monkeypatch.setattr(cache, "_warned", set())
    return tmp_path / "cache"


@pytest.fixture
def compiles(monkeypatch: pytest.MonkeyPatch) -> list[KernelSpec]:
    """The specs the cache has had to compile, in order; they are compiled for real."""
    seen: list[KernelSpec] = []

    def counted(spec: KernelSpec, sources: dict[str, bytes] | None = None) -> CompiledKernel:
        seen.append(spec)
        return compile_kernel(spec, sources)

    monkeypatch.setattr(cache, "compile_kernel", counted)
    return seen


@pytest.fixture
def unprivileged() -> Iterator[Path]:
    """An empty directory that this process may not write, also where the tests run as root."""
    compile_kernel(SAXPY)  # NVRTC loads the rest of itself here, from files that only root may be able to read
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o555)
    was = os.geteuid()
    if was == 0:
        os.chown(folder, NOBODY, NOBODY)
        os.seteuid(NOBODY)
    yield folder
    os.seteuid(was)
    shutil.rmtree(folder)


def _entry(directory: Path) -> Path:
    (entry,) = (directory / "v1").iterdir()
    return entry


def _warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


def test_second_look_up_comes_from_the_disk_and_says_the_same(directory: Path, compiles: list[KernelSpec]) -> None:
    first = cache.load_or_compile(SAXPY)
    second = cache.load_or_compile(SAXPY)
    assert first == second == compile_kernel_without_timing(first)
    assert compiles == [SAXPY]
    assert _entry(directory).name == f"saxpy-OFFSET=3-{cache_key(SAXPY)[:16]}.cubin"
    assert _entry(directory).read_bytes().startswith(first.cubin)
    assert (directory / "v1").stat().st_mode & 0o777 == 0o755 & ~_umask()


def compile_kernel_without_timing(like: CompiledKernel) -> CompiledKernel:
    """Compile afresh; the log's compile time differs from run to run."""
    return dataclasses.replace(compile_kernel(SAXPY), log=like.log)


def _umask() -> int:
    was = os.umask(0)
    os.umask(was)
    return was


def test_in_process_look_up_needs_neither_disk_nor_compiler(directory: Path, compiles: list[KernelSpec]) -> None:
    first = cache.get(SAXPY)
    shutil.rmtree(directory)
    assert cache.get(SAXPY) is first
    assert compiles == [SAXPY]
    assert not directory.exists()


def test_threads_that_need_one_kernel_compile_it_once(compiles: list[KernelSpec]) -> None:
    barrier = threading.Barrier(8)
    got: list[CompiledKernel] = []

    def work() -> None:
        barrier.wait()
        got.append(cache.get(SAXPY))

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(got) == 8
    assert len({id(kernel) for kernel in got}) == 1
    assert compiles == [SAXPY]


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: b"",
        lambda data: data[: len(data) // 2],
        lambda data: data[:-1],
        lambda data: b"garbage" * 1000,
        lambda data: data[:100] + bytes([data[100] ^ 1]) + data[101:],
    ],
    ids=["empty", "half", "last byte missing", "garbage", "one bit flipped"],
)
def test_damaged_entries_are_compiled_again_and_replaced(damage, directory: Path, compiles: list[KernelSpec]) -> None:
    good = cache.load_or_compile(SAXPY)
    entry = _entry(directory)
    entry.write_bytes(damage(entry.read_bytes()))
    assert cache.load_or_compile(SAXPY).cubin == good.cubin
    assert cache.load_or_compile(SAXPY).cubin == good.cubin
    assert len(compiles) == 2


def test_entry_under_the_name_of_another_kernel_is_not_used(directory: Path, compiles: list[KernelSpec]) -> None:
    other = dataclasses.replace(SAXPY, defines=(("OFFSET", 4),))
    cache.load_or_compile(other)
    _entry(directory).rename(directory / "v1" / cache.entry_name(SAXPY, cache_key(SAXPY)))
    assert cache.load_or_compile(SAXPY).cubin == compile_kernel(SAXPY).cubin
    assert compiles == [other, SAXPY]


@pytest.mark.parametrize("what", [".", "v1"])
def test_directory_that_others_may_write_is_refused(
    what: str, directory: Path, compiles: list[KernelSpec], caplog: pytest.LogCaptureFixture
) -> None:
    cache.load_or_compile(SAXPY)
    before = {path: path.stat().st_mtime_ns for path in directory.rglob("*.cubin")}
    (directory / what).chmod(0o775)
    for _ in range(3):
        cache.load_or_compile(SAXPY)
    assert len(compiles) == 4
    assert {path: path.stat().st_mtime_ns for path in directory.rglob("*") if path.is_file()} == before
    (warning,) = _warnings(caplog)
    assert "(mode 775)" in warning
    assert "chmod go-w" in warning


def test_nothing_is_written_into_a_refused_directory(directory: Path) -> None:
    directory.mkdir()
    directory.chmod(0o777)
    cache.load_or_compile(SAXPY)
    assert list(directory.iterdir()) == []


def test_entry_that_others_may_write_is_not_run_and_is_replaced(
    directory: Path, compiles: list[KernelSpec], caplog: pytest.LogCaptureFixture
) -> None:
    cache.load_or_compile(SAXPY)
    _entry(directory).chmod(0o666)
    cache.load_or_compile(SAXPY)
    cache.load_or_compile(SAXPY)
    assert len(compiles) == 2
    assert _entry(directory).stat().st_mode & 0o022 == 0
    assert len(_warnings(caplog)) == 1


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
@pytest.mark.parametrize("what", ["cache", "v1", "entry"])
def test_what_another_user_owns_is_refused(
    what: str, directory: Path, compiles: list[KernelSpec], caplog: pytest.LogCaptureFixture
) -> None:
    cache.load_or_compile(SAXPY)
    os.chown({"cache": directory, "v1": directory / "v1", "entry": _entry(directory)}[what], NOBODY, NOBODY)
    cache.load_or_compile(SAXPY)
    assert len(compiles) == 2
    assert f"belongs to user {NOBODY}" in _warnings(caplog)[0]


def test_symbolic_link_in_place_of_an_entry_is_not_followed(
    directory: Path, tmp_path: Path, compiles: list[KernelSpec], caplog: pytest.LogCaptureFixture
) -> None:
    cache.load_or_compile(SAXPY)
    entry = _entry(directory)
    entry.rename(tmp_path / "elsewhere")
    entry.symlink_to(tmp_path / "elsewhere")
    cache.load_or_compile(SAXPY)
    assert len(compiles) == 2
    assert not entry.is_symlink()


def test_read_only_directory_costs_one_warning(
    unprivileged: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("FP8_BACKEND_CACHE_DIR", str(unprivileged))
    for _ in range(3):
        assert cache.load_or_compile(SAXPY).cubin[:4] == b"\x7fELF"
    (warning,) = _warnings(caplog)
    assert str(unprivileged) in warning
    assert "Permission denied" in warning


def test_full_disk_costs_one_warning_and_leaves_nothing_behind(
    directory: Path, caplog: pytest.LogCaptureFixture
) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))  # every file of this process is full at 1000 bytes
    try:
        for _ in range(2):
            assert cache.load_or_compile(SAXPY).cubin[:4] == b"\x7fELF"
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list((directory / "v1").iterdir()) == []
    assert len(_warnings(caplog)) == 1


def test_file_in_place_of_the_directory_costs_one_warning(directory: Path, caplog: pytest.LogCaptureFixture) -> None:
    directory.write_text("")
    for _ in range(2):
        assert cache.load_or_compile(SAXPY).cubin[:4] == b"\x7fELF"
    assert len(_warnings(caplog)) == 1


def test_deleted_directory_is_made_again(directory: Path, caplog: pytest.LogCaptureFixture) -> None:
    cache.load_or_compile(SAXPY)
    shutil.rmtree(directory)
    cache.load_or_compile(SAXPY)
    assert _entry(directory).exists()
    assert _warnings(caplog) == []


def test_user_without_a_home_costs_one_warning(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("FP8_BACKEND_CACHE_DIR", "VLLM_CACHE_ROOT", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)

    def no_home(path: Path) -> Path:
        raise RuntimeError("Could not determine home directory.")  # what pathlib does for a user id without an entry

    monkeypatch.setattr(Path, "expanduser", no_home)
    for _ in range(2):
        assert cache.load_or_compile(SAXPY).cubin[:4] == b"\x7fELF"
    assert len(_warnings(caplog)) == 1


def test_forbidden_compile_names_kernel_key_directory_and_next_step(
    directory: Path, monkeypatch: pytest.MonkeyPatch, compiles: list[KernelSpec]
) -> None:
    monkeypatch.setenv("FP8_BACKEND_JIT", "forbid")
    with pytest.raises(CompileError) as raised:
        cache.get(SAXPY)
    for part in (
        "saxpy-OFFSET=3",
        cache_key(SAXPY)[:16],
        str(directory),
        "does not exist",
        "unset it",
        "FP8_BACKEND_CACHE_DIR",
    ):
        assert part in str(raised.value)
    assert compiles == []
    monkeypatch.delenv("FP8_BACKEND_JIT")
    cache.load_or_compile(SAXPY)
    monkeypatch.setenv("FP8_BACKEND_JIT", "forbid")
    assert cache.get(SAXPY).cubin[:4] == b"\x7fELF"
    _entry(directory).write_bytes(b"")
    with pytest.raises(CompileError, match="is damaged"):
        cache.load_or_compile(SAXPY)


def test_names_longer_than_a_file_name_are_cached(directory: Path, compiles: list[KernelSpec]) -> None:
    long = dataclasses.replace(
        SAXPY, defines=(("OFFSET", 3), *((f"UNUSED_{'X' * 40}_{index}", 1) for index in range(20)))
    )
    cache.load_or_compile(long)
    cache.load_or_compile(long)
    assert compiles == [long]


def test_compile_while_serving_is_logged_and_counted(
    compiles: list[KernelSpec], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(counters, "compiles", [])
    monkeypatch.setattr(counters, "late_compiles", [])
    cache.get(SAXPY)
    cache.mark_ready()
    assert (_warnings(caplog), counters.snapshot()["late_compiles"]) == ([], 0)
    late = dataclasses.replace(SAXPY, defines=(("OFFSET", 4),))
    cache.get(late)
    (warning,) = _warnings(caplog)
    assert late.name in warning and "stalls requests" in warning
    assert counters.snapshot()["compiles"] == 2 and counters.late_compiles == [late.name]
    assert counters.line().endswith("compiled: 2, of them late: 1")
