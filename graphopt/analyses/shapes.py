"""Types and shapes of all values: inferred by ONNX, and observed in ONNX Runtime where inference gives up."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import ShapeInferencePass

from graphopt.analyses._contrib_shapes import stand_in
from graphopt.analyses._light_weights import elements, shrink_matrices
from graphopt.analyses._subgraph_shapes import carried_values, infer_carried, lend_constants
from graphopt.analyses.constants import CONSTANTS
from graphopt.analyses.names import Names
from graphopt.errors import GraphoptError
from graphopt.model_io import input_specs
from graphopt.pass_base import Analysis, Context
from graphopt.reference import Reference, random_feed

__all__ = ["CONCRETE_SHAPES", "SHAPES", "Shapes", "ShapesAnalysis"]

Dims = tuple[int | str | None, ...]
_LARGE = 1 << 22  # elements of weights that are not read for shapes only
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Shapes:
    """Shapes and element types by value name; a dimension is a size, a name, or None where nothing is known.

    Attributes:
        shapes: Shapes of values whose rank is known, subgraphs included.
        types: Element types.
        names: What a value is called where two graphs use one name.
    """

    shapes: Mapping[str, Dims]
    types: Mapping[str, ir.DataType]
    names: Names = field(default_factory=Names)

    def of(self, value: ir.Value | None) -> Dims | None:
        """Shape of a value, None if even the rank is unknown."""
        return None if value is None else self.shapes.get(self.names.key(value))

    def static(self, value: ir.Value | None) -> tuple[int, ...] | None:
        """Shape of a value if every dimension is a number."""
        dims = self.of(value)
        if dims is None:
            return None
        sizes = tuple(d for d in dims if isinstance(d, int))
        return sizes if len(sizes) == len(dims) else None

    def rank(self, value: ir.Value | None) -> int | None:
        """Rank of a value."""
        dims = self.of(value)
        return None if dims is None else len(dims)

    def dtype(self, value: ir.Value | None) -> ir.DataType | None:
        """Element type of a value."""
        return None if value is None else self.types.get(self.names.key(value))


@dataclass(frozen=True)
class ShapesAnalysis(Analysis[Shapes]):
    """Infer shapes on a copy; weights are neither copied nor read.

    Attributes:
        concrete: True: inputs take the sizes the user fixed, and 1 where a dimension stays open, so that costs are
            numbers; what inference cannot follow (shapes computed by the graph) is observed by running the model
            once on random values. False: dynamic dimensions keep their names.
    """

    name: ClassVar[str] = "shapes"
    concrete: bool = False

    def compute(self, model: ir.Model, ctx: Context) -> Shapes:
        """Infer shapes and types of all values, subgraphs included."""
        copy, names, lent = model.clone(), Names(model), frozenset[ir.Value]()
        if len(names.scopes) > 1:
            _rename(copy)
            lent = lend_constants(copy, CONSTANTS.compute(copy, ctx))
        stand_in(copy)
        declared: dict[ir.Value, Dims] = _fix_inputs(copy, ctx) if self.concrete else {}
        _infer(copy)
        if self.concrete and (open_values := [v for v in _computed(copy.graph) if not _is_static(v)]):
            _observe(model, copy, open_values, ctx)
            if not all(_is_told(value) for graph in copy.graphs() for value in _computed(graph)):
                _infer(copy)
        for value, dims in declared.items():
            if not _is_static(value):
                value.shape = ir.Shape(dims)
        shapes: dict[str, Dims] = {}
        types: dict[str, ir.DataType] = {}
        for graph in copy.graphs():
            for value in (*graph.inputs, *graph.initializers.values(), *_computed(graph)):
                if value in lent:
                    continue
                if value.name and value.shape is not None:
                    shapes[value.name] = tuple(d if isinstance(d, int) else d.value for d in value.shape)
                if value.name and value.dtype is not None:
                    types[value.name] = value.dtype
        return Shapes(shapes, types, names)


def _rename(model: ir.Model) -> None:
    """Call every value what the original's is called in facts; tensors are shared, and keep their names."""
    for value, name in Names(model).renamed.items():
        tensor = value.const_value
        stored = None if tensor is None else tensor.name
        value.name = name
        if tensor is not None:
            tensor.name = stored


def _fix_inputs(model: ir.Model, ctx: Context) -> dict[ir.Value, Dims]:
    """Give inputs their sizes and forget everything else.

    Returns:
        What was written down for values inside subgraphs, with the sizes that the inputs fix: to fall back on where
        inference gives up.
    """
    specs = [spec for spec in input_specs(model) if spec.shape is not None]
    concrete = {spec.name: spec.concrete(ctx.binding) for spec in specs}
    sizes: dict[int | str | None, int] = {}
    for spec in specs:
        sizes.update(zip(spec.shape or (), concrete[spec.name], strict=True))
    for value in model.graph.inputs:
        if value.name in concrete:
            value.shape = ir.Shape(concrete[value.name])
    declared: dict[ir.Value, Dims] = {}
    for graph in model.graph.subgraphs():
        for value in (*graph.inputs, *_computed(graph)):
            if value.shape is not None:
                dims = (d if isinstance(d, int) else d.value for d in value.shape)
                declared[value] = tuple(sizes.get(d, d) for d in dims)
    for graph in model.graphs():
        for value in _computed(graph):
            value.shape = None
    for carried in carried_values(model):
        carried.start.shape = None
    return declared


def _infer(model: ir.Model) -> None:
    for graph in model.graphs():
        for value in graph.initializers.values():
            if value.const_value is not None:
                value.shape, value.dtype = ir.Shape(value.const_value.shape.numpy()), value.const_value.dtype
    leniently = ShapeInferencePass(strict_mode=False)  # one node that makes no sense leaves all others their shapes
    leniently(model)
    infer_carried(model, leniently)


def _observe(model: ir.Model, copy: ir.Model, values: list[ir.Value], ctx: Context) -> None:
    """Run once with `values` as further outputs and write down their shapes; a model that cannot run tells nothing."""
    probe = model.clone()
    if elements(model) > _LARGE:
        shrink_matrices(probe)
    wanted = {value.name for value in values} & {value.name for value in _computed(probe.graph)}
    taken = {value.name for value in probe.graph.outputs}
    probe.graph.outputs.extend(v for v in _computed(probe.graph) if v.name in wanted - taken)
    feed = random_feed(input_specs(model), ctx.binding, np.random.default_rng(0))
    names = sorted(name for name in wanted if name)
    try:
        seen = Reference(probe, threads=ctx.threads, optimize=False, extensions=ctx.extensions).run(feed, names)
    except GraphoptError as e:
        _log.info("shapes of %d values stay unknown: %s", len(values), e)
        return
    for value in _computed(copy.graph):
        if value.name in seen and hasattr(seen[value.name], "shape"):
            value.shape = ir.Shape(seen[value.name].shape)


def _is_static(value: ir.Value) -> bool:
    return value.shape is not None and value.shape.is_static()


def _is_told(value: ir.Value) -> bool:
    """Whether inference can say nothing more of a value."""
    return _is_static(value) and value.dtype is not None


def _computed(graph: ir.Graph) -> Iterator[ir.Value]:
    return (output for node in graph for output in node.outputs if output.name)


SHAPES = ShapesAnalysis()
CONCRETE_SHAPES = ShapesAnalysis(concrete=True)
