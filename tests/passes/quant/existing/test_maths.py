from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from graphopt.reference import Reference
from graphopt_passes.quant.existing._maths import blocks_to_matrix, real_numbers, unpack

RNG = np.random.default_rng(0)


def run(
    nodes: list[ir.Node],
    inputs: list[ir.Value],
    output: ir.Value,
    constants: dict[str, np.ndarray],
    feed: dict[str, np.ndarray],
) -> np.ndarray:
    values = {value.name: value for node in nodes for value in node.inputs if value is not None}
    graph = ir.Graph(inputs, [output], nodes=nodes, opset_imports={"": 21, "com.microsoft": 1}, name="g")
    for name, array in constants.items():
        values[name].const_value = ir.tensor(array, name=name)
        graph.register_initializer(values[name])
    return Reference(ir.Model(graph, ir_version=10)).run(feed)["y"]


@pytest.mark.parametrize(
    ("scale", "axis", "block"), [((), 1, 0), ((6,), 0, 0), ((8,), 1, 0), ((8,), -1, 0), ((2, 8), 0, 4), ((6, 3), 1, 3)]
)
@pytest.mark.parametrize("dtype", [np.int8, np.uint8])
def test_real_numbers_are_those_of_dequantizelinear(scale: tuple[int, ...], axis: int, block: int, dtype: type) -> None:
    integers = RNG.integers(0, 100, (6, 8)).astype(dtype)
    steps = RNG.uniform(0.01, 1, scale).astype(np.float32)
    zeros = RNG.integers(0, 50, scale).astype(dtype)
    x = ir.Value(name="x", type=ir.TensorType(ir.DataType(ir.tensor(integers).dtype)), shape=ir.Shape((6, 8)))
    y = ir.Value(name="y", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape((6, 8)))
    attributes = {"axis": axis} | ({"block_size": block} if block else {})
    node = ir.node("DequantizeLinear", [x, ir.Value(name="s"), ir.Value(name="z")], attributes, outputs=[y], name="n")
    expected = run([node], [x], y, {"s": steps, "z": zeros}, {"x": integers})
    np.testing.assert_allclose(real_numbers(integers, steps, zeros, axis, block), expected, rtol=1e-6)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_unpacked_numbers_are_those_that_were_packed(bits: int) -> None:
    numbers = RNG.integers(0, 2**bits, (3, 16)).astype(np.uint8)
    each = 8 // bits
    packed = sum(numbers[:, i::each].astype(np.uint8) << (bits * i) for i in range(each))
    np.testing.assert_array_equal(unpack(np.asarray(packed, np.uint8), bits, 13), numbers[:, :13])


@pytest.mark.parametrize("zero", ["none", "packed", "float"])
@pytest.mark.parametrize(("bits", "rows"), [(4, 64), (4, 70), (8, 64), (2, 64)])
def test_a_matrix_of_blocks_is_what_matmulnbits_multiplies_with(bits: int, rows: int, zero: str) -> None:
    if (bits, zero) == (8, "float"):
        pytest.skip("ONNX Runtime has no kernel for 8 bits with float zero points")
    columns, block = 5, 32
    blocks = -(-rows // block)
    packed = RNG.integers(0, 256, (columns, blocks, block * bits // 8)).astype(np.uint8)
    scales = RNG.uniform(0.01, 1, (columns * blocks,)).astype(np.float32)
    constants = {"b": packed, "s": scales}
    if zero == "packed":
        constants["z"] = RNG.integers(0, 256, (columns * -(-blocks * bits // 8),)).astype(np.uint8)
    elif zero == "float":
        constants["z"] = RNG.uniform(0, 2**bits, (columns, blocks)).astype(np.float32)
    x = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape((rows, rows)))
    y = ir.Value(name="y", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape((rows, columns)))
    inputs = [x, *(ir.Value(name=name) for name in constants)]
    sizes = {"K": rows, "N": columns, "bits": bits, "block_size": block}
    node = ir.node("MatMulNBits", inputs, sizes, outputs=[y], name="n", domain="com.microsoft")
    expected = run([node], [x], y, constants, {"x": np.eye(rows, dtype=np.float32)})
    got = blocks_to_matrix(packed, scales, constants.get("z"), rows=rows, columns=columns, bits=bits, block=block)
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)
