"""Which layers and steps of vLLM's attention the kernel gets, with the parts of vLLM that decide standing by."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("vllm", reason="needs vLLM; vllm is not installed")

from vllm.config import CUDAGraphMode
from vllm.forward_context import BatchDescriptor, set_forward_context

from fp8_backend import counters
from fp8_backend.integration import attention as layer_attention
from fp8_backend.integration import compat, ops
from fp8_backend.kernels import attended_linear, attention
from fp8_backend.kernels.backend import batch_invariant
from fp8_backend.kernels.problem import Machine
from tests.emulation import emulated
from tests.test_attended_linear import linear_of
from tests.test_attention import HEAD, assert_attends, needs_compiler, operands

DTYPE = torch.bfloat16


class FlashAttentionImpl:
    """What is known of vLLM's by its name."""

    num_heads, num_kv_heads, num_queries_per_kv, head_size, scale = 4, 2, 2, HEAD, HEAD**-0.5
    attn_type, kv_cache_dtype, sliding_window, dcp_world_size = "decoder", "auto", (-1, -1), 1
    alibi_slopes = sinks = None
    logits_soft_cap = 0

    def forward(self, layer: Any, query: Any, key: Any, value: Any, kv_cache: Any, metadata: Any, output: Any) -> Any:
        """Leave a mark."""
        return output.fill_(7.0)


class OtherImpl(FlashAttentionImpl):
    """One that may attend to something else."""


RUNS_WITH_ITS_PIECE = compat.attention_runs_with_its_piece
SERVED = layer_attention.Served(DTYPE, 5, own_cache=True, own_graphs=True)


def step(table: torch.Tensor, lengths: torch.Tensor, **changes: Any) -> Any:
    """Return FlashAttention's metadata of a decode step, as of 0.26."""
    more = {"use_cascade": False, "sliding_window": None, "mm_prefix_range_tensor": None, "rswa_prefix_lens": None}
    known = {"num_actual_tokens": len(lengths), "max_query_len": 1, "seq_lens": lengths, "block_table": table}
    return SimpleNamespace(**{**known, "causal": True, **more, **changes})


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(attention, "_workspaces", {})
    monkeypatch.setattr(compat, "attention_runs_with_its_piece", lambda: True)  # but where there is a context
    batch_invariant.cache_clear()
    yield
    batch_invariant.cache_clear()


def adopted(**changes: Any) -> tuple[Any, bool]:
    impl = FlashAttentionImpl()
    for name, value in changes.items():
        setattr(impl, name, value)
    layer = SimpleNamespace(impl=impl)
    return layer, layer_attention.adopt(layer, SERVED, speak=False)


@needs_compiler
def test_decode_steps_are_the_kernels(tmp_path_factory: pytest.TempPathFactory) -> None:
    layer, taken = adopted()
    assert taken and layer_attention.adopt(layer, SERVED, speak=True)  # once more
    assert compat.is_flash_attention(layer.impl) and isinstance(layer.impl, FlashAttentionImpl)
    queries, keys, values, table, lengths = operands([3, 0, 90], 4, 2, 16, DTYPE)
    kv_cache = torch.cat((keys, values), dim=-1).transpose(1, 2)
    padded, out = torch.cat((queries, queries)), torch.full((6, 4, HEAD), 5.0, dtype=DTYPE)
    with emulated(tmp_path_factory.getbasetemp(), Machine(2, (1, 1, 1))) as machine:
        layer.impl.forward(layer, padded, None, None, kv_cache, None, out)  # vLLM's profile
        assert attention.has_workspace(queries.device, 5 * 2, 2) and out.eq(7).all()
        before = counters.calls["attention"]
        found = layer.impl.forward(layer, padded, None, None, kv_cache, step(table, lengths), output=out)
        assert found is out and out[3:].eq(7).all() and counters.calls["attention"] == before + 1
        assert_attends((queries, keys, values, table, lengths), out[:3], DTYPE)
        assert [spec for spec, _ in machine.loaded] == [attention.SPECS[DTYPE]]


@needs_compiler
def test_the_linear_behind_gets_codes_of_its_step_alone(tmp_path_factory: pytest.TempPathFactory) -> None:
    layer, _ = adopted()
    queries, keys, values, table, lengths = operands([3, 20], 4, 2, 16, DTYPE)
    kv_cache, out = torch.cat((keys, values), dim=-1).transpose(1, 2), torch.empty(2, 4, HEAD, dtype=DTYPE)
    weight, scale = linear_of(72, 4 * HEAD)

    def attend(metadata: Any) -> Any:
        layer.impl.forward(layer, queries, None, None, kv_cache, metadata, output=out)
        return attended_linear._last.left

    def multiply(op: Any) -> torch.Tensor:
        return op(out.view(2, -1), weight, scale, None, 72)

    decode = step(table, lengths)
    with emulated(tmp_path_factory.getbasetemp(), Machine(2, (1, 1, 1))):
        assert attend(None) is None and attend(decode) is None  # nobody has said how codes are to lie
        expected = multiply(ops.behind_attention)
        assert attend(decode) is not None and torch.equal(multiply(ops.behind_attention), expected)
        assert attended_linear._last.left is None and torch.equal(multiply(ops.linear), expected)
        assert attend(decode) is not None and torch.equal(multiply(ops.linear), expected)
        assert attended_linear._last.left is None
        assert attend(decode) is not None and attend(step(table, lengths, max_query_len=2)) is None
        assert torch.equal(multiply(ops.behind_attention), multiply(ops.linear))  # of FlashAttention's


