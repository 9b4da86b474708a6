"""The doctor's probes of the machine: GPU, driver, NVRTC, clocks, and a GEMM that is checked."""

from __future__ import annotations

import ctypes
import time
from pathlib import Path
from typing import TYPE_CHECKING

from fp8_backend.findings import CPU, HOPPER, OTHER_GPU, Finding, nvidia_smi

if TYPE_CHECKING:
    import torch

CAPABILITY = (9, 0)
# Rounding to bf16 gives 0.0017, the tensor core's accumulation up to 0.005 (measured); a wrong scale gives far more.
MAX_RELATIVE_ERROR = 0.01
_CLOCKS = ("clocks.sm", "clocks.max.sm", "clocks.mem", "clocks.max.mem", "power.draw", "power.limit")
# The names of driver 535 and later, then those before it.
_SLOWDOWNS = ("clocks_event_reasons.hw_slowdown", "clocks_throttle_reasons.hw_slowdown")

Gpus = list[tuple[str, tuple[int, int]]]


def torch_gpus() -> Gpus:
    """Return name and compute capability of the GPUs that torch can use; [] where torch does not import."""
    try:
        import torch

        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        return [(torch.cuda.get_device_name(i), torch.cuda.get_device_capability(i)) for i in range(count)]
    except Exception:  # torch has a line of its own
        return []


def smi_gpus() -> Gpus:
    """Return name and compute capability of the GPUs that nvidia-smi lists."""
    found = []
    for row in nvidia_smi("name", "compute_cap"):
        major, _, minor = row.get("compute_cap", "").partition(".")
        if major.isdigit() and minor.isdigit():
            found.append((row["name"], (int(major), int(minor))))
    return found


def role() -> str:
    """Return what this machine serves with: HOPPER (our kernels), OTHER_GPU (vLLM's) or CPU (the torch reference)."""
    capabilities = [capability for _, capability in torch_gpus() or smi_gpus()]
    if CAPABILITY in capabilities:
        return HOPPER
    return OTHER_GPU if capabilities else CPU


def gpu() -> Finding:
    """Look at the GPUs that there are and those that torch can use."""
    usable, listed = torch_gpus(), smi_gpus()
    if not usable and not listed:
        return Finding("GPU", "none; the torch reference serves on this CPU")
    names = ", ".join(f"{name} (compute capability {major}.{minor})" for name, (major, minor) in usable or listed)
    if not usable:
        step = "install a CUDA build of torch, or correct CUDA_VISIBLE_DEVICES and what the driver's line says"
        return Finding("GPU", f"{names}, of which torch can use none", step)
    if all(capability != CAPABILITY for _, capability in usable):
        names += "; not Hopper: vLLM's own FP8 path serves"
    return Finding("GPU", names)


def driver() -> Finding:
    """Look for the NVIDIA driver and what it supports."""
    from fp8_backend.kernels.driver import LIBRARY

    try:
        library = ctypes.CDLL(LIBRARY)
    except OSError as error:
        if role() == CPU and not Path("/proc/driver/nvidia").exists():
            return Finding("driver", "none; a CPU needs none")
        return Finding("driver", str(error), "make the driver's libraries visible, in a container with --gpus all")
    number, status = ctypes.c_int(), library.cuInit(0)
    library.cuDriverGetVersion(ctypes.byref(number))
    release = next((row["driver_version"] for row in nvidia_smi("driver_version")), "of unknown release")
    found = f"{release}, CUDA {number.value // 1000}.{number.value % 1000 // 10}"
    if status == 0:
        return Finding("driver", found)
    return Finding(
        "driver", f"{found}; cuInit fails with CUDA error {status}", "run nvidia-smi; restart the driver or the machine"
    )


