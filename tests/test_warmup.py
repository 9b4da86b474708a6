"""Warm-up with real compiles, real processes and vLLM's own layers."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from fp8_backend import counters
from fp8_backend.errors import CompileError
from fp8_backend.kernels import cache, heuristics, quantize, warmup
from fp8_backend.kernels.compiler import KernelSpec
from fp8_backend.kernels.problem import GemmProblem
from fp8_backend.progress import ProgressOnDemand

HERE = Path(__file__).parent
SPECS = [KernelSpec("saxpy.cuh", "saxpy", (("OFFSET", offset),), HERE) for offset in (3, 4, 5)]
BROKEN = KernelSpec("saxpy.cuh", "saxpy", (), HERE)  # OFFSET is not defined
# [n, k] of DeepSeek-V3, Qwen3 and a layer of odd sizes.
LAYERS = [
    (2112, 7168),
    (24576, 1536),
    (32768, 512),
    (7168, 16384),
    (36864, 7168),
    (512, 7168),
    (4096, 4096),
    (136, 200),
]


@pytest.fixture(autouse=True)
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FP8_BACKEND_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.delenv("FP8_BACKEND_JIT", raising=False)
    for name, empty in (("_memory", {}), ("_warned", set()), ("_ready", threading.Event())):
        monkeypatch.setattr(cache, name, empty)
    monkeypatch.setattr(counters, "compiles", [])
    return tmp_path / "cache"


def counts(done: warmup.WarmUp) -> tuple[int, int]:
    return done.kernels, done.compiled


def test_compiles_once_then_finds_in_memory_then_on_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, int]] = []

    def progress(done: int, total: int) -> None:
        seen.append((done, total))

    assert cache.find(SPECS[0]) is None
    assert counts(warmup.warm_up(SPECS, progress)) == (3, 3)
    assert seen == [(0, 3), (1, 3), (2, 3), (3, 3)]
    assert counts(warmup.warm_up(SPECS, progress)) == (3, 0)
    monkeypatch.setattr(cache, "_memory", {})
    assert counts(warmup.warm_up(SPECS, progress)) == (3, 0)
    assert len(seen) == 4
    assert len(counters.compiles) == 3


def test_summary_is_one_line_with_all_counts() -> None:
    line = str(warmup.WarmUp(kernels=36, compiled=30, seconds=4.25))
    assert line == "36 kernels ready in 4.2 s: 6 from the cache, 30 compiled"


def test_missing_kernels_are_compiled_beside_those_that_are_there() -> None:
    warmup.warm_up(SPECS[:1])
    assert counts(warmup.warm_up(SPECS)) == (3, 2)


def test_failures_are_counted_and_do_not_stop_the_others() -> None:
    with pytest.raises(CompileError, match=r"^kernel saxpy .*NVRTC_ERROR_COMPILATION"):
        warmup.warm_up([BROKEN, *SPECS])
    assert counts(warmup.warm_up(SPECS)) == (3, 0)


def test_forbidden_compile_counts_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    warmup.warm_up(SPECS[:1])
    monkeypatch.setenv("FP8_BACKEND_JIT", "forbid")
    with pytest.raises(
        CompileError, match=r"^2 kernels cannot be made ready; the first: kernel saxpy-OFFSET=4 .*unset"
    ):
        warmup.warm_up(SPECS)
    assert len(counters.compiles) == 1


def test_directory_that_is_refused_costs_the_lock_and_nothing_else(directory: Path) -> None:
    directory.mkdir()
    directory.chmod(0o777)
    with cache.exclusive(60) as held:
        assert not held
    assert counts(warmup.warm_up(SPECS)) == (3, 3)
    assert list(directory.iterdir()) == []


def test_bar_shows_progress_only_if_something_is_compiled(capsys: pytest.CaptureFixture[str]) -> None:
    for expected in (True, False):
        with ProgressOnDemand("compiling", "kernels") as progress:
            warmup.warm_up(SPECS, progress)
        assert ("3/3 kernels" in capsys.readouterr().err) == expected


CHILD = """
import sys
from pathlib import Path
from fp8_backend.kernels import cache, warmup
from fp8_backend.kernels.compiler import KernelSpec
specs = [KernelSpec("saxpy.cuh", "saxpy", (("OFFSET", offset),), Path(sys.argv[1])) for offset in (3, 4, 5)]
print("ready", flush=True)
sys.stdin.readline()
if sys.argv[2] == "warm":
    print(warmup.warm_up(specs).compiled, flush=True)
else:
    with cache.exclusive(60) as held:
        print(held, flush=True)
        sys.stdin.readline()
