"""The launcher: the bytes it hands to the driver, and (marked gpu) what the driver makes of them."""

from __future__ import annotations

import ctypes
import dataclasses
import struct
import threading
from pathlib import Path

import pytest

from fp8_backend.errors import ArgumentError, DriverError, UnsupportedError
from fp8_backend.kernels import driver, launcher, tensor_map
from fp8_backend.kernels.compiler import KernelSpec
from fp8_backend.kernels.launcher import Kernel, ParamLayout
from fp8_backend.kernels.prepared import Launch
from fp8_backend.kernels.tensor_map import encode_tiled

SAXPY = KernelSpec("saxpy.cuh", "saxpy", (("OFFSET", 3),), Path(__file__).parent)
SAXPY_PARAMS = ParamLayout(("u64", "f32", "i32"))
FUNCTION, STREAM = 0x7F12_3456_7890, 0x7FAB_CDEF_0120


class LaunchAttribute(ctypes.Structure):
    """CUlaunchAttribute as a C compiler lays it out; sizes and offsets were printed from cuda.h 13.0."""

    _fields_ = [("id", ctypes.c_uint), ("padding", ctypes.c_char * 4), ("value", ctypes.c_uint * 16)]


class LaunchConfig(ctypes.Structure):
    """CUlaunchConfig, likewise."""

    _fields_ = [
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared_bytes", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(LaunchAttribute)),
        ("attribute_count", ctypes.c_uint),
    ]


@dataclasses.dataclass
class Seen:
    """One launch as the driver would see it."""

    grid: tuple[int, ...]
    block: tuple[int, ...]
    shared_bytes: int
    stream: int
    attributes: list[tuple[int, tuple[int, ...]]]
    function: int
    params: list[bytes]
    addresses: list[int]


class Driver:
    """Stands where cuLaunchKernelEx stands, called through the same C interface; there is no driver without a GPU."""

    def __init__(self, sizes: tuple[int, ...], statuses: tuple[int, ...] = ()) -> None:
        self.sizes = sizes
        self.statuses = list(statuses)
        self.seen: list[Seen] = []
        self.function = ctypes.CFUNCTYPE(ctypes.c_int, *[ctypes.c_void_p] * 4)(self._launch)

    def _launch(self, config_address: int, function: int, params: int, extra: int | None) -> int:
        config = LaunchConfig.from_address(config_address)
        addresses = list((ctypes.c_void_p * len(self.sizes)).from_address(params))
        attributes = [config.attributes[index] for index in range(config.attribute_count)]
        self.seen.append(
            Seen(
                tuple(config.grid),
                tuple(config.block),
                config.shared_bytes,
                config.stream or 0,
                [(attribute.id, tuple(attribute.value)) for attribute in attributes],
                function,
                [ctypes.string_at(address, size) for address, size in zip(addresses, self.sizes, strict=True)],
                addresses,
            )
        )
        assert extra is None
        return self.statuses.pop(0) if self.statuses else 0


def test_structures_have_the_sizes_of_cuda_h() -> None:
    assert ctypes.sizeof(LaunchAttribute) == launcher._ATTRIBUTE.size == 72
    assert ctypes.sizeof(LaunchConfig) == launcher.CONFIG.size == 56


def test_params_are_aligned_as_c_aligns_them() -> None:
    layout = ParamLayout(("i32", "map", "u64", "f32", "i64", "u32"))
    assert layout.offsets == (0, 64, 192, 200, 208, 216)
    assert layout.packer.size == 220
    assert layout == ParamLayout(("i32", "map", "u64", "f32", "i64", "u32"))
    assert hash(layout) == hash(ParamLayout(layout.kinds))
    assert layout != SAXPY_PARAMS