@needs_compiler
def test_no_codes_are_left_for_a_graph_of_a_piece_alone(
    one_rank: Any, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In vLLM's own context of a step: what the host sees of such a graph is not what a replay does."""
    monkeypatch.setattr(compat, "attention_runs_with_its_piece", RUNS_WITH_ITS_PIECE)
    layer, _ = adopted()
    queries, keys, values, table, lengths = given = operands([3, 20], 4, 2, 16, DTYPE)
    kv_cache, out = torch.cat((keys, values), dim=-1).transpose(1, 2), torch.empty(2, 4, HEAD, dtype=DTYPE)
    weight, scale = linear_of(72, 4 * HEAD)

    def leaves_codes(mode: CUDAGraphMode) -> bool:
        metadata = step(table, lengths)
        with set_forward_context(metadata, one_rank, cudagraph_runtime_mode=mode, batch_descriptor=BatchDescriptor(2)):
            layer.impl.forward(layer, queries, None, None, kv_cache, metadata, output=out)
        assert_attends(given, out, DTYPE)
        return attended_linear._last.left is not None

    with emulated(tmp_path_factory.getbasetemp(), Machine(2, (1, 1, 1))):
        layer.impl.forward(layer, queries, None, None, kv_cache, None, output=out)  # vLLM's profile
        assert not leaves_codes(CUDAGraphMode.NONE)  # nobody has said how they are to lie
        ops.behind_attention(out.view(2, -1), weight, scale, None, 72)
        assert leaves_codes(CUDAGraphMode.NONE) and leaves_codes(CUDAGraphMode.FULL)
        assert not leaves_codes(CUDAGraphMode.PIECEWISE)


@pytest.mark.parametrize(
    "changes",
    [
        {"max_query_len": 2},
        {"use_cascade": True},
        {"causal": False},
        {"causal": torch.ones(2)},
        {"sliding_window": (127, 0)},
        {"mm_prefix_range_tensor": torch.ones(1)},
        {"rswa_prefix_lens": torch.ones(1)},
        {"num_actual_tokens": 3},  # more tokens than requests
    ],
    ids=str,
)
def test_other_steps_are_flash_attentions(changes: dict[str, Any]) -> None:
    layer, _ = adopted()
    queries, keys, values, table, lengths = operands([3, 20], 4, 2, 16, DTYPE)
    kv_cache, out = torch.cat((keys, values), dim=-1).transpose(1, 2), torch.empty(3, 4, HEAD, dtype=DTYPE)
    layer.impl.forward(layer, queries, None, None, kv_cache, step(table, lengths, **changes), output=out)
    assert out.eq(7).all()


def test_steps_with_another_cache_are_flash_attentions() -> None:
    layer, _ = adopted()
    queries, keys, values, table, lengths = operands([3, 20], 4, 2, 16, DTYPE)
    codes = torch.cat((keys, values), dim=-1).transpose(1, 2).to(torch.float8_e4m3fn)
    for query, kv_cache in ((queries, codes), (queries.half(), codes.to(DTYPE)), (queries, codes.to(DTYPE)[..., :-8])):
        out = torch.empty(2, 4, HEAD, dtype=query.dtype)
        layer.impl.forward(layer, query, None, None, kv_cache, step(table, lengths), output=out)
        assert out.eq(7).all()


@pytest.mark.parametrize(
    "changes",
    [
        {"head_size": 64},
        {"num_heads": 18},
        {"attn_type": "encoder"},
        {"kv_cache_dtype": "fp8"},
        {"sliding_window": (127, 0)},
        {"alibi_slopes": torch.ones(4)},
        {"sinks": torch.ones(4)},
        {"logits_soft_cap": 30.0},
        {"dcp_world_size": 2},
    ],
    ids=str,
)
def test_other_layers_are_left_alone(changes: dict[str, Any]) -> None:
    layer, taken = adopted(**changes)
    assert not taken and type(layer.impl) is FlashAttentionImpl


def test_other_engines_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def taken(served: layer_attention.Served | None, impl: type = FlashAttentionImpl) -> bool:
        return layer_attention.adopt(SimpleNamespace(impl=impl()), served, speak=False)

    def known(**changes: Any) -> layer_attention.Served | None:
        model, scheduler = SimpleNamespace(dtype=DTYPE), SimpleNamespace(max_num_seqs=5)
        compilation = SimpleNamespace(cudagraph_mode=changes.pop("mode", CUDAGraphMode.FULL_AND_PIECEWISE))
        engine = {"model_config": model, "scheduler_config": scheduler, "kv_transfer_config": None} | changes
        engine["compilation_config"] = compilation
        return layer_attention.served_by(SimpleNamespace(**engine))

    assert known() == SERVED and taken(known())
    assert not taken(SERVED, OtherImpl)
    assert not taken(known(model_config=None)) and not taken(known(kv_transfer_config=object()))
    for mode in CUDAGraphMode:  # graphs of mixed steps are replayed for prompts
        assert taken(known(mode=mode)) == (mode != CUDAGraphMode.FULL)
    assert not taken(SERVED._replace(dtype=torch.float32))
    monkeypatch.setenv("FP8_BACKEND_ATTENTION", "0")
    assert not taken(SERVED)
    monkeypatch.setenv("FP8_BACKEND_ATTENTION", "1")
    monkeypatch.setenv("FP8_BACKEND_BATCH_INVARIANT", "1")
    batch_invariant.cache_clear()
    assert not taken(SERVED)
