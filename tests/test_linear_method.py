"""The linear and MoE methods on vLLM's own layers, loaded through vLLM's own loaders, without an engine."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("vllm", reason="needs vLLM; vllm is not installed")

from vllm.config import VllmConfig, set_current_vllm_config
from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    LinearBase,
    MergedColumnParallelLinear,
    QKVParallelLinear,
    ReplicatedLinear,
    RowParallelLinear,
    UnquantizedLinearMethod,
)
from vllm.model_executor.layers.quantization.utils.quant_utils import get_and_maybe_dequant_weights
from vllm.platforms import current_platform

from fp8_backend import counters
from fp8_backend.errors import CheckpointError, UnsupportedError
from fp8_backend.integration import config as config_module
from fp8_backend.integration import ops
from fp8_backend.integration.config import DeepGemmFp8Config
from fp8_backend.integration.moe import check_features
from fp8_backend.integration.router import RouterLinearMethod
from fp8_backend.kernels import layout
from fp8_backend.kernels.reference import BLOCK, ceil_div, dequantize, relative_error
from fp8_backend.quantize import written_config

DEVICE = torch.device(current_platform.device_type)


@pytest.fixture(autouse=True)
def vllm_config(one_rank: VllmConfig) -> Iterator[None]:
    config_module.select_backend.cache_clear()
    with set_current_vllm_config(one_rank):
        yield


@pytest.fixture
def config() -> DeepGemmFp8Config:
    return DeepGemmFp8Config.from_config({"quant_method": "fp8", "weight_block_size": [128, 128]})


def part(n: int, k: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what a checkpoint holds for one projection: codes [n, k] and scales."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randn(n, k, generator=generator).to(torch.float8_e4m3fn)
    scale = torch.rand(ceil_div(n, BLOCK), ceil_div(k, BLOCK), generator=generator) / 100 + 1e-3
    return codes, scale


def load(layer: LinearBase, parts: dict[Any, tuple[torch.Tensor, torch.Tensor]]) -> torch.Tensor:
    """Feed parts to a layer as a model's load_weights does; return the dequantised whole [n, k]."""
    for shard, (codes, scale) in parts.items():
        for parameter, tensor in ((layer.weight, codes), (getattr(layer, layer.quant_method.config.scale_name), scale)):
            parameter.weight_loader(parameter, tensor, *(() if shard is None else (shard,)))
    return torch.cat([dequantize(codes, scale, BLOCK, torch.float64) for codes, scale in parts.values()])


def build(kind: str, config: DeepGemmFp8Config) -> tuple[LinearBase, dict[Any, tuple[torch.Tensor, torch.Tensor]]]:
    common = {"quant_config": config, "prefix": f"model.layers.0.{kind}", "params_dtype": torch.bfloat16}
    with DEVICE:
        match kind:
            case "replicated":
                return ReplicatedLinear(384, 192, bias=False, **common), {None: part(192, 384, 1)}
            case "column":
                return ColumnParallelLinear(256, 640, bias=True, **common), {None: part(640, 256, 2)}
            case "row":
                return RowParallelLinear(256, 384, bias=False, **common), {None: part(384, 256, 3)}
            case "merged":
                layer = MergedColumnParallelLinear(256, [384, 64], bias=False, **common)
                return layer, {0: part(384, 256, 4), 1: part(64, 256, 5)}
            case "qkv":
                layer = QKVParallelLinear(256, 128, 4, 2, bias=False, **common)
                return layer, {"q": part(512, 256, 6), "k": part(256, 256, 7), "v": part(256, 256, 8)}
            case "tail":
                return ReplicatedLinear(200, 72, bias=False, **common), {None: part(72, 200, 9)}
    raise AssertionError(kind)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("kind", ["replicated", "column", "row", "merged", "qkv", "tail"])
def test_loads_packs_and_multiplies(kind: str, dtype: torch.dtype, config: DeepGemmFp8Config) -> None:
    layer, parts = build(kind, config)
    expected_weight = load(layer, parts)
    original = weakref.ref(layer.weight)
    if kind == "column":
        layer.bias.data.copy_(torch.linspace(-1, 1, layer.bias.numel()))
        layer.bias.data = layer.bias.data.to(dtype)
    layer.quant_method.process_weights_after_loading(layer)
    n, k = expected_weight.shape
    assert layer.weight.dtype == torch.float8_e4m3fn
    assert layer.weight.shape == layout.packed_weight_shape(n, k)
    assert layer.weight_scale_inv.shape == layout.packed_scale_shape(n, k)
    assert layer.weight_scale_inv.dtype == torch.float32
    assert original() is None  # the loaded weight is freed: never a second copy of the model

    x = torch.randn(2, 5, k, generator=torch.Generator().manual_seed(0)).to(DEVICE, dtype)
    y = layer(x)[0]
    assert (y.dtype, y.shape) == (dtype, (2, 5, n))
    expected = x.double() @ expected_weight.to(DEVICE).t()
    if kind == "column":
        expected += layer.bias.double()
    # e4m3 activations: 3 mantissa bits give 0.026 for normal data.
    assert relative_error(y, expected) < 0.04