def test_launch_hands_over_every_argument() -> None:
    fake = Driver((128, 8, 4, 4, 8))
    kernel = Kernel("test", FUNCTION, ParamLayout(("map", "u64", "i32", "f32", "i64")), launch=fake.function)
    description = bytes(range(128))
    for _ in range(2):  # the second launch finds the buffers the first has made
        kernel.launch(
            (132, 2, 3), 384, 200_000, (description, 2**63 + 5, -7, 0.5, -(2**40)), STREAM, cluster=2, pdl=True
        )
    first, second = fake.seen
    assert first == second
    assert (first.grid, first.block, first.shared_bytes) == ((132, 2, 3), (384, 1, 1), 200_000)
    assert (first.function, first.stream) == (FUNCTION, STREAM)
    expected = [description, *(struct.pack(code, value) for code, value in (("<Q", 2**63 + 5), ("<i", -7)))]
    assert first.params == [*expected, struct.pack("<f", 0.5), struct.pack("<q", -(2**40))]
    assert first.addresses[0] % 64 == 0
    assert first.attributes == [(4, (2, 1, 1, *[0] * 13)), (6, (1, *[0] * 15))]


def test_prepared_launch_changes_its_first_parameters_alone() -> None:
    fake = Driver((128, 8, 4))
    kernel = Kernel("test", FUNCTION, ParamLayout(("map", "u64", "i32")), launch=fake.function)
    prepared = Launch(kernel, (8, 2), 384, 1000, (-7,), cluster=2).prepared()
    kernel.launch((1, 1, 1), 32, 0, (bytes(128), 1, 1), 0)  # another launch of the kernel leaves the prepared one alone
    description = bytes(range(128))
    prepared(STREAM, description, 2**63 + 5)
    prepared(7, description, 3)
    _, first, second = fake.seen
    assert first.params == [description, struct.pack("<Q", 2**63 + 5), struct.pack("<i", -7)]
    assert second.params == [description, struct.pack("<Q", 3), struct.pack("<i", -7)]
    assert (first.stream, second.stream) == (STREAM, 7)
    assert (first.grid, first.block, first.shared_bytes) == ((8, 2, 1), (384, 1, 1), 1000)
    assert first.attributes == second.attributes == [(4, (2, 1, 1, *[0] * 13)), (6, (1, *[0] * 15))]


def test_attributes_follow_the_launch_and_not_the_one_before() -> None:
    fake = Driver((4,))
    kernel = Kernel("test", FUNCTION, ParamLayout(("i32",)), launch=fake.function)
    plain, together = {}, {"pdl": True, "cooperative": True}
    for named in (plain, {"cluster": 4}, {"pdl": True}, together, plain, {"cluster": 2}):
        kernel.launch((8, 1, 1), 32, 0, (1,), 0, **named)
    ids = [[(number, value[0]) for number, value in seen.attributes] for seen in fake.seen]
    assert ids == [[], [(4, 4)], [(6, 1)], [(2, 1), (6, 1)], [], [(4, 2)]]


def test_kernel_without_parameters_can_be_launched() -> None:
    fake = Driver(())
    Kernel("test", FUNCTION, ParamLayout(()), launch=fake.function).launch((1, 1, 1), 32, 0, (), 0)
    assert fake.seen[0].params == []


@pytest.mark.parametrize("params", [(1,), (1, 2, 3), (2**31, 1), ("x", 1), (None, 1)])
def test_parameters_that_do_not_fit_name_the_kernel(params: tuple) -> None:
    kernel = Kernel("test", FUNCTION, ParamLayout(("i32", "i32")), launch=Driver((4, 4)).function)
    with pytest.raises(TypeError, match="kernel test: .* do not fit"):
        kernel.launch((1, 1, 1), 32, 0, params, 0)


