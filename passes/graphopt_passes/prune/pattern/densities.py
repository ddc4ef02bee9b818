"""How many weights each layer loses where layers may differ: by what the outputs lose, or by weights alone.

With samples the second moments of what a layer reads say what its output loses at each density once the weights that
are kept have made up for the others. What becomes of that further on is measured: the layer alone is made that sparse,
and the model is run. The budget is then spread so that the sum over all layers is least (`graphopt.allocation`). Errors
of layers do not simply add up, so magnitudes spread it better on some networks; which is better is measured as well.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import onnx_ir as ir

from graphopt.allocation import Site as Choice
from graphopt.allocation import allocate
from graphopt.pass_base import Context
from graphopt_passes.prune.allocation.sensitivity import cost_curve
from graphopt_passes.prune.pattern.bench import Bench
from graphopt_passes.prune.pattern.fit import Method
from graphopt_passes.prune.pattern.obs import Rule
from graphopt_passes.prune.pattern.sites import Site

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

    Four plans are tried on all layers together, and the best is taken: the one of least sum, that of `spread`, the one
    halfway between them, and the same fraction of every layer.

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
    bench = Bench.of(model, sites, method, ctx, len(sites) * len(_DEPTHS))
    by_weights, by_outputs = spread(sites, ratio), _allocated(sites, _curves(bench, ratio, ctx), ratio)
    if by_outputs is None:
        return by_weights
    total = sum(by_weights)
    between = _trimmed([-(-(a + b) // 2) for a, b in zip(by_weights, by_outputs, strict=True)], total)
    uniform = _trimmed([math.ceil(ratio * site.size) for site in sites], total)
    plans = [by_outputs, between, by_weights, uniform]
    costs = bench.compare([[Rule(count=count) for count in plan] for plan in plans])
    return plans[int(np.argmin(costs))]


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


def _curves(bench: Bench, ratio: float, ctx: Context) -> list[Array]:
    """`[rungs]` of each site: what the outputs lose, in parts of their energy."""
    predicted, measured = list[Array](), list[list[tuple[int, float]]]()
    for site in ctx.progress(bench.sites, "measuring sensitivity"):
        counts = _rungs(site)
        predicted.append(np.array([bench.sparse(site, Rule(count=int(count))).error for count in counts]))
        depths = _depths(counts, site.size, ratio) if site.name in bench.trial.known else []
        measured.append([(i, bench.alone(site, Rule(count=int(counts[i])))) for i in depths])
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
