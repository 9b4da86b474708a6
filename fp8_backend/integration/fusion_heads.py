"""Finds RMSNorm and rotary embedding of the queries' and keys' heads in a graph and makes them one node.

The write of keys and values to the cache becomes a part of it, where it is in the same graph: vLLM keeps it out of the
pieces it compiles, unless `fusion.install` says otherwise.

vLLM has both as a layer each; torch's decompositions leave a dozen nodes of the second, for queries and keys. Behind a
linear they are two kernels of a compiled model, in each layer, that take longer to start than to run.
"""

from __future__ import annotations

import operator
from typing import Any, NamedTuple

import torch
import vllm.ir.ops  # noqa: F401  registers torch.ops.vllm_ir
import vllm.model_executor.layers.attention.attention  # noqa: F401  registers torch.ops.vllm.unified_kv_cache_update
from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from fp8_backend.integration import ops
from fp8_backend.kernels import norm_rope

_aten = torch.ops.aten
_RMS_NORM = torch.ops.vllm_ir.rms_norm.default
_UPDATE = torch.ops.vllm.unified_kv_cache_update.default
_SAME_ELEMENTS = (
    _aten.view.default,
    _aten._unsafe_view.default,
    _aten.reshape.default,
    _aten.alias.default,
    _aten.clone.default,
)


class Rotated(NamedTuple):
    """Heads behind their norm and rotation.

    result: [m, heads, head]. source: a `split_with_sizes`, of whose parts this is number `part`.
    """

    result: fx.Node
    source: Any
    part: int
    weight: fx.Node
    epsilon: float
    cache: fx.Node
    positions: fx.Node


def join_heads(graph: fx.Graph) -> tuple[int, int]:
    """Make one node of each pair of queries and keys that a token's position rotates.

    Returns how many there are, and to how many of them the write to the cache was joined.

    Args:
        graph: functional, as torch.compile has it before the lowering of vLLM's IR ops; changed in place.
    """
    found = [each for cat in graph.find_nodes(op="call_function", target=_aten.cat.default) if (each := _rotated(cat))]
    place = {node: index for index, node in enumerate(graph.nodes)}
    keys = {(each.source, each.cache, each.positions, each.epsilon): each for each in found if each.part == 1}
    joined = cached = 0
    for query in (each for each in found if each.part == 0):
        key = keys.get((query.source, query.cache, query.positions, query.epsilon))
        if key is None or not _kernel_takes(query, key):
            continue
        first = min(query.result, key.result, key=place.__getitem__)
        if all(place[node] < place[first] for node in (query.weight, key.weight)):
            update = _cache_update(graph, query, key)
            if update is not None and place.get(update.args[2], -1) > place[first]:
                update = None  # the layer's name is not there yet
            _replace(graph, first, query, key, update)
            joined += 1
            cached += update is not None
    return joined, cached


def _rotated(cat: Any) -> Rotated | None:
    """Return what a concatenation of rotated halves is made of, or None if it is something else.

    (one * cosine - other * sine, other * cosine + one * sine), the halves of a head by RMSNorm.
    """
    if len(cat.args) < 2 or len(cat.args[0]) != 2 or cat.args[1] not in (-1, 2):
        return None
    less, more = cat.args[0]
    if not (_is(less, _aten.sub.Tensor) and _is(more, _aten.add.Tensor)) or less.kwargs or more.kwargs:
        return None
    products = [found for node in (*less.args, *more.args) if (found := _product(node)) is not None]
    if len(products) != 4:
        return None
    (one, cosine), (other, sine) = products[:2]
    if {(other, cosine), (one, sine)} != set(products[2:]):
        return None
    if (one.index, other.index, cosine.index, sine.index) != (0, 1, 0, 1):
        return None
    normed, looked_up = _through(one.whole), cosine.whole
    if (one.whole, cosine.whole) != (other.whole, sine.whole) or not _is(normed, _RMS_NORM) or len(normed.args) != 3:
        return None
    part = _through(normed.args[0])
    source: Any = part.args[0] if _is(part, operator.getitem) else None
    if not _is(source, _aten.split_with_sizes.default) or source.args[2:] not in ((-1,), (1,)):
        return None
    if _is(looked_up, _aten.index.Tensor) and len(looked_up.args[1]) == 1:
        cache, (positions,) = looked_up.args
    elif _is(looked_up, _aten.index_select.default) and looked_up.args[1] == 0:
        cache, positions = looked_up.args[0], looked_up.args[2]
    else:
        return None
    weight, epsilon = _through(normed.args[1]), normed.args[2]
    return Rotated(cat, source, part.args[1], weight, epsilon, _through(cache), _through(positions))


class _Half(NamedTuple):
    """Half `index` of the last dimension of `whole`; of cosines and sines, which all heads share."""

    whole: Any
    index: int


