"""Both GEMMs of the experts in one launch, on an emulated multiprocessor: CTAs that wait for each other's tiles."""

from __future__ import annotations

import shutil

import pytest
import torch

from fp8_backend.kernels import experts, experts_joint, quantize, reference
from fp8_backend.kernels.problem import Machine
from tests.emulation import emulated
from tests.test_device_code import EXPERTS_ERROR, make_experts, planted

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++ to compile the device code for the CPU")

# Tokens, experts a token, columns of x and of h, experts, CTAs: more than 64 rows of an expert, so two tiles of its
# own; more experts than CTAs; a hidden size of no whole block and of half a tile; rings that are gone around more than
# once; more columns of h than of x.
CALLS = [
    (150, 2, 264, 256, 12, 3),
    (33, 8, 136, 128, 40, 2),
    (7, 3, 656, 384, 5, 4),
    (70, 1, 128, 128, 3, 1),
    (5, 2, 1032, 640, 3, 2),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("joint-device-code")


def make_call(m, top_k, hidden, intermediate, num_groups, seed=0):
    """Return a call with a crowded expert, tokens that name one twice, and one that names none; its answer."""
    torch.manual_seed(seed)
    w13, scale_13, *packed_13 = make_experts(num_groups, 2 * intermediate, hidden)
    w2, scale_2, *packed_2 = make_experts(num_groups, hidden, intermediate)
    x, weights = torch.randn(m, hidden, dtype=torch.bfloat16), torch.rand(m, top_k)
    ids = torch.rand(m, num_groups).topk(top_k, dim=1).indices.int()
    ids[: m // 2, 0] = num_groups // 2
    ids[1] = -1
    return (x, weights, ids, *packed_13, *packed_2), reference.fp8_experts(x, weights, ids, w13, scale_13, w2, scale_2)


def launch(given, form="joint"):
    out = torch.full_like(given[0], float("nan"))
    experts.launch(form, *given, out, None, False)
    return out


def launch_and_judge(machine, given, expected):
    """Return the answer, the same bits with CTAs one after the other and all at once."""
    outs = []
    for machine.seed, machine.at_once in ((0, False), (1, True)):
        outs.append(launch(given))
        assert reference.relative_error(outs[-1], expected) < EXPERTS_ERROR and (outs[-1][1] == 0).all()
    assert torch.equal(*outs)
    return outs[0]


@pytest.mark.parametrize("call", CALLS, ids=str)
def test_both_gemms_in_one_launch(call, folder):
    *sizes, ctas = call
    given, expected = make_call(*sizes)
    with emulated(folder, Machine(ctas, (1, 1, 1))) as machine:
        out = launch_and_judge(machine, given, expected)
        # The form for many rows adds the same products in the same order.
        assert torch.equal(out, launch(given, "prefill"))
        given[2].fill_(-1)
        assert (launch(given) == 0).all()


def cut_always(monkeypatch):
    monkeypatch.setattr(experts_joint, "CUT_ROUNDS", (0, 100))


# In two cuts and in three, behind whole rounds and without any.
@pytest.mark.parametrize("call", [(5, 2, 1032, 640, 3, 2), (6, 2, 1672, 128, 4, 13), (7, 3, 1104, 384, 5, 4)], ids=str)
def test_tiles_that_are_cut_in_k(call, folder, monkeypatch):
    cut_always(monkeypatch)
    *sizes, ctas = call
    given, expected = make_call(*sizes)
    with emulated(folder, Machine(ctas, (1, 1, 1))) as machine:
        launch_and_judge(machine, given, expected)
        assert ("CUTS", 1) in [define for spec, _ in machine.loaded for define in spec.defines]
        given[2].fill_(-1)
        assert (launch(given) == 0).all()


# Tokens, experts a token, columns of x and of h, experts, CTAs: many tiles; one, whose rows of h another CTA wants; one
# in two cuts.
MANY, ONE, CUT = (9, 2, 128, 384, 6, 1), (5, 1, 128, 128, 1, 2), (5, 1, 1024, 128, 1, 2)
PARTS = "wait_for_count(counters + 1 + part.tile, 2 * ceil_div(count, 16u) * first_columns);"
SUMS = "wait_for_count(counter, cut * 2 * ceil_div(count, 16u));"
# What is planted, and in which call it shows.
FAULTS = {
    "rows of h that are not there yet": (PARTS, ";", ONE),
    "half of a row of h is enough": (PARTS, PARTS.replace("2 *", ""), ONE),
    "largest magnitudes of the next tile": ("largest_turn ^= 2 * kTileRows;", "", MANY),
    "a ticket is overwritten before all have read it": (
        "barrier_wait(ticket_empty + 8 * at_ticket.stage, at_ticket.parity ^ 1);",
        "",
        MANY,
    ),
    "sums of a cut that are not there yet": (SUMS, ";", CUT),
    "a stage is filled before it is free": ("barrier_wait(empty + 8 * s, ring.parity ^ 1);", "", MANY),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults_are_found(fault, folder, tmp_path, monkeypatch):
    right, wrong, call = FAULTS[fault]
    *sizes, ctas = call
    if call is CUT:
        cut_always(monkeypatch)
    sources = planted(tmp_path, "experts_joint.cuh", right, wrong)
    with emulated(folder, Machine(ctas, (1, 1, 1)), sources, at_once=True) as machine, pytest.raises(AssertionError):
        for machine.seed in range(32):
            given, expected = make_call(*sizes, machine.seed)  # h of the call before has other values
            assert reference.relative_error(launch(given), expected) < EXPERTS_ERROR


def test_counters_are_zero_behind_the_scales(folder):
    """The GEMMs count in words that the quantisation makes zero, these and no more."""
    x, zeros = torch.randn(5, 200, dtype=torch.bfloat16), 300
    codes, scale = reference.per_token_group_quant(x)
    words = torch.full((2 * 8 + zeros + 4,), float("nan"))
    written = torch.empty(5, 256, dtype=torch.float8_e4m3fn)
    with emulated(folder, Machine(1, (1, 1, 1))):
        quantize.launch_like(x, zeros=zeros)(0, x.data_ptr(), written.data_ptr(), words.data_ptr())
    assert torch.equal(written.view(torch.uint8), codes.view(torch.uint8))
    assert torch.equal(words[:16].view(2, 8)[:, :5].t(), scale)
    assert not words[16 : 16 + zeros].any() and words[16 + zeros :].isnan().all()
