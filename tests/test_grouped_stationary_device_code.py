"""The grouped GEMM whose weights stay, on an emulated multiprocessor."""

from __future__ import annotations

import shutil

import pytest
import torch

from fp8_backend.kernels import grouped_stationary, launcher, reference
from fp8_backend.kernels.grouped_stationary import StationaryConfig
from fp8_backend.kernels.problem import Machine
from fp8_backend.kernels.reference import BLOCK, align
from tests.emulation import emulated
from tests.routed import route
from tests.test_device_code import BF16_ERROR, make_experts

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++ to compile the device code for the CPU")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("grouped-stationary-device-code")


# Groups of no row, of a few, of a tile, of a few more, of several; as one CTA has them, and as several share them.
@pytest.mark.parametrize("counts", [(3,), (0, 64, 65, 0, 300, 1, 0), (130, 2, 63, 400)], ids=str)
@pytest.mark.parametrize(("k_blocks", "ctas", "extra_rows"), [(1, 2, 0), (2, 1, 16), (3, 3, 0), (6, 2, 16), (7, 5, 0)])
@pytest.mark.parametrize("warpgroups", [2, 3])
def test_rows_reach_their_entries(counts, k_blocks, ctas, extra_rows, warpgroups, folder, monkeypatch):
    if warpgroups == 3 and k_blocks > 3:
        pytest.skip("weights of so many k-blocks leave three warpgroups no stages")
    torch.manual_seed(k_blocks)
    n, k, num_groups = 264, k_blocks * BLOCK, len(counts)
    weight, scale, packed, packed_scale = make_experts(num_groups, n, k)
    ids = torch.cat(
        [torch.full((count,), i) for i, count in enumerate([*counts, 5])]
    ).int()  # the last ones have no group
    ids = ids[torch.randperm(len(ids))]
    dtype = torch.bfloat16 if k_blocks % 2 else torch.float16
    monkeypatch.setattr(grouped_stationary, "CONFIG", StationaryConfig(warpgroups, 4))
    with emulated(folder, Machine(ctas, (1, 1, 1))) as machine:
        for machine.seed in range(2):
            routed = route(ids, None, num_groups, extra_rows)
            words = routed.storage.view(torch.int32)
            order = words[(routed.sorted_entries - routed.storage.data_ptr()) // 4 :][: sum(counts)].long()
            a, scale_a = reference.per_token_group_quant(torch.randn(len(ids), k, dtype=torch.bfloat16))
            in_order, of_rows = a.view(torch.uint8)[order].contiguous(), scale_a[order]
            scales = torch.zeros(k_blocks, align(len(order), 4))
            scales[:, : len(order)] = of_rows.t()
            surroundings = torch.full((len(ids) + 2, n + 16), float("nan"), dtype=dtype)
            out = surroundings[1:-1, 8:-8]
            operands = in_order, scales[:, : len(order)], packed, packed_scale, out
            launch = grouped_stationary.launch_like(*operands, n, routed)
            of_routing = routed.sorted_entries, routed.tiles, routed.num_tiles, routed.ticket(1)
            launch(launcher.current_stream(0), *(operand.data_ptr() for operand in operands), 0, *of_routing)
            for group in range(num_groups):
                rows = ids == group
                if rows.any():
                    expected = reference.fp8_gemm_nt(a[rows], scale_a[rows], weight[group], scale[group])
                    assert reference.relative_error(out[rows], expected) < BF16_ERROR, group
            assert out[ids == num_groups].isnan().all()
            out.fill_(float("nan"))
            assert surroundings.isnan().all()
