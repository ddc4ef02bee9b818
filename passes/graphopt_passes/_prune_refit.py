"""Making up for channels that leave: what they carried is expressed by those that stay, and folded into their reader.

A layer reads `W x`. On the calibration data the lost channels are regressed on the kept ones, `x_lost = A x_kept + b`,
with one A for all pixels, so that the moments are channels by channels whatever the kernel. Then

    W x  =  W_kept x_kept + W_lost x_lost  ~  (W_kept + W_lost A) x_kept + W_lost b

This is the least-squares reconstruction of Channel Pruning (He et al., 2017) restricted to mixtures of channels.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from graphopt.analyses import CONSTANTS, Constants, Shapes
from graphopt.analyses.channels import ChannelGroup
from graphopt.analyses.ranges import expose
from graphopt.analyses.shapes import CONCRETE_SHAPES
from graphopt.calibration import Dataset
from graphopt.pass_base import Context
from graphopt.reference import Reference

__all__ = ["Reader", "readers", "refit"]

_SAMPLES = 256
_BATCH = 16
_ROWS = 4096
_WIDEST = 4096
_RIDGE = 1e-3
_AT_ONCE = 256 << 20
_FLOATS = (ir.DataType.FLOAT, ir.DataType.DOUBLE, ir.DataType.FLOAT16)


@dataclass(frozen=True, eq=False)
class Reader:
    """A layer that reads channels which leave.

    Attributes:
        node: The layer.
        axis: Axis of its weight that the channels are on.
        lost: Positions on that axis that go, ascending.
        size: Length of the axis.
        bias: A constant can be added to its output.
    """

    node: ir.Node
    axis: int
    lost: np.ndarray
    size: int
    bias: bool

    @property
    def source(self) -> tuple[str, bool]:
        """Name of the activation that it reads, and whether channels are its second axis, not its last."""
        value = self.node.inputs[0]
        return ("" if value is None else value.name or ""), self.node.op_type == "Conv"

    def rows(self, activation: np.ndarray) -> np.ndarray:
        """`[rows, channels]`: the activation with channels last, thinned evenly where there are very many rows."""
        channel = 1 if self.source[1] else activation.ndim - 1
        table = np.moveaxis(activation, channel, -1).reshape(-1, activation.shape[channel])
        return table[:: max(1, len(table) // _ROWS)].astype(np.float64)


@dataclass
class _Moments:
    """First and second moments of an activation's channels."""

    count: int = 0
    sums: np.ndarray = field(default_factory=lambda: np.zeros(()))
    products: np.ndarray = field(default_factory=lambda: np.zeros(()))

    def add(self, rows: np.ndarray) -> None:
        self.count += len(rows)
        self.sums = self.sums + rows.sum(axis=0)
        self.products = self.products + rows.T @ rows


def readers(
    model: ir.Model, constants: Constants, removals: Sequence[tuple[ChannelGroup, Sequence[int]]]
) -> Iterator[Reader]:
    """The layers whose weights can make up for what they lose.

    Left alone: weights that several layers share or that are computed, grouped and transposed convolutions, integers,
    and layers wider than the moments may be.
    """
    lost: dict[tuple[str, int], np.ndarray] = {}
    sizes: dict[tuple[str, int], int] = {}
    for group, units in removals:
        for place in group.places:
            if place.constant and place.role == "input" and len(units):
                key = place.value, place.axis
                gone = place.positions[np.asarray(units)].reshape(-1)
                lost[key], sizes[key] = np.union1d(lost.get(key, gone[:0]), gone), place.size
    for (name, axis), positions in lost.items():
        value = model.graph.initializers.get(name)
        uses = [] if value is None else list(value.uses())
        if value is not None and value.dtype in _FLOATS and len(uses) == 1 and sizes[name, axis] <= _WIDEST:
            node, index = uses[0]
            if index == 1 and _mixes_channels(node):
                yield Reader(node, axis, positions, sizes[name, axis], _takes_bias(node, constants))


def _mixes_channels(node: ir.Node) -> bool:
    attributes = node.attributes
    if node.op_type == "Conv":
        return attributes.get_int("group", 1) == 1
    return node.op_type == "MatMul" or (node.op_type == "Gemm" and not attributes.get_int("transA", 0))


def _output_axis(node: ir.Node) -> int:
    return 0 if node.op_type == "Conv" or node.attributes.get_int("transB", 0) else 1


def _takes_bias(node: ir.Node, constants: Constants) -> bool:
    """Whether a constant per output can be added: there is no bias, or a plain one that no other layer reads."""
    if node.op_type == "MatMul":
        return False
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    if bias is None:
        return True
    tensor = constants.of(bias)
    weight = node.inputs[1]
    outputs = 0 if weight is None or weight.shape is None else weight.shape[_output_axis(node)]
    plain = node.attributes.get_float("beta", 1.0) == 1.0 and bias.is_initializer() and len(bias.uses()) == 1
    return plain and tensor is not None and tuple(tensor.shape) == (outputs,)


