"""Means over channels, once some channels have left: they are taken over fewer, and would be too large.

With r the part of the channels that is left, and nothing in those that went,

    mean over all = r * (mean over what is left)
    x / sqrt(r * v + epsilon) = 1 / sqrt(r) * x / sqrt(v + epsilon / r)

so a normalization by a root mean square stays exact with another scale and epsilon. A layer normalization also takes
away the mean, which is not taken over all channels any more: it stays exact where the mean is zero.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np
import onnx_ir as ir

from graphopt.analyses.channels import Mean
from graphopt_passes._own_constants import constant_tensor, new_constant, own_constant, unused_name

__all__ = ["restate_means"]

AxisName = tuple[str, int]

_EPSILON = 1e-5
_SKIP_EPSILON = 1e-12


def restate_means(
    graph: ir.Graph, values: Mapping[str, ir.Value], means: Iterable[Mean], kept: Mapping[AxisName, float]
) -> None:
    """Correct the nodes that take a mean over an axis that is shorter now.

    Args:
        graph: The graph, with its channels removed.
        values: Its values by name.
        means: What the analysis found.
        kept: The part that is left, of every axis that lost something.
    """
    ratios: dict[str, float] = {}
    for mean in means:
        if (mean.value, mean.axis) in kept:
            ratios[mean.output] = ratios.get(mean.output, 1.0) * kept[mean.value, mean.axis]
    for name, ratio in ratios.items():
        node = values[name].producer()
        if node is None:
            continue
        if node.op_type != "ReduceMean":
            skip = node.op_type.startswith("Skip")
            _scale_constant(graph, node, 2 if skip else 1, ratio**-0.5)
            epsilon = node.attributes.get_float("epsilon", _SKIP_EPSILON if skip else _EPSILON)
            node.attributes["epsilon"] = ir.AttrFloat32("epsilon", epsilon / ratio)
        elif not _is_centring(node) and not _scale_norm(graph, node, ratio):
            _multiply(graph, node.outputs[0], ratio)


def _is_centring(node: ir.Node) -> bool:
    """Whether the mean is only taken away from what it is the mean of."""
    uses = list(node.outputs[0].uses())
    return bool(uses) and all(
        use.node.op_type == "Sub" and use.idx == 1 and use.node.inputs[0] is node.inputs[0] for use in uses
    )


def _only_reader(value: ir.Value, *operators: str) -> ir.Node | None:
    uses = list(value.uses())
    if len(uses) != 1 or value.is_graph_output() or uses[0].node.op_type not in operators:
        return None
    return uses[0].node


def _constant_side(node: ir.Node) -> int | None:
    """Which operand of an Add or Mul is a constant."""
    return next((i for i, value in enumerate(node.inputs) if value is not None and constant_tensor(value)), None)


def _scale_norm(graph: ir.Graph, node: ir.Node, ratio: float) -> bool:
    """Correct `x / sqrt(mean + epsilon) * scale`, whose parts stay as they are for runtimes that fuse them."""
    add = _only_reader(node.outputs[0], "Add")
    epsilon = None if add is None else _constant_side(add)
    root = None if add is None or epsilon is None else _only_reader(add.outputs[0], "Sqrt")
    normed = None if root is None else _normalized(root.outputs[0])
    reader = None if normed is None else _only_reader(normed, "Cast", "Mul")
    if reader is not None and reader.op_type == "Cast":
        reader = _only_reader(reader.outputs[0], "Mul")
    scale = None if reader is None else _constant_side(reader)
    if add is None or epsilon is None or reader is None or scale is None:
        return False
    _scale_constant(graph, add, epsilon, 1 / ratio)
    _scale_constant(graph, reader, scale, ratio**-0.5)
    return True


def _normalized(root: ir.Value) -> ir.Value | None:
    """What is divided by a root, by Div or by Reciprocal and Mul."""
    divided = _only_reader(root, "Div", "Reciprocal")
    if divided is None:
        return None
    if divided.op_type == "Div" and divided.inputs[1] is root:
        numerator = divided.inputs[0]
        tensor = None if numerator is None else constant_tensor(numerator)
        if tensor is None:
            return divided.outputs[0]
        if tensor.size != 1 or float(tensor.numpy().reshape(-1)[0]) != 1.0:
            return None
    product = _only_reader(divided.outputs[0], "Mul")
    return None if product is None or _constant_side(product) is not None else product.outputs[0]


def _scale_constant(graph: ir.Graph, node: ir.Node, index: int, factor: float) -> None:
    """Multiply a constant input, which others may read as well."""
    tensor = constant_tensor(node.inputs[index])
    if tensor is not None:
        array = tensor.numpy()
        own_constant(graph, node, index, (array.astype(np.float64) * factor).astype(array.dtype))


def _multiply(graph: ir.Graph, value: ir.Value, factor: float) -> None:
    """Put a multiplication behind a value."""
    producer, uses = value.producer(), list(value.uses())
    if producer is None or producer.graph is None:
        return
    dtype = value.dtype or ir.DataType.FLOAT
    part = new_constant(graph, f"{value.name}_part", np.array(factor, dtype.numpy()), beside=producer)
    product = ir.node("Mul", [value, part], name=unused_name(graph, f"{producer.name}_of_all"))
    product.outputs[0].name = unused_name(graph, f"{value.name}_of_all")
    product.outputs[0].type, product.outputs[0].shape = value.type, value.shape
    producer.graph.insert_after(producer, product)
    for use in uses:
        use.node.replace_input_with(use.idx, product.outputs[0])
