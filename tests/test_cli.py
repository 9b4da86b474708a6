"""The commands as users run them: real processes, exit codes, what is printed."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from fp8_backend.cli import COMMANDS
from fp8_backend.kernels import warmup

COUNT = len(warmup.all_specs())


def run(*arguments: str, **environ: str) -> subprocess.CompletedProcess[str]:
    """Run the command line with the settings given and no others."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("FP8_BACKEND_")}
    command = [sys.executable, "-m", "fp8_backend.cli", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env={**inherited, **environ})


@pytest.fixture
def filled(warm_cache: Path, tmp_path: Path) -> Path:
    """A copy of the full cache that a test may spoil."""
    return Path(shutil.copytree(warm_cache, tmp_path / "cache"))


def test_warm_fills_an_empty_directory_and_the_next_finds_all(warm_cache: Path, warm_cache_said: str) -> None:
    assert warm_cache_said.startswith(f"{COUNT} kernels ready in ")
    assert f": 0 from the cache, {COUNT} compiled; {warm_cache}" in warm_cache_said
    again = run("cache", "warm", FP8_BACKEND_CACHE_DIR=str(warm_cache))
    assert (again.returncode, again.stderr) == (0, "")
    assert f": {COUNT} from the cache, 0 compiled" in again.stdout


def test_forbidden_compile_passes_with_a_full_cache_and_fails_with_an_empty_one(filled: Path) -> None:
    environ = {"FP8_BACKEND_CACHE_DIR": str(filled), "FP8_BACKEND_JIT": "forbid"}
    assert run("cache", "warm", **environ).returncode == 0
    cleared = run("cache", "clear", **environ)
    assert cleared.returncode == 0
    assert cleared.stdout.count("removed ") == COUNT + 1
    assert cleared.stdout.splitlines()[-1].startswith(f"removed {COUNT} entries, ")
    assert list(filled.glob("v1/*.cubin")) == []
    failed = run("cache", "warm", **environ)
    assert (failed.returncode, failed.stdout) == (2, "")
    assert failed.stderr.startswith(f"fp8-backend cache: {COUNT} kernels cannot be made ready; the first: kernel ")
    assert "FP8_BACKEND_JIT=forbid: unset it" in failed.stderr
    assert "Traceback" not in failed.stderr


def test_list_tells_current_stale_and_damaged_entries(filled: Path) -> None:
    spoilt, *others = sorted(filled.glob("v1/*.cubin"))
    shutil.copy(others[0], filled / "v1" / "gemm-OLD=1-0123456789abcdef.cubin")
    spoilt.write_bytes(spoilt.read_bytes()[:-1])
    done = run("cache", "list", "--json", FP8_BACKEND_CACHE_DIR=str(filled))
    report = json.loads(done.stdout)
    assert (done.returncode, report["directory"]) == (0, str(filled))
    rows = {f"{row['kernel']}-{row['key']}.cubin": row for row in report["entries"]}
    assert set(rows) == {path.name for path in filled.glob("v1/*.cubin")}
    expected = {path.name: "current" for path in others}
    expected |= {spoilt.name: "damaged", "gemm-OLD=1-0123456789abcdef.cubin": "stale"}
    assert {name: row["state"] for name, row in rows.items()} == expected
    for name, row in rows.items():
        assert set(row) == {"kernel", "key", "size_bytes", "age_s", "state"}
        assert row["size_bytes"] == (filled / "v1" / name).stat().st_size
        assert row["age_s"] >= 0
    lines = run("cache", "list", FP8_BACKEND_CACHE_DIR=str(filled)).stdout.splitlines()
    assert len(lines) == COUNT + 2
    assert lines[-1].startswith(f"{filled}: {COUNT + 1} entries, ")
    assert lines[-1].endswith(f"; {COUNT - 1} of {COUNT} kernels are current")


def test_list_of_a_directory_that_does_not_exist_is_empty_and_makes_none(tmp_path: Path) -> None:
    done = run("cache", "list", FP8_BACKEND_CACHE_DIR=str(tmp_path / "none"))
    assert (done.returncode, done.stdout.partition(":")[0]) == (0, str(tmp_path / "none"))
    assert not (tmp_path / "none").exists()


