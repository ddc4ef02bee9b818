"""How channels pass through operators that add over axes: one rule per operator, in the table `NORM_RULES`.

operator                          what is tied                                 what is pinned
LayerNormalization, RMS-,         every axis; normalized ones to scale, bias   normalized axes, unless what comes in is
  Simplified-                                                                  zero for channels without weights
ReduceSum, -Mean, -L1, -L2,       axes that stay                               axes that go, likewise
  -SumSquare
other Reduce*, ArgMax, ArgMin     axes that stay                               axes that go

A mean over fewer channels is a larger one: whoever removes channels finds these means in `AxisMaps.means`.
"""

from __future__ import annotations

import onnx_ir as ir

from graphopt.analyses.channels.axis_maps import Mean, NodeView
from graphopt.analyses.channels.rules.computing import Rule

__all__ = ["NORM_RULES"]

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
    if source is None or rank is None or axes is None or not axes:
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
    if source is None or rank is None:
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


NORM_RULES: dict[str, Rule] = {
    **dict.fromkeys((*_SUMS, *_OTHERS), _reduce),
    "LayerNormalization": _layer_norm,
    "RMSNormalization": _layer_norm,
    "SimplifiedLayerNormalization": _layer_norm,
}