@pytest.mark.parametrize("method", ["fp8", "compressed-tensors"])
@pytest.mark.parametrize("kind", ["row", "merged", "qkv"])
def test_one_byte_scales_are_loaded_exactly(kind: str, method: Any) -> None:
    config = DeepGemmFp8Config.from_config(written_config(method, "e8m0", []))
    layer, parts = build(kind, config)
    powers = {name: (codes, scale.to(torch.float8_e8m0fnu)) for name, (codes, scale) in parts.items()}
    for shard, tensors in powers.items():
        for parameter, tensor in zip((layer.weight, getattr(layer, config.scale_name)), tensors, strict=True):
            parameter.weight_loader(parameter, tensor, *(() if shard is None else (shard,)))
    assert config.scale_name == ("weight_scale" if method == "compressed-tensors" else "weight_scale_inv")
    loaded = getattr(layer, config.scale_name).data
    assert torch.equal(loaded, torch.cat([scale.float() for _, scale in powers.values()]).to(loaded.device))
    layer.quant_method.process_weights_after_loading(layer)
    n, k = sum(len(codes) for codes, _ in powers.values()), layer.input_size_per_partition
    assert torch.equal(layout.unpack_weight(layer.weight, n, k).view(torch.uint8).cpu(),
                       torch.cat([codes for codes, _ in powers.values()]).view(torch.uint8))  # fmt: skip
    assert torch.equal(layout.unpack_scale(getattr(layer, config.scale_name), n), loaded)


def test_a_router_has_a_method_of_its_own() -> None:
    entries = ["lm_head", "model.layers.0.mlp.gate"]
    config = DeepGemmFp8Config.from_config(written_config("fp8", "float32", entries))
    with DEVICE:
        layer = ReplicatedLinear(128, 8, bias=True, params_dtype=torch.bfloat16)
    router = config.get_quant_method(layer, entries[1])
    assert isinstance(router, UnquantizedLinearMethod) and type(router) is RouterLinearMethod
    assert type(config.get_quant_method(layer, entries[0])) is UnquantizedLinearMethod
    with torch.no_grad():
        layer.weight.copy_(torch.randn(8, 128))
        layer.bias.fill_(1)
    x = torch.randn(3, 128, device=DEVICE, dtype=torch.bfloat16)
    expected = x.double() @ layer.weight.double().t()
    router.process_weights_after_loading(layer)
    before = counters.calls["router_linear"]
    assert relative_error(router.apply(layer, x), expected) < 0.004
    assert relative_error(router.apply(layer, x, layer.bias), expected + 1) < 0.004
    # On a CPU vLLM multiplies by itself, and so it does with a bias.
    assert counters.calls["router_linear"] - before == int(x.is_cuda)


def test_compressed_tensors_names_what_is_not_quantised() -> None:
    expert = "model.layers.2.mlp.experts.0.down_proj"
    projections = ["model.layers.0.q_proj", "model.layers.0.k_proj", "model.layers.1.k_proj"]
    entries = ["lm_head", "re:.*mlp.gate$", *projections, expert]
    config = DeepGemmFp8Config.from_config(written_config("compressed-tensors", "float32", entries))
    config.packed_modules_mapping = {"qk_proj": ["q_proj", "k_proj"]}
    for prefix, skipped in {
        "model.layers.7.mlp.gate": True,
        "model.layers.7.mlp.gate_up": False,
        "model.layers.0.qk_proj": True,
        "model.layers.2.qk_proj": False,
        "model.layers.2.mlp.experts": True,
        "model.layers.3.mlp.experts": False,
    }.items():
        assert config.is_skipped(prefix) is skipped, prefix
    with pytest.raises(CheckpointError, match="model.layers.1.qk_proj: config.json leaves some of"):
        config.is_skipped("model.layers.1.qk_proj")


@pytest.mark.parametrize(
    ("entries", "skipped"),
    [
        (["mlp.gate"], "model.layers.7.mlp.gate"),
        (["model.layers.7.qk_proj"], "model.layers.7.qk_proj"),  # the merged layer's own name
        (["q_proj", "k_proj"], "model.layers.7.qk_proj"),
        ([r"model\.layers\.\d\.mlp\.experts"], "model.layers.7.mlp.experts"),
        (["layers.7.mlp.experts"], "model.layers.7.mlp.experts"),
    ],
)
def test_modules_to_not_convert_in_the_forms_that_tools_write(entries: list[str], skipped: str) -> None:
    config = DeepGemmFp8Config.from_config(written_config("fp8", "float32", entries))
    config.packed_modules_mapping = {"qk_proj": ["q_proj", "k_proj"]}
    prefixes = ("mlp.gate", "mlp.gate_up", "qk_proj", "mlp.experts", "shared_experts.down_proj")
    assert [name for prefix in prefixes if config.is_skipped(name := f"model.layers.7.{prefix}")] == [skipped]


