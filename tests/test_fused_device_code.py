"""RMSNorm and SiLU-and-multiply that write codes, alone and before a linear, on the emulated multiprocessor."""

from __future__ import annotations

import shutil

import pytest
import torch

from fp8_backend.errors import ArgumentError
from fp8_backend.kernels import fused_linear, heuristics, launcher, layout, norm, norm_rope, reference, silu
from fp8_backend.kernels.problem import MAX_SHARED_BYTES, GemmProblem, Machine
from fp8_backend.kernels.reference import BLOCK, align, ceil_div
from tests.emulation import emulated

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++ to compile the device code for the CPU")
MACHINE = Machine(8, (4, 2, 1))
EPSILON = 1e-6
CODE_ERROR = 1 / 16  # half a unit of e4m3 relative to its value; of the smallest ones 2^-10
BF16_ERROR = 0.002  # rounding of the output: 0.0017


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("device-code")


def make_x(m, k, dtype=torch.bfloat16):
    return (torch.randn(m, k) * torch.rand(m, 1) * 10).to(dtype)


def make_weight(n, k):
    codes = (torch.randn(n, k) * 60).clamp(-448, 448).to(torch.float8_e4m3fn)
    return codes, torch.rand(ceil_div(n, BLOCK), ceil_div(k, BLOCK)) * 1e-3 + 1e-4


def normed_in_float64(x, residual, weight):
    """Return what no rounding has touched: the sums and the normalised rows."""
    rows = x.double() if residual is None else x.double() + residual.double()
    return rows, rows / (rows.square().mean(dim=1, keepdim=True) + EPSILON).sqrt() * weight.double()


def assert_codes(codes, scale, expected, units):
    """Assert that codes are within half a unit of e4m3 of float64 rows, and `units` roundings of 2^-8 before that."""
    m, k = expected.shape
    assert (codes.shape, scale.shape) == ((m, align(k, BLOCK)), (m, ceil_div(k, BLOCK)))
    assert scale.stride() == (1, align(m, 4)) and (codes[:, k:].float() == 0).all()
    found = reference.dequantize(codes[:, :k], scale, 1, torch.float64)
    smallest = scale.double().repeat_interleave(BLOCK, 1)[:, :k] * 2**-10
    assert ((found - expected).abs() <= expected.abs() * (CODE_ERROR + units * 2**-8) + smallest * 1.01).all()


def surrounded(m, k, dtype):
    """Return rows of k that other data lies between, and that 16-byte loads cannot take."""
    return torch.full((m, k + 3), float("nan"), dtype=dtype)[:, 2 : k + 2]


