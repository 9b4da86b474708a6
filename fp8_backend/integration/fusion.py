"""The compile pass that joins RMSNorm and SiLU-and-multiply to the linears behind them, which saves these a launch.

vLLM's own passes join them to its quantisation ops. Here quantisation hides in the linear, so they are joined to that:
the codes never appear in a graph, and how they lie in memory can follow the kernel that is chosen for each number of
tokens. The pass runs behind vLLM's, on each piece of a model, with the number of tokens symbolic. RMSNorm still is one
node there, torch.ops.vllm_ir.*; SiLU-and-multiply is what torch makes of its layer.
"""

from __future__ import annotations

import functools
import logging
import operator
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import vllm.ir.ops  # noqa: F401  registers torch.ops.vllm_ir
from torch import fx
from torch._inductor import pattern_matcher
from vllm.compilation.passes.inductor_pass import InductorPass, enable_fake_mode
from vllm.config import CompilationMode
from vllm.distributed import get_tensor_model_parallel_rank
from vllm.model_executor.layers.activation import SiluAndMul
from vllm.platforms import current_platform

from fp8_backend import settings
from fp8_backend.integration import compat, ops
from fp8_backend.integration.fusion_heads import join_heads
from fp8_backend.integration.plugin import ops_version
from fp8_backend.kernels import norm, silu

if TYPE_CHECKING:
    from vllm.config import VllmConfig

_LINEAR = ops.linear.default
_VIEWS = torch.ops.aten.view.default, torch.ops.aten.reshape.default, torch.ops.aten._unsafe_view.default
_RMS_NORM = torch.ops.vllm_ir.rms_norm.default
_ADD_RMS_NORM = torch.ops.vllm_ir.fused_add_rms_norm.default

NORMALISES_HEADS = ("qwen3", "qwen3_moe")  # models whose attention begins as `fusion_heads` finds it

logger = logging.getLogger("vllm.fp8_backend.integration.fusion")


class Fused(NamedTuple):
    """How many linears a graph had, to how many of them each kind was joined, and how often heads are rotated at once.

    heads: pairs of queries and keys whose RMSNorm and rotary embedding are one kernel. caches: of these, how many are
    written to the cache by it.
    """

    linears: int
    norms: int
    gates: int
    heads: int = 0
    caches: int = 0

    def __str__(self) -> str:
        alone = self.linears - self.norms - self.gates
        heads = "; queries and keys are normalised and rotated in one kernel" if self.heads else ""
        if self.caches:
            heads += ", which writes the cache, too"
        return (
            f"of {self.linears} linears in a compiled piece {self.norms} are joined to RMSNorm and {self.gates} to "
            f"SiLU-and-multiply, {alone} quantise by themselves{heads}"
        )


class FusionPass(InductorPass):
    """Rewrites one functional graph; vLLM calls it for every piece of a model that it compiles."""

    def __init__(self, speak: bool) -> None:
        self.speak = speak

    def __call__(self, graph: fx.Graph) -> None:
        """Join what can be joined; log one line for each kind of graph."""
        fused = fuse(graph)
        if self.speak and fused.linears:
            _say_once(str(fused))

    def uuid(self) -> str:
        """Return what the result depends on beside the graph; it is a part of the keys of vLLM's and torch's caches."""
        return ops_version()


@functools.cache
def _say_once(line: str) -> None:
    logger.info("%s", line)


def install(vllm_config: VllmConfig) -> None:
    """Have a model compiled with the pass, if it is compiled by vLLM's passes at all and the settings want it."""
    compilation = vllm_config.compilation_config
    if compilation.mode != CompilationMode.VLLM_COMPILE or not settings.load().fuse:
        return
    passes, key = compilation.inductor_compile_config, current_platform.pass_key
    speak = get_tensor_model_parallel_rank() == 0
    if isinstance(passes.setdefault(key, FusionPass(speak)), FusionPass):
        _keep_cache_update(vllm_config)
    elif speak:
        logger.warning("linears quantise by themselves: the compilation config has a pass of its own, %s", passes[key])


def _keep_cache_update(vllm_config: VllmConfig) -> None:
    """Have the write to the cache compiled with the linear ahead of it, where the heads in between will be joined.

    vLLM cuts models there, since it compiled each layer anew for its name's sake; a name that is an input does not.
    """
    compilation, update = vllm_config.compilation_config, "vllm::unified_kv_cache_update"
    model = vllm_config.model_config  # None where layers are made without one
    model_type = None if model is None else model.hf_text_config.model_type
    if model_type in NORMALISES_HEADS and compat.names_are_inputs() and update in (compilation.splitting_ops or ()):
        compilation.splitting_ops.remove(update)


def fuse(graph: fx.Graph) -> Fused:
    """Join RMSNorm and SiLU-and-multiply to the linears that take what they give, and say how many.

    Args:
        graph: functional, as torch.compile has it before the lowering of vLLM's IR ops; changed in place.
    """
    linears = graph.find_nodes(op="call_function", target=_LINEAR)
    norms = sum(_join_norm(graph, linear) for linear in linears)
    # The linears that are left, which nothing has removed.
    rest = graph.find_nodes(op="call_function", target=_LINEAR)
    gates = sum(_join_gate(graph, linear) for linear in rest)
    for linear in graph.find_nodes(op="call_function", target=_LINEAR):
        if _is_given(linear.args[0]):
            linear.target = ops.behind_attention.default
    return Fused(len(linears), norms, gates, *join_heads(graph))


