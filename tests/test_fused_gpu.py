"""RMSNorm and SiLU-and-multiply that write codes, alone and in front of a linear, on a GPU and against float64."""

from __future__ import annotations

import pytest
import torch

from fp8_backend.kernels import fused_linear, gemm, heuristics, launcher, layout, norm, norm_rope, reference, silu
from fp8_backend.kernels.prepared import Prepared
from fp8_backend.kernels.problem import GemmProblem
from fp8_backend.kernels.reference import BLOCK, align, ceil_div

pytestmark = pytest.mark.gpu

EPSILON = 1e-6
BF16_ERROR = 0.004
CODE_ERROR = 1 / 16  # half a unit of e4m3 relative to its value; of the smallest ones 2^-10
HALF_A_UNIT_OF_F16 = 2**-25  # of its smallest numbers, which rows that are not 0 come down to
POISON = 0x55
# Of models, of no whole block, of no multiple of 8, the longest.
WIDTHS = [2048, 4096, 5120, 7168, 1000, 1029, 128, 8200, 16384]
TOKENS = [1, 2, 7, 8, 9, 33, 64, 65, 129, 300]


def make_x(m, k, dtype=torch.bfloat16, seed=1):
    generator = torch.Generator("cuda").manual_seed(seed)
    rows = torch.randn(m, k, generator=generator, device="cuda")
    return (rows * torch.rand(m, 1, generator=generator, device="cuda") * 10).to(dtype)


def make_weight(n, k, seed=0):
    generator = torch.Generator("cuda").manual_seed(seed)
    codes = (torch.randn(n, k, generator=generator, device="cuda") * 60).clamp(-448, 448).to(torch.float8_e4m3fn)
    scale = torch.rand(ceil_div(n, BLOCK), ceil_div(k, BLOCK), generator=generator, device="cuda") * 1e-3 + 1e-4
    return codes, scale, (layout.pack_weight(codes), layout.pack_scale(scale, n, k))


def poisoned(*shape, dtype=torch.uint8):
    """Return a tensor of bytes that no kernel writes by chance, with as many again before and behind it."""
    count = torch.Size(shape).numel() * dtype.itemsize
    memory = torch.full((align(count, 128) + 256,), POISON, dtype=torch.uint8, device="cuda")
    return memory, memory[128 : 128 + count].view(dtype).view(shape)


def assert_surroundings(memory, view):
    count = view.numel() * view.element_size()
    assert (memory[:128] == POISON).all() and (memory[128 + count :] == POISON).all()


def assert_codes(codes, scale, expected, units):
    """Assert that codes are within half a unit of e4m3 of float64 rows, and `units` roundings of 2^-8 before that."""
    k = expected.shape[1]
    assert (codes[:, k:].view(torch.uint8) == 0).all()
    found = reference.dequantize(codes[:, :k], scale, 1, torch.float64)
    smallest = scale.double().repeat_interleave(BLOCK, 1)[:, :k] * 2**-10 * 1.01 + units * HALF_A_UNIT_OF_F16
    assert ((found - expected).abs() <= expected.abs() * (CODE_ERROR + units * 2**-8) + smallest).all()


def truth_of_norm(x, residual, weight):
    rows = x.double() if residual is None else x.double() + residual.double()
    return rows, rows / (rows.square().mean(dim=1, keepdim=True) + EPSILON).sqrt() * weight.double()


@pytest.mark.parametrize("k", WIDTHS)
@pytest.mark.parametrize("m", TOKENS)
@pytest.mark.parametrize(("dtype", "adds"), [(torch.bfloat16, True), (torch.bfloat16, False), (torch.float16, True)])
def test_rms_norm_quant(m, k, dtype, adds):
    x, residual = make_x(m, k, dtype), make_x(m, k, dtype, seed=2) if adds else None
    weight = torch.rand(k, device="cuda").to(dtype) + 0.5
    sums, expected = truth_of_norm(x, residual, weight)
    made = norm.rms_norm_quant(x, residual, weight, EPSILON, keep=True)
    assert_codes(made.codes, made.scale, expected, 2)
    assert reference.relative_error(made.normed, expected) < BF16_ERROR
    codes, scale = reference.per_token_group_quant(made.normed)
    assert torch.equal(codes.view(torch.uint8), made.codes.view(torch.uint8)) and torch.equal(scale, made.scale)
    assert made.scale.stride() == (1, align(m, 4))
    if adds:
        assert torch.equal(made.summed, sums.float().to(dtype))
    for _ in range(3):
        again = norm.rms_norm_quant(x, residual, weight, EPSILON)
        assert again.normed is None and torch.equal(again.codes.view(torch.uint8), made.codes.view(torch.uint8))
        assert torch.equal(again.scale, made.scale)
        assert again.summed is None if residual is None else torch.equal(again.summed, made.summed)
    alone = norm.rms_norm_quant(x[-1:], None if residual is None else residual[-1:], weight, EPSILON)
    assert torch.equal(alone.codes.view(torch.uint8), made.codes[-1:].view(torch.uint8))