"""


def start(what: str) -> subprocess.Popen[str]:
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-c", CHILD, str(HERE), what]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=environ)


def tell(child: subprocess.Popen[str]) -> None:
    assert child.stdin is not None
    child.stdin.write("go\n")
    child.stdin.flush()


def hear(child: subprocess.Popen[str]) -> str:
    assert child.stdout is not None
    return child.stdout.readline().strip()


def test_ranks_that_start_together_compile_each_kernel_once(directory: Path) -> None:
    ranks = [start("warm") for _ in range(8)]
    assert [hear(rank) for rank in ranks] == ["ready"] * 8
    for rank in ranks:
        tell(rank)
    said = [rank.communicate(timeout=120)[0] for rank in ranks]
    assert sorted(map(int, said)) == [0] * 7 + [3]
    assert len(list(directory.glob("v1/*.cubin"))) == 3


def test_lock_of_a_process_that_hangs_is_waited_for_no_longer_than_asked() -> None:
    holder = start("hold")
    try:
        assert hear(holder) == "ready"
        tell(holder)
        assert hear(holder) == "True"
        with cache.exclusive(0.05) as held:
            assert not held
        assert counts(warmup.warm_up(SPECS, patience_s=0.05)) == (3, 3)
    finally:
        holder.kill()
        holder.wait()


def test_lock_ends_with_the_process_that_is_killed() -> None:
    holder = start("hold")
    assert hear(holder) == "ready"
    tell(holder)
    assert hear(holder) == "True"
    waiting, done = threading.Event(), []

    def wait() -> None:
        waiting.set()
        with cache.exclusive(120) as held:
            done.append(held)

    thread = threading.Thread(target=wait)
    thread.start()
    waiting.wait()
    assert done == []
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    thread.join(timeout=60)
    assert done == [True]


def test_nothing_is_compiled_after_warm_up(warm_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FP8_BACKEND_CACHE_DIR", str(warm_cache))
    monkeypatch.setenv("FP8_BACKEND_JIT", "forbid")
    done = warmup.warm_up()
    assert counts(done) == (len(warmup.all_specs()), 0)
    monkeypatch.setenv("FP8_BACKEND_CACHE_DIR", "/nonexistent")  # what serving needs is in this process now
    sizes = (1, 2, 7, 8, 9, 16, 17, 31, 32, 33, 48, 64, 65, 100, 128, 200, 256, 500, 1024, 2048, 4096, 16384, 100_000)
    cache.get(quantize.SPECS[1, False])
    chosen = set()
    for n, k in LAYERS:
        for m in sizes:
            for select in (heuristics.select, heuristics.select_gemm):
                config = select(GemmProblem(m, n, k)).config
                chosen.add(config)
                cache.get(config.spec())
    assert len(chosen) > 5
    assert len(counters.compiles) == 0


@pytest.fixture
def cuda_config(one_rank, monkeypatch: pytest.MonkeyPatch):
    """The quantisation config of a process that serves with our CUDA kernels, up to the moment it needs the device."""
    pytest.importorskip("vllm", reason="needs vLLM; vllm is not installed")
    from fp8_backend.integration import config as config_module
    from fp8_backend.integration import warmup as process

    monkeypatch.setattr(config_module, "select_backend", lambda: config_module.Backend("cuda"))
    process.warm_up_process.cache_clear()
    yield config_module.DeepGemmFp8Config.from_config({"quant_method": "fp8", "weight_block_size": [128, 128]})
    process.warm_up_process.cache_clear()


def make_layer(config, vllm_config) -> None:
    import torch
    from vllm.config import set_current_vllm_config
    from vllm.model_executor.layers.linear import ReplicatedLinear

    with set_current_vllm_config(vllm_config):
        ReplicatedLinear(256, 128, bias=False, params_dtype=torch.bfloat16, quant_config=config, prefix="x")


def test_start_stops_at_the_first_layer_if_a_kernel_is_missing_and_may_not_be_compiled(
    cuda_config, one_rank, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FP8_BACKEND_JIT", "forbid")
    with pytest.raises(
        CompileError, match=f"{len(warmup.all_specs())} kernels cannot be made ready.*FP8_BACKEND_JIT=forbid"
    ):
        make_layer(cuda_config, one_rank)


def test_layers_warm_up_once_a_process_and_say_so_once(
    cuda_config, one_rank, warm_cache: Path, monkeypatch: pytest.MonkeyPatch, caplog_vllm: list[str]
) -> None:
    monkeypatch.setenv("FP8_BACKEND_CACHE_DIR", str(warm_cache))
    loads = []
    monkeypatch.setattr(warmup, "load_all", lambda: loads.append(1))  # needs the device
    for _ in range(3):
        make_layer(cuda_config, one_rank)
    assert len(loads) == 1
    (line,) = [line for line in caplog_vllm if "kernels ready" in line]
    assert line.endswith(f": {len(warmup.all_specs())} from the cache, 0 compiled")


def test_reference_layers_compile_nothing(one_rank, directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fp8_backend.integration import config as config_module

    monkeypatch.setattr(config_module, "select_backend", lambda: config_module.Backend("reference"))
    make_layer(
        config_module.DeepGemmFp8Config.from_config({"quant_method": "fp8", "weight_block_size": [128, 128]}), one_rank
    )
    assert len(counters.compiles) == 0
    assert not directory.exists()


@pytest.mark.gpu
def test_serving_after_warm_up_compiles_and_loads_nothing() -> None:
    import torch

    from fp8_backend.kernels import gemm, launcher, layout

    warmup.warm_up()
    warmup.load_all()
    before = len(counters.compiles), set(launcher._loaded)
    for n, k in LAYERS[-2:]:
        codes = torch.randn(n, k, device="cuda").to(torch.float8_e4m3fn)
        scale = torch.ones(-(-n // 128), -(-k // 128), device="cuda")
        weight, packed_scale = layout.pack_weight(codes), layout.pack_scale(scale, n, k)
        for m in (1, 8, 16, 32, 64, 100, 500, 3000):
            gemm.fp8_linear(torch.randn(m, k, device="cuda").bfloat16(), weight, packed_scale, n)
    torch.cuda.synchronize()
    assert (len(counters.compiles), set(launcher._loaded)) == before
