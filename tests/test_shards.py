"""Tensor-parallel parts that cut through 128x128 blocks: each rank's codes and scales are the checkpoint's, exactly."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fp8_backend.errors import CheckpointError, UnsupportedError
from fp8_backend.kernels import gemm, layout
from fp8_backend.kernels.reference import BLOCK, ceil_div, dequantize, relative_error
from fp8_backend.weights import loader
from fp8_backend.weights.partition import LinearShard, Span, linear_shard

WIDTH = st.one_of(st.integers(1, 200), st.sampled_from([8, 64, 96, 128, 192, 256]))
RANKS = [1, 2, 3, 4, 8]


def part(n: int, k: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return codes of -2 to 2 and scales of 1 or 2, whose products and short sums bfloat16 holds exactly."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(-2, 3, (n, k), generator=generator, device="cpu").to(torch.float8_e4m3fn)
    scale = 2.0 ** torch.randint(0, 2, (ceil_div(n, BLOCK), ceil_div(k, BLOCK)), generator=generator, device="cpu")
    return codes, scale


def activations(k: int) -> torch.Tensor:
    """Return codes of which few are not zero, so that no sum passes 256, beyond which bfloat16 leaves out numbers."""
    generator = torch.Generator().manual_seed(0)
    x = torch.zeros(5, k)
    for row in x:
        row[torch.randperm(k, generator=generator)[:32]] = 1
    return x.to(torch.float8_e4m3fn)


def unpacked(weight: torch.Tensor, scale: torch.Tensor, shard: LinearShard) -> torch.Tensor:
    """Return a packed part [n, k] dequantised, once its padding is seen to be zero."""
    n, k = shard.padded_n, shard.padded_k
    codes = layout.unpack_weight(weight, n, k)
    whole = dequantize(codes, layout.unpack_scale(scale, n), BLOCK)
    held = torch.cat([whole[first:last] for first, last in shard.outputs])[:, shard.k_lead :]
    assert int((codes.view(torch.uint8) != 0).sum()) == int((held != 0).sum())
    return held


@settings(max_examples=150, deadline=None)
@given(
    ranks=st.sampled_from(RANKS),
    widths=st.lists(WIDTH, min_size=1, max_size=3),
    k=WIDTH,
    split_k=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
)
def test_each_rank_packs_its_part_of_the_checkpoint(
    ranks: int, widths: list[int], k: int, split_k: bool, seed: int
) -> None:
    """What `vllm` does with a finer grid is done here by hand: repeat, then cut at multiples of the grid."""
    rows, input_size = (widths, ranks * k) if split_k else ([ranks * width for width in widths], k)
    parts = [part(n, input_size, seed + index) for index, n in enumerate(rows)]
    for rank in range(ranks):
        shard = linear_shard(input_size, k, sum(rows), widths, rank)
        assert BLOCK % shard.rows_per_scale == 0 and BLOCK % shard.columns_per_scale == 0
        assert shard.padded_n < shard.n + 2 * BLOCK * len(widths) and shard.padded_k < shard.k + BLOCK
        assert [last - first for first, last in shard.outputs] == widths
        codes, scales = [], []
        for span, (whole, scale) in zip(shard.rows, parts, strict=True):
            taken = whole.view(torch.uint8)[span.start : span.start + span.size, shard.columns.start :][:, :k]
            codes.append(taken.view(torch.float8_e4m3fn))
            fine = loader.refine_scale(scale, 0, shard.rows_per_scale)
            fine = loader.refine_scale(fine, 1, shard.columns_per_scale)
            first, column = span.start // shard.rows_per_scale, shard.columns.start // shard.columns_per_scale
            fine = fine[first : first + ceil_div(span.size, shard.rows_per_scale)]
            scales.append(fine[:, column : column + ceil_div(k, shard.columns_per_scale)])
        weight = torch.cat([code.view(torch.uint8) for code in codes]).view(torch.float8_e4m3fn)
        scale = torch.cat(scales)
        assert tuple(scale.shape) == shard.scale_shape
        expected = torch.cat(
            [
                dequantize(whole, whole_scale, BLOCK)[span.start : span.start + span.size, shard.columns.start :][:, :k]
                for span, (whole, whole_scale) in zip(shard.rows, parts, strict=True)
            ]
        )
        packed, packed_scale = loader.pack_linear("layer", weight, scale, shard)
        assert packed.shape == layout.packed_weight_shape(shard.padded_n, shard.padded_k)
        assert torch.equal(unpacked(packed, packed_scale, shard), expected)


@pytest.mark.parametrize(
    ("arguments", "rows_per_scale", "columns_per_scale", "padded"),
    [
        ((7168, 7168, 2112, [1536, 576]), 128, 128, (2112, 7168)),  # DeepSeek-V3: the last part need not end a block
        ((18432, 2304, 7168, [7168], 3), 128, 128, (7168, 2304)),
        ((2048, 2048, 1152, [576, 576]), 64, 128, (640 + 576, 2048)),
        ((2048, 2048, 4608, [576, 576], 1), 64, 128, (640 + 640, 2048)),  # starts 64 rows into a block
        ((1536, 192, 4096, [4096], 1), 128, 64, (4096, 64 + 192)),
        ((200, 200, 3 * 33, [33], 2), 1, 128, (66 + 33, 200)),
    ],
)
def test_grids(arguments: Any, rows_per_scale: int, columns_per_scale: int, padded: tuple[int, int]) -> None:
    shard = linear_shard(*arguments)
    assert (shard.rows_per_scale, shard.columns_per_scale) == (rows_per_scale, columns_per_scale)
    assert (shard.padded_n, shard.padded_k) == padded


def test_key_heads_that_ranks_share_start_where_the_first_of_them_does() -> None:
    shard = linear_shard(512, 512, 4 * (192 + 64 + 64), [192, 64, 64], 3, [1, 2, 2])
    assert shard.rows == (Span(576, 192), Span(64, 64), Span(64, 64))


def test_one_part_of_a_refined_grid_may_be_missing() -> None:
    shard = linear_shard(128, 128, 384, [192, 192])
    codes, scale = part(384, 128, 1)
    fine = loader.refine_scale(scale, 0, shard.rows_per_scale)
    fine[3:] = loader.unloaded_scale(3, 1)
    with pytest.raises(CheckpointError, match=r"layer.weight_scale_inv\[3, 0\] is nan"):
        loader.pack_linear("layer", codes, fine, shard)


@pytest.mark.parametrize("shape", [(384, 128), (3, 5), (0, 128)])
def test_codes_that_are_nan_are_refused_and_no_others(shape: tuple[int, int]) -> None:
    every = torch.arange(256, dtype=torch.uint8)
    numbers = every[(every & 0x7F) != 0x7F]
    codes = numbers.repeat(1 + shape[0] * shape[1] // len(numbers))[: shape[0] * shape[1]].reshape(shape)
    loader.check_codes("layer", "weight", codes.view(torch.float8_e4m3fn))
    for nan in (0x7F, 0xFF) if shape[0] else ():
        bad = codes.clone()
        bad[-1, 1] = bad[-1, -1] = nan
        with pytest.raises(CheckpointError, match=rf"layer.weight\[{shape[0] - 1}, 1\] is nan; .*\(2 of"):
            loader.check_codes("layer", "weight", bad.view(torch.float8_e4m3fn))


vllm = pytest.importorskip("vllm", reason="needs vLLM; vllm is not installed")

from vllm.config import VllmConfig, set_current_vllm_config  # noqa: E402
from vllm.model_executor.layers.linear import (  # noqa: E402
    ColumnParallelLinear,
    LinearBase,
    MergedColumnParallelLinear,
    QKVParallelLinear,
    RowParallelLinear,
)
from vllm.platforms import current_platform  # noqa: E402

from fp8_backend.integration import config as config_module  # noqa: E402
from fp8_backend.integration.config import DeepGemmFp8Config  # noqa: E402
from fp8_backend.quantize import written_config  # noqa: E402

DEVICE = torch.device(current_platform.device_type)


@contextmanager
def rank_of(rank: int, ranks: int) -> Iterator[None]:
    """Make vLLM build and load layers as one rank of several, without the others."""
    modules = ("vllm.model_executor.layers.linear", "vllm.model_executor.parameter")
    values = (("get_tensor_model_parallel_rank", rank), ("get_tensor_model_parallel_world_size", ranks))
    patches = [patch(f"{module}.{name}", lambda value=value: value) for module in modules for name, value in values]
    for each in patches:
        each.start()
    try:
        yield
    finally:
        for each in patches:
            each.stop()


@pytest.fixture(autouse=True)
def vllm_config(one_rank: VllmConfig) -> Iterator[None]:
    config_module.select_backend.cache_clear()
    with set_current_vllm_config(one_rank):
        yield


Parts = dict[Any, tuple[torch.Tensor, torch.Tensor]]


def build(kind: str, config: DeepGemmFp8Config) -> tuple[LinearBase, Parts]:
    """Return one rank's layer, of a size that 2, 3, 4 and 8 ranks split within blocks, and the checkpoint's parts."""
    # The checkpoint's parts are made on the CPU, whatever the layer's device.
    common = {"quant_config": config, "prefix": f"model.layers.0.{kind}", "params_dtype": torch.bfloat16}
    match kind:
        case "column":
            return ColumnParallelLinear(320, 24 * 33, bias=True, **common), {None: part(24 * 33, 320, 1)}
        case "row":
            layer = RowParallelLinear(576, 200, bias=False, reduce_results=False, **common)
            return layer, {None: part(200, 576, 2)}
        case "merged":
            layer = MergedColumnParallelLinear(256, [576, 576], bias=False, **common)
            return layer, {0: part(576, 256, 3), 1: part(576, 256, 4)}
        case "qkv":
            layer = QKVParallelLinear(256, 64, 24, 6 if layer_ranks() == 3 else 4, bias=True, **common)
            kv = 64 * layer.total_num_kv_heads
            return layer, {"q": part(24 * 64, 256, 5), "k": part(kv, 256, 6), "v": part(kv, 256, 7)}
        case "merged whole":
            layer = MergedColumnParallelLinear(256, [768, 768], bias=False, **common)
            return layer, {0: part(768, 256, 3), 1: part(768, 256, 4)}
    raise AssertionError(kind)


def layer_ranks() -> int:
    from vllm.model_executor.layers import linear

    return linear.get_tensor_model_parallel_world_size()


def load(layer: LinearBase, parts: Parts) -> None:
    for shard, tensors in parts.items():
        for parameter, tensor in zip(
            (layer.weight, getattr(layer, layer.quant_method.config.scale_name)), tensors, strict=True
        ):
            parameter.weight_loader(parameter, tensor, *(() if shard is None else (shard,)))


def stored_as_one(parts: Parts) -> Parts:
    """Return the parts of a layer as the one tensor that some checkpoints hold."""
    codes, scales = zip(*parts.values(), strict=True)
    return {None: (torch.cat([each.view(torch.uint8) for each in codes]).view(codes[0].dtype), torch.cat(scales))}


@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("kind", ["merged whole", "qkv"])
def test_projections_stored_as_one_tensor_are_cut_as_apart(kind: str, ranks: int) -> None:
    config = DeepGemmFp8Config.from_config(written_config("fp8", "float32", []))
    for rank in range(ranks):
        packed = []
        for form in (dict, stored_as_one):
            with rank_of(rank, ranks), DEVICE:
                layer, parts = build(kind, config)
                load(layer, form(parts))
            layer.quant_method.process_weights_after_loading(layer)
            packed.append((layer.weight.view(torch.uint8), layer.weight_scale_inv))
        assert all(map(torch.equal, *packed))


def test_projections_that_meet_within_a_block_of_one_tensor_are_refused() -> None:
    config = DeepGemmFp8Config.from_config(written_config("fp8", "float32", []))
    with DEVICE:
        layer, parts = build("merged", config)
        whole = {None: (stored_as_one(parts)[None][0], torch.ones(9, 2))}
        with pytest.raises(UnsupportedError, match=r"layers.0.merged: .* meet at row 576, within a block of 128"):
            load(layer, whole)


@pytest.mark.parametrize("method", ["fp8", "compressed-tensors"])
@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("kind", ["column", "row", "merged", "qkv"])
def test_ranks_answer_what_one_rank_does(kind: str, ranks: int, method: Any) -> None:
    config = DeepGemmFp8Config.from_config(written_config(method, "float32", []))
    answers = []
    for rank in range(ranks):
        with rank_of(rank, ranks), DEVICE:
            layer, parts = build(kind, config)
            load(layer, parts)
            biases = {
                name: (torch.arange(len(codes), device="cpu") % 8).bfloat16() for name, (codes, _) in parts.items()
            }
            for name, bias in biases.items() if layer.bias is not None else ():
                layer.bias.weight_loader(layer.bias, bias, *(() if name is None else (name,)))
        layer.quant_method.process_weights_after_loading(layer)
        held = activations(layer.input_size).view(torch.uint8).chunk(ranks if kind == "row" else 1, 1)
        x = held[rank if kind == "row" else 0].view(torch.float8_e4m3fn).to(DEVICE)
        y = layer.quant_method.apply(layer, x, layer.bias)
        assert y.is_contiguous() and y.shape == (5, layer.output_size_per_partition)
        answers.append(y.cpu().split(layer.logical_widths, dim=1))

    expected = [
        activations(codes.shape[1]).float() @ dequantize(codes, scale, BLOCK).t()
        + (biases[name] if layer.bias is not None else 0)
        for name, (codes, scale) in parts.items()
    ]
    assert max(float(y.abs().max()) for y in expected) <= 256
    for index, whole in enumerate(expected):
        each = [answer[index].float() for answer in answers]
        if kind == "qkv" and index:  # ranks that share a head say the same
            each = each[:: layer.num_kv_head_replicas]
        assert torch.equal(sum(each) if kind == "row" else torch.cat(each, dim=1), whole)


def test_a_row_parallel_part_quantises_on_the_checkpoints_grid() -> None:
    """A group that lies on one rank gets the scale it has unsplit; x in bfloat16, as models pass it."""
    config = DeepGemmFp8Config.from_config(written_config("fp8", "float32", []))
    x = torch.randn(3, 576, generator=torch.Generator().manual_seed(0)).bfloat16()
    x[:, 256:384] = 0  # the group that 2 ranks of 288 columns share
    total = torch.zeros(3, 200, dtype=torch.float64)
    for rank in range(2):
        with rank_of(rank, 2), DEVICE:
            layer, parts = build("row", config)
            load(layer, parts)
        layer.quant_method.process_weights_after_loading(layer)
        y = layer.quant_method.apply(layer, x[:, rank * 288 : rank * 288 + 288].float().to(DEVICE))
        assert y.dtype == torch.float32
        total += y.double().cpu()
    codes, scale = parts[None]
    whole = gemm.fp8_linear(x.float(), layout.pack_weight(codes), layout.pack_scale(scale, 200, 576), 200)
    # Summed in another order, on a GPU in another precision too; quantised on another grid it would differ by 0.02.
    assert relative_error(total, whole) < 1e-3


def test_a_part_within_blocks_compiles() -> None:
    config = DeepGemmFp8Config.from_config(written_config("fp8", "float32", []))
    for kind in ("row", "qkv"):
        with rank_of(1, 2), DEVICE:
            layer, parts = build(kind, config)
            load(layer, parts)
        layer.quant_method.process_weights_after_loading(layer)
        if layer.bias is not None:
            layer.bias.data.fill_(0.5)
        compiled = torch.compile(
            lambda x, layer=layer: layer.quant_method.apply(layer, x, layer.bias) * 2,
            fullgraph=True, dynamic=True, backend="aot_eager",
        )  # fmt: skip
        for m in (3, 17):
            x = torch.randn(m, layer.input_size_per_partition, device=DEVICE, dtype=torch.bfloat16)
            expected = layer.quant_method.apply(layer, x, layer.bias) * 2
            torch.testing.assert_close(compiled(x), expected, rtol=0, atol=0)


@pytest.mark.gpu
@pytest.mark.parametrize("widths", [[4096, 4096], [4096, 4096 - 64]], ids=["whole blocks", "cut blocks"])
def test_packing_needs_one_more_copy_of_the_layer(widths: list[int]) -> None:
    n, k = sum(widths), 4096
    shard = linear_shard(k, k, 2 * n, widths, 1)
    weight = torch.zeros(n, k, dtype=torch.float8_e4m3fn, device="cuda")
    scale = torch.ones(shard.scale_shape, device="cuda")
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    packed, packed_scale = loader.pack_linear("layer", weight, scale, shard)
    extra = torch.cuda.max_memory_allocated() - before - packed.nbytes - packed_scale.nbytes
    # The codes as loaded are freed only now; beyond them and the packed ones, copies of some k-blocks.
    assert extra <= 0.01 * n * k if widths[0] == widths[1] else extra <= 2.2 * n * loader.PADDED_AT_ONCE * BLOCK
