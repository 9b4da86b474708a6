"""The experts op: against a float64 loop over tokens, packed, padded, split over ranks."""

from __future__ import annotations

import itertools
from typing import get_args

import pytest
import torch

import fp8_backend
from fp8_backend.errors import ArgumentError
from fp8_backend.kernels import layout
from fp8_backend.kernels.expert_weights import UnpackedCodes, UnpackedScales, pack_expert_scales, pack_experts
from fp8_backend.kernels.experts import HBM3, HBM3E, Form, FormLimits, can_serve, select_form
from fp8_backend.kernels.reference import BLOCK, dequantize, fp8_experts, relative_error
from fp8_backend.weights.experts import clear_padding, load_part
from fp8_backend.weights.partition import ExpertPart

EXPERTS, HIDDEN, INTERMEDIATE, TOP_K = 6, 192, 256, 2


def weights(n: int, k: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randn(EXPERTS, n, k, generator=generator).to(torch.float8_e4m3fn)
    return codes, torch.rand(EXPERTS, -(-n // BLOCK), -(-k // BLOCK), generator=generator) / 20 + 0.01


@pytest.fixture(scope="module")
def packed() -> tuple[torch.Tensor, ...]:
    return *weights(2 * INTERMEDIATE, HIDDEN, 1), *weights(HIDDEN, INTERMEDIATE, 2)


def expected(x, topk_weights, topk_ids, packed, position, on_input):
    w13, scale_13, w2, scale_2 = packed
    y = torch.zeros(x.shape, dtype=torch.float64)
    for token in range(x.shape[0]):
        for weight, expert in zip(topk_weights[token].double(), topk_ids[token].tolist(), strict=True):
            local = position(expert)
            if local < 0:
                continue
            row = x[token].double() * (weight if on_input else 1)
            gate, up = (dequantize(w13[local], scale_13[local], BLOCK, torch.float64) @ row).chunk(2)
            out = dequantize(w2[local], scale_2[local], BLOCK, torch.float64) @ (gate.sigmoid() * gate * up)
            y[token] += out * (1 if on_input else weight)
    return y


def routed(m: int, dtype: torch.dtype, top_k: int = TOP_K) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(m)
    x = torch.randn(m, HIDDEN, generator=generator).to(dtype)
    scores = torch.randn(m, EXPERTS, generator=generator).softmax(dim=1)
    topk_weights, topk_ids = scores.topk(top_k)
    return x, topk_weights, topk_ids.to(torch.int32)


@pytest.mark.parametrize(
    ("m", "dtype"), [(0, torch.bfloat16), (1, torch.bfloat16), (33, torch.bfloat16), (33, torch.float16)]
)
def test_matches_a_loop_over_tokens(m: int, dtype: torch.dtype, packed: tuple[torch.Tensor, ...]) -> None:
    x, topk_weights, topk_ids = routed(m, dtype)
    y = fp8_experts(x, topk_weights, topk_ids, *packed)
    assert (y.dtype, y.shape) == (dtype, x.shape)
    # Two quantisations of activations, each 0.026, and a product of two quantised factors between them.
    assert relative_error(y, expected(x, topk_weights, topk_ids, packed, lambda e: e, False)) < 0.08


def test_skipped_ids_add_nothing(packed: tuple[torch.Tensor, ...]) -> None:
    x, topk_weights, topk_ids = routed(9, torch.bfloat16)
    topk_ids[3] = -1  # a padding token
    topk_ids[5, 1] = -1
    y = fp8_experts(x, topk_weights, topk_ids, *packed)
    assert not y[3].any()
    assert relative_error(y, expected(x, topk_weights, topk_ids, packed, lambda e: e, False)) < 0.08


def test_experts_of_two_ranks_add_up(packed: tuple[torch.Tensor, ...]) -> None:
    x, topk_weights, topk_ids = routed(17, torch.float32)
    topk_ids[2, 0] = -1  # must not be looked up as the last expert
    whole = fp8_experts(x, topk_weights, topk_ids, *packed)
    maps = torch.tensor([[0, 1, 2, -1, -1, -1], [-1, -1, -1, 0, 1, 2]], dtype=torch.int32)
    halves = [
        fp8_experts(x, topk_weights, topk_ids, *(tensor[rank * 3 : rank * 3 + 3] for tensor in packed), maps[rank])
        for rank in range(2)
    ]
    assert all(half.any() for half in halves)
    torch.testing.assert_close(halves[0] + halves[1], whole)


def test_router_weight_on_input(packed: tuple[torch.Tensor, ...]) -> None:
    x, topk_weights, topk_ids = routed(8, torch.bfloat16, top_k=1)
    y = fp8_experts(x, topk_weights, topk_ids, *packed, None, True)
    assert relative_error(y, expected(x, topk_weights, topk_ids, packed, lambda e: e, True)) < 0.08
    assert relative_error(y, expected(x, topk_weights, topk_ids, packed, lambda e: e, False)) > 0.2


def layer_weights(packed: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    """Return the weights as the op takes them; packing may write where they lie."""
    w13, scale_13, w2, scale_2 = packed
    return (
        pack_experts(w13.clone()),
        pack_expert_scales(scale_13, *w13.shape[1:]),
        pack_experts(w2.clone()),
        pack_expert_scales(scale_2, *w2.shape[1:]),
    )


@pytest.mark.parametrize("on_input", [False, True])
def test_op_computes_the_reference(packed: tuple[torch.Tensor, ...], on_input: bool) -> None:
    x, topk_weights, topk_ids = routed(19, torch.bfloat16)
    topk_ids[4] = -1
    expert_map = torch.tensor([2, -1, 0, 1, 5, 4], dtype=torch.int32)
    out = torch.full_like(x, float("nan"))
    y = fp8_backend.fp8_experts(x, topk_weights, topk_ids, *layer_weights(packed), expert_map, on_input, out)
    assert y is out
    assert torch.equal(out, fp8_experts(x, topk_weights, topk_ids, *packed, expert_map, on_input))
    assert not torch.equal(out, fp8_experts(x, topk_weights, topk_ids, *packed, None, on_input))


@pytest.mark.parametrize(("n", "k", "shares"), [(256, 384, True), (24, 128, True), (20, 128, False), (16, 200, False)])
def test_packing_is_that_of_dense_weights(n: int, k: int, shares: bool) -> None:
    codes, scale = weights(n, k, 3)
    expected_codes = torch.stack([layout.pack_weight(expert) for expert in codes])
    expected_scale = torch.stack([layout.pack_scale(expert, n, k) for expert in scale])
    stored = codes.clone()
    packed = pack_experts(stored)
    assert torch.equal(packed.view(torch.uint8), expected_codes.view(torch.uint8))
    assert (packed.data_ptr() == stored.data_ptr()) is shares
    assert torch.equal(pack_expert_scales(scale, n, k), expected_scale)
    assert torch.equal(UnpackedCodes(packed, n, k)[4].view(torch.uint8), codes[4].view(torch.uint8))
    assert torch.equal(UnpackedScales(expected_scale, n)[4], scale[4])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"w13": torch.zeros(6, 2, 200, 128)}, "intermediate a multiple of 128; pad it with zero rows"),
        ({"topk_ids": torch.zeros(3, 2, dtype=torch.int32)}, "topk_ids: got"),
        ({"scale_2": torch.zeros(6, 2, 4)}, "scale_2: got"),
        ({"out": torch.zeros(9, 192, dtype=torch.float16)}, "out: got torch.float16"),
        ({"x": torch.zeros(9, 192, dtype=torch.int32)}, "x: got"),
    ],
)
def test_wrong_arguments_are_named(
    packed: tuple[torch.Tensor, ...], change: dict[str, torch.Tensor], words: str
) -> None:
    x, topk_weights, topk_ids = routed(9, torch.bfloat16)
    names = ("w13", "scale_13", "w2", "scale_2")
    given = {
        "x": x,
        "topk_weights": topk_weights,
        "topk_ids": topk_ids,
        **dict(zip(names, layer_weights(packed), strict=True)),
    }
    with pytest.raises(ArgumentError, match=words):
        fp8_backend.fp8_experts(**{**given, **change})


