"""Lowering keeps the values: every rule is compared in ONNX Runtime with the model it started from."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper

from graphopt.errors import UsageError
from graphopt.model_io import ShapeBinding, input_specs
from graphopt.reference import Reference, random_feed
from graphopt_backends._lower import lower


def _model(nodes, inputs, outputs, weights, opset=17) -> ir.Model:
    initializers = [v if isinstance(v, onnx.TensorProto) else numpy_helper.from_array(v, k) for k, v in weights.items()]
    graph = helper.make_graph(nodes, "g", inputs, outputs, initializers)
    opsets = [helper.make_opsetid("", opset)]
    return ir.from_proto(helper.make_model(graph, opset_imports=opsets, ir_version=10))


def _value(name, shape, kind=TensorProto.FLOAT):
    return helper.make_tensor_value_info(name, kind, shape)


def _draw(*shape: int) -> np.ndarray:
    return np.random.default_rng(sum(shape)).standard_normal(shape).astype(np.float32)


def _operators(model: ir.Model) -> list[str]:
    return [node.op_type for node in model.graph]


def _same(model: ir.Model, binding: ShapeBinding | None = None) -> ir.Model:
    binding = binding or ShapeBinding()
    lowered = lower(model, binding, "x86").model
    onnx.checker.check_model(ir.to_proto(lowered))
    feed = random_feed(input_specs(lowered), ShapeBinding(), np.random.default_rng(0))
    expected, got = Reference(model, optimize=False).run(feed), Reference(lowered, optimize=False).run(feed)
    assert list(expected) == list(got)
    for name, value in expected.items():
        assert got[name].shape == value.shape
        np.testing.assert_allclose(got[name], value, rtol=0, atol=1e-5)
    return lowered


def test_shape_arithmetic_of_an_exporter_is_folded_away() -> None:
    nodes = [
        helper.make_node("Shape", ["x"], ["s"], "shape"),
        helper.make_node("Gather", ["s", "zero"], ["n"], "first", axis=0),
        helper.make_node("Concat", ["n", "rest"], ["t"], "target", axis=0),
        helper.make_node("Reshape", ["x", "t"], ["y"], "reshape"),
    ]
    weights = {"zero": np.array([0]), "rest": np.array([-1])}
    model = _model(nodes, [_value("x", ["N", 2, 3])], [_value("y", ["N", 6])], weights)
    assert _operators(_same(model)) == ["Reshape"]


def test_branch_that_is_never_taken_is_dropped_and_the_other_inlined() -> None:
    then = helper.make_graph([helper.make_node("Relu", ["x"], ["a"], "relu")], "then", [], [_value("a", [4])])
    other = helper.make_graph([helper.make_node("Neg", ["x"], ["b"], "neg")], "else", [], [_value("b", [4])])
    node = helper.make_node("If", ["flag"], ["y"], "choice", then_branch=then, else_branch=other)
    model = _model([node], [_value("x", [4])], [_value("y", [4])], {"flag": np.array(False)})
    assert "Neg" in _operators(_same(model))
    assert not {"If", "Relu"} & set(_operators(lower(model, ShapeBinding(), "x86").model))


def test_constant_output_stays_an_output() -> None:
    nodes = [
        helper.make_node("Add", ["a", "a"], ["y"], "double"),
        helper.make_node("Relu", ["x"], ["z"], "relu"),
    ]
    model = _model(nodes, [_value("x", [3])], [_value("y", [2]), _value("z", [3])], {"a": _draw(2)})
    assert [o.name for o in _same(model).graph.outputs] == ["y", "z"]


@pytest.mark.parametrize("mode", ["SAME_UPPER", "SAME_LOWER", "VALID"])
@pytest.mark.parametrize("stride", [1, 2])
def test_automatic_padding_becomes_explicit(mode: str, stride: int) -> None:
    dilations = [1, 2] if mode == "VALID" else [1, 1]  # ONNX Runtime refuses the rest
    conv = helper.make_node("Conv", ["x", "w"], ["c"], "conv", auto_pad=mode, strides=[stride] * 2, dilations=dilations)
    pool = helper.make_node("MaxPool", ["c"], ["y"], "pool", kernel_shape=[2, 2], auto_pad=mode, strides=[stride] * 2)
    model = _model([conv, pool], [_value("x", [1, 2, 9, 10])], [_value("y", None)], {"w": _draw(3, 2, 3, 2)})
    lowered = _same(model)
    assert all("auto_pad" not in node.attributes for node in lowered.graph)


def test_batch_norm_becomes_multiply_and_add() -> None:
    weights = {"s": _draw(3), "b": _draw(3) + 1, "m": _draw(3) * 2, "v": np.abs(_draw(3)) + 0.1}
    node = helper.make_node("BatchNormalization", ["x", "s", "b", "m", "v"], ["y"], "norm")
    model = _model([node], [_value("x", [1, 3, 4, 4])], [_value("y", [1, 3, 4, 4])], weights)
    assert _operators(_same(model)) == ["Mul", "Add"]


@pytest.mark.parametrize("kind", [TensorProto.INT4, TensorProto.UINT4, TensorProto.INT8])
def test_blocked_weights_are_dequantized_by_plain_operators(kind: int) -> None:
    values = np.random.default_rng(0).integers(0, 7, (32, 16))
    weight = helper.make_tensor("w", kind, values.shape, values.flatten().tolist())
    nodes = [
        helper.make_node("DequantizeLinear", ["w", "s"], ["d"], "dq", axis=0, block_size=8),
        helper.make_node("MatMul", ["x", "d"], ["y"], "matmul"),
    ]
    weights = {"w": weight, "s": np.abs(_draw(4, 16))}
    model = _model(nodes, [_value("x", [2, 32])], [_value("y", [2, 16])], weights, opset=21)
    lowered = _same(model)
    assert "DequantizeLinear" not in _operators(lowered)
    assert all(v.const_value.dtype.bitwidth >= 8 for v in lowered.graph.initializers.values() if v.const_value)


def test_weights_of_linear_operators_stay_integers() -> None:
    weights = {"w": np.ones((8, 4), np.int8), "s": np.float32(0.1)}
    nodes = [
        helper.make_node("DequantizeLinear", ["w", "s"], ["d"], "dq"),
        helper.make_node("MatMul", ["x", "d"], ["y"], "matmul"),
    ]
    model = _model(nodes, [_value("x", [2, 8])], [_value("y", [2, 4])], weights)
    assert _operators(_same(model)) == ["DequantizeLinear", "MatMul"]


def test_model_of_an_old_operator_set_is_raised_and_its_nodes_keep_apart() -> None:
    weights = {"s": np.array([1, 1, 2, 2], np.float32)}
    nodes = [helper.make_node("Upsample", ["x", "s"], ["y"], mode="nearest"), helper.make_node("Relu", ["y"], ["z"])]
    model = _model(nodes, [_value("x", [1, 2, 3, 3])], [_value("z", None)], weights, opset=9)
    lowered = _same(model)
    names = [node.name for node in lowered.graph]
    assert len(set(names)) == len(names)
    assert "Upsample" not in _operators(lowered)


def test_named_batch_is_one_wherever_it_stands() -> None:
    node = helper.make_node("Add", ["a", "b"], ["y"], "add")
    model = _model([node], [_value("a", ["B", 3]), _value("b", [2, "B", 3])], [_value("y", None)], {})
    lowered = lower(model, ShapeBinding(), "x86")
    assert lowered.fixed == ("B = 1",)
    assert [spec.shape for spec in input_specs(lowered.model)] == [(1, 3), (2, 1, 3)]


def test_shape_of_one_input_fixes_the_same_dimension_of_another() -> None:
    node = helper.make_node("Add", ["a", "b"], ["y"], "add")
    model = _model([node], [_value("a", [1, "T"]), _value("b", [1, "T"])], [_value("y", None)], {})
    lowered = lower(model, ShapeBinding(shapes={"a": (1, 7)}), "x86").model
    assert [spec.shape for spec in input_specs(lowered)] == [(1, 7), (1, 7)]


def test_unnamed_open_dimension_asks_for_a_shape() -> None:
    model = _model([helper.make_node("Relu", ["a"], ["y"])], [_value("a", [1, None])], [_value("y", None)], {})
    with pytest.raises(UsageError, match=r"dimension 1 is dynamic.*give --shape a=1xN"):
        lower(model, ShapeBinding(), "x86")


def test_model_itself_does_not_change() -> None:
    model = _model([helper.make_node("Relu", ["a"], ["y"], "r")], [_value("a", ["N", 3])], [_value("y", ["N", 3])], {})
    before = ir.to_proto(model).SerializeToString(deterministic=True)
    lower(model, ShapeBinding(), "x86")
    assert ir.to_proto(model).SerializeToString(deterministic=True) == before


def test_weights_of_four_bit_codes_are_looked_up_whatever_their_size() -> None:
    codes = np.random.default_rng(0).integers(0, 16, (64, 64, 3, 3)).astype(np.uint8)
    held = helper.make_tensor("codes", TensorProto.UINT4, codes.shape, codes.reshape(-1))
    nodes = [
        helper.make_node("Cast", ["codes"], ["index"], to=TensorProto.INT32),
        helper.make_node("Gather", ["table", "index"], ["w"]),
        helper.make_node("Conv", ["x", "w"], ["y"]),
    ]
    model = _model(
        nodes, [_value("x", [1, 64, 5, 5])], [_value("y", [1, 64, 3, 3])], {"codes": held, "table": _draw(16)}, opset=21
    )
    assert _operators(_same(model)) == ["Conv"]


def test_a_large_table_of_bytes_that_codes_look_up_is_evaluated() -> None:
    rng = np.random.default_rng(0)
    nodes = [
        helper.make_node("DequantizeLinear", ["steps", "scale"], ["table"], axis=1),
        helper.make_node("Cast", ["codes"], ["index"], to=TensorProto.INT32),
        helper.make_node("GatherElements", ["table", "index"], ["w"], axis=0),
        helper.make_node("MatMul", ["x", "w"], ["y"]),
    ]
    constants = {
        "steps": rng.integers(-127, 128, (256, 96)).astype(np.int8),
        "scale": np.abs(_draw(96)) / 500,
        "codes": rng.integers(0, 256, (320, 96)).astype(np.uint8),
    }
    model = _model(nodes, [_value("x", [2, 320])], [_value("y", [2, 96])], constants)
    assert _operators(_same(model)) == ["MatMul"]


def test_a_table_of_bytes_that_the_caller_looks_up_stays_bytes() -> None:
    nodes = [
        helper.make_node("DequantizeLinear", ["steps", "scale"], ["table"]),
        helper.make_node("Gather", ["table", "x"], ["y"]),
    ]
    constants = {"steps": np.ones((500, 64), np.int8), "scale": np.float32(0.1)}
    model = _model(nodes, [_value("x", [2], TensorProto.INT64)], [_value("y", [2, 64])], constants)
    assert "DequantizeLinear" in _operators(_same(model))
