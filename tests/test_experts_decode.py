"""The experts op for few tokens and the masked grouped GEMM: sizes on any machine, results on a Hopper GPU."""

from __future__ import annotations

import pytest
import torch

from fp8_backend.kernels import experts_decode, layout, masked, reference
from fp8_backend.kernels.compiler import CUDA_FOLDER, compile_kernel
from fp8_backend.kernels.problem import MAX_SHARED_BYTES
from fp8_backend.kernels.reference import align, ceil_div
from tests.device_source import constants, parameter_kinds

# hidden, intermediate, experts, top_k: of Qwen3-30B, DeepSeek-V3 at TP8, Qwen3-235B at TP4, DeepSeek-V3
SHAPES = ((2048, 768, 128, 8), (7168, 256, 256, 8), (4096, 384, 128, 8), (7168, 2048, 256, 8))
SPECS = experts_decode.all_specs() + masked.all_specs()
RING_UNIT = 2  # kRingUnit of expert_units.cuh: below it a ring has no stage


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_no_spills_no_stack_no_warnings(spec):
    compiled = compile_kernel(spec)
    assert (compiled.spill_bytes, compiled.stack_bytes, compiled.warnings) == (0, 0, ())
    if dict(spec.defines).get("CTAS") == 2:
        assert compiled.registers * experts_decode.THREADS * 2 <= 65536


def test_the_set_is_bounded():
    assert len(SPECS) == len(set(SPECS)) <= 12


@pytest.mark.parametrize(
    ("file", "parameters"),
    [
        ("experts_up.cuh", experts_decode.UP_LAYOUT),
        ("experts_down.cuh", experts_decode._DOWN_LAYOUT),
        ("experts_quantize.cuh", experts_decode._QUANTIZE_LAYOUT),
        ("masked.cuh", masked.LAYOUT),
    ],
)
def test_launch_parameters_are_the_kernels(file, parameters):
    assert parameter_kinds(file) == parameters.kinds


def test_constants_shared_with_the_device_code():
    device = constants("expert_units.cuh")
    assert device["kThreads"] == experts_decode.THREADS
    assert device["kMaxStages"] * 16 == experts_decode.BARRIER_BYTES
    assert f"kRingUnit = ROWS == 128 ? 1 : {RING_UNIT};" in (CUDA_FOLDER / "expert_units.cuh").read_text()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("m", (1, 8, 9, 64))
