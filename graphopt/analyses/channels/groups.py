"""Which channels of which tensors live or die together.

Every axis of every value gets one atom per index. A table of rules, one per operator, says how indices of inputs and
outputs correspond; union-find joins atoms that must be removed together (the dependency graph of DepGraph, Fang et al.
2023, at the grain of single indices). Whatever no rule vouches for is pinned, with the operator that pinned it:
unknown operators, graph inputs and outputs. Subgraphs are part of the graph; functions are unknown operators.

Sets of atoms that occur on the same axes equally often form a group: the channels of one convolution, with the
batch norms, residual partners, depthwise weights, flattened columns and padding that follow them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar

import numpy as np
import onnx_ir as ir

from graphopt.analyses.channels.axis_maps import AxisMaps, Kind, Role
from graphopt.analyses.channels.experts import EXPERT_RULES, settle_routers
from graphopt.analyses.channels.node_view import NodeView
from graphopt.analyses.channels.partition import Indices
from graphopt.analyses.channels.rules.computing import COMPUTE_RULES, Rule
from graphopt.analyses.channels.rules.moves import MOVE_RULES
from graphopt.analyses.channels.rules.norms import NORM_CONTRIB_RULES, NORM_RULES
from graphopt.analyses.channels.rules.operators import CONTRIB_RULES, OPERATOR_RULES
from graphopt.analyses.channels.rules.subgraphs import visit_inside
from graphopt.analyses.channels.shape_values import AxisName, Entry, evaluate
from graphopt.analyses.channels.tables import IndexTable, Mean, SizeTable, Span
from graphopt.analyses.channels.zeros import keeps_zero
from graphopt.analyses.constants import CONSTANTS
from graphopt.analyses.names import Names
from graphopt.analyses.shapes import SHAPES
from graphopt.pass_base import Analysis, Context

__all__ = [
    "CHANNEL_GROUPS", "ChannelGroup", "ChannelGroups", "ChannelGroupsAnalysis", "IndexTable", "Kind", "Mean", "Place",
    "SizeTable", "Span",
]  # fmt: skip

_RULES = {**COMPUTE_RULES, **NORM_RULES, **MOVE_RULES, **OPERATOR_RULES, **EXPERT_RULES}
_CONTRIB_RULES = {**CONTRIB_RULES, **NORM_CONTRIB_RULES}
_FREE = np.iinfo(np.int64).max


@dataclass(frozen=True, eq=False)
class Place:
    """Where the units of a group sit on one axis.

    Attributes:
        value: Name of the value.
        axis: The axis.
        size: Length of the axis.
        positions: `[units, copies]` indices on the axis; a flattened channel has one copy per pixel.
        constant: The value is a weight; its slices go. Otherwise it is an activation and shrinks by itself.
        role: What the axis is to the node that reads the weight.
    """

    value: str
    axis: int
    size: int
    positions: Indices
    constant: bool
    role: Role


@dataclass(frozen=True, eq=False)
class ChannelGroup:
    """Units that occur on the same axes; each can be removed without the others.

    Attributes:
        name: Name of the first node that makes these channels.
        units: How many there are, in the order of that node's channels.
        places: Every axis they sit on; for a pinned group only those of its producers.
        producers: Names of the nodes that make them, in the graph's order.
        pin: Why they cannot be removed, or None.
        kind: What one unit is.
        least: How many have to stay, such as the experts that every token is given.
    """

    name: str
    units: int
    places: tuple[Place, ...]
    producers: tuple[str, ...]
    pin: str | None
    kind: Kind = "channels"
    least: int = 1


@dataclass(frozen=True, eq=False)
class ChannelGroups:
    """All groups of a model, subgraphs included.

    Attributes:
        groups: In the order of their first producers; pinned ones included.
        tables: Numbers in the graph that state how many channels there are.
        elsewhere: Layers that are not looked at, by name, with the reason: those inside functions.
        means: Means over axes that channels are on.
        indices: Constants that list channels by their number.
    """

    groups: tuple[ChannelGroup, ...]
    tables: tuple[SizeTable, ...]
    elsewhere: Mapping[str, str]
    means: tuple[Mean, ...] = ()
    indices: tuple[IndexTable, ...] = ()

    @property
    def free(self) -> tuple[ChannelGroup, ...]:
        """Groups whose units can be removed."""
        return tuple(group for group in self.groups if group.pin is None)


@dataclass(frozen=True)
class ChannelGroupsAnalysis(Analysis[ChannelGroups]):
    """Find the groups; weights are not read, only small constants that state shapes."""

    name: ClassVar[str] = "channel groups"

    def compute(self, model: ir.Model, ctx: Context) -> ChannelGroups:
        """Apply the rules in the graph's order, then collect the sets."""
        maps = AxisMaps(ctx.fact(SHAPES), ctx.fact(CONSTANTS), frozenset(model.functions))
        opset = model.graph.opset_imports.get("", 1)
        names = Names(model)
        for value in model.graph.inputs:
            maps.pin_value(value, f"reaches graph input {value.name!r}")
        _visit_graph(maps, model.graph, names, opset)
        settle_routers(maps)
        for value in model.graph.outputs:
            maps.pin_value(value, f"reaches graph output {value.name!r}")
        order = {label: i for i, label in enumerate(names.order())}
        groups, tables, means = _collect(maps, order), tuple(maps.tables), tuple(maps.means)
        return ChannelGroups(groups, tables, _elsewhere(model), means, tuple(maps.indices))


