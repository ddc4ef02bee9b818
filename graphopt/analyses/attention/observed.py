"""Shapes of a model's values at one setting of its open dimensions after another, seen in ONNX Runtime."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import cached_property

import numpy as np
import onnx_ir as ir

from graphopt.analyses._light_weights import elements, shrink_matrices
from graphopt.analyses.shapes import CONCRETE_SHAPES, SHAPES, Shapes
from graphopt.errors import GraphoptError
from graphopt.model_io import InputSpec, ShapeBinding, input_specs
from graphopt.pass_base import Context
from graphopt.reference import Reference, random_feed

__all__ = ["Probe"]

_LARGE = 1 << 20  # elements of weights that are worth leaving out
_ELEMENTS_A_NODE = 200  # of inputs, up to which running a node is faster than inferring what it makes


class Probe:
    """One session that tells all shapes, which is opened once for all settings.

    Where it cannot run, and in models with graphs inside nodes, of which a session tells nothing, shapes are inferred.

    Args:
        model: The model; it does not change.
        ctx: For facts about it.

    Attributes:
        failed: Whether the model did not run at some setting.
    """

    def __init__(self, model: ir.Model, ctx: Context) -> None:
        self._model = model
        self._ctx = ctx
        self._inferred = ctx.fact(SHAPES)
        self._names = sorted({value.name for node in model.graph for value in node.outputs if value.name})
        self.failed = False

    def observed(self, binding: ShapeBinding) -> Shapes | None:
        """Shapes of all values where inputs have these sizes.

        None where the model does not run, or running it would take longer than inference.
        """
        fed = sum(math.prod(spec.concrete(binding)) for spec in self._specs)
        if fed > _ELEMENTS_A_NODE * len(self._model.graph) or self._session is None:
            return None
        feed = random_feed(self._specs, binding, np.random.default_rng(0))
        try:
            seen = self._session.run(feed, self._names)
        except GraphoptError as e:
            self.failed = True
            self._ctx.log.debug("shapes are inferred where %s", e)
            return None
        found = {name: np.shape(array) for name, array in (*feed.items(), *seen.items()) if hasattr(array, "shape")}
        known = {name: dims for name, dims in self._inferred.shapes.items() if name not in self._computed}
        return Shapes({**known, **found}, self._inferred.types, self._inferred.names)

    def inferred(self, binding: ShapeBinding) -> Shapes:
        """The same without running it."""
        return CONCRETE_SHAPES.compute(self._model, replace(self._ctx, binding=binding, _facts={}))

    @cached_property
    def _specs(self) -> tuple[InputSpec, ...]:
        return input_specs(self._model)

    @cached_property
    def _computed(self) -> frozenset[str]:
        return frozenset(self._names)

    @cached_property
    def _session(self) -> Reference | None:
        if len(self._inferred.names.scopes) != 1 or any(spec.dtype == ir.DataType.STRING for spec in self._specs):
            return None
        copy = self._model.clone()
        if elements(copy) > _LARGE:
            shrink_matrices(copy)
        taken = {value.name for value in copy.graph.outputs}
        found = (value for node in copy.graph for value in node.outputs)
        copy.graph.outputs.extend(value for value in found if value.name in self._computed and value.name not in taken)
        try:
            return Reference(copy, threads=self._ctx.threads, optimize=False, extensions=self._ctx.extensions)
        except GraphoptError as e:
            self._ctx.log.debug("shapes are inferred where %s", e)
            return None
