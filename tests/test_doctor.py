"""The doctor in real processes whose torch, driver, settings or cache are broken, and its checks in this one."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from fp8_backend import doctor, doctor_machine
from fp8_backend.errors import ArgumentError, SettingsError
from fp8_backend.findings import HOPPER, Finding, guarded
from fp8_backend.kernels import gemm, warmup
from fp8_backend.kernels.compiler import nvrtc_version

ON_CPU = pytest.mark.skipif(torch.cuda.is_available(), reason="describes a machine without a GPU")
ALWAYS = {"python", "fp8-backend", "torch", "cuda-bindings", "GPU", "driver", "NVRTC", "vLLM", "plugin"} | {
    "cache",
    "kernels",
    "clocks",
    "GEMM",
    "registration",
}
SETTINGS = {
    f"FP8_BACKEND_{name}" for name in ("STRICT", "KERNELS", "CACHE_DIR", "JIT", "BATCH_INVARIANT", "FUSE", "ATTENTION")
}


def diagnose(cache: Path | None, **environ: str) -> tuple[int, dict[str, Any], dict[str, dict[str, Any]]]:
    """Run the doctor with a cache directory and variables; return exit code, report and findings by name."""
    inherited = {n: v for n, v in os.environ.items() if not n.startswith("FP8_BACKEND_") and n != "VLLM_PLUGINS"}
    command = [sys.executable, "-m", "fp8_backend.cli", "doctor", "--json"]
    environ = {**inherited, **({"FP8_BACKEND_CACHE_DIR": str(cache)} if cache else {}), **environ}
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environ)
    report = json.loads(done.stdout)
    assert done.stderr == ""
    assert all(set(row) == {"what", "found", "ok", "action"} for row in report["findings"])
    assert all((row["ok"] is False) == bool(row["action"]) for row in report["findings"])
    assert report["ok"] == (done.returncode == 0) == all(row["ok"] is not False for row in report["findings"])
    return done.returncode, report, {row["what"]: row for row in report["findings"]}


def poisoned(folder: Path, package: str, statement: str) -> str:
    """Make a package of this name that fails to import; return what PYTHONPATH must be to find it first."""
    (folder / package).mkdir(parents=True)
    (folder / package / "__init__.py").write_text(statement)
    return os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH")]))


def actions(findings: dict[str, dict[str, Any]]) -> set[str]:
    return {what for what, row in findings.items() if row["ok"] is False}


@ON_CPU
def test_healthy_cpu_needs_nothing(tmp_path: Path) -> None:
    code, report, findings = diagnose(tmp_path)
    assert (code, report["role"], actions(findings)) == (0, "CPU", set())
    assert set(findings) == ALWAYS | SETTINGS
    assert findings["torch"]["found"].startswith(torch.__version__)
    assert findings["NVRTC"]["found"].startswith(nvrtc_version().partition("+")[0] + " at /")
    assert findings["GEMM"]["found"].startswith("torch reference on cpu: relative error 0.00")
    assert findings["FP8_BACKEND_JIT"]["found"] == "auto (default)"
    assert findings["FP8_BACKEND_CACHE_DIR"]["found"] == f"{tmp_path} (environment)"
    assert list(tmp_path.iterdir()) == []


def test_text_says_the_same_and_ends_with_the_role(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "fp8_backend.cli", "doctor"]
    environ = {**os.environ, "FP8_BACKEND_CACHE_DIR": str(tmp_path), "VLLM_PLUGINS": "another"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environ)
    lines = done.stdout.splitlines()
    (index,) = [index for index, line in enumerate(lines) if line.startswith("ACTION  plugin")]
    assert lines[index + 1].strip() == "-> add fp8_backend to VLLM_PLUGINS, or unset it"
    assert (done.returncode, lines[-1].endswith("1 of 21 need action")) == (1, True)


@ON_CPU
@pytest.mark.parametrize("statement", ["raise OSError('libc10.so: cannot open')", "raise ImportError('no torch')"])
def test_broken_torch_is_one_action_and_all_else_is_examined(statement: str, tmp_path: Path) -> None:
    code, report, findings = diagnose(tmp_path / "cache", PYTHONPATH=poisoned(tmp_path / "path", "torch", statement))
    assert (code, report["role"], actions(findings)) == (1, "CPU", {"torch"})
    assert statement.split("'")[1] in findings["torch"]["found"]
    assert set(findings) == ALWAYS | SETTINGS
    assert {what for what, row in findings.items() if row["ok"] is None} == {"registration", "kernels", "GEMM"}
    assert "writable, 0 entries" in findings["cache"]["found"]


@pytest.mark.parametrize(
    ("statement", "found"),
    [("raise ImportError('_C.so: undefined symbol')", "_C.so"), ("import os; os.abort()", "SIGABRT")],
)
def test_vllm_that_is_installed_and_does_not_import_is_an_action(statement: str, found: str, tmp_path: Path) -> None:
    pytest.importorskip("vllm", reason="needs vLLM; vllm is not installed")
    path = poisoned(tmp_path / "path", "vllm", statement)
    code, _, findings = diagnose(tmp_path / "cache", PYTHONPATH=path)
    assert (code, actions(findings)) == (1, {"registration"})
    assert found in findings["registration"]["found"] and "reinstall vLLM" in findings["registration"]["action"]
    assert findings["plugin"]["ok"] is True


@ON_CPU
@pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler to make a broken driver")
def test_driver_that_crashes_is_an_action(tmp_path: Path) -> None:
    (tmp_path / "cuda.c").write_text("int cuInit(unsigned flags) { return *(volatile int *)0; }")
    command = ["cc", "-shared", "-fPIC", "-o", tmp_path / "libcuda.so.1", tmp_path / "cuda.c"]
    subprocess.run(command, check=True, timeout=60)
    path = os.pathsep.join(filter(None, [str(tmp_path), os.environ.get("LD_LIBRARY_PATH")]))
    code, _, findings = diagnose(tmp_path / "cache", LD_LIBRARY_PATH=path)
    assert (code, actions(findings)) == (1, {"driver"})
    assert findings["driver"]["found"] == "ended by SIGSEGV"
    assert findings["GEMM"]["ok"] is True


@pytest.mark.parametrize("package", ["pydantic", "cuda"])
def test_broken_dependency_is_named(package: str, tmp_path: Path) -> None:
    path = poisoned(tmp_path / "path", package, "raise ImportError('broken on purpose')")
    code, _, findings = diagnose(tmp_path / "cache", PYTHONPATH=path)
    what = {"pydantic": "settings", "cuda": "cuda-bindings"}[package]
    assert (code, what in actions(findings)) == (1, True)
    assert "broken on purpose" in findings[what]["found"]


def test_malformed_setting_is_one_action(tmp_path: Path) -> None:
    code, _, findings = diagnose(tmp_path, FP8_BACKEND_JIT="maybe")
    assert (code, actions(findings)) == (1, {"settings"})
    assert "FP8_BACKEND_JIT='maybe'" in findings["settings"]["found"]
    assert findings["cache"]["ok"] is None


def test_unknown_setting_is_one_action(tmp_path: Path) -> None:
    _, _, findings = diagnose(tmp_path, FP8_BACKEND_JITT="auto")
    assert "FP8_BACKEND_JITT" in findings["settings"]["found"]
    assert "settings" in actions(findings)


def test_home_of_nobody_is_an_action_of_the_cache() -> None:
    code, _, findings = diagnose(None, VLLM_CACHE_ROOT="~nobody-of-this-name")
    assert (code, actions(findings)) == (1, {"FP8_BACKEND_CACHE_DIR", "cache"})
    assert findings["FP8_BACKEND_CACHE_DIR"]["action"].startswith("set FP8_BACKEND_CACHE_DIR to")
    assert findings["kernels"]["ok"] is None


def test_refused_cache_gives_the_command(tmp_path: Path) -> None:
    (tmp_path / "v1").mkdir()
    tmp_path.chmod(0o777)
    code, _, findings = diagnose(tmp_path)
    assert (code, actions(findings)) == (1, {"cache"})
    assert findings["kernels"]["ok"] is None
    assert f"chmod go-w {tmp_path}" in findings["cache"]["found"]


def test_stale_and_damaged_entries_are_counted(tmp_path: Path, warm_cache: Path) -> None:
    folder = tmp_path / "v1"
    folder.mkdir()
    entry = next(warm_cache.glob("v1/*.cubin"))
    (folder / entry.name).write_bytes(entry.read_bytes()[:100])
    (folder / "gemm-OLD=1-0123456789abcdef.cubin").write_bytes(entry.read_bytes())
    _, _, findings = diagnose(tmp_path)
    assert "; 1 stale entries" in findings["kernels"]["found"]
    assert "; 1 damaged entries" in findings["kernels"]["found"]
    assert "2 entries" in findings["cache"]["found"]


def test_full_cache_is_recognised(warm_cache: Path) -> None:
    _, _, findings = diagnose(warm_cache)
    assert findings["kernels"]["found"] == f"{len(warmup.all_specs())} of {len(warmup.all_specs())} in the cache"


def nvidia_smi(folder: Path, script: str) -> str:
    """Put a command of that name first in PATH: the nearest thing to a driver that a machine without one can have."""
    folder.mkdir()
    (folder / "nvidia-smi").write_text(f"#!/bin/sh\n{script}\n")
    (folder / "nvidia-smi").chmod(0o755)
    return f"{folder}{os.pathsep}{os.environ['PATH']}"


@ON_CPU
def test_hopper_that_torch_cannot_use_is_an_action(tmp_path: Path) -> None:
    script = """case "$1" in
  --query-gpu=name,compute_cap) echo "NVIDIA H200, 9.0" ;;
  --query-gpu=driver_version) echo "580.95" ;;
  --query-gpu=clocks.sm,*) echo "345 MHz, 1980 MHz, 3201 MHz, 3201 MHz, 75.1 W, 700.00 W" ;;
  --query-gpu=clocks_throttle_reasons.hw_slowdown) echo "Active" ;;
  *) echo 'Field "?" is not a valid field to query.'; exit 2 ;;