def test_clear_deletes_what_killed_writers_left_and_nothing_else(tmp_path: Path) -> None:
    folder = tmp_path / "v1"
    folder.mkdir()
    for name in (".0123.tmp", "mine.txt", "x-0123456789abcdef.cubin"):
        (folder / name).write_text("")
    done = run("cache", "clear", FP8_BACKEND_CACHE_DIR=str(tmp_path))
    assert done.stdout.startswith("removed x-0123456789abcdef\nremoved 1 entries, 0.0 kB, from ")
    assert [path.name for path in folder.iterdir()] == ["mine.txt"]


def test_path_follows_the_settings(tmp_path: Path) -> None:
    assert run("cache", "path", FP8_BACKEND_CACHE_DIR=str(tmp_path)).stdout == f"{tmp_path}\n"


@pytest.mark.parametrize("action", ["list", "clear"])
def test_refused_directory_is_an_error_with_the_next_step(action: str, tmp_path: Path) -> None:
    (tmp_path / "v1").mkdir()
    tmp_path.chmod(0o777)
    done = run("cache", action, FP8_BACKEND_CACHE_DIR=str(tmp_path))
    assert (done.returncode, done.stdout) == (2, "")
    assert f"chmod go-w {tmp_path}" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_path_is_the_bytes_of_the_path_and_reports_are_readable_in_any_locale(tmp_path: Path) -> None:
    folder = os.fsdecode(os.fsencode(tmp_path) + b"/\xff \xc3\xbc")  # no text in any encoding, a blank, an umlaut
    for encoding in ("ascii", "utf-8", "latin-1"):
        environ = {"FP8_BACKEND_CACHE_DIR": folder, "PYTHONIOENCODING": encoding}
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("FP8_BACKEND_")}
        command = [sys.executable, "-m", "fp8_backend.cli", "cache"]
        path, listing = (
            subprocess.run([*command, action], capture_output=True, timeout=60, env={**inherited, **environ})
            for action in ("path", "list")
        )
        assert (path.returncode, path.stdout, path.stderr) == (0, os.fsencode(folder) + b"\n", b"")
        assert (listing.returncode, listing.stderr) == (0, b"") and b": 0 entries" in listing.stdout


def test_reader_that_has_seen_enough_is_no_error(filled: Path) -> None:
    for index in range(500):  # more than a pipe holds
        (filled / "v1" / f"gemm-OLD=1-{index:016x}.cubin").write_text("")
    environ = {**os.environ, "FP8_BACKEND_CACHE_DIR": str(filled)}
    command = [sys.executable, "-m", "fp8_backend.cli", "cache", "list"]
    listing = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environ)
    assert listing.stdout is not None and listing.stderr is not None
    listing.stdout.readline()
    listing.stdout.close()
    assert listing.stderr.read() == b""
    assert listing.wait(timeout=60) == 128 + signal.SIGPIPE


@pytest.mark.parametrize("command", [("cache", "list"), ("cache", "path"), ("doctor",)])
def test_output_that_cannot_be_written_is_one_line(command: tuple[str, ...], tmp_path: Path) -> None:
    environ = {**os.environ, "FP8_BACKEND_CACHE_DIR": str(tmp_path)}
    full = f"fp8-backend {command[0]}: No space left on device"
    for redirection, code, said in ((">/dev/full", 2, full), (">&-", 0, "")):
        shell = f'exec "$0" -m fp8_backend.cli {" ".join(command)} {redirection}'
        done = subprocess.run(["sh", "-c", shell, sys.executable], stderr=subprocess.PIPE, text=True, env=environ)
        assert (done.returncode, len(done.stderr.splitlines())) == (code, bool(said)), done.stderr
        assert done.stderr.startswith(said)


def test_interrupted_warm_is_one_line_and_keeps_what_is_made(tmp_path: Path) -> None:
    environ = {**os.environ, "FP8_BACKEND_CACHE_DIR": str(tmp_path), "FP8_BACKEND_JIT": "auto"}
    # A shell that runs the tests in the background has them ignore SIGINT, and their children with them.
    program = (
        "import signal, sys\nsignal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from fp8_backend.cli import main\nsys.exit(main(['cache', 'warm']))"
    )
    warm = subprocess.Popen([sys.executable, "-c", program], stderr=subprocess.PIPE, text=True, env=environ)
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob("v1/*.cubin")):
        assert warm.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    warm.send_signal(signal.SIGINT)
    said = warm.communicate(timeout=60)[1]
    assert (said, warm.returncode) == ("fp8-backend cache: interrupted\n", 128 + signal.SIGINT)
    assert 0 < len(list(tmp_path.glob("v1/*.cubin"))) < COUNT


