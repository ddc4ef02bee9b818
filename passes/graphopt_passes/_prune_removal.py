"""Taking channels out of a model: weights sliced, stated sizes rewritten, shapes brought up to date."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import onnx_ir as ir

from graphopt.analyses.channels import ChannelGroup, ChannelGroups, SizeTable, Span
from graphopt.errors import PassError

__all__ = ["lost_positions", "remove"]

AxisName = tuple[str, int]


def remove(model: ir.Model, groups: ChannelGroups, removals: Iterable[tuple[ChannelGroup, Sequence[int]]]) -> None:
    """Remove units of groups, physically and everywhere.

    Args:
        model: The model that the groups were found in; nothing may have changed since.
        groups: The analysis of that model.
        removals: Groups with the indices of the units to take out.

    Raises:
        PassError: A group is pinned, or an axis would be left empty.
    """
    gone = lost_positions(removals)
    values = {value.name: value for value in _values(model.graph)}
    by_value: dict[str, dict[int, np.ndarray]] = {}
    for (name, axis), positions in gone.items():
        by_value.setdefault(name, {})[axis] = positions
    for name, axes in by_value.items():
        _shrink(values[name], axes)
    for output, slot in dict.fromkeys((table.output, table.slot) for table in groups.tables):
        same = [table for table in groups.tables if (table.output, table.slot) == (output, slot)]
        _restate(model.graph, values[output], same, gone)


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


def _values(graph: ir.Graph) -> Iterable[ir.Value]:
    yield from graph.initializers.values()
    for node in graph:
        yield from node.outputs


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
    graph: ir.Graph, output: ir.Value, tables: Sequence[SizeTable], gone: Mapping[AxisName, np.ndarray]
) -> None:
    """Write the sizes that one attribute or constant input of a node states."""
    spans = {position: span for table in tables for position, span in table.spans if (span.value, span.axis) in gone}
    node = output.producer()
    if not spans or node is None:
        return
    first = tables[0]
    numbers = list(first.numbers)
    for position, span in spans.items():
        numbers[position] = _left(span, gone)
    for name in first.drops:
        node.attributes.pop(name, None)
    if isinstance(first.slot, str):
        value = ir.AttrInt64(first.slot, numbers[0]) if first.scalar else ir.AttrInt64s(first.slot, numbers)
        node.attributes[first.slot] = value
    else:
        _replace_input(graph, node, first.slot, numbers)


def _left(span: Span, gone: Mapping[AxisName, np.ndarray]) -> int:
    lost = gone[span.value, span.axis]
    return span.stop - span.start - int(np.count_nonzero((lost >= span.start) & (lost < span.stop)))


def _replace_input(graph: ir.Graph, node: ir.Node, index: int, numbers: Sequence[int]) -> None:
    """Give a node a constant of its own; the old one may serve others."""
    old = node.inputs[index] if index < len(node.inputs) else None
    dtype = old.dtype if old is not None and old.dtype is not None else ir.DataType.INT64
    taken = {value.name for value in (*graph.inputs, *_values(graph))}
    stem = f"{node.name or node.outputs[0].name}_input{index}"
    name = next(name for i in range(len(taken) + 1) if (name := f"{stem}_{i}" if i else stem) not in taken)
    array = np.array(numbers, dtype=dtype.numpy())
    constant = ir.Value(
        name=name, type=ir.TensorType(dtype), shape=ir.Shape(array.shape), const_value=ir.tensor(array, name=name)
    )
    graph.register_initializer(constant)
    if index >= len(node.inputs):
        node.resize_inputs(index + 1)
    node.replace_input_with(index, constant)
    if old is not None:
        _drop_unused(graph, old)


def _drop_unused(graph: ir.Graph, value: ir.Value) -> None:
    """Remove a value that nothing reads any more, with the arithmetic that made it."""
    if value.uses() or value.is_graph_output() or value.is_graph_input():
        return
    node = value.producer()
    if node is None:
        graph.initializers.pop(value.name or "", None)
        return
    if any(output.uses() or output.is_graph_output() for output in node.outputs):
        return
    sources = [source for source in node.inputs if source is not None]
    graph.remove(node, safe=True)
    for source in sources:
        _drop_unused(graph, source)
