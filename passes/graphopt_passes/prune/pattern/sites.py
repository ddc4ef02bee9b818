"""Weights that may become sparse in place: where they are, and how their numbers lie as `[groups, inputs, outputs]`.

    operator         weight                        runs of inputs
    Conv             [out, in / groups, *kernel]   input channels, for each position of the kernel
    ConvTranspose    [in, out / groups, *kernel]   input channels, for each output channel and position of the kernel
    Gemm, MatMul     [.., in, out], either side    the axis that is summed over
    LSTM, GRU, RNN   [directions, gates, in]       the last axis, for input and recurrent weights

The order of inputs within a convolution is kernel first, channels last, as sparse kernels read it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from graphopt.analyses import CONSTANTS, Constants
from graphopt.pass_base import Change, Context
from graphopt_passes._own_constants import put_tensor

__all__ = ["RECURRENT", "Layout", "Site", "find_sites", "write"]

RECURRENT = frozenset({"GRU", "LSTM", "RNN"})

_DENSE = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul"})
_COMPUTED = "its weight is computed; fold constants first"
_FLOATS = (ir.DataType.FLOAT, ir.DataType.DOUBLE, ir.DataType.FLOAT16, ir.DataType.BFLOAT16)


@dataclass(frozen=True)
class Layout:
    """How a weight lies: transposed, split into axes, and these brought into order.

    Attributes:
        turned: The axes of the constant in the order that the node sees, after Transposes on the way.
        split: Sizes to reshape to: four axes.
        order: Which of the four come first: groups, then the axes of inputs, then of outputs.
        inputs: Length of the inputs' axes together.
        run: Input channels that lie next to each other.
    """

    turned: tuple[int, ...]
    split: tuple[int, int, int, int]
    order: tuple[int, int, int, int]
    inputs: int
    run: int

    def matrix(self, array: np.ndarray) -> np.ndarray:
        """`[groups, inputs, outputs]` of a constant."""
        table = array.transpose(self.turned).reshape(self.split).transpose(self.order)
        return table.reshape(len(table), self.inputs, -1)

    def array(self, matrix: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        """The constant of a given shape that has this matrix."""
        table = matrix.reshape([self.split[axis] for axis in self.order]).transpose(np.argsort(self.order))
        seen = table.reshape([shape[axis] for axis in self.turned])
        return np.ascontiguousarray(seen.transpose(np.argsort(self.turned)))


@dataclass(frozen=True, eq=False)
class Site:
    """A weight that may become sparse.

    Attributes:
        name: What reports call it: the node, for recurrent layers with the weight's part.
        node: The layer; the first of those that share the weight.
        value: The constant.
        layout: How they lie.
        alone: Why no data can be used, or None: the node of the main graph reads its own weight directly.
    """

    name: str
    node: ir.Node
    value: ir.Value
    layout: Layout
    alone: str | None

    @property
    def tensor(self) -> ir.TensorProtocol:
        """What the constant holds now."""
        producer, tensor = self.value.producer(), self.value.const_value
        if producer is not None:
            (attribute,) = producer.attributes.values()
            plain = attribute.name == "value"
            return attribute.as_tensor() if plain else ir.tensor(attribute.value, dtype=ir.DataType.FLOAT)
        if tensor is None:
            raise TypeError(f"{self.value.name!r} is no constant")
        return tensor

    @property
    def size(self) -> int:
        """Number of weights."""
        return self.tensor.size

    def matrix(self) -> np.ndarray:
        """`[groups, inputs, outputs]`, float64."""
        return self.layout.matrix(self.tensor.numpy().astype(np.float64))


def find_sites(model: ir.Model, ctx: Context) -> tuple[list[Site], list[Change]]:
    """Find the weights of all graphs, and say of other layers why theirs are none."""
    constants, found, skipped = ctx.fact(CONSTANTS), list[Site](), list[Change]()
    for graph in model.graphs():
        for node in graph:
            for label, index in _weights(node):
                site = _site(label, node, index, constants, main=graph is model.graph)
                if isinstance(site, str):
                    skipped.append(Change.skipped(label, site))
                else:
                    found.append(site)
    for function in model.functions.values():
        skipped += [
            Change.skipped(f"{function.name}/{node.name}", "inside a function; inline it first")
            for node in function
            if node.op_type in _DENSE | RECURRENT
        ]
    return _unshared(found, skipped), skipped


def write(site: Site, matrix: np.ndarray | Callable[[ir.TensorProtocol], np.ndarray]) -> None:
    """Put other numbers into the constant of a site, in its own type.

    Args:
        site: The weight.
        matrix: `[groups, inputs, outputs]`, or what makes it of the old tensor: where that lies in a file, it is made
            when it is read.
    """
    old, value = site.tensor, site.value
    shape = tuple(int(size) for size in old.shape.numpy())

    def made() -> ir.Tensor:
        numbers = matrix(old) if callable(matrix) else matrix
        array = site.layout.array(numbers, shape).astype(old.dtype.numpy())
        properties = dict(old.metadata_props)
        return ir.Tensor(array, dtype=old.dtype, name=old.name, doc_string=old.doc_string, metadata_props=properties)

    if callable(matrix) and isinstance(old, (ir.ExternalTensor, ir.LazyTensor)):
        tensor = ir.LazyTensor(
            made,
            dtype=old.dtype,
            shape=ir.Shape(shape),
            name=old.name,
            doc_string=old.doc_string,
            metadata_props=dict(old.metadata_props),
        )
    else:
        tensor = made()
    put_tensor(value, tensor)


def _weights(node: ir.Node) -> Iterator[tuple[str, int]]:
    """Labels and inputs that hold the weights of a layer; nothing where both factors are computed."""
    name = node.name or (node.outputs[0].name or "")
    if node.domain not in ("", "ai.onnx"):
        return
    if node.op_type in RECURRENT:
        yield from ((f"{name}[{part}]", index) for part, index in (("W", 1), ("R", 2)))
    elif node.op_type in ("Conv", "ConvTranspose"):
        yield name, 1
    elif node.op_type in ("Gemm", "MatMul"):
        found = {index: _source(node.inputs[index]) for index in (1, 0)}
        held = [index for index, source in found.items() if not isinstance(source, str)]
        refused = [index for index, source in found.items() if source != _COMPUTED]
        yield from ((name, index) for index in (held or refused)[:1])


def _source(value: ir.Value | None) -> tuple[ir.Value, tuple[int, ...], bool] | str:
    """The constant behind a value, the order of its axes there, and whether it is read directly."""
    turned: tuple[int, ...] | None = None
    direct = True
    while value is not None and (node := value.producer()) is not None and node.op_type in ("Transpose", "Identity"):
        if len(value.uses()) != 1 or value.is_graph_output():
            return "others read its weight"
        if node.op_type == "Transpose":
            axes = node.attributes.get_ints("perm")
            if axes is None:
                return "its weight is transposed without a permutation"
            turned = tuple(axes) if turned is None else tuple(axes[axis] for axis in turned)
        value, direct = node.inputs[0], False
    if value is None:
        return "it has no weight"
    if value.is_graph_input() and value.is_initializer():
        return "its weight is also an input, which a caller may replace"
    producer = value.producer()
    constant = producer is not None and producer.op_type == "Constant" and not producer.domain
    if not constant and (producer is not None or value.const_value is None or value.is_graph_input()):
        return _COMPUTED
    if value.is_graph_output():
        return "its weight is also an output of the model"
    return value, turned or (), direct


def _site(label: str, node: ir.Node, index: int, constants: Constants, *, main: bool) -> Site | str:
    source = _source(node.inputs[index])
    if isinstance(source, str):
        return source
    value, turned, direct = source
    tensor = constants.of(value)
    if tensor is None:
        return _COMPUTED
    if tensor.dtype not in _FLOATS:
        return f"its weight is {tensor.dtype.name.lower()}"
    stored = [int(size) for size in tensor.shape.numpy()]
    turned = turned or tuple(range(len(stored)))
    layout = _layout(node, index, turned, [stored[axis] for axis in turned])
    if isinstance(layout, str):
        return layout
    return Site(label, node, value, layout, _why_alone(node, index, direct=direct, main=main))


def _why_alone(node: ir.Node, index: int, *, direct: bool, main: bool) -> str | None:
    if not main:
        return "it is in a subgraph"
    if not direct:
        return "its weight is behind Transpose or Identity; fold constants first"
    if node.op_type in RECURRENT | {"ConvTranspose"}:
        return f"{node.op_type} is judged without data"
    return None if index else "its weight is on the left"


def _layout(node: ir.Node, index: int, turned: tuple[int, ...], shape: list[int]) -> Layout | str:
    if not math.prod(shape):
        return "its weight is empty"
    if node.op_type == "Conv":
        groups, (out, inputs) = node.attributes.get_int("group", 1), shape[:2]
        kernel = math.prod(shape[2:])
        return Layout(turned, (groups, out // groups, inputs, kernel), (0, 3, 2, 1), kernel * inputs, inputs)
    if node.op_type == "ConvTranspose":
        groups, inputs = node.attributes.get_int("group", 1), shape[0]
        split = groups, inputs // groups, shape[1], math.prod(shape[2:])
        return Layout(turned, split, (0, 1, 2, 3), inputs // groups, inputs // groups)
    if node.op_type in RECURRENT:
        if len(shape) != 3:
            return "its weight has no three axes"
        directions, gates, inputs = shape
        return Layout(turned, (directions, gates, inputs, 1), (0, 2, 1, 3), inputs, inputs)
    if len(shape) < 2:
        return "its weight is a vector"
    groups, rows, columns = math.prod(shape[:-2]), *shape[-2:]
    switch = ("transA", "transB")[index]
    first = (index == 1) != bool(node.op_type == "Gemm" and node.attributes.get_int(switch, 0))
    inputs, order = (rows, (0, 1, 2, 3)) if first else (columns, (0, 2, 1, 3))
    return Layout(turned, (groups, rows, columns, 1), order, inputs, inputs)


def _unshared(sites: list[Site], skipped: list[Change]) -> list[Site]:
    """One site for each constant: layers that read it alike become sparse together, others leave it alone."""
    readers = dict[ir.Value, list[Site]]()
    for site in sites:
        readers.setdefault(site.value, []).append(site)
    kept = list[Site]()
    for value, group in readers.items():
        alike = len({site.layout for site in group}) == 1 and len(group) == len(value.uses())
        first = group[0]
        if not alike:
            why = "its weight is shared with others, which read it otherwise"
            skipped += [Change.skipped(site.name, why) for site in group]
        elif len(group) > 1:
            why = f"{len(group)} layers share its weight"
            kept.append(Site(first.name, first.node, value, first.layout, why))
        else:
            kept.append(first)
    return kept
