"""The host half of the experts op for very few tokens: what is compiled, and the arithmetic of its shared memory."""

from __future__ import annotations

import itertools
import re

from fp8_backend.kernels import experts_single
from fp8_backend.kernels.compiler import CUDA_FOLDER, compile_kernel
from fp8_backend.kernels.problem import MAX_SHARED_BYTES
from fp8_backend.kernels.reference import BLOCK, align, ceil_div
from tests.device_source import constants, parameter_kinds, struct_bytes

FILE = "experts_single.cuh"
DEVICE = constants("ptx.cuh", "group.cuh", FILE)
# tokens, experts a token, columns of x and of h: of any layer, and those at the limits of the form
CALLS = list(itertools.product((1, 2, 5, 8), (1, 8, 16), (8, 1028, 2048, 7168, 18432), (128, 384, 768, 2048)))


def test_no_spills_no_stack_no_warnings():
    compiled = compile_kernel(experts_single.SPEC)
    assert (compiled.spill_bytes, compiled.stack_bytes, compiled.warnings) == (0, 0, ())


def test_registers_that_warps_take_are_those_that_others_give():
    """A warpgroup that takes more than the launch has waits for ever."""
    text, per_thread = (CUDA_FOLDER / FILE).read_text(), compile_kernel(experts_single.SPEC).registers
    kept, taken = (int(re.search(rf"{word}_registers<(\d+)>", text)[1]) for word in ("give", "take"))
    launched = align(per_thread, 8) * DEVICE["kThreads"]
    assert kept * DEVICE["kProducers"] + taken * DEVICE["kMathThreads"] <= launched <= 65536


def test_launch_parameters_are_the_kernels():
    assert parameter_kinds(FILE) == experts_single.LAYOUT.kinds


def test_constants_shared_with_the_device_code():
    assert DEVICE["kThreads"] == experts_single._THREADS
    assert DEVICE["kTeams"] == experts_single._TEAMS and DEVICE["kWindow"] <= experts_single._MIN_STAGES
    assert DEVICE["kMaxTokens"] == experts_single.MAX_TOKENS and DEVICE["kMaxPairs"] == experts_single.MAX_PAIRS
    assert DEVICE["kSlotBytes"] == experts_single._SLOT_BYTES
    assert DEVICE["kSlotScales"] * 4 == experts_single._SLOT_SCALE_BYTES
    assert 2 * DEVICE["kPartials"] * 8 == experts_single._SUM_BYTES


def test_room_for_the_experts_hit_is_that_of_the_struct():
    """With less than it takes, the list of experts and the scales behind it would be written over each other."""
    assert align(struct_bytes(FILE, "Routed", DEVICE), 16) == experts_single._ROUTED_BYTES


def shared_bytes(stages: int, m: int, top_k: int, hidden: int, intermediate: int) -> float:
    """Return what the kernel lays out, part by part as it does."""
    groups = max(m * ceil_div(hidden, BLOCK), m * top_k * intermediate // BLOCK)
    ring, sums, codes = stages * DEVICE["kSlotBytes"], 2 * DEVICE["kPartials"] * 8, groups * DEVICE["kBlockK"]
    routed = align(struct_bytes(FILE, "Routed", DEVICE), 16)
    scales, barriers, code_scales = stages * DEVICE["kSlotScales"] * 4, stages * 16, groups * 4
    return ring + sums + codes + routed + scales + barriers + code_scales


def test_stages_fill_shared_memory_in_whole_laps_of_the_teams():
    served = [call for call in CALLS if experts_single.fits(*call)]
    assert 50 < len(served) < len(CALLS)
    for call in served:
        stages = experts_single.num_stages(*call)
        # All laps of a stage must be one team's, and no more than a thread may prepare each stage's barriers.
        assert stages % DEVICE["kTeams"] == 0 and DEVICE["kWindow"] <= stages <= DEVICE["kThreads"], call
        assert shared_bytes(stages, *call) <= MAX_SHARED_BYTES < shared_bytes(stages + DEVICE["kTeams"], *call), call


def test_what_does_not_fit():
    assert experts_single.fits(8, 16, 2048, 128) and not experts_single.fits(8, 17, 2048, 128)
    assert experts_single.fits(8, 8, 2048, 768) and not experts_single.fits(9, 8, 2048, 768)
    # Codes of all pairs' h, or of all tokens' x, leave too little for weights.
    assert not experts_single.fits(8, 8, 7168, 4096) and not experts_single.fits(8, 1, 18432, 128)
    assert experts_single.num_stages(8, 16, 7168, 8192) == 0


def test_workspace_is_h_of_all_pairs():
    assert experts_single.experts_single_workspace_bytes(4, 8, 768) == 4 * 8 * 768 * 4
