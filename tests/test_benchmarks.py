"""The measuring commands as far as a CPU goes: crashed and hung parts, the verdict, and a small run."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from math import log
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import correctness, trees
from benchmarks.operands import row
from benchmarks.serve import mean_kl, selection_lines
from fp8_backend.measure.child import run_child
from fp8_backend.measure.environment import environment, write_json


def test_a_hung_child_is_killed_with_its_own_children(tmp_path: Path) -> None:
    output = tmp_path / "log"
    program = "import subprocess; subprocess.run(['sh', '-c', 'echo $$; exec sleep 600'])"
    failure = run_child([sys.executable, "-c", program], output, 3)
    assert failure is not None and failure.startswith("not finished after 3 s")
    grandchild = Path("/proc", output.read_text().strip())
    # Killed; when it gets a turn to end on a busy machine, and when init collects it, is not ours to say.
    deadline = time.monotonic() + 20
    while grandchild.exists() and "Z" not in (grandchild / "stat").read_text().split()[2]:
        assert time.monotonic() < deadline, "the grandchild lives on"
        time.sleep(0.05)


def test_a_failed_child_is_quoted(tmp_path: Path) -> None:
    failure = run_child([sys.executable, "-c", "raise SystemExit('the reason')"], tmp_path / "log", 30)
    assert failure == "status 1; its log ends: the reason"


# Where things lay on the machine says nothing to who repeats a run.
def test_recorded_command_holds_no_folders(monkeypatch: pytest.MonkeyPatch) -> None:
    given = ["/a/b/model", "--json", "/a/out.json", "--log=/a/b/c.log", "--deepgemm", "m=1", "a/b", "org/model", "/"]
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", None)
    monkeypatch.setattr(sys, "argv", ["/usr/bin/measure", *given])
    expected = "measure model --json out.json --log=c.log --deepgemm m=1 a/b org/model /"
    assert environment("c0ffee")["command"] == expected


@pytest.mark.parametrize("rest", [{}, {"env": {"seed": 1}, "failures": []}])
def test_result_files_are_json(rest: dict, tmp_path: Path) -> None:
    for rows in ([], [{"m": 1}, {"m": 2}]):
        write_json(tmp_path / "new" / "result.json", {**rest, "rows": rows})
        assert json.loads((tmp_path / "new" / "result.json").read_text()) == {**rest, "rows": rows}


@pytest.mark.parametrize(
    ("rel_err", "deepgemm", "good"),
    [(0.0018, 0.0017, True), (0.0019, 0.0017, False), (0.0019, None, True), (float("nan"), 0.0017, False)],
)
def test_verdict(rel_err: float, deepgemm: float | None, good: bool) -> None:
    found = row("linear", 1, 2, 3, rel_err, deepgemm)
    result = {"env": {"failures": [], "failed_parts": {}}, "rows": [found], "sanitizer": {"memcheck": {"clean": True}}}
    assert found["verified"] is good
    assert len(correctness.problems_of(result)) == (0 if good else 1)
    result["sanitizer"]["memcheck"]["clean"] = False
    result["env"]["failed_parts"]["edge_cases"] = "status 1"
    assert len(correctness.problems_of(result)) == (2 if good else 3)


def test_small_run(tmp_path: Path) -> None:
    out = tmp_path / "correctness.json"
    command = [sys.executable, "-m", "benchmarks.correctness", "--small", "--out", str(out)]
    subprocess.run([*command, "--parts", "gemm_errors,edge_cases"], check=True, timeout=300)
    result = json.loads(out.read_text())
    assert {found["m"] for found in result["rows"]} >= {0, 1, 17}
    assert all(found["verified"] for found in result["rows"])
    assert result["env"]["failures"] == [] and result["env"]["failed_parts"] == {}


def test_a_run_that_is_stopped_names_what_did_not_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "correctness.json"

    def run_part(part: str, options: list[str], folder: Path, time_limit: float) -> tuple[dict[str, Any], str | None]:
        if part == "sanitize":
            raise KeyboardInterrupt
        (folder / f"{part}.log").touch()
        return {"rows": []}, None

    monkeypatch.setattr(correctness, "run_part", run_part)
    monkeypatch.setattr(correctness, "stop_children_on_signals", lambda: None)
    monkeypatch.setattr(sys, "argv", ["correctness", "--out", str(out)])
    with pytest.raises(KeyboardInterrupt):
        correctness.main()
    assert json.loads(out.read_text())["env"]["failed_parts"] == {"sanitize": "did not end"}


@pytest.mark.skipif(torch.cuda.is_available(), reason="shows a part that fails for want of a GPU")
def test_a_failed_part_is_named(tmp_path: Path) -> None:
    out = tmp_path / "correctness.json"
    command = [sys.executable, "-m", "benchmarks.correctness", "--small", "--out", str(out), "--parts", "sanitize"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1
    result = json.loads(out.read_text())
    assert result["env"]["failed_parts"].keys() == {"sanitize"}
    assert "CUDA" in result["sanitizer"]["without a tool"]["failure"]


def test_mean_kl() -> None:
    halves, quarters = torch.tensor([[0.5, 0.5]]).double().log(), torch.tensor([[0.25, 0.75]]).double().log()
    assert mean_kl(halves, halves) == 0
    assert mean_kl(halves, quarters) == pytest.approx(0.5 * log(4 / 3))


def test_selection_lines_lose_time_and_process() -> None:
    line = "INFO 11-22 14:00:00 [__init__.py:7] Selected DeepGemmFp8BlockScaledMMKernel for Fp8LinearMethod"
    assert selection_lines(f"(EngineCore pid=1) {line}\n{line}\nINFO [x.py:1] other\n") == [
        "Selected DeepGemmFp8BlockScaledMMKernel for Fp8LinearMethod"
    ]


@pytest.mark.parametrize(
    ("name", "folder"),
    [
        ("NVIDIA H200", "h200"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA GH200 480GB", "gh200"),
        ("NVIDIA GeForce RTX 4090", "nvidia-geforce-rtx-4090"),
        (None, "cpu"),
    ],
)
def test_results_lie_in_the_folder_of_their_gpu(name, folder):
    from benchmarks import folder_of

    assert folder_of(name) == folder


def test_the_sweep_tries_every_residency_and_amount_ahead():
    from benchmarks.sweep import decode_candidates
    from fp8_backend.kernels.decode_heuristics import HALF_SHARED_BYTES
    from fp8_backend.kernels.problem import GemmProblem

    problem = GemmProblem(1, 4096, 4096)
    found = decode_candidates(problem, 1)
    taken = [each.config.shared_bytes(each.rows, problem.k_blocks, each.num_stages) for each in found]
    assert max(taken) > HALF_SHARED_BYTES >= min(taken) and max(each.grid for each in found) > 132
    ahead = decode_candidates(problem, 1, [16, 96])
    assert len(set(ahead)) == len(ahead) > len(found) and {each.rows for each in ahead} == {each.rows for each in found}
    assert all(each.prefetch <= each.num_stages and each.prefetch * each.rows * 128 <= 96 * 1024 for each in ahead)


def test_variants_are_timed_on_problems_and_compiled_from_their_folder(tmp_path):
    import shutil

    from benchmarks import variants
    from fp8_backend.errors import ArgumentError
    from fp8_backend.kernels.compiler import CUDA_FOLDER, cache_key
    from fp8_backend.kernels.heuristics import GEMM_CONFIGS

    assert variants.parse_problems("1x2x3,4096x7168x2048") == [(1, 2, 3), (4096, 7168, 2048)]
    assert len(variants.parse_problems(variants.PROBLEMS)) == 7
    with pytest.raises(ArgumentError, match="--problems 1x2: expected MxNxK"):
        variants.parse_problems("1x2")
    shutil.copytree(CUDA_FOLDER, tmp_path / "edited")
    (tmp_path / "edited" / "gemm.cuh").open("a").write("// edited\n")
    keys = [cache_key(variants.spec_of(GEMM_CONFIGS[0], folder)) for folder in (CUDA_FOLDER, tmp_path / "edited")]
    assert keys[0] == cache_key(GEMM_CONFIGS[0].spec()) != keys[1]


def test_the_tensor_core_by_itself_compiles_without_spills_or_serialised_products():
    from benchmarks.power import SCHEDULES, tensor_core_spec
    from fp8_backend.kernels.compiler import compile_kernel

    for schedule in SCHEDULES.values():
        compiled = compile_kernel(tensor_core_spec(*schedule))
        assert compiled.spill_bytes == 0 and not compiled.warnings


@pytest.mark.gpu
def test_work_on_end_is_told_with_clock_and_power():
    from benchmarks.power import measure, tensor_core_arms
    from benchmarks.sustained import sampling

    with sampling() as samples:
        row = measure(next(tensor_core_arms()), 0.6, samples)
    assert row["arm"].startswith("products of random codes") and row["tflops"] > 100  # other tests may have a share
    assert 300 < row["mhz"] < 2100 and row["watts"] > 100


def test_merged_parts_keep_rows_and_commands_and_must_be_of_one_commit():
    from benchmarks.merge import merged

    def part(commit, gpu="NVIDIA H200", versions=None, **content):
        command = f"python -m benchmarks.serve --models a --out /somewhere/{commit}.json --logs x"
        versions = {"torch": "2.11", **(versions or {})}
        env = {"commit": commit, "versions": versions, "command": command, "gpu": {"name": gpu}}
        return {"env": env | {"failures": {"triton: slow": [str(content.get("rows"))]}}, **content}

    both = merged([part("a", rows=[{"m": 1}]), part("a", rows=[{"m": 2}], sanitizer={"memcheck": {"clean": True}})])
    assert both["rows"] == [{"m": 1}, {"m": 2}] and both["sanitizer"]["memcheck"]["clean"]
    assert both["env"]["command"] == ["python -m benchmarks.serve --models a"] * 2
    assert both["env"]["failures"] == {"triton: slow": ["[{'m': 1}]", "[{'m': 2}]"]}
    with_peer = merged([part("a", rows=[]), part("a", versions={"peer": "1"}, rows=[])])
    assert with_peer["env"]["versions"] == {"torch": "2.11", "peer": "1"}
    with pytest.raises(ValueError, match="the parts differ in peer"):
        merged([part("a", versions={"peer": "2"}, rows=[]), part("a", versions={"peer": "1"}, rows=[])])
    with pytest.raises(ValueError, match="the parts differ in commit"):
        merged([part("a", rows=[]), part("b", rows=[])])
    with pytest.raises(ValueError, match="the parts differ in GPU: .*H100"):
        merged([part("a", rows=[]), part("a", "NVIDIA H100", rows=[])])


def tree_of(folder: Path, us: float, status: int = 0) -> Path:
    """Write a package whose bench says what it was asked, and takes `us` for one cell, twice that for another."""
    (folder / "fp8_backend").mkdir(parents=True)
    (folder / "fp8_backend" / "__init__.py").touch()
    program = f"""
