"""Faults while serving: poisoned activations, no memory left, a stop in the middle of the warm-up."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from fp8_backend.kernels import gemm, layout

DEVICES = [torch.device("cpu"), pytest.param(torch.device("cuda"), marks=pytest.mark.gpu)]
N, K = 256, 384
GIB = 1 << 30


def packed(device: torch.device, n: int = N, k: int = K) -> tuple[torch.Tensor, torch.Tensor]:
    random = torch.Generator().manual_seed(1)
    codes = (torch.randn(n, k, generator=random) * 60).to(torch.float8_e4m3fn).to(device)
    scale = torch.rand(n // 128, k // 128, generator=random).to(device) / 100
    return layout.pack_weight(codes), layout.pack_scale(scale, n, k)


@pytest.mark.parametrize("device", DEVICES, ids=str)
@pytest.mark.parametrize("m", [1, 8, 16, 64, 200])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")], ids=str)
def test_poisoned_row_stays_visible_and_leaves_the_others_alone(device: torch.device, m: int, value: float) -> None:
    weight, scale = packed(device)
    x = torch.randn(m, K, generator=torch.Generator().manual_seed(2)).bfloat16().to(device)
    clean = gemm.fp8_linear(x, weight, scale, N)
    assert clean.isfinite().all()
    x[m // 2, 130] = value
    got = gemm.fp8_linear(x, weight, scale, N)
    others = torch.arange(m, device=device) != m // 2
    assert torch.equal(got[others], clean[others])
    assert not got[m // 2].isfinite().any()
    x[m // 2] = 1.0
    assert gemm.fp8_linear(x, weight, scale, N).isfinite().all()  # nothing of it is left in a workspace


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")], ids=str)
@pytest.mark.parametrize("m", [1, 64, 200])
def test_poisoned_token_of_experts_leaves_the_others_alone(m: int, value: float) -> None:
    from fp8_backend.bench.moe_operands import RandomExperts
    from fp8_backend.bench.moe_shapes import MoeShape, route
    from fp8_backend.kernels.experts import fp8_experts

    shape = MoeShape("small", experts=8, hidden=256, intermediate=128, top_k=2)
    layer = RandomExperts(shape, torch.device("cpu"), 1).ours[0]
    x = torch.randn(m, 256, generator=torch.Generator().manual_seed(2)).bfloat16()
    routed = route(shape, m, "balanced", 1)
    clean = fp8_experts(x, *routed, layer.w13, layer.scale_13, layer.w2, layer.scale_2)
    x[m // 2, 130] = value
    got = fp8_experts(x, *routed, layer.w13, layer.scale_13, layer.w2, layer.scale_2)
    others = torch.arange(m) != m // 2
    assert clean.isfinite().all() and torch.equal(got[others], clean[others])
    assert not got[m // 2].isfinite().any()


def test_no_memory_for_a_workspace_names_memory_and_the_next_call_is_right() -> None:
    """In a child whose address space has an end; its second answer is compared with this process's."""
    program = (
        "import json, resource, sys, torch\n"
        "from tests.test_faults import GIB, K, N, packed\n"
        "from fp8_backend.kernels import gemm\n"
        "weight, scale = packed(torch.device('cpu'))\n"
        "x = torch.randn(4, K, generator=torch.Generator().manual_seed(3)).bfloat16()\n"
        "gemm.fp8_linear(x, weight, scale, N)\n"
        "used = int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize()\n"
        "resource.setrlimit(resource.RLIMIT_AS, (used + GIB, used + GIB))\n"
        "try:\n"
        "    gemm.fp8_linear(torch.zeros(1, K).bfloat16().expand(1 << 22, K), weight, scale, N)\n"
        "except (RuntimeError, MemoryError) as error:\n"
        "    said = str(error)\n"
        "print(json.dumps([said, gemm.fp8_linear(x, weight, scale, N).float().tolist()]))\n"
    )
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[1]), *filter(None, sys.path)])}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, env=environ)
    assert done.returncode == 0, done.stderr[-2000:]
    message, after = json.loads(done.stdout)
    assert "can't allocate memory" in message
    x = torch.randn(4, K, generator=torch.Generator().manual_seed(3)).bfloat16()
    assert after == gemm.fp8_linear(x, *packed(torch.device("cpu")), N).float().tolist()


