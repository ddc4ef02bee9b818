"""Layers that can be factored, and why the others cannot."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import onnx_ir as ir

from graphopt.analyses import CONSTANTS, Constants, Shapes
from graphopt.analyses.linear_inputs import LINEAR_OPERATORS
from graphopt.analyses.names import Names
from graphopt.analyses.shapes import CONCRETE_SHAPES
from graphopt.pass_base import Change, Context
from graphopt_passes.lowrank.places import Place, is_made_of_constants
from graphopt_passes.lowrank.schemes import Geometry
from graphopt_passes.prune.refit.linear_layers import LinearLayer

__all__ = ["Found", "Site", "find_sites"]

_ONNX = ("", "ai.onnx")
_RECURRENT = frozenset({"GRU", "LSTM", "RNN"})
_LEAST = 2


@dataclass(frozen=True, eq=False)
class Site:
    """A layer, or a table, whose weight can become a product.

    Attributes:
        name: What reports call it.
        node: Conv, ConvTranspose, Gemm, MatMul or Gather.
        geometry: Its sizes; of a table rows and columns are inputs and outputs.
        table: It is a table that rows are looked up in.
        left: Its weight is the left factor of a MatMul.
        batch: Axes of a weight of many matrices before those of each.
        shared: Other nodes that read its weight, by what reports call them.
        alone: Why the layer cannot be solved for what it made in the original model; empty if it can.
    """

    name: str
    node: ir.Node
    geometry: Geometry
    table: bool = False
    left: bool = False
    batch: tuple[int, ...] = ()
    shared: tuple[tuple[str, ir.Node], ...] = ()
    alone: str = ""

    @property
    def names(self) -> tuple[str, ...]:
        """Of all nodes that read the weight."""
        return self.name, *(name for name, _ in self.shared)

    @property
    def nodes(self) -> tuple[ir.Node, ...]:
        """All nodes that read the weight."""
        return self.node, *(node for _, node in self.shared)


@dataclass(frozen=True, eq=False)
class Found:
    """What there is in a model.

    Attributes:
        sites: In the order of the graph; those whose weight is shared where the first of its readers stands.
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
    sites, refused, known = list[Site](), list[Change](), set[ir.Node]()
    for node in _layers(constants):
        if node in known:
            continue
        site = _site(node, constants, shapes, tables=tables)
        if isinstance(site, Site):
            sites.append(site)
            known.update(site.nodes)
        elif site:
            refused.append(Change.skipped(constants.names.label(node), site))
    return Found(tuple(sites), (*refused, *_in_functions(ctx.model)))


def _layers(constants: Constants) -> Iterator[ir.Node]:
    """Nodes that may have a weight to factor, of the main graph first."""
    for scope in constants.names.scopes:
        for node in scope.graph:
            table = node.op_type == "Gather" and _is_table(node, constants)
            if node.domain in _ONNX and (table or node.op_type in LINEAR_OPERATORS | _RECURRENT):
                yield node


def _in_functions(model: ir.Model) -> Iterator[Change]:
    for function in model.functions.values():
        for node in function:
            if node.domain in _ONNX and node.op_type in LINEAR_OPERATORS | _RECURRENT:
                name = node.name or node.outputs[0].name
                yield Change.skipped(f"{function.name}/{name}", "inside a function; inline it first")


def _is_table(node: ir.Node, constants: Constants) -> bool:
    tensor = constants.of(node.inputs[0])
    return tensor is not None and len(tensor.shape) == 2 and tensor.dtype.is_floating_point()


