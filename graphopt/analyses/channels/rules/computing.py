"""How channels pass through operators that compute: one rule per operator, all in the table `COMPUTE_RULES`.

operator                        what is tied                                               what is pinned
elementwise, PRelu              every axis, under broadcasting                             axes that are repeated
Conv                            in ~ weight in, weight out ~ bias ~ out                    space, kernel
  one input channel per group   group ~ its output channels, whole groups go               weight in
  other groups                  the same place in every group, so that groups stay equal   -
ConvTranspose                   like Conv, weight axes exchanged                           space, kernel
Gemm, MatMul                    contraction; rows and columns ~ out; batch axes            -
BatchNormalization, Instance-   channel ~ every parameter                                  space (Instance-)
Softmax, LogSoftmax, Hardmax    axes in front                                              axes normalized over
Lp-/MaxPool, AveragePool, ...   batch and channel                                          space
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir

from graphopt.analyses.channels.node_view import NodeView
from graphopt.analyses.channels.partition import Indices

__all__ = ["COMPUTE_RULES", "Rule", "broadcast", "broadcast_axes"]

Rule = Callable[[NodeView], None]


def broadcast(view: NodeView) -> None:
    """Elementwise operators: axes are aligned from the right; an axis of size 1 that is repeated stays."""
    output = view.node.outputs[0]
    broadcast_axes(view, [value for value in view.inputs if value is not None], output, 0)
    for extra in view.node.outputs[1:]:
        for axis in range(view.rank(extra) or 0):
            view.link(output, axis, extra, axis)


def _first_only(view: NodeView) -> None:
    """Operators with one tensor and scalar parameters."""
    first = view.input(0)
    if first is not None:
        broadcast_axes(view, [first], view.node.outputs[0], 0)
        for extra in view.node.outputs[1:]:
            broadcast_axes(view, [first], extra, 0)


def broadcast_axes(view: NodeView, inputs: list[ir.Value], output: ir.Value, keep: int) -> None:
    """Tie axes of equal size aligned from the right, leaving out the last `keep` of each."""
    ranks = [view.rank(value) for value in inputs]
    if None not in ranks:
        view.adopt_rank(output, max((rank or 0 for rank in ranks), default=0))
    rank = view.rank(output)
    if rank is None or None in ranks:
        return
    for back in range(1 + keep, rank + 1):
        aligned = [value for value, own in zip(inputs, ranks, strict=True) if own is not None and own >= back]
        atoms = [view.atoms(value, -back) for value in aligned]
        if not aligned or any(own is None for own in atoms):
            _broadcast_open(view, aligned, back, output)
            continue
        widest = max(len(own) for own in atoms if own is not None)
        for value in (
            value for value, own in zip(aligned, atoms, strict=True) if own is not None and len(own) == widest
        ):
            view.link(value, -back, output, -back)


def _broadcast_open(view: NodeView, aligned: list[ir.Value], back: int, output: ir.Value) -> None:
    """Axes of one open size, or of size 1; where sizes differ, an open one may turn out to be 1 and be repeated."""
    wide = [value for value in aligned if view.maps.size(value, -back) != 1]
    equal = len({view.maps.size(value, -back) for value in wide}) == 1
    if equal or all(view.period(value, -back) is not None for value in wide):
        for value in wide:
            view.link(value, -back, output, -back)


def _conv(view: NodeView) -> None:
    source, weight, bias = view.input(0), view.input(1), view.input(2)
    output, groups = view.node.outputs[0], view.node.attributes.get_int("group", 1)
    if source is None or weight is None or source is weight:
        return
    view.link(source, 0, output, 0)
    view.role(weight, 0, "output")
    view.role(weight, 1, "input")
    if not view.link(weight, 0, output, 1):
        return
    view.link(bias, 0, output, 1)
    if groups == 1:
        view.link(source, 1, weight, 1)
    elif len(_known(view, weight, 1)) == 1:
        _whole_groups(view, source, output, groups)
    else:
        _equal_groups(view, source, 1, groups)
        _equal_groups(view, output, 1, groups)
        within, inside = _known(view, weight, 1), _known(view, source, 1)
        if len(inside) == groups * len(within):
            view.tie(inside, np.tile(within, groups))
            view.settle(source, 1)
            view.settle(weight, 1)


def _conv_transpose(view: NodeView) -> None:
    source, weight, bias = view.input(0), view.input(1), view.input(2)
    output, groups = view.node.outputs[0], view.node.attributes.get_int("group", 1)
    if source is None or weight is None or source is weight:
        return
    view.link(source, 0, output, 0)
    view.role(weight, 0, "input")
    view.role(weight, 1, "output")
    within, made = _known(view, weight, 1), _known(view, output, 1)
    if len(made) != groups * len(within) or not view.link(source, 1, weight, 0):
        return
    view.link(bias, 0, output, 1)
    if groups > 1 and len(_known(view, source, 1)) == groups:
        _whole_groups(view, source, output, groups)
        return
    if groups > 1:
        _equal_groups(view, source, 1, groups)
    view.tie(made, np.tile(within, groups))
    view.settle(output, 1)
    view.settle(weight, 1)


def _known(view: NodeView, value: ir.Value, axis: int) -> Indices:
    atoms = view.atoms(value, axis)
    return np.empty(0, dtype=np.int64) if atoms is None else atoms


def _whole_groups(view: NodeView, source: ir.Value, output: ir.Value, groups: int) -> None:
    """One input channel per group: it leaves together with the outputs of its group, and the group count drops."""
    inside, made = _known(view, source, 1), _known(view, output, 1)
    if len(inside) != groups or len(made) % groups:
        view.maps.pin(made, view.reason)
        return
    view.tie(np.repeat(inside, len(made) // groups), made)
    view.settle(source, 1)
    view.settle(output, 1)
    view.state_sizes("group", (groups,), [(0, view.span(source, 1))], scalar=True)


def _equal_groups(view: NodeView, value: ir.Value, axis: int, groups: int) -> None:
    """Several channels per group: the same place leaves in every group, and groups stay of one size."""
    atoms = _known(view, value, axis)
    if len(atoms) and len(atoms) % groups == 0:
        table = atoms.reshape(groups, -1)
        view.tie(np.broadcast_to(table[0], table.shape).reshape(-1), atoms)


def _gemm(view: NodeView) -> None:
    left, right, bias, output = view.input(0), view.input(1), view.input(2), view.node.outputs[0]
    if left is None or right is None or left is right:
        return
    row, inner = (1, 0) if view.node.attributes.get_int("transA", 0) else (0, 1)
    depth, column = (1, 0) if view.node.attributes.get_int("transB", 0) else (0, 1)
    view.role(right, column, "output")
    view.call(view.atoms(right, column), "neurons")
    view.role(right, depth, "input")
    view.link(left, inner, right, depth)
    view.link(left, row, output, 0)
    view.link(right, column, output, 1)
    if bias is not None:
        broadcast_axes(view, [bias], output, 0)


def _matmul(view: NodeView) -> None:
    left, right, output = view.input(0), view.input(1), view.node.outputs[0]
    left_rank, right_rank = view.rank(left), view.rank(right)
    if left is None or right is None or left is right or not left_rank or not right_rank:
        return
    view.adopt_rank(output, max(left_rank, right_rank) - (left_rank == 1) - (right_rank == 1))
    if view.maps.origin(right) is not None:
        view.role(right, -1 if right_rank > 1 else 0, "output")
        view.call(view.atoms(right, -1), "neurons")
        view.role(right, -2 if right_rank > 1 else 0, "input")
        for axis in range(right_rank - 2):
            view.stack(right, axis)
    if view.maps.origin(left) or view.maps.origin(right) or view.is_zero(left) or view.is_zero(right):
        view.link(left, -1, right, -2 if right_rank > 1 else 0)
    if left_rank > 1:
        view.link(left, -2, output, -2 if right_rank > 1 else -1)
    if right_rank > 1:
        view.link(right, -1, output, -1)
    if left_rank > 1 and right_rank > 1:
        batched = [value for value in (left, right) if (view.rank(value) or 0) > 2]
        broadcast_axes(view, batched, output, 2)
        if view.maps.origin(left) is None and view.maps.origin(right) is None:
            for axis in range((view.rank(output) or 2) - 2):
                view.call(view.atoms(output, axis), "heads")
                view.call(view.period(output, axis), "heads")


def _normalization(view: NodeView) -> None:
    """BatchNormalization and InstanceNormalization: parameters of one value per channel."""
    source, output = view.input(0), view.node.outputs[0]
    if len(view.node.outputs) > 1:
        return  # training mode: running statistics leave through outputs of their own
    instance = view.node.op_type == "InstanceNormalization"
    view.link(source, 0, output, 0)
    linked = view.link(source, 1, output, 1)
    for index, value in enumerate(view.node.inputs[1:], start=1):
        if value is not None and linked:
            view.role(value, 0, "scale" if index == 1 else "variance" if index == 4 else "other")
            view.link(value, 0, output, 1)
    for axis in range(2, 0 if instance else view.rank(output) or 0):
        view.link(source, axis, output, axis)


def _last_axes(view: NodeView, default: int) -> None:
    """Operators that normalize over an axis and, before opset 13, everything behind it."""
    source = view.input(0)
    rank = view.rank(source)
    if rank is None:
        return
    axis = view.node.attributes.get_int("axis", default)
    single = view.opset >= 13
    for other in range(rank):
        if other != axis % rank if single else other < axis % rank:
            for made in view.node.outputs:
                view.link(source, other, made, other)


def _pool(view: NodeView) -> None:
    if any(extra.uses() or extra.is_graph_output() for extra in view.node.outputs[1:]):
        return  # MaxPool's indices count through all channels
    for made in view.node.outputs:
        view.link(view.input(0), 0, made, 0)
        view.link(view.input(0), 1, made, 1)


_ELEMENTWISE = (
    "Add", "And", "BitwiseAnd", "BitwiseOr", "BitwiseXor", "Div", "Equal", "Greater", "GreaterOrEqual", "Less",
    "LessOrEqual", "Max", "Mean", "Min", "Mod", "Mul", "Or", "PRelu", "Pow", "Sub", "Sum", "Where", "Xor",
)  # fmt: skip
_UNARY = (
    "Abs", "Acos", "Acosh", "Asin", "Asinh", "Atan", "Atanh", "BitwiseNot", "Cast", "CastLike", "Ceil", "Celu", "Clip",
    "Cos", "Cosh", "Dropout", "Elu", "Erf", "Exp", "Floor", "Gelu", "HardSigmoid", "HardSwish", "Identity", "IsInf",
    "IsNaN", "LeakyRelu", "Log", "Mish", "Neg", "Not", "Reciprocal", "Relu", "Round", "Selu", "Shrink", "Sigmoid",
    "Sign", "Sin", "Sinh", "Softplus", "Softsign", "Sqrt", "Swish", "Tan", "Tanh", "ThresholdedRelu",
)  # fmt: skip
_POOLS = (
    "AveragePool", "GlobalAveragePool", "GlobalLpPool", "GlobalMaxPool", "LpPool", "MaxPool",
)  # fmt: skip
COMPUTE_RULES: dict[str, Rule] = {
    **dict.fromkeys(_ELEMENTWISE, broadcast),
    **dict.fromkeys(_UNARY, _first_only),
    **dict.fromkeys(_POOLS, _pool),
    "Conv": _conv,
    "ConvTranspose": _conv_transpose,
    "Gemm": _gemm,
    "MatMul": _matmul,
    "BatchNormalization": _normalization,
    "InstanceNormalization": _normalization,
    "Softmax": lambda view: _last_axes(view, -1 if view.opset >= 13 else 1),
    "LogSoftmax": lambda view: _last_axes(view, -1 if view.opset >= 13 else 1),
    "Hardmax": lambda view: _last_axes(view, -1 if view.opset >= 13 else 1),
}