def _half(node: Any) -> _Half | None:
    if not _is(node, operator.getitem) or not _is(node.args[0], _aten.split.Tensor):
        return None
    whole, size, *dim = node.args[0].args
    shape = whole.meta["val"].shape
    return _Half(whole, node.args[1]) if size * 2 == shape[-1] and dim in ([-1], [len(shape) - 1]) else None


def _product(node: Any) -> tuple[_Half, _Half] | None:
    """Return the half of a head and that of cosines and sines which are multiplied here, or None."""
    if not _is(node, _aten.mul.Tensor):
        return None
    shared = [_is(factor, _aten.unsqueeze.default) and factor.args[1] in (-2, 1) for factor in node.args]
    if shared not in ([False, True], [True, False]):
        return None
    of_head, of_angle = node.args if shared[1] else reversed(node.args)
    of_rows, of_positions = _half(of_head), _half(of_angle.args[0])
    return None if of_rows is None or of_positions is None else (of_rows, of_positions)


def _is(node: Any, target: Any) -> bool:
    return isinstance(node, fx.Node) and node.op == "call_function" and node.target is target


def _through(node: Any) -> Any:
    """Return what a node's elements are, through those that only give them another shape."""
    while isinstance(node, fx.Node) and node.op == "call_function" and node.target in _SAME_ELEMENTS:
        node = node.args[0]
    return node


def _value(node: Any) -> torch.Tensor:
    value: torch.Tensor = node.meta["val"]
    return value


def _kernel_takes(query: Rotated, key: Rotated) -> bool:
    rows, cache, positions = (_value(node) for node in (query.source.args[0], query.cache, query.positions))
    heads = [_value(each.result) for each in (query, key)]
    head = heads[0].shape[-1]
    weights = [_value(each.weight) for each in (query, key)]
    return (
        rows.dim() == 2
        and rows.dtype in norm_rope.DTYPES
        and {tensor.dtype for tensor in (*weights, cache)} == {rows.dtype}
        and all(tuple(weight.shape) == (head,) for weight in weights)
        and all(each.dim() == 3 and each.shape[-1] == head for each in heads)
        and head <= norm_rope.MAX_HEAD
        and head % norm_rope.HEAD_ALIGNMENT == 0
        and cache.dim() == 2
        and cache.shape[1] == head
        and (positions.dim(), positions.dtype) == (1, torch.int64)
        and statically_known_true(positions.shape[0] == rows.shape[0])
    )


def _cache_update(graph: fx.Graph, query: Rotated, key: Rotated) -> fx.Node | None:
    """Return the node that writes these keys, and the values behind them in the same rows, to a cache."""
    rows, sizes = query.source.args[:2]
    for node in graph.find_nodes(op="call_function", target=_UPDATE):
        keys, values, _ = node.args
        value = _through(values)
        if _through(keys) is not key.result or not _is(value, operator.getitem):
            continue
        behind = value.args[0] is query.source and value.args[1] == 2 and len(sizes) == 3 and sizes[1] == sizes[2]
        if behind and _value(values).shape == _value(keys).shape and _value(rows).shape[1] == sum(sizes):
            return node
    return None


def _replace(graph: fx.Graph, before: fx.Node, query: Rotated, key: Rotated, update: fx.Node | None) -> None:
    query_heads, key_heads = (_value(each.result).shape[1] for each in (query, key))
    arguments = (
        *(query.source.args[0], query.positions, query.weight, key.weight, query.cache),
        *(query.epsilon, query_heads, key_heads),
    )
    target, more = ops.qk_norm_rope.default, ()
    if update is not None:
        target, more = ops.qk_norm_rope_cache.default, (update.args[2],)
    with graph.inserting_before(before):
        joined = graph.call_function(target, (*arguments, *more))
    joined.meta["val"] = ops.qk_norm_rope.default(*fx.map_arg(arguments, _value))
    after = joined
    if update is not None:
        joined.meta["val"] = (*joined.meta["val"], update.meta["val"])
        with graph.inserting_after(joined):
            done = graph.call_function(operator.getitem, (joined, 2))
        done.meta["val"] = update.meta["val"]
        update.replace_all_uses_with(done)
        _erase(graph, update)
    for index, each in enumerate((query, key)):
        with graph.inserting_after(after):
            after = graph.call_function(operator.getitem, (joined, index))
        after.meta["val"] = joined.meta["val"][index]
        # A copy of what nobody else has is left out, too: it would be a kernel.
        copies = [user for user in each.result.users if user.target is _aten.clone.default and not user.kwargs]
        for replaced in (*copies, each.result):
            replaced.replace_all_uses_with(after)
        for replaced in copies or [each.result]:  # with a copy goes what it was of
            _erase(graph, replaced)


def _erase(graph: fx.Graph, node: fx.Node) -> None:
    """Erase a node that nobody uses, and those that were there for it alone."""
    if node.users or node.op != "call_function":
        return
    inputs = node.all_input_nodes
    graph.erase_node(node)
    for each in inputs:
        _erase(graph, each)
