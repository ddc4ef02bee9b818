"""Linear layers with constant weights: what a scale and a shift per channel can be folded into."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from graphopt.analyses import Shapes
from graphopt_passes.fold import _batchnorm as maths
from graphopt_passes.fold.rewiring import ANNOTATION, LARGE, FreshNames, constant, only_reader, site

__all__ = ["Linear", "Refusal", "find_linear", "input_channels_of", "store"]

Array = np.ndarray[Any, np.dtype[Any]]
_FLOATS = frozenset({ir.DataType.FLOAT, ir.DataType.DOUBLE, ir.DataType.FLOAT16})


class Refusal(Exception):  # noqa: N818  a reason, not an error
    """Why a site is left alone; caught within the pass, never shown as an error."""


@dataclass(frozen=True)
class Linear:
    """A linear layer and, for MatMul, the Add behind it that holds the bias.

    Attributes:
        node: Conv, ConvTranspose, Gemm or MatMul.
        adder: The Add with a constant that follows a MatMul, if any.
        weight: Its constant weight.
        channels: Number of output channels.
        rank: Rank of its output; None where it is unknown.
        axis: Axis of the channels in the output: 1, or -1 for the last one.
    """

    node: ir.Node
    adder: ir.Node | None
    weight: ir.Value
    channels: int
    rank: int | None
    axis: int

    @property
    def output(self) -> ir.Value:
        """What a scale and shift would be applied to."""
        return (self.adder or self.node).outputs[0]

    def bias(self) -> tuple[ir.Node, int] | None:
        """The node and input that hold the bias; None for a MatMul without one."""
        if self.node.op_type == "MatMul":
            return None if self.adder is None else (self.adder, 0 if constant(self.adder.inputs[0]) is not None else 1)
        return self.node, 2

    def bias_values(self) -> Array | None:
        """The bias as float64, None if there is none; raises if it is not constant."""
        place = self.bias()
        value = place[0].inputs[place[1]] if place and place[1] < len(place[0].inputs) else None
        if value is None:
            return None
        tensor = constant(value)
        if tensor is None:
            raise Refusal(f"the bias of {site(self.node)!r} is not constant")
        beta = self.node.attributes.get_float("beta", 1.0) if self.node.op_type == "Gemm" else 1.0
        return tensor.numpy().astype(np.float64) * beta

    def scaled_weight(self, scale: Array) -> Callable[[], Array]:
        """A function that computes the weight with its output channels scaled."""
        tensor, node = self.weight.const_value, self.node
        assert tensor is not None
        groups, transposed = node.attributes.get_int("group", 1), bool(node.attributes.get_int("transB", 0))
        if node.op_type == "Conv":
            return lambda: maths.scale_conv(tensor.numpy(), scale)
        if node.op_type == "ConvTranspose":
            return lambda: maths.scale_conv_transpose(tensor.numpy(), scale, groups)
        return lambda: maths.scale_columns(tensor.numpy(), scale, transposed=transposed)


def find_linear(value: ir.Value | None, reader: ir.Node, shapes: Shapes) -> Linear | None:
    """The linear layer that computes a value for one reader alone; None if no linear layer computes it.

    Raises:
        Refusal: There is one, but nothing may be folded into it.
    """
    node = value.producer() if value is not None else None
    adder = None
    if value is not None and node is not None and node.op_type == "Add" and _is_onnx(node):
        adder, node = node, _multiplier(node)
    if value is None or node is None or node.op_type not in _CHANNELS or not _is_onnx(node):
        return None
    if node.op_type == "MatMul" and constant(node.inputs[1]) is None:
        return None  # a product of two activations, as in attention
    for step, result in ((reader, value), *([(adder, node.outputs[0])] if adder is not None else [])):
        _refuse_other_readers(result, step)
    if node.graph is not reader.graph:
        raise Refusal(f"{site(node)!r} is in another graph")
    weight = weight_of(node)
    rank = shapes.rank(value)
    shape = tuple(weight.const_value.shape.numpy()) if weight.const_value is not None else ()
    if node.op_type == "MatMul" and len(shape) != 2:
        raise Refusal(f"the weight of {site(node)!r} is not a matrix")
    convolution = node.op_type in ("Conv", "ConvTranspose")
    rank = len(shape) if convolution else 2 if node.op_type == "Gemm" else rank
    return Linear(node, adder, weight, _CHANNELS[node.op_type](node, shape), rank, 1 if convolution else -1)


def weight_of(node: ir.Node) -> ir.Value:
    """The constant weight of a linear layer.

    Raises:
        Refusal: It is computed, quantized, or of a type that is not folded.
    """
    weight = node.inputs[1]
    tensor = constant(weight)
    if weight is None or tensor is None:
        raise Refusal(f"the weight of {site(node)!r} is not constant")
    if tensor.dtype not in _FLOATS:
        raise Refusal(f"the weight of {site(node)!r} is {tensor.dtype.name}")
    if any(v is not None and ANNOTATION in v.meta for v in (*node.inputs, *node.outputs)):
        raise Refusal(f"{site(node)!r} carries a quantization annotation")
    return weight


def input_channels_of(node: ir.Node) -> int:
    """Input channels of a Conv or Gemm."""
    shape = weight_of(node).const_value.shape.numpy()  # type: ignore[union-attr]
    if node.op_type == "Conv":
        return shape[1] * node.attributes.get_int("group", 1)
    return shape[1] if node.attributes.get_int("transB", 0) else shape[0]


def store(node: ir.Node, index: int, compute: Callable[[], Array], names: FreshNames, limit: int) -> Callable[[], None]:
    """Prepare to give a node a new constant, in the type of its weight.

    A constant that nobody else reads keeps its name; a shared one stays, and the node gets its own.

    Returns:
        A function that does it and cannot fail.

    Raises:
        Refusal: The values overflow, or a copy of a shared weight would exceed `limit` bytes.
    """
    old = node.inputs[index] if index < len(node.inputs) else None
    held_before = constant(old) if node.op_type == "Add" else weight_of(node).const_value
    kind = ir.DataType.FLOAT if held_before is None else held_before.dtype
    with np.errstate(over="ignore"):
        array = compute().astype(kind.numpy())
    if not np.isfinite(array).all():
        raise Refusal(f"the folded weight of {site(node)!r} would overflow {kind.name}")
    own = old is not None and constant(old) is not None and len(tuple(old.uses())) == 1 and not old.is_graph_output()
    if old is not None and not own and array.nbytes > limit:
        raise Refusal(f"the weight of {site(node)!r} is shared, and a copy has {array.nbytes} bytes; limit={limit}")

    def put() -> None:
        shape = ir.Shape(array.shape)
        if own and old is not None:
            old.const_value = _tensor(array, compute, kind, old.name)
            old.shape = shape
            return
        base = f"{old.name}_{site(node)}" if old is not None else f"{site(node)}_bias"
        name = names.make(base)
        held = ir.Value(
            name=name, shape=shape, type=ir.TensorType(kind), const_value=_tensor(array, compute, kind, name)
        )
        assert node.graph is not None
        node.graph.register_initializer(held)
        if index >= len(node.inputs):
            node.resize_inputs(index + 1)
        node.replace_input_with(index, held)

    return put


def _tensor(array: Array, compute: Callable[[], Array], kind: ir.DataType, name: str | None) -> ir.TensorProtocol:
    """Large weights are computed again when they are written, one at a time, instead of piling up in memory."""
    if array.nbytes <= LARGE:
        return ir.Tensor(array, name=name)
    shape = ir.Shape(array.shape)
    return ir.LazyTensor(lambda: ir.Tensor(compute().astype(kind.numpy())), dtype=kind, shape=shape, name=name)


def _is_onnx(node: ir.Node) -> bool:
    return node.domain in ("", "ai.onnx")


def _multiplier(adder: ir.Node) -> ir.Node | None:
    """The MatMul whose bias an Add holds."""
    for i in (0, 1):
        bias, other = adder.inputs[i], adder.inputs[1 - i]
        if constant(bias) is not None and other is not None:
            node = other.producer()
            return node if node is not None and node.op_type == "MatMul" else None
    return None


def _refuse_other_readers(value: ir.Value, reader: ir.Node) -> None:
    if only_reader(value) is reader:
        return
    others = sorted({site(use.node) for use in value.uses() if use.node is not reader})
    producer = value.producer()
    who = f"{site(producer)!r} before it" if producer is not None else "its input"
    raise Refusal(f"{who} is also read by {others[0]!r}" if others else f"{who} feeds an output of the model")


def _gemm_channels(node: ir.Node, shape: tuple[int, ...]) -> int:
    return shape[0] if node.attributes.get_int("transB", 0) else shape[1]


_CHANNELS: dict[str, Callable[[ir.Node, tuple[int, ...]], int]] = {
    "Conv": lambda node, shape: shape[0],  # noqa: ARG005
    "ConvTranspose": lambda node, shape: shape[1] * node.attributes.get_int("group", 1),
    "Gemm": _gemm_channels,
    "MatMul": lambda node, shape: shape[1],  # noqa: ARG005
}
