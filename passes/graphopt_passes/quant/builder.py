"""Build quantization nodes into a graph: fresh names, shared scalars, weights replaced one tensor at a time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from graphopt_passes.quant._maths import Grid, decibel, quantize, quantize_weight, raise_scales, weight_scales
from graphopt_passes.quant.adjust.prepared import prepared_weight
from graphopt_passes.quant.borders import existing_pair
from graphopt_passes.quant.sites import graph_of

__all__ = ["NAME_LENGTH", "Builder", "Integers", "insert_behind"]

Array = np.ndarray[Any, np.dtype[Any]]
_LOOPS = frozenset({"Loop", "Scan", "SequenceMap"})
NAME_LENGTH = 40  # some exporters join the names of all they merged; every new node would repeat that five times


@dataclass(frozen=True)
class Integers:
    """A weight as integers.

    Attributes:
        value: int8, of the weight's shape, transposed if asked for.
        scale: float32, one for each channel or a scalar.
        sqnr_db: Signal to noise of the rounding, in dB.
    """

    value: ir.Value
    scale: ir.Value
    sqnr_db: float


def insert_behind(value: ir.Value, graph: ir.Graph, nodes: Sequence[ir.Node]) -> None:
    """Insert nodes into a graph as early as they can read a value: behind its maker, or first of all."""
    producer = value.producer()
    if producer is not None and producer.graph is graph:
        graph.insert_after(producer, nodes)
    elif len(graph):
        graph.insert_before(graph[0], nodes)
    else:
        graph.extend(nodes)


class Builder:
    """Adds nodes and initializers to one model.

    Args:
        model: The model to edit.
        bits: Bits of weights, 7 or 8.
        power_of_two: Scales of weights are powers of two.
    """

    def __init__(self, model: ir.Model, bits: int = 8, *, power_of_two: bool = False) -> None:
        self.model = model
        self.bits = bits
        self.power_of_two = power_of_two
        self._taken: set[str] = set()
        self._owners: dict[int, ir.Node] = {}
        self._scalars: dict[tuple[str, tuple[int, ...], bytes], ir.Value] = {}
        self._integers: dict[tuple[ir.Value, int | None, bool, float, int, bytes], Integers] = {}
        self._scales: dict[tuple[ir.Value, int | None, int], Array] = {}
        self._dequantized: dict[tuple[ir.Value, ir.Graph], ir.Value] = {}  # integers -> their real numbers
        self._multiplied: dict[ir.Value, ir.Value] = {}
        self._operands: dict[tuple[ir.Value, ir.Graph], ir.Value] = {}
        self._spare: list[ir.Value] = []
        self._places: dict[ir.Value, ir.Graph] = {}
        self._pairs: dict[tuple[ir.Value, ir.Graph], ir.Value] = {}
        for graph in model.graphs():
            self._taken |= {name for value in (*graph.inputs, *graph.initializers.values()) if (name := value.name)}
            for node in graph:
                self._taken |= {name for name in (node.name, *(o.name for o in node.outputs)) if name}
                for attribute in node.attributes.values():
                    for inner in _graphs_of(attribute):
                        self._owners[id(inner)] = node

    def name(self, wish: str) -> str:
        """Reserve a name nobody has; a long one loses its beginning."""
        wish = wish[-NAME_LENGTH:]
        name, number = wish, 1
        while name in self._taken:
            name, number = f"{wish}_{number}", number + 1
        self._taken.add(name)
        return name

    def constant(self, wish: str, array: Array, graph: ir.Graph | None = None) -> ir.Value:
        """Add an initializer."""
        name = self.name(wish)
        tensor = ir.tensor(array, name=name)
        value = ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=ir.Shape(array.shape), const_value=tensor)
        (graph or self.model.graph).register_initializer(value)
        return value

    def scalar(self, wish: str, array: Array) -> ir.Value:
        """Add a scalar or other small initializer to the main graph, once for every type, shape and value."""
        key = (str(array.dtype), array.shape, array.tobytes())
        if key not in self._scalars:
            self._scalars[key] = self.constant(wish, array)
        return self._scalars[key]

    def node(
        self, kind: str, inputs: Sequence[ir.Value | None], output: str, attributes: Mapping[str, int] | None = None
    ) -> ir.Node:
        """Make a node with one output, both under the same name; the caller inserts it.

        Its type is left to shape inference: the types of all these values would be a tenth of a small file.
        """
        name = self.name(output)
        return ir.node(kind, inputs, dict(attributes or {}), outputs=[ir.Value(name=name)], name=name)

    def pair(self, value: ir.Value, grid: Grid, graph: ir.Graph | None = None) -> ir.Value:
        """Round an activation to a grid and back: QuantizeLinear and DequantizeLinear, made once.

        A pair that the model came with serves, if it is on that grid.

        Args:
            value: The activation.
            grid: The grid.
            graph: Where the pair is to stand, a graph inside of the value's; None: where the value does. Runtimes see
                the pair only beside the operator that reads it.
        """
        here = value.graph if isinstance(value.graph, ir.Graph) else self.model.graph
        graph, name = here if graph is None else graph, value.name or ""
        key = (value, graph)
        if key not in self._pairs and graph is here and (old := existing_pair(value)) is not None and old[1] == grid:
            self._pairs[key] = old[0]
        if key not in self._pairs:
            scale = self.scalar(f"{name}_scale", np.array(grid.scale, np.float32))
            zero = self.scalar(f"{name}_zero", np.array(grid.zero_point, grid.dtype))
            down = self.node("QuantizeLinear", [value, scale, zero], f"{name}_q")
            up = self.node("DequantizeLinear", [down.outputs[0], scale, zero], f"{name}_dq")
            insert_behind(value, graph, [down, up])
            self._pairs[key] = up.outputs[0]
        return self._pairs[key]

    def operand(self, value: ir.Value, tensor: ir.TensorProtocol, grid: Grid, graph: ir.Graph) -> ir.Value:
        """A constant that is added or multiplied, as integers behind DequantizeLinear, made once a graph."""
        key = (value, graph)
        if key not in self._operands:
            scale = self.scalar(f"{value.name}_scale", np.array(grid.scale, np.float32))
            zero = self.scalar(f"{value.name}_zero", np.array(grid.zero_point, grid.dtype))
            stored = self.constant(f"{value.name}_q", quantize(tensor.numpy(), grid), graph)
            up = self.node("DequantizeLinear", [stored, scale, zero], f"{value.name}_dq")
            graph.insert_before(self.first_user(value, graph), up)
            self._operands[key] = up.outputs[0]
        return self._operands[key]

    def integers(
        self,
        value: ir.Value,
        tensor: ir.TensorProtocol,
        axis: int | None,
        *,
        transposed: bool = False,
        factor: float = 1.0,
        paired: bool = True,
        least: Array | None = None,
    ) -> Integers:
        """The int8 copy of a weight and its scales, made once for every layout.

        Args:
            value: The weight.
            tensor: Its data.
            axis: Axis of the scales; None: one for all.
            transposed: Store a matrix transposed.
            factor: Put into the scales.
            paired: Its products with integers may be added in pairs, so the target's limit on bits holds; False: they
                are not, or arithmetic is in float. What was made for a layer with the limit serves one without.
            least: What no scale may be below, [channels] or a scalar, so that a bias fits; None: no such limit.
        """
        raised = self._raised(value, tensor, axis, self.bits if paired else 8, least)
        mark = b"" if raised is None else raised.tobytes()
        bits = self.bits if paired or (value, axis, transposed, factor, self.bits, mark) in self._integers else 8
        key = (value, axis, transposed, factor, bits, mark)
        if key not in self._integers:
            weight, graph = tensor.numpy(), self.place(value)
            scales = usual = self._usual(value, tensor, axis, bits)
            rounded = None if self.power_of_two else prepared_weight(value, axis, bits)
            if raised is not None:
                scales = raised
                rounded = _with_raised(rounded, quantize_weight(weight, scales, axis, bits), scales == usual, axis)
            elif rounded is None:
                rounded = quantize_weight(weight, scales, axis, bits)
            error = weight - rounded * (scales if axis is None else np.expand_dims(scales, _others(weight.ndim, axis)))
            sqnr = decibel(float(np.vdot(weight, weight)), float(np.vdot(error, error)))
            name = value.name or "weight"
            self._integers[key] = Integers(
                self.constant(f"{name}_q", np.ascontiguousarray(rounded.T) if transposed else rounded, graph),
                self.constant(f"{name}_scale", (scales * np.float32(factor)).astype(np.float32), graph),
                sqnr,
            )
        return self._integers[key]

    def _usual(self, value: ir.Value, tensor: ir.TensorProtocol, axis: int | None, bits: int) -> Array:
        """The scales that a weight wants, found once."""
        key = (value, axis, bits)
        if key not in self._scales:
            self._scales[key] = weight_scales(tensor.numpy(), axis, bits, power_of_two=self.power_of_two)
        return self._scales[key]

    def _raised(
        self, value: ir.Value, tensor: ir.TensorProtocol, axis: int | None, bits: int, least: Array | None
    ) -> Array | None:
        """Scales of a weight of which some had to be raised; None where all are great enough."""
        if least is None:
            return None
        usual = self._usual(value, tensor, axis, bits)
        raised = raise_scales(usual, least, power_of_two=self.power_of_two)
        return raised if (raised > usual).any() else None

    def dequantized(
        self,
        value: ir.Value,
        tensor: ir.TensorProtocol,
        axis: int | None,
        *,
        paired: bool = True,
        least: Array | None = None,
        zero_point: bool = False,
        graph: ir.Graph | None = None,
    ) -> tuple[ir.Value, float]:
        """A weight behind DequantizeLinear, made once; `paired` and `least` as in `integers`.

        With `zero_point` it carries its zeros, which it needs for ONNX Runtime to compute a Gemm on integers. Layers
        share them. The DequantizeLinear stands in `graph`, where a layer on integers needs it, or else in `place`.

        Returns:
            The value, and the signal to noise of the rounding in dB.
        """
        integers = self.integers(value, tensor, axis, paired=paired, least=least)
        graph = graph or self.place(value)
        key = (integers.value, graph)
        if key not in self._dequantized:
            inputs, attributes = [integers.value, integers.scale], {} if axis is None else {"axis": axis}
            up = self.node("DequantizeLinear", inputs, f"{value.name}_dq", attributes)
            graph.insert_before(self.first_user(value, graph), up)
            self._dequantized[key] = up.outputs[0]
        up = self._dequantized[key].producer()
        if zero_point and up is not None and len(up.inputs) == 2 and integers.scale.shape is not None:
            up.resize_inputs(3)
            zeros = np.zeros(integers.scale.shape.numpy(), np.int8)
            up.replace_input_with(2, self.scalar("weight_zeros", zeros))
        return self._dequantized[key], integers.sqnr_db

    def multiplied(
        self, value: ir.Value, tensor: ir.TensorProtocol, axis: int | None, *, paired: bool = True
    ) -> tuple[ir.Value, float]:
        """Like `dequantized`, by Cast and Mul, which runtimes compute when they load the model."""
        graph, integers = self.place(value), self.integers(value, tensor, axis, paired=paired)
        key, scale = integers.value, integers.scale
        if key not in self._multiplied:
            rank, scales = len(tensor.shape), scale.const_value
            if axis is not None and axis != rank - 1 and scales is not None:
                shape = [-1 if i == axis else 1 for i in range(rank)]
                self._spare.append(scale)
                scale = self.constant(f"{value.name}_factor", scales.numpy().reshape(shape), graph)
            cast = self.node("Cast", [integers.value], f"{value.name}_cast", {"to": int(ir.DataType.FLOAT)})
            up = self.node("Mul", [cast.outputs[0], scale], f"{value.name}_dq")
            graph.insert_before(self.first_user(value, graph), [cast, up])
            self._multiplied[key] = up.outputs[0]
        return self._multiplied[key], integers.sqnr_db

    def discard_spare(self) -> None:
        """Remove scales that nothing reads in the shape that they were made in."""
        for scale in self._spare:
            self.discard(scale)

    def discard(self, value: ir.Value) -> None:
        """Remove a weight that nothing reads any more."""
        if value.uses() or value.is_graph_output():
            return
        producer = value.producer()
        if producer is not None and producer.op_type == "Constant" and producer.graph is not None:
            producer.graph.remove(producer, safe=True)
        elif value.is_initializer() and not value.is_graph_input() and (home := self._home(value)) is not None:
            home.initializers.pop(value.name or "")

    def _home(self, value: ir.Value) -> ir.Graph | None:
        """The graph whose initializer a value is."""
        graphs = (graph for graph in self.model.graphs() if graph.initializers.get(value.name or "") is value)
        return next(graphs, None)

    def place(self, value: ir.Value) -> ir.Graph:
        """The innermost graph around all readers of a weight, but outside of loops, which would repeat its work.

        Integers and DequantizeLinear stand there together: ONNX Runtime cannot load a model where a branch
        dequantizes integers from outside for a MatMul.
        """
        if value not in self._places:
            paths = [self._path(node) for node in value.consumers()]
            common = 0
            while all(len(path) > common for path in paths) and len({id(path[common]) for path in paths}) == 1:
                common += 1
            self._places[value] = paths[0][common - 1] if paths else self.model.graph
        return self._places[value]

    def _path(self, user: ir.Node) -> list[ir.Graph]:
        """Graphs around a node from the main graph inwards, up to the first loop."""
        path: list[ir.Graph] = []
        graph = graph_of(user)
        while True:
            path.insert(0, graph)
            owner = self._owners.get(id(graph))
            if owner is None:
                return path
            if owner.op_type in _LOOPS:
                path.clear()
            graph = graph_of(owner)

    def first_user(self, value: ir.Value, graph: ir.Graph) -> ir.Node:
        """The earliest node of `graph` that reads a value, itself or in its subgraphs."""
        inside: set[int] = set()
        for node in value.consumers():
            here, holder = graph_of(node), node
            while here is not graph and (owner := self._owners.get(id(here))) is not None:
                here, holder = graph_of(owner), owner
            if here is graph:
                inside.add(id(holder))
        return next(node for node in graph if id(node) in inside)


def _with_raised(prepared: Array | None, rounded: Array, usual: Array, axis: int | None) -> Array:
    """Prepared integers where a channel has its usual scale, and those rounded anew where it was raised."""
    if prepared is None or axis is None:
        return rounded
    return np.where(np.expand_dims(usual, _others(rounded.ndim, axis)), prepared, rounded)


def _others(rank: int, axis: int) -> tuple[int, ...]:
    return tuple(i for i in range(rank) if i != axis)


def _graphs_of(attribute: ir.Attr) -> Sequence[ir.Graph]:
    if attribute.is_ref():
        return ()
    if attribute.type == ir.AttributeType.GRAPH:
        return (attribute.as_graph(),)
    return tuple(attribute.as_graphs()) if attribute.type == ir.AttributeType.GRAPHS else ()
