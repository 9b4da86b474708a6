"""The compile pass on graphs that torch.compile makes of vLLM's own layers and our linear method, and in an engine."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import fx, nn

pytest.importorskip("vllm", reason="needs vLLM; vllm is not installed")

from torch._dynamo.backends.common import aot_autograd
from torch._inductor.decomposition import select_decomp_table
from vllm import ir
from vllm.compilation.passes.inductor_pass import InductorPass, pass_context
from vllm.compilation.passes.ir.inplace_functionalization import VllmIRInplaceFunctionalizationPass
from vllm.compilation.passes.utility.post_cleanup import PostCleanupPass
from vllm.config import CompilationMode, VllmConfig, set_current_vllm_config
from vllm.config.utils import Range
from vllm.forward_context import set_forward_context
from vllm.model_executor.layers.activation import SiluAndMul
from vllm.model_executor.layers.layernorm import GemmaRMSNorm, RMSNorm
from vllm.model_executor.layers.linear import ReplicatedLinear
from vllm.model_executor.layers.rotary_embedding import RotaryEmbedding
from vllm.platforms import current_platform
from vllm.utils.torch_utils import _encode_layer_name

from fp8_backend import counters
from fp8_backend.integration import compat, fusion, ops
from fp8_backend.integration import config as config_module
from fp8_backend.integration.config import DeepGemmFp8Config
from fp8_backend.kernels import reference
from fp8_backend.kernels.reference import BLOCK, ceil_div, relative_error

DEVICE = torch.device(current_platform.device_type)
K, INTERMEDIATE = 256, 384
ON_CPU = not torch.cuda.is_available()
# On a CPU the op computes what its parts do, bit for bit. A GPU adds the squares in another order, and a code that
# turns into its neighbour is off by an eighth.
ERROR = 0.0 if ON_CPU else 0.06


@pytest.fixture(autouse=True)
def vllm_config(one_rank: VllmConfig) -> Iterator[VllmConfig]:
    config_module.select_backend.cache_clear()
    fusion._say_once.cache_clear()
    with set_current_vllm_config(one_rank), ir.enable_torch_wrap(True), torch.no_grad():
        yield one_rank
    torch._dynamo.reset()


def linear(n: int, k: int, dtype: torch.dtype, bias: bool = False) -> ReplicatedLinear:
    config = DeepGemmFp8Config.from_config({"quant_method": "fp8", "weight_block_size": [BLOCK, BLOCK]})
    with DEVICE:
        layer = ReplicatedLinear(k, n, bias=bias, quant_config=config, prefix=f"of_{k}", params_dtype=dtype)
    generator = torch.Generator().manual_seed(n + k)
    layer.weight.data.copy_(torch.randn(n, k, generator=generator).to(torch.float8_e4m3fn))
    scale = torch.rand(ceil_div(n, BLOCK), ceil_div(k, BLOCK), generator=generator)
    layer.weight_scale_inv.data.copy_(scale * 0.01 + 0.01)
    if bias:
        layer.bias.data.copy_(torch.linspace(-1, 1, n))
    layer.quant_method.process_weights_after_loading(layer)
    return layer


def norm(dtype: torch.dtype, **named: Any) -> RMSNorm:
    layer = RMSNorm(K, dtype=dtype, **named).to(DEVICE)
    layer.weight.data.copy_(torch.rand(K) + 0.5)
    return layer


class Dense(nn.Module):
    """One layer of a dense model, attention left out: two norms, of which one has a residual, four linears."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.before, self.after, self.silu_and_mul = norm(dtype), norm(dtype), SiluAndMul()
        self.qkv, self.out = linear(K, K, dtype, bias=True), linear(K, K, dtype)
        self.gate_up, self.down = linear(2 * INTERMEDIATE, K, dtype), linear(K, INTERMEDIATE, dtype)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        residual = x
        x = self.qkv(self.before(x))[0]
        x, residual = self.after(self.out(torch.relu(x))[0], residual)
        return self.down(self.silu_and_mul(self.gate_up(x)[0]))[0], residual


class Module(nn.Module):
    """A forward that a test writes, on layers that it names."""

    def __init__(self, forward: Callable[..., Any], **layers: nn.Module) -> None:
        super().__init__()
        self.body = forward
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, *inputs: torch.Tensor) -> Any:
        return self.body(self, *inputs)