def refit(model: ir.Model, ctx: Context, data: Dataset, removals: Sequence[tuple[ChannelGroup, Sequence[int]]]) -> int:
    """Change the readers' weights so that removing the units costs least; nothing is removed yet.

    A reader without a bias gains one, so groups must be found anew afterwards.

    Args:
        model: The model before the removal.
        ctx: Where facts about it come from.
        data: Samples to measure on.
        removals: Groups with the indices of the units that will go.

    Returns:
        How many layers were changed.
    """
    found = [reader for reader in readers(model, ctx.fact(CONSTANTS), removals) if reader.source[0]]
    moments = _measure(model, ctx, data, {reader.source: reader for reader in found})
    usable = [reader for reader in found if moments[reader.source].count > 1 and len(reader.lost) < reader.size]
    for reader in usable:
        _fold_in(model, reader, *_regression(moments[reader.source], reader))
    return len(usable)


def _measure(
    model: ir.Model, ctx: Context, data: Dataset, by_source: Mapping[tuple[str, bool], Reader]
) -> dict[tuple[str, bool], _Moments]:
    """Stream the data once for every portion of activations that fits into memory."""
    moments = {source: _Moments() for source in by_source}
    for sources in _portions(by_source, ctx.fact(CONCRETE_SHAPES)):
        names = sorted({name for name, _ in sources})
        session = Reference(expose(model, names), threads=ctx.threads, extensions=ctx.extensions)
        for feed in ctx.progress(data.batches(_BATCH, _SAMPLES), "refitting"):
            activations = session.run(feed, names)
            for source in sources:
                moments[source].add(by_source[source].rows(activations[source[0]]))
    return moments


def _portions(by_source: Mapping[tuple[str, bool], Reader], shapes: Shapes) -> Iterator[list[tuple[str, bool]]]:
    """Cut activations into portions that, with their moments, stay below the memory limit."""
    portion: list[tuple[str, bool]] = []
    filled = 0
    for source, reader in by_source.items():
        shape = shapes.static(reader.node.inputs[0])
        size = 8 * reader.size**2 + (_AT_ONCE // 8 if shape is None else 4 * _BATCH * math.prod(shape))
        if portion and filled + size > _AT_ONCE:
            yield portion
            portion, filled = [], 0
        portion.append(source)
        filled += size
    if portion:
        yield portion


def _regression(seen: _Moments, reader: Reader) -> tuple[np.ndarray, np.ndarray]:
    """`A [lost, kept]` and `b [lost]`; b is 0 where the reader has no bias to put it in."""
    kept = np.delete(np.arange(reader.size), reader.lost)
    mean = seen.sums / seen.count if reader.bias else np.zeros(reader.size)
    spread = seen.products / seen.count - np.outer(mean, mean)
    inner = spread[np.ix_(kept, kept)]
    ridge = _RIDGE * max(float(np.trace(inner)) / len(kept), np.finfo(np.float64).tiny)
    mix = np.linalg.solve(inner + ridge * np.eye(len(kept)), spread[np.ix_(kept, reader.lost)]).T
    return mix, mean[reader.lost] - mix @ mean[kept]


def _fold_in(model: ir.Model, reader: Reader, mix: np.ndarray, offset: np.ndarray) -> None:
    """Write the new weight and bias."""
    weight = reader.node.inputs[1]
    if weight is None or weight.const_value is None:
        return
    kept = np.delete(np.arange(reader.size), reader.lost)
    array = np.moveaxis(weight.const_value.numpy().astype(np.float64), reader.axis, 0)
    gone = array[reader.lost]
    array[kept] += np.tensordot(mix, gone, axes=(0, 0))
    weight.const_value = _like(weight.const_value, np.moveaxis(array, 0, reader.axis))
    if reader.bias:
        each = np.tensordot(offset, gone, axes=(0, 0))
        total = each.reshape(each.shape[0], -1).sum(axis=1) * reader.node.attributes.get_float("alpha", 1.0)
        _add_bias(model, reader.node, weight, total)


def _like(tensor: ir.TensorProtocol, array: np.ndarray) -> ir.Tensor:
    return ir.Tensor(
        np.ascontiguousarray(array.astype(tensor.numpy().dtype)),
        dtype=tensor.dtype,
        name=tensor.name,
        doc_string=tensor.doc_string,
        metadata_props=dict(tensor.metadata_props),
    )


def _add_bias(model: ir.Model, node: ir.Node, weight: ir.Value, total: np.ndarray) -> None:
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    if bias is not None and bias.const_value is not None:
        bias.const_value = _like(bias.const_value, bias.const_value.numpy().astype(np.float64) + total)
        return
    taken = {*model.graph.initializers, *(value.name for inner in model.graph for value in inner.outputs)}
    taken |= {value.name or "" for value in model.graph.inputs}
    stem = f"{weight.name}_bias"
    name = next(name for i in range(len(taken) + 1) if (name := f"{stem}_{i}" if i else stem) not in taken)
    dtype = weight.dtype or ir.DataType.FLOAT
    array = total.astype(dtype.numpy())
    value = ir.Value(
        name=name, type=ir.TensorType(dtype), shape=ir.Shape(array.shape), const_value=ir.Tensor(array, name=name)
    )
    model.graph.register_initializer(value)
    if len(node.inputs) < 3:
        node.resize_inputs(3)
    node.replace_input_with(2, value)