def nvrtc() -> Finding:
    """Look for the NVRTC that compiles, and for other copies of it in this process."""
    from fp8_backend.errors import CompileError
    from fp8_backend.kernels import compiler

    try:
        version = compiler.nvrtc_version()
    except CompileError as error:
        needed = role() == HOPPER
        step = "pip install 'nvidia-cuda-nvrtc>=13.0,<13.1'" if needed else ""
        return Finding(
            "NVRTC", f"{error}{'' if needed else ' to compile here; serving on this machine needs none'}", step
        )
    from cuda import pathfinder

    used = pathfinder.load_nvidia_dynamic_lib("nvrtc").abs_path or "unknown path"
    others = sorted(loaded_copies() - {str(Path(used).resolve()), used})
    also = f"; also loaded, not used by us: {', '.join(others)}" if others else ""
    return Finding("NVRTC", f"{version.partition('+')[0]} at {used}{also}")


def loaded_copies() -> set[str]:
    """Return the path of each libnvrtc that is mapped into this process."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    paths = {line.split(maxsplit=5)[-1] for line in lines if "/" in line}
    return {path for path in paths if Path(path).name.startswith(("libnvrtc.", "libnvrtc-")) and "builtins" not in path}


def clocks() -> Finding:
    """Look at each GPU's clocks and whether the hardware slows it down."""
    rows = nvidia_smi(*_CLOCKS)
    if not rows:
        return Finding("clocks", "unknown: nvidia-smi does not run" if role() != CPU else "no GPU")
    lines = [
        f"GPU {index}: SM {row['clocks.sm']} of {row['clocks.max.sm']}, memory {row['clocks.mem']} of "
        f"{row['clocks.max.mem']}, power {row['power.draw']} of {row['power.limit']}"
        for index, row in enumerate(rows)
    ]
    slow = next((found for name in _SLOWDOWNS if (found := nvidia_smi(name))), [])
    slowed = [str(index) for index, row in enumerate(slow) if "Active" in row.values()]
    step = f"cool or power GPU {', '.join(slowed)}: its hardware slows it down" if slowed else ""
    return Finding("clocks", "; ".join(lines), step)


def verified_gemm() -> Finding:
    """Multiply on the first Hopper GPU, else with the torch reference on the CPU, and compare with float64."""
    import torch

    from fp8_backend import counters
    from fp8_backend.kernels.backend import runs_cuda_kernels

    hopper = [index for index, (_, capability) in enumerate(torch_gpus()) if capability == CAPABILITY]
    device = torch.device("cuda", hopper[0]) if hopper else torch.device("cpu")
    start = time.monotonic()
    errors = [_relative_error(m, device) for m in (5, 200)]  # few tokens, many tokens
    kernels = "CUDA kernels" if runs_cuda_kernels(device) else "torch reference"
    found = (
        f"{kernels} on {device}: relative error {max(errors):.4f} against float64 (limit {MAX_RELATIVE_ERROR}), "
        f"{len(counters.compiles)} kernels compiled, {time.monotonic() - start:.1f} s"
    )
    wrong = not all(error <= MAX_RELATIVE_ERROR for error in errors)  # NaN is wrong, too
    return Finding("GEMM", found, "results are wrong: do not serve; report this output" if wrong else "")


def _relative_error(m: int, device: torch.device, n: int = 384, k: int = 640) -> float:
    import torch

    from fp8_backend.kernels import gemm, layout, reference

    random = torch.Generator().manual_seed(0)
    x = torch.randn(m, k, generator=random).bfloat16()
    codes = (torch.randn(n, k, generator=random) * 60).to(torch.float8_e4m3fn)
    scale = torch.rand(n // 128, k // 128, generator=random) * 1e-3 + 1e-4
    weight = layout.pack_weight(codes.to(device))
    y = gemm.fp8_linear(x.to(device), weight, layout.pack_scale(scale.to(device), n, k), n).cpu()
    codes_a, scale_a = reference.per_token_group_quant(x)
    # The definition, block by block, and not the reference's own product.
    truth = torch.zeros(m, n, dtype=torch.float64)
    for block in range(k // 128):
        columns = slice(block * 128, block * 128 + 128)
        product = codes_a[:, columns].double() @ codes[:, columns].double().t()
        truth += product * scale_a[:, block, None].double() * scale[:, block].double().repeat_interleave(128)
    return reference.relative_error(y, truth)
