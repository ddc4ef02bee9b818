"""Normalizations that exporters write as arithmetic become one node; those of whole images become arithmetic.

from                                                            to
x / sqrt(mean(x^2) + e) * w                                     RMSNormalization
(x - mean(x)) / sqrt(mean((x - mean(x))^2) + e) * w + b         LayerNormalization
InstanceNormalization, GroupNormalization                       ReduceMean, Sub, Mul, ... : kernels in any layout
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common as ir_passes

from graphopt_backends._fold import add_constant, is_constant, static_shape

__all__ = ["fuse"]


def fuse(model: ir.Model) -> None:
    """Rewrite normalizations, in place; shapes must be fixed."""
    changed = False
    for node in list(model.graph):
        rule = _RULES.get(node.op_type)
        changed = (rule is not None and node.graph is not None and rule(model.graph, node)) or changed
    if changed:
        ir_passes.RemoveUnusedNodesPass()(model)


def _chain(graph: ir.Graph, root: ir.Node) -> bool:
    """Begin at the square root: what it is taken of says what is normalized, what reads it where that ends."""
    found = _variance(root.inputs[0])
    normal = _normalized(root)
    if found is None or normal is None or normal.is_graph_output():
        return False
    centred, axes, epsilon = found
    shape = static_shape(centred)
    if shape is None or static_shape(normal) != shape or not _divides(root, normal, centred):
        return False
    axes = sorted(axis % len(shape) for axis in axes)
    if axes != list(range(axes[0], len(shape))):
        return False
    columns = math.prod(shape[axes[0] :])
    source = _uncentred(centred, axes) or centred
    last, scale = _then(normal, "Mul", columns)
    bias = None
    if source is not centred:
        last, bias = _then(last, "Add", columns)
    scale = scale or add_constant(graph, f"{root.name}/scale", np.ones(columns, np.float32))
    name = "RMSNormalization" if source is centred else "LayerNormalization"
    inputs = [source, scale] if bias is None else [source, scale, bias]
    maker = last.producer()
    assert maker is not None
    attributes = [ir.AttrInt64("axis", axes[0]), ir.AttrFloat32("epsilon", epsilon)]
    _replace(graph, maker, ir.Node("", name, inputs, attributes, name=root.name), last)
    return True


def _variance(value: ir.Value | None) -> tuple[ir.Value, Sequence[int], float] | None:
    """d, axes and e of mean(d^2) + e."""
    added = value.producer() if value is not None else None
    if added is None or added.op_type != "Add":
        return None
    mean, epsilon = added.inputs
    if _scalar(mean) is not None:
        mean, epsilon = epsilon, mean
    least = _scalar(epsilon)
    reduced = mean.producer() if mean is not None else None
    if least is None or reduced is None or reduced.op_type != "ReduceMean" or reduced.inputs[0] is None:
        return None
    axes, square = _axes(reduced), reduced.inputs[0].producer()
    if axes is None or square is None or not reduced.attributes.get_int("keepdims", 1):
        return None
    base = square.inputs[0]
    is_square = square.op_type == "Mul" and square.inputs[1] is base
    is_square = is_square or (square.op_type == "Pow" and _scalar(square.inputs[1]) == 2)
    return (base, axes, least) if is_square and base is not None and base.dtype == ir.DataType.FLOAT else None


def _axes(node: ir.Node) -> Sequence[int] | None:
    given = node.inputs[1] if len(node.inputs) > 1 else None
    if given is None:
        return node.attributes.get_ints("axes")
    if not is_constant(given) or given.const_value is None:
        return None
    return [int(axis) for axis in given.const_value.numpy().reshape(-1)]


def _normalized(root: ir.Node) -> ir.Value | None:
    """What the only reader of the root, or of its reciprocal, makes of it."""
    user = _only_user(root.outputs[0])
    if user is not None and (user.op_type == "Reciprocal" or (user.op_type == "Div" and _scalar(user.inputs[0]) == 1)):
        user = _only_user(user.outputs[0])
    return user.outputs[0] if user is not None and user.op_type in ("Div", "Mul") else None


def _divides(root: ir.Node, normal: ir.Value, centred: ir.Value) -> bool:
    """The normal value is the centred one divided by the root."""
    node, direct = normal.producer(), root.outputs[0]
    assert node is not None
    left, right = node.inputs
    if left is None or right is None:
        return False
    if node.op_type == "Div":
        return right is direct and _same(left, centred)
    return direct not in node.inputs and (_same(left, centred) or _same(right, centred))


def _uncentred(value: ir.Value, axes: Sequence[int]) -> ir.Value | None:
    """x, where a value is x - mean(x)."""
    node = value.producer()
    if node is None or node.op_type != "Sub":
        return None
    source, mean = node.inputs
    reduced = mean.producer() if mean is not None else None
    if source is None or reduced is None or reduced.op_type != "ReduceMean" or reduced.inputs[0] is not source:
        return None
    found = _axes(reduced)
    rank = len(static_shape(source) or ())
    return source if found is not None and sorted(axis % rank for axis in found) == list(axes) else None


def _same(a: ir.Value, b: ir.Value) -> bool:
    """Two values are one, or the same difference computed twice."""
    first, second = a.producer(), b.producer()
    if a is b or first is None or second is None:
        return a is b
    return first.op_type == second.op_type == "Sub" and list(first.inputs) == list(second.inputs)


def _then(value: ir.Value, operator: str, columns: int) -> tuple[ir.Value, ir.Value | None]:
    """What an operator with a constant for each column makes of a value, if that is all that reads it."""
    user = _only_user(value)
    if user is None or user.op_type != operator or static_shape(user.outputs[0]) != static_shape(value):
        return value, None
    other = next((item for item in user.inputs if item is not value), None)
    if other is None or not is_constant(other) or other.const_value is None or other.const_value.size != columns:
        return value, None
    wide = other.const_value.shape
    shape = static_shape(value) or ()
    trailing = [size for size in wide if size != 1] == [size for size in _last(shape, columns) if size != 1]
    aligned = math.prod(size for size in list(wide)[-len(_last(shape, columns)) :] if isinstance(size, int)) == columns
    return (user.outputs[0], other) if trailing and aligned else (value, None)


def _last(shape: Sequence[int], columns: int) -> Sequence[int]:
    """The axes at the end that have so many elements."""
    for i in range(len(shape) - 1, -1, -1):
        if math.prod(shape[i:]) == columns:
            return shape[i:]
    return ()


def _only_user(value: ir.Value) -> ir.Node | None:
    users = list(value.uses())
    return users[0][0] if len(users) == 1 and not value.is_graph_output() else None


def _scalar(value: ir.Value | None) -> float | None:
    if value is None or not is_constant(value) or value.const_value is None or value.const_value.size != 1:
        return None
    return float(value.const_value.numpy().reshape(-1)[0])


def _replace(graph: ir.Graph, place: ir.Node, made: ir.Node, value: ir.Value) -> None:
    """Put a node at a place, and its output where a value was."""
    output = made.outputs[0]
    output.name, output.type, output.shape = value.name, value.type, value.shape
    graph.insert_before(place, made)
    value.replace_all_uses_with(output, replace_graph_outputs=True)
    graph.remove(place, safe=True)


def _of_images(graph: ir.Graph, node: ir.Node) -> bool:
    """Instance and group normalization: means over all pixels, of each channel or each group of channels."""
    source, gain, shift = node.inputs
    shape = static_shape(source)
    if source is None or shape is None or len(shape) < 3 or source.dtype != ir.DataType.FLOAT:
        return False
    if any(value is None or static_shape(value) != (shape[1],) for value in (gain, shift)):
        return False
    groups = node.attributes.get_int("num_groups", shape[1])
    make = _Maker(graph, node)
    grouped = (shape[0], groups, shape[1] // groups, *shape[2:]) if groups != shape[1] else shape
    axes = list(range(2, len(grouped)))
    kept = (*grouped[:2], *(1 for _ in axes))
    value = source if grouped == shape else make("Reshape", [source, make.ints(grouped)], grouped)
    centred = make("Sub", [value, make("ReduceMean", [value, make.ints(axes)], kept)], grouped)
    square = make("Mul", [centred, centred], grouped)
    variance = make("ReduceMean", [square, make.ints(axes)], kept)
    epsilon = make.array(np.float32(node.attributes.get_float("epsilon", 1e-5)))
    deviation = make("Sqrt", [make("Add", [variance, epsilon], kept)], kept)
    normal = make("Mul", [centred, make("Reciprocal", [deviation], kept)], grouped)
    if grouped != shape:
        normal = make("Reshape", [normal, make.ints(shape)], shape)
    column = (shape[1], *(1 for _ in shape[2:]))
    scaled = make("Mul", [normal, make("Reshape", [gain, make.ints(column)], column)], shape)
    last = ir.Node("", "Add", [scaled, make("Reshape", [shift, make.ints(column)], column)], name=node.name)
    _replace(graph, node, last, node.outputs[0])
    return True


class _Maker:
    """Adds nodes with results of known shapes before one that they replace."""

    def __init__(self, graph: ir.Graph, node: ir.Node) -> None:
        self._graph, self._node, self._count = graph, node, 0

    def __call__(self, operator: str, inputs: Sequence[ir.Value | None], shape: Sequence[int]) -> ir.Value:
        self._count += 1
        name = f"{self._node.name}/{operator}_{self._count}"
        made = ir.Node("", operator, list(inputs), name=name)
        output = made.outputs[0]
        output.name, output.type, output.shape = name, ir.TensorType(ir.DataType.FLOAT), ir.Shape(shape)
        self._graph.insert_before(self._node, made)
        return output

    def ints(self, values: Sequence[int]) -> ir.Value:
        return self.array(np.asarray(values, np.int64))

    def array(self, array: np.ndarray | np.floating) -> ir.Value:
        self._count += 1
        return add_constant(self._graph, f"{self._node.name}/constant_{self._count}", np.asarray(array))


_RULES: Mapping[str, Callable[[ir.Graph, ir.Node], bool]] = {
    "GroupNormalization": _of_images,
    "InstanceNormalization": _of_images,
    "Sqrt": _chain,
}
