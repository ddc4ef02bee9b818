"""Softmax, as one operator or spelled out: Exp(x - ReduceMax(x)) / ReduceSum(...)."""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from graphopt.analyses.attention.sizes import Sizes

__all__ = ["Softmax", "read_softmax"]

_ANY_AXIS = 13  # operator set from which Softmax works along one axis only


@dataclass(frozen=True, eq=False)
class Softmax:
    """A softmax along one axis.

    Attributes:
        nodes: What it consists of; the last one makes the weights.
        scores: What goes in.
        weights: What comes out.
        axis: Along which, not negative.
        rank: Of both.
    """

    nodes: tuple[ir.Node, ...]
    scores: ir.Value
    weights: ir.Value
    axis: int
    rank: int


def read_softmax(node: ir.Node, sizes: Sizes, opset: int) -> Softmax | None:
    """Understand a node as the last one of a softmax; None if it is something else."""
    if node.domain not in ("", "ai.onnx"):
        return None
    if node.op_type == "Softmax":
        return _operator(node, sizes, opset)
    if node.op_type in ("Div", "Mul"):
        return _spelled_out(node, sizes)
    return None


def _operator(node: ir.Node, sizes: Sizes, opset: int) -> Softmax | None:
    rank, scores = sizes.rank(node.inputs[0]), node.inputs[0]
    if rank is None or scores is None:
        return None
    axis = node.attributes.get_int("axis", -1 if opset >= _ANY_AXIS else 1) % max(rank, 1)
    flattened = range(axis + 1, rank) if opset < _ANY_AXIS else ()
    if any(sizes.fixed(scores, later) != 1 for later in flattened):
        return None  # one softmax over all of these axes together
    return Softmax((node,), scores, node.outputs[0], axis, rank)


def _spelled_out(node: ir.Node, sizes: Sizes) -> Softmax | None:
    top, bottom = node.inputs[0], node.inputs[1]
    nodes: list[ir.Node] = [node]
    if node.op_type == "Mul":
        if _made_by(top, "Reciprocal") is not None:
            top, bottom = bottom, top
        inverse = _made_by(bottom, "Reciprocal")
        if inverse is None:
            return None
        nodes.append(inverse)
        bottom = inverse.inputs[0]
    exponential, total = _made_by(top, "Exp"), _made_by(bottom, "ReduceSum")
    if exponential is None or total is None or total.inputs[0] is not top:
        return None
    nodes += [total, exponential]
    scores, axis, rank = exponential.inputs[0], _reduced_axis(total, sizes), sizes.rank(top)
    if scores is None or rank is None or axis is None:
        return None
    shift = _made_by(scores, "Sub")
    largest = None if shift is None else _made_by(shift.inputs[1], "ReduceMax")
    if shift is not None and largest is not None and shift.inputs[0] is largest.inputs[0] is not None:
        if _reduced_axis(largest, sizes) != axis:
            return None
        nodes += [shift, largest]
        scores = shift.inputs[0]
    return None if scores is None else Softmax(tuple(reversed(nodes)), scores, node.outputs[0], axis, rank)


def _made_by(value: ir.Value | None, operator: str) -> ir.Node | None:
    producer = None if value is None else value.producer()
    return producer if producer is not None and producer.op_type == operator else None


def _reduced_axis(node: ir.Node, sizes: Sizes) -> int | None:
    """The one axis that a reduction runs along and keeps with size 1."""
    rank = sizes.rank(node.inputs[0])
    axes: tuple[float, ...] | None = tuple(node.attributes.get_ints("axes", ()))
    if len(node.inputs) > 1 and node.inputs[1] is not None:
        axes = sizes.content(node.inputs[1])
    if rank is None or axes is None or len(axes) != 1 or not node.attributes.get_int("keepdims", 1):
        return None
    return int(axes[0]) % rank
