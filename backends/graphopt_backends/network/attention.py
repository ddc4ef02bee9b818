"""Attention that was recognised (`scores.py`): which views the kernel works on."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import onnx_ir as ir

from graphopt_backends._fold import is_constant
from graphopt_backends.kernels.attention import Attention
from graphopt_backends.kernels.expression import Expression, call, number, operand, substituted
from graphopt_backends.network.batched import order_of_reader
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


CONVERTERS: Mapping[str, Callable[[Network, ir.Node, Region | None], None]] = {FUSED: _convert}

CHECKS: Mapping[str, Callable[[ir.Node], bool]] = {}
