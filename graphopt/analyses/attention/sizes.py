"""Sizes of a model's values at two settings of its open dimensions, and the small numbers computed from them.

Two sizes that agree at both settings count as the same size, one that is the same at both as fixed. The settings give
every open dimension a prime number of its own, so that products of sizes come apart again in one way only.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from graphopt.analyses.attention.observed import Probe
from graphopt.analyses.attention.settings import Setting, settings, settings_at, written_sizes
from graphopt.analyses.channels.rules.reshape import Block, match_blocks
from graphopt.analyses.channels.shape_values import Content, Entry, constant_content, evaluate, numbers
from graphopt.analyses.constants import CONSTANTS, Constants
from graphopt.analyses.shapes import CONCRETE_SHAPES, SHAPES, Shapes
from graphopt.model_io import input_specs
from graphopt.pass_base import Context

__all__ = ["Pair", "Sizes", "measure"]

Pair = tuple[float, float]
"""A number at either setting."""

_DEPTH = 64


@dataclass(frozen=True)
class Sizes:
    """What is known about sizes.

    Attributes:
        shapes: Shapes at the two settings.
        inferred: Shapes with names, for where a setting tells nothing.
        constants: Constants of the model.
        inputs: Shapes of the model's inputs at the two settings.
    """

    shapes: tuple[Shapes, Shapes]
    inferred: Shapes
    constants: Constants
    inputs: tuple[Mapping[str, tuple[int, ...]], Mapping[str, tuple[int, ...]]]
    _contents: tuple[dict[ir.Value, Content | None], dict[ir.Value, Content | None]] = field(
        default_factory=lambda: ({}, {})
    )

    def rank(self, value: ir.Value | None) -> int | None:
        """Rank of a value."""
        tensor = self.constants.of(value)
        if tensor is not None:
            return len(tensor.shape)
        known = self.shapes[0].rank(value)
        return self.inferred.rank(value) if known is None else known

    def size(self, value: ir.Value | None, axis: int) -> Pair | None:
        """Size of an axis, None if unknown."""
        tensor = self.constants.of(value)
        if tensor is not None:
            size = int(tensor.shape.numpy()[axis])
            return size, size
        pair = [self._size(shapes, value, axis) for shapes in self.shapes]
        return None if pair[0] is None or pair[1] is None else (pair[0], pair[1])

    def _size(self, shapes: Shapes, value: ir.Value | None, axis: int) -> int | None:
        dims = shapes.of(value) or self.inferred.of(value)
        dim = dims[axis] if dims is not None and -len(dims) <= axis < len(dims) else None
        return dim if isinstance(dim, int) else None

    def fixed(self, value: ir.Value | None, axis: int) -> int | None:
        """Size of an axis that does not depend on the inputs' open dimensions."""
        pair = self.size(value, axis)
        return int(pair[0]) if pair is not None and pair[0] == pair[1] else None

    def blocks(self, old: ir.Value | None, new: ir.Value | None) -> list[Block] | None:
        """Axes of two values that hold the same elements in the same order, matched; None if that cannot be told."""
        found: list[list[Block]] = []
        for shapes in (*self.shapes, self.inferred):
            a, b = shapes.of(old), shapes.of(new)
            if a is None or b is None:
                continue
            match = match_blocks(a, b)
            if sum(len(x) for x, _ in match) == len(a) and sum(len(y) for _, y in match) == len(b):
                found.append(match)
        return found[0] if found and all(match == found[0] for match in found[: len(self.shapes)]) else None

    def number(self, value: ir.Value | None) -> Pair | None:
        """The one number that a value consists of at either setting, None where it is more or depends on data."""
        known = self._numbers(value)
        if known[0] is None or known[1] is None or len(known[0]) != 1 or len(known[1]) != 1:
            return None
        return known[0][0], known[1][0]

    def content(self, value: ir.Value | None) -> tuple[float, ...] | None:
        """Numbers of a small value that depend on no size and no data."""
        pair = self._numbers(value)
        return pair[0] if pair[0] == pair[1] else None

    def _numbers(self, value: ir.Value | None) -> tuple[tuple[float, ...] | None, tuple[float, ...] | None]:
        """What a value holds at either setting; without open dimensions both are one."""
        first = numbers(self._contents_of(value, 0, _DEPTH))
        alike = self.shapes[0] is self.shapes[1]
        return first, first if alike else numbers(self._contents_of(value, 1, _DEPTH))

    def _contents_of(self, value: ir.Value | None, side: int, depth: int) -> Content | None:
        if value is None or depth == 0:
            return None
        known = self._contents[side]
        if value not in known:
            known[value] = None  # a cycle through a loop ends here
            known[value] = self._computed(value, side, depth)
        return known[value]

    def _computed(self, value: ir.Value, side: int, depth: int) -> Content | None:
        tensor, producer = self.constants.of(value), value.producer()
        if tensor is not None:
            return constant_content(tensor)
        if producer is None or value is not producer.outputs[0]:
            return None
        if producer.op_type == "Shape":
            return self._shape(producer, side)
        return evaluate(producer, [self._contents_of(v, side, depth - 1) for v in producer.inputs])

    def _shape(self, node: ir.Node, side: int) -> Content | None:
        rank = self.rank(node.inputs[0])
        if rank is None:
            return None
        start, end = node.attributes.get_int("start", 0), node.attributes.get_int("end", rank)
        entries = [Entry(self._size(self.shapes[side], node.inputs[0], axis)) for axis in range(rank)][start:end]
        packed = np.empty(len(entries), dtype=object)
        packed[:] = entries
        return packed


