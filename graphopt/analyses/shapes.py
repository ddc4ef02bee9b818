"""Types and shapes of all values, as ONNX shape inference gives them."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir
from onnx_ir.passes.common import ShapeInferencePass

from graphopt.model_io import input_specs
from graphopt.pass_base import Analysis, Context

__all__ = ["SHAPES", "Shapes", "ShapesAnalysis"]

Dims = tuple[int | str | None, ...]
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Shapes:
    """Shapes and element types by value name; a dimension is a size, a name, or None where nothing is known."""

    shapes: Mapping[str, Dims]
    types: Mapping[str, ir.DataType]

    def of(self, value: ir.Value | None) -> Dims | None:
        """Shape of a value, None if even the rank is unknown."""
        return None if value is None else self.shapes.get(value.name or "")

    def static(self, value: ir.Value | None) -> tuple[int, ...] | None:
        """Shape of a value if every dimension is a number."""
        dims = self.of(value)
        return None if dims is None or not all(isinstance(d, int) for d in dims) else tuple(map(int, dims))  # type: ignore[arg-type]

    def rank(self, value: ir.Value | None) -> int | None:
        """Rank of a value."""
        dims = self.of(value)
        return None if dims is None else len(dims)

    def dtype(self, value: ir.Value | None) -> ir.DataType | None:
        """Element type of a value."""
        return None if value is None else self.types.get(value.name or "")


@dataclass(frozen=True)
class ShapesAnalysis(Analysis[Shapes]):
    """Infer shapes on a copy; weights are neither copied nor read.

    Attributes:
        concrete: True: inputs take the sizes the user fixed, and 1 where a dimension stays open, so that costs are
            numbers. False: dynamic dimensions keep their names.
    """

    name: ClassVar[str] = "shapes"
    concrete: bool = False

    def compute(self, model: ir.Model, ctx: Context) -> Shapes:
        """Infer shapes and types of all values, subgraphs included."""
        copy = model.clone()
        if self.concrete:
            for spec in input_specs(copy):
                value = next(v for v in copy.graph.inputs if v.name == spec.name)
                if value.shape is not None:
                    value.shape = ir.Shape(spec.concrete(ctx.binding))
            for graph in copy.graphs():
                for node in graph:
                    for output in node.outputs:
                        output.shape = None
        try:
            ShapeInferencePass()(copy)
        except Exception as e:  # the C++ checker raises its own types; what it cannot infer stays unknown
            _log.warning("shape inference stopped early: %s", e)
        shapes: dict[str, Dims] = {}
        types: dict[str, ir.DataType] = {}
        for graph in copy.graphs():
            for value in _values(graph):
                if value.name and value.shape is not None:
                    shapes[value.name] = tuple(d if isinstance(d, int) else d.value for d in value.shape)
                if value.name and value.dtype is not None:
                    types[value.name] = value.dtype
        return Shapes(shapes, types)


def _values(graph: ir.Graph) -> list[ir.Value]:
    for value in graph.initializers.values():
        if value.const_value is not None:
            value.shape, value.dtype = ir.Shape(value.const_value.shape), value.const_value.dtype
    outputs = [output for node in graph for output in node.outputs]
    return [*graph.inputs, *graph.initializers.values(), *outputs]


SHAPES = ShapesAnalysis()
CONCRETE_SHAPES = ShapesAnalysis(concrete=True)
