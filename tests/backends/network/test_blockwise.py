"""Graphs with weights of 4 bits run on them as they are, and give what ONNX Runtime gives."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from kernel_runner import runnable
from network_runner import run_network
from onnx import TensorProto, helper, numpy_helper

from graphopt.model_io import ShapeBinding
from graphopt.reference import Reference
from graphopt.targets import Isa
from graphopt_backends._lower import lower
from graphopt_backends.network.blockwise import keeps

ISAS = runnable()
pytestmark = pytest.mark.skipif(not ISAS, reason="this CPU runs none of the kernels")
each_isa = pytest.mark.parametrize("isa", ISAS, ids=lambda isa: isa.name)


def _model(nodes: list[Any], rows: tuple[int, ...], depth: int, constants: list[Any]) -> ir.Model:
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [*rows, depth])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        constants,
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets)
    model.ir_version = 10
    return ir.from_proto(model)


def _check(model: ir.Model, isa: Isa, shape: tuple[int, ...], tolerance: float, kernels: list[str]) -> None:
    feed = {"x": np.random.default_rng(1).standard_normal(shape).astype(np.float32)}
    got, ran = run_network(model, isa, feed)
    assert ran == kernels
    expected = Reference(model, optimize=False).run(feed)["y"]
    np.testing.assert_allclose(got["y"], expected, atol=tolerance * np.abs(expected).max())


def _small(name: str, values: np.ndarray, dtype: int) -> Any:
    return helper.make_tensor(name, dtype, values.shape, values.reshape(-1).tolist())


def _packed(codes: np.ndarray) -> np.ndarray:
    """Two codes in a byte, the first one low."""
    if codes.shape[-1] % 2:
        codes = np.concatenate([codes, np.zeros((*codes.shape[:-1], 1), codes.dtype)], -1)
    return codes[..., ::2] | (codes[..., 1::2] << 4)


@each_isa
@pytest.mark.parametrize(
    ("rows", "depth", "columns", "block", "zeros", "bias", "level"),
    [
        ((1,), 96, 40, 32, "none", False, 0),
        ((2, 5), 100, 33, 16, "packed", True, 0),
        ((7,), 128, 70, 64, "float", False, 1),
        ((1,), 64, 17, 32, "packed", True, 4),
        ((3, 4), 96, 50, 32, "none", True, 4),
        ((9,), 300, 35, 128, "packed", False, 4),
    ],
)
def test_a_matmul_n_bits_equals_onnx_runtime(
    isa: Isa, rows: tuple[int, ...], depth: int, columns: int, block: int, zeros: str, bias: bool, level: int
) -> None:
    rng = np.random.default_rng(depth)
    blocks = -(-depth // block)
    codes = rng.integers(0, 16, (columns, blocks, block), np.uint8)
    constants = [
        numpy_helper.from_array(_packed(codes), "w"),
        numpy_helper.from_array(rng.uniform(0.01, 0.02, columns * blocks).astype(np.float32), "s"),
    ]
    inputs = ["x", "w", "s", "", "", ""]
    if zeros == "packed":
        inputs[3] = "z"
        packed = _packed(rng.integers(0, 16, (columns, blocks), np.uint8))
        constants.append(numpy_helper.from_array(packed.reshape(-1), "z"))
    elif zeros == "float":
        inputs[3] = "z"
        constants.append(numpy_helper.from_array(rng.uniform(4, 12, (columns, blocks)).astype(np.float32), "z"))
    if bias:
        inputs[5] = "b"
        constants.append(numpy_helper.from_array(rng.standard_normal(columns).astype(np.float32), "b"))
    while not inputs[-1]:
        inputs.pop()
    node = helper.make_node(
        "MatMulNBits", inputs, ["p"], "product", domain="com.microsoft", K=depth, N=columns, bits=4, block_size=block,
        accuracy_level=level,
    )  # fmt: skip
    nodes = [node, helper.make_node("Relu", ["p"], ["y"], "relu")]
    model = _model(nodes, rows, depth, constants)
    _check(model, isa, (*rows, depth), 0.02 if level == 4 else 1e-4, ["Blockwise"])


@each_isa
@pytest.mark.parametrize("zeros", [False, True])
def test_a_matmul_n_bits_of_bytes_equals_onnx_runtime(isa: Isa, zeros: bool) -> None:
    rng = np.random.default_rng(7)
    depth, columns, block = 80, 21, 32
    constants = [
        numpy_helper.from_array(rng.integers(0, 256, (columns, 3, block), np.uint8), "w"),
        numpy_helper.from_array(rng.uniform(0.01, 0.02, columns * 3).astype(np.float32), "s"),
        numpy_helper.from_array(rng.integers(100, 150, (columns, 3), np.uint8), "z"),
    ]
    node = helper.make_node(
        "MatMulNBits", ["x", "w", "s", *(["z"] if zeros else [])], ["y"], "product", domain="com.microsoft", K=depth,
        N=columns, bits=8, block_size=block,
    )  # fmt: skip
    _check(_model([node], (4,), depth, constants), isa, (4, depth), 1e-4, ["Gemm"])


@each_isa
@pytest.mark.parametrize(
    ("operator", "flipped", "dtype", "block", "zeros"),
    [
        ("MatMul", False, TensorProto.INT4, 32, False),
        ("MatMul", False, TensorProto.UINT4, 16, True),
        ("Gemm", False, TensorProto.INT4, 64, True),
        ("Gemm", True, TensorProto.UINT4, 32, True),
        ("MatMul", False, TensorProto.INT4, 0, False),
        ("Gemm", True, TensorProto.UINT4, 0, True),
        ("Gemm", True, TensorProto.INT4, -1, False),
        ("MatMul", False, TensorProto.UINT8, 32, True),
        ("Gemm", True, TensorProto.INT8, 16, True),
    ],
)
def test_products_of_dequantized_weights_equal_onnx_runtime(
    isa: Isa, operator: str, flipped: bool, dtype: int, block: int, zeros: bool
) -> None:
    rng = np.random.default_rng(block + flipped)
    depth, columns = 192, 45
    bits = 8 if dtype in (TensorProto.INT8, TensorProto.UINT8) else 4
    least = -(2 ** (bits - 1)) if dtype in (TensorProto.INT4, TensorProto.INT8) else 0
    most = least + 2**bits
    shape = (columns, depth) if flipped else (depth, columns)
    along, axis = (1, 0) if flipped else (0, 1)
    if block > 0:
        axis, sizes = along, tuple(n // block if i == along else n for i, n in enumerate(shape))
    else:
        sizes = (columns,) if block == 0 else ()  # a scale for each column, or one for all
    constants = [
        _small("q", rng.integers(least, most, shape), dtype),
        numpy_helper.from_array(rng.uniform(0.01, 0.02, sizes).astype(np.float32), "s"),
    ]
    inputs = ["q", "s"]
    if zeros:
        inputs.append("z")
        constants.append(_small("z", rng.integers(least, most, sizes), dtype))
    attributes = {"block_size": block} if block > 0 else {}
    nodes = [helper.make_node("DequantizeLinear", inputs, ["w"], "dequantize", axis=axis, **attributes)]
    if operator == "Gemm":
        constants.append(numpy_helper.from_array(rng.standard_normal(columns).astype(np.float32), "b"))
        nodes.append(
            helper.make_node("Gemm", ["x", "w", "b"], ["y"], "product", transB=int(flipped), alpha=0.5, beta=2.0)
        )
    else:
        nodes.append(helper.make_node("MatMul", ["x", "w"], ["y"], "product"))
    model = _model(nodes, (5,), depth, constants)
    tolerance, kernel = (0.02, "Blockwise") if bits == 4 else (1e-4, "Gemm")
    _check(model, isa, (5, depth), tolerance, [kernel])


def test_a_weight_that_something_else_reads_too_becomes_bytes() -> None:
    constants = [
        _small("q", np.zeros((32, 4), np.int64), TensorProto.INT4),
        numpy_helper.from_array(np.ones((1, 4), np.float32), "s"),
    ]
    nodes = [
        helper.make_node("DequantizeLinear", ["q", "s"], ["w"], "dequantize", axis=0, block_size=32),
        helper.make_node("MatMul", ["x", "w"], ["p"], "product"),
        helper.make_node("ReduceSum", ["w"], ["r"], "sum", keepdims=0),
        helper.make_node("Add", ["p", "r"], ["y"], "add"),
    ]
    lowered = lower(_model(nodes, (2,), 32, constants), ShapeBinding(), "x86", keeps).model
    dtypes = {value.const_value.dtype for value in lowered.graph.initializers.values() if value.const_value is not None}
    assert ir.DataType.INT4 not in dtypes


def test_lowering_makes_bytes_of_weights_unless_it_is_told_what_to_keep() -> None:
    constants = [
        _small("q", np.zeros((32, 4), np.int64), TensorProto.INT4),
        numpy_helper.from_array(np.ones((1, 4), np.float32), "s"),
    ]
    nodes = [
        helper.make_node("DequantizeLinear", ["q", "s"], ["w"], "dequantize", axis=0, block_size=32),
        helper.make_node("MatMul", ["x", "w"], ["y"], "product"),
    ]
    lowered = lower(_model(nodes, (2,), 32, constants), ShapeBinding(), "x86").model
    assert not any(node.attributes.get_int("block_size", 0) for node in lowered.graph)
    dtypes = {value.const_value.dtype for value in lowered.graph.initializers.values() if value.const_value is not None}
    assert ir.DataType.INT4 not in dtypes
