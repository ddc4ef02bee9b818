"""16-bit floats: what a graph holds in them becomes float32, and only what is stored stays 16 bits wide.

CPUs compute in float32 whatever the graph says, so that rounding every result to 16 bits costs time and digits.

what                                         becomes
value of float16 or bfloat16                 float32, in branches and bodies of loops too
input or output of the graph                 the same, with a Cast behind or before it
Cast from and to what is float32 now         nothing
constant                                     float32 that is made of 16 bits whenever it is read
Gather of rows of a large constant           Gather of 16 bits and a Cast
operand that becomes integers, or of other   rounded to 16 bits as before
domains
"""

from __future__ import annotations

from collections.abc import Iterator

import ml_dtypes
import numpy as np
import onnx_ir as ir

from graphopt_backends._fold import is_constant

__all__ = ["Widened", "narrowed", "widen"]

_HALVES = frozenset({ir.DataType.FLOAT16, ir.DataType.BFLOAT16})
_FLOATS = _HALVES | {ir.DataType.FLOAT, ir.DataType.DOUBLE}
_TYPE_ATTRIBUTES = ("dtype", "output_dtype", "precision", "softmax_precision", "stash_type", "to")
_DOMAINS = ("", "ai.onnx", "com.microsoft")
_TABLE_BYTES = 1 << 16
_LEAST_SIZE = 1024  # weights whose bytes count
_SAMPLE = 256


class Widened(ir.LazyTensor):
    """A constant of 16-bit floats as one of float32.

    Attributes:
        narrow: The constant as it is stored.
    """

    def __init__(self, narrow: ir.TensorProtocol) -> None:
        self.narrow = narrow
        shape = ir.Shape(narrow.shape.numpy())
        super().__init__(self._wide, ir.DataType.FLOAT, shape, name=narrow.name, doc_string=narrow.doc_string)

    def _wide(self) -> ir.Tensor:
        return ir.Tensor(self.narrow.numpy().astype(np.float32), name=self.name)