@pytest.mark.parametrize("strided", [0, 3, 8])
def test_rows_with_a_stride(strided):
    m, k = 37, 4096
    x, residual = (make_x(m, k + 16, seed=seed)[:, strided : strided + k] for seed in (1, 2))
    weight = make_x(1, k + 3)[0, min(strided, 3) :][:k]
    made = norm.rms_norm_quant(x, residual, weight, EPSILON, keep=True)
    contiguous = (each.clone(memory_format=torch.contiguous_format) for each in (x, residual, weight))
    expected = norm.rms_norm_quant(*contiguous, EPSILON, keep=True)
    for one, other in zip(made, expected, strict=True):
        assert torch.equal(one.view(torch.uint8), other.view(torch.uint8)) if one.is_contiguous() else one.equal(other)


@pytest.mark.parametrize("k", [width for width in WIDTHS if width <= 8200] + [12288])
@pytest.mark.parametrize("m", TOKENS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_silu_mul_quant(m, k, dtype):
    x = make_x(m, 2 * k, dtype)
    gate, up = x.double().chunk(2, dim=1)
    codes, scale = silu.silu_mul_quant(x)
    assert_codes(codes, scale, gate * gate.sigmoid() * up, 1)
    assert scale.stride() == (1, align(m, 4))
    for _ in range(3):
        again = silu.silu_mul_quant(x)
        assert torch.equal(codes.view(torch.uint8), again[0].view(torch.uint8)) and torch.equal(scale, again[1])


# Rows and tiles, into memory whose surroundings must stay as they are, and with them the rows past m of a tile.
@pytest.mark.parametrize("tile_rows", [0, 16, 64])
@pytest.mark.parametrize("k", [1000, 4096, 12288])
def test_nothing_else_is_written(k, tile_rows):
    m, k_blocks, stream = 13, ceil_div(k, BLOCK), launcher.current_stream(0)
    x, weight = make_x(m, 2 * k), torch.rand(k, device="cuda").bfloat16()
    rows, gate = norm.Rows(x[:, :k], x[:, k:], weight, True), silu.halved(x)
    memories, views = zip(*(poisoned(m, k, dtype=torch.bfloat16) for _ in range(2)), strict=True)
    rows.summed, rows.normed = views
    for launch, pointers, expected in (
        (
            rows.prepare(EPSILON)(rows.x, tile_rows),
            rows.pointers(),
            norm.rms_norm_quant(x[:, :k], x[:, k:], weight, EPSILON),
        ),
        (silu.prepare(gate, tile_rows), (gate.data_ptr(),), silu.silu_mul_quant(x)),
    ):
        code_memory, codes = poisoned(k_blocks, tile_rows or m, BLOCK)
        scale_memory, scale = poisoned(k_blocks, align(m, 4), dtype=torch.float32)
        launch(stream, *pointers, codes.data_ptr(), scale.data_ptr())
        if tile_rows:
            plain = layout.unpack_weight(codes.view(torch.float8_e4m3fn), tile_rows, k_blocks * BLOCK).view(torch.uint8)
            assert (codes[:, m:] == POISON).all()
        else:
            plain = codes.view(m, k_blocks * BLOCK)
        assert torch.equal(plain[:m], expected[0].view(torch.uint8)) and torch.equal(scale[:, :m].t(), expected[1])
        assert (scale[:, m:].contiguous().view(torch.uint8) == POISON).all()
        assert_surroundings(code_memory, codes)
        assert_surroundings(scale_memory, scale)
    for memory, view in zip(memories, views, strict=True):
        assert_surroundings(memory, view)


@pytest.mark.parametrize("m", [0, *TOKENS, 17, 32, 1000])
@pytest.mark.parametrize(("n", "k"), [(6144, 4096), (4096, 12288), (2112, 7168), (200, 1000), (513, 2048)])
@pytest.mark.parametrize("biased", [False, True])
def test_linear_behind_a_norm_and_behind_silu(m, n, k, biased):
    codes, scale, packed = make_weight(n, k)
    x, norm_weight = make_x(m, 2 * k), torch.rand(k, device="cuda").bfloat16()
    bias = make_x(1, n)[0] if biased else None
    hidden, residual = x[:, :k], x[:, k:]
    y, summed, normed = fused_linear.rms_norm_linear(hidden, residual, norm_weight, EPSILON, *packed, n, bias, True)
    z = fused_linear.silu_mul_linear(x, *packed, n, bias)
    assert y.shape == z.shape == (m, n) and summed.shape == normed.shape == (m, k)
    if not m:
        return
    made = norm.rms_norm_quant(hidden, residual, norm_weight, EPSILON, True)
    assert torch.equal(made.summed, summed) and torch.equal(made.normed, normed)
    for out, a in ((y, made[:2]), (z, silu.silu_mul_quant(x))):
        expected = reference.fp8_gemm_nt(a[0][:, :k], a[1], codes, scale, bias, torch.float64)
        assert reference.relative_error(out, expected) < BF16_ERROR
    for _ in range(3):
        again, *_ = fused_linear.rms_norm_linear(hidden, residual, norm_weight, EPSILON, *packed, n, bias)
        assert torch.equal(again, y) and torch.equal(fused_linear.silu_mul_linear(x, *packed, n, bias), z)


def test_batch_invariant(monkeypatch):
    n, k = 4096, 4096
    *_, packed = make_weight(n, k)
    x, weight = make_x(300, k), torch.rand(k, device="cuda").bfloat16()
    monkeypatch.setattr(fused_linear.backend, "batch_invariant", lambda: True)
    monkeypatch.setattr(fused_linear, "_plans", Prepared())
    whole, *_ = fused_linear.rms_norm_linear(x, None, weight, EPSILON, *packed, n)
    for m in (1, 8, 30, 64, 65, 200):
        part, *_ = fused_linear.rms_norm_linear(x[:m], None, weight, EPSILON, *packed, n)
        assert torch.equal(part, whole[:m]), m


# The four linears of a layer, captured and replayed: each kernel starts while the one before it still runs.
@pytest.mark.parametrize("m", [1, 8, 16, 40, 64, 96])
def test_a_layer_in_a_graph(m):
    hidden, intermediate = 2048, 6144
    weights = {name: make_weight(n, k, seed)[2] for seed, (name, n, k) in enumerate(
        [("qkv", 3072, hidden), ("out", hidden, 3072), ("up", 2 * intermediate, hidden), ("down", hidden, intermediate)]
    )}  # fmt: skip
    norms = [torch.rand(hidden, device="cuda").bfloat16() + 0.5 for _ in range(2)]
    x, residual = make_x(m, hidden), make_x(m, hidden, seed=3)

    def layer(x, residual):
        y, residual, _ = fused_linear.rms_norm_linear(x, residual, norms[0], EPSILON, *weights["qkv"], 3072)
        y = gemm.fp8_linear(y, *weights["out"], hidden)
        y, residual, _ = fused_linear.rms_norm_linear(y, residual, norms[1], EPSILON, *weights["up"], 2 * intermediate)
        return fused_linear.silu_mul_linear(y, *weights["down"], hidden), residual

    def layers(x, residual):
        for _ in range(6):
            x, residual = layer(x, residual)
        return x, residual

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        layers(x, residual)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            out = layers(x, residual)
        for seed in range(20):
            x.copy_(make_x(m, hidden, seed=seed))
            expected = [each.clone() for each in layers(x, residual)]
            for each in out:
                each.fill_(float("nan"))
            graph.replay()
            torch.cuda.synchronize()
            assert all(map(torch.equal, out, expected)), seed


def test_every_kernel_that_may_be_chosen():
    """Every choice for a few shapes, at each number of tokens up to 64 and at some beyond."""
    seen = set()
    for n, k in ((576, 2048), (6144, 1024), (1024, 6144)):
        codes, scale, packed = make_weight(n, k)
        x, weight = make_x(300, k), torch.rand(k, device="cuda").bfloat16()
        for m in (*range(1, 65), 65, 100, 128, 200, 256, 300):
            seen.add(heuristics.select(GemmProblem(m, n, k, gemm.machine(0)), heuristics.JOINED_CODES).config)
            y, *_ = fused_linear.rms_norm_linear(x[:m], None, weight, EPSILON, *packed, n)
            q, s = norm.rms_norm_quant(x[:m], None, weight, EPSILON)[:2]
            expected = reference.fp8_gemm_nt(q, s, codes, scale, dtype=torch.float64)
            assert reference.relative_error(y, expected) < BF16_ERROR, (m, n, k)
    assert len(seen) > 4


def heads_of(m, query_heads, key_heads, head, dtype=torch.bfloat16, behind=0):
    """Return what `norm_rope.qk_norm_rope` takes, and what float64 makes of it."""
    rows = make_x(m, (query_heads + key_heads) * head + behind, dtype)
    weights = [torch.rand(head, device="cuda").to(dtype) + 0.5 for _ in range(2)]
    angles = torch.arange(3000, device="cuda")[:, None] / 1e6 ** torch.linspace(0, 1, head // 2, device="cuda")
    cosines = torch.cat([angles.cos(), angles.sin()], dim=1).to(dtype)
    positions = torch.randint(0, 3000, (m,), device="cuda")
    return (rows, positions, *weights, cosines, EPSILON, query_heads, key_heads)


def truth_of_heads(rows, positions, query_weight, key_weight, cosines, epsilon, query_heads, key_heads):
    head = query_weight.shape[0]
    cosine, sine = cosines.double()[positions][:, None].chunk(2, dim=-1)
    expected, first = [], 0
    for heads, weight in ((query_heads, query_weight), (key_heads, key_weight)):
        part = rows[:, first : first + heads * head].reshape(-1, head)
        one, other = truth_of_norm(part, None, weight)[1].reshape(len(rows), heads, head).chunk(2, dim=-1)
        expected.append(torch.cat([one * cosine - other * sine, other * cosine + one * sine], dim=-1))
        first += heads * head
    return expected


# Qwen3-8B, Qwen3-30B-A3B, its part of 4 ranks; heads of one and of four pairs a lane, of no power of two, in rows that
# pairs do not fit.
@pytest.mark.parametrize(
    ("query_heads", "key_heads", "head", "behind"),
    [(32, 8, 128, 1024), (32, 4, 128, 512), (8, 1, 128, 128), (4, 4, 64, 0), (3, 2, 256, 1), (5, 1, 100, 3)],
)
@pytest.mark.parametrize("m", [1, 2, 7, 33, 300])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_qk_norm_rope(m, query_heads, key_heads, head, behind, dtype):
    arguments = heads_of(m, query_heads, key_heads, head, dtype, behind)
    found = norm_rope.qk_norm_rope(*arguments)
    for one, expected in zip(found, truth_of_heads(*arguments), strict=True):
        assert one.shape == expected.shape and one.is_contiguous()
        # Rounding alone: 0.0017 and 0.0002 on average, 0.0021 of one key of 128 elements.
        assert reference.relative_error(one, expected) < (0.0025 if dtype == torch.bfloat16 else 0.0003)
    for _ in range(3):
        assert all(map(torch.equal, norm_rope.qk_norm_rope(*arguments), found))


# FlashAttention's cache in both orders of its memory, in one of whose blocks several tokens lie; padding behind the
# last token, and tokens that have no slot.
@pytest.mark.parametrize("heads_first", [False, True])
@pytest.mark.parametrize(("m", "query_heads", "key_heads", "head"), [(1, 32, 8, 128), (33, 8, 1, 128), (70, 3, 2, 256)])
def test_keys_and_values_are_written_to_the_cache(m, query_heads, key_heads, head, heads_first):
    arguments = heads_of(m, query_heads, key_heads, head, behind=key_heads * head)
    slots = torch.randperm(12 * 16, device="cuda")[: max(1, m - 3)]
    slots[1::5] = -1
    caches = []
    for _ in range(2):
        whole = torch.full((12, key_heads, 16, 2 * head), POISON, dtype=torch.bfloat16, device="cuda")
        whole = whole if heads_first else whole.transpose(1, 2).contiguous().transpose(1, 2)
        caches.append((whole, *whole.transpose(1, 2).split(head, dim=-1)))
    found = norm_rope.qk_norm_rope(*arguments, norm_rope.KeyValueCache(*caches[0][1:], slots))
    alone = norm_rope.qk_norm_rope(*arguments)
    assert all(map(torch.equal, found, alone))
    first = (query_heads + key_heads) * head
    values = arguments[0][:, first : first + key_heads * head].unflatten(1, (key_heads, head))
    reference.keep(alone[1], values, *caches[1][1:], slots)
    assert torch.equal(caches[0][0], caches[1][0])


@pytest.mark.parametrize("m", [1, 16, 64, 256])
def test_heads_wait_for_the_linear_that_gives_them(m):
    """The kernel starts before the linear has ended: in a graph, what it reads must be this replay's."""
    _, _, packed = make_weight(6144, 2048)
    x = make_x(m, 2048)
    _, positions, *others = heads_of(m, 32, 8, 128)

    def step():
        return norm_rope.qk_norm_rope(gemm.fp8_linear(x, *packed, 6144), positions, *others)

    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        made = [step() for _ in range(8)]
    for seed in range(5):
        x.copy_(make_x(m, 2048, seed=seed + 7))
        rows = gemm.fp8_linear(x, *packed, 6144)
        torch.cuda.synchronize()
        expected = norm_rope.qk_norm_rope(rows, positions, *others)
        for each in made:
            for tensor in each:
                tensor.fill_(float("nan"))
        graph.replay()
        torch.cuda.synchronize()
        assert all(torch.equal(one, other) for each in made for one, other in zip(each, expected, strict=True))
