"""Shapes of large models are observed without their weights."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from small_models import context
from text_models import build

from graphopt.analyses import shapes
from graphopt.analyses._light_weights import elements, shrink_matrices
from graphopt.analyses.shapes import CONCRETE_SHAPES
from graphopt.reference import Reference

NETWORK = """
g (int64[B,T] ids) => (float[B,T,N] y) {
  e = Gather(table, ids)
  size = Shape(ids)
  length = Gather(size, one)
  cut = Slice(e, zero, length, one)
  a = MatMul(cut, w1)
  flat = Reshape(a, flat_shape)
  c = Gemm<transB = 1>(flat, w2, bias)
  y = Reshape(c, rows)
}"""


def network() -> ir.Model:
    """A Slice to a length that the graph computes, which inference alone cannot follow."""
    return build(
        NETWORK,
        table=(600, 512),
        w1=(512, 640),
        w2=(560, 640),
        bias=(560,),
        one=np.array([1], np.int64),
        zero=np.array([0], np.int64),
        flat_shape=np.array([-1, 640], np.int64),
        rows=np.array([1, -1, 560], np.int64),
    )


def test_all_shapes_are_the_same_without_the_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = context(network()).fact(CONCRETE_SHAPES).shapes
    monkeypatch.setattr(shapes, "_LARGE", 1000)
    light = context(network()).fact(CONCRETE_SHAPES).shapes
    assert light == whole and light["cut"] == (1, 1, 512) and light["y"] == (1, 1, 560)


def test_a_shrunk_model_runs_and_keeps_names_shapes_and_types() -> None:
    model, light = network(), network()
    shrink_matrices(light)
    assert elements(light) < 10_000 < elements(model)
    feed = {"ids": np.array([[3, 5, 1, 0]])}
    for name, value in Reference(model).run(feed).items():
        got = Reference(light, optimize=False).run(feed)[name]
        assert got.shape == value.shape and got.dtype == value.dtype


def test_matrices_behind_dequantize_linear_go_too() -> None:
    text = """
    g (float[B,512] x) => (float[B,640] y) {
      w = DequantizeLinear<axis = 1>(q, s)
      y = MatMul(x, w)
    }"""
    model = build(text, q=np.zeros((512, 640), np.int8), s=np.ones(640, np.float32))
    shrink_matrices(model)
    assert elements(model) < 1000
    got = Reference(model, optimize=False).run({"x": np.ones((3, 512), np.float32)})["y"]
    assert got.shape == (3, 640) and got.dtype == np.float32


def test_small_matrices_and_convolutions_stay() -> None:
    text = """
    g (float[1,16,9,9] x) => (float[1,16,9,20] y) {
      a = Conv<pads = [1, 1, 1, 1]>(x, k)
      y = MatMul(a, w)
    }"""
    model = build(text, k=(16, 16, 3, 3), w=(9, 20))
    before = elements(model)
    shrink_matrices(model)
    assert elements(model) == before
