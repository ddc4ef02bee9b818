"""Layers that can be factored, and why the others cannot."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import onnx_ir as ir

from graphopt.analyses import CONSTANTS, Constants, Shapes
from graphopt.analyses.linear_inputs import LINEAR_OPERATORS
from graphopt.analyses.names import Names
from graphopt.analyses.shapes import CONCRETE_SHAPES
from graphopt.pass_base import Change, Context
from graphopt_passes.lowrank.schemes import Geometry
from graphopt_passes.prune.refit.linear_layers import LinearLayer

__all__ = ["Found", "Site", "find_sites"]

_ONNX = ("", "ai.onnx")
_RECURRENT = frozenset({"GRU", "LSTM", "RNN"})
_DEQUANTIZED = "its weight is quantized; factor before quant"
_LEAST = 2


@dataclass(frozen=True, eq=False)
class Site:
    """A layer, or a table, whose weight can become a product.

    Attributes:
        name: What reports call it.
        node: Conv, Gemm, MatMul or Gather.
        geometry: Its sizes; of a table rows and columns are inputs and outputs.
        table: It is a table that rows are looked up in.
    """

    name: str
    node: ir.Node
    geometry: Geometry
    table: bool = False


@dataclass(frozen=True, eq=False)
class Found:
    """What there is in a model.

    Attributes:
        sites: In the order of the graph.
        refused: Other layers with weights, and why they stay.
    """

    sites: tuple[Site, ...]
    refused: tuple[Change, ...]


def find_sites(ctx: Context, *, tables: bool) -> Found:
    """Look at every layer with a weight; one weight is read at a time.

    Args:
        ctx: Holds the model.
        tables: Look at tables of rows as well.
    """
    constants, shapes = ctx.fact(CONSTANTS), ctx.fact(CONCRETE_SHAPES)
    sites, refused = list[Site](), list[Change]()
    for scope in constants.names.scopes:
        for node in scope.graph:
            if node.domain not in _ONNX:
                continue
            table = node.op_type == "Gather" and _is_table(node, constants)
            if node.op_type not in LINEAR_OPERATORS | _RECURRENT and not table:
                continue
            site = _site(node, constants, shapes, table=table, tables=tables)
            if isinstance(site, Site):
                sites.append(site)
            elif site:
                refused.append(Change.skipped(constants.names.label(node), site))
    return Found(tuple(sites), tuple(refused))


def _is_table(node: ir.Node, constants: Constants) -> bool:
    tensor = constants.of(node.inputs[0])
    return tensor is not None and len(tensor.shape) == 2 and tensor.dtype.is_floating_point()


def _site(node: ir.Node, constants: Constants, shapes: Shapes, *, table: bool, tables: bool) -> Site | str:
    """The site of a node, or why it is none; empty where the node multiplies two computed values."""
    names = constants.names
    if not table and not _has_weight(node, constants):
        return ""
    place = names.place(node)
    if place is not None:
        return f"it is {place}"
    if table:
        return _table(node, constants, names) if tables else "a table costs no arithmetic; lowrank.tables includes it"
    if node.op_type in _RECURRENT:
        return "recurrent layers are not factored"
    if node.op_type == "ConvTranspose":
        return "transposed convolutions are not factored"
    if node.attributes.get_int("group", 1) != 1:
        return f"its channels are in {node.attributes.get_int('group', 1)} groups, which hardly mix them"
    if node.op_type == "MatMul" and constants.of(node.inputs[1]) is None and constants.of(node.inputs[0]) is not None:
        return "its weight stands on the left"
    if _is_dequantized(node.inputs[1]):
        return _DEQUANTIZED
    layer = LinearLayer.of(node, constants)
    if isinstance(layer, str):
        return layer
    if min(layer.inputs, layer.outputs) < _LEAST:
        return f"{layer.inputs} inputs and {layer.outputs} outputs have no lower rank"
    return Site(names.label(node), node, _geometry(layer, shapes))


def _table(node: ir.Node, constants: Constants, names: Names) -> Site | str:
    value, tensor = node.inputs[0], constants.of(node.inputs[0])
    assert value is not None and tensor is not None
    if node.attributes.get_int("axis", 0) != 0:
        return "it picks columns"
    if len(value.uses()) != 1 or value.is_graph_output():
        return "others read its weight"
    if tensor.dtype not in (ir.DataType.FLOAT, ir.DataType.DOUBLE, ir.DataType.FLOAT16):
        return f"its weight is {tensor.dtype.name.lower()}"
    rows, columns = tensor.shape.numpy()
    if min(rows, columns) < _LEAST:
        return f"{rows} rows and {columns} columns have no lower rank"
    return Site(names.label(node), node, Geometry(rows, columns, counted=False), table=True)


def _has_weight(node: ir.Node, constants: Constants) -> bool:
    """Whether a factor is constant, or made of constants alone."""
    if node.op_type != "MatMul":
        return True
    return any(_follows(value, constants) for value in node.inputs[:2])


def _follows(value: ir.Value | None, constants: Constants) -> bool:
    while value is not None and constants.of(value) is None:
        maker = value.producer()
        if maker is None or maker.op_type not in ("Cast", "DequantizeLinear", "Identity", "Reshape", "Transpose"):
            return False
        value = maker.inputs[0]
    return value is not None


def _is_dequantized(value: ir.Value | None) -> bool:
    while value is not None and (maker := value.producer()) is not None and maker.inputs:
        if maker.op_type == "DequantizeLinear":
            return True
        value = maker.inputs[0] if maker.op_type in ("Identity", "Reshape", "Transpose") else None
    return False


def _geometry(layer: LinearLayer, shapes: Shapes) -> Geometry:
    node = layer.node
    kernel = layer.array.shape[2:] if node.op_type == "Conv" else ()
    channels = layer.inputs // math.prod(kernel)
    before, after = shapes.static(node.inputs[0]), shapes.static(node.outputs[0])
    if before is None or after is None:
        return Geometry(channels, layer.outputs, kernel, _proportions(node, len(kernel)), counted=False)
    if not kernel:
        count = math.prod(after[:-1])
        return Geometry(channels, layer.outputs, (), (count, count, count))
    between = (*after[2:-1], before[-1])
    counts = (math.prod(sizes) * before[0] for sizes in (before[2:], between, after[2:]))
    positions = tuple(max(1, count) for count in counts)
    return Geometry(channels, layer.outputs, kernel, (positions[0], positions[1], positions[2]))


def _proportions(node: ir.Node, axes: int) -> tuple[int, int, int]:
    """How many positions there are at the input and in between for one at the output, by the strides."""
    strides: Sequence[int] = node.attributes.get_ints("strides", [1] * axes) if axes else [1]
    return math.prod(strides), strides[-1], 1
