"""Scales and zero points that stand around a part, as the C header gives them."""

from __future__ import annotations

import onnx_ir as ir

from graphopt_backends.npu.header import Port
from graphopt_backends.npu.ports import ports
from graphopt_backends.npu.tosa import Tensor

PART = """
<ir_version: 10, opset_import: ["" : 21]>
part (int8[1,3,8,8] x, int8[1,3,8,8] moved) => (int8[1,3,8,8] y, int8[1,3,8,8] kept, int64[1] index)
<float s = {0.5}, int8 z = {-7}, float t = {0.25}, int8 n = {3}, float[3] many = {1.0, 2.0, 3.0}, int64[1] one = {1}>
{
    a = DequantizeLinear (x, s, z)
    y = QuantizeLinear (a, t, n)
    kept = Identity (moved)
    b = DequantizeLinear <axis = 1> (moved, many)
    index = Identity (one)
}
"""


def test_a_port_has_the_grid_of_what_stands_beside_it() -> None:
    graph = ir.from_onnx_text(PART).graph
    layout = (1, 8, 8, 3)
    inputs = ports(graph.inputs, [Tensor("t0", layout, "int8"), Tensor("t1", layout, "int8")])
    assert inputs[0] == Port("x", "int8", layout, 0.5, -7)
    assert inputs[1] == Port("moved", "int8", layout, None, 0), "several scales are not one"
    outputs = ports(graph.outputs, [Tensor(f"t{i}", layout, "int8") for i in range(2)] + [Tensor("t2", (1,), "int32")])
    assert outputs[0] == Port("y", "int8", layout, 0.25, 3)
    assert outputs[1] == Port("kept", "int8", layout, None, 0), "nothing says what it stands for"
    assert outputs[2] == Port("index", "int32", (1,), None, 0)
