"""Every kernel that serving can need compiles for sm_90a as it was meant to."""

from __future__ import annotations

import pytest

from fp8_backend.kernels import (
    activation,
    attention,
    decode,
    gemm_plan,
    gemm_quantize,
    norm,
    norm_rope,
    quantize,
    router,
    silu,
    warmup,
)
from fp8_backend.kernels.compiler import compile_kernel
from tests.device_source import constants, parameter_kinds

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
        ("gemm_stationary.cuh", gemm_plan._LAYOUT),
        ("gemm_quantize.cuh", gemm_quantize._LAYOUT),
        ("decode.cuh", decode._LAYOUT),
        ("quantize.cuh", quantize._LAYOUT),
        ("rms_norm_quantize.cuh", norm._LAYOUT),
        ("silu_mul_quantize.cuh", silu._LAYOUT),
        ("norm_rope.cuh", norm_rope._LAYOUT),
        ("router.cuh", router._LAYOUT),
        ("activation.cuh", activation._LAYOUT),
        ("attention.cuh", attention._LAYOUT),
    ],
)
def test_launch_parameters_are_the_kernels(file, layout):
    assert parameter_kinds(file) == layout.kinds


def test_constants_shared_with_the_device_code():
    from fp8_backend.kernels import layout, problem, reference

    device = constants("ptx.cuh", "group.cuh", "decode.cuh")
    assert device["kBlockK"] == reference.BLOCK
    assert device["kFp8Max"] == reference.FP8_MAX and device["kMinAmax"] == reference.MIN_AMAX
    assert device["kScaleFloats"] == layout.SCALES_FETCHED
    assert device["kThreads"] == problem.DECODE_THREADS
    device, config = constants("gemm_stationary.cuh"), problem.StationaryGemmConfig
    assert (device["kRows"], device["kColumns"]) == (config.block_m, config.block_n)
    assert device["kStored"] == config.stored_columns
    assert 128 * (1 + device["kWarpgroups"]) == config.threads
    # As many k-blocks of a run's weights as stages and outputs leave room for: with one more it would wait for ever.
    stage, slot = (device[rows] * reference.BLOCK for rows in ("kRows", "kColumns"))
    stages = device["kLeastStages"] * (stage + device["kStageScaleBytes"] + 2 * 8)
    room = config.shared_bytes - device["kWarpgroups"] * (device["kRoomBytes"] + stages)
    assert room // (slot + layout.SCALES_FETCHED * 4 + 2 * 8) == config.max_k_blocks
    device = constants("attention.cuh")
    assert (device["kHead"], device["kSlice"]) == (attention.HEAD, attention.BLOCK_ALIGNMENT)
    assert (device["kWarps"], device["kSizes"]) == (attention._WARPS, attention._SIZES)
    assert device["kPartialStride"] == attention._PARTIAL_STRIDE
    assert device["kMostHeads"] == attention.MAX_GROUP
    stages = device["kStages"] * (device["kSliceBytes"] + 8)  # with a barrier each
    ends = device["kSumsBytes"] + device["kMostHeads"] * 2 * 4
    assert device["kWarps"] * (stages + ends) + 4 == attention._SHARED_BYTES
    device = constants("router.cuh")
    assert (device["kMostRows"], device["kWarps"] * 32) == (router.MAX_ROWS, router._THREADS)
    assert (device["kColumns"], device["kRanks"]) == (router._COLUMNS, router._RANKS)
