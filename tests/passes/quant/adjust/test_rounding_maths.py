from __future__ import annotations

import numpy as np
import pytest

from graphopt_passes.quant.adjust._rounding import damped, flip, gptq, nearest, output_error

TOP = 7


def layer(rows: int = 24, inputs: int = 40, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Weight, scales and X'X of a layer whose inputs move together."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((1000, inputs)) @ rng.standard_normal((inputs, inputs)) + rng.standard_normal(inputs)
    weight = rng.standard_normal((rows, inputs))
    return weight, np.abs(weight).max(axis=1) / TOP, damped(x.T @ x, len(x))


def adaround(weight: np.ndarray, scales: np.ndarray, product: np.ndarray, steps: int = 4000) -> np.ndarray:
    """AdaRound as published: a rectified sigmoid of each element, its gradient by hand, Adam, and a regularizer."""
    low = np.floor(weight / scales[:, None])
    rest = weight / scales[:, None] - low
    v = -np.log(1.2 / (rest + 0.1) - 1)
    mean, square = np.zeros_like(v), np.zeros_like(v)
    size = np.trace(product) / len(product) * float(np.square(scales).mean())
    for step in range(1, steps + 1):
        sigmoid = 1 / (1 + np.exp(-v))
        h = np.clip(1.2 * sigmoid - 0.1, 0, 1)
        beta = 20 - 18 * min(1.0, step / steps)
        error = np.clip(low + h, -TOP, TOP) * scales[:, None] - weight
        slope = 2 * (error @ product) * scales[:, None] / size
        if step > steps / 5:
            slope = slope - 0.01 * beta * np.abs(2 * h - 1) ** (beta - 1) * np.sign(2 * h - 1) * 2
        slope = slope * np.where((h > 0) & (h < 1), 1.2 * sigmoid * (1 - sigmoid), 0.0)
        mean, square = 0.9 * mean + 0.1 * slope, 0.999 * square + 0.001 * slope**2
        v = v - 0.01 * (mean / (1 - 0.9**step)) / (np.sqrt(square / (1 - 0.999**step)) + 1e-8)
    return np.clip(low + (np.clip(1.2 / (1 + np.exp(-v)) - 0.1, 0, 1) >= 0.5), -TOP, TOP)


def total(weight: np.ndarray, scales: np.ndarray, integers: np.ndarray, product: np.ndarray) -> float:
    return float(output_error(weight, scales, integers, product).sum())


@pytest.mark.parametrize("seed", range(4))
def test_flips_reach_what_adaround_by_gradients_reaches(seed: int) -> None:
    weight, scales, product = layer(seed=seed)
    start = gptq(weight, scales, TOP, product)
    ours = total(weight, scales, flip(weight, scales, start, TOP, product), product)
    theirs = total(weight, scales, adaround(weight, scales, product), product)
    assert ours <= 1.05 * theirs
    assert ours < 0.6 * total(weight, scales, nearest(weight, scales, TOP), product)


def test_gptq_is_the_column_by_column_update_of_the_paper() -> None:
    weight, scales, product = layer(rows=5, inputs=9)
    order = np.argsort(-np.diag(product), kind="stable")
    left, inverse = weight[:, order].copy(), np.linalg.inv(product[np.ix_(order, order)])
    expected = np.empty_like(left)
    for i in range(9):
        expected[:, i] = np.clip(np.rint(left[:, i] / scales), -TOP, TOP)
        error = (left[:, i] - expected[:, i] * scales) / inverse[i, i]
        left -= np.outer(error, inverse[i])
        inverse = inverse - np.outer(inverse[:, i], inverse[i]) / inverse[i, i]
    np.testing.assert_array_equal(gptq(weight, scales, TOP, product)[:, order], expected)


def test_gptq_beats_nearest_beyond_one_block() -> None:
    weight, scales, product = layer(rows=8, inputs=300)
    better = total(weight, scales, gptq(weight, scales, TOP, product), product)
    assert better < 0.7 * total(weight, scales, nearest(weight, scales, TOP), product)


def test_every_flip_stays_beside_the_exact_weight_and_inside_the_grid() -> None:
    weight, scales, product = layer()
    found = flip(weight, scales, gptq(weight, scales, TOP, product), TOP, product)
    assert (np.abs(found - weight / scales[:, None]) < 1 + 1e-9).all()
    assert (np.abs(found) <= TOP).all()


def test_inputs_that_were_never_seen_round_to_nearest() -> None:
    weight, scales, _ = layer()
    product = damped(np.zeros((40, 40)), 0)
    for found in (gptq(weight, scales, TOP, product), flip(weight, scales, np.zeros_like(weight), TOP, product)):
        np.testing.assert_array_equal(found, nearest(weight, scales, TOP))