class Compiled:
    """A module compiled up to where vLLM's passes run, through ours, and run from there on as a plain graph."""

    def __init__(self, module: nn.Module, config: VllmConfig) -> None:
        self.config = config
        self.fused: fusion.Fused | None = None
        self.targets: list[Any] = []
        backend = aot_autograd(fw_compiler=self._rewrite, decompositions=select_decomp_table())
        self.call = torch.compile(module, backend=self._functional(backend), fullgraph=True)

    def _functional(self, backend: Callable[..., Any]) -> Callable[..., Any]:
        def compile_graph(module: fx.GraphModule, inputs: list[Any]) -> Any:
            with pass_context(Range(1, 8192)):
                VllmIRInplaceFunctionalizationPass(self.config)(module.graph)
            module.recompile()
            return backend(module, inputs)

        return compile_graph

    def _rewrite(self, module: fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        self.fused = fusion.fuse(module.graph)
        module.graph.lint()
        for node in module.graph.nodes:
            assert node.op in ("placeholder", "output", "get_attr") or "val" in node.meta
        PostCleanupPass(self.config)(module.graph)
        self.targets = [node.target for node in module.graph.nodes if node.op == "call_function"]
        module.recompile()
        return module

    def __call__(self, *inputs: torch.Tensor) -> Any:
        given = [each.clone() for each in inputs]  # vLLM's layers may overwrite theirs
        for each in given:
            torch._dynamo.mark_dynamic(each, 0)
        return self.call(*given)


def rows(m: int, dtype: torch.dtype, k: int = K) -> torch.Tensor:
    return torch.randn(m, k, generator=torch.Generator().manual_seed(m)).to(DEVICE, dtype)


def assert_same(found: Any, expected: Any) -> None:
    for one, other in zip(found, expected, strict=True):
        assert (one.shape, one.dtype) == (other.shape, other.dtype)
        assert relative_error(one, other) <= ERROR


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_all_but_one_linear_of_a_dense_layer(dtype: torch.dtype, vllm_config: VllmConfig) -> None:
    module = Dense(dtype)
    compiled = Compiled(module, vllm_config)
    for m in (5, 2, 70):  # one graph for any number of tokens
        assert_same(compiled(rows(m, dtype)), module(rows(m, dtype)))
    assert compiled.fused == fusion.Fused(linears=4, norms=2, gates=1)
    ours = [target for target in compiled.targets if str(target).startswith("fp8_backend")]
    rms, silu = ops.rms_norm_linear.default, ops.silu_mul_linear.default
    assert ours == [rms, ops.linear.default, rms, silu]
    assert not any("vllm_ir" in str(target) or "exp" in str(target) for target in compiled.targets)


def test_rows_that_somebody_else_wants_are_kept(vllm_config: VllmConfig) -> None:
    def forward(self: Any, x: torch.Tensor, residual: torch.Tensor) -> tuple[torch.Tensor, ...]:
        x, residual = self.norm(x, residual)
        return self.first(x)[0], self.second(x)[0], x @ self.router.weight.t(), residual

    layers = {"norm": norm(torch.bfloat16), "first": linear(K, K, torch.bfloat16)}
    layers["second"] = linear(136, K, torch.bfloat16)
    router = nn.Linear(K, 8, bias=False, dtype=torch.bfloat16, device=DEVICE)
    module = Module(forward, router=router, **layers)
    compiled = Compiled(module, vllm_config)
    inputs = rows(6, torch.bfloat16), rows(7, torch.bfloat16)[:6]
    assert_same(compiled(*inputs), module(*(each.clone() for each in inputs)))
    assert compiled.fused == fusion.Fused(linears=2, norms=1, gates=0)
    keeps = [node for node in compiled.targets if node == ops.linear.default]
    assert len(keeps) == 1  # the second multiplies the rows that the first has kept


def test_rows_that_are_a_part_of_wider_ones(vllm_config: VllmConfig) -> None:
    """As the two latents of DeepSeek's attention are, behind one linear."""
    module = Module(
        lambda self, x: (self.linear(self.norm(x.split([K, 64], dim=-1)[0]))[0],),
        norm=norm(torch.bfloat16),
        linear=linear(K, K, torch.bfloat16),
    )
    compiled = Compiled(module, vllm_config)
    assert_same(compiled(rows(6, torch.bfloat16, K + 64)), module(rows(6, torch.bfloat16, K + 64)))
    assert compiled.fused == fusion.Fused(linears=1, norms=1, gates=0)


def test_a_norm_whose_sums_nobody_wants(vllm_config: VllmConfig) -> None:
    module = Module(
        lambda self, x, residual: (self.linear(self.norm(x, residual)[0])[0],),
        norm=norm(torch.bfloat16),
        linear=linear(K, K, torch.bfloat16),
    )
    compiled = Compiled(module, vllm_config)
    inputs = rows(6, torch.bfloat16), rows(7, torch.bfloat16)[:6]
    assert_same(compiled(*inputs), module(*(each.clone() for each in inputs)))
    assert compiled.fused == fusion.Fused(linears=1, norms=1, gates=0)


HEAD = 64


def heads_of(dtype: torch.dtype, **of: Any) -> dict[str, nn.Module]:
    """Return the norms and the rotary embedding of heads, as Qwen3 has them."""
    norms = {name: RMSNorm(HEAD, dtype=dtype).to(DEVICE) for name in ("q_norm", "k_norm")}
    for layer in norms.values():
        layer.weight.data.copy_(torch.rand(HEAD) + 0.5)
    with DEVICE:
        rope = {"rotary_dim": HEAD, "max_position_embeddings": 64, "base": 1e4, "is_neox_style": True, **of}
        return {**norms, "rotary_emb": RotaryEmbedding(HEAD, dtype=dtype, **rope)}


def attention_of(self: Any, x: torch.Tensor, positions: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """What Qwen3's attention does ahead of its kernel: three heads of queries and one of keys and of values."""
    query, key, value = self.qkv(x)[0].split([3 * HEAD, HEAD, HEAD], dim=-1)
    query_heads = self.q_norm(query.view(*query.shape[:-1], query.shape[-1] // HEAD, HEAD))
    key_heads = self.k_norm(key.view(*key.shape[:-1], key.shape[-1] // HEAD, HEAD))
    query, key = self.rotary_emb(positions, query_heads.view(query.shape), key_heads.view(key.shape))
    return query.view(-1, 3, HEAD), key.view(-1, 1, HEAD), value.view(-1, 1, HEAD)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_heads_are_normalised_and_rotated_at_once(dtype: torch.dtype, vllm_config: VllmConfig) -> None:
    module = Module(attention_of, qkv=linear(5 * HEAD, K, dtype), **heads_of(dtype))
    compiled = Compiled(module, vllm_config)
    for m in (5, 2, 40):
        inputs = rows(m, dtype), (torch.arange(m) * 7 % 64).to(DEVICE)
        assert_same(compiled(*inputs), module(*inputs))
    assert compiled.fused == fusion.Fused(linears=1, norms=0, gates=0, heads=1)
    assert str(compiled.fused).endswith("; queries and keys are normalised and rotated in one kernel")
    assert ops.qk_norm_rope.default in compiled.targets
    left = {"vllm_ir", "cat", "clone", "index", "mul", "sub", "unsqueeze"}
    assert not any(name in str(target) for target in compiled.targets for name in left)


def behind_attention(self: Any, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Return what begins as a piece behind attention does, and a linear of rows that were touched."""
    attended = self.out(x.view(-1, K))[0]
    return attended, self.other(x.view(-1, K) * 2)[0]


def test_a_linear_of_what_a_piece_is_given_takes_what_attention_leaves(vllm_config: VllmConfig) -> None:
    dtype = torch.bfloat16
    module = Module(behind_attention, out=linear(136, K, dtype), other=linear(72, K, dtype))
    compiled, x = Compiled(module, vllm_config), rows(5, dtype).view(5, 2, K // 2)
    assert_same(compiled(x), module(x.clone()))
    ours = [target for target in compiled.targets if str(target).startswith("fp8_backend")]
    assert ours == [ops.behind_attention.default, ops.linear.default]


class FlashAttentionImpl:
    """What is known of vLLM's by its name: the layout of its cache, and how it is written."""

    head_size, attn_type = HEAD, "decoder"

    def do_kv_cache_update(self, layer: Any, keys: Any, values: Any, kv_cache: torch.Tensor, slots: Any) -> None:
        reference.keep(keys, values, *kv_cache.transpose(1, 2).split(HEAD, dim=-1), slots)


class OtherImpl(FlashAttentionImpl):
    """One whose cache only it can write."""


def attention_with_cache(self: Any, x: torch.Tensor, positions: torch.Tensor) -> tuple[torch.Tensor, ...]:
    query, key, value = attention_of(self, x, positions)
    return query, key, value, torch.ops.vllm.unified_kv_cache_update(key, value, _encode_layer_name("attention"))


@pytest.mark.parametrize("impl", [FlashAttentionImpl, OtherImpl])
def test_the_cache_is_written_with_the_heads(impl: type, vllm_config: VllmConfig) -> None:
    dtype = torch.bfloat16
    module = Module(attention_with_cache, qkv=linear(5 * HEAD, K, dtype), **heads_of(dtype))
    layer = SimpleNamespace(impl=impl(), kv_cache=torch.empty(0))
    vllm_config.compilation_config.static_forward_context["attention"] = layer
    compiled = Compiled(module, vllm_config)
    for m, slots in ((5, [4, -1, 1, 9, 0]), (2, [3]), (40, None)):  # without slots it is a dummy run
        mapping = {} if slots is None else {"attention": torch.tensor(slots).to(DEVICE)}
        inputs, caches = (rows(m, dtype), (torch.arange(m) * 7 % 64).to(DEVICE)), []
        for call in (compiled, module):
            layer.kv_cache = torch.zeros(3, 1, 4, 2 * HEAD, dtype=dtype, device=DEVICE)
            with set_forward_context(None, vllm_config, slot_mapping=mapping):
                caches.append((*call(*inputs)[:3], layer.kv_cache))
        assert_same(*caches)
        assert (slots is None) == (not caches[0][-1].any())
    assert compiled.fused == fusion.Fused(linears=1, norms=0, gates=0, heads=1, caches=1)
    assert str(compiled.fused).endswith("normalised and rotated in one kernel, which writes the cache, too")
    assert ops.qk_norm_rope_cache.default in compiled.targets
    assert not any("unified_kv_cache_update" in str(target) for target in compiled.targets)


def test_slots_of_other_ranks_tokens_are_left_to_the_backend(vllm_config: VllmConfig) -> None:
    given: list[Any] = []
    layer = SimpleNamespace(impl=FlashAttentionImpl(), kv_cache=torch.zeros(3, 1, 4, 2 * HEAD, dtype=torch.bfloat16))
    layer.impl.do_kv_cache_update = lambda *arguments: given.extend(arguments)  # type: ignore[method-assign]
    vllm_config.compilation_config.static_forward_context["attention"] = layer
    ones = torch.ones(64, HEAD, dtype=torch.bfloat16, device=DEVICE)
    wide, positions, slots = rows(2, torch.bfloat16, 5 * HEAD), torch.arange(2).to(DEVICE), torch.arange(4).to(DEVICE)
    with set_forward_context(None, vllm_config, slot_mapping={"attention": slots}):
        operands = wide, positions, ones[0], ones[0], ones, 1e-6, 3, 1
        _, keys, _ = ops.qk_norm_rope_cache(*operands, _encode_layer_name("attention"))
    assert given[0] is layer and given[1] is not None and torch.equal(given[1], keys)
    assert torch.equal(given[2], wide[:, 4 * HEAD :].view(2, 1, HEAD)) and given[4] is slots


def other_values(self: Any, x: torch.Tensor, positions: torch.Tensor) -> tuple[torch.Tensor, ...]:
    query, key, value = attention_of(self, x, positions)
    return query, torch.ops.vllm.unified_kv_cache_update(key, torch.relu(value), _encode_layer_name("attention"))


def test_values_that_are_no_part_of_the_rows_are_left_alone(vllm_config: VllmConfig) -> None:
    dtype = torch.bfloat16
    module = Module(other_values, qkv=linear(5 * HEAD, K, dtype), **heads_of(dtype))
    kv_cache = torch.zeros(3, 1, 4, 2 * HEAD, dtype=dtype, device=DEVICE)
    layer = SimpleNamespace(impl=FlashAttentionImpl(), kv_cache=kv_cache)
    vllm_config.compilation_config.static_forward_context["attention"] = layer
    compiled = Compiled(module, vllm_config)
    with set_forward_context(None, vllm_config, slot_mapping={"attention": torch.tensor([1, 2]).to(DEVICE)}):
        compiled(rows(2, dtype), torch.arange(2).to(DEVICE))
    assert compiled.fused == fusion.Fused(linears=1, norms=0, gates=0, heads=1)
    assert kv_cache.any()


def keys_that_are_not_normalised(self: Any, x: torch.Tensor, positions: torch.Tensor) -> tuple[torch.Tensor, ...]:
    query, key = self.qkv(x)[0].split([3 * HEAD, 2 * HEAD], dim=-1)
    return self.rotary_emb(positions, self.q_norm(query.unflatten(-1, (3, HEAD))).flatten(-2), key)


@pytest.mark.parametrize(
    ("forward", "of"),
    [
        (keys_that_are_not_normalised, {}),
        (attention_of, {"is_neox_style": False}),
        (attention_of, {"rotary_dim": HEAD // 2}),
    ],
    ids=["keys", "neighbours are rotated", "part of a head"],
)
def test_other_rotations_are_left_alone(
    forward: Callable[..., Any], of: dict[str, Any], vllm_config: VllmConfig
) -> None:
    dtype = torch.bfloat16
    module = Module(forward, qkv=linear(5 * HEAD, K, dtype), **heads_of(dtype, **of))
    compiled = Compiled(module, vllm_config)
    inputs = rows(6, dtype), torch.arange(6).to(DEVICE)
    assert_same(compiled(*inputs), module(*inputs))
    assert compiled.fused == fusion.Fused(linears=1, norms=0, gates=0)


def gate_and_product(self: Any, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    product = self.silu_and_mul(x)
    return self.linear(product)[0], product


def gate_second(self: Any, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return (self.linear(x[..., :K] * nn.functional.silu(x[..., K:]))[0],)


def gate_of_a_part(self: Any, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return (self.linear(nn.functional.silu(x[..., :K]) * x[..., K : 2 * K])[0],)


def rows_in_three_dimensions(self: Any, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return (self.linear(self.norm(x.unflatten(0, (-1, 1))))[0],)


def a_norm_in_between(self: Any, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return (self.linear(torch.relu(self.norm(x)))[0],)


@pytest.mark.parametrize(
    ("forward", "width", "of"),
    [
        (gate_and_product, 2 * K, {}),
        (gate_second, 2 * K, {}),
        (gate_of_a_part, 2 * K + 8, {}),
        (rows_in_three_dimensions, K, {}),
        (a_norm_in_between, K, {}),
        (lambda self, x: (self.linear(self.norm(x))[0],), K, {"var_hidden_size": 128}),
        (lambda self, x: (self.linear(self.norm(x))[0],), K, {"has_weight": False}),
        (lambda self, x: (self.linear(self.gemma(x))[0],), K, {}),
    ],
    ids=["product", "gate second", "part", "3 dimensions", "in between", "variance", "no weight", "float32 weight"],
)
def test_what_the_kernels_do_not_compute_is_left_alone(
    forward: Callable[..., Any], width: int, of: dict[str, Any], vllm_config: VllmConfig
) -> None:
    dtype = torch.bfloat16
    layers = {"norm": norm(dtype, **of), "gemma": GemmaRMSNorm(K).to(DEVICE), "silu_and_mul": SiluAndMul()}
    module = Module(forward, linear=linear(K, K, dtype), **layers)
    compiled = Compiled(module, vllm_config)
    compiled(rows(6, dtype, width))
    assert compiled.fused == fusion.Fused(linears=1, norms=0, gates=0)
    assert ops.linear.default in compiled.targets


def test_ops_have_faithful_fakes() -> None:
    layer, x, weight = linear(136, K, torch.bfloat16), rows(3, torch.bfloat16), torch.ones(K).to(DEVICE, torch.bfloat16)
    packed = layer.weight.data, layer.weight_scale_inv.data
    bias = torch.ones(136, dtype=torch.bfloat16, device=DEVICE)
    for residual, given, keep in ((None, None, False), (x.clone(), bias, True)):
        arguments = (x, residual, weight, 1e-6, *packed, given, 136, keep)
        torch.library.opcheck(ops.rms_norm_linear, arguments, test_utils="test_faketensor")
    heads = (x, torch.arange(3).to(DEVICE), weight[:64], weight[:64], torch.ones(4, 64).to(x), 1e-6, 2, 1)
    torch.library.opcheck(ops.qk_norm_rope, heads, test_utils="test_faketensor")
    arguments = (rows(3, torch.bfloat16, 2 * K), *packed, None, 136)
    torch.library.opcheck(ops.silu_mul_linear, arguments, test_utils="test_faketensor")
    empty = ops.rms_norm_linear(x[:0], x[:0], weight, 1e-6, *packed, bias, 136, True)
    assert [tuple(each.shape) for each in empty] == [(0, 136), (0, K), (0, K)]


UPDATE = "vllm::unified_kv_cache_update"


def stand_in(mode: CompilationMode, model_type: str = "qwen3", **passes: Any) -> Any:
    compilation = SimpleNamespace(mode=mode, inductor_compile_config=passes, splitting_ops=["vllm::other", UPDATE])
    model = SimpleNamespace(hf_text_config=SimpleNamespace(model_type=model_type))
    return SimpleNamespace(compilation_config=compilation, model_config=model)


def test_it_is_installed_where_vllm_compiles(monkeypatch: pytest.MonkeyPatch, caplog_vllm: list[str]) -> None:
    key, compiles = current_platform.pass_key, CompilationMode.VLLM_COMPILE
    config = stand_in(compiles)
    fusion.install(config)
    installed = config.compilation_config.inductor_compile_config[key]
    assert isinstance(installed, InductorPass) and isinstance(installed.uuid(), str)
    fusion.install(config)
    assert config.compilation_config.inductor_compile_config == {key: installed} and not caplog_vllm
    for mode in (CompilationMode.NONE, CompilationMode.DYNAMO_TRACE_ONCE):
        fusion.install(config := stand_in(mode))
        assert not config.compilation_config.inductor_compile_config
    fusion.install(stand_in(compiles, **{key: "theirs"}))
    assert "linears quantise by themselves: the compilation config has a pass of its own, theirs" in caplog_vllm
    monkeypatch.setenv("FP8_BACKEND_FUSE", "0")
    fusion.install(config := stand_in(compiles))
    assert not config.compilation_config.inductor_compile_config


def test_the_cache_is_written_in_pieces_of_models_whose_heads_are_joined(monkeypatch: pytest.MonkeyPatch) -> None:
    def splits(model_type: str, **passes: Any) -> bool:
        config = stand_in(CompilationMode.VLLM_COMPILE, model_type, **passes)
        fusion.install(config)
        fusion.install(config)
        assert "vllm::other" in config.compilation_config.splitting_ops
        return UPDATE in config.compilation_config.splitting_ops

    assert not splits("qwen3") and not splits("qwen3_moe")
    assert splits("llama")
    assert splits("qwen3", **{current_platform.pass_key: "theirs"})
    monkeypatch.setattr(compat, "names_are_inputs", lambda: False)
    assert splits("qwen3")


def test_it_says_once_what_it_did(vllm_config: VllmConfig, caplog_vllm: list[str]) -> None:
    graph = fx.Graph()
    graph.output(graph.placeholder("x"))
    for _ in range(2):
        fusion.FusionPass(speak=True)(graph)
    assert not caplog_vllm  # nothing to say of pieces without a linear
    for _ in range(2):
        fusion._say_once(str(fusion.Fused(4, 2, 1)))
    assert caplog_vllm == [
        "of 4 linears in a compiled piece 2 are joined to RMSNorm and 1 to SiLU-and-multiply, 1 quantise by themselves"
    ]


def test_calls_are_counted() -> None:
    before = counters.calls.copy()
    layer, x = linear(K, K, torch.bfloat16), rows(3, torch.bfloat16, 2 * K)
    packed = layer.weight.data, layer.weight_scale_inv.data
    ops.silu_mul_linear(x, *packed, None, K)
    ops.rms_norm_linear(x[:, :K], None, torch.ones(K).to(x), 1e-6, *packed, None, K, False)
    ones, places = torch.ones(2, 64).to(x), torch.zeros(3, dtype=torch.int64, device=x.device)
    ops.qk_norm_rope(x, places, ones[0], ones[1], ones, 1e-6, 2, 1)
    assert counters.calls - before == {"silu_mul_linear": 1, "rms_norm_linear": 1, "qk_norm_rope": 1}