# As measured (docs/kernel-notes-moe-decode.md): numbers of tokens that each form serves.
LAYERS = {
    "Qwen3-30B": (8, 128, 2048, 768),
    "Qwen3-235B at TP4": (8, 128, 4096, 384),
    "DeepSeek-V3": (8, 256, 7168, 2048),
    "DeepSeek-V3 at TP8": (8, 256, 7168, 256),
}
SERVES = {
    HBM3: {
        "Qwen3-30B": {"single": (1, 2, 4), "joint": (5, 8, 64), "prefill": (65, 8192)},
        "Qwen3-235B at TP4": {"single": (1, 2, 4), "decode": (5, 8), "joint": (16, 64), "prefill": (65, 8192)},
        "DeepSeek-V3": {"decode": (1, 2), "joint": (4, 8, 64), "prefill": (65, 8192)},
        "DeepSeek-V3 at TP8": {"single": (1, 3), "decode": (4, 16), "prefill": (65, 8192)},
    },
    HBM3E: {
        "Qwen3-30B": {"single": (1, 2), "joint": (4, 8, 64), "prefill": (65, 8192)},
        "Qwen3-235B at TP4": {"single": (1, 2), "joint": (4, 8, 64), "prefill": (65, 8192)},
        "DeepSeek-V3": {"decode": (1,), "joint": (2, 4, 64), "prefill": (65, 8192)},
        "DeepSeek-V3 at TP8": {"single": (1, 2), "decode": (3, 4), "joint": (6, 16, 64), "prefill": (65, 8192)},
    },
}


