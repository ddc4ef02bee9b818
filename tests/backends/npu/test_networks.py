"""Random networks of several operators: each judged by what it was given, and the whole run without a look inside."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("tosa_serializer")
pytest.importorskip("tosa_reference_model")

from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from npu_check import check, lowered
from npu_networks import draw_network

from graphopt_backends.npu.network import emit
from graphopt_backends.npu.tosa import Graph, run_reference, serialize


def _run(graph: Graph, seed: int) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    feed = [rng.integers(-128, 128, tensor.shape).astype(tensor.dtype) for tensor in graph.inputs]
    return run_reference(serialize(graph), feed, [(tensor.dtype, tensor.shape) for tensor in graph.outputs])


@settings(max_examples=20, deadline=None, derandomize=True, phases=[Phase.generate])
@given(st.data())
def test_every_operator_of_a_random_network_is_exact(data: st.DataObject) -> None:
    seed, family = data.draw(st.integers(0, 1000)), data.draw(st.sampled_from(["u55", "u85"]))
    model = draw_network(lambda choices: data.draw(st.sampled_from(choices)), seed)
    outcome = check(model, family)
    assert outcome.differ * 10_000 <= max(outcome.elements, 10_000)
    # what leaves no integers inside makes the same as what leaves them all
    np.testing.assert_array_equal(_run(emit(model, family), 5)[0], _run(lowered(model, family), 5)[0])
