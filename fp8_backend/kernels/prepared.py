"""Launches that are repeated with other tensors of one shape, and what each thread keeps of them."""

from __future__ import annotations

import ctypes
import threading
from dataclasses import dataclass
from typing import Generic, TypeVar

from fp8_backend.kernels import launcher

Plan = TypeVar("Plan")
MAX_PLANS = 4096  # of a thread, 10 to 20 KB each: a prefill may have any m


@dataclass(frozen=True)
class Launch:
    """A dependent launch of a kernel on tensors of one shape, whatever their addresses.

    grid: thread blocks in x and y. block: threads of each. shared_bytes: dynamic shared memory of each. params: the
    kernel's last parameters; the first ones, addresses and maps, are given for each launch. cluster: thread blocks of a
    cluster, along x.
    """

    kernel: launcher.Kernel
    grid: tuple[int, int]
    block: int
    shared_bytes: int
    params: tuple[int | float, ...]
    cluster: int = 1

    def __call__(self, stream: int, *first: int | bytes) -> None:
        """Launch once on a raw stream of the kernel's device.

        Raises:
            DriverError: the driver refused the launch, or an earlier kernel failed.
        """
        params = *first, *self.params
        self.kernel.launch((*self.grid, 1), self.block, self.shared_bytes, params, stream, self.cluster, pdl=True)

    def prepared(self) -> PreparedLaunch:
        """Return the same to be launched again and again by one thread; making it costs more than it saves one call."""
        return PreparedLaunch(self)

    def __str__(self) -> str:
        blocks = f"grid {self.grid}, block {self.block}, {self.shared_bytes} shared bytes"
        return f"{blocks}, cluster {self.cluster}, pdl True"


class PreparedLaunch:
    """A launch with all that stays the same written once. One thread at a time may use it."""

    def __init__(self, launch: Launch) -> None:
        """Write everything but the first parameters and the stream."""
        kernel, fixed = launch.kernel, launch.params
        kinds = kernel.layout.kinds[: len(kernel.layout.kinds) - len(fixed)]
        assert set(kinds) <= {"map", "u64"}
        self._launch, self._kernel = launch, kernel
        self._buffers = launcher.Buffers(kernel.layout)
        self._params, self._params_address = self._buffers.params, self._buffers.pointers_address
        empty: list[int | bytes] = [bytes(128) if kind == "map" else 0 for kind in kinds]
        kernel.layout.packer.pack_into(self._params, 0, *empty, *fixed)
        self._pack = launcher.ParamLayout(kinds).packer.pack_into
        self._attributes = kernel.configuration(launch.cluster, True)  # kept: the configuration points into its memory
        self._config = ctypes.create_string_buffer(launcher.CONFIG.size)
        self._config_address, blocks = ctypes.addressof(self._config), (*launch.grid, 1, launch.block, 1, 1)
        launcher.CONFIG.pack_into(self._config, 0, *blocks, launch.shared_bytes, 0, *self._attributes[2:4])
        self._stream = 0

    def __call__(self, stream: int, *params: int | bytes) -> None:
        """Launch on a raw stream of the kernel's device, with the parameters that change.

        Raises:
            DriverError: the driver refused the launch, or an earlier kernel failed.
        """
        self._pack(self._params, 0, *params)
        if stream != self._stream:
            launcher.CONFIG_STREAM.pack_into(self._config, launcher.CONFIG_STREAM_OFFSET, stream)
            self._stream = stream
        self._kernel.submit(self._config_address, self._params_address, self._describe)

    def _describe(self) -> str:
        return f"{self._launch}, prepared"


class Prepared(threading.local, Generic[Plan]):
    """What each thread has prepared, by what distinguishes the tensors of its calls; the oldest make room."""

    def __init__(self) -> None:
        self.by_key: dict[object, Plan] = {}

    def add(self, key: object, plan: Plan) -> None:
        """Keep a plan, in place of the oldest one where there are MAX_PLANS."""
        if len(self.by_key) >= MAX_PLANS:
            del self.by_key[next(iter(self.by_key))]
        self.by_key[key] = plan
