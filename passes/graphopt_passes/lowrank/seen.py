"""Weights with what the calibration data says about the inputs of their layers, some layers at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import onnx_ir as ir

from graphopt.analyses import CONSTANTS, LINEAR_LAYERS, LayerMoments, MomentsAnalysis
from graphopt.pass_base import Context
from graphopt_passes.lowrank._factors import Parts, Problem
from graphopt_passes.lowrank.places import Place
from graphopt_passes.lowrank.sites import Site
from graphopt_passes.prune.refit.linear_layers import LinearLayer

__all__ = ["Scale", "problems"]

Array = np.ndarray[Any, np.dtype[Any]]
Scale = Literal["moments", "asvd", "plain"]

_ASVD = 0.5
"""Power of the inputs' magnitude that ASVD weights them with."""


def problems(
    model: ir.Model, sites: Sequence[Site], scale: Scale, ctx: Context, *, centred: bool
) -> Iterator[tuple[Site, Problem | Parts]]:
    """Read one weight after another; tables last.

    Args:
        model: The model; it must not change meanwhile but for sites that were handed out.
        sites: Its sites.
        scale: What inputs are weighted with; plain needs no data.
        ctx: Its context.
        centred: Where a layer has a bias, what the mean of its input makes does not count.
    """
    left = {site.name: site for site in sites}
    if scale != "plain":
        names = {name: site for site in sites for name in site.names if not site.table}
        for site, seen in _measured(model, names, ctx):
            del left[site.name]
            yield site, _problem(site, seen, scale, ctx, centred=centred)
    yield from ((site, _problem(site, None, scale, ctx, centred=False)) for site in left.values())


def _measured(model: ir.Model, names: Mapping[str, Site], ctx: Context) -> Iterator[tuple[Site, LayerMoments]]:
    """Moments of sites; of layers that share a weight those of all that they read."""
    reads = ctx.fact(LINEAR_LAYERS).reads
    wanted = tuple(name for name, site in names.items() if all(each in reads for each in site.names))
    portions = MomentsAnalysis(layers=wanted, heeded=True).portions(ctx) if wanted else ()
    waiting = dict[str, list[LayerMoments]]()
    for part in portions:
        moments = ctx.fact(part) if len(portions) == 1 else part.compute(model, ctx)
        for name, seen in moments.layers.items():
            site = names[name]
            together = waiting.setdefault(site.name, [])
            together.append(seen)
            if len(together) == len(site.names) and all(one.finite and one.rows for one in waiting.pop(site.name)):
                yield site, _sum_of(together)


def _sum_of(moments: Sequence[LayerMoments]) -> LayerMoments:
    if len(moments) == 1:
        return moments[0]
    rows = sum(one.rows for one in moments)
    mean = np.sum([one.rows * one.mean for one in moments], axis=0) / rows
    squares = np.sum([one.squares for one in moments], axis=0)
    products = [one.xx for one in moments if one.xx is not None]
    return LayerMoments(rows, mean, squares, np.sum(products, axis=0) if len(products) == len(moments) else None)


def _problem(site: Site, seen: LayerMoments | None, scale: Scale, ctx: Context, *, centred: bool) -> Problem | Parts:
    place = Place.of(site.node, ctx.fact(CONSTANTS))
    assert isinstance(place, Place)
    matrices = place.matrices()
    if seen is None:
        found = [Problem(matrix) for matrix in matrices]
    else:
        centred = centred and not site.alone and _offset(site, ctx)
        found = [_weighted(m, seen, i % len(seen.squares), scale, centred) for i, m in enumerate(matrices)]
    return found[0] if len(found) == 1 else Parts(tuple(found))


def _offset(site: Site, ctx: Context) -> bool:
    layer = LinearLayer.of(site.node, ctx.fact(CONSTANTS))
    return isinstance(layer, LinearLayer) and layer.offset


def _weighted(weight: Array, seen: LayerMoments, group: int, scale: Scale, centred: bool) -> Problem:
    """The matrix of a part; where moments know channels alone, each place of the kernel is its own.

    That is so for transposed convolutions, whose kernels meet the same channels at each place.
    """
    norms, places = seen.norms[group], len(weight) // seen.norms.shape[1]
    second = np.diag(np.square(norms)) if seen.xx is None else seen.xx[group] / seen.rows
    mean = seen.mean[group] if centred and seen.xx is not None and places == 1 else None
    if mean is not None:
        second = second - np.outer(mean, mean)
    if places > 1:
        second, norms = np.kron(second, np.eye(places)), np.repeat(norms, places)
    scales = np.power(np.maximum(norms, 1e-6 * norms.max() or 1.0), _ASVD)  # an input that is always 0 counts a little
    return Problem(weight, second, scales if scale == "asvd" else None, mean)
