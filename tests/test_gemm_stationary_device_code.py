"""The GEMM whose weights stay, on an emulated multiprocessor: right in any order of things; planted faults found."""

from __future__ import annotations

import shutil

import pytest
import torch

from fp8_backend.kernels import gemm, layout, reference
from fp8_backend.kernels.heuristics import STATIONARY_CONFIG, GemmChoice
from fp8_backend.kernels.reference import BLOCK
from tests.emulation import EmulationError, emulated
from tests.test_device_code import BF16_ERROR, MACHINE, make_weight, planted, truth

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++ to compile the device code for the CPU")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("stationary-device-code")


# Columns of tiles with one tile of rows and with several; runs of one tile, of some, of all, that one CTA has or more.
@pytest.mark.parametrize(("m", "n", "packed"), [(20, 1100, True), (140, 648, True), (600, 136, False)])
@pytest.mark.parametrize("k_blocks", [1, 2, 3, 4, 6])
def test_stationary_weights(m, n, packed, k_blocks, folder):
    torch.manual_seed(m + k_blocks)
    k = k_blocks * BLOCK - (8 if packed else 0)
    (codes, scale), x, bias = make_weight(n, k), torch.randn(m, k, dtype=torch.bfloat16), torch.randn(n)
    rows = layout.pack_weight(codes) if packed else codes
    weight = gemm.Weight(rows, layout.arrange_scale(scale, n, k), n, k)
    surroundings = torch.full((m + 2, n + 16), float("nan"), dtype=torch.bfloat16 if packed else torch.float32)
    out = surroundings[1:-1, 8:-8]
    with emulated(folder, MACHINE) as machine:
        for machine.seed, (run, grid) in enumerate([(1, 1), (2, 2), (3, 5), (99, 1)]):
            choice = GemmChoice(STATIONARY_CONFIG, run, grid)
            gemm.launch_gemm(choice, *reference.per_token_group_quant(x), weight, out, bias)
            assert reference.relative_error(out, truth(x, codes, scale, bias)) < BF16_ERROR
            out.fill_(float("nan"))
            assert surroundings.isnan().all()


# What is planted; four columns of five tiles each, by one CTA.
FAULTS = {
    "a stage is filled before it is free": ("barrier_wait(empty + 8 * s, ring.parity ^ 1);", ""),
    "a stage is read at once": ("barrier_wait(own_full + 8 * s, ring.parity);", ""),
    "weights come before there is room": ("barrier_wait(weights_empty + 8 * slot, slots.parity ^ 1);", ""),
    "one warpgroup has read them": (
        "barrier_init(weights_empty + 8 * slot, kWarpgroups *",
        "barrier_init(weights_empty + 8 * slot, 1 *",
    ),
    "weights are read at once": ("if (fresh) barrier_wait(weights_full + 8 * slot, slots.parity);", ""),
    "weights are let go by the first tile": ("if (last) barrier_arrive_after", "if (fresh) barrier_arrive_after"),
    "a run without a tile is passed over": ("if (next >= count)", "if (false)"),
    "the next run begins with the first warpgroup": ("            next -= count;\n", "            next = turn;\n"),
    "outputs are laid out over those on their way": ("if (lane == 0) bulk_wait_read();", ""),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults_are_found(fault, folder, tmp_path):
    torch.manual_seed(3)
    m, n, k = 300, 400, 2 * BLOCK
    (codes, scale), x = make_weight(n, k), torch.randn(m, k, dtype=torch.bfloat16)
    weight = gemm.Weight(layout.pack_weight(codes), layout.pack_scale(scale, n, k), n, k)
    a, expected = reference.per_token_group_quant(x), truth(x, codes, scale)
    sources = planted(tmp_path, "gemm_stationary.cuh", *FAULTS[fault])
    out = torch.full((m, n), float("nan"), dtype=torch.bfloat16)
    with emulated(folder, MACHINE, sources) as machine, pytest.raises((AssertionError, EmulationError)):
        for run in (5, 1):
            for machine.seed in range(8):
                gemm.launch_gemm(GemmChoice(STATIONARY_CONFIG, run, 1), *a, weight, out, None)
                assert reference.relative_error(out, expected) < BF16_ERROR
