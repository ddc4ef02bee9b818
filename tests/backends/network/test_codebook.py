"""What the pass `share` writes runs on its codes as they are, and gives what ONNX Runtime gives."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from kernel_runner import runnable
from network_runner import run_network
from onnx import TensorProto, helper, numpy_helper
from passes.share.share_models import levels, share
from text_models import build

from graphopt.errors import ModelError
from graphopt.model_io import ShapeBinding
from graphopt.reference import Reference
from graphopt.targets import Isa
from graphopt_backends._lower import lower
from graphopt_backends.network.blockwise import keeps

ISAS = runnable()
pytestmark = pytest.mark.skipif(not ISAS, reason="this CPU runs none of the kernels")
each_isa = pytest.mark.parametrize("isa", ISAS, ids=lambda isa: isa.name)

MATMUL = "g (float[{rows},176] x) => (float[{rows},120] y) {{ a = MatMul(x, w)  y = Relu(a) }}"
BATCHES = "g (float[2,{rows},176] x) => (float[2,{rows},120] y) {{ y = MatMul(x, w) }}"
GEMM = "g (float[{rows},176] x) => (float[{rows},120] y) {{ y = Gemm<alpha = 0.5, beta = 2.0>(x, w, b) }}"
TURNED = "g (float[{rows},176] x) => (float[{rows},120] y) {{ y = Gemm<transB = 1, alpha = 3.0>(x, w, b) }}"
SHAPES = {MATMUL: (176, 120), BATCHES: (176, 120), GEMM: (176, 120), TURNED: (120, 176)}
_RNG = np.random.default_rng(5)


def _shared(text: str, rows: int, dtype: type = np.float32, **options: Any) -> ir.Model:
    """A model of one product, whose weight the pass has stored in tables."""
    weights = {"w": (_RNG.standard_normal(SHAPES[text]) / 8).astype(dtype)}
    if "b)" in text:
        weights["b"] = _RNG.standard_normal(120).astype(dtype)
    filled = text.format(rows=rows)
    model = build(filled.replace("float[", "float16[") if dtype is np.float16 else filled, **weights)
    assert share(model, **options).modified
    return model


def _check(model: ir.Model, isa: Isa, kernel: str, tolerance: float = 2e-5) -> None:
    (source,) = model.graph.inputs
    assert source.dtype is not None
    shape = [int(size) for size in source.shape or ()]
    for seed in range(2):
        feed = {"x": np.random.default_rng(seed).standard_normal(shape).astype(source.dtype.numpy())}
        got, ran = run_network(model, isa, feed)
        assert ran.count(kernel) == 1
        assert not {"Lookup", "Loops"} & set(ran) - ({"Loops"} if source.dtype != ir.DataType.FLOAT else set())
        expected = Reference(model, optimize=False).run(feed)["y"].astype(np.float32)
        np.testing.assert_allclose(got["y"], expected, atol=tolerance * float(np.abs(expected).max()))


@each_isa
@pytest.mark.parametrize(
    ("text", "rows", "options"),
    [
        (MATMUL, 1, {}),
        (MATMUL, 37, {"bits": 3}),
        (MATMUL, 5, {"channels": 1}),
        (MATMUL, 2, {"channels": 8, "int8": True}),
        (BATCHES, 3, {"bits": 2}),
        (BATCHES, 1, {"entries": 11, "channels": 5}),
        (GEMM, 4, {"channels": 20}),
        (GEMM, 1, {"int8": True}),
        (TURNED, 1, {"channels": 1, "int8": True}),
        (TURNED, 7, {"channels": 24}),
        (TURNED, 16, {"bits": 1}),
    ],
)
def test_a_product_with_shared_weights_equals_onnx_runtime(
    isa: Isa, text: str, rows: int, options: dict[str, Any]
) -> None:
    _check(_shared(text, rows, **options), isa, "Codebook")


@each_isa
@pytest.mark.parametrize("bits", [5, 6])
def test_codes_of_bytes_are_looked_up_where_registers_hold_the_table(isa: Isa, bits: int) -> None:
    _check(_shared(TURNED, 3, bits=bits), isa, "Codebook" if isa.vector_bits == 512 else "Gemm")


@each_isa
def test_codes_of_bytes_in_a_table_of_256_become_floats(isa: Isa) -> None:
    _check(_shared(MATMUL, 2, bits=8), isa, "Gemm")


@each_isa
@pytest.mark.parametrize("channels", [0, 1])
def test_tables_of_16_bit_floats_are_widened(isa: Isa, channels: int) -> None:
    _check(_shared(MATMUL, 2, np.float16, channels=channels), isa, "Codebook", 2e-3)


@each_isa
@pytest.mark.parametrize("text", [MATMUL, TURNED])
def test_vectors_that_share_a_code_become_floats(isa: Isa, text: str) -> None:
    _check(_shared(text, 2, width=2), isa, "Gemm")


@each_isa
def test_products_may_share_a_weight(isa: Isa) -> None:
    text = "g (float[3,64] x) => (float[3,64] y) { a = MatMul(x, w)  b = Tanh(a)  y = MatMul(b, w) }"
    model = build(text, w=levels(64, 64))
    assert share(model).modified
    feed = {"x": np.random.default_rng(0).standard_normal((3, 64)).astype(np.float32)}
    got, ran = run_network(model, isa, feed)
    assert ran == ["Codebook", "Codebook"]
    expected = Reference(model, optimize=False).run(feed)["y"]
    np.testing.assert_allclose(got["y"], expected, atol=2e-5 * float(np.abs(expected).max()))


def _small(dtype: int, name: str, codes: np.ndarray) -> Any:
    return helper.make_tensor(name, dtype, codes.shape, codes.reshape(-1).tolist())


def _looked_up(nodes: list[Any], constants: dict[str, np.ndarray], codes: np.ndarray, bits: int = 4) -> ir.Model:
    dtype = {4: TensorProto.UINT4, 8: TensorProto.UINT8}[bits]
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        [helper.make_node("Cast", ["codes"], ["places"], to=TensorProto.INT64), *nodes],
        "g",
        [value("x", TensorProto.FLOAT, [2, 48])],
        [value("y", TensorProto.FLOAT, None)],
        [_small(dtype, "codes", codes), *(numpy_helper.from_array(array, name) for name, array in constants.items())],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    return ir.from_proto(model)


def _drawn(*shape: int) -> np.ndarray:
    return np.random.default_rng(len(shape)).standard_normal(shape).astype(np.float32)


@each_isa
def test_tables_along_k_are_looked_up_when_compiling(isa: Isa) -> None:
    codes = np.random.default_rng(0).integers(0, 16, (48, 40))
    nodes = [
        helper.make_node("GatherElements", ["table", "places"], ["w"], axis=1),
        helper.make_node("MatMul", ["x", "w"], ["y"]),
    ]
    _check(_looked_up(nodes, {"table": _drawn(48, 16)}, codes), isa, "Gemm")


@each_isa
def test_tables_of_bytes_with_zero_points_are_dequantized(isa: Isa) -> None:
    codes = np.random.default_rng(0).integers(0, 16, (48, 40))
    constants = {
        "steps": np.random.default_rng(1).integers(0, 256, (16, 40)).astype(np.uint8),
        "scale": np.abs(_drawn(40)),
        "zero": np.random.default_rng(2).integers(100, 150, 40).astype(np.uint8),
    }
    nodes = [
        helper.make_node("DequantizeLinear", ["steps", "scale", "zero"], ["table"], axis=1),
        helper.make_node("GatherElements", ["table", "places"], ["w"], axis=0),
        helper.make_node("MatMul", ["x", "w"], ["y"]),
    ]
    _check(_looked_up(nodes, constants, codes), isa, "Codebook")


@each_isa
def test_a_table_with_an_infinite_number_becomes_floats(isa: Isa) -> None:
    table = _drawn(16)
    table[0] = -np.inf
    nodes = [helper.make_node("Gather", ["table", "places"], ["w"]), helper.make_node("MatMul", ["x", "w"], ["y"])]
    model = _looked_up(nodes, {"table": table}, np.random.default_rng(0).integers(1, 16, (48, 40)))
    _check(model, isa, "Gemm")


@pytest.mark.parametrize(
    ("table", "operator", "bits"),
    [((11,), "Gather", 4), ((200,), "Gather", 8), ((11, 40), "GatherElements", 4), ((200, 40), "GatherElements", 8)],
)
def test_a_code_behind_the_end_of_its_table_is_an_error(table: tuple[int, ...], operator: str, bits: int) -> None:
    nodes = [
        helper.make_node(operator, ["table", "places"], ["w"], name="lookup"),
        helper.make_node("MatMul", ["x", "w"], ["y"]),
    ]
    model = _looked_up(nodes, {"table": _drawn(*table)}, np.full((48, 40), table[0]), bits)
    with pytest.raises(ModelError, match=f"node 'lookup': looks up entry {table[0]} of a table of {table[0]}"):
        run_network(model, ISAS[0], {"x": np.ones((2, 48), np.float32)})


def test_what_something_else_reads_too_is_looked_up_when_compiling() -> None:
    nodes = [
        helper.make_node("Gather", ["table", "places"], ["w"]),
        helper.make_node("MatMul", ["x", "w"], ["p"]),
        helper.make_node("ReduceSum", ["w"], ["s"], keepdims=0),
        helper.make_node("Add", ["p", "s"], ["y"]),
    ]
    model = _looked_up(nodes, {"table": _drawn(16)}, np.random.default_rng(0).integers(0, 16, (48, 40)))
    lowered = lower(model, ShapeBinding(), "x86", keeps).model
    assert not {"Gather", "Cast"} & {node.op_type for node in lowered.graph}
