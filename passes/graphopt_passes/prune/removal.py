"""Taking channels out of a model: weights sliced, stated sizes rewritten, shapes brought up to date."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import onnx_ir as ir

from graphopt.analyses.channels import ChannelGroup, ChannelGroups, IndexTable, SizeTable, Span
from graphopt.analyses.names import Names
from graphopt.errors import PassError
from graphopt_passes._own_constants import new_constant, taken_names, unused_name
from graphopt_passes.prune.means import restate_means

__all__ = ["lost_positions", "remove"]

AxisName = tuple[str, int]


def remove(model: ir.Model, groups: ChannelGroups, removals: Sequence[tuple[ChannelGroup, Sequence[int]]]) -> None:
    """Remove units of groups, physically and everywhere.

    Args:
        model: The model that the groups were found in; nothing may have changed since.
        groups: The analysis of that model.
        removals: Groups with the indices of the units to take out.

    Raises:
        PassError: A group is pinned, or an axis would be left empty.
    """
    gone = lost_positions(removals)
    names = Names(model)
    values = {names.key(value): value for value in names.values()}
    by_value: dict[str, dict[int, np.ndarray]] = {}
    for (name, axis), positions in gone.items():
        by_value.setdefault(name, {})[axis] = positions
    for name, axes in by_value.items():
        _shrink(values[name], axes)
    stated: dict[tuple[str, str | int], list[SizeTable]] = {}
    for table in groups.tables:
        stated.setdefault((table.output, table.slot), []).append(table)
    taken = taken_names(model.graph)
    for (output, _), tables in stated.items():
        _restate(model.graph, values[output], tables, gone, taken)
    for table in groups.indices:
        _renumber(model.graph, values[table.output], table, gone, taken)
    restate_means(model.graph, values, groups.means, _kept(removals, gone))


def lost_positions(removals: Iterable[tuple[ChannelGroup, Sequence[int]]]) -> dict[AxisName, np.ndarray]:
    """Positions that go, by axis; several groups may share one.

    Raises:
        PassError: A group is pinned, or an axis would be left empty.
    """
    found: dict[AxisName, np.ndarray] = {}
    for group, units in removals:
        if group.pin is not None:
            raise PassError(f"prune: {group.name}", group.pin)
        for place in group.places:
            key = place.value, place.axis
            lost = place.positions[np.asarray(units, dtype=np.int64)].reshape(-1)
            found[key] = np.union1d(found.get(key, lost[:0]), lost)
            if len(found[key]) >= place.size:
                raise PassError(f"prune: {group.name}", f"axis {place.axis} of {place.value!r} would be left empty")
    return {key: positions for key, positions in found.items() if len(positions)}


def _kept(
    removals: Iterable[tuple[ChannelGroup, Sequence[int]]], gone: Mapping[AxisName, np.ndarray]
) -> dict[AxisName, float]:
    """The part that is left of every axis that lost something."""
    sizes = {(place.value, place.axis): place.size for group, _ in removals for place in group.places}
    return {axis: 1 - len(lost) / sizes[axis] for axis, lost in gone.items()}


def _shrink(value: ir.Value, axes: Mapping[int, np.ndarray]) -> None:
    """Slice a constant, or correct the recorded shape of an activation."""
    producer = value.producer()
    if value.const_value is not None and producer is None:
        value.const_value = _sliced(value.const_value, axes)
    elif producer is not None and producer.op_type == "Constant" and producer.domain == "":
        attribute = next(iter(producer.attributes.values()))
        tensor = attribute.as_tensor() if attribute.name == "value" else ir.tensor(attribute.value)
        del producer.attributes[attribute.name]
        producer.attributes["value"] = ir.AttrTensor("value", _sliced(tensor, axes))
        if value.const_value is not None:
            value.const_value = _sliced(value.const_value, axes)
    if value.shape is not None:
        dims = list(value.shape)
        for axis, lost in axes.items():
            size = dims[axis]
            dims[axis] = size - len(lost) if isinstance(size, int) else size
        value.shape = ir.Shape(dims)


def _sliced(tensor: ir.TensorProtocol, axes: Mapping[int, np.ndarray]) -> ir.TensorProtocol:
    """The rest of a tensor; one that lies in a file stays there until it is written."""

    def rest() -> np.ndarray:
        array = tensor.numpy()
        for axis, lost in axes.items():
            array = np.delete(array, lost, axis=axis)
        return np.ascontiguousarray(array)

    shape = ir.Shape([size - len(axes.get(axis, ())) for axis, size in enumerate(tensor.shape.numpy())])
    properties = dict(tensor.metadata_props)
    if isinstance(tensor, (ir.ExternalTensor, ir.LazyTensor)):
        return ir.LazyTensor(
            lambda: ir.Tensor(rest(), dtype=tensor.dtype, name=tensor.name),
            dtype=tensor.dtype,
            shape=shape,
            name=tensor.name,
            doc_string=tensor.doc_string,
            metadata_props=properties,
        )
    return ir.Tensor(
        rest(), dtype=tensor.dtype, name=tensor.name, doc_string=tensor.doc_string, metadata_props=properties
    )


def _restate(
    graph: ir.Graph,
    output: ir.Value,
    tables: Sequence[SizeTable],
    gone: Mapping[AxisName, np.ndarray],
    taken: set[str],
) -> None:
    """Write the sizes that one attribute or constant input of a node states."""
    spans = {position: span for table in tables for position, span in table.spans if (span.value, span.axis) in gone}
    node = output.producer()
    outdated = any(axis in gone for table in tables for axis in table.reads)
    if node is None or not (spans or outdated):
        return
    first = tables[0]
    numbers = list(first.numbers)
    for position, span in spans.items():
        numbers[position] = _left(span, gone)
    for name in (name for table in tables for name in table.drops):
        node.attributes.pop(name, None)
    if isinstance(first.slot, str):
        stated = [number or 0 for number in numbers]
        value = ir.AttrInt64(first.slot, stated[0]) if first.scalar else ir.AttrInt64s(first.slot, stated)
        node.attributes[first.slot] = value
        return
    array = np.array([number or 0 for number in numbers], first.dtype.numpy())
    array = array if first.shape is None else array.reshape(first.shape)
    if None in numbers:
        _merge_input(graph, node, first.slot, array, np.array([number is not None for number in numbers]), taken)
    else:
        _replace_input(graph, node, first.slot, array, taken)


def _left(span: Span, gone: Mapping[AxisName, np.ndarray]) -> int:
    lost = gone[span.value, span.axis]
    left = span.stop - span.start - int(np.count_nonzero((lost >= span.start) & (lost < span.stop)))
    return left // span.unit


def _renumber(
    graph: ir.Graph, output: ir.Value, table: IndexTable, gone: Mapping[AxisName, np.ndarray], taken: set[str]
) -> None:
    """Write the positions that a constant input lists, of those that are left."""
    lost, node = gone.get((table.value, table.axis)), output.producer()
    if lost is None or node is None:
        return
    kept = table.numbers[~np.isin(table.numbers, lost)]
    left = kept - np.searchsorted(lost, kept)
    numbers = left.astype(table.numbers.dtype).reshape(-1 if table.numbers.ndim else ())
    _replace_input(graph, node, table.slot, numbers, taken)


def _replace_input(graph: ir.Graph, node: ir.Node, index: int, array: np.ndarray, taken: set[str]) -> None:
    """Give a node a constant of its own; the old one may serve others."""
    old = node.inputs[index] if index < len(node.inputs) else None
    stem = f"{node.name or node.outputs[0].name}_input{index}"
    constant = new_constant(graph, stem, array, beside=node, taken=taken)
    if index >= len(node.inputs):
        node.resize_inputs(index + 1)
    node.replace_input_with(index, constant)
    if old is not None:
        _drop_unused(old)


def _merge_input(
    graph: ir.Graph, node: ir.Node, index: int, array: np.ndarray, stated: np.ndarray, taken: set[str]
) -> None:
    """Overwrite some entries of a list that the graph computes."""
    old, home = node.inputs[index], node.graph
    if old is None or not isinstance(home, ir.Graph):
        return
    stem = f"{node.name or node.outputs[0].name}_input{index}"
    which = new_constant(graph, f"{stem}_stated", stated, beside=node, taken=taken)
    numbers = new_constant(graph, stem, array, beside=node, taken=taken)
    chosen = ir.node("Where", [which, numbers, old], name=unused_name(graph, f"{stem}_merged", taken))
    chosen.outputs[0].name = unused_name(graph, f"{stem}_shape", taken)
    chosen.outputs[0].type, chosen.outputs[0].shape = ir.TensorType(ir.DataType.INT64), ir.Shape([len(array)])
    home.insert_before(node, chosen)
    node.replace_input_with(index, chosen.outputs[0])


def _drop_unused(value: ir.Value) -> None:
    """Remove a value that nothing reads any more, with the arithmetic that made it."""
    if value.uses() or value.is_graph_output() or value.is_graph_input():
        return
    node, graph = value.producer(), value.graph
    if node is None:
        if graph is not None:
            graph.initializers.pop(value.name or "", None)
        return
    if any(output.uses() or output.is_graph_output() for output in node.outputs):
        return
    sources = [source for source in node.inputs if source is not None]
    if graph is not None:
        graph.remove(node, safe=True)
    for source in sources:
        _drop_unused(source)
