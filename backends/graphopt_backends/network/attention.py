"""Attention, recognised (`scores.py`) or written as an operator: which views the kernel works on."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import numpy as np
import onnx_ir as ir

from graphopt_backends._fold import is_constant, static_shape
from graphopt_backends.kernels.attention import Attention
from graphopt_backends.kernels.expression import Expression, call, number, operand, substituted
from graphopt_backends.network.linear import order_of_reader
from graphopt_backends.network.network import Network, constant_of, shape_of
from graphopt_backends.network.regions import Region
from graphopt_backends.network.scores import FUSED, Plan, Side
from graphopt_backends.network.views import View

__all__ = ["CHECKS", "CONVERTERS"]

Shape = tuple[int, ...]


def _convert(network: Network, node: ir.Node, _: Region | None) -> None:
    plan: Plan = node.meta["plan"]
    output = node.outputs[0]
    matrices = shape_of(output)[-2:]
    query, key, value = (
        _split(network, _view(network, side), plan.batch)
        for side in plan.sides[:3]
    )  # fmt: skip
    if plan.flipped:
        key = _turned(key)
    masks: list[View] = []
    expression = plan.scores
    for i, side in enumerate(plan.sides[3:], 1):
        if side.value.dtype == ir.DataType.BOOL:
            expression = substituted(expression, {operand(i, "bool"): _is_set(i)})
        mask = _mask(network, side.value).broadcast((*side.batch, matrices[0], key.shape[-2]))
        masks.append(_split(network, mask, plan.batch))
    result = network.new(output, order_of_reader(output))
    if result.strides[-1] != 1:
        result = network.new(output)
    placed = result.reshaped((*plan.batch, *matrices))
    assert placed is not None  # axes are only split
    _attend(network, node, (query, key, value, *masks, placed), expression, plan.causal, plan.empty_is_zero)


def _view(network: Network, side: Side) -> View:
    view = network.view(side.value)
    return view.broadcast((*side.batch, *view.shape[-2:]))


def _turned(view: View) -> View:
    return view.permuted((*range(view.rank - 2), view.rank - 1, view.rank - 2))


def _split(network: Network, view: View, batch: Shape) -> View:
    shape = (*batch, *view.shape[-2:])
    split = view.reshaped(shape) or network.copied(view).reshaped(shape)
    assert split is not None
    return split


def _is_set(index: int) -> Expression:
    return call("not", call("equal", operand(index), number(0)))


def _mask(network: Network, value: ir.Value) -> View:
    """A mask as floats; a constant one that differs between queries lies so that vectors of queries can be read."""
    if is_constant(value):
        array = constant_of(value).astype(np.float32)
        if array.ndim < 2 or array.shape[-2] == 1:
            return network.constant(array)
        return _turned(network.constant(np.ascontiguousarray(array.swapaxes(-1, -2))))
    view = network.view(value)
    if view.dtype == "float32":
        return view
    floats = network.temporary(view.shape, "float32")
    network.loops(Expression("where", "float32", (operand(0, "bool"), number(1), number(0))), [view], floats)
    return floats


def _attend(
    network: Network, node: ir.Node, views: Sequence[View], scores: Expression, causal: int | None, empty_is_zero: bool
) -> None:
    """Call the kernel on Q, K, V, masks and the result, with the same batch axes; gaps in rows are closed."""
    query, key, value, *masks, result = views
    sides = [side if side.strides[-1] == 1 or side.shape[-1] == 1 else network.copied(side, node=node)
             for side in (query, key, value)]  # fmt: skip
    steps = [side.strides[:-1] for side in (*sides, result)]
    kernel = Attention(
        network.isa, result.shape[:-2], query.shape[-2], key.shape[-2], query.shape[-1], value.shape[-1],
        steps[0], steps[1], steps[2], steps[3], scores, tuple(mask.strides for mask in masks), causal, empty_is_zero,
    )  # fmt: skip
    network.call(kernel, [*sides, *masks, result], node)


def _attention(network: Network, node: ir.Node, _: Region | None) -> None:
    """The operator Attention: heads are an axis of their own, or lie side by side in the columns."""
    output = node.outputs[0]
    sides = [network.input(node, i) for i in range(3)]
    heads = [_heads(node, i, side) for i, side in enumerate(sides)]
    query, key, value = (_by_heads(network, side, count) for side, count in zip(sides, heads, strict=True))
    groups = heads[0] // heads[1]
    batch = (query.shape[0], heads[1], groups)
    query = _split(network, query, batch)
    key, value = (
        replace(side, shape=(*side.shape[:2], 1, *side.shape[2:]), strides=(*side.strides[:2], 0, *side.strides[2:]))
        .broadcast((*batch, *side.shape[2:]))
        for side in (key, value)
    )  # fmt: skip
    scale = node.attributes.get_float("scale", 0.0) or query.shape[-1] ** -0.5
    scores = call("mul", operand(0), number(scale))
    cap = node.attributes.get_float("softcap", 0.0)
    if cap:
        scores = call("mul", call("tanh", call("mul", scores, number(1 / cap))), number(cap))
    masks: list[View] = []
    if len(node.inputs) > 3 and node.inputs[3] is not None:
        given = node.inputs[3]
        hidden = number(float("-inf"))
        is_set = given.dtype == ir.DataType.BOOL
        scores = (
            Expression("where", "float32", (_is_set(1), scores, hidden)) if is_set else call("add", scores, operand(1))
        )
        wide = (query.shape[0], heads[0], query.shape[-2], key.shape[-2])
        masks = [_split(network, _mask(network, given).broadcast(wide), batch)]
    result = _by_heads(network, network.new(output), heads[0])
    placed = result.reshaped((*batch, *result.shape[-2:]))
    assert placed is not None
    causal = 0 if node.attributes.get_int("is_causal", 0) else None
    _attend(network, node, (query, key, value, *masks, placed), scores, causal, empty_is_zero=True)


def _heads(node: ir.Node, side: int, view: View) -> int:
    name = "q_num_heads" if side == 0 else "kv_num_heads"
    return view.shape[1] if view.rank == 4 else node.attributes.get_int(name, 1)


def _by_heads(network: Network, view: View, heads: int) -> View:
    """Axes: batch, heads, rows, columns."""
    if view.rank == 4:
        return view
    shape = (*view.shape[:2], heads, view.shape[2] // heads)
    split = view.reshaped(shape) or network.copied(view).reshaped(shape)
    assert split is not None
    return split.permuted((0, 2, 1, 3))


def _attention_check(node: ir.Node) -> bool:
    inputs, shapes = node.inputs, [static_shape(value) for value in node.inputs[:4] if value is not None]
    if any(value is not None for value in inputs[4:]) or any(shape is None for shape in shapes):
        return False
    if any(output.name and output.uses() for output in node.outputs[1:]) or node.outputs[0].dtype != ir.DataType.FLOAT:
        return False
    mask = inputs[3] if len(inputs) > 3 else None
    keys = shape_of(inputs[1])[-2] if inputs[1] is not None else 0
    if mask is not None and (mask.dtype not in (ir.DataType.FLOAT, ir.DataType.BOOL) or shape_of(mask)[-1] != keys):
        return False
    windows = [node.attributes.get_int(f"{side}_window_size", -1) for side in ("left", "right")]
    precise = node.attributes.get_int("softmax_precision", 1) == ir.DataType.FLOAT.value
    return windows == [-1, -1] and precise and static_shape(node.outputs[0]) is not None


CONVERTERS: Mapping[str, Callable[[Network, ir.Node, Region | None], None]] = {
    FUSED: _convert,
    "Attention": _attention,
}

CHECKS: Mapping[str, Callable[[ir.Node], bool]] = {
    "Attention": _attention_check,
}
