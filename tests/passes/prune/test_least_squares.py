from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from graphopt.analyses import CONSTANTS
from graphopt.analyses.windows import pad_sizes, window_rows
from graphopt.pass_base import Context
from graphopt.reference import Reference
from graphopt.targets import Target
from graphopt_passes.prune.refit.least_squares import RIDGES, Moments, choose_ridge
from graphopt_passes.prune.refit.linear_layers import LinearLayer, rows_worth_reading


def moments(x: np.ndarray, r: np.ndarray, y: np.ndarray | None = None) -> Moments:
    found = Moments.empty(x.shape[0], x.shape[2], r.shape[2])
    half = x.shape[1] // 2
    for part in (slice(0, half), slice(half, None)):
        found.add(x[:, part], r[:, part], (r if y is None else y)[:, part])
    return found


def layer_of(body: str, shapes: dict[str, tuple[int, ...]], signature: str) -> tuple[LinearLayer, ir.Model]:
    rng = np.random.default_rng(0)
    tensors = [ir.tensor(rng.standard_normal(s).astype(np.float32), name=name) for name, s in shapes.items()]
    declared = ", ".join(f"float[{','.join(map(str, s))}] {name}" for name, s in shapes.items())
    text = f'<ir_version: 8, opset_import: ["" : 17]> main {signature} <{declared}> {{ {body} }}'
    model = ir.from_onnx_text(text, initializers=tensors)
    layer = LinearLayer.of(model.graph[0], Context(model, Target(name="ort")).fact(CONSTANTS))
    assert isinstance(layer, LinearLayer), layer
    return layer, model


def check_rows(layer: LinearLayer, model: ir.Model, x: np.ndarray) -> None:
    """Rows times the matrix are what ONNX Runtime computes, at all positions and at chosen ones."""
    output = Reference(model).run({"x": x})["y"]
    every = np.arange(layer.positions(output))
    for chosen in (every, every[::3], every[:0]):
        made = layer.rows(x, chosen) @ layer.matrix() + layer.shift.reshape(layer.groups, 1, -1)
        np.testing.assert_allclose(made, layer.wanted(output, chosen), rtol=1e-4, atol=1e-4)


SIZES = st.integers(1, 3)


