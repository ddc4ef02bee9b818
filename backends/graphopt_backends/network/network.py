"""A network that is being put together: calls of kernels on views of memory, and the constants that they read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from graphopt.targets import Isa
from graphopt_backends._fold import static_shape
from graphopt_backends.kernels.expression import Expression, operand, parameters, simplified, substituted
from graphopt_backends.kernels.kernel import Kernel
from graphopt_backends.kernels.loops import Loops, merged_axes
from graphopt_backends.kernels.transpose import transpose_of
from graphopt_backends.network.integers import dequantized, is_weight, real, weight_of
from graphopt_backends.network.views import Buffer, View, contiguous_strides
from graphopt_backends.network.weights import Weights

__all__ = ["Call", "Network", "dtype_of", "shape_of"]


@dataclass(frozen=True)
class Call:
    """A kernel on memory.

    Attributes:
        kernel: What is computed.
        views: Its pointers, in order, scratch memory left out.
        sites: Names of the nodes that it computes.
    """

    kernel: Kernel
    views: tuple[View, ...]
    sites: tuple[str, ...]


@dataclass
class Network:
    """Calls so far.

    Attributes:
        isa: The CPU.
        weights: Where constants go.
        calls: In order.
        views: Where the values of the graph are.
        inputs: Names of the graph's inputs, in order.
        outputs: Names of its outputs, in order.
    """

    isa: Isa
    weights: Weights
    calls: list[Call] = field(default_factory=list["Call"])
    views: dict[ir.Value, View] = field(default_factory=dict[ir.Value, View])
    inputs: tuple[str, ...] = ()
    outputs: tuple[str, ...] = ()

    def view(self, value: ir.Value) -> View:
        """Where a value is; constants are put into the weights, and what was dequantized for nobody so far is."""
        if value not in self.views:
            found = dequantized(value)
            if found is None:
                self.views[value] = self.constant(constant_of(value))
            else:
                source = self.view(found[0])
                keeps = source.is_dense and not value.is_graph_output()
                result = self.new(value, source.order if keeps else None)
                self.loops(real(operand(0, found[1].dtype), found[1]), [source], result)
        return self.views[value]

    def input(self, node: ir.Node, index: int = 0) -> View:
        """Where an input of a node is."""
        value = node.inputs[index]
        assert value is not None
        return self.view(value)

    def constant(self, array: np.ndarray) -> View:
        """Put an array into the weights, once."""
        buffer = Buffer(str(array.dtype), array.size, "weight", offset=self.weights.put(array))
        return View(buffer, array.shape, contiguous_strides(array.shape))

    def new(self, value: ir.Value, order: Sequence[int] | None = None, dtype: str = "") -> View:
        """Memory for a value.

        Args:
            value: A value of the graph.
            order: Its axes from the slowest to the fastest; None: as they stand.
            dtype: Element type, if it is not the value's.
        """
        shape = shape_of(value)
        plain = order is None or contiguous_strides(shape, order) == contiguous_strides(shape)
        mine = value.is_graph_output() and plain and value not in self.views
        buffer = Buffer(dtype or dtype_of(value), max(1, int(np.prod(shape))), "output" if mine else "temporary")
        if mine:
            buffer.name = str(value.name)
        self.views[value] = View(buffer, shape, contiguous_strides(shape, order))
        return self.views[value]

    def temporary(self, shape: Sequence[int], dtype: str, order: Sequence[int] | None = None) -> View:
        """Memory for something that is no value of the graph."""
        buffer = Buffer(dtype, max(1, int(np.prod(shape))))
        return View(buffer, tuple(shape), contiguous_strides(shape, order))

    def call(self, kernel: Kernel, views: Sequence[View], *nodes: ir.Node) -> None:
        """Add a call."""
        self.calls.append(Call(kernel, tuple(views), tuple(str(node.name) for node in nodes)))

    def loops(self, expression: Expression, sources: Sequence[View], result: View, *nodes: ir.Node) -> None:
        """Add a call of arithmetic; sources are repeated to the shape of the result, which may have no elements."""
        if not result.size:
            return
        expression, held = self.bound(simplified(expression), len(sources))
        sources = [*sources, *held]
        wide = [source.broadcast(result.shape) for source in sources]
        shape, strides = merged_axes(result.shape, [*(v.strides for v in wide), result.strides])
        self.call(Loops(self.isa, expression, shape, strides[-1], strides[:-1]), [*wide, result], *nodes)

    def bound(self, expression: Expression, first: int) -> tuple[Expression, list[View]]:
        """An expression whose parameters are operands, numbered from `first` on, and where these are."""
        found = parameters(expression)
        operands = {p: operand(first + i, p.dtype) for i, p in enumerate(found)}
        return substituted(expression, operands), [self.constant(np.array(p.value, p.dtype)) for p in found]

    def copied(self, view: View, order: Sequence[int] | None = None, node: ir.Node | None = None) -> View:
        """The elements in memory of their own, in an order of axes."""
        result = self.temporary(view.shape, view.dtype, order)
        self.copy(view, result, node)
        return result

    def copy(self, source: View, result: View, node: ir.Node | None = None) -> None:
        """Copy elements, if there are any, repeated to the shape of the result."""
        if not result.size:
            return
        nodes, source = [node] if node is not None else [], source.broadcast(result.shape)
        turned = transpose_of(self.isa, source.dtype, result.shape, source.strides, result.strides)
        if turned is not None:
            self.call(turned, [source, result], *nodes)
        else:
            self.loops(operand(0, source.dtype), [source], result, *nodes)

    def contiguous(self, view: View, node: ir.Node | None = None) -> View:
        """The elements one after the other: the view itself if they are."""
        return view if view.is_contiguous else self.copied(view, node=node)


def constant_of(value: ir.Value) -> np.ndarray:
    """Values of a constant, dequantized if it is stored as integers."""
    if not is_weight(value):
        raise KeyError(value.name)
    return weight_of(value)


def shape_of(value: ir.Value) -> tuple[int, ...]:
    """The fixed shape of a value."""
    shape = static_shape(value)
    if shape is None:
        raise ValueError(f"the shape of {value.name!r} is not fixed")
    return shape


def dtype_of(value: ir.Value) -> str:
    """NumPy name of the element type of a value."""
    if value.dtype is None:
        raise ValueError(f"the type of {value.name!r} is unknown")
    return str(value.dtype.numpy())
