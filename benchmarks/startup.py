"""How long `vllm serve` takes to start without compiled kernels and with them, and what of that is fp8_backend's.

    python -m benchmarks.startup

Starts the same server with dummy weights three times: with an empty kernel cache, with the one that the first start
filled, and again with FP8_BACKEND_JIT=forbid, under which a compile at any time is an error. vLLM's own compile cache
is filled by the first start, so that only the kernels' seconds may be compared with each other. After each start a
request is answered; the log then has to show that nothing was compiled after the warm-up. Exits with status 1 and the
reasons where a start fails or takes longer than its limit.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from benchmarks import ROOT, results
from benchmarks.storm import COUNTERS, ENVIRONMENT, kernels_ready, log_problems
from demo.architectures import Size, model_config
from demo.server import DemoError, Server
from demo.tokenizer import write_tokenizer
from fp8_backend.ab.logs import SUMMARY
from fp8_backend.measure.child import stop_children_on_signals
from fp8_backend.measure.environment import environment, write_json

# Qwen3-8B's widths; its vocabulary is cut to what the generated tokenizer holds, which no FP8 layer sees.
QWEN3_8B = Size(layers=4, hidden=4096, heads=32, kv_heads=8, intermediate=12288, vocab=16384, shards=1)
STARTS = {"cold": "auto", "warm": "auto", "warm, forbidden": "forbid"}
# Seconds the kernels may add to a start on a host of 16 cores.
LIMITS = {"cold": 15.0, "warm": 1.0, "warm, forbidden": 1.0}


def write_model(folder: Path, size: Size) -> None:
    """Write config and tokenizer of a Qwen3 model without weights."""
    folder.mkdir(parents=True)
    config = model_config("qwen3", size)
    (folder / "config.json").write_text(json.dumps(config))
    write_tokenizer(folder, size.vocab, config["max_position_embeddings"])


def start(name: str, model: Path, folder: Path, kernels: Path, log: Path, limit_s: float) -> dict[str, Any]:
    """Start the server once, ask it once, stop it; return the row.

    Raises:
        DemoError: it does not start or does not answer.
    """
    arguments = ["--quantization", "deepgemm_fp8", "--load-format", "dummy", "--max-model-len", "512"]
    if torch.cuda.is_available():
        sizes = json.dumps({"cudagraph_capture_sizes": [1, 8]})
        arguments += ["--gpu-memory-utilization", "0.3", "--kv-cache-memory-bytes", str(2 << 30)]
        arguments += ["--compilation-config", sizes]
    else:
        arguments += ["--enforce-eager"]
    variables = {
        **ENVIRONMENT,
        "VLLM_CACHE_ROOT": str(folder / "vllm"),
        "FP8_BACKEND_CACHE_DIR": str(kernels),
        "FP8_BACKEND_JIT": STARTS[name],
        "VLLM_CPU_KVCACHE_SPACE": "1",  # in GiB
        "VLLM_LOGGING_LEVEL": "DEBUG",
    }
    with Server(model, log, arguments, variables, limit_s) as server:
        server.complete("once upon a time", 16)
        faults = log_problems(log.read_text(errors="replace"))  # before it is stopped, on which vLLM writes tracebacks
    text = log.read_text(errors="replace")
    summary = SUMMARY.search(text)
    return {
        "start": name,
        "server_s": round(server.started_s, 1),
        "kernels": kernels_ready(text),
        "summary": summary[0] if summary else None,
        "counters": COUNTERS.findall(text),
        "faults": faults,
    }


def problems_of(rows: list[dict[str, Any]], on_gpu: bool) -> list[str]:
    """Return one line for everything that is missing, wrong or slower than its limit."""
    found = []
    for row in rows:
        name, kernels = row["start"], row["kernels"]
        found += [f"{name}: {fault}" for fault in row["faults"]]
        if row["summary"] is None:
            found.append(f"{name}: the log has no line on fp8_backend's layers")
        if kernels is None:
            if on_gpu:
                found.append(f"{name}: the log has no line on kernels")
            continue
        if kernels["seconds"] > LIMITS[name]:
            found.append(f"{name}: the kernels took {kernels['seconds']} s, more than {LIMITS[name]} s")
        if (kernels["compiled"] == 0) != (name != "cold"):
            found.append(f"{name}: {kernels['compiled']} kernels compiled, {kernels['cached']} from the cache")
    return found


def main() -> None:
    """Start the servers and report."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.startup", description=__doc__)
    parser.add_argument("--out", type=Path, default=results() / "startup.json")
    parser.add_argument("--logs", type=Path, default=ROOT / "build" / "startup-logs")
    parser.add_argument("--start-limit", type=float, default=300, help="seconds until a server must answer")
    parser.add_argument("--starts", default=";".join(STARTS), help="which of them, in their order")
    parser.add_argument("--kernels", type=Path, help="folder of compiled kernels; by default a new one")
    parser.add_argument("--layers", type=int, default=QWEN3_8B.layers)
    parser.add_argument("--hidden", type=int, default=QWEN3_8B.hidden, help="smaller to try the script without a GPU")
    parser.add_argument("--commit", help="where the tree is no repository")
    options = parser.parse_args()
    stop_children_on_signals()
    options.logs.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    env = {**environment(options.commit), "cores": len(os.sched_getaffinity(0)), "failures": []}
    size = Size(**{**vars(QWEN3_8B), "layers": options.layers, "hidden": options.hidden})
    with tempfile.TemporaryDirectory(prefix="fp8-startup-") as name:
        folder = Path(name)
        kernels = options.kernels or folder / "kernels"
        write_model(folder / "model", size)
        for index, kind in enumerate(options.starts.split(";")):
            try:
                log = options.logs / f"{index}-{kind.replace(', ', '-')}.log"
                rows.append(start(kind, folder / "model", folder, kernels, log, options.start_limit))
                print(json.dumps(rows[-1]), flush=True)
            except DemoError as error:
                env["failures"].append(f"{kind}: {error}")
            write_json(options.out, {"env": env, "rows": rows})
    if problems := [*env["failures"], *problems_of(rows, torch.cuda.is_available())]:
        sys.exit("\n".join(problems))


if __name__ == "__main__":
    main()
