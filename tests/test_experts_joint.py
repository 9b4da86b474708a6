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


@pytest.mark.parametrize("spec", experts_joint.all_specs(), ids=lambda spec: str(spec.defines))
def test_no_spills_no_stack_no_warnings(spec):
    compiled = compile_kernel(spec)
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
    places = (text.index(part) for part in ("if (!ZEROS && early)", "if (!beside) wait", "if (ZEROS) {"))
    early, waits, at_zeros = places
    assert text[early:].count("launch_next_kernel();") == text.count("launch_next_kernel();") == 2
    assert early < waits < at_zeros < text.rindex("launch_next_kernel();")


def test_workspace_is_m_times_top_k_rows():
    m, top_k, hidden, intermediate = 64, 8, 7168, 2048
    size = experts_joint.experts_joint_workspace_bytes(m, top_k, hidden, intermediate, 256, 132)
    rows = m * top_k * (intermediate + intermediate // 128 * 4 + hidden * 2)
    counters = align(
        hidden // 128 * 64 * 4 + (1 + m * top_k) * 4, 128
    )  # behind the scales; a part starts in a line of L2
    assert size == rows + m * hidden + counters
    weighted = experts_joint.experts_joint_workspace_bytes(m, top_k, hidden, intermediate, 256, 132, True)
    assert weighted > size + m * top_k * hidden * 4


# Qwen3-235B at TP4 at 8 tokens, 151 tiles, and fewer columns of x; at 4, less than a round; at 16, more than a half
# beyond the first; at 8 on one of two ranks, half of the tiles.
@pytest.mark.parametrize(
    ("entries", "num_ids", "num_groups", "hidden", "cuts"),
    [
        (64, 128, 128, 4096, 4),
        (64, 128, 128, 1152, 2),
        (64, 128, 128, 256, 1),
        (32, 128, 128, 4096, 1),
        (128, 128, 128, 4096, 1),
        (64, 128, 64, 4096, 1),
    ],
)
def test_tiles_a_little_beyond_a_round_are_cut_in_k(entries, num_ids, num_groups, hidden, cuts):
    """Each cut of a tile has four k-blocks at least, and there is room for the sums of all cuts but the last."""
    assert experts_joint.most_cuts(entries, num_ids, num_groups, hidden, 384, 132) == cuts
    *_, sums = experts_joint.workspace_parts(entries, entries, hidden, 384, cuts, 132)
    assert sums == (cuts - 1) * entries * 768 * 4


def test_more_experts_than_it_sorts_are_refused():
    tensors = [torch.empty(1025, 1, 256, 128, device="meta"), torch.empty(1025, 1, 8, device="meta")]
    x = torch.empty(1, 128, device="meta", dtype=torch.bfloat16)
    with pytest.raises(ArgumentError, match="1025 experts"):
        experts_joint.JointPlan(x, 1, ExpertWeights(*tensors, *tensors), x, 0, False)