@pytest.mark.parametrize("on_input", (False, True), ids=("", "on_input"))
def test_a_ring_keeps_enough_in_flight(shape, m, on_input):
    hidden, intermediate, num_groups, top_k = shape
    plan, pairs = experts_decode._plan(m, top_k, hidden, intermediate, on_input), m * top_k
    rows = experts_decode.down_rows(hidden, 132)
    widest = min(experts_decode.UP_TILE_GROUPS, ceil_div(pairs * intermediate // 8, 132)) * 2048
    up = plan.up.ring_bytes(plan.up_shared_bytes, num_groups, pairs)
    down = plan.down.ring_bytes(plan.down_shared_bytes, num_groups, m, pairs, rows)
    for ring, block, blocks, n in (
        (up, widest, hidden, plan.up.rows),
        (down, rows * 128, intermediate, plan.down.rows),
    ):
        depth = max(1, min(experts_decode._STAGE_BYTES // block, 4))
        blocks //= 128
        depth = ceil_div(blocks, ceil_div(blocks, depth))
        stages = min(64, ring // (depth * (block + n * 128 + (n + 4) * 4))) // RING_UNIT * RING_UNIT
        assert stages >= 4 and stages * depth * block >= 48 * 1024


def test_both_gemms_fit_a_multiprocessor_and_two_of_the_second_do_not():
    sm, reserved = 228 * 1024, 1024
    up, down = experts_decode._UP_SHARED_BYTES, experts_decode._DOWN_SHARED_BYTES
    assert up + down + 2 * reserved <= sm < 2 * (down + reserved)


@pytest.mark.parametrize("m", (1, 8))
def test_both_gemms_of_few_tokens_share_a_multiprocessor(m):
    plan = experts_decode._plan(m, 8, 2048, 768, False)
    shared = plan.up_shared_bytes, plan.down_shared_bytes
    assert shared == (experts_decode._UP_SHARED_BYTES, experts_decode._DOWN_SHARED_BYTES)
    registers = sum(align(compile_kernel(config.spec()).registers, 8) for config in (plan.up, plan.down))
    assert registers * experts_decode.THREADS <= 65536


def test_masked_fits_with_the_most_units():
    taken = experts_decode.BARRIER_BYTES + experts_decode.units_bytes(512, 0, masked.MAX_UNITS)
    assert MAX_SHARED_BYTES - taken >= 4 * 128 * (128 + 128 + 4)


@pytest.mark.parametrize("hidden", (8, 1000, 2048, 4096, 7168, 18432))
def test_every_row_of_the_output_has_one_owner(hidden):
    rows = experts_decode.down_rows(hidden, 132)
    assert rows % 8 == 0 and 8 <= rows <= 64
    assert (ceil_div(hidden, rows) - 1) * rows < hidden <= ceil_div(hidden, rows) * rows


def test_workspace_is_what_the_parts_need():
    m, top_k, hidden, intermediate = 33, 6, 1000, 256
    pairs = m * top_k
    x = align(m * 1024, 16) + align(m, 4) * 8 * 4
    h = pairs * intermediate * 5 + align(pairs, 4) * 2 * 4
    assert experts_decode.experts_decode_workspace_bytes(m, top_k, hidden, intermediate, 16) == x + h
    x = align(pairs * 1024, 16) + align(pairs, 4) * 8 * 4
    x += pairs * hidden * 4  # a row for each pair, at first in float32
    assert experts_decode.experts_decode_workspace_bytes(m, top_k, hidden, intermediate, 16, True) == x + h
    assert experts_decode.experts_decode_workspace_bytes(0, 8, 7168, 2048, 256) == 0


def experts(num_groups: int, n: int, k: int, seed: int) -> tuple[torch.Tensor, ...]:
    """Return codes and scales of weights [num_groups, n, k], plain, then packed."""
    generator = torch.Generator("cuda").manual_seed(seed)
    codes = (torch.randn(num_groups, n, k, device="cuda", generator=generator) * 50).to(torch.float8_e4m3fn)
    blocks = (num_groups, ceil_div(n, 128), ceil_div(k, 128))
    scale = (torch.rand(blocks, device="cuda", generator=generator) + 0.5) / 50 / k**0.5
    packed = torch.stack([layout.pack_weight(weight).view(torch.uint8) for weight in codes])
    packed_scale = torch.stack([layout.pack_scale(s, n, k) for s in scale])
    return codes, scale, packed.view(torch.float8_e4m3fn), packed_scale


def routing(m: int, top_k: int, num_experts: int, kind: str) -> torch.Tensor:
    ids = torch.stack([torch.randperm(num_experts, device="cuda")[:top_k] for _ in range(m)])
    if kind == "one expert":
        ids = torch.arange(top_k, device="cuda").expand(m, top_k).contiguous()
    elif kind == "repeated":
        ids = torch.randint(0, 2, (m, top_k), device="cuda")
    elif kind == "none":
        ids = torch.full_like(ids, -1)
    elif kind == "skipped":
        ids[torch.rand(m, top_k, device="cuda") < 0.4] = -1
    return ids


CASES = [
    *((m, 1024, 256, 16, 4, "random") for m in (1, 2, 3, 7, 8, 9, 16, 33, 64)),
    *((m, 7168, 256, 32, 8, "random") for m in (1, 4, 64)),
    *((m, 2048, 768, 32, 8, "random") for m in (1, 2, 8, 31)),
    *((m, 1000, 384, 8, 2, "random") for m in (1, 5, 20)),
    *((m, 1028, 128, 8, 2, "random") for m in (1, 17)),
    *((m, 512, 128, 16, 4, kind) for kind in ("one expert", "repeated", "none", "skipped") for m in (1, 8, 40)),
    (2, 18432, 128, 4, 2, "random"),
    (64, 512, 128, 600, 8, "random"),
]


make_workspace = experts_decode._workspace


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("on_input", (False, True), ids=("", "on_input"))
def test_experts_against_the_reference(case, on_input, monkeypatch):
    m, hidden, intermediate, num_experts, top_k, kind = case
    torch.manual_seed(m)
    local = num_experts // 2 if kind == "skipped" else num_experts
    expert_map = None
    if local < num_experts:
        expert_map = torch.full((num_experts,), -1, dtype=torch.int32, device="cuda")
        expert_map[torch.randperm(num_experts, device="cuda")[:local]] = torch.arange(
            local, dtype=torch.int32, device="cuda"
        )
    w13, scale_13, packed_13, packed_scale_13 = experts(local, 2 * intermediate, hidden, 1)
    w2, scale_2, packed_2, packed_scale_2 = experts(local, hidden, intermediate, 2)
    dtype = torch.float16 if m == 3 else torch.bfloat16
    x = torch.randn(m, hidden, device="cuda", dtype=dtype)
    ids = routing(m, top_k, num_experts, kind)
    weights = torch.rand(m, top_k, device="cuda")
    weights /= weights.sum(1, keepdim=True)
    kept = []
    monkeypatch.setattr(experts_decode, "_workspace", lambda *args: kept.append(make_workspace(*args)) or kept[-1])
    results = []
    for some_ids in (ids, ids.int(), ids):
        out = torch.full((m, hidden), float("nan"), dtype=dtype, device="cuda")
        experts_decode.experts_decode(
            x, weights, some_ids, packed_13, packed_scale_13, packed_2, packed_scale_2, out, expert_map, on_input
        )
        results.append(out)
    torch.cuda.synchronize()
    assert all(torch.equal(result, results[0]) for result in results)

    local_ids = ids if expert_map is None else torch.where(ids < 0, ids, expert_map.long()[ids.clamp_min(0)])
    pairs = [pair for _, pair in sorted((e, p) for p, e in enumerate(local_ids.flatten().tolist()) if e >= 0)]
    if not pairs:
        assert not results[0].any()
        return
    h = kept[0][: m * top_k * intermediate * 4].view(torch.float32).view(-1, intermediate)[: len(pairs)]
    expected_h, expected = torch.empty_like(h), torch.zeros(m, hidden, device="cuda")
    for row, pair in enumerate(pairs):
        token, expert = pair // top_k, int(local_ids.flatten()[pair])
        router = weights.flatten()[pair]
        one = x[token : token + 1].float() * (router if on_input else 1)
        gate, up = reference._quantised_linear(one, w13[expert], scale_13[expert], torch.float32).chunk(2, dim=1)
        expected_h[row] = (torch.nn.functional.silu(gate) * up)[0]
        # From h as it came out: a code that rounds to the other side, because the tensor core sums with fewer bits than
        # float32, is no error of the second GEMM.
        part = reference._quantised_linear(h[row : row + 1], w2[expert], scale_2[expert], torch.float32)[0]
        expected[token] += part * (1 if on_input else router)
    assert reference.relative_error(h, expected_h) < 1e-3
    assert reference.relative_error(results[0], expected) < 0.0025


@pytest.mark.gpu
@pytest.mark.parametrize(
    "case",
    [
        (8, 2, 256, 512, 2),
        (4, 16, 1000, 384, 16),
        (4, 64, 512, 2048, 64),
        (3, 100, 136, 128, 8),
        (4, 300, 512, 1024, 64),  # groups of several units, where one was guessed
        (2, 300, 512, 7168, 256),
    ],
    ids=str,
)
def test_masked_against_the_reference(case):
    num_groups, max_m, n, k, expected_m = case
    torch.manual_seed(max_m)
    codes, scale, packed, packed_scale = experts(num_groups, n, k, 3)
    x = torch.randn(num_groups * max_m, k, device="cuda")
    a, scale_a = reference.per_token_group_quant(x)
    a = a.view(num_groups, max_m, k)
    aligned = align(max_m, 4)
    scales = torch.zeros(num_groups, k // 128, aligned, device="cuda")
    scales[:, :, :max_m] = scale_a.reshape(num_groups, max_m, -1).transpose(1, 2)
    rows = torch.randint(0, max_m + 1, (num_groups,), dtype=torch.int32, device="cuda")
    rows[0], rows[-1] = max_m, 0
    out = torch.full((num_groups, max_m, n), float("nan"), dtype=torch.bfloat16, device="cuda")
    masked.launch_masked(a, scales.transpose(1, 2)[:, :max_m], packed, packed_scale, out, rows, expected_m)
    torch.cuda.synchronize()
    for group, count in enumerate(rows.tolist()):
        assert out[group, count:].isnan().all()
        if count:
            scale_of_group = scales[group, :, :count].t()
            expected = reference.fp8_gemm_nt(a[group, :count], scale_of_group, codes[group], scale[group])
            assert reference.relative_error(out[group, :count], expected) < 0.003
