"""Factoring layer after layer, each answering for what those before it lost.

Layers are visited in the graph's order. Each is first asked, by least squares, for the output that it had in the whole
model from the input that it has now, with all layers before it factored already; that weight is then factored under
the moments of that input. Together this is regression of reduced rank (Izenman, 1975): both factors answer to the
original output, which is no worse than solving for the second alone. Biases move along. The least squares are those of
pruning: held-out rows choose how far to go, shortcuts are made up for, and what a Relu hides is not fitted.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from graphopt.analyses import CONSTANTS
from graphopt.analyses.padding import PADDING
from graphopt.calibration import Dataset
from graphopt.pass_base import Context
from graphopt_passes.lowrank._factors import Problem
from graphopt_passes.lowrank.ranks import Setting
from graphopt_passes.lowrank.schemes import Chain, chain_of, prepared
from graphopt_passes.lowrank.sites import Site
from graphopt_passes.prune.refit.clipped_fit import Rows, fit
from graphopt_passes.prune.refit.linear_layers import LinearLayer
from graphopt_passes.prune.refit.refit import batches_of, rows_of
from graphopt_passes.prune.refit.sites import site_of
from graphopt_passes.prune.refit.stepwise import Stepwise

__all__ = ["Fitted", "fit_in_sequence"]

Array = np.ndarray[Any, np.dtype[Any]]
_CHUNK = 1 << 22


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
) -> Mapping[str, Fitted]:
    """Factor layers so that each makes what it made in the whole model.

    Args:
        model: Its weights become what the factors stand for, and biases change; nodes stay.
        chosen: Layers in the graph's order, each with its form and rank.
        data: Samples.
        ctx: Its random numbers choose the rows that are looked at.
        alone: Factors a layer without looking at others, where there is nothing to fit.

    Raises:
        ModelError: ONNX Runtime cannot run the model.
    """
    feeds, found = list(batches_of(data)), dict[str, Fitted]()
    old, new = Stepwise(model.clone(), feeds, ctx), Stepwise(model, feeds, ctx)
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
            fitted, bias = _fitted(site, setting, weight, rows, offset=layer.offset)
        layer.add(model.graph, (fitted.chain.dense - weight)[None], bias[None])
        ctx.drop_facts()
        found[site.name] = fitted
    return found


def _fitted(site: Site, setting: Setting, weight: Array, rows: Rows, *, offset: bool) -> tuple[Fitted, Array]:
    """The factors of a layer, and what its bias gains."""
    correction = fit(rows, offset=offset)
    wanted, bias = weight, np.zeros(weight.shape[1])
    if correction is not None:
        wanted, bias = weight + correction.weight[0], correction.bias[0]
    second, mean = _second(rows.x[0], offset=offset)
    ready = prepared(setting.form, site.geometry, Problem(wanted, second))
    chain = chain_of(setting.form, site.geometry, ready, setting.ranks)
    bias = bias + mean @ (wanted - chain.dense)
    held_out = rows.of(rows.held_out)
    error = held_out.error(held_out.after((chain.dense - weight)[None], bias[None]))
    return Fitted(chain, error), bias


def _second(x: Array, *, offset: bool) -> tuple[Array, Array]:
    """`[inputs, inputs]` mean products of rows `[rows, inputs]`, and their mean; about it where the bias may change."""
    rows, inputs = x.shape
    mean = x.mean(axis=0, dtype=np.float64) if offset else np.zeros(inputs)
    found = np.zeros((inputs, inputs))
    for part in np.array_split(x, rows * inputs // _CHUNK + 1):
        centred = part - mean
        found += centred.T @ centred
    return found / rows, mean
