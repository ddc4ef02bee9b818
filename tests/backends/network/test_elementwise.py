"""Operators that work element by element equal ONNX Runtime's, for numbers of every kind."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from kernel_runner import runnable
from network_runner import run_network
from onnx import TensorProto, helper, numpy_helper

from graphopt.reference import Reference
from graphopt.targets import Isa

ISAS = runnable()
pytestmark = pytest.mark.skipif(not ISAS, reason="this CPU runs none of the kernels")

_TYPES = {
    "float32": TensorProto.FLOAT, "float16": TensorProto.FLOAT16, "int32": TensorProto.INT32,
    "int64": TensorProto.INT64, "uint8": TensorProto.UINT8, "bool": TensorProto.BOOL,
}  # fmt: skip
_ROWS, _COLUMNS = 20, 19
_SIZE = _ROWS * (_COLUMNS + 1)
Case = tuple[str, dict[str, object], str]


def _model(cases: list[Case], dtype: str, operands: int) -> ir.Model:
    """One node for each case, all on the same inputs: rows of one vector, if it is a wide one, and single elements."""
    kind = _TYPES[dtype]
    inputs = [helper.make_tensor_value_info(f"x{i}", kind, [_ROWS, _COLUMNS + 1]) for i in range(operands)]
    nodes = [helper.make_node("Slice", [v.name, "start", "end", "axis"], [f"{v.name}_cut"]) for v in inputs]
    cut = [f"{v.name}_cut" for v in inputs]
    nodes += [helper.make_node(op, cut, [f"y{i}"], **a) for i, (op, a, _) in enumerate(cases)]
    outputs = [
        helper.make_tensor_value_info(f"y{i}", _TYPES[made], [_ROWS, _COLUMNS]) for i, (_, _, made) in enumerate(cases)
    ]
    numbers = {"start": 0, "end": _COLUMNS, "axis": 1}
    held = [numpy_helper.from_array(np.array([number], np.int64), name) for name, number in numbers.items()]
    graph = helper.make_graph(nodes, "g", inputs, outputs, held)
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    onnx.checker.check_model(made)
    return ir.from_proto(made)


def _compare(model: ir.Model, isa: Isa, feed: dict[str, np.ndarray], rtol: float, atol: float = 0.0) -> None:
    feed = {name: array.reshape(_ROWS, -1) for name, array in feed.items()}
    expected = Reference(model.clone(), threads=1, optimize=False).run(feed)
    got, _ = run_network(model, isa, feed, tasks=1)
    for name, value in expected.items():
        assert got[name].dtype == value.dtype
        np.testing.assert_allclose(got[name], value, rtol=rtol, atol=atol, err_msg=name)


def _floats(*ops: str, **attributes: object) -> list[Case]:
    return [(op, dict(attributes), "float32") for op in ops]


_EVERYWHERE = [
    *_floats("Abs", "Atan", "Ceil", "Cos", "Erf", "Exp", "Floor", "Neg", "Reciprocal", "Relu", "Round", "Sign"),
    *_floats("Sin", "Softplus", "Softsign", "Tanh", "HardSigmoid", "Sigmoid"),
    *_floats("LeakyRelu", alpha=0.3), *_floats("Elu", alpha=0.7), *_floats("Celu", alpha=2.0), *_floats("Selu"),
    *_floats("ThresholdedRelu", alpha=0.5), *_floats("Shrink", lambd=1.5, bias=0.5),
    ("IsNaN", {}, "bool"), ("IsInf", {}, "bool"), ("IsInf", {"detect_negative": 0}, "bool"),
    ("IsInf", {"detect_positive": 0}, "bool"),
]  # fmt: skip
_SPECIAL = np.float32([np.nan, np.inf, -np.inf, 0.0, 1e-30, -1e-30, 1.0, -1.0, 0.5, -0.5, 2.5, -2.5, 100, -100])


@pytest.mark.parametrize("isa", ISAS, ids=lambda isa: isa.name)
def test_functions_keep_infinities_and_what_is_no_number(isa: Isa) -> None:
    x = np.random.default_rng(0).uniform(-30, 30, (_ROWS, _COLUMNS + 1)).astype(np.float32)
    x[0, : _SPECIAL.size] = _SPECIAL
    x[1 : 1 + _SPECIAL.size, _COLUMNS - 1] = _SPECIAL  # where no vector is
    _compare(_model(_EVERYWHERE, "float32", 1), isa, {"x0": x}, 2e-6, 2.5e-7)


@pytest.mark.parametrize("isa", ISAS, ids=lambda isa: isa.name)
def test_functions_of_a_limited_domain(isa: Isa) -> None:
    unit = _model(_floats("Acos", "Asin", "Atanh", "Tan", "Asinh", "Sinh", "Cosh", "Sqrt"), "float32", 1)
    above = _model(_floats("Acosh", "Log", "Sqrt"), "float32", 1)
    drawn = np.random.default_rng(1).uniform(-1, 1, _SIZE).astype(np.float32)
    drawn[:2] = 1, -1
    _compare(unit, isa, {"x0": drawn}, 2e-6, 2e-7)
    _compare(above, isa, {"x0": np.exp(4 + 4 * drawn)}, 2e-6)


@pytest.mark.parametrize("isa", ISAS, ids=lambda isa: isa.name)
def test_powers_have_the_sign_and_the_limits_that_they_should(isa: Isa) -> None:
    random = np.random.default_rng(2)
    base, exponent = random.uniform(-9, 9, _SIZE), random.integers(-5, 6, _SIZE).astype(np.float64)
    base[200:], exponent[200:] = np.exp(random.uniform(-5, 5, 200)), random.uniform(-4, 4, 200)
    base[:8], exponent[:8] = (0, 0, np.inf, -np.inf, -2, np.nan, 2, 0), (2, -1, 2, 3, 0.5, 2, 200, 0)
    feed = {"x0": base.astype(np.float32), "x1": exponent.astype(np.float32)}
    _compare(_model(_floats("Pow"), "float32", 2), isa, feed, 2e-6)
    feed["x1"] = np.where(exponent == 0, 3, exponent).astype(np.float32)
    feed["x0"][:8] = 5
    _compare(_model(_floats("Mod", fmod=1), "float32", 2), isa, feed, 1e-5, 1e-5)


@pytest.mark.parametrize("dtype", ["int32", "int64", "uint8"])
@pytest.mark.parametrize("isa", ISAS, ids=lambda isa: isa.name)
def test_integers_are_divided_and_their_bits_are_joined(isa: Isa, dtype: str) -> None:
    same: list[Case] = [(op, {}, dtype) for op in ("Div", "Mod", "BitwiseAnd", "BitwiseOr", "BitwiseXor", "Max", "Min")]
    same += [("Greater", {}, "bool"), ("Mod", {"fmod": 1}, dtype)]
    if dtype == "uint8":
        same += [("BitShift", {"direction": "LEFT"}, dtype), ("BitShift", {"direction": "RIGHT"}, dtype)]
    random, least = np.random.default_rng(3), 0 if dtype == "uint8" else -100
    x, y = random.integers(least, 100, _SIZE).astype(dtype), random.integers(1, 8, _SIZE)
    y = y if least == 0 else y * random.choice([-1, 1], _SIZE)
    _compare(_model(same, dtype, 2), isa, {"x0": x, "x1": y.astype(dtype)}, 0)


@pytest.mark.parametrize("isa", ISAS, ids=lambda isa: isa.name)
def test_types_are_converted_as_onnx_runtime_does(isa: Isa) -> None:
    kinds = ("float16", "int32", "int64", "uint8", "bool")
    model = _model([("Cast", {"to": _TYPES[kind]}, kind) for kind in kinds], "float32", 1)
    halves = _model([("Cast", {"to": TensorProto.FLOAT}, "float32"), ("Sqrt", {}, "float16")], "float16", 1)
    x = np.random.default_rng(4).uniform(0, 200, _SIZE).astype(np.float32)
    _compare(model, isa, {"x0": x}, 0)
    _compare(halves, isa, {"x0": x.astype(np.float16)}, 0)


@pytest.mark.parametrize("isa", ISAS, ids=lambda isa: isa.name)
def test_booleans_are_joined(isa: Isa) -> None:
    model = _model([(op, {}, "bool") for op in ("And", "Or", "Xor")], "bool", 2)
    drawn = np.random.default_rng(5).integers(0, 2, (2, _SIZE)).astype(bool)
    _compare(model, isa, {"x0": drawn[0], "x1": drawn[1]}, 0)
