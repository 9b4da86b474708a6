"""What a conversion does about kills, interrupts, full disks, folders in the way and memory."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
import torch
from safetensors.torch import load_file, save_file

from demo.architectures import SIZES
from demo.checkpoint import dequantize_checkpoint, write_checkpoint
from fp8_backend import quantize as quantize_module
from fp8_backend.cli import main
from fp8_backend.weights import conversion as conversion_module
from fp8_backend.weights.conversion import STATE
from fp8_backend.weights.files import INDEX
from fp8_backend.weights.selection import select

EXPERT = "model.layers.1.mlp.experts.3.up_proj.weight"


@pytest.fixture(scope="module")
def quantized(bf16: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("quantized") / "out"
    assert main(["quantize", str(bf16), str(out), "--workers", "2"]) == 0
    return out


def copy(source: Path, out: Path) -> Path:
    out.mkdir()
    for path in source.iterdir():
        (out / path.name).write_bytes(path.read_bytes())
    return out


def killed_after_a_shard(source: Path, out: Path) -> int:
    """Quantise, kill the command at the first report of a shard, wait for its workers to end too; return its status."""
    command = [sys.executable, "-m", "fp8_backend.cli", "quantize", str(source), str(out), "--workers", "2"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not any(out.glob(f"{STATE}/model-*.json")) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.001)  # leaves the processor to the conversion
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)  # to the end of what the workers have inherited: none of them writes any more
    return process.returncode


def test_killed_run_is_continued(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_checkpoint(tmp_path / "fp8", "qwen3", replace(SIZES["qwen3", "demo"], layers=4, intermediate=6144, shards=16))
    dequantize_checkpoint(tmp_path / "fp8", tmp_path / "bf16")
    source, out = tmp_path / "bf16", tmp_path / "out"
    shards = sorted(path.name for path in source.glob("*.safetensors"))
    for _ in range(5):  # on a busy machine the kill may come when every shard is there: then once more
        status = killed_after_a_shard(source, out)
        left = {path.name: path.stat().st_mtime_ns for path in out.glob("*.safetensors")}
        if len(left) < len(shards):
            break
        shutil.rmtree(out)
    assert status == -signal.SIGKILL and 1 <= len(left) < len(shards)
    assert not (out / "config.json").exists()  # no server takes it for a checkpoint

    assert main(["quantize", str(source), str(out), "--scales", "ue8m0"]) == 2
    assert "begun with another --scales" in capsys.readouterr().err
    assert main(["quantize", str(source), str(out), "--workers", "2", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert 1 <= report["resumed_shards"] < len(shards)
    # What was finished is not written again; a shard that was renamed as the kill came may lack its report.
    same = [name for name, written in left.items() if (out / name).stat().st_mtime_ns == written]
    assert len(same) == report["resumed_shards"]
    assert not list(out.glob(".*"))
    # As if it had never been killed, reports of the first run included.
    assert main(["quantize", str(source), str(tmp_path / "whole"), "--workers", "2", "--json"]) == 0
    whole = json.loads(capsys.readouterr().out)
    assert whole["errors"] == report["errors"]
    for path in (tmp_path / "whole").iterdir():
        assert path.read_bytes() == (out / path.name).read_bytes()


def test_shards_of_a_run_that_chose_other_weights_are_made_again(
    bf16: Path, quantized: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As an earlier version may have: its shards and this version's list of unquantised modules would disagree."""

    def stop(conversion: Any) -> None:
        raise KeyboardInterrupt

    command = ["quantize", str(bf16), str(tmp_path / "out"), "--workers", "1", "--json"]
    with monkeypatch.context() as earlier:
        earlier.setattr(conversion_module, "_finish", stop)
        earlier.setattr(quantize_module, "select", lambda checkpoint, _: select(checkpoint, re.compile(r"layers\.0\.")))
        assert main(command) == 130
    capsys.readouterr()
    assert main(command) == 0
    assert json.loads(capsys.readouterr().out)["resumed_shards"] < len(list(bf16.glob("*.safetensors")))
    for path in quantized.iterdir():
        assert path.read_bytes() == (tmp_path / "out" / path.name).read_bytes()


