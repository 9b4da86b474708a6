"""Exceptions that reach a user: each message names the thing, its value, the limit and the next step."""

from __future__ import annotations


class Fp8BackendError(Exception):
    """Base of every error this package raises on purpose."""


class SettingsError(Fp8BackendError, ValueError):
    """An `FP8_BACKEND_*` variable is unknown or malformed."""


class UnsupportedError(Fp8BackendError):
    """The device, dtype or layer is outside what the kernels support."""


class ArgumentError(Fp8BackendError, ValueError):
    """A tensor handed to a kernel has the wrong dtype, shape, stride or device."""


class CheckpointError(Fp8BackendError, ValueError):
    """A checkpoint is broken, incomplete or of a format that cannot be served exactly."""


class CompileError(Fp8BackendError):
    """NVRTC rejected a kernel, or compiling is forbidden and the kernel is not in the cache."""


class CacheError(Fp8BackendError):
    """The directory of compiled kernels cannot be used for what was asked."""


class DriverError(Fp8BackendError, RuntimeError):
    """A CUDA driver call failed: loading a kernel, launching it or describing a tensor to the copy engine."""
