"""Brings quantized graphs into order: forms that kernels read, and integers wherever nothing but integers is needed.

rule             from                                          to
factors          Cast(integers) * constant                     DequantizeLinear(integers)
rows             Gather(DequantizeLinear(matrix), numbers)     DequantizeLinear(Gather(matrix, numbers))
several grids    QuantizeLinear, DequantizeLinear on an axis   Mul, Round, Add, Clip, Cast; Cast, Sub, Mul
moves            move(dequantize(x))                           dequantize(move(x))
round trips      quantize(dequantize(x)) on one grid           x
joints           quantize(concat(dequantize(a), ...))          concat(quantize(dequantize(a)), ...)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import onnx_ir as ir

from graphopt_backends._fold import add_constant, is_constant, static_shape
from graphopt_backends.network.integers import dequantized, grid_of

__all__ = ["MOVES", "pass_on"]

MOVES = frozenset(
    {
        "DepthToSpace", "Expand", "Flatten", "Gather", "Identity", "MaxPool", "Reshape", "Slice", "SpaceToDepth",
        "Squeeze", "Tile", "Transpose", "Unsqueeze",
    }
)  # fmt: skip
"""Operators that move elements, or compare them, whatever they are."""

_BYTES = (ir.DataType.INT8, ir.DataType.UINT8)


def pass_on(model: ir.Model) -> None:
    """Apply all rules, in place, until nothing changes."""
    changed = True
    while changed:
        changed = False
        for node in list(model.graph):
            if node.graph is None:
                continue
            for rule in _RULES.get(node.op_type, ()):
                if node.graph is not None:
                    changed = rule(model.graph, node) or changed


def _swap(graph: ir.Graph, node: ir.Node) -> bool:
    """move(dequantize(x)) -> dequantize(move(x))."""
    source = node.inputs[0]
    found = dequantized(source) if source is not None else None
    output = node.outputs[0]
    if found is None or output.is_graph_output() or any(o.name and o.uses() for o in node.outputs[1:]):
        return False
    maker = source.producer() if source is not None else None
    assert maker is not None
    moved = ir.Value(name=f"{output.name}_integers", type=found[0].type, shape=output.shape)
    attributes = list(node.attributes.values())
    twin = ir.Node(node.domain, node.op_type, [found[0], *node.inputs[1:]], attributes, outputs=[moved], name=node.name)
    real_again = ir.Value(name=f"{output.name}_real", type=output.type, shape=output.shape)
    back = ir.Node(
        maker.domain, maker.op_type, [moved, *maker.inputs[1:]], list(maker.attributes.values()), outputs=[real_again],
        name=f"{node.name}_dequantize",
    )  # fmt: skip
    graph.insert_after(node, [twin, back])
    output.replace_all_uses_with(real_again)
    graph.remove(node, safe=True)
    return True


def _cancel(graph: ir.Graph, node: ir.Node) -> bool:
    """quantize(dequantize(x)) on one grid -> x."""
    source, output = node.inputs[0], node.outputs[0]
    found = dequantized(source) if source is not None else None
    if found is None or output.is_graph_output() or grid_of(node) != found[1]:
        return False
    output.replace_all_uses_with(found[0])
    graph.remove(node, safe=True)
    return True


def _concatenate(graph: ir.Graph, node: ir.Node) -> bool:
    """quantize(concat(dequantize(a), ...)) -> concat(quantize(dequantize(a)), ...)."""
    output = node.outputs[0]
    users = [user for user, _ in output.uses()]
    if len(users) != 1 or output.is_graph_output():
        return False
    quantize = users[0]
    grid = grid_of(quantize)
    sources = [value for value in node.inputs if value is not None]
    if grid is None or quantize.op_type != "QuantizeLinear" or not all(dequantized(value) for value in sources):
        return False
    final = quantize.outputs[0]
    parts: list[ir.Value] = []
    for i, value in enumerate(sources):
        part = ir.Value(name=f"{output.name}_part{i}", type=final.type, shape=value.shape)
        attributes = list(quantize.attributes.values())
        rounded = ir.Node(
            quantize.domain, quantize.op_type, [value, *quantize.inputs[1:]], attributes, outputs=[part],
            name=f"{node.name}_quantize{i}",
        )  # fmt: skip
        graph.insert_before(node, rounded)
        parts.append(part)
    joined = ir.Value(name=f"{output.name}_integers", type=final.type, shape=output.shape)
    twin = ir.Node(node.domain, node.op_type, parts, list(node.attributes.values()), outputs=[joined], name=node.name)
    graph.insert_after(quantize, twin)
    final.replace_all_uses_with(joined, replace_graph_outputs=True)
    if static_shape(joined) is None:
        joined.shape = output.shape
    graph.remove([quantize, node], safe=True)
    return True


def _factors(graph: ir.Graph, node: ir.Node) -> bool:
    """Constant integers times one constant for each index of an axis, or one for all."""
    if node.op_type != "Mul" or len(node.inputs) != 2:
        return False
    for cast, factor in (node.inputs, reversed(node.inputs)):
        maker = cast.producer() if cast is not None else None
        if maker is None or maker.op_type != "Cast" or factor is None or not is_constant(factor):
            continue
        integers, scale = maker.inputs[0], factor.const_value
        if integers is None or not is_constant(integers) or integers.dtype not in _BYTES or scale is None:
            continue
        shape = static_shape(integers) or ()
        sizes = static_shape(factor) or ()
        wide = (1,) * (len(shape) - len(sizes)) + sizes
        axes = [axis for axis, size in enumerate(wide) if size > 1]
        if len(wide) != len(shape) or len(axes) > 1 or factor.dtype != ir.DataType.FLOAT:
            continue
        scales = scale.numpy().reshape(-1 if axes else ())
        _put(graph, node, "DequantizeLinear", [integers, add_constant(graph, f"{node.name}/scale", scales)],
             {"axis": axes[0] if axes else 0})  # fmt: skip
        if not maker.outputs[0].uses() and not maker.outputs[0].is_graph_output():
            graph.remove(maker, safe=True)
        return True
    return False


def _rows(graph: ir.Graph, node: ir.Node) -> bool:
    """Rows of a constant matrix are looked up as integers; scales lie along its columns, or there is one."""
    matrix = node.inputs[0]
    maker = matrix.producer() if matrix is not None else None
    if maker is None or maker.op_type != "DequantizeLinear" or node.attributes.get_int("axis", 0):
        return False
    if not all(value is None or is_constant(value) for value in maker.inputs):
        return False
    integers, scale = maker.inputs[0], maker.inputs[1]
    shape, output = static_shape(integers), node.outputs[0]
    if integers is None or scale is None or shape is None or len(shape) != 2 or static_shape(output) is None:
        return False
    if static_shape(scale) not in ((), (1,)) and maker.attributes.get_int("axis", 1) % 2 != 1:
        return False
    if maker.attributes.get_int("block_size", 0) or integers.dtype not in _BYTES:
        return False
    looked_up = ir.Value(name=f"{output.name}_integers", type=integers.type, shape=output.shape)
    twin = ir.Node("", "Gather", [integers, node.inputs[1]], list(node.attributes.values()), outputs=[looked_up],
                   name=f"{node.name}_integers")  # fmt: skip
    graph.insert_before(node, twin)
    rank = len(static_shape(output) or ())
    _put(graph, node, "DequantizeLinear", [looked_up, *maker.inputs[1:]], {"axis": rank - 1})
    return True


def _several_grids(graph: ir.Graph, node: ir.Node) -> bool:
    """Activations with a grid for each index of an axis become plain arithmetic."""
    source, scale = node.inputs[0], node.inputs[1]
    zero = node.inputs[2] if len(node.inputs) > 2 else None
    shape = static_shape(source)
    if source is None or scale is None or shape is None or is_constant(source) or not is_constant(scale):
        return False
    if scale.const_value is None or scale.const_value.size < 2 or node.attributes.get_int("block_size", 0):
        return False
    quantizes = node.op_type == "QuantizeLinear"
    stored = node.outputs[0].dtype if quantizes else source.dtype
    if stored is None or stored not in _BYTES or scale.dtype != ir.DataType.FLOAT:
        return False
    if zero is not None and not is_constant(zero):
        return False
    axis = node.attributes.get_int("axis", 1) % len(shape)
    along = [-1 if i == axis else 1 for i in range(len(shape))]
    scales = scale.const_value.numpy().reshape(along)
    zeros = np.zeros_like(scales)
    if zero is not None and zero.const_value is not None:
        zeros = zero.const_value.numpy().astype(np.float32).reshape(along)

    def constant(name: str, array: np.ndarray) -> ir.Value:
        return add_constant(graph, f"{node.name}/{name}", array.astype(np.float32))

    def before(op: str, inputs: Sequence[ir.Value], **attributes: int) -> ir.Value:
        value = ir.Value(name=f"{node.name}/{op}", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(shape))
        made = ir.Node("", op, inputs, ir.convenience.convert_attributes(attributes), outputs=[value],
                       name=f"{node.name}/{op}")  # fmt: skip
        graph.insert_before(node, made)
        return value

    if quantizes:
        least, most = (0, 255) if stored == ir.DataType.UINT8 else (-128, 127)
        value = before("Round", [before("Mul", [source, constant("steps", 1 / scales)])])
        value = before("Add", [value, constant("zero", zeros)])
        limits = (constant("least", np.array(least)), constant("most", np.array(most)))
        _put(graph, node, "Cast", [before("Clip", [value, *limits])], {"to": int(stored)})
    else:
        value = before("Cast", [source], to=int(ir.DataType.FLOAT))
        _put(graph, node, "Mul", [before("Sub", [value, constant("zero", zeros)]), constant("scale", scales)], {})
    return True


def _put(
    graph: ir.Graph, old: ir.Node, op: str, inputs: Sequence[ir.Value | None], attributes: Mapping[str, int]
) -> None:
    """Replace a node by another, whose output takes over the name of the old one's."""
    output = old.outputs[0]
    value = ir.Value(name=output.name, type=output.type, shape=output.shape)
    made = ir.Node("", op, inputs, ir.convenience.convert_attributes(attributes), outputs=[value], name=old.name)
    graph.insert_before(old, made)
    output.name = f"{output.name}/replaced"
    ir.convenience.replace_all_uses_with(output, value, replace_graph_outputs=True)
    graph.remove(old, safe=True)


_RULES: Mapping[str, Sequence[Callable[[ir.Graph, ir.Node], bool]]] = {
    **dict.fromkeys(MOVES, (_swap,)),
    "Concat": (_concatenate,),
    "DequantizeLinear": (_several_grids,),
    "Gather": (_swap, _rows),
    "Mul": (_factors,),
    "QuantizeLinear": (_cancel, _several_grids),
}
