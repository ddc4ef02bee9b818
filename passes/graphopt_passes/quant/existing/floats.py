"""Follow integers through a graph and give each its value in real numbers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from graphopt_passes.quant.builder import Builder
from graphopt_passes.quant.existing._maths import real_numbers
from graphopt_passes.quant.sites import graph_of, tensor_of

__all__ = ["Floats", "Numbers"]

Array = np.ndarray[Any, np.dtype[Any]]
Key = bytes | ir.Value | None

_SUFFIXES = ("_quantized", "_q", "_DQ_Q2", "_DQ_Q4", "_DQ_Q8")
_POSITIVE = frozenset(
    {"Abs", "Exp", "HardSigmoid", "Relu", "ReduceL1", "ReduceL2", "ReduceSumSquare", "Sigmoid", "Softmax", "Softplus",
     "Sqrt"}
)  # fmt: skip
_KEEP_SIGN = frozenset(
    {"Add", "AveragePool", "Concat", "Flatten", "GlobalAveragePool", "GlobalMaxPool", "Identity", "MaxPool", "Mul",
     "ReduceMax", "ReduceMean", "Reshape", "Slice", "Split", "Squeeze", "Transpose", "Unsqueeze"}
)  # fmt: skip
_SHAPES = frozenset({"Reshape", "Slice", "Split", "Squeeze", "Unsqueeze", "ReduceMax", "ReduceMean"})
_WHOLE = frozenset({ir.DataType.INT8, ir.DataType.INT16, ir.DataType.UINT8, ir.DataType.UINT16})
_CLIP_INPUTS_SINCE = 11
_DEPTH = 8


@dataclass(frozen=True)
class Numbers:
    """The real numbers that an integer value stands for, and the grid it is on.

    Attributes:
        real: The float value.
        scale: Bytes of the constant scale, or the value that holds it.
        zero_point: Likewise; None where there is none.
    """

    real: ir.Value
    scale: Key
    zero_point: Key


class Floats:
    """Float counterparts of the integers of one model.

    Args:
        builder: Edits the model.
        opset: Its version of the standard operators.
    """

    def __init__(self, builder: Builder, opset: int) -> None:
        self.builder = builder
        self.opset = opset
        self.replaced: dict[ir.Node, None] = {}
        self.names: dict[ir.Node, str] = {}  # what a layer is called whose node had another name
        self._numbers: dict[ir.Value, Numbers] = {}
        self._clips: dict[tuple[ir.Value, ir.Graph, float], ir.Value] = {}
        self._weights: dict[tuple[ir.Value, ir.Graph, Key, Key, int], ir.Value] = {}

    def know(self, integers: ir.Value, real: ir.Value, scale: ir.Value | None, zero: ir.Value | None) -> None:
        """Write down what an integer value stands for."""
        self._numbers[integers] = Numbers(real, _key(scale), _key(zero))

    def alike(self, integers: ir.Value, real: ir.Value, source: Numbers) -> None:
        """Write down a value on the grid of another one."""
        self._numbers[integers] = Numbers(real, source.scale, source.zero_point)

    def numbers(self, value: ir.Value | None) -> Numbers | None:
        """What an integer value stands for, if that is known."""
        return None if value is None else self._numbers.get(value)

    def real(
        self, value: ir.Value | None, scale: ir.Value | None, zero: ir.Value | None, node: ir.Node, axis: int = 0
    ) -> ir.Value | None:
        """The real numbers of an integer value read with a scale; a constant becomes a float one.

        Args:
            value: The integers.
            scale: Their scale.
            zero: Their zero point.
            node: Who asks.
            axis: Axis of a vector of scales.
        """
        found = self.numbers(value)
        if found is not None:
            return found.real if (found.scale, found.zero_point) == (_key(scale), _key(zero)) else None
        tensors = [tensor_of(v) for v in (value, scale, zero)]
        if value is None or tensors[0] is None or tensors[1] is None or (zero is not None and tensors[2] is None):
            return None
        key = (value, graph_of(node), _key(scale), _key(zero), axis)
        if key not in self._weights:
            block = node.attributes.get_int("block_size", 0)
            make = _maker(tensors[0], tensors[1], tensors[2], axis, block)
            shape, dtype = tensors[0].shape.numpy(), tensors[1].dtype
            self._weights[key] = self.weight(_stem(value.name or "weight"), make, shape, graph_of(node), dtype)
        return self._weights[key]

    def weight(
        self,
        name: str,
        make: Callable[[], Array],
        shape: Sequence[int],
        graph: ir.Graph,
        dtype: ir.DataType = ir.DataType.FLOAT,
    ) -> ir.Value:
        """Add a float initializer that is computed where it is read, so that one weight at a time is in memory."""
        name = self.builder.name(name)

        def tensor() -> ir.TensorProtocol:
            return ir.tensor(make().astype(dtype.numpy()), dtype=dtype)

        lazy = ir.LazyTensor(tensor, dtype=dtype, shape=ir.Shape(shape), name=name)
        value = ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(shape), const_value=lazy)
        graph.register_initializer(value)
        return value

    def emit(
        self,
        old: ir.Node,
        kind: str,
        inputs: Sequence[ir.Value | None],
        attributes: Mapping[str, Any] | None = None,
        *,
        name: str = "",
        outputs: int = 1,
    ) -> tuple[ir.Value, ...]:
        """Insert a node in front of an old one, under its name if none is given.

        Args:
            old: The node it replaces.
            kind: Operator.
            inputs: Inputs.
            attributes: Attributes of the node, or plain values.
            name: Name of the node.
            outputs: Number of outputs.
        """
        base = _stem(old.outputs[0].name or "")
        made = [ir.Value(name=self.builder.name(base), type=ir.TensorType(ir.DataType.FLOAT)) for _ in range(outputs)]
        node = ir.node(kind, inputs, dict(attributes or {}), outputs=made, name=name or old.name)
        node.metadata_props.update(old.metadata_props)
        node.doc_string = old.doc_string
        graph_of(old).insert_before(old, node)
        return tuple(made)

    def replace(self, node: ir.Node, output: ir.Value, real: ir.Value) -> None:
        """Let everybody read a float value instead of one output of a node."""
        self.replaced[node] = None
        if not output.is_graph_output():
            output.replace_all_uses_with(real)
            return
        producer = real.producer()
        if producer is None or real.is_graph_output() or producer.graph is not node.graph:
            (copied,) = self.emit(node, "Identity", [real], name=self.builder.name(f"{output.name}_copy"))
            real = copied
        output.replace_all_uses_with(real, replace_graph_outputs=True)
        name, output.name = output.name, self.builder.name(f"{output.name}_old")
        real.name, real.type, real.shape = name, output.type, output.shape
        real.metadata_props.update(output.metadata_props)

    def clipped(self, value: ir.Value, scale: ir.Value | None, zero: ir.Value | None, node: ir.Node) -> ir.Value:
        """A value as a grid without negative numbers cuts it.

        Quantizers take a Relu or Clip away where the grid does its work. What is never negative anyway, and inputs of
        the model, stay as they are.
        """
        high = _one_sided(scale, zero)
        if high is None or value.producer() is None or never_negative(value):
            return value
        key = (value, graph_of(node), float(high))
        if key not in self._clips:
            name = self.builder.name(f"{value.name}_clip")
            if self.opset < _CLIP_INPUTS_SINCE:
                limits, inputs = {"min": 0.0, "max": float(high)}, []
            else:
                ends = (("low", np.zeros((), high.dtype)), ("high", high))
                limits, inputs = {}, [self.builder.scalar(f"clip_{word}", array) for word, array in ends]
            (self._clips[key],) = self.emit(node, "Clip", [value, *inputs], limits, name=name)
        return self._clips[key]


def _one_sided(scale: ir.Value | None, zero: ir.Value | None) -> Array | None:
    """The greatest number on a grid that starts at zero; None for other grids."""
    step, offset = tensor_of(scale), tensor_of(zero)
    if step is None or step.size != 1 or offset is None or offset.dtype not in _WHOLE:
        return None
    start, limits = int(offset.numpy().reshape(-1)[0]), np.iinfo(offset.numpy().dtype)
    return step.numpy().reshape(()) * step.numpy().dtype.type(limits.max - limits.min) if start == limits.min else None


def never_negative(value: ir.Value | None, depth: int = _DEPTH) -> bool:
    """Whether a value cannot hold negative numbers, as far as the operators before it tell."""
    tensor = tensor_of(value)
    if tensor is not None:
        return tensor.dtype == ir.DataType.FLOAT and bool((tensor.numpy() >= 0).all())
    node = value.producer() if value is not None else None
    if node is None or not depth:
        return False
    if node.op_type == "Clip":
        low = tensor_of(node.inputs[1]) if len(node.inputs) > 1 else None
        return bool(low.numpy() >= 0) if low is not None else node.attributes.get_float("min", -1.0) >= 0
    if node.op_type in _POSITIVE:
        return True
    data = node.inputs[:1] if node.op_type in _SHAPES else node.inputs
    return node.op_type in _KEEP_SIGN and all(never_negative(value, depth - 1) for value in data)


def _key(value: ir.Value | None) -> Key:
    tensor = tensor_of(value)
    if tensor is None:
        return value
    array = tensor.numpy()
    if not array.any() and tensor.dtype.is_integer():
        return None  # a zero point of zero is the same as none
    return array.reshape(-1).tobytes()


def _maker(
    integers: ir.TensorProtocol, scale: ir.TensorProtocol, zero: ir.TensorProtocol | None, axis: int, block: int
) -> Callable[[], Array]:
    def make() -> Array:
        offset = zero.numpy() if zero is not None else None
        return real_numbers(integers.numpy(), scale.numpy(), offset, axis, block)

    return make


def _stem(name: str) -> str:
    return next((name.removesuffix(end) for end in _SUFFIXES if name.endswith(end) and name != end), name)
