"""Operators in a form that the compiler's importer takes; each rule keeps the values.

rule                from                                    to
explicit_pads       auto_pad SAME_*, VALID                  pads
widen_small_ints    int4 and uint4 constants                int8 and uint8 constants
plain_norm          BatchNormalization, constant statistics Mul, Add
unroll_steps        LSTM, GRU of a short, fixed length      MatMul, Sigmoid, Tanh, ... for each step
flatten_blocks      DequantizeLinear with block_size        Cast, Sub, Reshape, Mul on blocks
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import onnx_ir as ir

from graphopt_backends._fold import add_constant, is_constant, static_shape
from graphopt_backends._recurrent import unroll

__all__ = ["rewrite"]

Rule = Callable[[ir.Graph, ir.Node], bool]

_SMALL = {ir.DataType.INT4: (np.int8, ir.DataType.INT8), ir.DataType.UINT4: (np.uint8, ir.DataType.UINT8)}


def rewrite(model: ir.Model) -> bool:
    """Apply every rule to every node once; returns whether anything changed. Shapes must be inferred."""
    changed = _widen_small_ints(model)
    for graph in model.graphs():
        for node in list(graph):
            rule = _RULES.get(node.op_type) if node.domain in ("", "ai.onnx") else None
            if rule is not None and rule(graph, node):
                changed = True
    return changed


def _widen_small_ints(model: ir.Model) -> bool:
    changed = False
    for graph in model.graphs():
        for value in graph.initializers.values():
            tensor = value.const_value
            if tensor is not None and tensor.dtype in _SMALL:
                numpy_type, dtype = _SMALL[tensor.dtype]
                value.const_value = ir.Tensor(tensor.numpy().astype(numpy_type), dtype=dtype, name=value.name)
                value.type = ir.TensorType(dtype)
                changed = True
    return changed


def _explicit_pads(graph: ir.Graph, node: ir.Node) -> bool:  # noqa: ARG001
    mode = node.attributes.get_string("auto_pad", "NOTSET")
    source = static_shape(node.inputs[0])
    if mode == "NOTSET" or source is None:
        return False
    spatial = source[2:]
    if "kernel_shape" in node.attributes:
        kernel = tuple(node.attributes.get_ints("kernel_shape") or ())
    else:
        kernel = (static_shape(node.inputs[1]) or ())[2:]
    strides = node.attributes.get_ints("strides") or (1,) * len(spatial)
    dilations = node.attributes.get_ints("dilations") or (1,) * len(spatial)
    before: list[int] = []
    after: list[int] = []
    for size, extent, stride, dilation in zip(spatial, kernel, strides, dilations, strict=True):
        total = 0
        if mode != "VALID":
            total = max((-(-size // stride) - 1) * stride + (extent - 1) * dilation + 1 - size, 0)
        small = total // 2
        before.append(total - small if mode == "SAME_LOWER" else small)
        after.append(small if mode == "SAME_LOWER" else total - small)
    node.attributes.pop("auto_pad")
    node.attributes["pads"] = ir.AttrInt64s("pads", [*before, *after])
    return True


def _flatten_blocks(graph: ir.Graph, node: ir.Node) -> bool:
    """Blocked DequantizeLinear: (x - zero point) * scale with one scale for each block along the axis."""
    block = node.attributes.get_int("block_size", 0)
    shape, scales = static_shape(node.inputs[0]), static_shape(node.inputs[1])
    if not block or shape is None or scales is None or node.inputs[1] is None:
        return False
    axis = node.attributes.get_int("axis", 1) % len(shape)
    if scales[axis] * block != shape[axis]:
        return False
    split = [*shape[:axis], scales[axis], block, *shape[axis + 1 :]]
    dtype = node.inputs[1].dtype or ir.DataType.FLOAT
    out = node.outputs[0]
    make = _Builder(graph, node)
    data = make("Reshape", [make("Cast", [node.inputs[0]], to=dtype), make.ints(split)])
    if len(node.inputs) > 2 and node.inputs[2] is not None:
        zero = make("Unsqueeze", [make("Cast", [node.inputs[2]], to=dtype), make.ints([axis + 1])])
        data = make("Sub", [data, zero])
    data = make("Mul", [data, make("Unsqueeze", [node.inputs[1], make.ints([axis + 1])])])
    make.finish("Reshape", [data, make.ints(shape)], out)
    return True


def _plain_norm(graph: ir.Graph, node: ir.Node) -> bool:
    """BatchNormalization with constant statistics: x * a + b, for each channel."""
    if not all(is_constant(v) for v in node.inputs[1:5]) or any(o.uses() for o in node.outputs[1:]):
        return False
    rank = node.inputs[0].shape.rank() if node.inputs[0] is not None and node.inputs[0].shape is not None else 0
    dtype = node.inputs[1].dtype if node.inputs[1] is not None else None
    if rank < 2 or dtype is None or node.attributes.get_int("training_mode", 0):
        return False
    gain, shift, mean, variance = (v.const_value.numpy().astype(np.float64) for v in node.inputs[1:5])  # type: ignore[union-attr]
    a = gain / np.sqrt(variance + node.attributes.get_float("epsilon", 1e-5))
    channels = (1, -1) + (1,) * (rank - 2)
    make = _Builder(graph, node)
    scaled = make("Mul", [node.inputs[0], make.array(a.reshape(channels).astype(dtype.numpy()))])
    make.finish(
        "Add", [scaled, make.array((shift - mean * a).reshape(channels).astype(dtype.numpy()))], node.outputs[0]
    )
    return True


def _unroll_steps(graph: ir.Graph, node: ir.Node) -> bool:
    """LSTM and GRU of a short, fixed length."""
    make = _Builder(graph, node)
    results = unroll(node, make)
    if results is None:
        return False
    for output, result in zip(node.outputs, results, strict=False):
        if result is not None and (output.uses() or output.is_graph_output()):
            make.put("Identity", [result], output)
    graph.remove(node, safe=True)
    return True


class _Builder:
    """Adds nodes before the one they replace, under names made from its name."""

    def __init__(self, graph: ir.Graph, node: ir.Node) -> None:
        self._graph, self._node, self._count = graph, node, 0

    def __call__(self, op: str, inputs: list[ir.Value | None], **attributes: int) -> ir.Value:
        self._count += 1
        name = f"{self._node.name}/lowered/{op}_{self._count}"
        made = ir.Node("", op, inputs, ir.convenience.convert_attributes(attributes), name=name)
        made.outputs[0].name = name
        self._graph.insert_before(self._node, made)
        return made.outputs[0]

    def ints(self, values: Sequence[int]) -> ir.Value:
        return self.array(np.asarray(values, np.int64))

    def array(self, array: np.ndarray) -> ir.Value:
        self._count += 1
        return add_constant(self._graph, f"{self._node.name}/lowered/const_{self._count}", array)

    def split(self, value: ir.Value, parts: int, axis: int, size: int) -> list[ir.Value]:
        """Cut a value into parts of one size."""
        if parts == 1:
            return [value]
        self._count += 1
        name = f"{self._node.name}/lowered/Split_{self._count}"
        attributes = ir.convenience.convert_attributes({"axis": axis})
        made = ir.Node("", "Split", [value, self.ints([size] * parts)], attributes, num_outputs=parts, name=name)
        for i, output in enumerate(made.outputs):
            output.name = f"{name}_{i}"
        self._graph.insert_before(self._node, made)
        return list(made.outputs)

    def finish(self, op: str, inputs: list[ir.Value | None], output: ir.Value) -> None:
        """Make the last node, which takes over the name of `output`, and remove the old one."""
        self.put(op, inputs, output)
        self._graph.remove(self._node, safe=True)

    def put(self, op: str, inputs: list[ir.Value | None], output: ir.Value) -> None:
        """Make a node that takes over the name and uses of `output`."""
        new = self(op, inputs)
        new.type, new.shape = output.type, output.shape
        name, output.name = output.name, f"{output.name}/replaced"
        ir.convenience.replace_all_uses_with(output, new, replace_graph_outputs=True)
        new.name = name


_RULES: dict[str, Rule] = {
    "AveragePool": _explicit_pads,
    "BatchNormalization": _plain_norm,
    "Conv": _explicit_pads,
    "DequantizeLinear": _flatten_blocks,
    "GRU": _unroll_steps,
    "LSTM": _unroll_steps,
    "LpPool": _explicit_pads,
    "MaxPool": _explicit_pads,
}
