"""Conv, Gemm and MatMul seen as one thing: rows times a matrix, plus a bias."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from graphopt.analyses import Constants
from graphopt.analyses.windows import pad_sizes, position_rows, window_rows
from graphopt_passes._own_constants import new_constant
from graphopt_passes.prune.refit.carriers import Carried, constant_behind, set_constant
from graphopt_passes.prune.refit.windows import Windows

__all__ = ["LINEAR", "WIDEST", "LinearLayer", "add_bias", "own_bias", "rows_worth_reading"]

LINEAR = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul"})
"""Operators that multiply their first input with a weight."""

WIDEST = 4608
"""Second moments may be as large as those of this many inputs."""

_ROWS = 30_000
_ELEMENTS = 2e7
_PRODUCTS = 1e10
_FLOATS = (ir.DataType.FLOAT, ir.DataType.DOUBLE, ir.DataType.FLOAT16)


@dataclass(frozen=True, eq=False)
class LinearLayer:
    """A layer whose weight can be changed without changing anything else.

    Attributes:
        node: Conv, Gemm without transA, or MatMul with a constant matrix on the right.
        weight: The constant that its weight is stored in; nothing else reads it.
        array: The weight, in the layout that the node reads.
        carried: How the node's weight is stored.
        shift: `[outputs]`: what the node itself adds.
        bias: The constant that the correction of the bias goes into; None: there is none, or others read it.
        addable: There is no bias, but the node can take one.
    """

    node: ir.Node
    weight: ir.Value
    array: np.ndarray
    carried: Carried
    shift: np.ndarray
    bias: ir.Value | None
    addable: bool

    @classmethod
    def of(cls, node: ir.Node, constants: Constants) -> LinearLayer | str:
        """The layer of a node, or why it is none."""
        if node.op_type == "ConvTranspose" and (reason := _unclear(node)):
            return reason
        if node.op_type == "Gemm" and node.attributes.get_int("transA", 0):
            return "it reads its input transposed"
        carried = Carried.of(node.inputs[1], constants)
        if isinstance(carried, str):
            return carried
        array = carried.array
        if node.op_type in ("Gemm", "MatMul") and array.ndim != 2:
            return "its weight is not a matrix"
        shift = _shift(node, constants, array.shape[_output_axis(node)])
        if shift is None:
            return "its bias is computed, or differs between rows"
        bias, addable = own_bias(node, constants, len(shift))
        kind = _Transposed if node.op_type == "ConvTranspose" else cls
        return kind(node, carried.root, array, carried, shift, bias, addable)

    @property
    def axis(self) -> int:
        """Axis of the weight that its outputs are on."""
        return _output_axis(self.node)

    @property
    def groups(self) -> int:
        """Parts that do not meet: those of a grouped convolution."""
        return self.node.attributes.get_int("group", 1) if self.node.op_type == "Conv" else 1

    @property
    def outputs(self) -> int:
        """Output channels in all."""
        return self.array.shape[self.axis]

    @property
    def inputs(self) -> int:
        """Length of a row."""
        return self.array.size // self.outputs

    @property
    def offset(self) -> bool:
        """Whether the bias may change."""
        return self.bias is not None or self.addable

    def matrix(self) -> np.ndarray:
        """`[groups, inputs, outputs of a group]`: what rows are multiplied with."""
        if self.node.op_type == "Conv":
            return self.array.reshape(self.groups, self.outputs // self.groups, -1).transpose(0, 2, 1)
        alpha = self.node.attributes.get_float("alpha", 1.0)
        return alpha * (self.array.T if self.axis == 0 else self.array)[None]

    @property
    def channel_axis(self) -> int:
        """Axis of the output that its channels are on, counted from the last."""
        return 1 - self.array.ndim if self.node.op_type in ("Conv", "ConvTranspose") else -1

    def positions(self, output: np.ndarray) -> int:
        """How many rows an output has."""
        return output.size // output.shape[self.channel_axis]

    def wanted(self, output: np.ndarray, chosen: np.ndarray) -> np.ndarray:
        """`[groups, rows, outputs of a group]`: chosen rows of an output."""
        return self.grouped(position_rows(output, self.channel_axis, chosen))

    def grouped(self, rows: np.ndarray) -> np.ndarray:
        """`[groups, rows, outputs of a group]` of `[rows, outputs]`."""
        return rows.reshape(len(rows), self.groups, rows.shape[1] // self.groups).transpose(1, 0, 2)

    def rows(self, x: np.ndarray, chosen: np.ndarray) -> np.ndarray:
        """`[groups, rows, inputs]`: what is multiplied with the matrix to make chosen rows of the output."""
        if self.node.op_type != "Conv":
            return position_rows(x, -1, chosen)[None]
        at = self.windows(x.shape[2:])
        rows = window_rows(x, at.kernel, at.strides, at.dilations, at.pads, chosen)
        return rows.reshape(len(rows), self.groups, self.inputs).transpose(1, 0, 2)

    def windows(self, sizes: Sequence[int]) -> Windows:
        """Where it looks in an input with these spatial sizes."""
        if self.node.op_type != "Conv":
            return Windows()
        kernel = self.array.shape[2:]
        ones, attributes = [1] * len(kernel), self.node.attributes
        strides = attributes.get_ints("strides", ones)
        dilations = attributes.get_ints("dilations", ones)
        reach = [d * (k - 1) + 1 for d, k in zip(dilations, kernel, strict=True)]
        mode = attributes.get_string("auto_pad", "NOTSET")
        pads = mode if mode != "NOTSET" else list(attributes.get_ints("pads", 2 * [0] * len(kernel)))
        return Windows(kernel, tuple(strides), tuple(dilations), tuple(pad_sizes(sizes, reach, strides, pads)))

    def add(self, graph: ir.Graph, weight: np.ndarray, bias: np.ndarray) -> None:
        """Change weight and bias.

        Args:
            graph: Where a new bias is put.
            weight: `[groups, inputs, outputs of a group]`, added to `matrix()`.
            bias: `[groups, outputs of a group]`, added to the output.
        """
        set_constant(self.weight, self.carried.stored(self.array + self._in_place(weight)))
        if self.bias is not None:
            tensor = constant_behind(self.bias)
            set_constant(self.bias, tensor.numpy().astype(np.float64) + bias.reshape(tensor.shape.numpy()))
        elif self.addable:
            add_bias(graph, self.node, self.weight, bias.reshape(-1))

    def _in_place(self, weight: np.ndarray) -> np.ndarray:
        """A change of `matrix()` in the layout of the weight."""
        if self.node.op_type == "Conv":
            return weight.transpose(0, 2, 1).reshape(self.array.shape)
        return (weight[0].T if self.axis == 0 else weight[0]) / self.node.attributes.get_float("alpha", 1.0)


class _Transposed(LinearLayer):
    """A ConvTranspose without groups: a convolution of the input spread out, with its kernel turned round."""

    def matrix(self) -> np.ndarray:
        return np.moveaxis(self._turned(self.array), 1, -1).reshape(1, self.inputs, self.outputs)

    def rows(self, x: np.ndarray, chosen: np.ndarray) -> np.ndarray:
        kernel, attributes = self.array.shape[2:], self.node.attributes
        axes, ones = len(kernel), [1] * len(kernel)
        strides, dilations = attributes.get_ints("strides", ones), attributes.get_ints("dilations", ones)
        pads, more = attributes.get_ints("pads", 2 * [0] * axes), attributes.get_ints("output_padding", [0] * axes)
        reach = [d * (k - 1) for d, k in zip(dilations, kernel, strict=True)]
        sides = [(r - pads[i], r - pads[axes + i] + more[i]) for i, r in enumerate(reach)]
        spread = np.zeros(
            (*x.shape[:2], *((n - 1) * s + 1 for n, s in zip(x.shape[2:], strides, strict=True))), x.dtype
        )
        spread[(..., *(slice(None, None, s) for s in strides))] = x
        rows = window_rows(spread, kernel, ones, dilations, sides, chosen)
        return rows.reshape(1, len(rows), self.inputs)

    def _in_place(self, weight: np.ndarray) -> np.ndarray:
        inputs, outputs, *kernel = self.array.shape
        return self._turned(np.moveaxis(weight.reshape(inputs, *kernel, outputs), -1, 1))

    @staticmethod
    def _turned(array: np.ndarray) -> np.ndarray:
        return np.flip(array, axis=tuple(range(2, array.ndim)))


def _unclear(node: ir.Node) -> str | None:
    """Why a ConvTranspose is not refitted, None if it can be."""
    attributes = node.attributes
    if attributes.get_int("group", 1) != 1:
        return "transposed convolutions with groups are not refitted"
    if attributes.get_string("auto_pad", "NOTSET") != "NOTSET" or "output_shape" in attributes:
        return "its padding follows from the size of its output"
    weight = node.inputs[1]
    if weight is None or weight.shape is None:
        return "its weight has no known shape"
    kernel = [size if isinstance(size, int) else 0 for size in weight.shape][2:]
    dilations = attributes.get_ints("dilations", [1] * len(kernel))
    pads = attributes.get_ints("pads", 2 * [0] * len(kernel))
    reach = [d * (k - 1) for d, k in zip(dilations, kernel, strict=True)]
    return (
        "it cuts off more than its kernel reaches" if any(p > r for p, r in zip(pads, 2 * reach, strict=True)) else None
    )


def rows_worth_reading(groups: int, inputs: int, outputs: int = 0) -> int:
    """How many rows to take moments of: enough to tell the inputs apart, then as many as take seconds.

    Args:
        groups: Parts that do not meet.
        inputs: Inputs of a part.
        outputs: Of all parts, where they are read as well.
    """
    quick = min(_PRODUCTS / (groups * inputs**2), _ELEMENTS / (groups * inputs + 2 * outputs))
    return int(min(_ROWS, max(3 * inputs, quick)))


def _output_axis(node: ir.Node) -> int:
    return 0 if node.op_type == "Conv" or node.attributes.get_int("transB", 0) else 1


def _shift(node: ir.Node, constants: Constants, outputs: int) -> np.ndarray | None:
    """`[outputs]`: what the node adds to the product, None where that is not known."""
    value = node.inputs[2] if len(node.inputs) > 2 and node.op_type != "MatMul" else None
    if value is None:
        return np.zeros(outputs)
    tensor = constants.of(value)
    if tensor is None or tensor.dtype not in _FLOATS or tensor.size not in (1, outputs):
        return None
    bias = tensor.numpy().astype(np.float64)
    if tensor.size > 1 and bias.shape[-1] != outputs:  # one number a row
        return None
    return node.attributes.get_float("beta", 1.0) * np.broadcast_to(bias.reshape(-1), (outputs,))


def own_bias(node: ir.Node, constants: Constants, outputs: int) -> tuple[ir.Value | None, bool]:
    """Where the correction of a layer's bias goes, and whether the node could take a bias."""
    if node.op_type == "MatMul":
        readers = list(node.outputs[0].uses())
        if len(readers) != 1 or readers[0].node.op_type != "Add" or node.outputs[0].is_graph_output():
            return None, False
        bias = readers[0].node.inputs[1 - readers[0].idx]
    else:
        bias = node.inputs[2] if len(node.inputs) > 2 else None
        if bias is None:
            return None, True
    tensor = constants.of(bias)
    if bias is None or tensor is None or len(bias.uses()) != 1 or bias.is_graph_output():
        return None, False
    own = tensor.dtype in _FLOATS and tensor.size == outputs == tensor.shape.numpy()[-1]
    return (bias if own and node.attributes.get_float("beta", 1.0) == 1.0 else None), False


def add_bias(graph: ir.Graph, node: ir.Node, weight: ir.Value, array: np.ndarray) -> None:
    """Give a Conv, ConvTranspose or Gemm a bias of the weight's type."""
    dtype = weight.dtype or ir.DataType.FLOAT
    value = new_constant(graph, f"{weight.name}_bias", array.astype(dtype.numpy()))
    if len(node.inputs) < 3:
        node.resize_inputs(3)
    node.replace_input_with(2, value)
