"""A model that runs with other weights in some layers, to see what becomes of its outputs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from graphopt.analyses import CONSTANTS, COST
from graphopt.analyses.names import Names
from graphopt.pass_base import Context
from graphopt.reference import Feed, Reference
from graphopt_passes.prune.allocation.sensitivity import add_offset
from graphopt_passes.prune.criteria.output import output_distance
from graphopt_passes.prune.pattern.sites import Site

__all__ = ["Replacement", "Trial"]

_SAMPLES = 64
_FEWEST_SAMPLES = 8
_BATCH = 8
_MACS = 1e12
_MOST_BYTES = 1 << 30
_KEPT_BYTES = 256 << 20


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
                _feed_weight(copy, site, self._inputs)
        self._session = Reference(copy, threads=ctx.threads, extensions=ctx.extensions)
        most = _MACS / (max(1, ctx.fact(COST).macs) * max(1, runs))
        self._feeds, self._wanted = list[Feed](), list[Feed]()
        for feed, outputs in self._runs(int(np.clip(most, _FEWEST_SAMPLES, _SAMPLES)), ctx):
            self._feeds.append(feed)
            self._wanted.append(outputs)

    def _runs(self, samples: int, ctx: Context) -> Iterator[tuple[Feed, Feed]]:
        """Batches with their outputs, until there are enough or they fill memory."""
        if ctx.calibration is None:
            raise TypeError("a trial needs samples")
        kept = 0
        for feed in ctx.calibration.batches(_BATCH, samples):
            outputs = self._session.run({**feed, **self._inputs})
            yield feed, outputs
            kept += sum(np.asarray(array).nbytes for array in outputs.values())
            if kept > _KEPT_BYTES:
                return

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
        found = [self._session.run({**feed, **inputs}) for feed in self._feeds]
        keys = list(self._wanted[0])
        return float(np.mean([output_distance([w[k] for w in self._wanted], [f[k] for f in found]) for k in keys]))


def _replaceable(model: ir.Model, sites: Sequence[Site]) -> list[Site]:
    """Sites whose weight is an initializer of the main graph, as long as memory holds them all twice."""
    found, total = list[Site](), 0
    for site in sites:
        total += site.tensor.nbytes
        if model.graph.initializers.get(site.value.name or "") is site.value and total <= _MOST_BYTES:
            found.append(site)
    return found


def _feed_weight(model: ir.Model, site: Site, inputs: Feed) -> None:
    """Make an initializer an input of the model."""
    name = site.value.name or ""
    value, tensor = model.graph.initializers.pop(name), site.tensor
    inputs[name] = tensor.numpy()
    value.const_value, value.type, value.shape = None, ir.TensorType(tensor.dtype), ir.Shape(inputs[name].shape)
    model.graph.inputs.append(value)