@st.composite
def convolutions(draw: st.DrawFn) -> tuple[str, dict[str, tuple[int, ...]], tuple[int, ...]]:
    axes = draw(st.integers(1, 3))
    kernel, strides, dilations, sizes, pads = (
        draw(st.lists(values, min_size=count, max_size=count))
        for values, count in (
            (SIZES, axes), (SIZES, axes), (SIZES, axes), (st.integers(3, 8), axes), (st.integers(0, 2), 2 * axes)
        )
    )  # fmt: skip
    auto = draw(st.sampled_from(["NOTSET", "VALID", "SAME_UPPER", "SAME_LOWER"]))
    if auto.startswith("SAME"):  # the runtime takes no dilation there
        dilations = [1] * axes
    padded = [sum(pads[i::axes]) if auto == "NOTSET" else 0 for i in range(axes)]
    reach = [d * (k - 1) + 1 for d, k in zip(dilations, kernel, strict=True)]
    assume(auto.startswith("SAME") or all(s + p >= r for s, p, r in zip(sizes, padded, reach, strict=True)))
    group = draw(st.sampled_from([1, 2, 4]))
    outputs = group * draw(st.integers(1, 2))
    given_pads = f"pads={pads}" if auto == "NOTSET" else f'auto_pad="{auto}"'
    options = f"group={group}, strides={strides}, dilations={dilations}, {given_pads}"
    shapes: dict[str, tuple[int, ...]] = {"w": (outputs, 4 // group, *kernel), "b": (outputs,)}
    return f"y = Conv<{options}>(x, w, b)", shapes, (2, 4, *sizes)


@settings(max_examples=80, deadline=None)
@given(convolutions())
def test_rows_of_a_convolution_are_what_the_runtime_multiplies(case: tuple[str, dict, tuple[int, ...]]) -> None:
    body, shapes, sizes = case
    layer, model = layer_of(body, shapes, f"(float[{','.join(map(str, sizes))}] x) => (float y)")
    check_rows(layer, model, np.random.default_rng(1).standard_normal(sizes).astype(np.float32))


@pytest.mark.parametrize(
    ("body", "shapes"),
    [
        ("y = Gemm(x, w, b)", {"w": (6, 5), "b": (5,)}),
        ("y = Gemm<transB=1, alpha=0.5, beta=2.0>(x, w, b)", {"w": (5, 6), "b": (1, 5)}),
        ("y = Gemm<transB=1>(x, w, b)", {"w": (5, 6), "b": (1,)}),
        ("y = Gemm(x, w)", {"w": (6, 5)}),
        ("y = MatMul(x, w)", {"w": (6, 5)}),
    ],
)
def test_rows_of_a_matrix_product_are_its_rows(body: str, shapes: dict[str, tuple[int, ...]]) -> None:
    layer, model = layer_of(body, shapes, "(float[7,6] x) => (float[7,5] y)")
    check_rows(layer, model, np.random.default_rng(1).standard_normal((7, 6)).astype(np.float32))


@pytest.mark.parametrize(
    "body",
    ["y = Conv<group=2>(x, w, b)", "y = Conv<group=2>(x, w)"],
)
def test_what_is_added_to_a_layer_is_added_to_its_output(body: str) -> None:
    shapes = {"w": (6, 2, 3, 3), "b": (6,)} if "b)" in body else {"w": (6, 2, 3, 3)}
    layer, model = layer_of(body, shapes, "(float[2,4,5,5] x) => (float[2,6,3,3] y)")
    x = np.random.default_rng(1).standard_normal((2, 4, 5, 5)).astype(np.float32)
    before, every = Reference(model).run({"x": x})["y"], np.arange(18)
    rng = np.random.default_rng(2)
    weight, bias = rng.standard_normal((2, 18, 3)), rng.standard_normal((2, 3))
    layer.add(model.graph, weight, bias)
    expected = layer.wanted(before, every) + layer.rows(x, every) @ weight + bias[:, None]
    np.testing.assert_allclose(layer.wanted(Reference(model).run({"x": x})["y"], every), expected, atol=1e-3)


def test_the_weight_of_a_scaled_gemm_takes_the_correction_unscaled() -> None:
    layer, model = layer_of(
        "y = Gemm<transB=1, alpha=0.5>(x, w, b)", {"w": (5, 6), "b": (5,)}, "(float[7,6] x) => (float[7,5] y)"
    )
    x = np.random.default_rng(1).standard_normal((7, 6)).astype(np.float32)
    before = Reference(model).run({"x": x})["y"]
    layer.add(model.graph, np.ones((1, 6, 5)), np.full((1, 5), 3.0))
    np.testing.assert_allclose(Reference(model).run({"x": x})["y"], before + x.sum(axis=1)[:, None] + 3, atol=1e-4)


def test_constants_made_by_nodes_are_changed_too() -> None:
    text = """<ir_version: 8, opset_import: ["" : 17]> main (float[7,2] x) => (float[7,2] y) {
        w = Constant<value = float[2,2] {1, 2, 3, 4}>() b = Constant<value_floats = [1.0, 2.0]>() y = Gemm(x, w, b)
    }"""
    model = ir.from_onnx_text(text)
    layer = LinearLayer.of(model.graph[2], Context(model, Target(name="ort")).fact(CONSTANTS))
    assert isinstance(layer, LinearLayer), layer
    x = np.random.default_rng(1).standard_normal((7, 2)).astype(np.float32)
    before = Reference(model).run({"x": x})["y"]
    layer.add(model.graph, np.ones((1, 2, 2)), np.full((1, 2), 3.0))
    np.testing.assert_allclose(Reference(model).run({"x": x})["y"], before + x.sum(axis=1)[:, None] + 3, atol=1e-5)


@pytest.mark.parametrize(
    "attributes",
    ["", "strides=[2,3]", "pads=[1,0,0,2]", "strides=[3,2], dilations=[2,1], pads=[1,1,2,0], output_padding=[1,1]"],
)
def test_a_transposed_convolution_is_rows_times_a_matrix(attributes: str) -> None:
    body, shapes = f"y = ConvTranspose<{attributes}>(x, w, b)".replace("<>", ""), {"w": (3, 4, 2, 3), "b": (4,)}
    layer, model = layer_of(body, shapes, "(float[N,3,4,5] x) => (float[N,4,P,Q] y)")
    x = np.random.default_rng(1).standard_normal((2, 3, 4, 5)).astype(np.float32)
    check_rows(layer, model, x)
    before, change = Reference(model).run({"x": x})["y"], np.random.default_rng(2).standard_normal((1, 18, 4))
    every = np.arange(layer.positions(before))
    layer.add(model.graph, change, np.full((1, 4), 2.0))
    expected = layer.wanted(before, every) + layer.rows(x, every) @ change + 2
    np.testing.assert_allclose(layer.wanted(Reference(model).run({"x": x})["y"], every), expected, atol=1e-4)


def test_windows_without_a_choice_are_all_windows() -> None:
    x = np.arange(16.0).reshape(1, 1, 4, 4)
    rows = window_rows(x, [2, 2], [2, 2], [1, 1], pad_sizes([4, 4], [2, 2], [2, 2], "VALID"))
    assert rows.reshape(4, 4).tolist() == [[0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15]]


@pytest.mark.parametrize("offset", [True, False])
def test_a_vanishing_ridge_gives_the_least_squares_solution(offset: bool) -> None:
    rng = np.random.default_rng(0)
    x, r = rng.standard_normal((2, 200, 4)) + 1, rng.standard_normal((2, 200, 3))
    weight, bias = moments(x, r).solve(1e-14, offset=offset)
    for group in range(2):
        table = np.c_[x[group], np.ones(200)] if offset else x[group]
        expected = np.linalg.lstsq(table, r[group], rcond=None)[0]
        np.testing.assert_allclose(weight[group], expected[:4], atol=1e-9)
        np.testing.assert_allclose(bias[group], expected[4] if offset else 0, atol=1e-9)


def test_the_error_from_moments_is_the_error_of_the_rows() -> None:
    rng = np.random.default_rng(0)
    x, r, y = rng.standard_normal((2, 50, 4)), rng.standard_normal((2, 50, 3)), rng.standard_normal((2, 50, 3))
    weight, bias = rng.standard_normal((2, 4, 3)), rng.standard_normal((2, 3))
    missed = np.square(r - x @ weight - bias[:, None]).sum()
    spread = np.square(y - y.mean(axis=1, keepdims=True)).sum()
    assert moments(x, r, y).error(weight, bias) == pytest.approx(np.sqrt(missed / spread))
    assert moments(x, r, y).error() == pytest.approx(np.sqrt(np.square(r).sum() / spread))


@pytest.mark.parametrize("inputs", [6, 700])
def test_the_ridge_is_the_best_one_on_held_out_rows(inputs: int) -> None:
    rng = np.random.default_rng(0)
    x, other = rng.standard_normal((1, 700, inputs)), rng.standard_normal((1, 300, inputs))
    truth = rng.standard_normal((1, inputs, 2))
    seen = moments(x, x @ truth + 30 * rng.standard_normal((1, 700, 2)))
    held_out = moments(other, other @ truth)
    found = held_out.error(*choose_ridge(seen, held_out, offset=True)[1])
    assert found == min(held_out.error(*seen.solve(ridge, offset=True)) for ridge in RIDGES)


def test_inputs_that_never_vary_get_no_weight() -> None:
    rng = np.random.default_rng(0)
    x, r = np.zeros((1, 30, 2)), np.ones((1, 30, 1))
    x[..., 1] = 1e6
    weight, bias = moments(x, r + 1e-3 * rng.standard_normal(r.shape)).solve(1e-6, offset=True)
    assert np.abs(weight).max() < 1e-9
    assert bias.item() == pytest.approx(1, abs=1e-2)


def test_rows_are_bounded_by_the_work_they_make() -> None:
    assert rows_worth_reading(1, 16) == 30_000
    assert rows_worth_reading(1, 4608) == 3 * 4608
    assert rows_worth_reading(960, 9) * 960 * 9 <= 1e8
