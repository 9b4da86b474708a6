"""The bench command as far as a CPU goes: what is measured, the stream kernel, and the arithmetic on recorded rows."""

from __future__ import annotations

import importlib.util
import json
import os
import select
import subprocess
import sys
import threading
from dataclasses import dataclass
from math import isnan
from pathlib import Path

import pytest
import torch

from fp8_backend import cli
from fp8_backend.bench import command, dense, host, peers, report, shapes, stream, warm
from fp8_backend.bench.operands import sampled_rows
from fp8_backend.errors import ArgumentError, UnsupportedError
from fp8_backend.kernels import cache
from fp8_backend.kernels.compiler import compile_kernel
from fp8_backend.kernels.problem import Machine
from fp8_backend.measure.watchdog import Watchdog
from fp8_backend.progress import Progress

needs_no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="shows what happens without a GPU")


def row(m: int, us: float, stream_us: float = 10.0, good: bool = True, **peer_us: float) -> dict:
    n, k = 4096, 7168
    found = {"m": m, "n": n, "k": k, "us": us, "stream_us": stream_us, "peers": peer_us, "rel_err": 0.002}
    if m > 64:
        found |= {"gemm_us": us - 1, "deepgemm_gemm_us": us}
    return found | {"verified": good}


# Synthetic, with a lost cell in each regime and a wrong one.
ROWS = [
    row(1, 9.0, deepgemm=18.0, flashinfer=16.2, bf16=20.0),
    row(64, 12.0, deepgemm=14.4, flashinfer=18.0, bf16=11.0),
    row(256, 20.0, deepgemm=24.0, cublaslt=30.0, bf16=40.0),
    row(4096, 170.0, deepgemm=168.0, triton=500.0),
    row(8192, 330.0, good=False, deepgemm=360.0),
]


def test_models_are_what_the_checkpoints_hold() -> None:
    assert shapes.MODELS["qwen3-8b"] == ((6144, 4096), (4096, 4096), (24576, 4096), (4096, 12288))
    everything = shapes.parse_shapes(None, None)
    assert len(everything) == len(set(everything)) == 22
    assert shapes.parse_shapes("qwen3-32b,qwen3-8b", "512x7168")[-1] == (512, 7168)
    assert shapes.parse_shapes(None, "7x256,7x256") == ((7, 256),)


def test_chain_feeds_each_linear_from_the_one_before() -> None:
    for chain in shapes.CHAINS.values():
        assert len(chain) == 8
        for (n, _), (_, k) in zip(chain, [*chain[1:], chain[0]], strict=True):
            assert n >= k


