"""Factoring layer after layer, each answering for what those before it lost.

Layers are visited in the graph's order. Each is asked for the output that it had in the whole model from the input that
it has now, with all layers before it factored already, by regression of reduced rank (see `reduced_rank`). Biases move
along, shortcuts are made up for, and what a Relu hides is not fitted.

What the layers before have lost for good, a layer cannot see in its input and cannot make up for. In deep residual
networks that is most of the error of later layers, so that ranks matter more than how factors are found.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import onnx_ir as ir

from graphopt.analyses import CONSTANTS
from graphopt.analyses.padding import PADDING
from graphopt.calibration import Dataset
from graphopt.pass_base import Context
from graphopt_passes.lowrank._factors import Problem
from graphopt_passes.lowrank.ranks import Setting
from graphopt_passes.lowrank.reduced_rank import answer
from graphopt_passes.lowrank.schemes import Chain, prepared
from graphopt_passes.lowrank.sites import Site
from graphopt_passes.prune.refit.linear_layers import LinearLayer
from graphopt_passes.prune.refit.refit import batches_of, rows_of
from graphopt_passes.prune.refit.sites import site_of
from graphopt_passes.prune.refit.stepwise import Stepwise

__all__ = ["Fitted", "fit_in_sequence"]


@dataclass(frozen=True, eq=False)
class Fitted:
    """A factored layer.

    Attributes:
        chain: Its factors.
        error: Root mean square of what its output, with a shortcut added to it, misses on held-out rows, in parts of
            its spread, layers before it factored; None where it answers to nothing.
        why: Why it answers to nothing.
    """

    chain: Chain
    error: float | None = None
    why: str = ""


def fit_in_sequence(
    model: ir.Model,
    chosen: Sequence[tuple[Site, Setting]],
    data: Dataset,
    ctx: Context,
    alone: Callable[[Site, Setting], Chain],
    whole: ir.Model | None = None,
) -> Mapping[str, Fitted]:
    """Factor layers so that each makes what it made in the whole model.

    Args:
        model: Its weights become what the factors stand for, and biases change; nodes stay.
        chosen: Layers in the graph's order, each with its form and rank.
        data: Samples.
        ctx: Its random numbers choose the rows that are looked at.
        alone: Factors a layer without looking at others, where there is nothing to fit.
        whole: The original, where layers of the model are factored already; None: none is.

    Raises:
        ModelError: ONNX Runtime cannot run the model.
    """
    feeds, found = list(batches_of(data)), dict[str, Fitted]()
    old, new = Stepwise(whole or model.clone(), feeds, ctx), Stepwise(model, feeds, ctx)
    mask = ctx.fact(PADDING)
    for site, setting in ctx.progress(chosen, "factoring"):
        constants = ctx.fact(CONSTANTS)
        layer = LinearLayer.of(site.node, constants)
        assert isinstance(layer, LinearLayer)
        rows = rows_of(site_of(layer, old, new, {}, constants), old, new, ctx.rng, mask)
        weight, bias = layer.matrix()[0], np.zeros(layer.outputs)
        if isinstance(rows, str):
            fitted = Fitted(alone(site, setting), why=rows)
        else:
            found_anew = answer(rows, weight, partial(_shortened, site, setting), offset=layer.offset)
            fitted, bias = Fitted(found_anew.chain, found_anew.error), found_anew.bias
        layer.add(model.graph, (fitted.chain.dense - weight)[None], bias[None])
        ctx.drop_facts()
        found[site.name] = fitted
    return found


def _shortened(site: Site, setting: Setting, problem: Problem) -> Chain:
    return prepared(setting.form, site.geometry, problem).chain(setting.ranks)
