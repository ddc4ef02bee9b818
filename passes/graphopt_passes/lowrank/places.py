"""How the weight of a layer lies in its constant, and the matrices that rows are multiplied with.

Layer           constant                     matrices `[parts, inputs, outputs]`
Gemm            `[I, O]`, or turned          one, with alpha in it
MatMul, right   `[..., I, O]`                one of each of the batch
MatMul, left    `[..., O, I]`                the same, turned: columns of the other factor are its rows
Conv            `[O, I of a group, ...]`     one of each group; rows are channels, then places of the kernel
ConvTranspose   `[I, O of a group, ...]`     the same, its kernel turned round
Gather          `[I, O]`                     one

Nodes may share a constant that all of them read in the same way.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from graphopt.analyses import Constants
from graphopt_passes.prune.refit.carriers import Carried, set_constant

__all__ = ["Place", "index_of", "is_dequantized", "is_made_of_constants", "readers_of"]

Array = np.ndarray[Any, np.dtype[Any]]

_FLOATS = (ir.DataType.FLOAT, ir.DataType.DOUBLE, ir.DataType.FLOAT16)
_SEEN_THROUGH = ("Identity", "Reshape", "Transpose")
_WINDOWED = ("Conv", "ConvTranspose")


@dataclass(frozen=True, eq=False)
class Place:
    """The weight of a layer.

    Attributes:
        node: One of the nodes that read it.
        index: Which of its inputs it is.
        carried: The constant, and what its numbers are put through.
        readers: All nodes that read it, in no order.
    """

    node: ir.Node
    index: int
    carried: Carried
    readers: tuple[ir.Node, ...]

    @classmethod
    def of(cls, node: ir.Node, constants: Constants) -> Place | str:
        """The weight of a layer, or why it cannot be replaced."""
        index = index_of(node, constants)
        value = node.inputs[index]
        if is_dequantized(value):
            return "its weight is quantized; factor before quant"
        readers = readers_of(node, index)
        if isinstance(readers, str):
            return readers
        tensor = constants.of(value)
        if len(readers) == 1 or value is None or tensor is None:
            carried = Carried.of(value, constants)
        elif tensor.dtype not in _FLOATS:
            carried = f"its weight is {tensor.dtype.name.lower()}"
        else:
            carried = Carried(value, tensor.numpy().astype(np.float64))
        if isinstance(carried, str):
            return carried
        if node.op_type in ("Gather", "Gemm") and carried.array.ndim != 2:
            return "its weight is not a matrix"
        if node.op_type == "MatMul" and carried.array.ndim < 2:
            return "its weight is a vector"
        return cls(node, index, carried, readers)

    @property
    def value(self) -> ir.Value:
        """The weight as nodes read it."""
        value = self.node.inputs[self.index]
        assert value is not None
        return value

    @property
    def left(self) -> bool:
        """Whether it is the left factor of a MatMul."""
        return self.node.op_type == "MatMul" and self.index == 0

    @property
    def parts(self) -> int:
        """Matrices."""
        if self.node.op_type in _WINDOWED:
            return self.node.attributes.get_int("group", 1)
        return int(np.prod(self.batch))

    @property
    def batch(self) -> tuple[int, ...]:
        """Axes of a weight of many matrices before those of each."""
        return () if self.kernel_axes else self.carried.array.shape[:-2]

    @property
    def kernel_axes(self) -> int:
        """Axes of the kernel; none, if it is no convolution."""
        return self.carried.array.ndim - 2 if self.node.op_type in _WINDOWED else 0

    @property
    def kernel(self) -> tuple[int, ...]:
        """Sizes of the kernel."""
        return self.carried.array.shape[2:] if self.kernel_axes else ()

    @property
    def sizes(self) -> tuple[int, int]:
        """Channels that each part reads and makes."""
        shape = self.carried.array.shape
        if self.node.op_type == "Conv":
            return shape[1], shape[0] // self.parts
        if self.node.op_type == "ConvTranspose":
            return shape[0] // self.parts, shape[1]
        return (shape[-1], shape[-2]) if self._across else (shape[-2], shape[-1])

    def matrices(self) -> Array:
        """`[parts, inputs, outputs]`, float64."""
        array, parts = self.carried.array, self.parts
        if self.node.op_type == "Conv":
            return array.reshape(parts, array.shape[0] // parts, -1).transpose(0, 2, 1)
        if self.node.op_type == "ConvTranspose":
            return np.moveaxis(self._turned(array), 1, -1).reshape(parts, -1, array.shape[1])
        matrix = array.reshape(parts, *array.shape[-2:])
        return self._scale * (matrix.transpose(0, 2, 1) if self._across else matrix)

    def put(self, matrices: Array) -> None:
        """Give the constant other numbers.

        Args:
            matrices: As `matrices` gives them.
        """
        array, kind = self.carried.array, self.node.op_type
        if kind == "Conv":
            found = matrices.transpose(0, 2, 1).reshape(array.shape)
        elif kind == "ConvTranspose":
            outputs = array.shape[1]
            found = self._turned(np.moveaxis(matrices.reshape(array.shape[0], *self.kernel, outputs), -1, 1))
        else:
            found = ((matrices.transpose(0, 2, 1) if self._across else matrices) / self._scale).reshape(array.shape)
        set_constant(self.carried.root, self.carried.stored(found))

    @property
    def _across(self) -> bool:
        """Whether outputs are on the axis before the last."""
        return self.left or bool(self.node.attributes.get_int("transB", 0))

    @property
    def _scale(self) -> float:
        return self.node.attributes.get_float("alpha", 1.0) if self.node.op_type == "Gemm" else 1.0

    @staticmethod
    def _turned(array: Array) -> Array:
        return np.flip(array, axis=tuple(range(2, array.ndim)))


def index_of(node: ir.Node, constants: Constants) -> int:
    """Which input of a layer its weight is."""
    if node.op_type == "MatMul":
        known = [is_made_of_constants(value, constants) for value in node.inputs[:2]]
        return 0 if known[0] and not known[1] else 1
    return 0 if node.op_type == "Gather" else 1


def is_made_of_constants(value: ir.Value | None, constants: Constants) -> bool:
    """Whether a value follows from a constant by operators of one input."""
    while value is not None and constants.of(value) is None:
        maker = value.producer()
        if maker is None or maker.op_type not in (*_SEEN_THROUGH, "Cast", "DequantizeLinear"):
            return False
        value = maker.inputs[0]
    return value is not None


def readers_of(node: ir.Node, index: int) -> tuple[ir.Node, ...] | str:
    """All nodes that read a node's weight; in words what keeps it from being replaced for all of them."""
    value = node.inputs[index]
    if value is None:
        return "it has no weight"
    if value.is_graph_output():
        return "others read its weight: it is an output"
    uses = list(value.uses())
    for use in uses:
        other = use.node
        if (other.op_type, use.idx) != (node.op_type, index) or _reading(other) != _reading(node):
            return f"others read its weight: {other.op_type} {other.name or other.outputs[0].name!r}, in another way"
    return tuple(use.node for use in uses)


def _reading(node: ir.Node) -> tuple[object, ...]:
    """What of a node's attributes says how it reads its weight."""
    get = node.attributes.get_int
    return get("group", 1), get("transB", 0), node.attributes.get_float("alpha", 1.0), get("axis", 0)


def is_dequantized(value: ir.Value | None) -> bool:
    """Whether a value is made of integers by DequantizeLinear."""
    while value is not None and (maker := value.producer()) is not None and maker.inputs:
        if maker.op_type == "DequantizeLinear":
            return True
        value = maker.inputs[0] if maker.op_type in _SEEN_THROUGH else None
    return False
