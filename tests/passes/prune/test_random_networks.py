"""Removing units that are zero from random transformers changes no output, in any operator set."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from drawn_transformers import TOKENS, transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from small_models import channel_groups, zero

from graphopt.model_io import ShapeBinding, input_specs
from graphopt.reference import Feed, Reference, random_feed
from graphopt.structure import interface, verify
from graphopt_passes.prune.removal import remove


def feeds(model: ir.Model) -> list[Feed]:
    rng, binding = np.random.default_rng(1), ShapeBinding(dims={"N": 2, "T": TOKENS})
    return [random_feed(input_specs(model), binding, rng) for _ in range(4)]


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(transformers(), st.data())
def test_units_that_are_zero_can_leave_random_transformers(model: ir.Model, data: st.DataObject) -> None:
    before, free = interface(model), channel_groups(model).free
    removals = [
        (group, sorted(data.draw(st.sets(st.integers(0, group.units - 1), max_size=group.units - group.least))))
        for group in free
        if group.units > group.least
    ]
    for group, units in removals:
        zero(model, group, units)
    given_in = feeds(model)
    whole = Reference(model, optimize=False)  # ONNX Runtime's fusions of INT8 weights round
    expected = [whole.run(feed)["y"] for feed in given_in]
    remove(model, channel_groups(model), removals)
    verify(model, before)
    small = Reference(model, optimize=False)
    for feed, wanted in zip(given_in, expected, strict=True):
        np.testing.assert_allclose(small.run(feed)["y"], wanted, atol=1e-5 * max(1.0, float(np.abs(wanted).max())))
