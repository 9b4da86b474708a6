"""The host half of the experts op whose GEMMs are one launch: what is compiled, and the arithmetic of its buffers."""

from __future__ import annotations

import pytest
import torch

from fp8_backend.errors import ArgumentError
from fp8_backend.kernels import experts_joint, quantize
from fp8_backend.kernels.compiler import CUDA_FOLDER, compile_kernel
from fp8_backend.kernels.experts_plans import ExpertWeights
from fp8_backend.kernels.problem import MAX_SHARED_BYTES
from fp8_backend.kernels.reference import align
from tests.device_source import constants, parameter_kinds


def test_no_spills_no_stack_no_warnings():
    compiled = compile_kernel(experts_joint.SPEC)
    assert (compiled.spill_bytes, compiled.stack_bytes, compiled.warnings) == (0, 0, ())


# A parameter more or less on one side would shift all that follow it.
@pytest.mark.parametrize(
    ("file", "layout"), [("experts_joint.cuh", experts_joint.LAYOUT), ("quantize.cuh", quantize._LAYOUT)]
)
def test_launch_parameters_are_the_kernels(file, layout):
    assert parameter_kinds(file) == layout.kinds


def test_constants_shared_with_the_device_code():
    device = constants("experts_joint.cuh")
    assert (device["kThreads"], device["kMaxEntries"]) == (experts_joint.THREADS, experts_joint.MAX_ENTRIES)
    assert (device["kTileRows"], device["kTickets"]) == (experts_joint.TILE_ROWS, experts_joint.TICKETS)


def test_it_fits_a_multiprocessor():
    """Beside the stages lie lists of as many tiles as entries; a bit of each entry for every expert fits in them."""
    lists = (
        experts_joint.MAX_ENTRIES * (4 + 4 + 2) + experts_joint.THREADS // 32 * 4 + 4 + 4 * experts_joint.TILE_ROWS * 4
    )
    assert experts_joint._SHARED_BYTES + lists <= MAX_SHARED_BYTES
    bits = experts_joint.MAX_ENTRIES // 32 * experts_joint.MAX_GROUPS * 4
    assert bits <= experts_joint._STAGES * experts_joint._STAGE_BYTES


def test_the_gemms_start_when_ids_are_there():
    """They read ids without a wait, so the quantisation, which lets them start, must have waited for these."""
    text = (CUDA_FOLDER / "quantize.cuh").read_text()
    assert text.index("wait_for_previous_kernel();") < text.index("if (early == 2) launch_next_kernel();")


def test_workspace_is_m_times_top_k_rows():
    m, top_k, hidden, intermediate = 64, 8, 7168, 2048
    size = experts_joint.experts_joint_workspace_bytes(m, top_k, hidden, intermediate)
    rows = m * top_k * (intermediate + intermediate // 128 * 4 + hidden * 2)
    counters = align(
        hidden // 128 * 64 * 4 + (1 + m * top_k) * 4, 128
    )  # behind the scales; a part starts in a line of L2
    assert size == rows + m * hidden + counters
    weighted = experts_joint.experts_joint_workspace_bytes(m, top_k, hidden, intermediate, True)
    assert weighted > size + m * top_k * hidden * 4


def test_more_experts_than_it_sorts_are_refused():
    tensors = [torch.empty(1025, 1, 256, 128, device="meta"), torch.empty(1025, 1, 8, device="meta")]
    x = torch.empty(1, 128, device="meta", dtype=torch.bfloat16)
    with pytest.raises(ArgumentError, match="1025 experts"):
        experts_joint.JointPlan(x, 1, ExpertWeights(*tensors, *tensors), x, 0, False)
