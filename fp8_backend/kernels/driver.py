"""The CUDA driver library through ctypes: loaded at first use, every call checked.

ctypes and not cuda.bindings: a launch through `cuda.bindings.driver` costs 8 us of host time, mostly for building its
argument objects; prebuilt ctypes buffers cost 1.1 us beside the driver's own work (ten parameters, cluster and PDL).
"""

from __future__ import annotations

import ctypes
from functools import cache

from fp8_backend.errors import DriverError, UnsupportedError

LIBRARY = "libcuda.so.1"

# Values of cuda.h (13.0).
ERROR_INVALID_CONTEXT = 201
FUNC_ATTRIBUTE_SHARED_SIZE_BYTES = 1
FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES = 8
FUNC_ATTRIBUTE_NON_PORTABLE_CLUSTER_SIZE_ALLOWED = 14
DEVICE_ATTRIBUTE_MEMORY_CLOCK_RATE = 36  # kHz
DEVICE_ATTRIBUTE_GLOBAL_MEMORY_BUS_WIDTH = 37  # bits
DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_OPTIN = 97  # bytes a block may use
STREAM_CAPTURE_MODE_RELAXED = 2

_POINTER, _INT, _UINT = ctypes.c_void_p, ctypes.c_int, ctypes.c_uint
_SIGNATURES: dict[str, tuple[type, ...]] = {
    "cuInit": (_UINT,),
    "cuCtxGetCurrent": (_POINTER,),
    "cuCtxSetCurrent": (_POINTER,),
    "cuDevicePrimaryCtxRetain": (_POINTER, _INT),
    "cuDeviceGetAttribute": (_POINTER, _INT, _INT),
    "cuModuleLoadData": (_POINTER, ctypes.c_char_p),
    "cuModuleGetFunction": (_POINTER, _POINTER, ctypes.c_char_p),
    "cuFuncGetAttribute": (_POINTER, _INT, _POINTER),
    "cuFuncSetAttribute": (_POINTER, _INT, _INT),
    "cuThreadExchangeStreamCaptureMode": (_POINTER,),
    "cuGetErrorName": (_INT, _POINTER),
    "cuGetErrorString": (_INT, _POINTER),
    # config, function, kernelParams, extra
    "cuLaunchKernelEx": (_POINTER, _POINTER, _POINTER, _POINTER),
    "cuOccupancyMaxActiveClusters": (_POINTER, _POINTER, _POINTER),
    # map, data type, rank, address, dims, strides, box, element strides, interleave, swizzle, L2 promotion, OOB fill
    "cuTensorMapEncodeTiled": (_POINTER, _INT, _UINT, *[_POINTER] * 5, *[_INT] * 4),
}


@cache
def load() -> ctypes.CDLL:
    """Load and initialise the driver library.

    Raises:
        UnsupportedError: this machine has no NVIDIA driver.
        DriverError: the driver does not start.
    """
    try:
        library = ctypes.CDLL(LIBRARY)
    except OSError as error:
        raise UnsupportedError(
            f"{LIBRARY} cannot be loaded ({error}): kernels need an NVIDIA driver; on a machine without one set "
            "FP8_BACKEND_KERNELS=reference"
        ) from None
    for name, argtypes in _SIGNATURES.items():
        function = getattr(library, name)
        function.argtypes, function.restype = argtypes, _INT
    if status := library.cuInit(0):
        raise DriverError(f"cuInit: {_describe(library, status)}; run nvidia-smi")
    return library


def describe(status: int) -> str:
    """Return the driver's name, number and text of a CUresult."""
    return _describe(load(), status)


def call(function: str, *arguments: object, subject: str = "") -> None:
    """Call a driver function.

    Raises:
        DriverError: it returned an error; the message names the function, `subject` and the driver's own words.
    """
    if status := getattr(load(), function)(*arguments):
        raise DriverError(f"{subject + ': ' if subject else ''}{function} failed: {describe(status)}")


def set_primary_context(device: int) -> None:
    """Make the device's primary context, the one torch uses, current on this thread; it is never released."""
    context, current = ctypes.c_void_p(), ctypes.c_void_p()
    call("cuDevicePrimaryCtxRetain", ctypes.byref(context), device, subject=f"cuda:{device}")
    call("cuCtxGetCurrent", ctypes.byref(current))
    if current.value != context.value:
        call("cuCtxSetCurrent", context, subject=f"cuda:{device}")


def ensure_context() -> None:
    """Make the primary context of torch's current device current on a thread that has none, as threads start."""
    current = ctypes.c_void_p()
    call("cuCtxGetCurrent", ctypes.byref(current))
    if current.value is None:
        import torch

        set_primary_context(torch.cuda.current_device())


def _describe(library: ctypes.CDLL, status: int) -> str:
    name, text = ctypes.c_char_p(), ctypes.c_char_p()
    library.cuGetErrorName(status, ctypes.byref(name))
    library.cuGetErrorString(status, ctypes.byref(text))
    return f"{(name.value or b'unknown error').decode()} ({status}): {(text.value or b'no text').decode()}"
