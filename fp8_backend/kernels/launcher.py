"""Load cubins and launch kernels: clusters, dependent launches, CUDA graph capture, little host time."""

from __future__ import annotations

import ctypes
import struct
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Literal

from fp8_backend.errors import DriverError, UnsupportedError
from fp8_backend.kernels import cache, driver
from fp8_backend.kernels.compiler import KernelSpec

ParamKind = Literal["map", "u64", "i64", "u32", "i32", "f32"]

# kind -> (struct code, bytes, alignment). A map is a CUtensorMap, declared `const __grid_constant__` in the kernel.
_KINDS: dict[str, tuple[str, int, int]] = {
    "map": ("128s", 128, 64),
    "u64": ("Q", 8, 8),
    "i64": ("q", 8, 8),
    "u32": ("I", 4, 4),
    "i32": ("i", 4, 4),
    "f32": ("f", 4, 4),
}

# CUlaunchConfig: grid x y z, block x y z, dynamic shared bytes, stream, attributes, number of attributes.
CONFIG = struct.Struct("<7I4xQQI4x")
CONFIG_STREAM, CONFIG_STREAM_OFFSET = struct.Struct("<Q"), struct.calcsize("<7I4x")
# CUlaunchAttribute: id, then a union of 64 bytes, of which the kinds used here take at most three 32-bit words.
_ATTRIBUTE = struct.Struct("<I4x3I52x")
_COOPERATIVE, _CLUSTER_DIMENSION, _PROGRAMMATIC_STREAM_SERIALIZATION = 2, 4, 6
_MAX_PORTABLE_CLUSTER = 8

# A CUlaunchConfig, its address, the address and number of its attributes, and the attributes' memory.
Configuration = tuple["ctypes.Array[ctypes.c_char]", int, int, int, "ctypes.Array[ctypes.c_char]"]


