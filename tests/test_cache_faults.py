"""The kernel cache under abuse, each fault met by fresh processes: the right kernel, no hang, at most one warning."""

from __future__ import annotations

import hashlib
import json
import os
import resource
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

from fp8_backend.kernels import cache, cache_folder, compiler
from fp8_backend.kernels.compiler import KernelSpec, cache_key, compile_kernel

HERE = Path(__file__).parent
OFFSETS = (3, 4)
NOBODY = 65534
# Takes the kernels through warm-up, as a rank does, once for each line of input, and says what it got.
RANK = """
import hashlib, json, os, sys
from pathlib import Path
from fp8_backend import counters
from fp8_backend.kernels import cache, compiler, warmup
folder, user, looks = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
specs = [compiler.KernelSpec("saxpy.cuh", "saxpy", (("OFFSET", offset),), folder) for offset in (3, 4)]
if user:
    compiler.compile_kernel(specs[0])  # loads the rest of NVRTC, from files that only root may be able to read
    os.seteuid(user)
for look in range(looks):
    print("ready", flush=True)
    sys.stdin.readline()
    cache._memory.clear()
    warmup.warm_up(specs)
    digests = [hashlib.sha256(cache.get(spec).cubin).hexdigest() for spec in specs]
    print(json.dumps([digests, len(counters.compiles)]), flush=True)
"""


class Said(NamedTuple):
    """What one look at the cache gave: sha256 of each cubin, and how many kernels the process has compiled so far."""

    digests: list[str]
    compiled: int