esac"""
    environ = {"PATH": nvidia_smi(tmp_path / "bin", script), "FP8_BACKEND_JIT": "forbid"}
    code, report, findings = diagnose(tmp_path / "cache", **environ)
    assert (code, report["role"]) == (1, "Hopper GPU")
    assert actions(findings) == {"GPU", "driver", "kernels", "clocks"}
    assert findings["GPU"]["found"] == "NVIDIA H200 (compute capability 9.0), of which torch can use none"
    assert "fp8-backend cache warm" in findings["kernels"]["action"]
    assert findings["clocks"]["found"].startswith("GPU 0: SM 345 MHz of 1980 MHz")
    assert "GPU 0" in findings["clocks"]["action"]


@ON_CPU
def test_reference_that_is_asked_for_needs_no_kernels(tmp_path: Path) -> None:
    script = '[ "$1" = --query-gpu=name,compute_cap ] && echo "NVIDIA H200, 9.0"'
    environ = {"PATH": nvidia_smi(tmp_path / "bin", script), "FP8_BACKEND_KERNELS": "reference"}
    _, report, findings = diagnose(tmp_path / "cache", FP8_BACKEND_JIT="forbid", **environ)
    assert (report["role"], report["serves"].split(",")[0]) == ("Hopper GPU", "the torch reference serves")
    assert findings["kernels"]["ok"] is True


@pytest.mark.parametrize("full", [True, False])
def test_cache_that_cannot_be_written_is_fine_once_it_is_full(
    full: bool, tmp_path: Path, warm_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As an image ships it; it must not cost an image its exit status of 0."""
    monkeypatch.setenv("FP8_BACKEND_CACHE_DIR", str(warm_cache if full else tmp_path))
    monkeypatch.setattr(doctor_machine, "role", lambda: HOPPER)
    monkeypatch.setattr(os, "access", lambda *_: False)  # root may write whatever a folder's mode says
    assert "not writable" in doctor.cache_directory().found
    assert [doctor.cache_directory().action, bool(doctor.kernels().action)] == ["", not full]


