"""Kernels on trial compile without spills and are right on the emulated machine, before a GPU spends time on them."""

from __future__ import annotations

import shutil
from functools import partial

import pytest
import torch

from benchmarks.trials import experts_rows, panel, rows
from fp8_backend.kernels import gemm, layout, reference
from fp8_backend.kernels.compiler import compile_kernel
from fp8_backend.kernels.problem import Machine
from fp8_backend.kernels.reference import BLOCK, ceil_div
from tests.emulation import HERE, emulated
from tests.test_device_code import make_experts

MACHINE = Machine(2, (1, 1, 1))
needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++ to compile device code for the CPU")


@pytest.mark.parametrize("config", panel.CONFIGS, ids=str)
def test_panels_compile(config, tmp_path):
    compiled = compile_kernel(config.spec(panel.sources(tmp_path)))
    assert (compiled.spill_bytes, compiled.stack_bytes, compiled.warnings) == (0, 0, ())
    assert 3 <= config.num_stages <= panel.MAX_STAGES


# Panels that end in the middle of a scale block and of the weight, several a CTA; more k-blocks than stages.
@needs_compiler
@pytest.mark.parametrize("config", [each for each in panel.CONFIGS if each.columns in (64, 96, 112)], ids=str)
def test_panels_are_right(config, tmp_path):
    torch.manual_seed(config.columns)
    m, n, k = 37, 5 * 96 + 8, (config.num_stages * config.split + 2) * BLOCK - 8
    codes = (torch.randn(n, k) * 60).clamp(-448, 448).to(torch.float8_e4m3fn)
    scale = torch.rand(ceil_div(n, BLOCK), ceil_div(k, BLOCK)) * 1e-3 + 1e-4
    weight = gemm.Weight(layout.pack_weight(codes), layout.pack_scale(scale, n, k), n, k)
    x = torch.randn(m, k, dtype=torch.bfloat16)
    q, s = reference.per_token_group_quant(x)
    expected = reference.fp8_gemm_nt(q[:, :k], s, codes, scale)
    folder = panel.sources(tmp_path / "sources")
    (folder / "wgmma_columns.cuh").write_text("")  # the emulated wgmma has every N
    with emulated(tmp_path, MACHINE) as machine:
        kernel = machine.load(config.spec(folder), panel.LAYOUT)
        for machine.seed in (0, 1):
            out = torch.full((m, n), float("nan"), dtype=torch.bfloat16)
            panel.PanelPlan(config, kernel, x, out)(x, weight, out)
            assert reference.relative_error(out, expected) < 0.002


@pytest.mark.parametrize("rows", experts_rows.ROWS)
def test_experts_rows_compile(rows, tmp_path):
    compiled = compile_kernel(experts_rows.spec(rows, experts_rows.sources(tmp_path)))
    assert (compiled.spill_bytes, compiled.stack_bytes, compiled.warnings) == (0, 0, ())


# Units of several chunks of rows, skipped ids, tiles of more and of fewer than 64 rows of the weight.
@needs_compiler
@pytest.mark.parametrize(("m", "hidden"), [(3, 272), (20, 264), (20, 640)])
def test_experts_rows_are_right(m, hidden, tmp_path):
    torch.manual_seed(m)
    intermediate, num_groups, top_k = 256, 4, 2
    w13, scale_13, *packed_13 = make_experts(num_groups, 2 * intermediate, hidden)
    w2, scale_2, *packed_2 = make_experts(num_groups, hidden, intermediate)
    x, weights = torch.randn(m, hidden, dtype=torch.bfloat16), torch.rand(m, top_k)
    ids = torch.rand(m, num_groups).topk(top_k, dim=1).indices.int()
    ids[0] = -1
    expected = reference.fp8_experts(x, weights, ids, w13, scale_13, w2, scale_2)
    folder = experts_rows.sources(tmp_path / "sources")
    with emulated(tmp_path, MACHINE) as machine:
        for machine.seed in (0, 1):
            out = torch.full_like(x, float("nan"))
            kernel = partial(_load, machine, folder)
            experts_rows.run(kernel, x, weights, ids, *packed_13, *packed_2, out)
            assert reference.relative_error(out, expected) < 0.008 and (out[0] == 0).all()


def _load(machine, folder, rows):
    return machine.load(experts_rows.spec(rows, folder), experts_rows.LAYOUT)


def test_rows_compile(tmp_path):
    compiled = compile_kernel(rows.spec(rows.sources(tmp_path)))
    assert (compiled.spill_bytes, compiled.stack_bytes, compiled.warnings) == (0, 0, ())


# Fewer k-blocks than warps, and so many that a warp loads behind what it had ahead; rows past the last; k of no block.
@needs_compiler
@pytest.mark.parametrize(("m", "n", "k"), [(1, 500, 200), (3, 84, 84 * BLOCK - 8), (8, 136, 13 * BLOCK)])
def test_rows_are_right(m, n, k, tmp_path):
    torch.manual_seed(m)
    codes = (torch.randn(n, k) * 60).clamp(-448, 448).to(torch.float8_e4m3fn)
    scale = torch.rand(ceil_div(n, BLOCK), ceil_div(k, BLOCK)) * 1e-3 + 1e-4
    weight = gemm.Weight(layout.pack_weight(codes), layout.pack_scale(scale, n, k), n, k)
    x = torch.randn(m, k, dtype=torch.bfloat16)
    q, s = reference.per_token_group_quant(x)
    expected = reference.fp8_gemm_nt(q[:, :k], s, codes, scale)
    folder = rows.sources(tmp_path / "sources")
    shutil.copy(HERE / "mma.cuh", folder)
    with emulated(tmp_path, MACHINE) as machine:
        out = torch.full((m, n), float("nan"), dtype=torch.bfloat16)
        rows.RowsPlan(machine.load(rows.spec(folder), rows.LAYOUT), x, out)(x, weight, out)
    assert reference.relative_error(out, expected) < 0.002
