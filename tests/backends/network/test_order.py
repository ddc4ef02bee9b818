"""Running sums, places of extremes, greatest elements, and reductions of integers equal ONNX Runtime's."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from kernel_runner import runnable
from network_runner import run_network
from onnx import TensorProto, helper, numpy_helper

from graphopt.reference import Reference
from graphopt.targets import Isa

ISAS = runnable()
pytestmark = pytest.mark.skipif(not ISAS, reason="this CPU runs none of the kernels")

_FLOAT, _LONG, _INT, _BYTE = TensorProto.FLOAT, TensorProto.INT64, TensorProto.INT32, TensorProto.UINT8
_DTYPES = {_FLOAT: np.float32, _LONG: np.int64, _INT: np.int32, _BYTE: np.uint8}
Node = tuple[str, int, dict[str, object]]


def _model(nodes: list[Node], kind: int, shape: tuple[int, ...], second: np.ndarray | None = None) -> ir.Model:
    """One node for each operator, all on the same input; the second input is a constant."""
    made, outputs = [], []
    names = ["x", "c"] if second is not None else ["x"]
    for i, (operator, result, attributes) in enumerate(nodes):
        results = [f"y{i}", f"p{i}"] if operator == "TopK" else [f"y{i}"]
        made.append(helper.make_node(operator, names, results, **attributes))
        outputs += [helper.make_tensor_value_info(n, result if n[0] == "y" else _LONG, None) for n in results]
    held = [numpy_helper.from_array(second, "c")] if second is not None else []
    graph = helper.make_graph(made, "g", [helper.make_tensor_value_info("x", kind, shape)], outputs, held)
    return ir.from_proto(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9))


def _compare(model: ir.Model, isa: Isa, x: np.ndarray) -> None:
    expected = Reference(model.clone(), threads=1, optimize=False).run({"x": x})
    got, _ = run_network(model, isa, {"x": x})
    for name, value in expected.items():
        np.testing.assert_allclose(got[name], value, rtol=1e-5, atol=1e-5, err_msg=name)


def _drawn(kind: int, shape: tuple[int, ...], values: int = 40) -> np.ndarray:
    """Few different values, so that many are equal."""
    low = 0 if kind == _BYTE else -values
    return np.random.default_rng(sum(shape)).integers(low, values, shape).astype(_DTYPES[kind])


@pytest.mark.parametrize("isa", ISAS, ids=lambda isa: isa.name)
@pytest.mark.parametrize(("kind", "shape"), [(_FLOAT, (3, 37, 5)), (_LONG, (2, 9, 17)), (_BYTE, (4, 70, 1))])
def test_places_of_extremes_are_the_first_or_the_last(isa: Isa, kind: int, shape: tuple[int, ...]) -> None:
    nodes = [
        (operator, _LONG, {"axis": axis, "keepdims": keep, "select_last_index": last})
        for operator, axis, keep, last in [
            ("ArgMax", 1, 1, 0), ("ArgMax", 2, 0, 1), ("ArgMin", -1, 1, 0), ("ArgMin", 1, 0, 1), ("ArgMax", 0, 1, 0),
        ]
    ]  # fmt: skip
    if kind != _FLOAT:
        nodes = [node for node in nodes if kind == _LONG or node[0] == "ArgMax"][:3]
    if kind == _LONG:
        kind = _INT
    _compare(_model(nodes, kind, shape), isa, _drawn(kind, shape))


@pytest.mark.parametrize("isa", ISAS, ids=lambda isa: isa.name)
@pytest.mark.parametrize("axis", [0, 1, -1])
@pytest.mark.parametrize("kind", [_FLOAT, _LONG])
def test_sums_run_in_both_directions(isa: Isa, axis: int, kind: int) -> None:
    nodes: list[Node] = [("CumSum", kind, {"exclusive": e, "reverse": r}) for e in (0, 1) for r in (0, 1)]
    model = _model(nodes, kind, (3, 6, 19), np.array(axis, np.int64))
    _compare(model, isa, _drawn(kind, (3, 6, 19)))


@pytest.mark.parametrize("isa", ISAS, ids=lambda isa: isa.name)
@pytest.mark.parametrize("count", [1, 2, 7, 33])
def test_the_greatest_elements_come_in_order(isa: Isa, count: int) -> None:
    nodes: list[Node] = [("TopK", _FLOAT, {"axis": 1, "largest": largest}) for largest in (0, 1)]
    for values in (5, 1000):  # among equal ones the first is taken
        model = _model(nodes, _FLOAT, (3, 33, 2), np.array([count], np.int64))
        _compare(model, isa, _drawn(_FLOAT, (3, 33, 2), values))


@pytest.mark.parametrize("isa", ISAS, ids=lambda isa: isa.name)
@pytest.mark.parametrize("kind", [_LONG, _INT])
def test_integers_are_reduced_without_rounding(isa: Isa, kind: int) -> None:
    operators, axes = ["ReduceSum", "ReduceMax", "ReduceMin"], np.array([0, 2], np.int64)
    nodes: list[Node] = [(operator, kind, {"keepdims": keep}) for operator in operators for keep in (0, 1)]
    _compare(_model(nodes, kind, (3, 4, 5), axes), isa, _drawn(kind, (3, 4, 5), 3) + (1 << 25))
    _compare(_model([("ReduceProd", kind, {})], kind, (3, 4, 5), axes), isa, _drawn(kind, (3, 4, 5), 3))


@pytest.mark.parametrize("isa", ISAS, ids=lambda isa: isa.name)
def test_products_of_numbers(isa: Isa) -> None:
    for axis in (0, 1, 2):
        model = _model([("ReduceProd", _FLOAT, {})], _FLOAT, (3, 4, 5), np.array([axis], np.int64))
        _compare(model, isa, np.random.default_rng(axis).standard_normal((3, 4, 5)).astype(np.float32))
