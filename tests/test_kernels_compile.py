"""Every kernel that serving can need compiles for sm_90a as it was meant to."""

from __future__ import annotations

import re

import pytest

from fp8_backend.kernels import activation, decode, gemm_plan, quantize, warmup
from fp8_backend.kernels.compiler import CUDA_FOLDER, compile_kernel

SPECS = warmup.all_specs()


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_no_spills_no_stack_no_warnings(spec):
    compiled = compile_kernel(spec)
    assert (compiled.spill_bytes, compiled.stack_bytes, compiled.warnings) == (0, 0, ())


def test_the_set_is_bounded():
    assert len(SPECS) == len(set(SPECS)) <= 64


# A parameter more or less on one side would shift all that follow it.
@pytest.mark.parametrize(
    ("file", "layout"),
    [
        ("gemm.cuh", gemm_plan._LAYOUT),
        ("decode.cuh", decode._LAYOUT),
        ("quantize.cuh", quantize._LAYOUT),
        ("activation.cuh", activation._LAYOUT),
    ],
)
def test_launch_parameters_are_the_kernels(file, layout):
    signature = re.search(r'extern "C".*?\n\w+\((.*?)\) \{', (CUDA_FOLDER / file).read_text(), re.DOTALL)[1]
    kinds = []
    for parameter in signature.split(","):
        words = parameter.split()
        kinds.append("map" if "TensorMap" in words else "u64" if "*" in parameter else words[0])
    assert tuple(kinds) == layout.kinds


def test_constants_shared_with_the_device_code():
    from fp8_backend.kernels import layout, problem, reference

    text = "".join((CUDA_FOLDER / name).read_text() for name in ("ptx.cuh", "group.cuh", "decode.cuh"))

    def constant(name):
        return float(re.search(rf"\b{name} = ([0-9.e-]+)", text)[1])

    assert constant("kBlockK") == reference.BLOCK
    assert constant("kFp8Max") == reference.FP8_MAX and constant("kMinAmax") == reference.MIN_AMAX
    assert constant("kScaleFloats") == layout.SCALES_FETCHED
    assert constant("kThreads") == problem.DECODE_THREADS
