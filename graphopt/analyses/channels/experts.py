"""How the experts of a mixture pass through what chooses among them, as wrappers around other rules in `EXPERT_RULES`.

operator              what is tied in addition                         what is pinned
Softmax               its axis, behind a layer that scores experts     its axis, unless experts are stacked along it
TopK                  its axis, while k of it are left                 likewise, or where an operator that is not in
                                                                       this table reads the indices
Gather, GatherND,     the axis that such indices point along           -
  Gather-, ScatterElements
OneHot                the axis that it makes of such indices           -

An expert leaves with its score, and the others share what it had: exact where it was given nothing. The axis of a
Softmax or a TopK is one of experts if the same index chooses a matrix in a stack of weights: a batch axis of a
constant that a MatMul, an Einsum or a Gather with those indices reads. Otherwise it stays. Experts written as layers of
their own, chosen by NonZero or by a constant index, are not recognized: their axis is pinned by whatever reads it.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from graphopt.analyses.channels.axis_maps import AxisMaps
from graphopt.analyses.channels.node_view import NodeView
from graphopt.analyses.channels.partition import Indices
from graphopt.analyses.channels.rules.computing import COMPUTE_RULES, Rule
from graphopt.analyses.channels.rules.moves import MOVE_RULES
from graphopt.analyses.channels.rules.operators import OPERATOR_RULES
from graphopt.analyses.channels.shape_values import numbers

__all__ = ["EXPERT_RULES", "settle_routers"]

_CARRIERS = frozenset(
    {"Cast", "Expand", "Flatten", "Identity", "Reshape", "Slice", "Split", "Squeeze", "Transpose", "Unsqueeze"}
)
_INDEXED = {"Gather": 1, "GatherElements": 1, "GatherND": 1, "OneHot": 0, "ScatterElements": 1}


def settle_routers(maps: AxisMaps) -> None:
    """Once all rules were applied: call the units of a router experts, and pin what turned out to be no router."""
    stacked = [maps.partition.find(atoms) for atoms in maps.stacks]
    every = np.concatenate(stacked) if stacked else np.empty(0, dtype=np.int64)
    for atoms, reason in maps.routers:
        if np.isin(maps.partition.find(atoms), every).all():
            maps.kinds.append((atoms, "experts"))
        else:
            maps.pin(atoms, reason)


def _scores(view: NodeView, value: ir.Value | None, axis: int) -> Indices | None:
    """Units of an axis that a layer makes, and that may be experts."""
    atoms = view.atoms(value, axis)
    return atoms if atoms is not None and len(atoms) > 1 and view.maps.partition.marked(atoms).all() else None


def _softmax(view: NodeView) -> None:
    COMPUTE_RULES["Softmax"](view)
    source, output = view.input(0), view.node.outputs[0]
    rank = view.rank(source)
    axis = view.node.attributes.get_int("axis", -1 if view.opset >= 13 else 1)
    if not rank or (view.opset < 13 and axis % rank != rank - 1):
        return
    atoms = _scores(view, source, axis)
    if atoms is not None and view.link(source, axis, output, axis):
        view.maps.routers.append((atoms, view.reason))
        _gates(view, output, axis)


def _gates(view: NodeView, output: ir.Value, axis: int) -> None:
    """What experts are weighted with: nothing for those that are not chosen, so sums over experts may lose them."""
    carrying = [i for i, atoms in enumerate(view.maps.of(output) or ()) if _is_marked(view, atoms)]
    if carrying == [axis % (view.rank(output) or 1)]:
        view.maps.zeros.add(view.key(output))


def _is_marked(view: NodeView, atoms: Indices | None) -> bool:
    return atoms is not None and bool(view.maps.partition.marked(atoms).any())


def _top_k(view: NodeView) -> None:
    OPERATOR_RULES["TopK"](view)
    source, attributes = view.input(0), view.node.attributes
    atoms = _scores(view, source, axis := attributes.get_int("axis", -1))
    stated = view.numbers(1) if view.input(1) is not None else (attributes.get_int("k", 0),)
    if source is None or atoms is None or stated is None or len(stated) != 1 or not 0 < stated[0] <= len(atoms):
        return
    indices = view.node.outputs[1]
    if (reader := _stranger(view, indices)) is not None:
        view.maps.pin(atoms, f"its number is read by {reader}")
        return
    view.settle(source, axis)
    view.maps.routers.append((atoms, view.reason))
    view.maps.floors.append((atoms, stated[0]))
    view.maps.numbered[view.key(indices)] = atoms


def _stranger(view: NodeView, indices: ir.Value) -> str | None:
    """What reads the numbers of experts and is not in the table above."""
    waiting = [indices]
    while waiting:
        value = waiting.pop()
        if value.is_graph_output():
            return f"graph output {value.name!r}"
        for node, index in value.uses():
            if node.op_type in _CARRIERS and index == 0:
                waiting.extend(node.outputs)
            elif node.op_type not in ("Shape", "Size") and _INDEXED.get(node.op_type) != index:
                return f"{node.op_type} {view.maps.constants.names.label(node)!r}"
    return None


def _numbered(view: NodeView, value: ir.Value | None) -> Indices | None:
    """The experts that a value holds the numbers of, None if it holds anything else."""
    while value is not None:
        if (atoms := view.maps.numbered.get(view.key(value))) is not None:
            return atoms
        producer = value.producer()
        value = producer.inputs[0] if producer is not None and producer.op_type in _CARRIERS else None
    return None


def _tied(view: NodeView, experts: Indices, value: ir.Value | None, axis: int) -> bool:
    """Tie an axis that numbers of experts point along."""
    atoms = view.atoms(value, axis)
    if value is None or atoms is None or len(atoms) != len(experts):
        view.maps.pin(experts, view.reason)
        return False
    view.tie(experts, atoms)
    view.settle(value, axis)
    return True


def _gather(view: NodeView) -> None:
    MOVE_RULES["Gather"](view)
    source, axis = view.input(0), view.node.attributes.get_int("axis", 0)
    if (experts := _numbered(view, view.input(1))) is not None:
        _picked(view, experts, source, axis)


def _picked(view: NodeView, experts: Indices, source: ir.Value | None, axis: int) -> None:
    """Tie an axis whose slices are picked by the numbers of experts; a weight's are a stack."""
    if _tied(view, experts, source, axis) and source is not None:
        stacked = view.atoms(source, axis)
        if stacked is not None and view.maps.origin(source) is not None and (view.rank(source) or 0) > 2:
            view.maps.stacks.append(stacked)


