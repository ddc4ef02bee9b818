"""Weights as matrices: the power of what they make of their input is that of the layer's output."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from small_models import build, context

from graphopt.analyses import MomentsAnalysis
from graphopt.calibration import Dataset
from graphopt.reference import Feed, Reference
from graphopt_passes.quant.mixed._matrices import as_matrix, power
from graphopt_passes.quant.sites import find_sites

LAYERS = {
    "conv": ("(float[N,4,7,7] x) => (float[N,6,A,B] y)", "[l] y = Conv<kernel_shape=[3,3]>(x, w)", (6, 4, 3, 3)),
    "grouped": (
        "(float[N,4,7,7] x) => (float[N,6,A,B] y)",
        "[l] y = Conv<kernel_shape=[3,3],group=2,strides=[2,2]>(x, w)",
        (6, 2, 3, 3),
    ),
    "gemm": ("(float[N,5] x) => (float[N,3] y)", "[l] y = Gemm(x, w)", (5, 3)),
    "transposed gemm": ("(float[N,5] x) => (float[N,3] y)", "[l] y = Gemm<transB=1>(x, w)", (3, 5)),
    "matmul": ("(float[N,4,5] x) => (float[N,4,3] y)", "[l] y = MatMul(x, w)", (5, 3)),
    "matmul on the left": ("(float[N,5,4] x) => (float[N,3,4] y)", "[l] y = MatMul(w, x)", (3, 5)),
}


def rng() -> np.random.Generator:
    return np.random.default_rng(0)


@pytest.mark.parametrize("name", LAYERS)
def test_the_power_under_moments_is_that_of_the_output(name: str) -> None:
    signature, body, shape = LAYERS[name]
    model = build(signature, body, {"w": shape})
    sizes = [4 if d == "N" else int(d) for d in signature.split("[")[1].split("]")[0].split(",")]
    feeds: list[Feed] = [{"x": rng().standard_normal(sizes).astype(np.float32)} for _ in range(4)]

    def read() -> Iterator[Feed]:
        yield from feeds

    moments = context(model, calibration=Dataset("feeds", "0", read)).fact(MomentsAnalysis()).of("l")
    assert moments is not None
    outputs = [Reference(model).run(feed)["y"] for feed in feeds]
    node, site = model.graph[0], find_sites(model)[0][0]
    weight = model.graph.initializers["w"].const_value
    assert weight is not None
    matrix = as_matrix(
        weight.numpy(),
        site.operator,
        site.weights[0].index,
        groups=node.attributes.get_int("group", 1),
        transposed=bool(node.attributes.get_int("transB", 0)),
    )
    expected = sum(float(np.square(output, dtype=np.float64).sum()) for output in outputs)
    assert power(matrix, moments.xx, moments.squares) == pytest.approx(expected, rel=1e-4)


def test_the_noise_of_a_rounded_layer_is_what_its_output_loses() -> None:
    rows, weight = rng().standard_normal((64, 8)), rng().standard_normal((8, 5))
    rounded = np.round(weight * 4) / 4
    noise = np.square(rows @ (weight - rounded)).sum()
    assert power((weight - rounded)[None], (rows.T @ rows)[None], None) == pytest.approx(noise)


def test_the_diagonal_alone_serves_inputs_that_do_not_correlate() -> None:
    squares, weight = np.array([[4.0, 0.0, 1.0]]), rng().standard_normal((1, 3, 2))
    assert power(weight, None, squares) == pytest.approx(power(weight, np.diag(squares[0])[None], None))


def test_without_moments_every_input_counts_alike() -> None:
    weight = rng().standard_normal((1, 3, 2))
    assert power(weight, None, None) == pytest.approx(float(np.square(weight).sum()))
