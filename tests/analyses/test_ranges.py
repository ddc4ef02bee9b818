from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from graphopt.analyses import RANGES, Histogram, RangesAnalysis
from graphopt.analyses.ranges import BINS, expose
from graphopt.calibration import Dataset
from graphopt.errors import DataError
from graphopt.pass_base import Context
from graphopt.reference import Feed
from graphopt.targets import Target

FLOATS = st.floats(-(2.0**100), 2.0**100, width=32)
TEXT = """<ir_version: 8, opset_import: ["" : 17]>
g (float[N,4] x, int64[1] k) => (float[N,4] y) <float[4] w = {1, 2, 3, 4}> {
  h = Mul(x, w)  r = Relu(h)  s = Shape(r)  y = Sub(r, h)
}"""


def dataset(*samples: np.ndarray) -> Dataset:
    def read() -> Iterator[Feed]:
        return ({"x": x, "k": np.zeros(1, np.int64)} for x in samples)

    return Dataset("samples", None, read)


def context(*samples: np.ndarray) -> Context:
    return Context(ir.from_onnx_text(TEXT), Target(name="ort"), calibration=dataset(*samples) if samples else None)


@settings(max_examples=60, deadline=None)
@given(st.lists(arrays(np.float32, array_shapes(max_dims=2, max_side=20), elements=FLOATS), min_size=1, max_size=5))
def test_no_element_is_lost_and_each_lies_in_its_bin(chunks: list[np.ndarray]) -> None:
    histogram = Histogram()
    for chunk in chunks:
        histogram.add(chunk)
    everything = np.concatenate([chunk.reshape(-1) for chunk in chunks]).astype(np.float64)
    assert histogram.count == everything.size == histogram.counts.sum()
    assert histogram.minmax() == (everything.min(), everything.max())
    index = np.floor(everything / histogram.width).astype(np.int64) - histogram.first
    np.testing.assert_array_equal(np.bincount(index, minlength=BINS), histogram.counts)


def test_a_range_that_grows_keeps_the_resolution_of_the_whole() -> None:
    histogram, rng = Histogram(), np.random.default_rng(0)
    for scale in (1e-6, 1.0, 1e6):
        histogram.add(rng.standard_normal(1000) * scale)
    assert histogram.counts.shape == (BINS,)
    assert histogram.width < 4 * (histogram.high - histogram.low) / BINS


@pytest.mark.parametrize("method", ["minmax", "percentile", "mse", "entropy"])
def test_empty_constant_and_infinite_tensors_have_ranges(method: str) -> None:
    empty, constant, infinite = Histogram(), Histogram(), Histogram()
    empty.add(np.zeros((0, 3), np.float32))
    constant.add(np.full((2, 2), 7.0, np.float32))
    infinite.add(np.array([np.inf, -np.inf, np.nan, 1.0], np.float32))
    infinite.add(np.array([np.inf], np.float32))
    assert empty.range(method) == (0.0, 0.0)  # type: ignore[arg-type]
    low, high = constant.range(method)  # type: ignore[arg-type]
    assert low in (0.0, 7.0)
    assert high == 7.0
    assert infinite.range(method)[1] == 1.0  # type: ignore[arg-type]
    assert (infinite.count, infinite.dropped) == (1, 4)


def test_percentile_cuts_what_is_rare() -> None:
    histogram = Histogram()
    histogram.add(np.concatenate([np.linspace(0, 1, 100_000), [1000.0]]).astype(np.float32))
    low, high = histogram.percentile(99.9)
    assert high < 2
    assert low == 0
    assert histogram.percentile(100) == histogram.minmax()


def test_the_mse_range_has_less_noise_than_the_full_one() -> None:
    histogram, rng = Histogram(), np.random.default_rng(0)
    histogram.add(np.concatenate([rng.standard_normal(100_000), [40.0]]).astype(np.float32))
    low, high = histogram.mse()
    assert high < 38
    assert histogram.noise(low, high) < histogram.noise(*histogram.minmax())