def test_regimes_cover_every_m() -> None:
    names = [shapes.regime_of(m).name for m in (1, 64, 65, 1024, 1025, 16384, 100_000)]
    assert names == ["decode", "decode", "middle", "middle", "prefill", "prefill", "prefill"]
    assert len(shapes.ALL_MS) == 15 and shapes.parse_ms("16,1,16") == (1, 16)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "gpt"], "--model gpt: unknown; models: deepseek-v3"),
        (["--shapes", "4096"], "--shapes 4096: expected NxK"),
        (["--shapes", "0x128"], "--shapes 0x128: expected NxK"),
        (["--m", "1,-2"], "--m -2: expected numbers above 0"),
        (["--peers", "cudnn"], "--peers cudnn: unknown; give auto, none or some of deepgemm"),
        pytest.param([], "needs a Hopper GPU (H100, H200, GH200)", marks=needs_no_gpu),
        pytest.param(["--host"], "needs a Hopper GPU (H100, H200, GH200)", marks=needs_no_gpu),
    ],
)
def test_refusals(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_stream_kernel_compiles_without_spills() -> None:
    kernel = compile_kernel(stream.SPEC)
    assert (kernel.spill_bytes, kernel.stack_bytes, kernel.warnings) == (0, 0, ())
    assert kernel.registers <= 32
    for ctas, stages in stream.SHAPES:
        # With the barriers and what the system takes of each CTA, within the 228 KiB of an SM.
        assert ctas * (stages * stream.TILE_BYTES + 192 + 1024) <= 228 * 1024
        assert ctas * stages * stream.TILE_BYTES >= 192 * 1024


@pytest.mark.parametrize(
    ("name", "merged", "lines"),
    [
        ("dense.json", False, ["verified: 330 of 330 cells"]),
        ("chain.json", True, ["chain qwen3-8b m=1: 8 dependent linears", "host m=512 512x512: op"]),
    ],
)
def test_a_result_is_reported(name: str, merged: bool, lines: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    recorded = Path(__file__).parents[1] / "benchmarks" / "results" / "h200" / name
    assert isinstance(json.loads(recorded.read_text())["env"]["command"], list) == merged
    assert cli.main(["bench", "--from", str(recorded)]) == 0
    said = capsys.readouterr().out
    assert all(line in said for line in lines)
    assert ("ours us" in said, "verified: " in said) == (name == "dense.json", name == "dense.json")


def test_a_chart_of_no_linears_is_refused_aloud(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recorded, chart = Path(__file__).parents[1] / "benchmarks" / "results" / "h200" / "chain.json", tmp_path / "a.png"
    command._report(json.loads(recorded.read_text()), chart)  # not through the command, which asks for matplotlib first
    assert f"{chart} is not drawn: the result has no rows of linears" in capsys.readouterr().err
    assert not chart.exists()


def test_calls_of_a_graph() -> None:
    assert dense.calls_for(1, 512, 7168, 109) == 109
    assert dense.calls_for(16384, 51200, 5120, 2) == 2
    assert dense.calls_for(8192, 7168, 16384, 4) == 3
    assert 3 < dense.calls_for(1024, 7168, 2048, 28) <= 28
    assert dense.calls_for(4096, 7168, 256, 256) == 54  # outputs of 56 MiB


def test_sampled_rows() -> None:
    assert sampled_rows(3).tolist() == [0, 1, 2]
    rows = sampled_rows(16384)
    assert len(rows.unique()) == 64 and rows[0] == 0 and rows[-1] == 16383


@pytest.mark.parametrize(
    ("name", "cell", "runs"),
    [
        ("flashinfer", (64, 512, 7168), True),
        ("flashinfer", (128, 512, 7168), False),
        ("deepgemm", (1, 4000, 7168), False),
        ("cutlass", (1, 4000, 300), False),
        ("bf16", (1, 7, 300), True),
    ],
)
def test_which_peer_runs_where(name: str, cell: tuple[int, int, int], runs: bool) -> None:
    assert (peers.why_not(name, *cell) is None) is runs


@needs_no_gpu
def test_absent_peers_are_named_with_a_reason() -> None:
    present, absent = peers.load(["deepgemm", "flashinfer", "bf16"])
    assert present.keys() == {"bf16"}
    assert "deep_gemm" in absent["deepgemm"] and "flashinfer" in absent["flashinfer"]
    with pytest.raises(ArgumentError):
        peers.parse_peers("auto,bf16")
    assert peers.parse_peers("bf16,deepgemm") == ("deepgemm", "bf16") and peers.parse_peers("none") == ()


def test_cublaslt_scales_are_aligned() -> None:
    scale = torch.rand(17, 18)
    padded = peers.padded_scale(scale)
    assert padded.stride() == (20, 1) and torch.equal(padded, scale)


def test_our_kernels_are_compiled_ahead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FP8_BACKEND_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(cache, "_memory", {})
    count = warm.compile_ours([(512, 7168)], [1, 4096], Machine())
    assert 3 <= count <= 7
    assert len(list(tmp_path.rglob("*.cubin"))) == count


# More cores than shapes, fewer, and FlashInfer for many tokens only, which vLLM never asks of it.
@pytest.mark.parametrize(("shape_count", "cores"), [(2, 16), (24, 16), (3, 2)])
def test_portions_hold_every_cell_once(shape_count: int, cores: int) -> None:
    every, ms = [(128 * n, 256) for n in range(1, shape_count + 1)], [1, 64, 128, 4096]
    found = warm.portions(["bf16", "flashinfer", "deepgemm"], every, ms, cores)
    assert found[0] == warm.Portion(("flashinfer",), every[0], (1,))
    cells = [(portion.shape, m) for portion in found[1:] for m in portion.ms]
    assert sorted(cells) == [(shape, m) for shape in every for m in ms]
    assert len(found) - 1 >= min(cores, len(cells)) and found[1].names == ("deepgemm", "flashinfer")
    assert {portion.names for portion in warm.portions(["flashinfer"], every, [128], cores)} == {("flashinfer",)}
    assert warm.portions(["bf16", "cutlass"], every, ms, cores) == []


@needs_no_gpu
def test_failed_peer_processes_are_named() -> None:
    said: list[str] = []
    (problem,) = warm.compile_peers(["deepgemm", "bf16"], [(256, 256)], [1], 120, said.append)
    assert problem.startswith("peers' kernels for 256x256, m=1: ") and len(said) == 1
    assert warm.compile_peers(["bf16"], [(256, 256)], [1], 120, said.append) == []


@dataclass(frozen=True)
class Portion:
    """A process that runs a statement, once."""

    statement: str

    @property
    def command(self) -> list[str]:
        return ["timeit", "-n1", "-r1", self.statement]


def test_portions_that_do_not_end_are_stopped_with_what_they_started(tmp_path: Path) -> None:
    """The first waits for a compiler of its own, which holds a pipe open as long as it runs; the second is done."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    endless = Portion(f"import subprocess; subprocess.run(['sh', '-c', 'exec sleep 600 > {pipe}'])")
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    said: list[str] = []
    problems, late = warm.run_portions([endless, Portion("pass")], 10, said.append)
    assert late == [endless] and problems == ["peers' kernels: stopped after 10 s, 1 portions left"] and not said
    readable, _, _ = select.select([reader], [], [], 10)
    assert readable and os.read(reader, 1) == b""  # the end of the pipe: nobody can write any more
    os.close(reader)


def test_ratios() -> None:
    assert report.geomean([2, 8]) == pytest.approx(4)
    assert isnan(report.geomean([]))
    assert report.ratio(ROWS[0]) == pytest.approx(1.8)
    assert report.best_peer(ROWS[1]) == "bf16" and report.best_peer(ROWS[1], peers.FP8_NAMES) == "deepgemm"
    assert report.ratio(row(1, 5.0)) is None


def test_table_marks_lost_and_wrong_cells() -> None:
    lines = report.table(ROWS)
    assert len(lines) == 1 + len(ROWS)
    marks = [line.partition("<")[2].strip() for line in lines[1:]]
    assert marks == ["", "bf16", "", "deepgemm", ""]
    assert [line.endswith("WRONG") for line in lines[1:]] == [False] * 4 + [True]
    assert "   0.90 " in lines[1] and " 1.80" in lines[1]


def test_summary_judges_against_the_figures() -> None:
    text = "\n".join(report.summary(ROWS))
    assert "decode: 2 cells, geometric mean of best FP8 peer / ours 1.470 (to be >= 1.7: MISSED)" in text
    assert "smallest of any peer / ours, BF16 too: 0.917 (to be >= 0.97: MISSED) at m=64 4096x7168" in text
    assert "ours / stream floor: geometric mean 1.039 (to be <= 1.0: MISSED)" in text
    assert "middle: 1 cells, geometric mean of best FP8 peer / ours 1.200 (to be >= 1.2: holds)" in text
    assert "verified: 4 of 5 cells; WRONG: m=8192 4096x7168" in text
    # 168 / 170 is within the noise, 11 / 12 is not.
    assert "cells under 1.0: 2, of which 1 by more than 3 %" in text
    assert "m=64 4096x7168: 0.92 against bf16" in text
    assert "GEMM alone: best" in text and "TFLOPS at m=8192" in text
    assert report.summary([row(1, 1.0)])[0] == "decode: 1 cells, no FP8 peer ran"


def test_cost_of_batch_invariant_mode_is_a_line_of_its_regime() -> None:
    slow = {"us": 18.0, "rel_err": 0.002, "bitwise": True, "verified": True}
    text = "\n".join(report.summary([ROWS[0] | {"batch_invariant": slow}, ROWS[1] | {"batch_invariant": slow}]))
    assert "batch-invariant / ours: geometric mean 1.73, largest 2.00 at m=1 4096x7168" in text
    assert "batch-invariant" not in "\n".join(report.summary(ROWS))


def test_host_line_judges_the_op() -> None:
    found = {"m": 1, "n": 512, "k": 512, "function_us": 10.0, "op_us": 26.0, "peers": {"triton": 70.0}}
    assert "MISSED" in host.line(found) and "triton 70.0" in host.line(found)
    assert "holds" in host.line(found | {"op_us": 24.9})


def test_progress_speaks_of_the_last_step(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress("timing", 2, "cells") as progress:
        progress.step("one")
        progress.step("two")
    assert "2/2 cells, 0 s left: two" in capsys.readouterr().err


def test_watchdog_ends_a_hung_step(capsys: pytest.CaptureFixture[str]) -> None:
    ended, codes = threading.Event(), []

    def leave(code: int) -> None:
        codes.append(code)
        ended.set()

    quick, slow = Watchdog(600, leave), Watchdog(0.01, leave)
    quick.begin("quick")
    quick.end()
    slow.begin("m=1 512x7168")
    assert ended.wait(30) and codes == [3]
    assert "m=1 512x7168: not done after" in capsys.readouterr().err


def test_plot(tmp_path: Path) -> None:
    from fp8_backend.bench.plot import plot

    out = tmp_path / "new" / "chart.png"
    if importlib.util.find_spec("matplotlib") is None:
        with pytest.raises(UnsupportedError, match=r"pip install 'fp8-backend\[plot\]'"):
            plot(ROWS, "title", out)
        return
    plot(ROWS, "title", out)
    assert out.read_bytes().startswith(b"\x89PNG")


def test_command_line_knows_its_commands() -> None:
    environment = {**os.environ, "COLUMNS": "200"}
    command = [sys.executable, "-m", "fp8_backend.cli", "bench", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
    assert done.returncode == 0
    for option in ("--model", "--shapes", "--m ", "--peers", "--json", "--plot", "--chain", "--host"):
        assert option in done.stdout


@pytest.mark.gpu
def test_small_run_on_a_gpu(tmp_path: Path) -> None:
    out = tmp_path / "dense.json"
    arguments = ["bench", "--shapes", "512x7168,200x384", "--m", "1,64,300", "--peers", "bf16", "--json", str(out)]
    assert cli.main(arguments) == 0
    result = json.loads(out.read_text())
    assert len(result["rows"]) == 6
    for found in result["rows"]:
        assert found["verified"] and found["bitwise"] and 0 < found["stream_pdl_us"] < 1.1 * found["stream_us"]
        assert found["us"] > 0 and found["peers"].keys() == {"bf16"} and (found["m"] <= 64) != ("gemm_us" in found)
