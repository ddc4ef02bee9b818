"""How channels pass through operators that add over axes: one rule per operator, in the table `NORM_RULES`.

operator                          what is tied                                 what is pinned
LayerNormalization, RMS-,         every axis; normalized ones to scale, bias   normalized axes, unless what comes in is
  Simplified-, Skip-                                                           zero for channels without weights
ReduceSum, -Mean, -L1, -L2,       axes that stay                               axes that go, likewise
  -SumSquare
other Reduce*, ArgMax, ArgMin     axes that stay                               axes that go

A mean over fewer channels is a larger one: whoever removes channels finds these means in `AxisMaps.means`.
"""

from __future__ import annotations

import onnx_ir as ir

from graphopt.analyses.channels.node_view import NodeView
from graphopt.analyses.channels.rules.computing import Rule
from graphopt.analyses.channels.tables import Mean

__all__ = ["NORM_CONTRIB_RULES", "NORM_RULES"]

_SUMS = ("ReduceL1", "ReduceL2", "ReduceMean", "ReduceSum", "ReduceSumSquare")
_OTHERS = (
    "ArgMax", "ArgMin", "ReduceLogSum", "ReduceLogSumExp", "ReduceMax", "ReduceMin", "ReduceProd",
)  # fmt: skip


def _reduce(view: NodeView) -> None:
    source, output = view.input(0), view.node.outputs[0]
    rank = view.rank(source)
    axes: tuple[int, ...] | None = tuple(view.node.attributes.get_ints("axes", ()))
    if view.node.op_type in ("ArgMax", "ArgMin"):
        axes = (view.node.attributes.get_int("axis", 0),)
    elif view.input(1) is not None:
        axes = view.numbers(1)
    if source is None or not rank or axes is None or not axes:
        return  # over everything, or over what is not known yet
    gone = {axis % rank for axis in axes}
    kept_dims = view.node.attributes.get_int("keepdims", 1)
    for axis in range(rank):
        if axis not in gone:
            view.link(source, axis, output, axis if kept_dims else axis - sum(other < axis for other in gone))
        elif view.node.op_type in _SUMS and view.is_zero(source) and not output.is_graph_output():
            _add_over(view, source, axis, mean=view.node.op_type == "ReduceMean")


def _add_over(view: NodeView, source: ir.Value, axis: int, *, mean: bool) -> None:
    """Let channels leave an axis that is added over."""
    if view.atoms(source, axis) is not None:
        view.settle(source, axis)
        if mean:
            view.maps.means.append(Mean(view.key(view.node.outputs[0]), view.key(source), axis))


def _layer_norm(view: NodeView) -> None:
    """A normalization over the last axes, with a scale and a bias of their shape."""
    source, output = view.input(0), view.node.outputs[0]
    rank = view.rank(source)
    if source is None or not rank:
        return
    first = view.node.attributes.get_int("axis", -1) % rank
    for axis in range(first):
        for made in view.node.outputs:
            view.link(source, axis, made, axis)
    parameters = [value for value in view.node.inputs[1:] if value is not None]
    plain = not any(extra.uses() or extra.is_graph_output() for extra in view.node.outputs[1:])
    fits = parameters and all(view.rank(value) == rank - first for value in parameters)
    if not plain or not fits or not view.is_zero(source) or view.maps.constants.of(parameters[0]) is None:
        return
    for axis in range(first, rank):
        if not view.link(source, axis, output, axis):
            continue
        for i, value in enumerate(parameters):
            view.role(value, axis - first, "other" if i else "scale")
            view.link(value, axis - first, output, axis)
        view.maps.means.append(Mean(view.key(output), view.key(source), axis))


def _skip_norm(view: NodeView) -> None:
    """The sum of two values, with a bias, normalized over its last axis; the sum itself may leave as well."""
    source, other, output = view.input(0), view.input(1), view.node.outputs[0]
    rank = view.rank(source)
    if source is None or rank is None or view.rank(other) != rank:
        return
    made = [view.node.outputs[i] for i in (0, 3) if i < len(view.node.outputs) and view.node.outputs[i].name]
    for axis in range(rank - 1):
        for value in (other, *made):
            view.link(source, axis, value, axis)
    statistics = [view.node.outputs[i] for i in (1, 2) if i < len(view.node.outputs)]
    read = any(value.uses() or value.is_graph_output() for value in statistics)
    parameters = [value for value in view.node.inputs[2:] if value is not None]
    scale = view.maps.constants.of(view.input(2))
    if read or scale is None or not view.is_zero(source) or not view.is_zero(other):
        return
    if not all(view.rank(value) == 1 for value in parameters) or not view.link(source, rank - 1, output, rank - 1):
        return
    for value in (other, *made[1:]):
        view.link(value, rank - 1, output, rank - 1)
    for value in parameters:
        view.role(value, 0, "scale" if value is view.input(2) else "other")
        view.link(value, 0, output, rank - 1)
    view.maps.means.append(Mean(view.key(output), view.key(source), rank - 1))


NORM_CONTRIB_RULES: dict[tuple[str, str], Rule] = {
    ("com.microsoft", "SkipLayerNormalization"): _skip_norm,
    ("com.microsoft", "SkipSimplifiedLayerNormalization"): _skip_norm,
}
NORM_RULES: dict[str, Rule] = {
    **dict.fromkeys((*_SUMS, *_OTHERS), _reduce),
    "LayerNormalization": _layer_norm,
    "RMSNormalization": _layer_norm,
    "SimplifiedLayerNormalization": _layer_norm,
}
