"""Factors of channels: whatever the operators between layers, the model computes the same."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from small_models import Shape, build, context, feeds

from graphopt.analyses import SHAPES
from graphopt.reference import Reference
from graphopt_passes.fold.rewiring import FreshNames
from graphopt_passes.quant.adjust.components import components, find_scales, fixed_layers
from graphopt_passes.quant.adjust.constants import scale_constant

IMAGE = "(float[N,3,8,8] x) => (float[N,5,M,K] y)"
CONV = {"w1": (8, 3, 3, 3), "b1": (8,), "w2": (5, 8, 1, 1)}
TOKENS = "(float[N,S,6] x) => (float[N,S,4] y)"

SCALABLE: dict[str, tuple[str, str, dict[str, Shape], int]] = {
    "relu and leaky relu": (IMAGE, "a = Conv(x, w1, b1) r = Relu(a) l = LeakyRelu(r) y = Conv(l, w2)", CONV, 8),
    "prelu with slopes": (IMAGE, "a = Conv(x, w1, b1) r = PRelu(a, s) y = Conv(r, w2)", {**CONV, "s": (8, 1, 1)}, 8),
    "batch norm": (
        IMAGE,
        "a = Conv(x, w1, b1) n = BatchNormalization(a, g, h, m, var) r = Relu(n) y = Conv(r, w2)",
        {**CONV, "g": (8,), "h": (8,), "m": (8,), "var": (8,)},
        16,
    ),
    "depthwise conv": (
        IMAGE,
        "a = Conv(x, w1, b1) r = Relu(a) d = Conv<group = 8, pads = [1,1,1,1]>(r, w3, b3) y = Conv(d, w2)",
        {**CONV, "w3": (8, 1, 3, 3), "b3": (8,)},
        16,
    ),
    "grouped conv": (
        IMAGE,
        "a = Conv(x, w1, b1) r = Relu(a) d = Conv<group = 2>(r, w3) y = Conv(d, w4)",
        {**CONV, "w3": (6, 4, 3, 3), "w4": (5, 6, 1, 1)},
        14,
    ),
    "residual": (
        IMAGE,
        "a = Conv(x, w1, b1) r = Relu(a) c = Conv<pads = [1,1,1,1]>(r, w3) s = Add(c, r) z = Relu(s) y = Conv(z, w2)",
        {**CONV, "w3": (8, 8, 3, 3)},
        8,
    ),
    "pools and a constant": (
        IMAGE,
        """a = Conv(x, w1, b1) c = Add(a, k) m = MaxPool<kernel_shape = [2,2]>(c)
        g = AveragePool<kernel_shape = [2,2], pads = [1,1,1,1]>(m) y = Conv(g, w2)""",
        {**CONV, "k": (1, 1, 1)},
        8,
    ),
    "pad, concat and split": (
        IMAGE,
        """p = Constant<value_ints = [0,0,1,0,0,0,0,1]>() a = Conv(x, w1, b1) b = Conv(x, w3) q = Pad(a, p)
        e = Conv<pads = [0,0,1,1]>(b, w4) c = Concat<axis = 1>(q, e) u, v = Split<axis = 1, num_outputs = 2>(c)
        s = Sub(u, v) y = Conv(s, w5)""",
        {**CONV, "w3": (8, 3, 3, 3), "w4": (8, 8, 1, 1), "w5": (5, 8, 1, 1)},
        16,
    ),
    "transposed conv": (
        IMAGE,
        "a = Conv(x, w1, b1) t = ConvTranspose<group = 2, strides = [2,2]>(a, w3, b3) r = Relu(t) y = Conv(r, w4)",
        {**CONV, "w3": (8, 3, 2, 2), "b3": (6,), "w4": (5, 6, 1, 1)},
        14,
    ),
    "flatten to a gemm": (
        "(float[N,3,8,8] x) => (float[N,5] y)",
        "a = Conv(x, w1, b1) r = Relu(a) f = Flatten(r) y = Gemm<transB = 1>(f, w3, b3)",
        {**CONV, "w3": (5, 288), "b3": (5,)},
        8,
    ),
    "norm before products": (
        TOKENS,
        """n = LayerNormalization(x, g, h) a = MatMul(n, w1) b = MatMul(n, w2) s = Sigmoid(b) p = Mul(a, s)
        y = MatMul(p, w3)""",
        {"g": (6,), "h": (6,), "w1": (6, 7), "w2": (6, 7), "w3": (7, 4)},
        13,
    ),
    "norm read by a vector too": (
        TOKENS,
        """n = LayerNormalization(x, g, h) a = MatMul(n, w1) m = Mul(n, v) b = MatMul(m, w2) s = Add(a, b)
        y = MatMul(s, w3)""",
        {"g": (6,), "h": (6,), "v": (6,), "w1": (6, 7), "w2": (6, 7), "w3": (7, 4)},
        19,
    ),
    "values of attention": (
        TOKENS,
        """q = MatMul(x, w1) k = Transpose<perm = [0,2,1]>(q) l = MatMul(q, k) p = Softmax(l)
        v = MatMul(x, w2) a = Add(v, b) o = MatMul(p, a) t = MatMul(o, w3) y = MatMul(t, w4)""",
        {"w1": (6, 6), "w2": (6, 6), "b": (6,), "w3": (6, 6), "w4": (6, 4)},
        12,
    ),
    "recurrent": (
        "(float[N,S,6] x) => (float[N,1,P,4] y)",
        "a = MatMul(x, w1) y = LSTM<hidden_size = 4>(a, w2, w3)",
        {"w1": (6, 5), "w2": (1, 16, 5), "w3": (1, 16, 4)},
        5,
    ),
}

FIXED: dict[str, tuple[str, str, dict[str, Shape], str]] = {
    "a sigmoid": (IMAGE, "a = Conv(x, w1, b1) s = Sigmoid(a) y = Conv(s, w2)", CONV, "Sigmoid"),
    "a clip": (
        IMAGE,
        """l = Constant<value_float = 0.0>() h = Constant<value_float = 6.0>() a = Conv(x, w1, b1) c = Clip(a, l, h)
        y = Conv(c, w2)""",
        CONV,
        "its bounds would have to move",
    ),
    "a mean over channels": (
        IMAGE,
        "a = Conv(x, w1, b1) m = ReduceMean<axes = [1]>(a) s = Sub(a, m) y = Conv(s, w2)",
        CONV,
        "sums over channels",
    ),
    "an unknown reshape": (
        IMAGE,
        """s = Shape(x) p = Constant<value_ints = [0,0,0,0]>() t = Add(s, p) a = Conv(x, w1, b1) r = Reshape(a, t)
        y = Conv(r, w2)""",
        CONV,
        "Reshape",
    ),
}


def rescale(model: ir.Model, seed: int = 0) -> int:
    """Multiply every free channel by a random factor; returns how many there were."""
    rng, names = np.random.default_rng(seed), FreshNames(model)
    scales = find_scales(model, context(model).fact(SHAPES))
    count = 0
    for component in components(scales):
        factors = np.append(2.0 ** rng.uniform(-4, 4, len(component.roots)), 1.0)
        for term in dict.fromkeys((*component.makers, *component.readers)):
            made, read = (1.0 if a is None else factors[component.slots(scales, a)] for a in (term.made, term.read))
            scale_constant(term.node, term.index, np.asarray(made / read), names)
        count += len(component.roots)
    return count


@pytest.mark.parametrize("case", SCALABLE)
def test_scaled_channels_leave_the_result_alone(case: str) -> None:
    signature, body, weights, expected = SCALABLE[case]
    model = build(signature, body, weights, opset=18 if "num_outputs" in body else 17)
    exact = Reference(model.clone())
    assert rescale(model) == expected
    scaled = Reference(model)
    for feed in feeds(model):
        wanted = exact.run(feed)["y"]
        np.testing.assert_allclose(scaled.run(feed)["y"], wanted, atol=1e-4 * float(np.abs(wanted).max()), rtol=1e-4)


@pytest.mark.parametrize("case", FIXED)
def test_channels_that_something_compares_keep_their_scale_and_the_reason_is_said(case: str) -> None:
    signature, body, weights, reason = FIXED[case]
    model = build(signature, body, weights)
    scales = find_scales(model, context(model).fact(SHAPES))
    told = {node.outputs[0].name: why for node, why in fixed_layers(scales).items()}
    assert reason in told["a"]
    assert told["y"] == "'y' is an output of the model"


def test_a_shared_weight_fixes_the_channels_of_both_layers() -> None:
    model = build(TOKENS, "a = MatMul(x, w1) b = MatMul(a, w1) y = MatMul(b, w2)", {"w1": (6, 6), "w2": (6, 4)})
    assert rescale(model) == 0


def test_channels_read_inside_a_subgraph_are_fixed() -> None:
    body = """c = Constant<value = bool {1}>() a = MatMul(x, w1)
    b = If(c) <then_branch = g () => (float[N,S,7] t) {t = Relu(a)},
               else_branch = h () => (float[N,S,7] e) {e = Neg(a)}>
    y = MatMul(b, w2)"""
    model = build(TOKENS, body, {"w1": (6, 7), "w2": (7, 4)})
    scales = find_scales(model, context(model).fact(SHAPES))
    assert "is read inside a subgraph" in next(iter(fixed_layers(scales).values()))


def test_a_constant_that_others_read_is_copied() -> None:
    body = "a = MatMul(x, w1) s = Add(a, b) t = MatMul(s, w2) y = Add(t, b)"
    model = build("(float[N,S,6] x) => (float[N,S,6] y)", body, {"w1": (6, 6), "b": (6,), "w2": (6, 6)})
    before = np.array(model.graph.initializers["b"].const_value.numpy())  # type: ignore[union-attr]
    assert rescale(model) == 6
    np.testing.assert_array_equal(model.graph.initializers["b"].const_value.numpy(), before)  # type: ignore[union-attr]
