from __future__ import annotations

import numpy as np
import pytest
from small_models import build, context

from graphopt.analyses.activity import ActivityAnalysis
from graphopt.calibration import Dataset
from graphopt.errors import DataError

BODY = "r = Relu(x) g = GlobalAveragePool(r) y = Flatten(g)"


def samples() -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.standard_normal((1, 3, 5, 4)).astype(np.float32) for _ in range(20)]


def seen(*axes: tuple[tuple[str, int], int]) -> dict:
    data = Dataset("x", None, lambda: ({"x": x} for x in samples()), stacked=True)
    model = build("(float[N,3,5,4] x) => (float[N,3] y)", BODY, {})
    return dict(context(model, calibration=data).fact(ActivityAnalysis(axes)))


@pytest.mark.parametrize(("name", "axis"), [("r", 1), ("r", 3), ("x", 1), ("y", 1)])
def test_an_axis_has_the_statistics_that_numpy_finds(name: str, axis: int) -> None:
    x = np.concatenate(samples()).astype(np.float64)
    values = {"x": x, "r": np.maximum(x, 0), "y": np.maximum(x, 0).mean(axis=(2, 3))}[name]
    table = np.moveaxis(values, axis, -1).reshape(-1, values.shape[axis])
    found = seen(((name, axis), values.shape[axis]))[name, axis]
    assert found.count == len(table)
    np.testing.assert_allclose(found.mean, table.mean(axis=0), atol=1e-6)
    np.testing.assert_allclose(found.magnitude, np.abs(table).mean(axis=0), rtol=1e-5)
    np.testing.assert_allclose(found.power, np.square(table).mean(axis=0), rtol=1e-5)
    np.testing.assert_allclose(found.share_of_zeros, (table == 0).mean(axis=0))


def test_large_activations_are_thinned_evenly(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = seen((("r", 1), 3))["r", 1]
    monkeypatch.setattr("graphopt.analyses.activity._POSITIONS", 200)
    found = seen((("r", 1), 3))["r", 1]
    assert 180 <= found.count <= 220 < whole.count
    np.testing.assert_allclose(found.magnitude, whole.magnitude, rtol=0.3)


def test_nothing_asked_for_runs_nothing() -> None:
    assert seen() == {}


def test_activity_needs_samples() -> None:
    model = build("(float[N,3,5,4] x) => (float[N,3] y)", BODY, {})
    with pytest.raises(DataError, match="the activity of channels needs samples; give --calibration"):
        context(model).fact(ActivityAnalysis())