@ON_CPU
@pytest.mark.parametrize("script", ["echo NVML broken; exit 9", "printf '\\377\\376, 9.x\\n'"])
def test_nvidia_smi_that_fails_or_prints_garbage_is_no_gpu(script: str, tmp_path: Path) -> None:
    code, report, _ = diagnose(tmp_path / "cache", PATH=nvidia_smi(tmp_path / "bin", script))
    assert (code, report["role"]) == (0, "CPU")


@ON_CPU
@pytest.mark.parametrize("factor", [1.05, float("nan")])
def test_wrong_product_is_an_action(factor: float, monkeypatch: pytest.MonkeyPatch) -> None:
    right = gemm.fp8_linear
    assert doctor_machine.verified_gemm().action == ""
    monkeypatch.setattr(gemm, "fp8_linear", lambda *arguments: right(*arguments) * factor)
    assert "do not serve" in doctor_machine.verified_gemm().action


def test_copies_of_nvrtc_are_those_that_are_mapped() -> None:
    nvrtc_version()
    found = doctor_machine.nvrtc()
    assert any(path in found.found or Path(path).resolve() == Path(path) for path in doctor_machine.loaded_copies())
    assert doctor_machine.loaded_copies()


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (ArgumentError("n: too large"), Finding("x", "n: too large", "step")),
        (SystemError("lost"), Finding("x", "SystemError: lost", "step")),
        (SettingsError("bad"), Finding("x", "not examined: the settings cannot be read", examined=False)),
    ],
)
def test_failed_probe_is_a_finding(error: Exception, expected: Finding) -> None:
    def probe() -> Finding:
        raise error

    assert guarded("x", probe, "step") == [expected]


@pytest.mark.gpu
def test_hopper_compiles_and_verifies(tmp_path: Path) -> None:
    _, report, findings = diagnose(tmp_path)
    assert report["role"] == "Hopper GPU"
    assert findings["GEMM"]["ok"] is True
    assert findings["GEMM"]["found"].startswith("CUDA kernels on cuda:0: relative error 0.00")
    assert list(tmp_path.glob("v1/*.cubin")) != []
