"""Layers with constant weights, seen from their inputs: rows that meet a matrix.

Conv, ConvTranspose, Gemm and MatMul, and LSTM, GRU and RNN with what they read from outside.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import onnx_ir as ir

from graphopt.analyses.constants import CONSTANTS, Constants
from graphopt.analyses.names import subgraphs
from graphopt.analyses.shapes import SHAPES, Shapes
from graphopt.analyses.windows import pad_sizes, position_rows, window_rows
from graphopt.pass_base import Analysis, Context

__all__ = [
    "LINEAR_LAYERS", "LINEAR_OPERATORS", "LinearInput", "LinearLayers", "LinearLayersAnalysis", "Window"
]  # fmt: skip

Array = np.ndarray[Any, np.dtype[Any]]

LINEAR_OPERATORS = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul"})
"""Operators that multiply an input with a weight."""

_RECURRENT = frozenset({"GRU", "LSTM", "RNN"})
_CARRIERS = frozenset({"Cast", "DequantizeLinear", "Identity", "Squeeze", "Transpose", "Unsqueeze"})


@dataclass(frozen=True)
class Window:
    """What a convolution looks at around each position.

    Attributes:
        kernel: Sizes.
        strides: Of the windows.
        dilations: Of the kernel.
        pads: ONNX's list, starts then ends, or what `auto_pad` says.
    """

    kernel: tuple[int, ...]
    strides: tuple[int, ...]
    dilations: tuple[int, ...]
    pads: tuple[int, ...] | str

    def padding(self, sizes: Sequence[int]) -> list[tuple[int, int]]:
        """Zeros before and after each spatial axis of these sizes."""
        return pad_sizes(sizes, self._reach, self.strides, self.pads)

    def positions(self, sizes: Sequence[int]) -> list[int]:
        """Sizes of the output for spatial axes of these sizes."""
        padded = [size + sum(pads) for size, pads in zip(sizes, self.padding(sizes), strict=True)]
        return [(n - r) // s + 1 for n, r, s in zip(padded, self._reach, self.strides, strict=True)]

    @property
    def _reach(self) -> list[int]:
        return [d * (k - 1) + 1 for d, k in zip(self.dilations, self.kernel, strict=True)]


@dataclass(frozen=True)
class LinearInput:
    """What a linear layer multiplies with its weight; layers that read the same are equal.

    Attributes:
        source: Name of the activation.
        axis: Axis of the activation that the channels are on.
        groups: Parts that do not meet: those of a grouped convolution.
        channels: Channels of a part.
        window: What a convolution looks at; None where each position is a row by itself.
    """

    source: str
    axis: int
    groups: int
    channels: int
    window: Window | None = None

    @property
    def inputs(self) -> int:
        """Length of a row: channels of a part times kernel positions, in the order of the weight."""
        return self.channels * math.prod(self.window.kernel if self.window else ())

    def count(self, x: Array) -> int:
        """How many rows an activation makes."""
        if self.window is None:
            return x.size // max(1, self.groups * self.channels)
        return len(x) * math.prod(self.window.positions(x.shape[2:]))

    def rows(self, x: Array, chosen: Array) -> Array:
        """Rows of an activation.

        Args:
            x: The activation.
            chosen: Indices of rows, below `count(x)`.

        Returns:
            `[groups, rows, inputs]`, of the type of `x`.
        """
        if self.window is None:
            rows = position_rows(x, self.axis, chosen)
        else:
            window = self.window
            pads = window.padding(x.shape[2:])
            rows = window_rows(x, window.kernel, window.strides, window.dilations, pads, chosen)
        return rows.reshape(len(chosen), self.groups, self.inputs).transpose(1, 0, 2)


@dataclass(frozen=True)
class LinearLayers:
    """The linear layers of a model.

    Attributes:
        reads: By name of the node what each layer of the main graph reads.
        left_out: Other nodes that multiply, and why they are not among them.
        weights: Names of layers by the constant that their weight is, or is made of by Transpose, DequantizeLinear and
            the like.
    """

    reads: Mapping[str, LinearInput]
    left_out: Mapping[str, str]
    weights: Mapping[str, tuple[str, ...]]


@dataclass(frozen=True)
class LinearLayersAnalysis(Analysis[LinearLayers]):
    """Find layers that multiply what they read with a weight that follows from constants; no weight is read."""

    name: ClassVar[str] = "linear layers"

    def compute(self, model: ir.Model, ctx: Context) -> LinearLayers:
        """Look at every node of the main graph, and name those in subgraphs."""
        constants, shapes = ctx.fact(CONSTANTS), ctx.fact(SHAPES)
        names = constants.names
        reads, left_out, weights = dict[str, LinearInput](), dict[str, str](), dict[str, list[str]]()
        computed = _computed(model.graph)
        for scope in names.scopes:
            for node in scope.graph:
                if node.domain not in ("", "ai.onnx") or node.op_type not in LINEAR_OPERATORS | _RECURRENT:
                    continue
                label = names.label(node)
                layer = "it is inside a subgraph"
                if scope.owner is None:
                    layer = _linear_input(node, computed, constants, shapes)
                if isinstance(layer, str):
                    left_out[label] = layer
                    continue
                reads[label] = layer
                origin = _origin(node.inputs[0] if _flipped(node, computed) else node.inputs[1], constants)
                if origin is not None:
                    weights.setdefault(origin, []).append(label)
        return LinearLayers(reads, left_out, {name: tuple(labels) for name, labels in weights.items()})


def _computed(graph: ir.Graph) -> set[ir.Value]:
    """Values that follow from the inputs of the model."""
    found = {value for value in graph.inputs if value.name not in graph.initializers}
    for node in graph:
        if any(subgraphs(node)) or any(value in found for value in node.inputs):
            found.update(node.outputs)
    return found


def _flipped(node: ir.Node, computed: set[ir.Value]) -> bool:
    return node.inputs[1] in computed


def _origin(value: ir.Value | None, constants: Constants) -> str | None:
    """Name of the constant that a weight is made of by operators with one tensor each."""
    while value is not None and constants.of(value) is None:
        producer = value.producer()
        value = producer.inputs[0] if producer is not None and producer.op_type in _CARRIERS else None
    return None if value is None else constants.names.key(value)


def _linear_input(node: ir.Node, computed: set[ir.Value], constants: Constants, shapes: Shapes) -> LinearInput | str:
    left, right, flipped = node.inputs[0], node.inputs[1], _flipped(node, computed)
    if flipped and left in computed:
        return "its weight is computed"
    if left is None or right is None or not (flipped or left in computed):
        return "its input is constant"
    source, weight = (right, left) if flipped else (left, right)
    sizes = _sizes(weight, constants, shapes)
    if not sizes:
        return "the shape of its weight is unknown"
    name, attributes = source.name or "", node.attributes
    if node.op_type == "MatMul" and flipped:
        return LinearInput(name, -2, 1, sizes[-1])
    if node.op_type == "MatMul":
        return LinearInput(name, -1, 1, sizes[-2:][0])
    if flipped:
        return "its weight stands on the left"
    if node.op_type in _RECURRENT:
        return LinearInput(name, -1, 1, sizes[-1])
    if node.op_type == "Gemm":
        channels = sizes[1 if attributes.get_int("transB", 0) else 0]
        return LinearInput(name, 0 if attributes.get_int("transA", 0) else 1, 1, channels)
    groups = attributes.get_int("group", 1)
    if node.op_type == "ConvTranspose":
        return LinearInput(name, 1, groups, sizes[0] // groups)
    return LinearInput(name, 1, groups, sizes[1], _window(node, sizes[2:]))


def _sizes(value: ir.Value, constants: Constants, shapes: Shapes) -> tuple[int, ...] | None:
    tensor = constants.of(value)
    return shapes.static(value) if tensor is None else tuple(tensor.shape.numpy())


def _window(node: ir.Node, kernel: Sequence[int]) -> Window:
    attributes, ones = node.attributes, (1,) * len(kernel)
    mode = attributes.get_string("auto_pad", "NOTSET")
    pads = tuple(attributes.get_ints("pads", 2 * (0,) * len(kernel))) if mode in ("", "NOTSET") else mode
    strides, dilations = attributes.get_ints("strides", ones), attributes.get_ints("dilations", ones)
    return Window(tuple(kernel), tuple(strides), tuple(dilations), pads)


LINEAR_LAYERS = LinearLayersAnalysis()
