"""Probes that crash, exit or hang, in real processes: each is one more thing found, and the others are run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

CHILD = """
import ctypes, json, os, signal, sys, time
from dataclasses import asdict
from fp8_backend import isolation
from fp8_backend.findings import Finding
from fp8_backend.isolation import Probe

def crash(): ctypes.string_at(0)
def leave(): os._exit(7)
def stop(): raise SystemExit("bye")
def hang(): signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM]); time.sleep(1000)
def loud(): print("on standard output", flush=True); return Finding("loud", "fine")
def imports():
    import torch
    return Finding("imports", torch.__version__)

isolation.LIMIT_S = 2.0
faulty = globals()[sys.argv[1]]
probes = [Probe("before", lambda: Finding("before", "fine"), ""), Probe(sys.argv[2], faulty, "step"),
          Probe("loud", loud, ""), Probe("imports", imports, "step"),
          Probe("needs", lambda: Finding("needs", "fine"), "", needs_torch=True)]
print("buffered", end="")  # what a fork must not write twice
found = isolation.examine(probes)
try:
    os.waitpid(-1, os.WNOHANG)
except ChildProcessError:
    print(json.dumps([asdict(finding) for finding in found]))
"""


@pytest.fixture
def examine(tmp_path: Path) -> Callable[[str, str], list[list[object]]]:
    # The real one takes seconds to import on a busy machine.
    (tmp_path / "torch.py").write_text("__version__ = 'imported at once'\n")
    return lambda faulty, name: _examine(faulty, name, str(tmp_path))


def _examine(faulty: str, name: str, folder: str) -> list[list[object]]:
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join([folder, *filter(None, sys.path)])}
    command = [sys.executable, "-c", CHILD, faulty, name]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=environ)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("buffered["), done.stdout  # nothing else, and no child is left
    return [list(row.values()) for row in json.loads(done.stdout.removeprefix("buffered"))]


FAULTS = {
    "crash": "ended by SIGSEGV",
    "leave": "ended with status 7",
    "stop": "SystemExit: bye",
    "hang": "no answer within 2 s",
}


@pytest.mark.parametrize(("faulty", "found"), FAULTS.items())
def test_probe_that_does_not_return_is_found_and_the_others_are_run(faulty: str, found: str, examine: Callable) -> None:
    before, fault, loud, imports, needs = examine(faulty, "x")
    assert [before[1], loud[1], needs[1]] == ["fine"] * 3
    assert fault == ["x", found, "step", True]
    assert imports[1] == "imported at once"  # a fault elsewhere leaves torch alone


@pytest.mark.parametrize(("faulty", "found"), FAULTS.items())
def test_torch_that_does_not_import_is_asked_once(faulty: str, found: str, examine: Callable) -> None:
    before, fault, loud, imports, needs = examine(faulty, "torch")
    assert fault == ["torch", found, "step", True]
    assert (before[1], loud[1]) == ("fine", "fine")
    assert "None in sys.modules" in str(imports[1]) and imports[2] == "step"
    assert needs == ["needs", "not examined: torch cannot be used", "", False]


def test_last_words_are_kept(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text(
        "import os\nprint('libc10.so: no version')\nos.write(1, b'lost\\n')\nos.abort()\n"
    )
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *filter(None, sys.path)])}
    environ["FP8_BACKEND_CACHE_DIR"] = str(tmp_path)
    command = [sys.executable, "-m", "fp8_backend.cli", "doctor", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=environ, cwd="/")
    rows = {row["what"]: row for row in json.loads(done.stdout)["findings"]}
    assert rows["torch"]["found"] == "ended by SIGABRT; it last printed: lost"
    assert (done.returncode, done.stderr, rows["kernels"]["ok"]) == (1, "", None)