@pytest.mark.parametrize("limits", SERVES)
@pytest.mark.parametrize("name", LAYERS)
def test_form_follows_tokens_and_widths(name: str, limits: FormLimits) -> None:
    widths = LAYERS[name]
    for form, tokens in SERVES[limits][name].items():
        assert {select_form(m, *widths, limits=limits) for m in tokens} == {form}
        assert {select_form(m, *widths, batch_invariant=True, limits=limits) for m in tokens} == {"prefill"}


@pytest.mark.parametrize("name", LAYERS)
def test_one_launch_does_not_serve_weights_on_the_input(name: str) -> None:
    widths = LAYERS[name]
    forms = [select_form(m, *widths, router_weight_on_input=True) for m in range(1, 65)]
    assert forms[0] == "decode" and "single" not in forms


def test_form_can_serve_what_it_is_chosen_for() -> None:
    """Few and small experts, so that only what a form has room for keeps it from a call."""
    grid = itertools.product((1, 2, 8, 9, 65), (1, 8, 16, 17), (1, 128), (128, 18432), (128, 8192))
    calls = {(m, top_k, groups, *widths) for m, top_k, groups, *widths in grid if top_k <= max(8, groups)}
    chosen = {call: select_form(*call) for call in calls}
    assert set(chosen.values()) == set(get_args(Form))
    assert all(can_serve(form, m, top_k, *widths) for (m, top_k, _, *widths), form in chosen.items())


@pytest.mark.parametrize(
    ("form", "most", "beyond"),
    [
        ("single", (8, 16, 2048, 128), (8, 17, 2048, 128)),  # pairs
        ("single", (8, 8, 2048, 768), (9, 8, 2048, 768)),  # tokens
        ("single", (8, 8, 7168, 2048), (8, 8, 7168, 4096)),  # shared memory for their codes
        ("decode", (64, 16, 2048, 128), (64, 17, 2048, 128)),
        ("joint", (64, 16, 7168, 2048), (64, 17, 7168, 2048)),  # pairs
        ("prefill", (8192, 16, 7168, 2048), None),
    ],
)
def test_forms_serve_up_to_their_limits(form: Form, most: tuple, beyond: tuple | None) -> None:
    assert can_serve(form, *most) and not (beyond and can_serve(form, *beyond))


