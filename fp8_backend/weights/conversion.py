"""Convert a checkpoint shard by shard in several processes; what a killed run finished is kept by the next.

The folder written to holds a hidden one with the plan and a report for each finished shard. config.json comes last: an
unfinished folder is no checkpoint for any server.
"""

from __future__ import annotations

import dataclasses
import fcntl
import json
import multiprocessing
import os
import shutil
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from multiprocessing.connection import wait as wait_for_sentinel
from pathlib import Path
from typing import Any

import torch

from fp8_backend.errors import CheckpointError
from fp8_backend.progress import Progress
from fp8_backend.weights.files import INDEX, Checkpoint, read_json
from fp8_backend.weights.safetensors_header import DTYPE_BITS, read_header
from fp8_backend.weights.safetensors_writer import PARTIAL
from fp8_backend.weights.shard_conversion import LayerError, ShardTask, contents, convert_shard

STATE = ".fp8-backend-conversion"
NOT_COPIED = (".safetensors", ".bin", ".pt", ".pth", ".gguf")  # other forms of the same weights
FREE_MARGIN = 1 << 26  # bytes left for config, tokenizer and reports


@dataclass(frozen=True)
class Conversion:
    """Everything a run needs to know before it reads a tensor."""

    checkpoint: Checkpoint
    out: Path
    tasks: list[ShardTask]
    config: dict[str, Any]  # config.json of the result
    options: dict[str, Any]  # what a later run must repeat to continue this one


@dataclass(frozen=True)
class Converted:
    """What a finished conversion did."""

    errors: list[LayerError]
    bytes_read: int
    bytes_written: int
    resumed_shards: int


def convert(conversion: Conversion, workers: int) -> Converted:
    """Write the converted checkpoint, or the rest of it.

    Args:
        conversion: what to do.
        workers: processes; each holds one stripe of one tensor.

    Raises:
        CheckpointError: the output folder holds something else, is in use or too small, or a tensor cannot be
            converted.
    """
    out = conversion.out
    try:
        with _locked_state(conversion) as state:
            done = [task for task in conversion.tasks if _is_done(task, state)]
            rest = [task for task in conversion.tasks if task not in done]
            _check_free_space(rest, out)
            _run(rest, state, min(workers, max(1, len(rest))))
            _finish(conversion)
            reports = [read_json(_report_path(state, task)) for task in conversion.tasks]
            shutil.rmtree(state)
    except OSError as error:
        raise CheckpointError(f"{error.filename or out}: {error.strerror}; make room or name another folder") from error
    return Converted(
        errors=[_layer_error(entry) for report in reports for entry in report["errors"]],
        bytes_read=sum(shard.stat().st_size for shard in conversion.checkpoint.shards),
        bytes_written=sum(task.out.stat().st_size for task in conversion.tasks),
        resumed_shards=len(done),
    )


@contextmanager
def _locked_state(conversion: Conversion) -> Iterator[Path]:
    """Create the folder or recognise it as one this conversion began, and keep every other process out of it."""
    out, state = conversion.out, conversion.out / STATE
    source = conversion.checkpoint.folder.resolve()
    if out.resolve() == source or source in out.resolve().parents:
        raise CheckpointError(f"{out}: is the source or within it; name another folder")
    if out.exists() and not state.is_dir() and any(out.iterdir()):
        raise CheckpointError(f"{out}: not empty, and not an unfinished conversion; name a new folder or delete it")
    state.mkdir(parents=True, exist_ok=True)
    handle = os.open(state / "lock", os.O_CREAT | os.O_RDWR)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise CheckpointError(f"{out}: another process is writing it; wait for it or name another folder") from None
        plan = {
            "source": str(source),
            "shards": {path.name: [(s := path.stat()).st_size, s.st_mtime_ns] for path in conversion.checkpoint.shards},
            **conversion.options,
        }
        plan_path = state / "plan.json"
        if plan_path.exists() and (begun := read_json(plan_path)) != plan:
            changed = ", ".join(key for key in plan if begun.get(key) != plan[key])
            raise CheckpointError(f"{out}: begun with another {changed}; repeat those options, or delete the folder")
        _write_atomically(plan_path, plan)
        for stale in out.glob(f".*{PARTIAL}"):
            stale.unlink()
        yield state
    finally:
        os.close(handle)


def _is_done(task: ShardTask, state: Path) -> bool:
    """Return whether an earlier run finished a shard; the report is written after the shard is in its place.

    The shard holds what this run would make of it: an earlier version of this package may have chosen other weights.
    """
    try:
        made = {name: (info.dtype, info.shape) for name, info in read_header(task.out).items()}
        return made == contents(task, read_header(task.source)) and bool(read_json(_report_path(state, task)))
    except (CheckpointError, FileNotFoundError):
        return False


