"""How many weights each layer loses where layers may differ: by what the outputs lose, or by weights alone.

With samples the second moments of what a layer reads say what its output loses at each density once the weights that
are kept have made up for the others. What becomes of that further on is measured: the layer alone is made that sparse,
and the model is run. The budget is then spread so that the sum over all layers is least (`graphopt.allocation`).
Magnitudes spread it nearly as well on many networks, and better on some.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import onnx_ir as ir

from graphopt.allocation import Site as Choice
from graphopt.allocation import allocate
from graphopt.pass_base import Context
from graphopt_passes.prune.allocation.sensitivity import cost_curve
from graphopt_passes.prune.pattern.fit import Fitted, Method, Shifter, layer_of
from graphopt_passes.prune.pattern.obs import Rule, norm_scores
from graphopt_passes.prune.pattern.sites import Site
from graphopt_passes.prune.pattern.trial import Replacement, Trial
from graphopt_passes.prune.refit.linear_layers import LinearLayer

__all__ = ["by_sensitivity", "spread"]

Array = np.ndarray[Any, np.dtype[Any]]

_STEPS = 1000
_SPARSITIES = (0.0, 0.2, 0.4, 0.5, 0.6, 0.7, 0.75, 0.8, 0.85, 0.9, 0.93, 0.95, 0.965, 0.975, 0.985, 0.99, 0.995, 0.998)
_DEPTHS = (3.0, 1.0, 1 / 3)
"""Densities at which the model is run, in parts of the one that is wanted on average."""
_BETWEEN = 6


def spread(sites: Sequence[Site], ratio: float) -> list[int]:
    """How many weights each site loses so that those lost matter least, by layer-adaptive magnitude.

    A weight's score is its square over those of the layer's weights that are as large or larger (LAMP, Lee et al.,
    2021), so that no layer is emptied before the others. Scores are looked at in steps of a thousandth of a layer.
    """
    scores, sizes = list[Array](), list[Array]()
    for site in sites:
        squares = np.sort(np.square(site.tensor.numpy().astype(np.float64)), axis=None)
        left = np.maximum(np.cumsum(squares[::-1])[::-1], np.finfo(np.float64).tiny)
        edges = np.unique(np.linspace(0, site.size, _STEPS + 1).astype(np.int64))
        scores.append((squares / left)[edges[:-1]])
        sizes.append(np.diff(edges))
    missing, counts = round(ratio * sum(site.size for site in sites)), [0] * len(sites)
    owners = np.repeat(np.arange(len(sites)), [len(found) for found in scores])
    every, amounts = np.concatenate([np.zeros(0), *scores]), np.concatenate([np.zeros(0, np.int64), *sizes])
    for step in np.argsort(every, kind="stable"):
        taken = min(missing, int(amounts[step]))
        counts[owners[step]] += taken
        missing -= taken
    return counts


def by_sensitivity(model: ir.Model, sites: Sequence[Site], ratio: float, method: Method, ctx: Context) -> list[int]:
    """How many weights each site loses so that the outputs of the model lose least.

    Errors of layers do not simply add up. So three plans are tried on all layers together, and the best is taken: the
    one of least sum, that of `spread`, and the one halfway between them.

    Args:
        model: The model; it does not change.
        sites: Weights that become sparse.
        ratio: Fraction of zeros in all of them together.
        method: How weights are judged within a layer.
        ctx: Holds the calibration data.

    Raises:
        ModelError: ONNX Runtime cannot run the model.
    """
    if not sites:
        return []
    bench = _Bench.of(model, sites, method, ctx)
    by_weights, by_outputs = spread(sites, ratio), _allocated(sites, _curves(bench, ratio), ratio)
    if by_outputs is None:
        return by_weights
    total = sum(by_weights)
    between = _trimmed([-(-(a + b) // 2) for a, b in zip(by_weights, by_outputs, strict=True)], total)
    plans = [by_outputs, between, by_weights]
    return plans[bench.best(plans)]


def _allocated(sites: Sequence[Site], curves: Sequence[Array], ratio: float) -> list[int] | None:
    """The counts of least cost in all; None where no rung is as sparse as that."""
    tables = [_refined(_rungs(site), curve) for site, curve in zip(sites, curves, strict=True)]
    choices = [Choice(site.name, n.astype(np.float64), c) for site, (n, c) in zip(sites, tables, strict=True)]
    wanted = round(ratio * sum(site.size for site in sites))
    found = allocate(choices, wanted)
    if not found.reached:
        return None
    return _trimmed([int(n[i]) for (n, _), i in zip(tables, found.choice, strict=True)], wanted)


def _trimmed(counts: list[int], wanted: int) -> list[int]:
    """Give back what is too much, where most was taken."""
    spare, kept = sum(counts) - wanted, list(counts)
    for i in sorted(range(len(kept)), key=lambda i: -kept[i]):
        given = min(spare, kept[i])
        kept[i] -= given
        spare -= given
    return kept


def _rungs(site: Site) -> Array:
    """Numbers of zeros that are looked at, ascending from 0; one weight is left at least."""
    return np.unique(np.minimum(np.rint(np.array(_SPARSITIES) * site.size).astype(np.int64), site.size - 1))


def _refined(counts: Array, curve: Array) -> tuple[Array, Array]:
    """More rungs between those looked at; costs grow in proportion up to the first of these, then exponentially."""
    if len(counts) < 2:
        return counts, curve
    steps = [np.linspace(a, b, _BETWEEN + 1) for a, b in pairwise(counts)]
    found = np.unique(np.rint(np.concatenate(steps)).astype(np.int64))
    logs = np.log(np.maximum(curve[1:], np.finfo(np.float64).tiny))
    grown = np.exp(np.interp(found, counts[1:], logs))
    return found, np.where(found < counts[1], curve[1] * found / counts[1], grown)


def _curves(bench: _Bench, ratio: float) -> list[Array]:
    """`[rungs]` of each site: what the outputs lose, in parts of their energy."""
    predicted, measured = list[Array](), list[list[tuple[int, float]]]()
    for site in bench.ctx.progress(bench.sites, "measuring sensitivity"):
        counts = _rungs(site)
        predicted.append(np.array([bench.sparse(site, int(count)).error for count in counts]))
        depths = _depths(counts, site.size, ratio) if site.name in bench.trial.known else []
        measured.append([(i, bench.trial.change({site: bench.sparse(site, int(counts[i]))})) for i in depths])
    return _levelled(predicted, measured)


def _depths(counts: Array, size: int, ratio: float) -> list[int]:
    """Indices of the rungs around the density that is wanted, each once, ascending from 1."""
    wanted = [size * (1 - min(1.0, (1 - ratio) * part)) for part in _DEPTHS]
    nearest = {max(1, int(np.abs(counts - count).argmin())) for count in wanted}
    return sorted(rung for rung in nearest if rung < len(counts))


def _levelled(predicted: Sequence[Array], measured: Sequence[Sequence[tuple[int, float]]]) -> list[Array]:
    """Predictions at the level that was measured; those that no run told of at the level of the others."""
    known = [any(lost > 0 for _, lost in found) for found in measured]
    curves = [
        cost_curve(np.arange(len(one)), one, found) if told else one
        for one, found, told in zip(predicted, measured, known, strict=True)
    ]
    levels = [c[-1] / p[-1] for c, p, told in zip(curves, predicted, known, strict=True) if told and p[-1] > 0]
    level = float(np.median(levels)) if levels else 1.0
    return [c if told else np.maximum.accumulate(level * c) for c, told in zip(curves, known, strict=True)]


@dataclass(frozen=True, eq=False)
class _Bench:
    """Makes layers sparse as they stand in the whole model, and tries what becomes of it.

    Attributes:
        sites: Weights, in the order of the graph.
        layers: By name of the site, or why samples are of no use.
        method: How weights are judged.
        trial: Runs the model.
        shifter: Makes one layer after the other sparse.
        ctx: Holds the samples.
    """

    sites: Sequence[Site]
    layers: Mapping[str, LinearLayer | str]
    method: Method
    trial: Trial
    shifter: Shifter
    ctx: Context

    @classmethod
    def of(cls, model: ir.Model, sites: Sequence[Site], method: Method, ctx: Context) -> _Bench:
        layers = {site.name: layer_of(site, ctx) for site in sites}
        offsets = {name: isinstance(layer, LinearLayer) and layer.offset for name, layer in layers.items()}
        trial = Trial(model, sites, offsets, len(sites) * len(_DEPTHS), ctx)
        return cls(sites, layers, method, trial, Shifter(model, ctx), ctx)

    def best(self, plans: Sequence[Sequence[int]]) -> int:
        """Which of some plans for all sites costs the outputs least."""
        self.shifter.rewind()
        tried: list[dict[Site, Replacement]] = [{} for _ in plans]
        for i, site in enumerate(self.sites):
            for plan, replaced in zip(plans, tried, strict=True):
                replaced[site] = self.sparse(site, plan[i])
        return int(np.argmin([self.trial.change(replaced) for replaced in tried]))

    def sparse(self, site: Site, count: int) -> Replacement:
        """A site with so many zeros; where samples are of no use, the smallest weights go."""
        layer, rule = self.layers[site.name], Rule(count=count)
        found = layer if isinstance(layer, str) else self.shifter.fit(site, layer, self.method, rule)
        if isinstance(found, Fitted):
            error = 0.0 if not found.done else found.after
            if error is not None:
                return Replacement(found.weight, found.bias, error**2)
        weight = site.matrix()
        left = np.where(rule.drop(norm_scores(weight)), 0.0, weight)
        energy = max(float(np.square(weight).sum()), np.finfo(np.float64).tiny)
        return Replacement(left, np.zeros(()), float(np.square(weight - left).sum()) / energy)
