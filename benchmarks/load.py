"""What loading costs: time and peak device memory of vLLM's own FP8 path and of this one, on the same files.

    python -m benchmarks.load MODEL [--rounds 3] [--json load.json]

Builds the model as a worker does, in one process, arms in turn (A B, B A, ...) after one uncounted load that fills the
page cache, compiles kernels and imports. An arm that this machine cannot run (stock fp8 on a CPU without AMX) is left
out and named. `pack_seconds` is what packing takes of `seconds`; `largest_layer` the bytes of FP8 codes of the largest
linear as vLLM merges it; `bytes_over_model` the peak beyond what the model holds in the end.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

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
    row: dict[str, Any] = {"quantization": quantization, "seconds": time.perf_counter() - began}
    row["pack_seconds"] = sum(packing)
    if on_gpu:
        held = torch.cuda.memory_allocated() - before
        row |= {"bytes": held, "bytes_over_model": torch.cuda.max_memory_allocated() - before - held}
    sizes = [module.weight.numel() for module in loaded.modules() if is_fp8(module)]
    row["largest_layer"] = max(sizes, default=0)
    del loaded, config
    gc.collect()
    return row


@contextmanager
def timed_packing() -> Iterator[list[float]]:
    """Collect the seconds that each linear's packing takes, its work on the device included."""
    from fp8_backend.integration.linear import DeepGemmFp8LinearMethod as Method

    original, seconds = Method.process_weights_after_loading, []

    def timed(self: Method, layer: torch.nn.Module) -> None:
        synchronize()
        began = time.perf_counter()
        original(self, layer)
        synchronize()
        seconds.append(time.perf_counter() - began)

    Method.process_weights_after_loading = timed  # type: ignore[method-assign]
    try:
        yield seconds
    finally:
        Method.process_weights_after_loading = original  # type: ignore[method-assign]


def synchronize() -> None:
    """Wait for the GPU, where there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def is_fp8(module: torch.nn.Module) -> bool:
    """Return whether a module holds e4m3 codes."""
    weight = getattr(module, "weight", None)
    return isinstance(weight, torch.Tensor) and weight.dtype == torch.float8_e4m3fn


def initialize() -> None:
    """Set up vLLM's process groups for one rank, once."""
    from vllm.distributed import parallel_state
    from vllm.utils.network_utils import get_open_port

    if not parallel_state.model_parallel_is_initialized():
        backend = "nccl" if torch.cuda.is_available() else "gloo"
        parallel_state.init_distributed_environment(1, 0, f"tcp://127.0.0.1:{get_open_port()}", 0, backend)
        parallel_state.initialize_model_parallel()


def main() -> None:
    """Measure and print; write the rows where asked."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.load", description="Measure loading beside stock fp8.")
    parser.add_argument("model", help="folder with config.json and safetensors")
    parser.add_argument("--rounds", type=int, default=3, help="loads counted of each arm")
    parser.add_argument("--json", type=Path, help="where to write the rows")
    parser.add_argument("--commit", help="of a tree without a repository")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        torch.accelerator.empty_cache = lambda: None  # as vLLM's CPU worker does: torch raises without an accelerator
    arms, rows, absent = [], [], {}
    for arm in ARMS:
        try:
            load_once(arguments.model, arm)
            arms.append(arm)
        except ValueError as error:  # how vLLM says that no kernel of its own fits
            absent[arm] = str(error).splitlines()[0]
            print(f"{arm} left out: {absent[arm]}")
    for number in range(arguments.rounds):
        for arm in arms if number % 2 == 0 else arms[::-1]:
            rows.append(load_once(arguments.model, arm))
            print(rows[-1], flush=True)
    for arm in arms:
        of_arm = [row for row in rows if row["quantization"] == arm]
        seconds, packing = (statistics.median(row[key] for row in of_arm) for key in ("seconds", "pack_seconds"))
        print(f"{arm}: median of {len(of_arm)}: {seconds:.3f} s, of which packing {packing:.3f} s")
    if arguments.json:
        write_json(arguments.json, {"env": {**environment(arguments.commit), "absent": absent}, "rows": rows})


if __name__ == "__main__":
    main()
