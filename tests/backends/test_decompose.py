"""Operators that others express keep their values: in ONNX Runtime and compiled."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from kernel_runner import runnable
from network_runner import run_network
from onnx import TensorProto, helper, numpy_helper

from graphopt.model_io import ShapeBinding
from graphopt.reference import Reference
from graphopt_backends._lower import lower

ISAS = runnable()
pytestmark = pytest.mark.skipif(not ISAS, reason="this CPU runs none of the kernels")

Weights = dict[str, np.ndarray | tuple[int, ...]]


def _model(
    operator: str, inputs: dict[str, tuple[int, ...]], weights: Weights, opset: int = 18, kind: int = TensorProto.FLOAT,
    **attributes: object,
) -> ir.Model:  # fmt: skip
    random = np.random.default_rng(5)
    drawn = {
        k: v if isinstance(v, np.ndarray) else random.standard_normal(v).astype(np.float32) for k, v in weights.items()
    }
    node = helper.make_node(operator, [*inputs, *weights], ["y"], "node", **attributes)
    graph = helper.make_graph(
        [node], "g", [helper.make_tensor_value_info(n, kind, s) for n, s in inputs.items()],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(array, name) for name, array in drawn.items()],
    )  # fmt: skip
    return ir.from_proto(helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=9))


def _check(model: ir.Model, integers: int = 0, *, compiled: bool = True) -> None:
    """Four random inputs; the operator is gone."""
    operator = next(iter(model.graph)).op_type
    reference, lowered = Reference(model.clone(), threads=1), lower(model, ShapeBinding(), "x86").model
    assert operator not in [node.op_type for node in lowered.graph]
    again = Reference(lowered.clone(), threads=1)
    for seed in range(4):
        random = np.random.default_rng(seed)
        shapes = {str(v.name): [int(size) for size in v.shape or ()] for v in model.graph.inputs}
        feed = {name: random.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
        if integers:
            feed = {name: random.integers(-integers, integers, shape) for name, shape in shapes.items()}
        expected = reference.run(feed)["y"]
        np.testing.assert_allclose(again.run(feed)["y"], expected, rtol=1e-4, atol=1e-5)
        if compiled and seed < len(ISAS):
            got, _ = run_network(model, ISAS[seed], feed)
            np.testing.assert_allclose(got["y"], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("size", "weight", "attributes"),
    [
        ((2, 5, 7, 6), (5, 4, 3, 3), {"pads": [1, 1, 1, 1]}),
        ((1, 4, 7, 6), (4, 3, 2, 2), {"strides": [2, 2]}),
        ((1, 4, 5, 6), (4, 3, 4, 4), {"strides": [2, 2], "pads": [1, 1, 1, 1]}),
        ((1, 4, 5, 6), (4, 3, 3, 3), {"strides": [2, 3], "pads": [0, 1, 1, 2], "output_padding": [1, 2]}),
        ((1, 6, 5, 9), (6, 2, 3, 5), {"strides": [1, 2], "dilations": [2, 1], "group": 3, "pads": [4, 2, 4, 2]}),
        ((1, 6, 5, 9), (6, 1, 3, 3), {"strides": [2, 2], "group": 6}),
        ((1, 8, 11, 9), (8, 1, 3, 3), {"dilations": [5, 1], "group": 8, "pads": [10, 1, 10, 1]}),
        ((2, 3, 9), (3, 5, 8), {"strides": [4], "pads": [2, 2]}),
        ((1, 3, 9), (3, 5, 3), {"strides": [2], "dilations": [3], "pads": [7, 7]}),
        ((1, 3, 6, 5), (3, 2, 3, 3), {"strides": [2, 2], "auto_pad": "SAME_UPPER"}),
        ((1, 3, 6, 5), (3, 2, 2, 2), {"strides": [3, 3], "output_shape": [18, 15]}),
    ],
)
def test_a_transposed_convolution_is_a_convolution(size, weight, attributes) -> None:
    filters = weight[1] * attributes.get("group", 1)
    _check(_model("ConvTranspose", {"x": size}, {"w": weight, "b": (filters,)}, **attributes))


@pytest.mark.parametrize(
    ("equation", "shapes"),
    [
        ("bij,bjk->bik", [(2, 3, 4), (2, 4, 5)]), ("bhid,bhjd->bhij", [(2, 3, 4, 5), (2, 3, 6, 5)]),
        ("ij,jk", [(3, 4), (4, 5)]), ("bchw,bkhw->bck", [(2, 3, 4, 5), (2, 6, 4, 5)]), ("i,j->ji", [(3,), (4,)]),
        ("...ij,...jk->...ik", [(2, 3, 4), (2, 4, 5)]), ("bij->b", [(2, 3, 4)]), ("ij,ij->", [(3, 4), (3, 4)]),
        ("ab,bc,cd->ad", [(2, 3), (3, 4), (4, 5)]), ("bqhd,khd->bhqk", [(1, 3, 2, 4), (5, 2, 4)]),
    ],
)  # fmt: skip
def test_einsum_is_products_of_matrices(equation, shapes) -> None:
    _check(_model("Einsum", {f"x{i}": shape for i, shape in enumerate(shapes)}, {}, equation=equation))


@pytest.mark.parametrize(
    ("operator", "size", "weights", "attributes"),
    [
        ("InstanceNormalization", (2, 5, 6, 7), {"s": (5,), "b": (5,)}, {"epsilon": 1e-3}),
        ("InstanceNormalization", (2, 5, 9), {"s": (5,), "b": (5,)}, {}),
        ("MeanVarianceNormalization", (2, 5, 6, 7), {}, {"axes": [0, 2, 3]}),
        ("LpNormalization", (2, 5, 6), {}, {"axis": 1, "p": 1}), ("LpNormalization", (2, 5, 6), {}, {"p": 2}),
        ("LRN", (2, 7, 3, 4), {}, {"size": 5, "alpha": 0.3, "beta": 0.6, "bias": 1.5}),
        ("Trilu", (2, 5, 6), {"k": np.array(1, np.int64)}, {"upper": 1}), ("Trilu", (5, 4), {}, {"upper": 0}),
        ("ReduceLogSumExp", (2, 5, 6), {"axes": np.array([0, 2], np.int64)}, {"keepdims": 0}),
        ("ReduceLogSumExp", (2, 5, 6), {}, {"keepdims": 1}),
    ],
)  # fmt: skip
def test_norms_and_triangles_are_arithmetic(operator, size, weights, attributes) -> None:
    _check(_model(operator, {"x": size}, weights, **attributes))


@pytest.mark.parametrize(("opset", "scales"), [(18, 3), (21, 12)])
def test_groups_are_normalized(opset, scales) -> None:
    weights: Weights = {"s": (scales,), "b": (scales,)}
    # ONNX Runtime has no kernel of opset 18 that takes scales for groups: compare with the function of the operator
    _check(_model("GroupNormalization", {"x": (2, 12, 4, 5)}, weights, opset, num_groups=3))


@pytest.mark.parametrize("axis", [-1, 0, 1])
def test_one_hot_counts_from_both_ends(axis) -> None:
    weights = {"d": np.array([6], np.int64), "v": np.float32([0.5, 3])}
    _check(_model("OneHot", {"x": (3, 4)}, weights, kind=TensorProto.INT64, axis=axis), 6)


def test_a_quantized_weight_of_a_transposed_convolution_stays_one_of_integers() -> None:
    random = np.random.default_rng(2)
    weight = random.integers(-100, 100, (4, 3, 2, 2)).astype(np.int8)
    scales = random.uniform(0.01, 0.02, 3).astype(np.float32)
    nodes = [
        helper.make_node("DequantizeLinear", ["q", "s"], ["w"], "dequantize", axis=1),
        helper.make_node("ConvTranspose", ["x", "w"], ["y"], "up", strides=[2, 2]),
    ]
    graph = helper.make_graph(
        nodes, "g", [helper.make_tensor_value_info("x", TensorProto.FLOAT, (1, 4, 5, 6))],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(weight, "q"), numpy_helper.from_array(scales, "s")],
    )  # fmt: skip
    model = ir.from_proto(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9))
    lowered = lower(model, ShapeBinding(), "x86").model
    assert "DequantizeLinear" in [node.op_type for node in lowered.graph]
    feed = {"x": random.standard_normal((1, 4, 5, 6)).astype(np.float32)}
    expected = Reference(model.clone(), threads=1).run(feed)["y"]
    np.testing.assert_allclose(Reference(lowered.clone()).run(feed)["y"], expected, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(run_network(model, ISAS[-1], feed)[0]["y"], expected, rtol=1e-4, atol=1e-4)
