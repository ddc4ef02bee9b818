from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from graphopt_passes.prune.refit.clipped_fit import Rows, fit


def table(x: np.ndarray, wanted: np.ndarray, *, low: float = -np.inf, high: float = np.inf) -> Rows:
    """Rows of a layer that makes nothing yet; every fifth is held out."""
    edges = [np.full((1, 1, wanted.shape[2]), edge, dtype=np.float32) for edge in (low, high)]
    arrays = [a.astype(np.float32) for a in (x, wanted, np.zeros_like(wanted))]
    return Rows(arrays[0], arrays[1], arrays[2], np.arange(x.shape[1]) % 5 == 2, edges[0], edges[1])


def test_without_an_activation_the_fit_is_least_squares() -> None:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((1, 300, 4))
    truth = rng.standard_normal((1, 4, 3))
    found = fit(table(x, x @ truth + 2), offset=True)
    assert found is not None
    np.testing.assert_allclose(found.weight, truth, atol=1e-4)
    np.testing.assert_allclose(found.bias, 2, atol=1e-4)


def test_what_an_activation_hides_is_not_fitted() -> None:
    """One input tells where the output is positive; below zero it follows another that the layer does not see."""
    rng = np.random.default_rng(0)
    x, unseen = rng.standard_normal((1, 2000, 1)), rng.exponential(5, (1, 2000, 1))
    wanted = np.where(x > 0, x, -unseen)
    heeding, plain = fit(table(x, wanted, low=0), offset=True), fit(table(x, wanted), offset=True)
    assert heeding is not None
    assert plain is not None
    errors = [table(x, wanted, low=0).error(x @ found.weight + found.bias[:, None]) for found in (heeding, plain)]
    assert heeding.after < heeding.before
    assert errors[0] < 0.8 * errors[1]


def test_both_edges_of_a_clip_are_heeded() -> None:
    rows = table(np.zeros((1, 4, 1)), np.array([[[-3.0], [2.0], [9.0], [9.0]]]), low=0, high=6)
    targets = rows.targets(np.array([[[-1.0], [-1.0], [7.0], [5.0]]], dtype=np.float32))
    assert targets.reshape(-1).tolist() == [-1, 2, 7, 6]


def test_noise_is_left_as_it_is() -> None:
    rng = np.random.default_rng(0)
    rows = table(rng.standard_normal((1, 212, 10)), rng.standard_normal((1, 212, 4)))
    few = Rows(rows.x, rows.wanted, rows.now, np.arange(212) >= 12, rows.low, rows.high)
    assert fit(few, offset=True) is None


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10_000), st.integers(10, 80), st.booleans(), st.sampled_from([0.0, -np.inf]))
def test_held_out_rows_never_come_out_worse(seed: int, count: int, offset: bool, low: float) -> None:
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((2, count, 5))
    wanted = x @ rng.standard_normal((2, 5, 3)) * rng.choice([0.0, 0.1, 1.0]) + rng.standard_normal((2, count, 3))
    edges = [np.full((2, 1, 3), edge, dtype=np.float32) for edge in (low, np.inf)]
    arrays = [a.astype(np.float32) for a in (x, wanted, np.zeros_like(wanted))]
    found = fit(Rows(*arrays, np.arange(count) % 5 == 2, *edges), offset=offset)
    assert found is None or found.after < found.before


@pytest.mark.parametrize("low", [0.0, -np.inf])
def test_a_bias_that_may_not_change_does_not(low: float) -> None:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((1, 300, 4))
    found = fit(table(x, x @ rng.standard_normal((1, 4, 3)) + 1, low=low), offset=False)
    assert found is not None
    assert not found.bias.any()