def test_the_entropy_range_cuts_what_is_rare_and_keeps_what_is_not() -> None:
    rare, even, rng = Histogram(), Histogram(), np.random.default_rng(0)
    rare.add(np.concatenate([np.abs(rng.standard_normal(100_000)), [40.0]]).astype(np.float32))
    even.add(rng.uniform(0, 1, 100_000).astype(np.float32))
    low, high = rare.entropy()
    assert low == 0
    assert 2.5 < high < 20
    assert even.entropy()[1] > 0.97


@pytest.mark.parametrize("symmetric", [False, True])
def test_the_entropy_range_has_two_ends_where_the_elements_have(symmetric: bool) -> None:
    histogram, rng = Histogram(), np.random.default_rng(0)
    values = rng.standard_normal(100_000)
    histogram.add(np.concatenate([np.where(values < 0, values / 4, values), [60.0]]).astype(np.float32))
    low, high = histogram.entropy(symmetric=symmetric)
    assert low == pytest.approx(values.min() / 4, rel=0.01)
    assert 2.5 < high < 15


def test_the_entropy_range_ignores_how_many_zeros_there_are() -> None:
    few, many, rng = Histogram(), Histogram(), np.random.default_rng(0)
    values = np.abs(rng.standard_normal(100_000)).astype(np.float32)
    few.add(values)
    many.add(np.concatenate([values, np.zeros(1_000_000, np.float32)]))
    assert many.entropy()[1] == pytest.approx(few.entropy()[1], rel=0.05)


def test_noise_agrees_with_rounding_the_elements() -> None:
    values = np.random.default_rng(0).standard_normal(50_000).astype(np.float32)
    histogram = Histogram()
    histogram.add(values)
    low, high = -3.0, 3.0
    step = (high - low) / 255
    rounded = np.rint(np.clip(values, low, high) / step) * step
    assert histogram.noise(low, high) == pytest.approx(float(np.mean((rounded - values) ** 2)), rel=0.2)
    assert histogram.power() == pytest.approx(float(np.mean(values.astype(np.float64) ** 2)), rel=0.01)


def test_all_float_values_of_the_main_graph_are_seen() -> None:
    rng = np.random.default_rng(0)
    samples = [rng.standard_normal((3, 4)).astype(np.float32) for _ in range(4)]
    ranges = context(*samples).fact(RANGES)
    assert sorted(ranges.histograms) == ["h", "r", "x", "y"]
    weighted = np.concatenate(samples) * np.arange(1, 5, dtype=np.float32)
    assert ranges.histograms["h"].minmax() == (weighted.min(), weighted.max())
    assert ranges.histograms["r"].minmax() == (0.0, weighted.max())
    assert all(histogram.count == 48 for histogram in ranges.histograms.values())


def test_only_the_values_asked_for_are_seen() -> None:
    ctx = context(np.ones((1, 4), np.float32))
    assert list(ctx.fact(RangesAnalysis(values=("r",))).histograms) == ["r"]


def test_the_order_of_samples_does_not_change_what_is_counted() -> None:
    samples = [np.full((1, 4), x, np.float32) for x in (1e-3, 5.0, -200.0)]
    forward, backward = (context(*order).fact(RANGES).histograms["h"] for order in (samples, samples[::-1]))
    assert (forward.low, forward.high, forward.count) == (backward.low, backward.high, backward.count)


def test_a_small_memory_limit_takes_more_runs_and_gives_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    samples = [np.random.default_rng(i).standard_normal((2, 4)).astype(np.float32) for i in range(3)]
    whole = context(*samples).fact(RANGES)
    monkeypatch.setattr("graphopt.analyses.streaming._RUN_BYTES", 1)
    pieces = context(*samples).fact(RANGES)
    for name, histogram in whole.histograms.items():
        np.testing.assert_array_equal(histogram.counts, pieces.histograms[name].counts)


def test_without_data_there_are_no_ranges() -> None:
    with pytest.raises(DataError, match="activation ranges need samples; give --calibration"):
        context().fact(RANGES)


def test_exposing_values_leaves_the_model_alone() -> None:
    model = ir.from_onnx_text(TEXT)
    copy = expose(model, ["h", "y", "nothing"])
    assert [value.name for value in copy.graph.outputs] == ["y", "h"]
    assert [value.name for value in model.graph.outputs] == ["y"]