def _site(node: ir.Node, constants: Constants, shapes: Shapes, *, tables: bool) -> Site | str:
    """The site of a node, or why it is none; empty where the node multiplies two computed values."""
    table = node.op_type == "Gather"
    if table and not tables:
        return "a table costs no arithmetic; lowrank.tables includes it"
    if node.op_type == "MatMul":
        constant = [is_made_of_constants(value, constants) for value in node.inputs[:2]]
        if constant[0] == constant[1]:
            return "its input is constant; fold it" if constant[0] else ""
    reason = _refusal(node)
    if reason:
        return reason
    place = Place.of(node, constants)
    if isinstance(place, str):
        return place
    geometry = _geometry(place, shapes)
    if min(geometry.inputs * geometry.window, geometry.outputs * geometry.window) < _LEAST:
        what = "rows and {} columns" if table else "inputs and {} outputs"
        return f"{geometry.inputs} {what.format(geometry.outputs)} have no lower rank"
    if geometry.kernel and not math.prod(geometry.kernel):
        return "its kernel is empty"
    names = constants.names
    others = sorted((each for each in place.readers if each is not node), key=list(names.labels).index)
    shared = tuple((names.label(each), each) for each in others)
    alone = _alone(node, place, constants, names)
    return Site(names.label(node), node, geometry, table, place.left, place.batch, shared, alone)


def _refusal(node: ir.Node) -> str:
    """Why a layer stays whatever its weight."""
    if node.op_type in _RECURRENT:
        return "recurrent layers are not factored"
    if node.op_type == "Gather" and node.attributes.get_int("axis", 0) != 0:
        return "it picks columns"
    if node.op_type != "ConvTranspose":
        return ""
    padded = node.attributes.get_string("auto_pad", "NOTSET") not in ("", "NOTSET", "VALID")
    return "its padding follows from the size of its output" if padded or "output_shape" in node.attributes else ""


def _alone(node: ir.Node, place: Place, constants: Constants, names: Names) -> str:
    """Why a layer cannot be solved for what it made in the original model; empty if it can."""
    if node.op_type == "Gather":
        return "rows of tables are looked up, not computed"
    inside = [where for each in place.readers if (where := names.place(each))]
    if inside:
        return f"it is {inside[0]}"
    if len(place.readers) > 1:
        return f"{len(place.readers)} layers share its weight"
    if place.parts > 1:
        return f"its weight is {place.parts} matrices"
    if place.left:
        return "its weight stands on the left"
    layer = LinearLayer.of(node, constants)
    return layer if isinstance(layer, str) else ""


def _geometry(place: Place, shapes: Shapes) -> Geometry:
    """Sizes of a layer; of nodes that share a weight, positions are those of all together."""
    node, kernel, dtype = place.node, place.kernel, place.value.dtype or ir.DataType.FLOAT
    inputs, outputs = place.sizes
    counts = [_positions(each, place, shapes) for each in place.readers]
    counted = node.op_type != "Gather" and all(count is not None for count in counts)
    known = [count for count in counts if count is not None] if counted else [_proportions(node, len(kernel))]
    return Geometry(
        inputs=inputs,
        outputs=outputs,
        kernel=kernel,
        positions=(sum(c[0] for c in known), sum(c[1] for c in known), sum(c[2] for c in known)),
        counted=counted,
        parts=place.parts,
        transposed=node.op_type == "ConvTranspose",
        itemsize=math.ceil(dtype.itemsize),
        readers=len(place.readers),
    )


def _positions(node: ir.Node, place: Place, shapes: Shapes) -> tuple[int, int, int] | None:
    """Where one node is computed for one run: at the input's, between a spatial pair, at the output's."""
    source = node.inputs[1 if place.left else 0]
    before, after = shapes.static(source), shapes.static(node.outputs[0])
    if before is None or after is None:
        return None
    if not place.kernel:
        count = max(1, math.prod(after) // (place.sizes[1] * place.parts))
        return count, count, count
    between = (*after[2:-1], before[-1])
    first, middle, last = (max(1, math.prod(sizes) * before[0]) for sizes in (before[2:], between, after[2:]))
    return first, middle, last


def _proportions(node: ir.Node, axes: int) -> tuple[int, int, int]:
    """How many positions there are at the input, in between and at the output, by the strides."""
    strides: Sequence[int] = node.attributes.get_ints("strides", [1] * axes) if axes else [1]
    if node.op_type == "ConvTranspose":
        return 1, math.prod(strides[:-1]), math.prod(strides)
    return math.prod(strides), strides[-1], 1