class Rank:
    """A process that takes both kernels from the cache each time it is told to."""

    def __init__(
        self, directory: Path, sources: Path = HERE, user: int = 0, looks: int = 1, file_limit: int = 0
    ) -> None:
        environ = {name: value for name, value in os.environ.items() if not name.startswith("FP8_BACKEND_")}
        environ |= {
            "FP8_BACKEND_CACHE_DIR": str(directory),
            "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
            "PYTHONDONTWRITEBYTECODE": "1",  # a limit on the size of files would truncate it
        }

        def limit() -> None:
            if file_limit:
                resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, file_limit))

        self.process = subprocess.Popen(
            [sys.executable, "-c", RANK, str(sources), str(user), str(looks)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environ,
            preexec_fn=limit,
        )

    def wait_until_ready(self) -> None:
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == "ready\n", self.process.communicate()[1]

    def begin(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write("go\n")
        self.process.stdin.flush()

    def look(self) -> Said:
        self.wait_until_ready()
        self.begin()
        assert self.process.stdout is not None
        return Said(*json.loads(self.process.stdout.readline()))

    def end(self) -> tuple[str, list[str]]:
        """Return what is left of its output, and its warnings."""
        out, err = self.process.communicate(timeout=60)
        assert self.process.returncode == 0, err
        return out, err.splitlines()


def take(directory: Path, **options: object) -> tuple[Said, list[str]]:
    """Let one fresh process take both kernels; return what it said and its warnings."""
    rank = Rank(directory, **options)  # type: ignore[arg-type]
    said = rank.look()
    return said, rank.end()[1]


def specs(folder: Path = HERE) -> list[KernelSpec]:
    return [KernelSpec("saxpy.cuh", "saxpy", (("OFFSET", offset),), folder) for offset in OFFSETS]


@pytest.fixture(scope="module")
def right() -> list[str]:
    """The sha256 of the cubins that a compiler gives which knows no cache."""
    return [hashlib.sha256(compile_kernel(spec).cubin).hexdigest() for spec in specs()]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, right: list[str]) -> Path:
    directory = tmp_path_factory.mktemp("whole") / "cache"
    assert take(directory) == (Said(right, 2), [])
    return directory


@pytest.fixture
def filled(whole: Path, tmp_path: Path) -> Path:
    """A copy of a full cache that a test may spoil."""
    return Path(shutil.copytree(whole, tmp_path / "cache"))


def path_of(directory: Path, spec: KernelSpec) -> Path:
    return directory / "v1" / cache.entry_name(spec, cache_key(spec))


def test_sixteen_processes_at_once_compile_each_kernel_once(tmp_path: Path, right: list[str]) -> None:
    ranks = [Rank(tmp_path / "cache") for _ in range(16)]
    for rank in ranks:
        rank.wait_until_ready()
    for rank in ranks:
        rank.begin()
    ended = [rank.end() for rank in ranks]
    said = [Said(*json.loads(out)) for out, _ in ended]
    assert [rank.digests for rank in said] == [right] * 16
    assert sorted(rank.compiled for rank in said) == [0] * 15 + [2]
    assert [warnings for _, warnings in ended] == [[]] * 16
    assert sorted(path.suffix for path in (tmp_path / "cache" / "v1").glob("*[!k]")) == [".cubin"] * 2


WRITER = """
import sys
from pathlib import Path
from fp8_backend.kernels import cache_folder
cache_folder.publish(Path(sys.argv[1]), sys.argv[2], bytes(1 << 30))
"""


def test_killed_in_the_middle_of_a_write(tmp_path: Path, right: list[str]) -> None:
    directory = tmp_path / "cache"
    entry = path_of(directory, specs()[0])
    writer = subprocess.Popen([sys.executable, "-c", WRITER, str(directory), entry.name])
    deadline = time.monotonic() + 60
    while not any(path.stat().st_size for path in directory.glob("v1/.*.tmp")):
        assert writer.poll() is None and time.monotonic() < deadline
    writer.kill()
    writer.wait()
    (left,) = directory.glob("v1/.*.tmp")
    assert 0 < left.stat().st_size < 1 << 30 and not entry.exists()
    assert take(directory) == (Said(right, 2), [])
    assert take(directory) == (Said(right, 0), [])


def other_architecture(entry: Path) -> bytes:
    """Return a bare cubin of the same kernel for another architecture, as some other compiler writes it."""
    flags = tuple(flag.replace(compiler.ARCH, "sm_80") for flag in compiler.FLAGS)
    was, compiler.FLAGS = compiler.FLAGS, flags
    try:
        return compile_kernel(specs()[0]).cubin
    finally:
        compiler.FLAGS = was


DAMAGES: dict[str, Callable[[Path], bytes]] = {
    "empty": lambda entry: b"",
    "truncated": lambda entry: entry.read_bytes()[:-1000],
    "garbage": lambda entry: os.urandom(20_000),
    "wrong architecture": other_architecture,
    "another kernel": lambda entry: path_of(entry.parents[1], specs()[1]).read_bytes(),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_entry_is_compiled_again_once(damage: str, filled: Path, right: list[str]) -> None:
    entry = path_of(filled, specs()[0])
    entry.write_bytes(DAMAGES[damage](entry))
    assert take(filled) == (Said(right, 1), [])
    assert take(filled) == (Said(right, 0), [])


def test_entry_of_another_architecture_is_another_entry(filled: Path, right: list[str]) -> None:
    """What a version for other GPUs left behind, whole and sealed, even under our kernel's name."""
    entry = path_of(filled, specs()[0])
    kernel = compiler.CompiledKernel(other_architecture(entry), "", 0, 0, 0)
    entry.write_bytes(cache._encode(kernel, hashlib.sha256(b"sm_80").hexdigest()))
    assert take(filled) == (Said(right, 1), [])


@pytest.mark.parametrize("name", ["entry", ".lock"])
def test_pipe_in_place_of_a_file_hangs_nobody(name: str, filled: Path, right: list[str]) -> None:
    path = path_of(filled, specs()[0]) if name == "entry" else filled / "v1" / name
    path.unlink()
    os.mkfifo(path, 0o600)
    if name == ".lock":
        path_of(filled, specs()[0]).unlink()
    said, warnings = take(filled)
    assert said == Said(right, 1) and len(warnings) <= 1


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become a user who may not write")
def test_read_only_directory_costs_one_warning(filled: Path, right: list[str]) -> None:
    path_of(filled, specs()[0]).unlink()
    for path in (filled, *filled.rglob("*")):
        os.chown(path, 0, 0)
    for parent in filled.parents[:3]:  # pytest's folders are closed to other users
        parent.chmod(parent.stat().st_mode | 0o055)
    said, warnings = take(filled, user=NOBODY)
    assert said == Said(right, 1)
    assert len(warnings) == 1 and "Permission denied" in warnings[0] and str(filled) in warnings[0]


def test_full_disk_costs_one_warning(tmp_path: Path, right: list[str]) -> None:
    # A limit on the size of files makes write() fail where it fails on a full disk, and needs no mount.
    said, warnings = take(tmp_path / "cache", file_limit=1000)
    assert said == Said(right, 2)
    assert len(warnings) == 1 and "File too large" in warnings[0]
    assert list((tmp_path / "cache").glob("v1/*.cubin")) == list((tmp_path / "cache").glob("v1/.*.tmp")) == []


def test_directory_deleted_between_two_looks_is_made_again(tmp_path: Path, right: list[str]) -> None:
    rank = Rank(tmp_path / "cache", looks=2)
    assert rank.look() == Said(right, 2)
    shutil.rmtree(tmp_path / "cache")
    assert rank.look() == Said(right, 4)
    assert rank.end() == ("", [])
    assert len(list((tmp_path / "cache").glob("v1/*.cubin"))) == 2


def test_directory_deleted_all_the_time(tmp_path: Path, right: list[str]) -> None:
    stop = threading.Event()

    def delete() -> None:
        while not stop.is_set():
            shutil.rmtree(tmp_path / "cache", ignore_errors=True)

    deleting = threading.Thread(target=delete)
    deleting.start()
    try:
        ranks = [Rank(tmp_path / "cache", looks=10) for _ in range(3)]
        for _ in range(10):
            assert [rank.look().digests for rank in ranks] == [right] * 3
        assert all(len(rank.end()[1]) <= 1 for rank in ranks)
    finally:
        stop.set()
        deleting.join()


@pytest.mark.parametrize("what", ["cache", "v1"])
def test_loose_permissions_are_refused_with_one_warning(what: str, filled: Path, right: list[str]) -> None:
    """A directory others may write holds an entry that somebody put there: whole, but another kernel's code."""
    planted, code = path_of(filled, specs()[0]), compile_kernel(specs()[1])
    planted.write_bytes(cache._encode(code, cache_key(specs()[0])))
    (filled if what == "cache" else filled / "v1").chmod(0o777)
    before = planted.read_bytes()
    said, warnings = take(filled)
    assert said == Said(right, 2)
    assert len(warnings) == 1 and "chmod go-w" in warnings[0]
    assert planted.read_bytes() == before


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
def test_directory_of_another_user_is_refused_with_one_warning(filled: Path, right: list[str]) -> None:
    os.chown(filled, NOBODY, NOBODY)
    said, warnings = take(filled)
    assert said == Said(right, 2)
    assert len(warnings) == 1 and f"belongs to user {NOBODY}" in warnings[0]


@pytest.mark.parametrize("modified", [0, 4_000_000_000], ids=["1970", "2096"])
def test_clock_skew_changes_nothing(modified: int, filled: Path, right: list[str]) -> None:
    for path in (filled, *filled.rglob("*")):
        os.utime(path, (modified, modified))
    assert take(filled) == (Said(right, 0), [])


def test_stale_entry_after_an_upgrade_is_not_used(tmp_path: Path, right: list[str]) -> None:
    directory, sources = tmp_path / "cache", tmp_path / "sources"
    sources.mkdir()
    for name in ("saxpy.cuh", "saxpy_offset.cuh"):
        shutil.copy(HERE / name, sources)
    assert take(directory, sources=sources) == (Said(right, 2), [])
    header = sources / "saxpy_offset.cuh"
    stamp = header.stat()
    header.write_text(header.read_text().replace("return OFFSET;", "return OFFSET + 1;"))
    os.utime(header, (stamp.st_atime, stamp.st_mtime))  # an installer may keep times: bytes count, not times
    upgraded = [hashlib.sha256(compile_kernel(spec).cubin).hexdigest() for spec in specs(sources)]
    assert upgraded[0] == right[1]  # 3 + 1 = 4: the new version's kernel is another one
    assert take(directory, sources=sources) == (Said(upgraded, 2), [])
    assert take(directory) == (Said(right, 0), [])  # both versions live side by side


def test_lock_file_is_the_only_other_file(filled: Path) -> None:
    assert {path.name for path in (filled / "v1").iterdir() if path.suffix != ".cubin"} == {cache_folder._LOCK}