# Columns of no whole block, of no multiple of 8, of one block, of more parts than there are threads; aligned and not.
@pytest.mark.parametrize(("m", "k"), [(1, 128), (3, 1000), (2, 1029), (5, 2048), (2, 8320)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("adds", [False, True])
def test_rms_norm_quant(m, k, dtype, adds, folder):
    torch.manual_seed(m + k)
    x, residual, weight = make_x(m, k, dtype), make_x(m, k, dtype) if adds else None, torch.rand(k).to(dtype) + 0.5
    if m == 3:  # rows that vectors do not fit
        x = surrounded(m, k, dtype).copy_(x)
    before = x.clone()
    sums, expected = normed_in_float64(x, residual, weight)
    with emulated(folder, MACHINE) as machine:
        made = norm.rms_norm_quant(x, residual, weight, EPSILON, keep=True)
        machine.seed = 1
        again = norm.rms_norm_quant(x, residual, weight, EPSILON)
    assert_codes(made.codes, made.scale, expected, 2)
    assert reference.relative_error(made.normed, expected) < BF16_ERROR * 1.5
    assert torch.equal(x, before)
    assert again.normed is None and torch.equal(made.codes.view(torch.uint8), again.codes.view(torch.uint8))
    assert torch.equal(made.scale, again.scale)
    # What is kept and what is quantised are the same rows.
    codes, scale = reference.per_token_group_quant(made.normed)
    assert torch.equal(codes.view(torch.uint8), made.codes.view(torch.uint8)) and torch.equal(scale, made.scale)
    if adds:
        assert torch.equal(made.summed, sums.to(dtype)) and torch.equal(again.summed, made.summed)
    else:
        assert made.summed is None


def test_rms_norm_of_reference_is_the_kernels(folder):
    torch.manual_seed(7)
    x, residual, weight = make_x(4, 4096), make_x(4, 4096), torch.randn(4096, dtype=torch.bfloat16)
    expected, summed = reference.rms_norm(x, residual, weight, EPSILON)
    with emulated(folder, MACHINE):
        made = norm.rms_norm_quant(x, residual, weight, EPSILON, keep=True)
    assert torch.equal(made.summed, summed)
    different = made.normed != expected  # by a sum of squares in another order
    assert different.float().mean() < 1e-3
    torch.testing.assert_close(made.normed, expected, rtol=2**-7, atol=0)


def test_rows_do_not_depend_on_the_rows_beside_them(folder):
    torch.manual_seed(8)
    x, weight = make_x(9, 640), torch.randn(640, dtype=torch.bfloat16)
    with emulated(folder, MACHINE):
        whole = norm.rms_norm_quant(x, None, weight, EPSILON)
        alone = norm.rms_norm_quant(x[4:5], None, weight, EPSILON)
    assert torch.equal(whole.codes[4:5].view(torch.uint8), alone.codes.view(torch.uint8))
    assert torch.equal(whole.scale[4:5], alone.scale)


def test_zeros_and_infinities(folder):
    x = torch.zeros(3, 256, dtype=torch.bfloat16)
    x[1, 5], x[2, 200] = float("inf"), float("nan")
    with emulated(folder, MACHINE):
        made = norm.rms_norm_quant(x, None, torch.ones(256, dtype=torch.bfloat16), EPSILON, keep=True)
    assert (made.codes[0].float() == 0).all() and (made.normed[0] == 0).all()
    assert made.normed[1, 5].isnan() and (made.normed[1, :5] == 0).all() and made.normed[2].isnan().all()


@pytest.mark.parametrize(("m", "k"), [(1, 128), (3, 1000), (6, 1029), (9, 384)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_silu_mul_quant(m, k, dtype, folder):
    torch.manual_seed(m + k)
    x = make_x(m, 2 * k, dtype)
    x[0, :4] = torch.tensor([-300.0, 300.0, -88.0, 0.0])
    if m == 3:
        x = surrounded(m, 2 * k, dtype).copy_(x)
    gate, up = x.double().chunk(2, dim=1)
    with emulated(folder, MACHINE) as machine:
        codes, scale = silu.silu_mul_quant(x)
        machine.seed = 1
        again = silu.silu_mul_quant(x)
    assert_codes(codes, scale, gate * gate.sigmoid() * up, 1)
    assert torch.equal(codes.view(torch.uint8), again[0].view(torch.uint8)) and torch.equal(scale, again[1])


# Into the tiles that decode kernels read: the same codes, swizzled, and nothing in rows without a token.
def test_tiles(folder):
    torch.manual_seed(3)
    m, k, tokens = 5, 1000, 8
    x, weight = make_x(m, 2 * k), torch.rand(k).bfloat16()
    k_blocks, poison = ceil_div(k, BLOCK), 0x55
    with emulated(folder, MACHINE):
        normed = norm.rms_norm_quant(x[:, :k], None, weight, EPSILON)
        rows, gate = norm.Rows(x[:, :k], None, weight, False), silu.halved(x)
        launches = (
            (rows.prepare(EPSILON)(rows.x, tokens), rows.pointers(), normed[:2]),
            (silu.prepare(gate, tokens), (gate.data_ptr(),), silu.silu_mul_quant(x)),
        )
        for launch, pointers, (expected, expected_scale) in launches:
            codes = torch.full((k_blocks, tokens, BLOCK), poison, dtype=torch.uint8)
            scale = torch.full((k_blocks, align(m, 4)), float("nan"))
            launch(launcher.current_stream(0), *pointers, codes.data_ptr(), scale.data_ptr())
            plain = layout.unpack_weight(codes.view(torch.float8_e4m3fn), tokens, k_blocks * BLOCK)
            assert torch.equal(plain[:m].view(torch.uint8), expected.view(torch.uint8))
            assert torch.equal(scale[:, :m].t(), expected_scale)
            assert (codes[:, m:] == poison).all() and scale[:, m:].isnan().all()


# The whole way of a call, by decode kernels and by a GEMM, with and without what else is asked for.
@pytest.mark.parametrize(("m", "dtype"), [(1, torch.bfloat16), (20, torch.float16), (70, torch.bfloat16)])
@pytest.mark.parametrize("adds", [False, True])
def test_linear_behind_a_norm(m, dtype, adds, folder):
    torch.manual_seed(m)
    n, k = 136, 1000
    (codes, scale), x, bias = make_weight(n, k), make_x(m, k, dtype), torch.randn(n, dtype=dtype)
    residual, norm_weight = make_x(m, k, dtype) if adds else None, torch.rand(k).to(dtype)
    packed = layout.pack_weight(codes), layout.pack_scale(scale, n, k)
    with emulated(folder, MACHINE) as machine:
        made = norm.rms_norm_quant(x, residual, norm_weight, EPSILON, keep=True)
        runs = machine.runs
        y, summed, normed = fused_linear.rms_norm_linear(x, residual, norm_weight, EPSILON, *packed, n, bias, keep=True)
        assert machine.runs == runs + 2
        again, *_, nothing = fused_linear.rms_norm_linear(x, residual, norm_weight, EPSILON, *packed, n, bias)
    expected = reference.fp8_gemm_nt(made.codes[:, :k], made.scale, codes, scale, bias, torch.float64)
    assert reference.relative_error(y, expected) < BF16_ERROR
    assert torch.equal(y, again) and torch.equal(normed, made.normed) and nothing is None
    assert torch.equal(summed, made.summed) if adds else summed is None


@pytest.mark.parametrize(("m", "dtype"), [(1, torch.bfloat16), (20, torch.float16), (70, torch.bfloat16)])
def test_linear_behind_silu(m, dtype, folder):
    torch.manual_seed(m)
    n, k = 136, 1000
    (codes, scale), x = make_weight(n, k), make_x(m, 2 * k, dtype)
    packed = layout.pack_weight(codes), layout.pack_scale(scale, n, k)
    with emulated(folder, MACHINE) as machine:
        q, s = silu.silu_mul_quant(x)
        runs = machine.runs
        y = fused_linear.silu_mul_linear(x, *packed, n)
        assert machine.runs == runs + 2
        assert torch.equal(y, fused_linear.silu_mul_linear(x, *packed, n))
    expected = reference.fp8_gemm_nt(q[:, :k], s, codes, scale, dtype=torch.float64)
    assert reference.relative_error(y, expected) < BF16_ERROR


def test_a_kernel_that_quantises_by_itself_is_not_chosen_behind_another():
    for m in (1, 8, 33, 64, 65, 512):
        for n, k in ((6144, 4096), (24576, 4096), (4096, 12288), (512, 7168)):
            choice = heuristics.select(GemmProblem(m, n, k), heuristics.JOINED_CODES)
            assert not getattr(choice.config, "fused", False)
            assert heuristics.adds_in_order(heuristics.select(GemmProblem(m, n, k), heuristics.JOINED_CODES, True))


def heads_of(m, query_heads, key_heads, head, dtype=torch.bfloat16, behind=0):
    """Return what `norm_rope.qk_norm_rope` takes, and what float64 makes of it."""
    rows = make_x(m, (query_heads + key_heads) * head + behind, dtype)
    weights = [torch.rand(head).to(dtype) + 0.5 for _ in range(2)]
    angles = torch.arange(40)[:, None] / 1.7 ** torch.arange(head // 2)
    cosines, positions = torch.cat([angles.cos(), angles.sin()], dim=1).to(dtype), torch.randint(0, 40, (m,))
    cosine, sine = cosines.double()[positions][:, None].chunk(2, dim=-1)
    expected, first = [], 0
    for heads, weight in zip((query_heads, key_heads), weights, strict=True):
        part = rows[:, first : first + heads * head].reshape(-1, head)
        one, other = normed_in_float64(part, None, weight)[1].reshape(m, heads, head).chunk(2, dim=-1)
        expected.append(torch.cat([one * cosine - other * sine, other * cosine + one * sine], dim=-1))
        first += heads * head
    return (rows, positions, *weights, cosines, EPSILON, query_heads, key_heads), expected


# Halves of less than a warp's pairs, of as many, of twice as many, of no power of two; more heads than a CTA has warps;
# values behind them.
@pytest.mark.parametrize(
    ("m", "query_heads", "key_heads", "head"), [(1, 4, 1, 64), (3, 7, 2, 128), (2, 1, 1, 256), (5, 3, 3, 100)]
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_qk_norm_rope(m, query_heads, key_heads, head, dtype, folder):
    torch.manual_seed(head)
    behind = key_heads * head + m % 2  # rows of odd length: every second one is not aligned for pairs
    arguments, expected = heads_of(m, query_heads, key_heads, head, dtype, behind)
    rows = arguments[0]
    if m == 3:  # between other data, all of them two bytes off
        rows = surrounded(m, rows.shape[1], dtype)[:, :].copy_(rows)
    with emulated(folder, MACHINE):
        found = norm_rope.qk_norm_rope(rows, *arguments[1:])
    for one, other, by_reference in zip(found, expected, reference.qk_norm_rope(*arguments), strict=True):
        assert one.shape == other.shape and one.dtype == dtype and one.is_contiguous()
        assert reference.relative_error(one, other) < BF16_ERROR
        assert reference.relative_error(by_reference, other) < 3 * BF16_ERROR  # rounds every step


def make_cache(heads, head, dtype, blocks=3, block=4):
    """Return keys' and values' halves of a cache as vLLM's FlashAttention lays it out, and all of it."""
    whole = torch.full((blocks, block, heads, 2 * head), float("nan"), dtype=dtype)
    return *whole.split(head, dim=-1), whole


# Heads of fewer and more than a warp's pairs; tokens without a slot, and behind the last one; rows of odd length.
@pytest.mark.parametrize(("m", "query_heads", "key_heads", "head"), [(4, 3, 1, 64), (5, 2, 2, 100), (4, 1, 2, 256)])
def test_keys_and_values_are_written_to_the_cache(m, query_heads, key_heads, head, folder):
    torch.manual_seed(m)
    arguments, _ = heads_of(m, query_heads, key_heads, head, behind=key_heads * head + m % 2)
    slots = torch.tensor([7, -1, 0, 10])
    keys, values, whole = make_cache(key_heads, head, torch.bfloat16)
    with emulated(folder, MACHINE):
        queries, rotated = norm_rope.qk_norm_rope(*arguments, norm_rope.KeyValueCache(keys, values, slots))
        alone = norm_rope.qk_norm_rope(*arguments)
    assert torch.equal(queries, alone[0]) and torch.equal(rotated, alone[1])
    first = (query_heads + key_heads) * head
    of_rows = arguments[0][:, first : first + key_heads * head].unflatten(1, (key_heads, head))
    expected_keys, expected_values, expected = make_cache(key_heads, head, torch.bfloat16)
    for token, (block, row) in {0: (1, 3), 2: (0, 0), 3: (2, 2)}.items():
        expected_keys[block, row], expected_values[block, row] = alone[1][token], of_rows[token]
    assert torch.equal(whole.view(torch.int16), expected.view(torch.int16))  # and nothing else was touched
    by_reference = make_cache(key_heads, head, torch.bfloat16)
    reference.keep(alone[1], of_rows, *by_reference[:2], slots)
    assert torch.equal(by_reference[2].view(torch.int16), expected.view(torch.int16))


def test_caches_that_do_not_fit_are_refused():
    arguments, _ = heads_of(2, 2, 1, 64, behind=64)
    keys, values, _ = make_cache(1, 64, torch.bfloat16)
    slots = torch.tensor([1, 2])
    odd = torch.empty(3, 4, 1, 129, dtype=torch.bfloat16)[..., :64]
    for cache, rows in (
        ((keys[:, :, :, :32], values[:, :, :, :32], slots), None),
        ((keys.half(), values.half(), slots), None),
        ((odd, odd, slots), None),
        ((keys, values.contiguous(), slots), None),
        ((keys, values, torch.tensor([1, 2, 3])), None),
        ((keys, values, slots.int()), None),
        ((keys, values, slots), arguments[0][:, :-1]),
    ):
        given = arguments if rows is None else (rows, *arguments[1:])
        with pytest.raises(ArgumentError, match=r"kept: got|rows: got 255 columns"):
            norm_rope.qk_norm_rope(*given, norm_rope.KeyValueCache(*cache))


def test_norm_is_alone_before_a_gemm_of_few_rows():
    least = min(config.shared_bytes for config in heuristics.GEMM_CONFIGS)
    for m in (1, 17, 128):
        assert MAX_SHARED_BYTES - least < norm.shared_bytes(m, 0) < MAX_SHARED_BYTES
    assert norm.shared_bytes(129, 0) == norm.shared_bytes(8, 8) == 0
