"""LSTM, GRU and RNN equal ONNX Runtime's in every direction, with and without first states."""

from __future__ import annotations

import itertools

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
from graphopt_backends.network.convert import unsupported

ISAS = runnable()
pytestmark = pytest.mark.skipif(not ISAS, reason="this CPU runs none of the kernels")

_GATES = {"LSTM": 4, "GRU": 3, "RNN": 1}
_SIZES = [(5, 3, 7, 9), (1, 1, 20, 33), (8, 7, 3, 16), (33, 1, 16, 4), (6, 2, 5, 40)]
_KINDS = [
    (operator, direction, late, bias, state)
    for operator, direction, late, bias, state in itertools.product(
        _GATES, ("forward", "reverse", "bidirectional"), (0, 1), (False, True), (False, True)
    )
    if operator == "GRU" or not late
][::3]  # every third: all pairs of what differs


def _model(
    operator: str, sizes: tuple[int, int, int, int], seed: int = 0, *, bias: bool = True, state: bool = True,
    extra: str = "", **attributes: object,
) -> ir.Model:  # fmt: skip
    """A model of one node; `extra` is the last input: lengths of the sequences, or peepholes."""
    steps, batch, width, hidden = sizes
    random = np.random.default_rng(seed)
    count = 2 if attributes.get("direction") == "bidirectional" else 1
    rows = _GATES[operator] * hidden
    weights = {
        "w": random.standard_normal((count, rows, width)) / width**0.5,
        "r": random.standard_normal((count, rows, hidden)) / hidden**0.5,
        "b": random.standard_normal((count, 2 * rows)), "p": random.standard_normal((count, 3 * hidden)),
    }  # fmt: skip
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, [steps, batch, width])]
    states = ["h", "c"] if operator == "LSTM" else ["h"]
    if state:
        inputs += [helper.make_tensor_value_info(n, TensorProto.FLOAT, [count, batch, hidden]) for n in states]
    names = ["x", "w", "r", "b" if bias else "", "lengths" if extra == "lengths" else ""]
    names += states if state else [""] * len(states)
    if extra == "p":
        names = [*names[:7], "p"]
    held = [numpy_helper.from_array(v.astype(np.float32), k) for k, v in weights.items() if k in names]
    held.append(numpy_helper.from_array(np.full(batch, steps, np.int32), "lengths"))
    node = helper.make_node(operator, names, ["y", "yh", *(["yc"] if operator == "LSTM" else [])], **attributes)
    outputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in node.output]
    graph = helper.make_graph([node], "g", inputs, outputs, held)
    return ir.from_proto(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9))


def _check(model: ir.Model, isa: Isa, seed: int = 0) -> None:
    random = np.random.default_rng(seed)
    feed = {
        str(v.name): random.standard_normal([int(size) for size in v.shape or ()]).astype(np.float32)
        for v in model.graph.inputs
    }
    expected = Reference(model.clone(), threads=1).run(feed)
    got, ran = run_network(model, isa, feed)
    assert ran[:2] == ["Gemm", "Recurrent"]
    for name, value in expected.items():
        np.testing.assert_allclose(got[name], value, rtol=1e-5, atol=1e-5, err_msg=name)


@pytest.mark.parametrize("index", range(len(_KINDS)), ids=lambda i: "-".join(map(str, _KINDS[i])))
def test_every_kind_of_cell_equals_onnx_runtime(index: int) -> None:
    operator, direction, late, bias, state = _KINDS[index]
    attributes = {"linear_before_reset": late} if operator == "GRU" else {}
    sizes = _SIZES[index % len(_SIZES)]
    model = _model(
        operator, sizes, index, bias=bias, state=state, direction=direction, hidden_size=sizes[3], **attributes
    )
    _check(model, ISAS[index % len(ISAS)], index)


@pytest.mark.parametrize("isa", ISAS, ids=lambda isa: isa.name)
def test_activations_and_lengths_that_are_those_of_the_batch(isa: Isa) -> None:
    plain = _model("RNN", (4, 3, 5, 6), extra="lengths", hidden_size=6, activations=["Relu"])
    _check(plain, isa)
    both = ["Sigmoid", "Relu", "Tanh"] * 2
    _check(_model("LSTM", (4, 3, 5, 6), hidden_size=6, activations=both, direction="bidirectional"), isa)


@pytest.mark.parametrize(
    "model",
    [
        _model("LSTM", (2, 1, 3, 4), state=False, extra="p", hidden_size=4),
        _model("LSTM", (2, 1, 3, 4), hidden_size=4, clip=1.0),
        _model("GRU", (2, 1, 3, 4), hidden_size=4, activations=["HardSigmoid", "Tanh"]),
    ],
    ids=["peepholes", "limits", "activation"],
)
def test_what_no_kernel_computes_is_left_to_others(model: ir.Model) -> None:
    lowered = lower(model, ShapeBinding(), "x86").model
    assert [node.op_type for node in unsupported(lowered)] == [next(iter(model.graph)).op_type]
