"""Codes that make up for each other's errors: never worse than the nearest ones."""

from __future__ import annotations

import numpy as np
import pytest

from graphopt_passes.share._kmeans import fit_tables, nearest
from graphopt_passes.share._rounding import Part, compensate, output_loss, refine

Array = np.ndarray


def moments(inputs: int, seed: int = 0) -> Array:
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((4 * inputs, inputs)) @ rng.standard_normal((inputs, inputs))
    return x.T @ x / len(x) + 0.05 * np.eye(inputs)


def part(inputs: int, outputs: int, owner: Array | None = None, *, sparse: bool = False) -> Part:
    weight = np.random.default_rng(1).standard_normal((inputs, outputs)).astype(np.float32)
    if sparse:
        weight[np.random.default_rng(2).random(weight.shape) < 0.5] = 0
    owner = np.zeros(outputs, np.int32) if owner is None else owner
    return Part.of(weight, moments(inputs), owner, weight == 0 if sparse else None)


@pytest.mark.parametrize("groups", [1, 5])
def test_compensated_codes_lose_less_than_nearest_ones_and_refined_ones_less_again(groups: int) -> None:
    one = part(150, 40, np.arange(40, dtype=np.int32) % groups)
    members = np.stack([one.weight[:, one.owner == g].reshape(-1) for g in range(groups)])
    tables = fit_tables(members, None, 8).values
    plain = np.empty(one.weight.shape, np.uint8)
    for g in range(groups):
        mine = one.weight[:, one.owner == g]
        plain[:, one.owner == g] = nearest(mine.reshape(1, -1), tables[g : g + 1]).reshape(mine.shape)
    codes = compensate(one, tables)
    refined, fitted = refine([one], [codes], tables)
    losses = [output_loss([one], [c], t) for c, t in ((plain, tables), (codes, tables), (refined[0], fitted))]
    assert losses[2] < losses[1] < 0.7 * losses[0]
    assert (np.diff(fitted) >= 0).all()


def test_refining_leaves_given_entries_alone_if_asked() -> None:
    one = part(60, 20)
    tables = fit_tables(one.weight.reshape(1, -1), None, 4).values
    codes = compensate(one, tables)
    refined, same = refine([one], [codes], tables, fit=False)
    assert np.array_equal(same, tables)
    assert output_loss([one], refined, tables) <= output_loss([one], [codes], tables)


def test_weights_that_are_zero_stay_zero() -> None:
    one = part(80, 30, sparse=True)
    tables = fit_tables(one.weight.reshape(1, -1), None, 8, zero=True).values
    codes, fitted = refine([one], [compensate(one, tables)], tables)
    assert not fitted[0][codes[0]][one.weight == 0].any()


def test_an_error_counts_what_the_other_inputs_cannot_make_up_for() -> None:
    one = part(30, 4)
    np.testing.assert_allclose(one.importance, 1 / np.diag(np.linalg.inv(one.h)), rtol=1e-6)
