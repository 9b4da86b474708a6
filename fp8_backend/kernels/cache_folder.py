"""The files of the kernel cache: trusted before they are read, written whole, locked among processes.

An entry is code that will run with the rights of the process that reads it. Directories and entries that another user
(but root) owns, or that group or others may write, are therefore refused with a PermissionError.
"""

from __future__ import annotations

import fcntl
import os
import secrets
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

LAYOUT = "v1"
# Readable by all, so that root can bake a cache into an image; writable by the owner alone, whatever the umask.
_DIRECTORY_MODE, _ENTRY_MODE = 0o755, 0o644
_LOCK = ".lock"
_LOCK_MODE = 0o600  # whoever can open it can hold it
_LOCK_POLL_S, _PROGRESS_POLL_S = 0.02, 0.5
# The largest kernel has 100 kB. A sparse file of terabytes costs whoever made it nothing, and who reads it its memory.
_MAX_ENTRY_BYTES = 64 << 20


@contextmanager
def _opened(directory: Path, create: bool = False) -> Iterator[int]:
    """Open the folder of entries; all accesses go through this one, so that it cannot be exchanged after the check."""
    flags = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
    root = os.open(directory, flags)
    try:
        _require_private(root, str(directory))
        if create:
            with suppress(FileExistsError):
                os.mkdir(LAYOUT, _DIRECTORY_MODE, dir_fd=root)
        folder = os.open(LAYOUT, flags | os.O_NOFOLLOW, dir_fd=root)
    finally:
        os.close(root)
    try:
        _require_private(folder, str(directory / LAYOUT))
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


def read(directory: Path, name: str) -> bytes:
    """Return the bytes of a file; none of what no writer of ours leaves: a folder, a pipe, a file of that size.

    Raises:
        OSError: there is none, or it is refused.
    """
    with _opened(directory) as folder:
        # O_NONBLOCK: opening a FIFO must not hang.
        descriptor = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=folder)
        try:
            _require_private(descriptor, str(directory / LAYOUT / name))
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode) or status.st_size > _MAX_ENTRY_BYTES:
                return b""
            with os.fdopen(descriptor, "rb", closefd=False) as file:
                return file.read()
        finally:
            os.close(descriptor)


def _make(directory: Path) -> None:
    directory.parent.mkdir(parents=True, exist_ok=True)
    with suppress(FileExistsError):
        directory.mkdir(mode=_DIRECTORY_MODE)


def publish(directory: Path, name: str, data: bytes) -> None:
    """Write a file, making the directory if need be; it appears under its name whole or not at all.

    Raises:
        OSError: the directory is refused, or cannot be written.
    """
    with _written(directory, data) as (folder, temporary):
        os.replace(temporary, name, src_dir_fd=folder, dst_dir_fd=folder)


def try_to_write(directory: Path) -> None:
    """Write as much as a kernel has and delete it, making the directory if need be.

    Raises:
        OSError: as for `publish`.
    """
    with _written(directory, bytes(1 << 17)) as (folder, temporary):
        os.unlink(temporary, dir_fd=folder)


@contextmanager
def _written(directory: Path, data: bytes) -> Iterator[tuple[int, str]]:
    """Write a file of a name nobody looks for, and yield the folder and that name; it is deleted if anything fails."""
    _make(directory)
    temporary = f".{secrets.token_hex(8)}.tmp"
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
    with _opened(directory, create=True) as folder:
        descriptor = os.open(temporary, flags, _ENTRY_MODE, dir_fd=folder)
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(descriptor)  # a crash of the machine must not leave a name with no bytes behind it
            yield folder, temporary
        except BaseException:
            with suppress(OSError):
                os.unlink(temporary, dir_fd=folder)
            raise


@contextmanager
def locked(directory: Path, patience_s: float, progress: Callable[[], object]) -> Iterator[bool]:
    """Hold the directory's lock, making the directory if need be; yield False if whoever holds it seems to hang.

    That is when what `progress` returns has stayed the same for `patience_s` seconds.

    Raises:
        OSError: there can be no lock: the directory is refused or read-only, or its file system has none.
    """
    _make(directory)
    with _opened(directory, create=True) as folder:
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        descriptor = os.open(_LOCK, flags, _LOCK_MODE, dir_fd=folder)
    try:
        yield _lock(descriptor, patience_s, progress)
    finally:
        os.close(descriptor)


def _lock(descriptor: int, patience_s: float, progress: Callable[[], object]) -> bool:
    last: object = None
    changed = looked = float("-inf")
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            now = time.monotonic()
            if now - looked >= _PROGRESS_POLL_S:
                looked, seen = now, progress()
                if seen != last:
                    last, changed = seen, now
            if now - changed > patience_s:
                return False
            time.sleep(_LOCK_POLL_S)  # flock itself has no timeout


def files(directory: Path, endings: tuple[str, ...]) -> list[tuple[str, int, float]]:
    """Return (name, bytes, seconds since 1970 of the last write) of the files with these endings, by name.

    Raises:
        OSError: the directory is refused or cannot be read; one that does not exist is empty.
    """
    found = []
    with suppress(FileNotFoundError), _opened(directory) as folder:
        for name in sorted(os.listdir(folder)):
            with suppress(FileNotFoundError):  # deleted meanwhile
                if name.endswith(endings):
                    status = os.stat(name, dir_fd=folder, follow_symlinks=False)
                    found.append((name, status.st_size, status.st_mtime))
    return found


def delete(directory: Path, endings: tuple[str, ...]) -> None:
    """Delete the files with these endings.

    Raises:
        OSError: the directory is refused, or a file cannot be deleted.
    """
    with suppress(FileNotFoundError), _opened(directory) as folder:
        for name in os.listdir(folder):
            with suppress(FileNotFoundError):
                if name.endswith(endings):
                    os.unlink(name, dir_fd=folder)