@dataclass(frozen=True)
class ParamLayout:
    """The parameters of a kernel, in the order of its signature.

    Kinds: "map" (128 bytes from `encode_tiled`), "u64" (also for
    pointers), "i64", "u32", "i32" or "f32".
    """

    kinds: tuple[ParamKind, ...]
    packer: struct.Struct = field(init=False, compare=False, repr=False)
    offsets: tuple[int, ...] = field(init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        code, end, offsets = "<", 0, []
        for kind in self.kinds:
            letter, size, alignment = _KINDS[kind]
            padding = -end % alignment
            code += f"{padding}x{letter}"
            offsets.append(end + padding)
            end += padding + size
        object.__setattr__(self, "packer", struct.Struct(code))
        object.__setattr__(self, "offsets", tuple(offsets))


class Buffers(threading.local):
    """One thread's memory for the arguments of one kernel, so that two threads cannot mix theirs."""

    def __init__(self, layout: ParamLayout) -> None:
        alignment = 64
        self.memory = ctypes.create_string_buffer(layout.packer.size + alignment)
        start = -ctypes.addressof(self.memory) % alignment
        self.params = memoryview(self.memory)[start:]
        base = ctypes.addressof(self.memory) + start
        self.pointers = (ctypes.c_void_p * max(1, len(layout.offsets)))(*(base + offset for offset in layout.offsets))
        self.pointers_address = ctypes.addressof(self.pointers)
        # by (cluster, pdl, cooperative)
        self.configs: dict[tuple[int, bool, bool], Configuration] = {}


class Kernel:
    """A loaded kernel; it stays loaded for the life of the process, because captured graphs hold its address."""

    def __init__(
        self, name: str, function: int, layout: ParamLayout, device: int = 0, launch: Callable[..., int] | None = None
    ) -> None:
        self.name = name
        self.device = device
        self.layout = layout
        self._function = function
        self._launch = launch if launch is not None else driver.load().cuLaunchKernelEx
        self._pack = layout.packer.pack_into
        self._buffers = Buffers(layout)

    def launch(
        self,
        grid: tuple[int, int, int],
        block: int,
        shared_bytes: int,
        params: Sequence[int | float | bytes],
        stream: int,
        cluster: int = 1,
        pdl: bool = False,
        cooperative: bool = False,
    ) -> None:
        """Launch on a stream of this kernel's device, which must be torch's current device; captured like any launch.

        Args:
            grid: thread blocks in x, y, z, each at least 1; x a multiple of `cluster`.
            block: threads of a block.
            shared_bytes: dynamic shared memory of a block.
            params: one value for each kind of the layout; pointers as integers.
            stream: the raw handle, such as `current_stream(device)`.
            cluster: thread blocks of a cluster, along x; more than 8 is not portable and is allowed here.
            pdl: whether the kernel may start before the one ahead of it in the stream has ended. The kernel must then
                execute griddepcontrol.wait before it touches what that one writes.
            cooperative: whether all thread blocks must run at once, so that they can wait for each other.

        Raises:
            DriverError: the driver refused the launch, or an earlier kernel failed.
            TypeError: `params` do not fit the layout.
        """
        buffers = self._buffers
        config, config_address, attributes, attribute_count, _ = self.configuration(cluster, pdl, cooperative)
        try:
            self._pack(buffers.params, 0, *params)
        except struct.error as error:
            raise TypeError(
                f"kernel {self.name}: parameters {params!r} do not fit {self.layout.kinds}: {error}"
            ) from None
        CONFIG.pack_into(config, 0, *grid, block, 1, 1, shared_bytes, stream, attributes, attribute_count)
        self.submit(
            config_address,
            buffers.pointers_address,
            lambda: (
                f"grid {grid}, block {block}, {shared_bytes} shared bytes, cluster {cluster}, pdl {pdl}, "
                f"cooperative {cooperative}"
            ),
        )

    def submit(self, config_address: int, params_address: int, described: Callable[[], str]) -> None:
        """Hand a filled CUlaunchConfig and its parameters to the driver; `described` is for the error."""
        status = self._launch(config_address, self._function, params_address, None)
        if status == driver.ERROR_INVALID_CONTEXT:  # a thread on which torch has not run yet
            driver.set_primary_context(self.device)
            status = self._launch(config_address, self._function, params_address, None)
        if status:
            raise DriverError(
                f"kernel {self.name} on cuda:{self.device}: launch of {described()} failed: {driver.describe(status)}; "
                "the cause may be an earlier kernel: rerun with CUDA_LAUNCH_BLOCKING=1"
            )

    def configuration(self, cluster: int, pdl: bool, cooperative: bool = False) -> Configuration:
        """Return a CUlaunchConfig, its address, its attributes' address and number, and the attributes' memory."""
        key = (cluster, pdl, cooperative)
        return self._buffers.configs.get(key) or self._prepare(*key)

    def max_active_clusters(self, block: int, shared_bytes: int, cluster: int) -> int:
        """Return how many clusters of `cluster` such thread blocks the device runs at once.

        Raises:
            DriverError: the device cannot run such a cluster.
        """
        config, address, attributes, attribute_count, _ = self.configuration(cluster, False)
        CONFIG.pack_into(config, 0, cluster, 1, 1, block, 1, 1, shared_bytes, 0, attributes, attribute_count)
        clusters = ctypes.c_int()
        driver.call(
            "cuOccupancyMaxActiveClusters",
            ctypes.byref(clusters),
            self._function,
            address,
            subject=f"kernel {self.name}, cluster {cluster}, block {block}, {shared_bytes} shared bytes",
        )
        return clusters.value

    def _prepare(self, cluster: int, pdl: bool, cooperative: bool) -> Configuration:
        attributes = []
        if cooperative:
            attributes.append((_COOPERATIVE, 1, 0, 0))
        if cluster > 1:
            attributes.append((_CLUSTER_DIMENSION, cluster, 1, 1))
        if pdl:
            attributes.append((_PROGRAMMATIC_STREAM_SERIALIZATION, 1, 0, 0))
        if cluster > _MAX_PORTABLE_CLUSTER:
            driver.call(
                "cuFuncSetAttribute",
                self._function,
                driver.FUNC_ATTRIBUTE_NON_PORTABLE_CLUSTER_SIZE_ALLOWED,
                1,
                subject=f"kernel {self.name}, cluster {cluster}",
            )
        memory = ctypes.create_string_buffer(_ATTRIBUTE.size * max(1, len(attributes)))
        for index, attribute in enumerate(attributes):
            _ATTRIBUTE.pack_into(memory, index * _ATTRIBUTE.size, *attribute)
        config = ctypes.create_string_buffer(CONFIG.size)
        prepared = (config, ctypes.addressof(config), ctypes.addressof(memory), len(attributes), memory)
        self._buffers.configs[cluster, pdl, cooperative] = prepared
        return prepared


_loaded: dict[tuple[KernelSpec, ParamLayout, int], Kernel] = {}
_loading = threading.Lock()


def load(spec: KernelSpec, layout: ParamLayout) -> Kernel:
    """Compile a kernel or take it from the cache, and load it on torch's current device.

    The kernel may use all the shared memory of a block that the device has. Hold on to the result: a second call finds
    the same kernel, but asks torch for the device and hashes the spec for it.

    Raises:
        UnsupportedError: there is no CUDA device.
        CompileError: it does not compile, or may not be compiled here.
        DriverError: the driver refuses the cubin.
    """
    import torch

    # Asked first: without a driver, loading a module can hang instead of failing. Asked once: it takes microseconds.
    if not _loaded and not torch.cuda.is_available():
        raise UnsupportedError(
            f"kernel {spec.name}: torch sees no CUDA device; set FP8_BACKEND_KERNELS=reference to run without one"
        )
    device = torch.cuda.current_device()
    key = (spec, layout, device)
    if (kernel := _loaded.get(key)) is None:
        cubin = cache.get(spec).cubin
        with _loading:
            if (kernel := _loaded.get(key)) is None:
                kernel = _loaded[key] = Kernel(spec.name, _load_function(spec, cubin, device), layout, device)
    return kernel


def current_stream(device: int) -> int:
    """Return the raw handle of torch's current stream on a device, without building a torch.cuda.Stream."""
    import torch

    return torch._C._cuda_getCurrentRawStream(device)


def _load_function(spec: KernelSpec, cubin: bytes, device: int) -> int:
    call = partial(driver.call, subject=f"kernel {spec.name} on cuda:{device}")
    module, function, static, limit = ctypes.c_void_p(), ctypes.c_void_p(), ctypes.c_int(), ctypes.c_int()
    driver.set_primary_context(device)
    # Loading allocates, which a thread that captures a graph in the default mode may not do; relaxed while it lasts.
    mode = ctypes.c_int(driver.STREAM_CAPTURE_MODE_RELAXED)
    call("cuThreadExchangeStreamCaptureMode", ctypes.byref(mode))
    try:
        call("cuModuleLoadData", ctypes.byref(module), cubin)
        call("cuModuleGetFunction", ctypes.byref(function), module, spec.entry.encode())
        call("cuFuncGetAttribute", ctypes.byref(static), driver.FUNC_ATTRIBUTE_SHARED_SIZE_BYTES, function)
        call("cuDeviceGetAttribute", ctypes.byref(limit), driver.DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_OPTIN, device)
        dynamic = limit.value - static.value
        call("cuFuncSetAttribute", function, driver.FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, dynamic)
    finally:
        call("cuThreadExchangeStreamCaptureMode", ctypes.byref(mode))
    assert function.value is not None
    return function.value