def test_form_follows_rows_per_expert() -> None:
    """Few experts, all of them hit by many tokens: rows of an expert fill the tensor core's 64-row side."""
    assert select_form(64, 8, 8, 7168, 256) == "prefill" and select_form(1, 8, 1, 7168, 8192) == "decode"


# Qwen3-30B-A3B at TP4 and Qwen3-235B-A22B at TP8 (192 rows each), a part within one block, and whole blocks.
@pytest.mark.parametrize(("intermediate", "ranks"), [(768, 4), (384, 2), (256, 8), (512, 2), (320, 1)])
def test_parts_within_blocks_add_up_to_the_whole(intermediate: int, ranks: int) -> None:
    """Each rank's experts, cut and padded, must give together what the whole layer gives."""
    rows, blocks = intermediate // ranks, -(-intermediate // BLOCK)
    gate, scale_gate = weights(intermediate, HIDDEN, 5)
    up, scale_up = weights(intermediate, HIDDEN, 6)
    down, scale_down = weights(HIDDEN, intermediate, 7)
    x, topk_weights, topk_ids = routed(21, torch.bfloat16)

    def parts(number: int, of: int) -> torch.Tensor:
        part = ExpertPart(number * (intermediate // of), intermediate // of)
        shapes = {"w13": (EXPERTS, 2 * part.padded, HIDDEN), "w2": (EXPERTS, HIDDEN, part.padded)}
        codes = {name: torch.full(shape, float("nan")).to(torch.float8_e4m3fn) for name, shape in shapes.items()}
        clear_padding(codes["w13"], codes["w2"], part)
        scale = {
            "w13": torch.full((EXPERTS, 2 * part.padded // BLOCK, 2), float("nan")),
            "w2": torch.full((EXPERTS, 2, part.padded // BLOCK), float("nan")),
        }
        for shard, source, block_scale in (("w1", gate, scale_gate), ("w3", up, scale_up), ("w2", down, scale_down)):
            name = "w2" if shard == "w2" else "w13"
            for expert in range(EXPERTS):
                load_part(codes[name][expert], source[expert], shard, part)
                load_part(scale[name][expert], block_scale[expert], shard, part, BLOCK)
        assert all(not tensor.isnan().any() for tensor in scale.values())
        op = layer_weights((codes["w13"], scale["w13"], codes["w2"], scale["w2"]))
        return fp8_backend.fp8_experts(x.float(), topk_weights, topk_ids, *op)

    assert ExpertPart(192, 192).padded == 256 and blocks * BLOCK >= intermediate and rows * ranks == intermediate
    whole = parts(0, 1)
    together = sum(parts(number, ranks) for number in range(ranks))
    double = reference_of(gate, scale_gate, up, scale_up, down, scale_down, x, topk_weights, topk_ids)
    assert relative_error(whole, double) < 0.08
    # Only groups that two ranks share are quantised otherwise; without any, only the order of float32 sums differs.
    assert relative_error(together, whole) < (1e-5 if rows % BLOCK == 0 else 0.03)
    assert relative_error(together, double) < 1.02 * relative_error(whole, double)


def reference_of(gate, scale_gate, up, scale_up, down, scale_down, x, topk_weights, topk_ids):
    """Return the layer's answer in float64 without any quantisation of activations, or blocks beyond 128 rows."""
    y = torch.zeros(x.shape, dtype=torch.float64)
    for token in range(x.shape[0]):
        for weight, expert in zip(topk_weights[token].double(), topk_ids[token].tolist(), strict=True):
            row = x[token].double()
            hidden = dequantize(gate[expert], scale_gate[expert], BLOCK, torch.float64) @ row
            hidden = hidden.sigmoid() * hidden * (dequantize(up[expert], scale_up[expert], BLOCK, torch.float64) @ row)
            y[token] += weight * (dequantize(down[expert], scale_down[expert], BLOCK, torch.float64) @ hidden)
    return y
