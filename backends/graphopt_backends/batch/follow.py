"""Whether samples of a batch stay apart on their way through a model, so that they can be run one by one.

Every value gets a lay: the axis along which samples lie one after the other, in order, with the same number of entries
each. Rules carry it from the inputs of a node to its outputs; shape arithmetic is followed with the
size of the batch as a symbol. What no rule follows counts as mixed. So where all outputs have a lay, sample b of each
depends on sample b of the inputs alone, whatever the size of the batch: by induction over the nodes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import onnx_ir as ir

from graphopt.analyses.channels.shape_values import Content, Entry, constant_content, evaluate
from graphopt.model_io import InputSpec
from graphopt_backends._fold import infer_shapes, static_shape
from graphopt_backends.batch.rules import follow
from graphopt_backends.batch.site import CONSTANT, Lay, MixedError, Samples, Site, Times

__all__ = ["Batch", "batch_axes", "follow_batch"]

_WIDE = frozenset({ir.DataType.INT32, ir.DataType.INT64, ir.DataType.FLOAT, ir.DataType.DOUBLE})
"""Types that hold every size."""


@dataclass(frozen=True)
class Batch:
    """What is known of the batch of a model.

    Attributes:
        size: Samples that it is compiled for; 0: it serves no other batch.
        inputs: Axis of the samples in each input; None: the input is the same for all.
        outputs: Axis of the samples in each output.
        reason: Why it serves no other batch, where that is so.
    """

    size: int = 0
    inputs: tuple[int | None, ...] = ()
    outputs: tuple[int, ...] = ()
    reason: str = ""

    @property
    def leads(self) -> bool:
        """True if samples lie along the first axis of every input and output: one after the other in memory."""
        return self.size > 0 and not any(axis != 0 for axis in (*self.inputs, *self.outputs))


def batch_axes(specs: Sequence[InputSpec]) -> dict[str, tuple[int, ...]]:
    """Axes of inputs that may hold the batch: open ones that are named after it; else open first ones."""
    names = {dim for spec in specs for dim in spec.shape or () if isinstance(dim, str)}
    firsts = {dim for spec in specs for dim in (spec.shape or ())[:1] if isinstance(dim, str)}
    batches = {name for name in names if "batch" in name.lower()} or firsts
    found: dict[str, tuple[int, ...]] = {}
    for spec in specs:
        dims = enumerate(spec.shape or ())
        found[spec.name] = tuple(axis for axis, dim in dims if dim in batches or (axis == 0 and dim is None))
    return {name: axes for name, axes in found.items() if axes}


def follow_batch(model: ir.Model, shapes: Mapping[str, tuple[int, ...]], axes: Mapping[str, tuple[int, ...]]) -> Batch:
    """Follow the samples of a batch through a model.

    Args:
        model: As it was exported, before shape arithmetic was folded, with sizes for all inputs; shapes are inferred.
        shapes: Further shapes of values of its main graph, by name.
        axes: Where the batch may lie in the inputs, in one of them at least.
    """
    inputs = [value for value in model.graph.inputs if value.name not in model.graph.initializers]
    sizes = {(static_shape(value) or ())[axis] for value in inputs for axis in axes.get(str(value.name), ())}
    twice = [name for name, found in axes.items() if len(found) > 1]
    if twice:
        return Batch(reason=f"input {twice[0]!r} has the open batch on several axes")
    if len(sizes) > 1:
        return Batch(reason=f"open batches of inputs have sizes {', '.join(map(str, sorted(sizes)))}")
    size = sizes.pop()
    tracker = _Tracker(model.graph, shapes, size)
    for value in inputs:
        if str(value.name) in axes:
            tracker.lays[value] = Lay(axes[str(value.name)][0])
    tracker.visit(model.graph)
    found: list[int] = []
    for value in model.graph.outputs:
        lay = tracker.lay(value)
        if lay.mixed or lay.axis is None or lay.numbers:
            what = "holds the numbers of samples" if lay.numbers else "is the same for every batch"
            return Batch(reason=lay.mixed or f"output {value.name!r} {what}")
        found.append(lay.axis)
    return Batch(size, tuple(tracker.lay(value).axis for value in inputs), tuple(found))


class _Tracker:
    """Lays and contents of all values that were visited."""

    def __init__(self, graph: ir.Graph, shapes: Mapping[str, tuple[int, ...]], size: int) -> None:
        self._size, self._opsets = size, dict(graph.opset_imports)
        made = ((output, shapes.get(str(output.name))) for node in graph for output in node.outputs)
        self._shapes = {value: shape for value, shape in made if shape is not None}
        self.lays: dict[ir.Value, Lay] = {}
        self._contents: dict[ir.Value, Content | None] = {}

    def lay(self, value: ir.Value | None) -> Lay:
        return CONSTANT if value is None else self.lays.get(value, CONSTANT)

    def visit(self, graph: ir.Graph) -> None:
        """Follow all nodes of a graph, which are in topological order."""
        for node in graph:
            try:
                lays = self._outputs(node)
            except MixedError as e:
                lays = [Lay(mixed=f"{node.name!r} ({node.op_type}) {e}")] * len(node.outputs)
            self.lays.update(zip(node.outputs, lays, strict=True))
            if any(self._shape(value) is None for value in node.outputs):
                self._infer(node)

    def _outputs(self, node: ir.Node) -> Sequence[Lay]:
        site = Site(node, self._size, [self._sample(value) for value in node.inputs])
        if node.op_type == "If" and node.domain in ("", "ai.onnx"):
            return self._branches(node)
        captured = [self._sample(value) for value in _captured(node)]
        if any(sample.varies for sample in captured):
            raise MixedError("has a graph that is not followed")
        if len(node.outputs) == 1:
            self._contents[node.outputs[0]] = self._content(node, site)
            if self._contents[node.outputs[0]] is not None:
                return [CONSTANT]
        return follow(site)

    def _branches(self, node: ir.Node) -> Sequence[Lay]:
        """Both branches, whose results must lie alike; the condition must be the same for all batches."""
        condition = self._sample(node.inputs[0])
        if condition.lay.mixed:
            return [Lay(mixed=condition.lay.mixed)] * len(node.outputs)
        if condition.varies:
            raise MixedError("takes its branch by a sample or by the size of the batch")
        graphs = [attribute.as_graph() for attribute in node.attributes.values()]
        known = None if condition.content is None else bool(condition.content.reshape(-1)[0].number)
        if known is not None:
            graphs = [node.attributes["then_branch" if known else "else_branch"].as_graph()]
        found: list[list[Lay]] = []
        for graph in graphs:
            self.visit(graph)
            found.append([self.lay(value) for value in graph.outputs])
            if any(self._sample(value).counts for value in graph.outputs):
                raise MixedError("gives the size of the batch")
        for output, *values in zip(node.outputs, *(graph.outputs for graph in graphs), strict=True):
            shape = self._shape(values[0])
            if shape is not None and all(self._shape(value) == shape for value in values):
                self._shapes.setdefault(output, shape)
        if found[0] != found[-1]:
            raise MixedError(
                next((lay.mixed for lays in found for lay in lays if lay.mixed), "has branches that differ")
            )
        return found[0]

    def _sample(self, value: ir.Value | None) -> Samples:
        if value is None:
            return Samples(None)
        return Samples(str(value.name), self.lay(value), self._shape(value), self._known(value))

    def _shape(self, value: ir.Value) -> tuple[int, ...] | None:
        content = self._contents.get(value)
        if content is not None:
            return content.shape
        shape = static_shape(value)
        return self._shapes.get(value) if shape is None else shape

    def _infer(self, node: ir.Node) -> None:
        """Infer shapes behind a node that shape arithmetic feeds, from the numbers that it gives."""
        samples = [self._sample(value) for value in node.inputs]
        if any(sample.name is not None and sample.shape is None for sample in samples) or _graphs(node):
            return
        found: list[ir.Value | None] = []
        for i, (value, sample) in enumerate(zip(node.inputs, samples, strict=True)):
            if value is None or sample.shape is None:
                found.append(None)
                continue
            copied = ir.Value(name=f"input {i}", type=value.type, shape=ir.Shape(sample.shape))
            found.append(copied)
            if sample.content is not None and value.dtype is not None:
                numbers = [n.factor * self._size if isinstance(n, Times) else n for n in sample.numbers]
                array = np.array(numbers, value.dtype.numpy()).reshape(sample.shape)
                copied.const_value = ir.Tensor(array, dtype=value.dtype, name=f"input {i}")
        names = [f"output {i}" for i in range(len(node.outputs))]
        copy = ir.Node(node.domain, node.op_type, found, node.attributes.values(), num_outputs=len(names), name="node")
        for output, name in zip(copy.outputs, names, strict=True):
            output.name = name
        given = [value for value in found if value is not None]
        graph = ir.Graph(
            [value for value in given if value.const_value is None], copy.outputs, nodes=[copy],
            initializers=[value for value in given if value.const_value is not None], name="node",
            opset_imports=self._opsets,
        )  # fmt: skip
        infer_shapes(ir.Model(graph, ir_version=10))
        for old, new in zip(node.outputs, graph.outputs, strict=True):
            shape = static_shape(new)
            if shape is not None:
                self._shapes.setdefault(old, shape)

    def _known(self, value: ir.Value) -> Content | None:
        """Entries of a small constant, or of what shape arithmetic gives."""
        if value not in self._contents:
            constant = value.const_value if value.is_initializer() and not value.is_graph_input() else None
            self._contents[value] = None if constant is None else constant_content(constant)
        return self._contents[value]

    def _content(self, node: ir.Node, site: Site) -> Content | None:
        if node.op_type in ("Shape", "Size") and node.domain in ("", "ai.onnx"):
            return _sizes(site)
        contents = [sample.content for sample in site.inputs]
        if node.op_type != "Cast" or contents[0] is None:
            return evaluate(node, contents)
        entries = contents[0].reshape(-1)
        symbols = {i: entry for i, entry in enumerate(entries) if isinstance(cast("object", entry.number), Times)}
        if symbols and node.attributes.get_int("to", 0) not in _WIDE:
            return None
        plain = contents[0].copy().reshape(-1)
        for i in symbols:
            plain[i] = Entry(0)
        result = evaluate(node, [plain.reshape(contents[0].shape)])
        if result is not None:
            for i, entry in symbols.items():
                result.reshape(-1)[i] = entry
        return result


def _sizes(site: Site) -> Content | None:
    """Shape or Size of a value."""
    sample = site.inputs[0]
    if sample.shape is None or (sample.lay.mixed and sample.lay.axis is None):
        return None
    sizes: Sequence[Any] = site.sizes(0)
    if site.node.op_type == "Size":
        total: Any = 1
        for size in sizes:
            total = size * total
        sizes = [total]
    else:
        start, end = site.node.attributes.get_int("start", 0), site.node.attributes.get_int("end", len(sizes))
        sizes = sizes[start:end]
    content = np.empty(len(sizes), dtype=object)
    for i, size in enumerate(sizes):
        content[i] = Entry(cast("int", size))
    return content.reshape(()) if site.node.op_type == "Size" else content


def _graphs(node: ir.Node) -> list[ir.Graph]:
    found: list[ir.Graph] = []
    for attribute in node.attributes.values():
        if attribute.type == ir.AttributeType.GRAPH:
            found.append(attribute.as_graph())
        elif attribute.type == ir.AttributeType.GRAPHS:
            found.extend(attribute.as_graphs())
    return found


def _captured(node: ir.Node) -> Iterable[ir.Value | None]:
    """Values that the graphs of a node read, their own among them."""
    for graph in _graphs(node):
        yield from graph.outputs
        for inner in graph.all_nodes():
            yield from inner.inputs