def test_threads_do_not_mix_their_parameters() -> None:
    fake = Driver((8, 8, 8, 8))
    kernel = Kernel("test", FUNCTION, ParamLayout(("u64", "u64", "u64", "u64")), launch=fake.function)
    barrier = threading.Barrier(4)

    def work(number: int) -> None:
        for count in range(2000):
            if count == 1:
                barrier.wait()  # by now each thread has its memory, and none has ended and given it back
            value = number << 32 | count
            kernel.launch((number, 1, 1), 32, 0, (value,) * 4, number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(1, 5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(fake.seen) == 8000
    for seen in fake.seen:
        assert len(set(seen.params)) == 1
        assert struct.unpack("<Q", seen.params[0])[0] >> 32 == seen.grid[0] == seen.stream
    # Each thread has memory of its own: what keeps the above true for every interleaving, not only for those seen here.
    assert len({seen.addresses[0] for seen in fake.seen}) == 4


def test_failed_launch_names_kernel_and_the_drivers_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(driver, "describe", lambda status: f"CUDA_ERROR_INVALID_VALUE ({status}): invalid argument")
    kernel = Kernel("gemm-BLOCK_M=64", FUNCTION, ParamLayout(()), launch=Driver((), (1,)).function)
    with pytest.raises(DriverError, match=r"gemm-BLOCK_M=64 on cuda:0.*grid \(3, 1, 1\).*\(1\): invalid argument"):
        kernel.launch((3, 1, 1), 32, 0, (), 0)


def test_thread_without_a_context_gets_one_and_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []
    monkeypatch.setattr(driver, "set_primary_context", made.append)
    fake = Driver((), (driver.ERROR_INVALID_CONTEXT, 0))
    Kernel("test", FUNCTION, ParamLayout(()), device=1, launch=fake.function).launch((1, 1, 1), 32, 0, (), 0)
    assert made == [1]
    assert len(fake.seen) == 2


def test_load_without_a_gpu_says_so() -> None:
    torch = pytest.importorskip("torch")
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(UnsupportedError, match="saxpy-OFFSET=3: torch sees no CUDA device"):
        launcher.load(SAXPY, SAXPY_PARAMS)


GOOD_MAP = {
    "pointer": 1 << 20,
    "dims": (4096, 256),
    "strides_bytes": (4096,),
    "box": (128, 64),
    "swizzle": "128B",
    "element_bytes": 1,
}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pointer": 8}, "0x8 is not a multiple of 16"),
        ({"pointer": 0}, "0x0"),
        ({"dims": (4096,) * 6}, "6 dimensions"),
        ({"dims": (4096, 0)}, r"in 1\.\.2\^32"),
        ({"dims": (4096, 2**32 + 1)}, r"in 1\.\.2\^32"),
        ({"strides_bytes": ()}, "one fewer than dims"),
        ({"strides_bytes": (4104,)}, "multiple of 16"),
        ({"strides_bytes": (2**40,)}, r"below 2\^40"),
        ({"box": (128,)}, "differ in length"),
        ({"box": (128, 257)}, r"in 1\.\.256"),
        ({"box": (8, 64)}, "rows of 8 bytes; must be a multiple of 16"),
        ({"box": (256, 64)}, "at most 128"),
        ({"element_bytes": 8}, "elements of 8 bytes"),
        ({"swizzle": "256B"}, "swizzle '256B'"),
        ({"swizzle": "64B"}, "box rows of 128 bytes; swizzle 64B takes at most 64"),
        ({"l2_promotion": 512}, "512 bytes"),
    ],
)
def test_limits_of_tensor_maps_are_named(change: dict, message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        encode_tiled(**{**GOOD_MAP, **change})


def test_good_map_breaks_no_limit() -> None:
    assert all(holds for holds, _ in tensor_map._limits(**GOOD_MAP, l2_promotion=256))


@pytest.mark.gpu
def test_maps_are_encoded_once() -> None:
    description = encode_tiled(**GOOD_MAP)
    assert len(description) == 128
    assert any(description)
    assert encode_tiled(**GOOD_MAP) is description
    assert encode_tiled(**{**GOOD_MAP, "pointer": 2 << 20}) != description


# A thread starts without a CUDA context, and may be the first to see a shape.
@pytest.mark.gpu
def test_new_thread_can_encode() -> None:
    encoded: list[bytes] = []
    thread = threading.Thread(target=lambda: encoded.append(encode_tiled(**{**GOOD_MAP, "pointer": 3 << 20})))
    thread.start()
    thread.join()
    assert len(encoded[0]) == 128


# The driver's part is played: an encoder that puts the address first, and one that mixes it into the rest.
@pytest.mark.parametrize("mixes", [False, True])
def test_map_moves_by_its_first_bytes_or_through_the_driver(mixes: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    def encode(function: str, target: int, *arguments: object, subject: str) -> None:
        pointer = arguments[2]
        assert function == "cuTensorMapEncodeTiled" and isinstance(pointer, int)
        asked.append(pointer)
        rest = struct.pack("<Q", pointer if mixes else 0) + subject.encode()
        ctypes.memmove(target, (struct.pack("<Q", pointer) + rest).ljust(128, b"-")[:128], 128)

    monkeypatch.setattr(tensor_map.driver, "call", encode)
    monkeypatch.setattr(tensor_map.driver, "ensure_context", lambda: None)
    encode_tiled.cache_clear()
    described = ((128, 4096, 56), (7168, 128), (128, 128, 1))
    movable = tensor_map.MovableMap(*described, 1)
    found = [movable.at(pointer) for pointer in (1 << 20, 2 << 20)]
    assert len(asked) == (4 if mixes else 2)
    assert found == [encode_tiled(pointer, *described, "128B", 1) for pointer in (1 << 20, 2 << 20)]
    encode_tiled.cache_clear()


# The map a call patches is the one the driver would have written.
@pytest.mark.gpu
@pytest.mark.parametrize("pointer", [1 << 20, 0x7F98_7654_3210, 0x10])
def test_moved_map_is_the_drivers(pointer: int) -> None:
    described = ((128, 4096, 56), (7168, 128), (128, 128, 1))
    movable = tensor_map.MovableMap(*described, 1)
    assert movable._patched
    assert movable.at(pointer) == encode_tiled(pointer, *described, "128B", 1)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("cluster", "pdl", "cooperative"),
    [(1, False, False), (2, False, False), (1, True, False), (16, True, False), (1, True, True)],
)
def test_kernel_runs_on_the_current_stream(cluster: int, pdl: bool, cooperative: bool) -> None:
    import torch

    kernel = launcher.load(SAXPY, SAXPY_PARAMS)
    assert launcher.load(SAXPY, SAXPY_PARAMS) is kernel
    count = 16 * 256
    out = torch.full((count,), float("nan"), device="cuda")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        current = launcher.current_stream(kernel.device)
        kernel.launch((16, 1, 1), 256, 200_000, (out.data_ptr(), 0.5, count), current, cluster, pdl, cooperative)
    assert current == stream.cuda_stream
    stream.synchronize()
    assert torch.equal(out.cpu(), torch.arange(count) * 0.5 + 3)


@pytest.mark.gpu
def test_kernel_first_met_during_capture_is_loaded_and_replayed() -> None:
    import torch

    out = torch.zeros(256, device="cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kernel = launcher.load(dataclasses.replace(SAXPY, defines=(("OFFSET", 77),)), SAXPY_PARAMS)
        kernel.launch((1, 1, 1), 256, 0, (out.data_ptr(), 2.0, 256), launcher.current_stream(kernel.device), pdl=True)
    assert not out.any()
    graph.replay()
    assert torch.equal(out.cpu(), torch.arange(256) * 2.0 + 77)


@pytest.mark.gpu
def test_new_thread_can_launch() -> None:
    import torch

    out = torch.zeros(256, device="cuda")
    kernel = launcher.load(SAXPY, SAXPY_PARAMS)
    thread = threading.Thread(target=kernel.launch, args=((1, 1, 1), 256, 0, (out.data_ptr(), 1.0, 256), 0))
    thread.start()
    thread.join()
    torch.cuda.synchronize()
    assert torch.equal(out.cpu(), torch.arange(256) + 3.0)


@pytest.mark.gpu
def test_refused_launch_says_why() -> None:
    kernel = launcher.load(SAXPY, SAXPY_PARAMS)
    with pytest.raises(DriverError, match="CUDA_ERROR_INVALID_VALUE"):
        kernel.launch((1, 1, 1), 2048, 0, (0, 1.0, 0), launcher.current_stream(kernel.device))
    # More thread blocks than can run at once, one a multiprocessor: those that wait for the others would hang.
    with pytest.raises(DriverError, match="CUDA_ERROR_COOPERATIVE_LAUNCH_TOO_LARGE"):
        kernel.launch((1000, 1, 1), 256, 200_000, (0, 1.0, 0), launcher.current_stream(kernel.device), cooperative=True)
