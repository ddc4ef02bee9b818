"""The noise of one layer at the outputs, measured behind a switch, is that of a model with just this layer rounded."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from quantized_models import CNN, CNN_WEIGHTS, samples
from small_models import build, context

from graphopt.analyses import SHAPES, RangesAnalysis
from graphopt.reference import Reference
from graphopt_passes.quant.decide import Decision, Settings, Workbench, assemble
from graphopt_passes.quant.layer_noise import LayerNoise, Weights
from graphopt_passes.quant.plan import make_plan
from graphopt_passes.quant.sites import find_sites
from graphopt_passes.quant.switches import worst_noise

SIGNATURE = "(float[N,3,8,8] x) => (float[N,10] y)"


def bench() -> Workbench:
    model = build(SIGNATURE, CNN, CNN_WEIGHTS)
    ctx = context(model, calibration=samples(model))
    rules = replace(ctx.target.integers, weight_bits=8)
    settings = Settings("minmax", True, 8, -99.0, -99.0, dynamic=False, weight_only=True, rules=rules)
    touched = make_plan(model, find_sites(model)[0], ctx.fact(SHAPES), rules).touched(model)
    feeds = list(samples(model).feeds())[:4]
    return Workbench(model, ctx, ctx.fact(SHAPES), ctx.fact(RangesAnalysis(values=touched)), feeds, settings)


@pytest.mark.parametrize("place", range(4))
def test_stored_weights_make_the_noise_that_they_make_in_the_model(place: int) -> None:
    work, sites = bench(), find_sites(bench().model)[0]
    found = LayerNoise.prepare(
        work.model, *work.plan([]), sites, work.feeds, work.context, Weights(8, per_channel=True), activations=False
    )
    decisions = [Decision(site, "weight" if i == place else "float") for i, site in enumerate(sites)]
    exact, rounded = Reference(work.model), Reference(assemble(work, decisions)[0])
    expected = float(np.mean([worst_noise(exact.run(feed), rounded.run(feed)) for feed in work.feeds]))
    assert found.of(sites[place].key) == pytest.approx(expected, rel=0.05)


def test_rounded_activations_make_more_noise_and_that_of_the_last_layer_is_that_of_the_model() -> None:
    work = bench()
    sites = find_sites(work.model)[0]
    plan = work.plan([Decision(site, "static") for site in sites])
    weights = Weights(8, per_channel=True)
    both, stored = (
        LayerNoise.prepare(work.model, *plan, sites, work.feeds, work.context, weights, activations=activations)
        for activations in (True, False)
    )
    assert all(both.of(site.key) > stored.of(site.key) for site in sites)
    decisions = [Decision(site, "static" if site is sites[-1] else "float") for site in sites]
    exact, rounded = Reference(work.model), Reference(assemble(work, decisions)[0])
    expected = float(np.mean([worst_noise(exact.run(feed), rounded.run(feed)) for feed in work.feeds]))
    assert both.of(sites[-1].key) == pytest.approx(expected, rel=0.2)