def _gather_nd(view: NodeView) -> None:
    OPERATOR_RULES["GatherND"](view)
    index, batches = view.input(1), view.node.attributes.get_int("batch_dims", 0)
    experts = _numbered(view, index)
    if experts is not None and view.sizes(index) is not None and not batches and (view.sizes(index) or (0,))[-1] == 1:
        _picked(view, experts, view.input(0), 0)
    elif experts is not None:
        view.maps.pin(experts, view.reason)


def _gather_elements(view: NodeView) -> None:
    OPERATOR_RULES["GatherElements"](view)
    if (experts := _numbered(view, view.input(1))) is not None:
        _tied(view, experts, view.input(0), view.node.attributes.get_int("axis", 0))


def _scatter_elements(view: NodeView) -> None:
    OPERATOR_RULES["ScatterElements"](view)
    source, output, axis = view.input(0), view.node.outputs[0], view.node.attributes.get_int("axis", 0)
    experts = _numbered(view, view.input(1))
    if experts is None or source is None or not _tied(view, experts, source, axis):
        return
    if _tied(view, experts, output, axis) and _is_filled_with_zeros(view.maps, source):
        _gates(view, output, axis)


def _is_filled_with_zeros(maps: AxisMaps, value: ir.Value) -> bool:
    known = numbers(maps.content(value))
    if known is not None:
        return not any(known)
    node = value.producer()
    if node is None or node.op_type not in ("ConstantOfShape", "Expand"):
        return False
    if node.op_type == "Expand":
        return node.inputs[0] is not None and _is_filled_with_zeros(maps, node.inputs[0])
    filler = node.attributes.get_tensor("value", None)
    return filler is None or not filler.numpy().any()


def _one_hot(view: NodeView) -> None:
    OPERATOR_RULES["OneHot"](view)
    output = view.node.outputs[0]
    experts = _numbered(view, view.input(0))
    if experts is None:
        return
    axis = view.node.attributes.get_int("axis", -1) % (view.rank(output) or 1)
    depth = view.numbers(1)
    if depth is None or depth != (len(experts),):
        view.maps.pin(experts, view.reason)
    elif _tied(view, experts, output, axis):
        view.state_sizes(1, depth, [(0, view.span(output, axis))])
        if (numbers(view.content(2)) or (1,))[0] == 0:
            _gates(view, output, axis)


EXPERT_RULES: dict[str, Rule] = {
    "Softmax": _softmax,
    "TopK": _top_k,
    "Gather": _gather,
    "GatherElements": _gather_elements,
    "GatherND": _gather_nd,
    "ScatterElements": _scatter_elements,
    "OneHot": _one_hot,
}
