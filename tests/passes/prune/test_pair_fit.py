from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from graphopt_passes.prune.refit.clipped_fit import Rows
from graphopt_passes.prune.refit.pair_fit import Pair, Weights, fit_pair
from graphopt_passes.prune.refit.windows import Windows


def seen_as(wanted: np.ndarray, low: float = -np.inf) -> Rows:
    empty = np.zeros((1, len(wanted), 0), dtype=np.float32)
    edges = [np.full((1, 1, wanted.shape[1]), edge, dtype=np.float32) for edge in (low, np.inf)]
    return Rows(empty, wanted[None].astype(np.float32), empty, np.zeros(len(wanted), dtype=bool), edges[0], edges[1])


def pair(x: np.ndarray, wanted: np.ndarray, middle: int, *, low: float = 0.0) -> Pair:
    """Two matrices with a Relu between them."""
    ones, nothing = np.ones(middle, dtype=np.float32), np.zeros(middle, dtype=np.float32)
    bypass = np.zeros(wanted.shape, dtype=np.float32)
    edges = np.full(middle, low, dtype=np.float32), np.full(middle, np.inf, dtype=np.float32)
    rows = x.astype(np.float32)
    return Pair(rows, (len(x), middle), Windows(), *edges, nothing, ones, seen_as(wanted), bypass)


def test_two_layers_together_do_what_each_alone_cannot() -> None:
    """The output is the size of a sum; neither of two units, set to one summand each, shows it."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((1000, 4))
    wanted = np.abs(x[:, :1] + x[:, 1:2])
    start = Weights(*(a.astype(np.float32) for a in (
        np.eye(4)[:, :2] * [1, -1] + 0.2, np.zeros(2), np.ones((2, 1)), np.zeros(1)
    )))  # fmt: skip
    parts = pair(x[:800], wanted[:800], 2), pair(x[800:], wanted[800:], 2)
    found = fit_pair(*parts, lambda: pair(x, wanted, 2), start)
    assert found is not None
    _, before, after = found
    assert after < 0.5 * before


def test_what_is_right_already_stays() -> None:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((300, 4))
    first, second = (rng.standard_normal(shape).astype(np.float32) for shape in ((4, 3), (3, 2)))
    wanted = np.maximum(x.astype(np.float32) @ first, 0) @ second
    start = Weights(first, np.zeros(3, dtype=np.float32), second, np.zeros(2, dtype=np.float32))
    parts = pair(x[:200], wanted[:200], 3), pair(x[200:], wanted[200:], 3)
    found = fit_pair(*parts, lambda: pair(x, wanted, 3), start)
    assert found is None or found[2] < 1e-4


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 3), st.data())
def test_the_way_back_is_the_adjoint_of_the_way_to_rows(seed: int, axes: int, data: st.DataObject) -> None:
    def numbers(least: int, most: int) -> tuple[int, ...]:
        return tuple(data.draw(st.lists(st.integers(least, most), min_size=axes, max_size=axes)))

    kernel, strides, dilations = numbers(1, 3), numbers(1, 2), numbers(1, 2)
    pads = tuple(zip(numbers(0, 2), numbers(0, 2), strict=True))
    windows = Windows(kernel, strides, dilations, pads)
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((2, 3, *numbers(5, 7)))
    rows = windows.rows(x)
    other = rng.standard_normal(rows.shape)
    assert len(rows) == 2 * np.prod(windows.sizes(x.shape[2:]))
    np.testing.assert_allclose(np.sum(rows * other), np.sum(x * windows.back(other, x.shape)), rtol=1e-9, atol=1e-9)
    np.testing.assert_array_equal(windows.image(windows.flat(x), x.shape), x)