def test_free_space_is_that_of_the_tensors_to_be_written(bf16: Path, quantized: Path, tmp_path: Path, capsys) -> None:
    written = sum(path.stat().st_size for path in quantized.glob("*.safetensors"))
    usage = SimpleNamespace(free=written + conversion_module.FREE_MARGIN - (1 << 20))
    with patch.object(shutil, "disk_usage", lambda path: usage):
        assert main(["quantize", str(bf16), str(tmp_path / "out"), "--workers", "1"]) == 2
        assert "GB free; expected" in capsys.readouterr().err
        usage.free += 1 << 20
        assert main(["quantize", str(bf16), str(tmp_path / "out"), "--workers", "1"]) == 0


def test_interrupted_run_ends_in_order(bf16: Path, tmp_path: Path) -> None:
    """A terminal sends Ctrl-C to every process of the command, also to workers that are still importing."""
    # A shell that runs the tests in the background has them ignore SIGINT, and their children with them.
    program = "import signal, sys\nsignal.signal(signal.SIGINT, signal.default_int_handler)\n" + (
        "from fp8_backend.cli import main\nsys.exit(main(sys.argv[1:]))"
    )
    command = [sys.executable, "-c", program, "quantize", str(bf16), str(tmp_path / "out"), "--workers", "2"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
    children, deadline = Path(f"/proc/{process.pid}/task/{process.pid}/children"), time.monotonic() + 120
    while len(children.read_text().split()) < 3 and time.monotonic() < deadline:  # two workers, and Python's tracker
        time.sleep(0.001)
    time.sleep(0.3)
    os.killpg(process.pid, signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in said
    assert said.endswith("fp8-backend quantize: interrupted\n")
    assert not list((tmp_path / "out").glob("*.partial"))
    assert main(["quantize", str(bf16), str(tmp_path / "out"), "--workers", "1"]) == 0


def test_refusals(bf16: Path, quantized: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def refusal(*arguments: object) -> str:
        assert main([str(argument) for argument in arguments]) == 2
        return capsys.readouterr().err

    assert "has a quantization_config" in refusal("quantize", quantized, tmp_path / "out")
    assert "not an FP8 checkpoint" in refusal("dequantize", bf16, tmp_path / "out")
    assert "not empty, and not an unfinished conversion" in refusal("quantize", bf16, quantized)
    assert "is the source or within it" in refusal("quantize", bf16, bf16)
    source = copy(bf16, tmp_path / "nan")
    home = json.loads((source / INDEX).read_text())["weight_map"][EXPERT]
    held = load_file(source / home)
    held[EXPERT][140, 7] = float("nan")
    save_file(held, source / home)
    assert f"{home}: {EXPERT}: nan at [140, 7]; expected finite weights" in refusal(
        "quantize", source, tmp_path / "out"
    )
    assert not list((tmp_path / "out").glob(f"*{home}*"))


MEASURE = """
import re, sys
from pathlib import Path
from fp8_backend.weights.shard_conversion import ShardTask, convert_shard
source = Path(sys.argv[1])
task = ShardTask(source, source.with_suffix(".out"), {"w.weight": "w.scale"}, "float32", {}, frozenset())
convert_shard(task, lambda count: None)
# Not getrusage: its maximum counts the parent's memory from between fork and exec.
print(int(re.search(r"VmHWM:\\s*(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024)
"""


def test_memory_does_not_grow_with_the_tensor(tmp_path: Path) -> None:
    peaks = []
    for megabytes in (32, 256):
        path = tmp_path / f"{megabytes}.safetensors"
        save_file({"w.weight": torch.full((megabytes * 128, 4096), 0.5, dtype=torch.bfloat16)}, path)
        done = subprocess.run([sys.executable, "-c", MEASURE, str(path)], capture_output=True, text=True, check=True)
        peaks.append(int(done.stdout))
    assert peaks[1] - peaks[0] < 128e6  # the whole tensor in float32 would add 450e6 and more