def _is_given(rows: Any) -> bool:
    """Return whether rows are an input of the graph as it was made: of the pieces of a model such are attention's."""
    while isinstance(rows, fx.Node) and rows.target in _VIEWS:
        rows = rows.args[0]
    return isinstance(rows, fx.Node) and rows.op == "placeholder"


def _value(node: fx.Node) -> torch.Tensor:
    return node.meta["val"]


def _insert(graph: fx.Graph, before: fx.Node, target: torch._ops.OpOverload, arguments: tuple[Any, ...]) -> fx.Node:
    with graph.inserting_before(before):
        node = graph.call_function(target, arguments)
    values = fx.map_arg(arguments, _value)
    node.meta["val"] = target(*values)
    return node


def _item(graph: fx.Graph, of: fx.Node, index: int) -> fx.Node:
    with graph.inserting_after(of):
        node = graph.call_function(operator.getitem, (of, index))
    node.meta["val"] = of.meta["val"][index]
    return node


def _join_norm(graph: fx.Graph, linear: fx.Node) -> bool:
    """Put the RMSNorm whose rows a linear multiplies into it, if it is one that the kernel computes."""
    rows, weight, scale, bias, n = linear.args
    assert isinstance(rows, fx.Node)
    made = rows
    if rows.target is operator.getitem and rows.args[1] == 0:
        made = rows.args[0]
    if made.target not in (_RMS_NORM, _ADD_RMS_NORM) or (made.target == _ADD_RMS_NORM) == (made is rows):
        return False
    x, *residual, norm_weight, epsilon = made.args[: 4 if made.target == _ADD_RMS_NORM else 3]
    variance_size = made.args[len(residual) + 3 :]
    if any(size is not None for size in variance_size) or not _kernel_takes(x, norm_weight):
        return False
    items = {item.args[1]: item for item in made.users} if residual else {}
    if len(items) != (len(made.users) if residual else 0):
        return False  # an item was taken twice
    place = {node: index for index, node in enumerate(graph.nodes)}
    if any(isinstance(each, fx.Node) and place[each] > place[made] for each in (weight, scale, bias)):
        return False  # somebody may want the rows before these are there
    keep = len(rows.users) > 1
    arguments = (x, residual[0] if residual else None, norm_weight, epsilon, weight, scale, bias, n, keep)
    joined = _insert(graph, made, ops.rms_norm_linear.default, arguments)
    linear.replace_all_uses_with(_item(graph, joined, 0))
    graph.erase_node(linear)
    if keep:
        rows.replace_all_uses_with(_item(graph, joined, 2))
    if 1 in items:
        items[1].replace_all_uses_with(_item(graph, joined, 1))
    for replaced in (*items.values(), made):
        graph.erase_node(replaced)
    return True


def _kernel_takes(x: Any, norm_weight: Any) -> bool:
    if norm_weight is None:
        return False
    rows, weight = _value(x), _value(norm_weight)
    return rows.dim() == 2 and rows.dtype in norm.DTYPES and weight.dtype == rows.dtype and rows.shape[1] <= norm.MAX_K


def _join_gate(graph: fx.Graph, linear: fx.Node) -> bool:
    """Put the SiLU-and-multiply whose product a linear multiplies into it, if nobody else takes that."""
    product, weight, scale, bias, n = linear.args
    assert isinstance(product, fx.Node)
    value = product.meta.get("val")
    if product.op != "call_function" or value is None or value.dim() != 2 or value.dtype not in silu.DTYPES:
        return False
    matched: dict[fx.Node, fx.Node] = {}
    pattern = _silu_and_mul(int(value.shape[1]), value.dtype)
    wanted = pattern.output_node().args[0]
    if not _same(wanted, product, matched):
        return False
    x = next(found for traced, found in matched.items() if traced.op == "placeholder")
    inner = [found for traced, found in matched.items() if traced.op != "placeholder"]
    others = {user for node in inner for user in node.users} - {*inner, linear}
    if others or _value(x).shape[1] != 2 * value.shape[1]:
        return False
    joined = _insert(graph, linear, ops.silu_mul_linear.default, (x, weight, scale, bias, n))
    linear.replace_all_uses_with(joined)
    graph.erase_node(linear)
    place = {node: index for index, node in enumerate(graph.nodes)}
    for node in sorted(inner, key=place.__getitem__, reverse=True):
        graph.erase_node(node)
    return True


@functools.cache
def _silu_and_mul(k: int, dtype: torch.dtype) -> fx.Graph:
    """Return what torch's decompositions make of vLLM's layer for [m, 2 * k], by the versions of both that run."""

    def trace() -> fx.Graph:
        return pattern_matcher.fwd_only(SiluAndMul.forward_native, [torch.empty(3, 2 * k, dtype=dtype)]).graph

    traced: fx.Graph = enable_fake_mode(trace)()
    return traced


def _same(traced: Any, found: Any, matched: dict[fx.Node, fx.Node]) -> bool:
    """Return whether a node of a graph computes what one of the pattern does, and remember each pair of nodes."""
    if not isinstance(traced, fx.Node):
        return bool(type(traced) is type(found) and traced == found)
    if not isinstance(found, fx.Node):
        return False
    if traced in matched:
        return matched[traced] is found
    if traced.op != "placeholder":
        ours, theirs = (*traced.args, *traced.kwargs.values()), (*found.args, *found.kwargs.values())
        if traced.target != found.target or [*traced.kwargs] != [*found.kwargs] or len(ours) != len(theirs):
            return False
        if not all(_same(*pair, matched) for pair in zip(ours, theirs, strict=True)):
            return False
    matched[traced] = found
    return True