def measure(model: ir.Model, ctx: Context) -> Sizes:
    """Find sizes at two settings: the first ones that tell the sizes of all values, else those that tell most.

    A model that runs at none of them may run at a size that its exporter wrote down: those are tried last.

    Args:
        model: The model.
        ctx: For facts about it; sizes that the user fixed stay.
    """
    inferred, constants, specs = ctx.fact(SHAPES), ctx.fact(CONSTANTS), input_specs(model)
    if not any(isinstance(d, str) for spec in specs for d in spec.bound(ctx.binding) or ()):
        shapes = ctx.fact(CONCRETE_SHAPES)
        inputs = {spec.name: spec.concrete(ctx.binding) for spec in specs}
        return Sizes((shapes, shapes), inferred, constants, (inputs, inputs))
    computed, probe = [value for node in model.graph for value in node.outputs if value.name], Probe(model, ctx)

    def at(pair: Setting, seen: tuple[Shapes, Shapes]) -> Sizes:
        inputs, others = ({spec.name: spec.concrete(binding) for spec in specs} for binding in pair)
        return Sizes(seen, inferred, constants, (inputs, others))

    found, ran = list[tuple[int, Sizes]](), False
    for pair in settings(specs, ctx.binding):
        runs = [probe.observed(setting) for setting in pair]
        ran = ran or None not in runs
        seen = runs[0] or probe.inferred(pair[0]), runs[1] or probe.inferred(pair[1])
        untold = sum(not _tells(shapes, value) for shapes in seen for value in computed)
        found.append((untold, at(pair, seen)))
        if not untold:
            break
    if probe.failed and not ran:
        for pair in settings_at(written_sizes(model, constants), specs, ctx.binding):
            if (first := probe.observed(pair[0])) and (second := probe.observed(pair[1])):
                return at(pair, (first, second))
    return min(found, key=lambda entry: entry[0])[1]


def _tells(shapes: Shapes, value: ir.Value) -> bool:
    """Whether a setting tells the sizes of a value, and leaves a softmax more than one number."""
    sizes = shapes.static(value)
    single = sizes is not None and sizes[-1:] == (1,)
    return (
        sizes is not None and 0 not in sizes and not (single and any(n.op_type == "Softmax" for n in value.consumers()))
    )
