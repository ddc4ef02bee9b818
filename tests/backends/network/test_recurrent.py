"""LSTM, GRU and RNN equal ONNX Runtime's in every direction, with and without first states."""

from __future__ import annotations

import io
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
from graphopt_backends.network.convert import convert, unsupported
from graphopt_backends.network.weights import Weights

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
][::5]  # a part of them, in which each option meets each other


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


def _check(model: ir.Model, isa: Isa, seed: int = 0, lengths: np.ndarray | None = None) -> None:
    random = np.random.default_rng(seed)
    feed = {
        str(v.name): random.standard_normal([int(size) for size in v.shape or ()]).astype(np.float32)
        for v in model.graph.inputs
        if v.name != "lengths"
    }
    if lengths is not None:
        feed["lengths"] = lengths.astype(np.int32)
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
    ("direction", "options"), [("forward", {"clip": 0.7}), ("bidirectional", {"input_forget": 1})], ids=str
)
def test_gates_see_the_cell_have_limits_and_are_coupled(direction: str, options: dict[str, object]) -> None:
    sizes = (9, 6, 7, 19)
    model = _model("LSTM", sizes, 3, state=False, extra="p", direction=direction, hidden_size=19, **options)
    for seed in range(4):
        _check(model, ISAS[len(options) % len(ISAS)], seed)


@pytest.mark.parametrize(("operator", "late"), [("GRU", 0), ("GRU", 1)])
def test_sums_of_gates_have_limits(operator: str, late: int) -> None:
    attributes = {"linear_before_reset": late} if operator == "GRU" else {}
    model = _model(operator, (6, 3, 5, 9), hidden_size=9, clip=0.4, **attributes)
    for seed in range(4):
        _check(model, ISAS[-1], seed)


_FUNCTIONS = [
    ("GRU", ["HardSigmoid", "Softsign"], [0.3], [0.4]),
    ("LSTM", ["hardsigmoid", "ScaledTanh", "Elu"], [0.25, 1.2, 0.7], [0.5, 0.6]),
    ("RNN", ["LeakyRelu"], [0.1], []),
    ("RNN", ["Affine"], [0.4], [0.1]),
]


@pytest.mark.parametrize(("operator", "names", "alphas", "betas"), _FUNCTIONS, ids=lambda x: "-".join(map(str, x)))
def test_gates_have_any_function_that_onnx_names(
    operator: str, names: list[str], alphas: list[float], betas: list[float]
) -> None:
    numbers = {"activation_alpha": alphas, **({"activation_beta": betas} if betas else {})}
    model = _model(operator, (5, 2, 4, 6), hidden_size=6, activations=names, **numbers)
    for seed in range(4):
        _check(model, ISAS[seed % len(ISAS)], seed)


@pytest.mark.parametrize(("operator", "direction"), [("LSTM", "bidirectional"), ("GRU", "reverse"), ("RNN", "forward")])
def test_sequences_have_lengths_of_their_own(operator: str, direction: str) -> None:
    model = _model(operator, (7, 6, 5, 18), extra="lengths", direction=direction, hidden_size=18)
    lengths = model.graph.initializers.pop("lengths")
    lengths.const_value = None
    model.graph.inputs.append(lengths)
    for seed in range(4):
        random = np.random.default_rng(seed)
        _check(model, ISAS[len(direction) % len(ISAS)], seed, lengths=random.permutation([0, 1, 3, 5, 6, 7]))


@pytest.mark.parametrize(("operator", "kind"), [("LSTM", "float16"), ("GRU", "bfloat16")])
def test_weights_that_sixteen_bits_hold_are_stored_so(operator: str, kind: str) -> None:
    model = _model(operator, (6, 3, 40, 35), hidden_size=35)
    for name in ("w", "r"):
        value = model.graph.initializers[name]
        assert value.const_value is not None
        rounded = value.const_value.numpy().astype(ir.DataType[kind.upper()].numpy()).astype(np.float32)
        value.const_value = ir.tensor(rounded, name=name)
    lowered = lower(model, ShapeBinding(), "x86").model
    weights = Weights(io.BytesIO())
    calls = convert(lowered, ISAS[-1], weights).calls
    assert [call.views[1].dtype for call in calls[:2]] == [kind] * 2
    for seed in range(4):
        _check(model, ISAS[seed % len(ISAS)], seed)


@pytest.mark.parametrize(
    "model",
    [
        _model("RNN", (2, 1, 3, 4), hidden_size=4, activations=["Relu", "Tanh"], direction="bidirectional"),
    ],
    ids=["functions of directions"],
)
def test_what_no_kernel_computes_is_left_to_others(model: ir.Model) -> None:
    lowered = lower(model, ShapeBinding(), "x86").model
    assert [node.op_type for node in unsupported(lowered)] == [next(iter(model.graph)).op_type]