import json, sys
rows = [{{"m": m, "n": 8, "k": len(sys.argv), "us": {us} * m}} for m in (1, 2)]
open(sys.argv[sys.argv.index("--json") + 1], "w").write(json.dumps({{"rows": rows}}))
print(*sys.argv[1:3])
sys.exit({status})
"""
    (folder / "fp8_backend" / "cli.py").write_text(program)
    return folder


def test_trees_take_turns_each_with_its_own_package(tmp_path: Path) -> None:
    old, new = tree_of(tmp_path / "old", 4.0), tree_of(tmp_path / "new", 3.0)
    command = [sys.executable, "-m", "benchmarks.trees", str(old), str(new), "--rounds", "2", "--", "--m", "1,2"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[1])
    *cells, last = done.stdout.splitlines()
    assert [line.partition(" | ")[0] for line in cells] == ["1 8 8", "2 8 8"], done.stderr
    assert cells[1].endswith(f"{old} 8.00 us (1.000), {new} 6.00 us (0.750)")
    assert last == f"2 cells, geometric mean of the ratios: {old} 1.0000, {new} 0.7500"


def test_runs_that_may_end_behind_the_deadline_do_not_begin(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    old, new = str(tree_of(tmp_path / "old", 4.0)), str(tree_of(tmp_path / "new", 3.0))
    runs = trees.take_turns([old, new], ["--m", "1"], 9, 30, deadline_s=1e-6)
    assert {tree: len(each) for tree, each in runs.items()} == {old: 1}
    assert capsys.readouterr().out.startswith(f"round 1 ends before {new}")
    assert len(trees.take_turns([old, new], ["--m", "1"], 2, 30, deadline_s=None)[new]) == 2


def test_layers_of_trees_are_compared_by_m_and_arm(tmp_path: Path) -> None:
    program = """
