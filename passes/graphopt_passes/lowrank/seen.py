"""Weights with what the calibration data says about the inputs of their layers, some layers at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Literal

import numpy as np
import onnx_ir as ir

from graphopt.analyses import CONSTANTS, LINEAR_LAYERS, LayerMoments, MomentsAnalysis
from graphopt.pass_base import Context
from graphopt_passes.lowrank._factors import Problem
from graphopt_passes.lowrank.sites import Site
from graphopt_passes.prune.refit.linear_layers import LinearLayer

__all__ = ["Scale", "problems"]

Array = np.ndarray[Any, np.dtype[Any]]
Scale = Literal["moments", "asvd", "plain"]

_ASVD = 0.5
"""Power of the inputs' magnitude that ASVD weights them with."""


def problems(
    model: ir.Model, sites: Sequence[Site], scale: Scale, ctx: Context, *, centred: bool
) -> Iterator[tuple[Site, Problem]]:
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
        names = tuple(name for name in left if name in ctx.fact(LINEAR_LAYERS).reads)
        portions = MomentsAnalysis(layers=names, heeded=True).portions(ctx) if names else ()
        for part in portions:
            moments = ctx.fact(part) if len(portions) == 1 else part.compute(model, ctx)
            for name, seen in moments.layers.items():
                if seen.finite and seen.rows:
                    site = left.pop(name)
                    yield site, _problem(site, seen, scale, ctx, centred=centred)
    yield from ((site, _problem(site, None, scale, ctx, centred=False)) for site in left.values())


def _problem(site: Site, seen: LayerMoments | None, scale: Scale, ctx: Context, *, centred: bool) -> Problem:
    constants = ctx.fact(CONSTANTS)
    if site.table:
        tensor = constants.of(site.node.inputs[0])
        assert tensor is not None
        return Problem(tensor.numpy().astype(np.float64))
    layer = LinearLayer.of(site.node, constants)
    assert isinstance(layer, LinearLayer)
    weight = layer.matrix()[0]
    if seen is None:
        return Problem(weight)
    norms = seen.norms[0]
    second = np.diag(np.square(norms)) if seen.xx is None else seen.xx[0] / seen.rows
    mean = seen.mean[0] if centred and layer.offset and seen.xx is not None else None
    if mean is not None:
        second = second - np.outer(mean, mean)
    scales = np.power(np.maximum(norms, 1e-6 * norms.max() or 1.0), _ASVD)  # an input that is always 0 counts a little
    return Problem(weight, second, scales if scale == "asvd" else None, mean)
