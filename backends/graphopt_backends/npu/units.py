"""A graph of QuantizeLinear and DequantizeLinear read as operations on integers.

A unit is a float operator whose inputs are dequantized integers or constants, with the Relu or Clip behind it and the
QuantizeLinear of its result. A chain of elementwise operators between one DequantizeLinear and one QuantizeLinear is
one unit as well: whatever it computes, 256 entries of a table say it all.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Literal

import numpy as np
import onnx_ir as ir

from graphopt_backends._fold import is_constant, static_shape

__all__ = ["CURVE", "Grid", "Operand", "Unit", "find_units"]

Array = np.ndarray[Any, np.dtype[Any]]
CURVE = "curve"
"""The kind of a unit that is a table of 256 entries."""

_INTEGERS = {ir.DataType.INT8: "int8", ir.DataType.INT16: "int16"}
_ELEMENTWISE = frozenset(
    {
        "Abs", "Add", "Atan", "Cast", "Ceil", "Celu", "Clip", "Cos", "Cosh", "Div", "Elu", "Erf", "Exp", "Floor",
        "Gelu", "HardSigmoid", "HardSwish", "Identity", "LeakyRelu", "Log", "Max", "Min", "Mish", "Mul", "Neg", "PRelu",
        "Pow", "Reciprocal", "Relu", "Round", "Selu", "Sigmoid", "Sign", "Sin", "Softplus", "Softsign", "Sqrt", "Sub",
        "Sum", "Swish", "Tan", "Tanh", "ThresholdedRelu",
    }
)  # fmt: skip


@dataclass(frozen=True)
class Grid:
    """How integers stand for real numbers: `(integer - zero_point) * scale`.

    Attributes:
        scale: One number, or one for each index of an axis.
        zero_point: The integer that stands for 0, the same for all.
        dtype: Element type.
        axis: The axis with a scale for each index; None: one for all.
    """

    scale: Array
    zero_point: int
    dtype: Literal["int8", "int16", "int32"]
    axis: int | None = None

    @property
    def step(self) -> Fraction:
        """The one scale, exactly."""
        return Fraction(float(self.scale.reshape(-1)[0]))

    def matches(self, other: Grid) -> bool:
        """Whether the same integers stand for the same numbers."""
        same = self.dtype == other.dtype and self.zero_point == other.zero_point
        return same and self.axis == other.axis and np.array_equal(self.scale, other.scale)

    def integer(self, real: float) -> int:
        """The integer that stands for a number, as QuantizeLinear rounds it."""
        info = np.iinfo(self.dtype)
        found = np.rint(np.float32(real) / np.float32(self.scale.reshape(-1)[0])) + self.zero_point
        return int(np.clip(found, info.min, info.max))


@dataclass(frozen=True, eq=False)
class Operand:
    """What a float operator reads.

    Attributes:
        value: Integers, or a constant that is no integer.
        grid: What the integers stand for; None where the operator reads the value as it is.
    """

    value: ir.Value
    grid: Grid | None = None

    @property
    def array(self) -> Array | None:
        """Elements as they are stored; None for what is computed."""
        tensor = self.value.const_value
        return tensor.numpy() if is_constant(self.value) and tensor is not None else None

    @property
    def real(self) -> Array | None:
        """The numbers of a constant, in float64; None for what is computed."""
        if (array := self.array) is None or self.grid is None:
            return None if array is None else array.astype(np.float64)
        scale = self.grid.scale.astype(np.float64)
        if self.grid.axis is not None:
            scale = scale.reshape([-1 if axis == self.grid.axis else 1 for axis in range(array.ndim)])
        return (array.astype(np.float64) - self.grid.zero_point) * scale

    @property
    def shape(self) -> tuple[int, ...]:
        """Its sizes."""
        return static_shape(self.value) or ()


@dataclass(frozen=True, eq=False)
class Unit:
    """An operation on integers.

    Attributes:
        kind: Operator type of its first node, or `CURVE`.
        nodes: The float operators, in order.
        frame: Its DequantizeLinear and QuantizeLinear nodes.
        inputs: What the first node reads; None for what is left out.
        results: The integers made, one value for each output of the node.
        grids: What those stand for; None where the operator makes integers of its own, as ArgMax does.
        bounds: Real numbers between which an activation keeps the result.
    """

    kind: str
    nodes: tuple[ir.Node, ...]
    frame: tuple[ir.Node, ...]
    inputs: tuple[Operand | None, ...]
    results: tuple[ir.Value, ...]
    grids: tuple[Grid | None, ...]
    bounds: tuple[float, float] = (-np.inf, np.inf)

    @property
    def node(self) -> ir.Node:
        """The operator that gives the unit its kind."""
        return self.nodes[0]

    @property
    def name(self) -> str:
        """Name of that operator."""
        return self.node.name or ""

    @property
    def limits(self) -> tuple[int, int]:
        """The integers between which the result lies."""
        grid = self.grids[0]
        assert grid is not None
        info = np.iinfo(grid.dtype)
        low, high = self.bounds
        return (
            info.min if np.isneginf(low) else grid.integer(low),
            info.max if np.isposinf(high) else grid.integer(high),
        )


def find_units(graph: ir.Graph) -> tuple[dict[ir.Node, Unit], dict[ir.Node, str]]:
    """Read all float operators of a graph.

    Returns:
        The units by their last float node, in order, and why other nodes are none.
    """
    units, reasons = dict[ir.Node, Unit](), dict[ir.Node, str]()
    taken = set[ir.Node]()
    for node in reversed(list(graph)):
        if node.op_type in ("QuantizeLinear", "DequantizeLinear") or node in taken:
            continue
        found = _curve(node) or _unit(node)
        if isinstance(found, str):
            reasons[node] = found
            continue
        units[node] = found
        taken.update(found.nodes)
    return dict(reversed(units.items())), dict(reversed(reasons.items()))


def _unit(last: ir.Node) -> Unit | str:
    """The unit that ends with a node, or why there is none."""
    bounds, node = _bounds(last), last
    if bounds is not None and (before := _alone_before(last)) is not None:
        node = before
    nodes, reads = (node,), list(node.inputs)
    if (product := _product_before(node)) is not None:
        nodes, reads = (product, node), [*product.inputs, next(v for v in node.inputs if v is not product.outputs[0])]
    frame, results, grids = list[ir.Node](), list[ir.Value](), list[Grid | None]()
    for output in last.outputs:
        rounding = _rounding(output)
        if isinstance(rounding, str):
            return rounding
        frame += rounding[0]
        results.append(rounding[1])
        grids.append(rounding[2])
    inputs = list[Operand | None]()
    for value in reads:
        read = _operand(value)
        if isinstance(read, str):
            return read
        if read is not None and read[0] is not None:
            frame.append(read[0])
        inputs.append(read[1] if read is not None else None)
    if node is not last:
        nodes = (*nodes, last)
    free = (-np.inf, np.inf)
    return Unit(nodes[0].op_type, nodes, tuple(frame), tuple(inputs), tuple(results), tuple(grids), bounds or free)


def _product_before(node: ir.Node) -> ir.Node | None:
    """The MatMul with a constant matrix to whose rows an Add adds a constant: its bias."""
    if node.op_type != "Add":
        return None
    for value, other in (node.inputs, node.inputs[::-1]):
        product = value.producer() if value is not None else None
        if value is None or product is None or product.op_type != "MatMul" or len(value.uses()) != 1:
            continue
        weight, bias, shape = _operand(product.inputs[1]), _operand(other), static_shape(value)
        if not isinstance(weight, tuple) or not isinstance(bias, tuple) or not shape or value.is_graph_output():
            continue
        rows = weight[1].array is not None and len(weight[1].shape) == 2
        size = bias[1].array.size if bias[1].array is not None else 0
        if rows and size in (1, shape[-1]) and bias[1].shape[-1:] in ((), (size,)):
            return product
    return None


def _alone_before(activation: ir.Node) -> ir.Node | None:
    """The operator whose result an activation alone reads, if it is one that sums or joins."""
    value = activation.inputs[0]
    before = value.producer() if value is not None else None
    if value is None or before is None or value.is_graph_output() or len(value.uses()) != 1:
        return None
    alone = before.op_type not in ("QuantizeLinear", "DequantizeLinear") and len(before.outputs) == 1
    return before if alone else None


def _bounds(node: ir.Node) -> tuple[float, float] | None:
    """Between which numbers an activation keeps values; None if it is none."""
    if node.op_type == "Relu":
        return 0.0, np.inf
    if node.op_type != "Clip":
        return None
    ends = list[float]()
    for index, (name, default) in enumerate((("min", -np.inf), ("max", np.inf)), start=1):
        value = node.inputs[index] if len(node.inputs) > index else None
        if value is None:
            ends.append(node.attributes.get_float(name, default))
            continue
        if not is_constant(value) or value.const_value is None:
            return None
        ends.append(float(value.const_value.numpy().reshape(-1)[0]))
    return ends[0], ends[1]


def _rounding(value: ir.Value) -> tuple[list[ir.Node], ir.Value, Grid | None] | str:
    """The nodes that round a result, what they make, and its grid; or why nothing does."""
    if value.dtype is not None and value.dtype.is_integer():
        return [], value, None
    users = [user for user, _ in value.uses()]
    if value.is_graph_output() or not users:
        return "its result leaves the graph as floats"
    others = sorted({user.op_type for user in users if user.op_type != "QuantizeLinear"})
    if others:
        return f"{others[0]} reads its result as floats"
    grids = [_grid(user) for user in users]
    first = grids[0]
    if first is None or len(users) > 1:
        return "its result is rounded in more than one way" if len(users) > 1 else "it is rounded by computed scales"
    if first.dtype == "int32" or first.axis is not None:
        return "its result is not rounded to int8 with one scale"
    if first.dtype == "int16" and first.zero_point:
        return "its result has 16 bits and a zero point"
    return users, users[0].outputs[0], first


def _operand(value: ir.Value | None) -> tuple[ir.Node | None, Operand] | str | None:
    """What an operator reads, with the node that dequantizes it; or why the NPU cannot."""
    if value is None:
        return None
    if is_constant(value):
        return None, Operand(value)
    maker = value.producer()
    if maker is None or maker.op_type != "DequantizeLinear":
        return "an input of it is float"
    grid, source = _grid(maker), maker.inputs[0]
    if grid is None or source is None:
        return "an input has computed scales, or zero points of their own"
    if grid.dtype == "int16" and grid.zero_point:
        return "an input has 16 bits and a zero point"
    if grid.axis is not None and not is_constant(source):
        return "an input has a scale for each channel"
    return maker, Operand(source, grid)


def _grid(node: ir.Node) -> Grid | None:
    """The grid of a QuantizeLinear or DequantizeLinear; None if it is not constant, or none that the NPU has."""
    scale = node.inputs[1]
    zero = node.inputs[2] if len(node.inputs) > 2 else None
    integers = node.outputs[0] if node.op_type == "QuantizeLinear" else node.inputs[0]
    if scale is None or scale.const_value is None or (zero is not None and zero.const_value is None):
        return None
    if node.attributes.get_int("block_size", 0) or integers is None:
        return None
    dtype = _INTEGERS.get(integers.dtype or ir.DataType.UNDEFINED)
    if dtype is None and integers.dtype == ir.DataType.INT32:
        dtype = "int32"
    zeros = zero.const_value.numpy() if zero is not None and zero.const_value is not None else np.zeros(1, np.int8)
    if dtype is None or len(np.unique(zeros)) != 1:
        return None
    steps = scale.const_value.numpy().astype(np.float32)
    rank = len(static_shape(integers) or ())
    axis = node.attributes.get_int("axis", 1) % rank if steps.size > 1 and rank else None
    return Grid(steps.reshape(-1), int(zeros.reshape(-1)[0]), dtype, axis)  # type: ignore[arg-type]


def _curve(last: ir.Node) -> Unit | None:
    """A chain of elementwise operators from one DequantizeLinear to one QuantizeLinear, if a node ends one."""
    if last.op_type not in _ELEMENTWISE or len(last.outputs) != 1:
        return None
    rounding = _rounding(last.outputs[0])
    if isinstance(rounding, str) or rounding[2] is None or rounding[2].dtype != "int8":
        return None
    nodes, frame, sources = _gathered(last)
    if nodes is None or len({operand.value for operand in sources}) != 1:
        return None
    source = sources[0]
    if source.grid is None or source.grid.dtype != "int8" or not source.shape:
        return None
    if source.shape != static_shape(last.outputs[0]):
        return None
    order = {node: index for index, node in enumerate(last.graph or ())}
    ordered = tuple(sorted(nodes, key=order.__getitem__))
    return Unit(CURVE, ordered, (*frame, *rounding[0]), (source,), (rounding[1],), (rounding[2],))


def _gathered(last: ir.Node) -> tuple[set[ir.Node] | None, list[ir.Node], list[Operand]]:
    """The elementwise nodes behind a node, up to DequantizeLinear; None instead if one is used elsewhere."""
    nodes, frame, sources = set[ir.Node](), dict[ir.Node, None](), list[Operand]()
    waiting = [last]
    while waiting:
        node = waiting.pop()
        if node in nodes:
            continue
        nodes.add(node)
        for value in _data(node):
            maker = value.producer()
            if is_constant(value):
                if value.const_value is not None and value.const_value.size != 1:
                    return None, [], []
            elif maker is not None and maker.op_type in _ELEMENTWISE and not value.is_graph_output():
                waiting.append(maker)
            else:
                read = _operand(value)
                if read is None or isinstance(read, str) or read[0] is None:
                    return None, [], []
                frame[read[0]] = None
                if read[1].array is None:
                    sources.append(read[1])
                elif read[1].array.size != 1:
                    return None, [], []
    inner = {value for node in nodes for value in node.outputs} - {*last.outputs}
    if any(user not in nodes for value in inner for user, _ in value.uses()):
        return None, [], []
    return nodes, list(frame), sources


def _data(node: ir.Node) -> Iterator[ir.Value]:
    return (value for value in node.inputs if value is not None)