@pytest.mark.gpu
def test_no_memory_on_the_gpu_names_memory_and_the_next_call_is_right() -> None:
    device = torch.device("cuda")
    weight, scale = packed(device)
    x = torch.randn(300, K, device=device).bfloat16()
    expected = gemm.fp8_linear(x, weight, scale, N)
    large = torch.zeros(1 << 22, K, dtype=torch.bfloat16, device=device)
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(device).total_memory
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + (64 << 20)) / total)
    try:
        with pytest.raises(torch.OutOfMemoryError, match="out of memory"):
            gemm.fp8_linear(large, weight, scale, N)
        assert torch.equal(gemm.fp8_linear(x, weight, scale, N), expected)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


# Warms up as vLLM's workers do: they turn SIGTERM into SystemExit. Many kernels, so that there is time to be stopped.
RANK = """
import signal, sys
from pathlib import Path
from fp8_backend.kernels import warmup
from fp8_backend.kernels.compiler import KernelSpec
if sys.argv[2] == "exit":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
folder, count = Path(sys.argv[1]), int(sys.argv[3])
specs = [KernelSpec("saxpy.cuh", "saxpy", (("OFFSET", offset),), folder) for offset in range(count)]
print("ready", flush=True)
print(warmup.warm_up(specs).compiled, flush=True)
"""


def rank(how: str, kernels: int, directory: Path) -> subprocess.Popen[str]:
    environ = {
        **os.environ,
        "FP8_BACKEND_CACHE_DIR": str(directory),
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
    }
    command = [sys.executable, "-c", RANK, str(Path(__file__).parent), how, str(kernels)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environ)
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    return process


def rest(process: subprocess.Popen[str]) -> str:
    """Return what a rank that ends well says behind its first line.

    Not communicate(timeout=...): it reads past the file object, which may hold the second line since it read the first.
    """
    assert process.wait(timeout=60) == 0 and process.stdout is not None
    return process.stdout.read().strip()


@pytest.mark.parametrize(("how", "status"), [("exit", 143), ("default", -signal.SIGTERM)])
def test_stopped_in_the_warm_up_ends_soon_and_frees_the_next(how: str, status: int, tmp_path: Path) -> None:
    directory = tmp_path / "cache"
    stopped = rank(how, 1000, directory)
    waiting = rank(how, 3, directory)  # as a second rank, for the lock of the first
    deadline = time.monotonic() + 60
    while len(list(directory.glob("v1/*.cubin"))) < 5:
        assert stopped.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    stopped.terminate()
    assert stopped.wait(timeout=30) == status
    assert rest(waiting).isdigit()
    kept = len(list(directory.glob("v1/*.cubin")))
    assert 5 <= kept < 1000
    again = rank(how, 3, directory)
    assert rest(again) == "0"  # what was finished before the stop is whole and found


ENGINES = """
import json, sys

def main():
    from vllm import LLM, SamplingParams
    answers = []
    for _ in range(2):
        llm = LLM(model=sys.argv[1], quantization="deepgemm_fp8", max_model_len=256, enforce_eager=True, seed=0,
                  gpu_memory_utilization=0.05, kv_cache_memory_bytes=1 << 28, disable_log_stats=True)
        prompts = [{"prompt_token_ids": [1, 7, 9, 30, 12]}]
        done = llm.generate(prompts, SamplingParams(temperature=0, max_tokens=12, logprobs=1, ignore_eos=True))
        answers.append([[token, row[token].logprob] for row in done[0].outputs[0].logprobs for token in row])
        del llm
    print("ANSWERS", json.dumps(answers))

if __name__ == "__main__":
    main()
"""


@pytest.mark.vllm
def test_engine_started_again_in_one_process_answers_the_same(tmp_path: Path) -> None:
    from demo.architectures import SIZES
    from demo.checkpoint import write_checkpoint

    write_checkpoint(tmp_path / "model", "deepseek_v3", SIZES["deepseek_v3", "demo"])
    environ = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        # One process for both: whatever the first engine left behind in this package meets the second.
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
    }
    program = tmp_path / "engines.py"
    program.write_text(ENGINES)
    command = [sys.executable, str(program), str(tmp_path / "model")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environ)
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("ANSWERS")] or [done.stderr[-4000:]]
    first, second = json.loads(line.removeprefix("ANSWERS"))
    assert first == second and len(first) >= 12