def test_part_of_a_merged_layer_left_unquantised_is_refused_by_name() -> None:
    config = DeepGemmFp8Config.from_config(written_config("fp8", "float32", ["model.layers.1.k_proj"]))
    config.packed_modules_mapping = {"qk_proj": ["q_proj", "k_proj"]}
    with pytest.raises(CheckpointError, match="model.layers.1.qk_proj: config.json leaves some of"):
        config.is_skipped("model.layers.1.qk_proj")


def test_packing_again_changes_nothing(config: DeepGemmFp8Config) -> None:
    layer, parts = build("replicated", config)
    load(layer, parts)
    layer.quant_method.process_weights_after_loading(layer)
    packed = layer.weight.view(torch.uint8).clone()
    layer.quant_method.process_weights_after_loading(layer)
    assert torch.equal(layer.weight.view(torch.uint8), packed)


def test_mla_reads_exact_weights(config: DeepGemmFp8Config) -> None:
    layer, parts = build("column", config)
    expected = load(layer, parts)
    layer._cpu_skip_gemm_dispatch = True  # as vLLM marks kv_b_proj on CPUs
    layer.quant_method.process_weights_after_loading(layer)
    assert layer.weight_block_size is None
    read = get_and_maybe_dequant_weights(layer, out_dtype=torch.bfloat16)
    # An identity quantises exactly but for the rounding of 448 * float32(1 / 448).
    torch.testing.assert_close(read.cpu().double(), expected, rtol=2**-8, atol=0)


def test_float8_input_counts_as_codes_of_scale_one(config: DeepGemmFp8Config) -> None:
    layer, parts = build("replicated", config)
    weight = load(layer, parts)
    layer.quant_method.process_weights_after_loading(layer)
    x = torch.randn(7, 384, generator=torch.Generator().manual_seed(0)).to(DEVICE, torch.float8_e4m3fn)
    y = layer.quant_method.apply(layer, x)
    assert y.dtype == layer.orig_dtype == torch.bfloat16
    assert relative_error(y, x.double() @ weight.to(DEVICE).t()) < 0.004


@pytest.mark.parametrize(
    ("value", "words"),
    [(None, "is nan"), (float("nan"), "is nan"), (float("inf"), "is inf"), (0.0, "is 0.0"), (-0.5, "is -0.5")],
    ids=["missing", "nan", "inf", "zero", "negative"],
)
def test_bad_scales_are_refused_when_packing(value: float | None, words: str, config: DeepGemmFp8Config) -> None:
    layer, parts = build("merged", config)
    load(layer, parts if value is not None else {0: parts[0]})
    if value is not None:
        layer.weight_scale_inv.data[3, 1] = value
    with pytest.raises(CheckpointError) as caught:
        layer.quant_method.process_weights_after_loading(layer)
    index = "[3, 0]" if value is None else "[3, 1]"
    text = str(caught.value)
    assert f"model.layers.0.merged.weight_scale_inv{index} {words}" in text
    assert "finite and above 0" in text and "get the checkpoint again" in text


def test_op_has_a_faithful_fake_and_compiles(config: DeepGemmFp8Config) -> None:
    layer, parts = build("merged", config)
    load(layer, parts)
    layer.quant_method.process_weights_after_loading(layer)
    bias = torch.ones(448, dtype=torch.bfloat16, device=DEVICE)
    x = torch.randn(3, 256, device=DEVICE, dtype=torch.bfloat16)
    for given, extra in ((x, bias), (x, None), (x[:0], None), (x.to(torch.float8_e4m3fn), None)):
        arguments = (given, layer.weight.data, layer.weight_scale_inv.data, extra, 448)
        torch.library.opcheck(ops.linear, arguments, test_utils="test_faketensor")
    compiled = torch.compile(lambda x: layer(x)[0] * 2, fullgraph=True, dynamic=True, backend="aot_eager")
    for m in (3, 17):
        x = torch.randn(m, 256, device=DEVICE, dtype=torch.bfloat16)
        torch.testing.assert_close(compiled(x), layer(x)[0] * 2)


def features(**changes: Any) -> SimpleNamespace:
    """Return a stand-in for FusedMoEConfig, which needs a model: the fields `check_features` reads."""
    parallel = SimpleNamespace(enable_eplb=changes.pop("enable_eplb", False))
    plain = {"is_lora_enabled": False, "has_bias": False, "is_act_and_mul": True}
    activation = SimpleNamespace(value=changes.pop("activation", "silu"))
    return SimpleNamespace(moe_parallel_config=parallel, activation=activation, **{**plain, **changes})


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"is_lora_enabled": True}, "LoRA on experts"),
        ({"enable_eplb": True}, "--enable-eplb"),
        ({"has_bias": True}, "experts with bias"),
        ({"activation": "gelu"}, "activation 'gelu'"),
    ],
)
def test_moe_features_we_lack_are_refused(changes: dict[str, Any], words: str) -> None:
    check_features("experts", features(), None)
    with pytest.raises(UnsupportedError, match=f"model.layers.1.mlp.experts: .*{words}.*drop --quantization"):
        check_features("model.layers.1.mlp.experts", features(**changes), None)
