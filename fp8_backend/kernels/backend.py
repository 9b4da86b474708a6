"""Which kernels run where: our CUDA kernels on Hopper, the torch reference elsewhere."""

from __future__ import annotations

import ctypes
from functools import cache

import torch

from fp8_backend import settings
from fp8_backend.errors import UnsupportedError
from fp8_backend.kernels import driver

CAPABILITY = (9, 0)  # Hopper: the kernels use wgmma and are compiled for sm_90a alone


def capability_reason(capability: tuple[int, int]) -> str | None:
    """Return why a GPU of this compute capability cannot run the kernels, or None if it can."""
    if capability == CAPABILITY:
        return None
    return f"compute capability {capability[0]}.{capability[1]}; the kernels need 9.0 (Hopper: H100, H200, GH200)"


@cache
def runs_cuda_kernels(device: torch.device) -> bool:
    """Return whether tensors on this device go through the CUDA kernels; otherwise they go through the reference.

    Raises:
        UnsupportedError: the device is a GPU for which there are no kernels and the reference was not asked for.
    """
    if device.type != "cuda" or settings.load().kernels == "reference":
        return False
    if (reason := capability_reason(torch.cuda.get_device_capability(device))) is not None:
        raise UnsupportedError(
            f"{device} ({torch.cuda.get_device_name(device)}): {reason}; set FP8_BACKEND_KERNELS=reference to run the "
            "slow torch reference there"
        )
    return True


@cache
def batch_invariant() -> bool:
    """Return whether the bits of a row must not depend on the rows beside it."""
    return settings.load().resolved_batch_invariant()


def is_current(device: torch.device) -> bool:
    """Return whether a CUDA device is the one that launches go to."""
    return device.index == torch._C._cuda_getDevice()


@cache
def num_sms(device: int) -> int:
    """Return the multiprocessors of a device."""
    return torch.cuda.get_device_properties(device).multi_processor_count


@cache
def memory_bytes_per_us(device: int) -> float:
    """Return what clock and width of a device's memory allow: 4.92 million bytes a microsecond on an H200.

    Raises:
        DriverError: the driver does not tell.
    """
    wanted = driver.DEVICE_ATTRIBUTE_MEMORY_CLOCK_RATE, driver.DEVICE_ATTRIBUTE_GLOBAL_MEMORY_BUS_WIDTH
    found = [ctypes.c_int() for _ in wanted]
    for value, attribute in zip(found, wanted, strict=True):
        driver.call("cuDeviceGetAttribute", ctypes.byref(value), attribute, device)
    return memory_rate(*(value.value for value in found))


def memory_rate(clock_khz: int, width_bits: int) -> float:
    """Return the bytes a microsecond that memory of this clock, at two transfers each, and width moves."""
    return 2 * clock_khz * 1e-3 * width_bits / 8
