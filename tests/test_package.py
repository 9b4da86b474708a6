"""The wheel: built, looked into, installed into an empty environment, and used there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of what git knows, so that a file left out of a commit or of the package data shows."""
    pytest.importorskip("build", reason="needs the test extra's build")
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True
    )
    names = listed.stdout.split() if listed.returncode == 0 else []  # an unpacked export has no git
    for path in map(ROOT.joinpath, names) if names else (p for p in ROOT.rglob("*") if ".venv" not in p.parts):
        if path.is_file():
            target = source / path.relative_to(ROOT)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(path.read_bytes())
    # Without isolation: that would download the build backend, which the test extra holds.
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(source)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    (found,) = folder.glob("*.whl")
    return found


@pytest.fixture(scope="module")
def installed(wheel: Path) -> Path:
    """The programs of an environment that holds the wheel alone, and sees the dependencies that are installed here.

    Installing torch and vLLM again would download gigabytes. The path of this environment's packages is added as a bare
    path: what is installed here in editable form, such as this project, is not seen through it.
    """
    folder = wheel.parent / "venv"
    venv.create(folder, with_pip=True)
    programs = folder / "bin"
    command = [programs / "python", "-m", "pip", "install", "--no-deps", "--no-index", "--quiet", wheel]
    subprocess.run(command, check=True, timeout=300, env=clean())
    (site,) = folder.glob("lib/python*/site-packages")
    (site / "dependencies.pth").write_text("\n".join(dict.fromkeys([sysconfig.get_path("purelib"), *outside()])) + "\n")
    return programs


def outside() -> list[str]:
    """Return the other folders from which this process takes packages."""
    return [path for path in sys.path if path.endswith("site-packages")]


def clean() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name != "PYTHONPATH" and not name.startswith("FP8_")}


def test_wheel_holds_the_device_code_and_nothing_of_the_repository_beside_the_package(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    device = {str(path.relative_to(ROOT)) for path in (ROOT / "fp8_backend").rglob("*.cuh")}
    assert device and device <= names
    python = {str(path.relative_to(ROOT)) for path in (ROOT / "fp8_backend").rglob("*.py")}
    assert python <= names
    assert {name.split("/")[0] for name in names} == {"fp8_backend", f"fp8_backend-{PROJECT['version']}.dist-info"}


def test_doctor_passes_where_only_the_wheel_is_installed(installed: Path, tmp_path: Path) -> None:
    environ = {**clean(), "FP8_BACKEND_CACHE_DIR": str(tmp_path / "cache")}
    done = subprocess.run(
        [installed / "fp8-backend", "doctor", "--json"], cwd=tmp_path, capture_output=True, text=True, env=environ
    )
    report = json.loads(done.stdout)
    assert (done.returncode, report["ok"]) == (0, True), done.stdout
    found = {row["what"]: row["found"] for row in report["findings"]}
    assert found["fp8-backend"].startswith(f"{PROJECT['version']} in {installed.parent}")
    assert found["plugin"].startswith("registered")


def test_version_comes_from_the_package(installed: Path, tmp_path: Path) -> None:
    program = "import fp8_backend; print(fp8_backend.__version__)"
    said = subprocess.run(
        [installed / "python", "-c", program], cwd=tmp_path, capture_output=True, text=True, check=True, env=clean()
    )
    assert said.stdout.strip() == PROJECT["version"]