def _visit_graph(maps: AxisMaps, graph: ir.Graph, names: Names, opset: int) -> None:
    # a reshaped weight follows the activation that it meets, so it comes last
    for node in sorted(graph, key=lambda node: node.op_type == "Reshape" and _reshapes_weight(maps, node)):
        _visit(maps, node, names, opset)


def _reshapes_weight(maps: AxisMaps, node: ir.Node) -> bool:
    source = node.inputs[0]
    return source is not None and maps.constants.of(source) is not None


def _visit(maps: AxisMaps, node: ir.Node, names: Names, opset: int) -> None:
    view = NodeView(maps, node, names.label(node), opset)
    if node.op_identifier() in maps.functions:
        view.reason = f"goes into the function {node.op_type!r} that {view.label!r} calls"
    visit_inside(view, lambda graph: _visit_graph(maps, graph, names, opset))
    content = evaluate(node, [maps.content(value) for value in node.inputs])
    if (rule := _rule(maps, node)) is not None:
        rule(view)
    if node.op_type == "Size":
        content = _size_content(view)
    elif node.op_type == "Shape":
        content = _shape_content(view)
    if content is not None:
        maps.contents[maps.key(node.outputs[0])] = content
    if node.domain in ("", "ai.onnx", "com.microsoft") and keeps_zero(maps, node):
        maps.zeros.update(maps.key(output) for output in node.outputs)
    view.finish(content_kept=content is not None)


def _rule(maps: AxisMaps, node: ir.Node) -> Rule | None:
    if node.op_identifier() in maps.functions:
        return None
    standard = node.domain in ("", "ai.onnx")
    return _RULES.get(node.op_type) if standard else _CONTRIB_RULES.get((node.domain, node.op_type))


def _size_content(view: NodeView) -> np.ndarray[Any, np.dtype[np.object_]] | None:
    source = view.input(0)
    sizes = view.sizes(source)
    if source is None or sizes is None:
        return None
    known = [size for size in sizes if size is not None]
    names = tuple((view.key(source), axis) for axis in range(len(sizes)))
    content = np.empty((), dtype=object)
    content[()] = Entry(math.prod(known) if len(known) == len(sizes) else None, None, names)
    return content


def _shape_content(view: NodeView) -> np.ndarray[Any, np.dtype[np.object_]] | None:
    source = view.input(0)
    sizes = view.sizes(source)
    if source is None or sizes is None:
        return None
    if view.maps.content(source) is not None:  # the length of a list of sizes: a plain number once it is pinned
        for atoms in view.maps.of(source) or ():
            view.maps.pin(atoms, view.reason)
        view.follow(source)
        entries = [Entry(size) for size in sizes]
    else:
        names = [(view.key(source), axis) for axis in range(len(sizes))]
        entries = [Entry(size, name, (name,)) for name, size in zip(names, sizes, strict=True)]
        for axis in range(len(sizes)):
            view.maps.size(source, axis)  # names the axis
    attributes = view.node.attributes
    kept = entries[attributes.get_int("start", 0) : attributes.get_int("end", len(entries))]
    content = np.empty(len(kept), dtype=object)
    content[:] = kept
    return content


def _elsewhere(model: ir.Model) -> dict[str, str]:
    """Layers of functions: what a function computes is the same wherever it is called."""
    return {
        f"{function.name}/{node.name or node.outputs[0].name}": f"inside the function {function.name!r}"
        for function in model.functions.values()
        for node in function.all_nodes()
        if node.op_type in ("Conv", "ConvTranspose", "Gemm", "MatMul")
    }


@dataclass(frozen=True, eq=False)
class _Axis:
    """An axis with the set of each of its indices."""

    name: AxisName
    roots: Indices
    makes: tuple[str, ...]


