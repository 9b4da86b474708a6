"""`fp8-backend cache list|path|clear|warm`: what compiled kernels there are, and making them ahead of time."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from contextlib import nullcontext

from fp8_backend import settings
from fp8_backend.errors import CacheError
from fp8_backend.kernels import cache, warmup
from fp8_backend.progress import ProgressOnDemand
from fp8_backend.text import readable_age, readable_size


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the actions and their options."""
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    listing = actions.add_parser("list", help="the kernels in the cache: key, size, age, current or stale")
    listing.add_argument("--json", action="store_true", help="print one JSON object")
    actions.add_parser("path", help="print the directory")
    actions.add_parser("clear", help="delete every kernel in the cache, without asking")
    actions.add_parser("warm", help="compile every kernel that is not in the cache; needs no GPU")


def run(arguments: argparse.Namespace) -> int:
    """Run one action and return the exit code.

    Raises:
        CacheError: the directory cannot be used.
        CompileError: a kernel does not compile, or may not be compiled here.
    """
    match arguments.action:
        case "list":
            _list(arguments.json)
        case "path":
            path = settings.load().resolved_cache_dir()
            sys.stdout.buffer.write(os.fsencode(path) + b"\n")  # a script reads it, whatever the locale can write
        case "clear":
            _clear()
        case "warm":
            _warm()
    return 0


def _list(as_json: bool) -> None:
    directory, now = settings.load().resolved_cache_dir(), time.time()
    entries = cache.entries(warmup.all_specs())
    if as_json:
        rows = [
            {
                "kernel": entry.kernel,
                "key": entry.key,
                "size_bytes": entry.size,
                "age_s": round(now - entry.modified),
                "state": entry.state,
            }
            for entry in entries
        ]
        print(json.dumps({"directory": str(directory), "entries": rows}, indent=1))
        return
    width = max((len(entry.kernel) for entry in entries), default=0)
    for entry in entries:
        age = readable_age(now - entry.modified)
        print(f"{entry.kernel:{width}}  {entry.key}  {readable_size(entry.size):>8}  {age:>7}  {entry.state}")
    current = sum(entry.state == "current" for entry in entries)
    total = readable_size(sum(entry.size for entry in entries))
    print(f"{directory}: {len(entries)} entries, {total}; {current} of {len(warmup.all_specs())} kernels are current")


def _clear() -> None:
    directory, removed = settings.load().resolved_cache_dir(), cache.clear()
    for entry in removed:
        print(f"removed {entry.kernel}-{entry.key}")
    print(f"removed {len(removed)} entries, {readable_size(sum(entry.size for entry in removed))}, from {directory}")


def _warm() -> None:
    specs = warmup.all_specs()
    if settings.load().jit != "forbid" and any(cache.find(spec) is None for spec in specs):
        cache.require_writable()
    bar = ProgressOnDemand("compiling", "kernels") if sys.stderr.isatty() else nullcontext()
    with bar as progress:
        done = warmup.warm_up(progress=progress)
    directory = settings.load().resolved_cache_dir()
    kept = sum(entry.state == "current" for entry in cache.entries(specs))
    if kept < len(specs):
        raise CacheError(
            f"kernel cache {directory}: {len(specs)} kernels are compiled, and only {kept} could be kept; make the "
            "directory writable, free disk space, or set FP8_BACKEND_CACHE_DIR"
        )
    print(f"{done}; {directory}")