def test_warm_into_a_refused_directory_fails_before_it_compiles(tmp_path: Path) -> None:
    tmp_path.chmod(0o777)
    program = (
        "import sys\nfrom fp8_backend import cli, counters\n"
        "code = cli.main(['cache', 'warm'])\nprint(code, len(counters.compiles))"
    )
    environ = {**os.environ, "FP8_BACKEND_CACHE_DIR": str(tmp_path), "FP8_BACKEND_JIT": "auto"}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, env=environ)
    assert done.stdout == "2 0\n" and f"chmod go-w {tmp_path}" in done.stderr


@pytest.mark.parametrize("command", COMMANDS)
def test_help_is_answered(command: str) -> None:
    done = run(command, "--help")
    assert (done.returncode, done.stderr) == (0, "") and done.stdout.startswith(f"usage: fp8-backend {command}")


@pytest.mark.parametrize("arguments", [(), ("nonsense",), ("cache",), ("cache", "nonsense"), ("doctor", "--nonsense")])
def test_wrong_usage_exits_with_2(arguments: tuple[str, ...]) -> None:
    done = run(*arguments)
    assert done.returncode == 2
    assert done.stderr.startswith("usage: fp8-backend")


@pytest.mark.parametrize(
    ("command", "code", "said"),
    [
        ('inspect "$(printf "a%.0s" $(seq 5000))"', 2, "File name too long"),
        ("cache path > /dev/full", 2, "No space left on device"),
        ("cache path | true", 141, None),  # the reader has seen enough: nothing to say
    ],
)
def test_errors_of_the_system_are_one_line(command: str, code: int, said: str | None, tmp_path: Path) -> None:
    shell = f"set -o pipefail; {sys.executable} -m fp8_backend.cli {command}"
    environ = {**os.environ, "FP8_BACKEND_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(["bash", "-c", shell], capture_output=True, text=True, timeout=300, env=environ)
    assert done.returncode == code
    assert "Traceback" not in done.stderr
    assert len(done.stderr.splitlines()) == (said is not None)
    assert said is None or said in done.stderr


def test_names_that_the_terminal_cannot_show_are_escaped(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    save_file({"schön.weight": torch.ones(2)}, tmp_path / "model.safetensors")
    done = run("inspect", str(tmp_path), PYTHONIOENCODING="ascii")
    assert (done.returncode, done.stderr) == (1, "")  # described, and refused
    assert r"sch\xf6n.weight" in done.stdout


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("FP8_BACKEND_CACHE_DIR", "relative"),
        ("FP8_BACKEND_CACHE_DIR", "~nobody-of-this-name/kernels"),
        ("FP8_BACKEND_STRICT", "yes"),  # not in the table, which promises that all others are refused
        ("FP8_BACKEND_JIT", "Forbid"),
    ],
)
def test_malformed_setting_is_one_line(name: str, value: str) -> None:
    done = run("cache", "path", **{name: value})
    assert done.returncode == 2
    assert f"{name}={value!r}" in done.stderr
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("action", ["path", "list", "clear", "warm"])
def test_home_of_nobody_is_one_line(action: str) -> None:
    command = [sys.executable, "-m", "fp8_backend.cli", "cache", action]
    environ = {name: value for name, value in os.environ.items() if not name.startswith("FP8_BACKEND_")}
    environ["VLLM_CACHE_ROOT"] = "~nobody-of-this-name"
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=environ)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.splitlines()[-1].endswith("set FP8_BACKEND_CACHE_DIR") and "Traceback" not in done.stderr


def test_relative_root_is_that_of_the_working_directory(tmp_path: Path) -> None:
    environ = {name: value for name, value in os.environ.items() if not name.startswith("FP8_BACKEND_")}
    environ = {**environ, "VLLM_CACHE_ROOT": "here", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-m", "fp8_backend.cli", "cache", "path"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=environ, cwd=tmp_path)
    assert done.stdout == f"{tmp_path}/here/fp8_backend\n"