def narrowed(array: np.ndarray) -> np.ndarray:
    """The same numbers as 16-bit floats, if there are many of them and bfloat16 or float16 holds each exactly."""
    if array.dtype != np.float32 or array.size < _LEAST_SIZE:
        return array
    sample = array.flat[:: -(-array.size // _SAMPLE)]
    for dtype in (np.dtype(ml_dtypes.bfloat16), np.dtype(np.float16)):
        if _holds(dtype, sample) and _holds(dtype, array):
            return array.astype(dtype)
    return array


def _holds(dtype: np.dtype, array: np.ndarray) -> bool:
    with np.errstate(over="ignore"):
        return bool((array.astype(dtype).astype(np.float32) == array).all())


def widen(model: ir.Model) -> bool:
    """Replace 16-bit floats by float32 in place; returns whether there were any.

    Types of values must be known. A model with sequences of 16-bit floats stays as it is.
    """
    values = [value for graph in model.graphs() for value in _values(graph)]
    halves = [value for value in values if _half(value) is not None]
    if not halves or any(not isinstance(value.type, ir.TensorType) for value in halves):
        return False
    for value in halves:
        if value.const_value is not None:
            value.const_value = Widened(value.const_value)
    kept: set[ir.Value] = set()
    for graph in model.graphs():
        for node in list(graph):
            if _look_up_narrow(graph, node, kept):
                continue
            if node.domain not in _DOMAINS or node.op_type == "BitCast":
                _fence_inputs(graph, node, kept)
                for output in node.outputs:
                    if _half(output) is not None:
                        _fence_output(graph, node, output, kept)
            elif node.op_type == "Cast" and _target(node) not in _FLOATS:
                _fence_inputs(graph, node, kept)
            else:
                _widen_attributes(node)
    _fence_ends(model.graph, kept)
    for value in (value for graph in model.graphs() for value in _values(graph)):
        if _half(value) is not None and value not in kept:
            value.type = ir.TensorType(ir.DataType.FLOAT)
    for graph in model.graphs():
        for node in list(graph):
            _drop_cast(graph, node)
    return True


def _values(graph: ir.Graph) -> Iterator[ir.Value]:
    yield from graph.inputs
    yield from graph.initializers.values()
    for node in graph:
        yield from node.outputs


def _half(value: ir.Value | None) -> ir.DataType | None:
    """The type of a value if it is one of 16-bit floats."""
    dtype = None if value is None else value.dtype
    return dtype if dtype in _HALVES else None


def _target(node: ir.Node) -> ir.DataType:
    return ir.DataType(node.attributes.get_int("to", 0))


def _look_up_narrow(graph: ir.Graph, node: ir.Node, kept: set[ir.Value]) -> bool:
    """Take rows of a constant, or of one behind a Cast, as they are stored, and widen those alone."""
    if node.op_type != "Gather" or node.domain not in _DOMAINS:
        return False
    table = node.inputs[0]
    maker = table.producer() if table is not None else None
    if maker is not None and maker.op_type == "Cast" and _target(maker) == ir.DataType.FLOAT:
        table = maker.inputs[0]
    wide = table.const_value if table is not None and is_constant(table) else None
    if table is None or not isinstance(wide, Widened) or wide.narrow.nbytes < _TABLE_BYTES:
        return False
    owner = table.graph
    assert isinstance(owner, ir.Graph)
    name = f"{table.name}/narrow"
    if name not in owner.initializers:
        twin = ir.Value(name=name, type=ir.TensorType(wide.narrow.dtype), shape=table.shape, const_value=wide.narrow)
        owner.register_initializer(twin)
    narrow = owner.initializers[name]
    kept.add(narrow)
    node.replace_input_with(0, narrow)
    _fence_output(graph, node, node.outputs[0], kept)
    node.outputs[0].type = narrow.type
    return True


def _fence_inputs(graph: ir.Graph, node: ir.Node, kept: set[ir.Value]) -> None:
    """Let a node read 16-bit floats still."""
    for i, value in enumerate(node.inputs):
        dtype = _half(value)
        if value is not None and dtype is not None and value not in kept:
            cast = _cast(value, dtype, f"{node.name}/input {i}")
            kept.add(cast.outputs[0])
            graph.insert_before(node, cast)
            node.replace_input_with(i, cast.outputs[0])


def _fence_output(graph: ir.Graph, node: ir.Node, output: ir.Value, kept: set[ir.Value]) -> None:
    """Let a node write 16-bit floats still; those who read them get float32, when types have changed."""
    kept.add(output)
    cast = _cast(output, ir.DataType.FLOAT, f"{output.name}/float32")
    wide, name = cast.outputs[0], output.name
    wide.type = output.type
    ir.convenience.replace_all_uses_with(output, wide, replace_graph_outputs=True)
    cast.replace_input_with(0, output)
    if wide.is_graph_output():
        output.name, wide.name = f"{name}/narrow", name
    graph.insert_after(node, cast)


def _fence_ends(graph: ir.Graph, kept: set[ir.Value]) -> None:
    """Let a graph read and give what it did."""
    for i, value in enumerate(graph.outputs):
        dtype = _half(value)
        if dtype is not None and not value.is_graph_input():
            cast = _cast(value, dtype, f"{value.name}/narrow")
            result = cast.outputs[0]
            result.name, value.name = value.name, f"{value.name}/float32"
            kept.add(result)
            graph.append(cast)
            graph.outputs[i] = result
    for value in graph.inputs:
        uses = list(value.uses())
        if _half(value) is not None:
            kept.add(value)
        if value in kept and uses:
            cast = _cast(value, ir.DataType.FLOAT, f"{value.name}/float32")
            for user, i in uses:
                user.replace_input_with(i, cast.outputs[0])
            graph.insert_before(graph[0], cast)


def _cast(value: ir.Value, dtype: ir.DataType, name: str) -> ir.Node:
    """A Cast that is in no graph yet."""
    result = ir.Value(name=name, type=ir.TensorType(dtype), shape=value.shape)
    attributes = ir.convenience.convert_attributes({"to": int(dtype)})
    return ir.Node("", "Cast", [value], attributes, outputs=[result], name=name)


def _widen_attributes(node: ir.Node) -> None:
    for name, attribute in list(node.attributes.items()):
        if attribute.type == ir.AttributeType.TENSOR:
            tensor = attribute.as_tensor()
            if tensor.dtype in _HALVES:
                node.attributes[name] = ir.AttrTensor(name, ir.Tensor(tensor.numpy().astype(np.float32)))
        elif name in _TYPE_ATTRIBUTES and attribute.type == ir.AttributeType.INT and attribute.as_int() in _HALVES:
            node.attributes[name] = ir.AttrInt64(name, int(ir.DataType.FLOAT))


def _drop_cast(graph: ir.Graph, node: ir.Node) -> None:
    """A Cast from float32 to float32 is none; one that makes an output of a branch gives it its name."""
    if node.op_type != "Cast" or node.domain not in _DOMAINS:
        return
    source, output = node.inputs[0], node.outputs[0]
    if source is None or source.dtype != ir.DataType.FLOAT or _target(node) != ir.DataType.FLOAT:
        return
    if output.is_graph_output():
        node.op_type = "Identity"
        del node.attributes["to"]
        return
    ir.convenience.replace_all_uses_with(output, source)
    graph.remove(node, safe=True)