import json, sys
rows = [{"m": 8, "arm": arm, "us": us} for arm, us in (("joined", 2.0), ("apart", 4.0))]
open(sys.argv[sys.argv.index("--json") + 1], "w").write(json.dumps({"rows": rows}))
"""
    tree = tree_of(tmp_path / "tree", 4.0)
    (tree / "benchmarks").mkdir()
    (tree / "benchmarks" / "layer.py").write_text(program)
    runs = trees.take_turns([str(tree)], ["--m", "8"], 1, 30, None, "layer")
    assert [line.partition(" | ")[0] for line in trees.compare(runs)[:2]] == ["8 joined", "8 apart"]


def test_a_tree_that_fails_is_named(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="old: status 3; its log ends: bench --m"):
        trees.run_tree(tree_of(tmp_path / "old", 4.0, status=3), ["--m", "1"], 30, tmp_path)


def test_cells_that_a_run_lacks_are_left_out() -> None:
    rows = [[{"model": "a", "tokens": 1, "us": us}, {"model": "a", "tokens": 2, "us": 1.0}] for us in (1.0, 5.0, 2.0)]
    lines = trees.compare({"old": rows, "new": [[{"model": "a", "tokens": 1, "us": 3.0}]]})
    assert lines[0] == "a 1 | old 2.00 us (1.000), new 3.00 us (1.500)" and lines[1].startswith("1 cells")
