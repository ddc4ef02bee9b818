from __future__ import annotations

import numpy as np

from graphopt_passes.quant.adjust._balance import Activation, Problem, Reader, best_factors, family


def problem(spread: float, rows: int = 16, columns: int = 12, seed: int = 0) -> tuple[Problem, np.ndarray, np.ndarray]:
    """A layer whose input channels differ by powers of two up to `spread`, undone by the weight."""
    rng = np.random.default_rng(seed)
    factors = 2.0 ** rng.uniform(-spread, spread, columns)
    x = rng.standard_normal((4000, columns)) * factors
    weight = rng.standard_normal((rows, columns)) / factors
    activation = Activation(np.arange(columns), x.min(0), x.max(0), np.square(x).mean(0))
    power = np.square(x @ weight.T).mean(0)
    reader = Reader(activation, np.arange(columns)[None], weight[:, :, None], 1 / power)
    return Problem(columns, [reader], [], per_channel=True), x, weight


def measured(x: np.ndarray, weight: np.ndarray, factors: np.ndarray) -> float:
    """Noise over signal of a layer that is really rounded."""
    scaled, by = x * factors, weight / factors
    step = (scaled.max() - scaled.min()) / 255
    steps = np.abs(by).max(axis=1, keepdims=True) / 127
    got = np.rint(scaled / step) * step @ (np.rint(by / steps) * steps).T
    exact = x @ weight.T
    return float((np.square(got - exact).mean(0) / np.square(exact).mean(0)).sum())


def test_the_noise_is_that_of_real_rounding() -> None:
    for spread in (0.0, 2.0, 4.0):
        stated, x, weight = problem(spread)
        real = measured(x, weight, np.ones(stated.count))
        assert 0.7 * real < stated.noise(np.ones(stated.count)) < 1.4 * real


def test_the_best_factors_undo_what_was_scaled() -> None:
    even, x, weight = problem(0.0)
    start = measured(x, weight, np.ones(even.count))
    stated, x, weight = problem(4.0)
    factors, strength, gain = best_factors(stated)
    assert gain > 10
    assert 0 < strength < 1
    assert measured(x, weight, factors) < 1.5 * start


def test_even_channels_gain_nothing_worth_a_change() -> None:
    assert best_factors(problem(0.0)[0])[2] < 1.5


def test_a_strength_of_zero_levels_columns_and_of_one_ranges() -> None:
    reach, columns = np.array([1.0, 0.1, 0.01]), np.array([0.2, 1.0, 0.5])
    ranges, levelled = family(reach, columns, 1.0), family(reach, columns, 0.0)
    np.testing.assert_allclose(ranges * reach, np.full(3, 1.0))
    np.testing.assert_allclose(columns / levelled, np.full(3, (columns / levelled)[0]))


def test_dead_channels_keep_their_scale() -> None:
    factors = family(np.array([1.0, 0.0, 0.5]), np.array([1.0, 1.0, 0.0]), 0.5)
    assert factors[1] == factors[2] == 1.0


def test_a_fixed_slot_stays_at_one() -> None:
    stated, _, _ = problem(3.0)
    reader = stated.readers[0]
    slots = np.array([0, 1, 2, *[3] * 9])  # nine channels are fixed
    one = Activation(slots, reader.activation.low, reader.activation.high, reader.activation.square)
    partly = Problem(3, [Reader(one, reader.columns, reader.weight, reader.importance)], [], per_channel=True)
    factors, _, gain = best_factors(partly)
    assert factors.shape == (3,)
    assert gain >= 1.0


def test_one_scale_for_the_tensor_counts_the_widest_row() -> None:
    stated, _, _ = problem(0.0)
    reader = stated.readers[0]
    weight, importance = reader.weight.copy(), reader.importance.copy()
    weight[0], importance[0] = weight[0] * 100, importance[0] / 10_000
    wide = Reader(reader.activation, reader.columns, weight, importance)
    rows, tensor = (Problem(stated.count, [wide], [], per_channel=p) for p in (True, False))
    assert tensor.noise(np.ones(12)) > 10 * rows.noise(np.ones(12))


def test_factors_do_not_depend_on_the_scales_that_the_model_came_with() -> None:
    stated, *_ = problem(0.0)
    factors = 2.0 ** np.random.default_rng(3).integers(-4, 5, stated.count)
    reader, seen = stated.readers[0], stated.readers[0].activation
    wide = Activation(seen.slots, seen.low * factors, seen.high * factors, seen.square * factors**2)
    scaled = Reader(wide, reader.columns, reader.weight / factors[None, :, None], reader.importance)
    hard = Problem(stated.count, [scaled], [], per_channel=True)
    undone = hard.noise(best_factors(hard)[0])
    assert undone < 1.05 * stated.noise(best_factors(stated)[0])


def test_weights_that_add_in_pairs_have_coarser_steps() -> None:
    stated, *_ = problem(0.0)
    paired = [Reader(r.activation, r.columns, r.weight, r.importance, bits=7) for r in stated.readers]
    ones = np.ones(stated.count)
    assert Problem(stated.count, paired, [], per_channel=True).noise(ones) > stated.noise(ones)
