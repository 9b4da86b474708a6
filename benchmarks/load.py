"""What loading costs: time and peak device memory of vLLM's own FP8 path and of this one, on the same files.

    python -m benchmarks.load MODEL [MODEL ...] [--rounds 3] [--json load.json]

Builds each model as a worker does, in one process, arms in turn (A B, B A, ...) after one uncounted load that fills the
page cache, compiles kernels and imports. An arm that this machine cannot run (stock fp8 on a CPU without AMX) is left
out and named. `pack_seconds` is what packing takes of `seconds`; `largest_layer` the bytes of the largest
FP8 layer as vLLM merges it, scales included; `bytes_over_model` the peak beyond what the model holds in the end.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from fp8_backend.measure.environment import environment, write_json

ARMS = ("fp8", "deepgemm_fp8")


def load_once(model: str, quantization: str) -> dict[str, Any]:
    """Load a model and drop it; return seconds, and on a GPU the bytes it holds and the peak on the way."""
    from vllm.config import set_current_vllm_config
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.model_loader import get_model

    config = EngineArgs(model=model, quantization=quantization, max_model_len=256).create_engine_config()
    on_gpu = torch.cuda.is_available()
    before = torch.cuda.memory_allocated() if on_gpu else 0
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    with set_current_vllm_config(config), timed_packing() as packing:
        initialize()
        began = time.perf_counter()
        loaded = get_model(vllm_config=config)
        synchronize()
    row: dict[str, Any] = {"model": Path(model).name, "quantization": quantization}
    row["seconds"] = time.perf_counter() - began
    row["pack_seconds"] = sum(packing)
    if on_gpu:
        held = torch.cuda.memory_allocated() - before
        row |= {"bytes": held, "bytes_over_model": torch.cuda.max_memory_allocated() - before - held}
    row["largest_layer"] = max(layer_bytes(module) for module in loaded.modules())
    del loaded, config
    gc.collect()
    return row


@contextmanager
def timed_packing() -> Iterator[list[float]]:
    """Collect the seconds that packing takes of each of our layers, its work on the device included."""
    from fp8_backend.integration.linear import DeepGemmFp8LinearMethod
    from fp8_backend.integration.moe import DeepGemmFp8MoEMethod

    seconds: list[float] = []

    def timed(original: Callable[..., None]) -> Callable[..., None]:
        def pack(self: Any, layer: torch.nn.Module) -> None:
            synchronize()
            began = time.perf_counter()
            original(self, layer)
            synchronize()
            seconds.append(time.perf_counter() - began)

        return pack

    with ExitStack() as stack:
        for method in (DeepGemmFp8LinearMethod, DeepGemmFp8MoEMethod):
            name = "process_weights_after_loading"
            stack.enter_context(patch.object(method, name, timed(getattr(method, name))))
        yield seconds


def synchronize() -> None:
    """Wait for the GPU, where there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def layer_bytes(module: torch.nn.Module) -> int:
    """Return the bytes of what a module itself holds, if it holds e4m3 codes."""
    held = list(module.parameters(recurse=False))
    return sum(each.nbytes for each in held) if any(each.dtype == torch.float8_e4m3fn for each in held) else 0


def initialize() -> None:
    """Set up vLLM's process groups of one rank anew: which there are depends on the model."""
    from vllm.distributed import parallel_state
    from vllm.utils.network_utils import get_open_port

    if parallel_state.model_parallel_is_initialized():
        parallel_state.destroy_model_parallel()
    else:
        backend = "nccl" if torch.cuda.is_available() else "gloo"
        parallel_state.init_distributed_environment(1, 0, f"tcp://127.0.0.1:{get_open_port()}", 0, backend)
    parallel_state.initialize_model_parallel()


def measure(model: str, rounds: int, absent: dict[str, str]) -> Iterator[dict[str, Any]]:
    """Yield the rows of a model; note in `absent` the arms that this machine cannot run, with vLLM's reason."""
    arms = []
    for arm in ARMS:
        try:
            load_once(model, arm)
            arms.append(arm)
        except ValueError as error:  # how vLLM says that no kernel of its own fits
            absent[arm] = str(error).splitlines()[0]
            print(f"{arm} left out: {absent[arm]}")
    for number in range(rounds):
        for arm in arms if number % 2 == 0 else arms[::-1]:
            yield load_once(model, arm)


def summary(rows: list[dict[str, Any]]) -> str:
    """Return one model's medians, and what they say: time beside the other arm's, peak beside the largest layer."""
    lines, medians = [], {}
    for arm in ARMS:
        if not (of_arm := [row for row in rows if row["quantization"] == arm]):
            continue
        medians[arm], packing = (statistics.median(row[key] for row in of_arm) for key in ("seconds", "pack_seconds"))
        line = (
            f"{of_arm[0]['model']} {arm}: median of {len(of_arm)}: {medians[arm]:.3f} s, packing {packing:.3f} s of it"
        )
        if "bytes_over_model" in of_arm[0]:
            over = max(row["bytes_over_model"] for row in of_arm) / 1e6
            line += f"; peak {over:.1f} MB above the model, largest layer {of_arm[0]['largest_layer'] / 1e6:.1f} MB"
        lines.append(line)
    if len(medians) == len(ARMS):
        lines.append(f"{ARMS[1]} takes {medians[ARMS[1]] / medians[ARMS[0]]:.3f} times as long as {ARMS[0]}")
    return "\n".join(lines)


def main() -> None:
    """Measure and print; write the rows where asked."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.load", description="Measure loading beside stock fp8.")
    parser.add_argument("models", nargs="+", metavar="MODEL", help="folder with config.json and safetensors")
    parser.add_argument("--rounds", type=int, default=3, help="loads counted of each arm")
    parser.add_argument("--json", type=Path, help="where to write the rows")
    parser.add_argument("--commit", help="of a tree without a repository")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        torch.accelerator.empty_cache = lambda: None  # as vLLM's CPU worker does: torch raises without an accelerator
    env: dict[str, Any] = {**environment(arguments.commit), "absent": {}}
    rows: list[dict[str, Any]] = []
    for model in arguments.models:
        of_model = []
        for row in measure(model, arguments.rounds, env["absent"]):
            of_model.append(row)
            rows.append(row)
            print(row, flush=True)
            if arguments.json:
                write_json(arguments.json, {"env": env, "rows": rows})
        print(summary(of_model), flush=True)


if __name__ == "__main__":
    main()