def _collect(maps: AxisMaps, order: Mapping[str, int]) -> tuple[ChannelGroup, ...]:
    """Sort the sets that carry channels into groups by the axes they occur on."""
    everything = np.arange(len(maps.partition), dtype=np.int64)
    roots, carries = maps.partition.find(everything), maps.partition.marked(everything)
    pins = np.full(len(everything), _FREE, dtype=np.int64)
    for atoms, reason in maps.pinned:
        np.minimum.at(pins, roots[atoms], reason)
    kinds: dict[int, Kind] = {}
    for atoms, kind in maps.kinds:
        kinds.update(dict.fromkeys(np.unique(roots[atoms[carries[atoms]]]).tolist(), kind))
    axes: list[_Axis] = []
    for name, value_axes in maps.axes.items():
        for axis, own in enumerate(value_axes):
            atoms = own if own is not None else maps.periods.get((name, axis))
            if atoms is not None and len(atoms) and carries[atoms].any():
                makes = tuple(label for role, label in maps.roles.get((name, axis), ()) if role == "output")
                axes.append(_Axis((name, axis), roots[atoms], makes))
    groups = [
        _group(maps, [axes[i] for i in indices], np.array(members, dtype=np.int64), pin, order, kinds)
        for indices, members, pin in _signatures(axes, carries, pins, maps.reasons)
    ]
    return tuple(group for _, group in sorted(groups, key=lambda pair: pair[0]))


def _signatures(
    axes: Sequence[_Axis], carries: np.ndarray[Any, Any], pins: Indices, reasons: Sequence[str]
) -> list[tuple[list[int], list[int], str | None]]:
    """Axes, sets and pin of what occurs on the same axes equally often; a pinned set counts only by its producers."""
    every = np.concatenate([axis.roots for axis in axes]) if axes else np.empty(0, dtype=np.int64)
    where = np.repeat(np.arange(len(axes)), [len(axis.roots) for axis in axes])
    makes = np.array([bool(axis.makes) for axis in axes], dtype=np.bool_)
    kept = carries[every] & ((pins[every] == _FREE) | makes[where])
    pairs, counts = np.unique(every[kept] * max(len(axes), 1) + where[kept], return_counts=True)
    roots, places = np.divmod(pairs, max(len(axes), 1))
    starts = [*np.flatnonzero(np.diff(roots, prepend=-1)).tolist(), len(roots)]
    on, often, width = places.tobytes(), counts.astype(np.int64).tobytes(), places.itemsize
    alike: dict[tuple[bytes, bytes, str | None], list[int]] = {}
    for start, stop in pairwise(starts):
        root, part = int(roots[start]), slice(start * width, stop * width)
        pin = None if pins[root] == _FREE else reasons[int(pins[root])]
        alike.setdefault((on[part], often[part], pin), []).append(root)
    return [(np.frombuffer(at, dtype=np.int64).tolist(), members, pin) for (at, _, pin), members in alike.items()]


def _group(
    maps: AxisMaps,
    axes: Sequence[_Axis],
    members: Indices,
    pin: str | None,
    order: Mapping[str, int],
    kinds: Mapping[int, Kind],
) -> tuple[tuple[int, int], ChannelGroup]:
    """Build a group; the key sorts groups by their first producer, then by their first channel there."""
    producers = sorted({label for axis in axes for label in axis.makes}, key=lambda label: order[label])
    first = next(axis for axis in axes if producers[0] in axis.makes)
    roots, met = np.unique(first.roots, return_index=True)
    units = members[np.argsort(met[np.searchsorted(roots, members)])]
    names = {axis.name for axis in axes}
    places = tuple(
        Place(*axis.name, len(axis.roots), _positions(axis.roots, units), *_kind(maps, axis.name, names))
        for axis in axes
    )
    key = order[producers[0]], int(np.argmax(first.roots == units[0]))
    kind = kinds.get(int(units[0]), "channels")
    floors = (floor for atoms, floor in maps.floors if np.isin(maps.partition.find(atoms), units).any())
    return key, ChannelGroup(producers[0], len(units), places, tuple(producers), pin, kind, max(floors, default=1))


def _positions(roots: Indices, units: Indices) -> Indices:
    """`[units, copies]`: where each unit sits on an axis, in ascending order."""
    by_name = np.argsort(units)
    slot = np.minimum(np.searchsorted(units[by_name], roots), len(units) - 1)
    at = np.nonzero(units[by_name][slot] == roots)[0]
    unit = by_name[slot[at]]
    return at[np.lexsort((at, unit))].reshape(len(units), -1)


def _kind(maps: AxisMaps, name: AxisName, group: set[AxisName]) -> tuple[bool, Role]:
    """Whether an axis belongs to a constant, and its role; a weight behind a Transpose has that of the result."""
    constant = name[0] in maps.constants.tensors
    found: list[Role] = [role for role, _ in maps.roles.get(name, ())]
    if not found and constant:
        behind = (other for other in maps.roles if other in group and maps.origins.get(other[0]) == name[0])
        found = [role for other in behind for role, _ in maps.roles[other]]
    return constant, "output" if "output" in found else found[0] if found else "other"


CHANNEL_GROUPS = ChannelGroupsAnalysis()
