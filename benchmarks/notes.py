"""Notes that device code takes of the time: a copy of it writes %globaltimer to memory at given places.

%globaltimer has been seen to go in steps of a quarter of a microsecond. Kernels from such a copy are compiled anew and
kept nowhere, for the memory's address is in their text.
"""

from __future__ import annotations

import shutil
import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

from fp8_backend.kernels import cache, launcher
from fp8_backend.kernels.compiler import CUDA_FOLDER, KernelSpec, compile_kernel

CTAS, SLOTS = 264, 64  # two CTAs of each of 132 multiprocessors; notes of each
_TAKE_NOTE = """DEVICE void take_note(u32 row, u32 slot, u64 word) {{
    const u32 cta = blockIdx.x + blockIdx.y * gridDim.x;
    u64* const notes = reinterpret_cast<u64*>({address}ull) + (row * {ctas} + cta) * {slots};
    if (cta < {ctas} && slot < {slots}) notes[slot] = word;
}}
DEVICE void take_note(u32 row, u32 slot) {{
    u64 now;
    asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(now));
    take_note(row, slot, now);
}}

// ---- warps ---"""


@dataclass(frozen=True)
class Place:
    """A text that a file of device code has once, and what is planted before or behind it."""

    file: str
    text: str
    planted: str
    behind: bool = False


def note(thread: str, row: int | str, slot: int | str) -> str:
    """Return a statement by which a thread notes the time in a slot of its CTA, in a row of notes."""
    return f"if ({thread}) take_note({row}, {slot});\n"


def instrument(folder: Path, address: int, places: Iterable[Place]) -> None:
    """Write to a folder the device code with notes, which go to memory [rows, CTAS, SLOTS] of 64-bit words."""
    shutil.copytree(CUDA_FOLDER, folder, dirs_exist_ok=True)
    anchor, words = "// ---- warps ---", _TAKE_NOTE.format(ctas=CTAS, slots=SLOTS, address=address)
    text = (folder / "ptx.cuh").read_text()
    assert anchor in text
    (folder / "ptx.cuh").write_text(text.replace(anchor, words, 1))
    for place in places:
        text = (folder / place.file).read_text()
        assert text.count(place.text) == 1, (place.file, place.text, text.count(place.text))
        more = place.text + place.planted if place.behind else place.planted + place.text
        (folder / place.file).write_text(text.replace(place.text, more))


@contextmanager
def kernels_from(folder: Path, caches: Sequence[Callable[..., Any]]) -> Iterator[None]:
    """Have kernels loaded from a folder of device code; `caches` are the cached functions that return loaded ones."""
    load = launcher.load

    def of_folder(spec: KernelSpec, layout: launcher.ParamLayout) -> launcher.Kernel:
        return load(replace(spec, folder=folder), layout)

    def forget() -> None:
        for each in caches:
            each.cache_clear()  # type: ignore[attr-defined]

    forget()
    try:
        with patch.object(launcher, "load", of_folder), patch.object(cache, "get", compile_kernel):
            yield
    finally:
        forget()


def told(us: list[float]) -> dict[str, float]:
    """Return what is told of an event that some CTAs have noted: how many, the first, the median and the last."""
    return {"ctas": len(us), "first": min(us), "median": statistics.median(us), "last": max(us)}
