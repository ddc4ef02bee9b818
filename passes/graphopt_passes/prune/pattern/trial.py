"""A model that runs with other weights in some layers, to see what becomes of its outputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from graphopt.analyses import CONSTANTS, COST
from graphopt.analyses.names import Names
from graphopt.pass_base import Context
from graphopt.reference import Feed
from graphopt_passes.prune.allocation.rerun import Rerun, free_weight
from graphopt_passes.prune.allocation.sensitivity import add_offset
from graphopt_passes.prune.pattern.sites import Site

__all__ = ["Replacement", "Trial"]

_SAMPLES = 64
_FEWEST_SAMPLES = 8
_MACS = 1e12
_MOST_BYTES = 1 << 30


@dataclass(frozen=True, eq=False)
class Replacement:
    """A weight in the place of another.

    Attributes:
        matrix: `[groups, inputs, outputs]` in the order of the site.
        offset: `[groups, outputs]`, added to what the layer makes if it can take that; `[]` zero: nothing.
        error: Error of the layer's output in parts of its energy.
    """

    matrix: np.ndarray
    offset: np.ndarray
    error: float


class Trial:
    """Runs calibration samples with other weights in some layers.

    Weights are inputs of one session, which serves all runs. Time is bounded by counting multiply-accumulates.

    Args:
        model: The model; it does not change.
        sites: Weights that may be replaced.
        offsets: Names of sites whose layer can take a number for each output channel as well.
        runs: How often it will run.
        ctx: Where samples come from.
    """

    def __init__(
        self, model: ir.Model, sites: Sequence[Site], offsets: Mapping[str, bool], runs: int, ctx: Context
    ) -> None:
        copy, self._inputs, self._offsets = model.clone(), Feed(), dict[str, str]()
        nodes, names = {label: node for node, label in Names(copy).labels.items()}, ctx.fact(CONSTANTS).names
        self.known = {site.name for site in _replaceable(model, sites)}
        for site in sites:
            if site.name in self.known and offsets[site.name]:
                self._offsets[site.name] = add_offset(copy, nodes[names.label(site.node)], self._inputs)
            elif site.name in self.known:
                free_weight(copy, copy.graph.initializers[site.value.name or ""], self._inputs)
        if ctx.calibration is None:
            raise TypeError("a trial needs samples")
        most = _MACS / (max(1, ctx.fact(COST).macs) * max(1, runs))
        samples = int(np.clip(most, _FEWEST_SAMPLES, _SAMPLES))
        self._rerun = Rerun(copy, self._inputs, ctx.calibration, samples, ctx)

    def change(self, replaced: Mapping[Site, Replacement]) -> float:
        """How far the outputs move, in parts of their energy, if some weights are others.

        Args:
            replaced: What takes the place of weights; sites that are not known stay as they are.
        """
        inputs = dict(self._inputs)
        for site, other in replaced.items():
            if site.name in self.known:
                name = site.value.name or ""
                inputs[name] = site.layout.array(other.matrix, inputs[name].shape).astype(inputs[name].dtype)
            if (name := self._offsets.get(site.name)) is not None and other.offset.any():
                inputs[name] = other.offset.reshape(inputs[name].shape).astype(inputs[name].dtype)
        return self._rerun.moved(inputs)


def _replaceable(model: ir.Model, sites: Sequence[Site]) -> list[Site]:
    """Sites whose weight is an initializer of the main graph, as long as memory holds them all twice."""
    found, total = list[Site](), 0
    for site in sites:
        total += site.tensor.nbytes
        if model.graph.initializers.get(site.value.name or "") is site.value and total <= _MOST_BYTES:
            found.append(site)
    return found