def _check_free_space(tasks: list[ShardTask], out: Path) -> None:
    made = (shape for task in tasks for shape in contents(task, read_header(task.source)).values())
    needed = sum(prod(shape) * DTYPE_BITS[dtype] // 8 for dtype, shape in made) + FREE_MARGIN
    if (free := shutil.disk_usage(out).free) < needed:
        raise CheckpointError(f"{out}: {free / 1e9:.1f} GB free; expected {needed / 1e9:.1f}; name a larger disk")


def _run(tasks: list[ShardTask], state: Path, workers: int) -> None:
    total = sum(info.bytes for task in tasks for info in read_header(task.source).values())
    with Progress("converting", total) as progress:
        if workers > 1:
            _run_in_processes(tasks, state, workers, progress)
            return
        for task in tasks:
            _convert_and_report(task, _report_path(state, task), progress.advance)


def _run_in_processes(tasks: list[ShardTask], state: Path, workers: int, progress: Progress) -> None:
    # spawn: forking a process whose torch has threads can deadlock the child.
    context = multiprocessing.get_context("spawn")
    counter, stop = context.Value("q", 0), context.Value("b", False)
    with ProcessPoolExecutor(workers, context, _start_worker, (counter, stop, workers)) as pool:
        # Workers inherit the mask. A terminal interrupts all processes at once, and a worker that is still importing
        # would print where; `stop` ends them in order.
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
        running = {pool.submit(_work, task, _report_path(state, task)) for task in tasks}
        try:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])
            while running:
                finished, running = wait(running, timeout=0.2, return_when=FIRST_COMPLETED)
                for future in finished:
                    future.result()
                progress.advance_to(counter.value)
        except BrokenProcessPool:
            raise CheckpointError(
                f"{tasks[0].out.parent}: a worker was killed, perhaps for want of memory; run the command again with "
                "fewer --workers: finished shards are kept"
            ) from None
        except BaseException as error:
            stop.value = isinstance(error, KeyboardInterrupt)
            pool.shutdown(wait=True, cancel_futures=True)
            raise


# Of this worker process, shared with the others: bytes done by all of them, and whether to leave the rest.
_counter: Any = None
_stop: Any = None


def _start_worker(counter: Any, stop: Any, workers: int) -> None:
    global _counter, _stop
    _counter, _stop = counter, stop
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // workers))
    parent = multiprocessing.parent_process()
    assert parent is not None

    def die_with_parent() -> None:
        # A killed parent leaves its workers waiting for work for ever.
        wait_for_sentinel([parent.sentinel])
        os._exit(1)

    threading.Thread(target=die_with_parent, daemon=True).start()


def _work(task: ShardTask, report: Path) -> None:
    def advance(count: int) -> None:
        if _stop.value:
            raise KeyboardInterrupt
        with _counter.get_lock():
            _counter.value += count

    _convert_and_report(task, report, advance)


def _convert_and_report(task: ShardTask, report: Path, advance: Callable[[int], None]) -> None:
    errors = convert_shard(task, advance)
    _write_atomically(report, {"errors": [dataclasses.asdict(error) for error in errors]})


def _finish(conversion: Conversion) -> None:
    checkpoint, out = conversion.checkpoint, conversion.out
    homes, total = {}, 0
    for task in conversion.tasks:
        for name, info in read_header(task.out).items():
            homes[name] = task.out.name
            total += info.bytes
    for path in sorted(checkpoint.folder.iterdir()):
        is_weights = path.suffix in NOT_COPIED or path.name == INDEX or path.name.startswith(".")
        if path.is_file() and not is_weights and path.name != "config.json":
            shutil.copyfile(path, out / path.name)
    if len(conversion.tasks) > 1 or (checkpoint.folder / INDEX).exists():
        _write_atomically(out / INDEX, {"metadata": {"total_size": total}, "weight_map": dict(sorted(homes.items()))})
    _write_atomically(out / "config.json", conversion.config)


def _report_path(state: Path, task: ShardTask) -> Path:
    return state / f"{task.out.name}.json"


def _layer_error(entry: dict[str, Any]) -> LayerError:
    return LayerError(**{**entry, "shape": tuple(entry["shape"]), "worst_block": tuple(entry["worst_block"])})


def _write_atomically(path: Path, value: dict[str, Any]) -> None:
    partial = path.with_name(f".{path.name}.{os.getpid()}{PARTIAL}")
    with partial.open("w", encoding="utf-8") as file:
        file.write(json.dumps(value, indent=1) + "\n")
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
