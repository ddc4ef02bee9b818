"""Both branches of a computed condition are one network, of which only the taken side runs."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from kernel_runner import runnable
from network_runner import run_network

from graphopt.model_io import ShapeBinding
from graphopt.reference import Reference
from graphopt.targets import Isa
from graphopt_backends._lower import lower
from graphopt_backends.kernels.condition import Guarded
from graphopt_backends.network.choice import find_guards

ISAS = runnable()
pytestmark = pytest.mark.skipif(not ISAS, reason="this CPU runs none of the kernels")

_TEXT = """
<ir_version: 8, opset_import: ["" : 17]>
g (float[2,6] x, int64[1] rate) => (float[2,6] y, float[1,1] z)
<int64[1] fast = {16}, float half = {0.5}, int64[1] all = {-1}, float[6,6] w = {
    1,0,2,0,0,1, 0,1,0,0,3,0, 1,1,1,0,0,0, 0,0,0,1,0,2, 0,5,0,0,1,0, 1,0,0,0,0,1}> {
    common = Abs(x)
    asked = Equal(rate, fast)
    y, z = If(asked) <
        then_branch = a () => (float[2,6] ya, float[1,1] za) {
            p = MatMul(common, w)
            ya = Tanh(p)
            sa = ReduceSum<keepdims=1>(ya)
            za = Mul(sa, half)
        },
        else_branch = b () => (float[2,6] yb, float[1,1] zb) {
            q = Exp(common)
            yb = Sub(q, x)
            zb = ReduceMax<keepdims=1>(q)
        }>
}
"""


@pytest.mark.parametrize("isa", ISAS, ids=lambda isa: isa.name)
@pytest.mark.parametrize("rate", [16, 8])
def test_the_branch_that_is_asked_for_is_what_comes_out(isa: Isa, rate: int) -> None:
    model = ir.from_onnx_text(_TEXT)
    reference = Reference(model.clone(), threads=1)
    feed = {"x": np.random.default_rng(rate).standard_normal((2, 6)).astype(np.float32), "rate": np.array([rate])}
    got, ran = run_network(model, isa, feed)
    for name, expected in reference.run(feed).items():
        np.testing.assert_allclose(got[name], expected, rtol=1e-5, atol=1e-5)
    assert ran.count(Guarded.__name__) > len(ran) - ran.count(Guarded.__name__)


def test_what_one_side_alone_needs_has_a_guard() -> None:
    lowered = lower(ir.from_onnx_text(_TEXT), ShapeBinding(), "x86").model
    guards = find_guards(lowered.graph)
    wanted = {node.op_type: guard.wanted for node, guard in guards.items()}
    assert wanted == {
        "MatMul": True,
        "Tanh": True,
        "ReduceSum": True,
        "Mul": True,
        "Exp": False,
        "Sub": False,
        "ReduceMax": False,
    }


def test_branches_of_different_shapes_stay_a_condition() -> None:
    text = """
    <ir_version: 8, opset_import: ["" : 17]>
    g (float[2,6] x, bool[1] asked) => (float[N,6] y) <int64[1] first = {0}, int64[1] end = {1}> {
        y = If(asked) <
            then_branch = a () => (float[2,6] ya) { ya = Neg(x) },
            else_branch = b () => (float[1,6] yb) { yb = Slice(x, first, end) }>
    }
    """
    lowered = lower(ir.from_onnx_text(text), ShapeBinding(), "x86").model
    assert [node.op_type for node in lowered.graph] == ["If"]
