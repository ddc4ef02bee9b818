"""Targets that compute on integers only: all that they can compute stands between integers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

import numpy as np
import onnx_ir as ir
import pytest
from drawn_networks import networks
from hypothesis import given, settings
from integer_cases import ALONE, CHAINS, FUNCTIONS, IMAGE, MOVED, ROWS, WEIGHED
from onnxruntime.quantization import QuantType
from quantized_models import actions, by_static, decibels, samples
from small_models import Shape, context
from small_models import build as build_model

from graphopt.errors import OptionError
from graphopt.model_io import model_bytes
from graphopt.pass_base import PassResult
from graphopt.reference import Reference
from graphopt.runner import run_pass
from graphopt.targets import IntegerRules, Target
from graphopt_backends.npu.targets import TARGETS
from graphopt_passes.quant import Quant

NPU = next(target for target in TARGETS if target.default)
PLAIN: dict[str, object] = {"equalize": False, "smooth": False, "bias_correction": False}


def build(signature: str, body: str, weights: Mapping[str, Shape], opset: int = 17) -> ir.Model:
    """A model whose results, where its text says nothing of them, have the shape that they come out with."""
    model = build_model(signature, body, weights, opset)
    made = Reference(model).run(next(iter(samples(model).feeds())))
    for output in model.graph.outputs:
        output.shape = output.shape or ir.Shape(made[output.name or ""].shape)
    return model


def quantize(model: ir.Model, target: Target = NPU, **options: object) -> PassResult:
    ctx = context(model, calibration=samples(model), target=target)
    return run_pass(Quant(**{**PLAIN, **options}), ctx).result  # type: ignore[arg-type]


def floats_inside(model: ir.Model) -> set[str]:
    """Operators with floats that they do not read from DequantizeLinear, or do not hand to QuantizeLinear alone."""
    found: set[str] = set()
    for node in model.graph:
        if node.op_type in ("Constant", "DequantizeLinear", "QuantizeLinear"):
            continue
        for value in node.inputs:
            producer = value.producer() if value is not None else None
            computed = value is not None and not value.is_initializer()
            if computed and (producer is None or producer.op_type not in ("Constant", "DequantizeLinear")):
                found.add(node.op_type)
        for value in node.outputs:
            readers = {user.op_type for user, _ in value.uses()}
            if readers - {"QuantizeLinear"} or (value.is_graph_output() and value.dtype == ir.DataType.FLOAT):
                found.add(node.op_type)
    return found


def roundings(model: ir.Model) -> int:
    return Counter(node.op_type for node in model.graph)["QuantizeLinear"]


def grids(model: ir.Model) -> list[tuple[float, int]]:
    """Scale and zero point of every QuantizeLinear, in order."""
    found: list[tuple[float, int]] = []
    for node in model.graph:
        if node.op_type == "QuantizeLinear":
            scale, zero = (value.const_value for value in node.inputs[1:] if value is not None)
            assert scale is not None
            assert zero is not None
            found.append((float(scale.numpy()), int(zero.numpy())))
    return found


@pytest.mark.parametrize("case", [*WEIGHED, *ALONE])
def test_an_operator_stands_between_integers(case: str) -> None:
    signature, body, weights = {**WEIGHED, **ALONE}[case]
    model, original = (build(signature, body, weights) for _ in range(2))
    assert quantize(model).modified
    assert floats_inside(model) == set()
    assert decibels(original, model) > 30


@pytest.mark.parametrize("case", WEIGHED)
def test_a_clamp_belongs_to_the_operator_before_it(case: str) -> None:
    signature, body, weights = WEIGHED[case]
    body = body.replace("y = ", "h = ") + " y = Relu(h)"
    model, original = (build(signature, body, weights) for _ in range(2))
    quantize(model)
    assert "Relu" in floats_inside(model)
    assert roundings(model) == 2
    assert decibels(original, model) > 30


@pytest.mark.parametrize("case", MOVED)
def test_what_moves_numbers_keeps_their_grid(case: str) -> None:
    signature, body, weights = MOVED[case]
    body = "h = Sigmoid(x) " + body.replace("(x", "(h")
    model, original = (build(signature, body, weights) for _ in range(2))
    quantize(model)
    assert floats_inside(model) == set()
    first, second, third = grids(model)
    assert second == third != first
    assert decibels(original, model) > 30


@pytest.mark.parametrize("case", FUNCTIONS)
def test_a_function_of_one_number_stands_between_integers(case: str) -> None:
    model, original = (build(IMAGE, FUNCTIONS[case], {}, opset=20) for _ in range(2))
    quantize(model)
    assert floats_inside(model) == set()
    assert roundings(model) == 2
    assert decibels(original, model) > 30


@pytest.mark.parametrize("case", CHAINS)
def test_a_chain_of_functions_is_rounded_once(case: str) -> None:
    body = "h = Conv(x, w) " + CHAINS[case].replace("(x", "(h")
    model, original = (build(IMAGE, body, {"w": (4, 4, 1, 1)}) for _ in range(2))
    quantize(model)
    assert roundings(model) == 3
    assert "Conv" not in floats_inside(model)
    assert decibels(original, model) > 30


def test_a_value_inside_of_a_chain_that_something_else_reads_is_rounded() -> None:
    body = "s = Sigmoid(x) m = Mul(x, s) c = Conv(s, w) y = Add(m, c)"
    model, original = (build(IMAGE, body, {"w": (4, 4, 1, 1)}) for _ in range(2))
    quantize(model)
    assert floats_inside(model) == set()
    assert roundings(model) == 5
    assert decibels(original, model) > 30


def test_functions_with_two_results_start_from_one_rounded_value() -> None:
    body = "o = Constant<value = float {2.0}>() t = Mul(x, o) a = Sigmoid(t) b = Tanh(t) y = Concat<axis = 1>(a, b)"
    model, original = (build(IMAGE, body, {}) for _ in range(2))
    quantize(model)
    assert floats_inside(model) == set()
    assert roundings(model) == 5
    assert decibels(original, model) > 30


def test_a_tensor_that_is_added_becomes_int8_and_a_number_does_not() -> None:
    body = "c = Constant<value = float {0.5}>() h = Mul(x, c) y = Add(h, t)"
    model = build(IMAGE, body, {"t": (4, 1, 1)})
    quantize(model)
    kinds = {node.op_type: node for node in model.graph if node.op_type in ("Add", "Mul")}
    operand = kinds["Add"].inputs[1]
    assert operand is not None
    stored = operand.producer().inputs[0]  # type: ignore[union-attr]
    assert stored is not None
    assert stored.dtype == ir.DataType.INT8
    number = kinds["Mul"].inputs[1]
    assert number is not None
    assert number.producer().op_type == "Constant"  # type: ignore[union-attr]
    assert "t" not in model.graph.initializers


def test_inputs_of_a_concat_are_rounded_to_the_grid_of_its_result() -> None:
    body = "a = Sigmoid(x) b = Tanh(x) t = Transpose<perm = [0,1,3,2]>(b) y = Concat<axis = 1>(a, t)"
    model, original = (build(IMAGE, body, {}) for _ in range(2))
    quantize(model)
    _, *others = grids(model)
    assert len(others) == 4
    assert len(set(others)) == 1
    assert decibels(original, model) > 30


def test_results_of_a_model_keep_names_and_types() -> None:
    two = {"w": (4, 4, 1, 1), "v": (2, 4, 1, 1)}
    body = "[first] h = Conv(x, w) y = Relu(h) [second] z = Conv(y, v)"
    model = build("(float[N,4,8,8] x) => (float[N,4,8,8] y, float[N,2,8,8] z)", body, two)
    original = model.clone()
    quantize(model)
    assert [(o.name, o.dtype, o.shape) for o in model.graph.outputs] == [
        (o.name, o.dtype, o.shape) for o in original.graph.outputs
    ]
    assert {output.producer().op_type for output in model.graph.outputs} == {"DequantizeLinear"}  # type: ignore[union-attr]
    assert decibels(original, model) > 30


def test_the_bias_of_a_product_is_added_before_its_result_is_rounded() -> None:
    body = "h = MatMul(x, w) a = Add(h, b) y = Relu(a)"
    model, original = (build(ROWS, body, {"w": (8, 5), "b": (5,)}) for _ in range(2))
    quantize(model)
    assert roundings(model) == 2
    (bias,) = (value for name, value in model.graph.initializers.items() if name == "b_q")
    assert bias.dtype == ir.DataType.INT32
    assert decibels(original, model) > 30


def test_arg_max_reads_integers_and_makes_whole_numbers() -> None:
    body = "h = Conv(x, w) y = ArgMax<axis = 1, keepdims = 0>(h)"
    model = build("(float[1,4,8,8] x) => (int64[1,8,8] y)", body, {"w": (4, 4, 1, 1)})
    original = model.clone()
    quantize(model)
    assert floats_inside(model) == set()
    left, right = Reference(original), Reference(model)
    for feed in samples(original, 4).feeds():
        assert np.mean(left.run(feed)["y"] == right.run(feed)["y"]) > 0.95


def test_what_the_target_cannot_compute_is_named_and_stays() -> None:
    nodes = "[gate] h2 = Sigmoid(x) h = Conv(x, w) i = Constant<value = int64[2] {1, 0}>() "
    nodes += "[up] r = Gather<axis = 1>(h, i) [odd] n = LpNormalization<axis = 1>(r) "
    nodes += "[ratio] d = Div(h, h2) y = Concat<axis = 1>(n, d)"
    model, original = (build(IMAGE, nodes, {"w": (4, 4, 1, 1)}) for _ in range(2))
    told = actions(quantize(model))
    assert told["up"] == "skipped: Gather has no integer form on the target"
    assert told["odd"] == "skipped: LpNormalization has no integer form on the target"
    assert told["ratio"] == "skipped: Div of two activations has no integer form on the target"
    assert told["gate"].startswith("skipped: only a division of two activations reads it")
    assert floats_inside(model) == {"Div", "Gather", "LpNormalization", "Sigmoid"}
    assert decibels(original, model) > 15


def test_shape_arithmetic_stays_as_it_is() -> None:
    body = """
      h = Sigmoid(x) s = Shape(x) f = Cast<to = 1>(s)
      o = Constant<value = float[4] {1.0, 1.0, 2.0, 2.0}>() g = Mul(f, o)
      t = Cast<to = 7>(g) y = Resize<mode = "nearest">(h, , , t)"""
    model, original = (build(IMAGE, body, {}) for _ in range(2))
    quantize(model)
    assert roundings(model) == 3
    assert floats_inside(model) == {"Cast", "Mul", "Resize", "Shape"}
    assert decibels(original, model) > 30


def test_moves_between_floats_stay_there() -> None:
    body = "h = LpNormalization(x) [turn] t = Transpose<perm = [0,2,3,1]>(h) y = LpNormalization(t)"
    model = build(IMAGE, body, {})
    result = quantize(model)
    assert actions(result)["turn"] == "skipped: nothing beside it computes on integers"
    assert not result.modified


def test_layers_stay_on_the_target_unless_a_limit_is_asked_for() -> None:
    body, weights = "[one] h = Conv(x, w) [two] y = Conv(h, v)", {"w": (8, 4, 3, 3), "v": (2, 8, 3, 3)}
    model = build(IMAGE, body, weights)
    result = quantize(model)
    assert result.metrics["layers_static"] == 2
    levels = [float(change.details["layer_sqnr_db"]) for change in result.changes if "layer_sqnr_db" in change.details]
    assert len(levels) == 2
    model = build(IMAGE, body, weights)
    result = quantize(model, min_sqnr=200.0)
    assert result.metrics.get("layers_static", 0) == 0
    assert "8-bit activations would leave" in actions(result)["one"]


def test_noisy_outputs_are_said() -> None:
    body = "c = Constant<value = float {4.0}>() m = Mul(x, c) e = Exp(m) t = Transpose(e) y = Log(t)"
    result = quantize(build(IMAGE, body, {}))
    assert result.notes
    assert result.notes[0].startswith("signal to noise of outputs: y ")


def test_skip_names_any_operator() -> None:
    body = "[layer] h = Conv(x, w) [gate] s = Sigmoid(h) [scale] y = Mul(h, s)"
    model = build(IMAGE, body, {"w": (4, 4, 1, 1)})
    told = actions(quantize(model, skip=("gate",)))
    assert told["gate"] == "skipped: named by skip"
    assert roundings(model) == 4
    with pytest.raises(OptionError, match="matches no layer"):
        quantize(build(IMAGE, body, {"w": (4, 4, 1, 1)}), skip=("nothing",))


def test_what_was_quantized_before_is_left_alone() -> None:
    body = "h = Conv(x, w) s = Sigmoid(h) y = Mul(h, s)"
    model = build(IMAGE, body, {"w": (4, 4, 1, 1)})
    quantize(model)
    before = model_bytes(model)
    result = quantize(model)
    assert not result.modified
    assert model_bytes(model) == before


@given(networks())
@settings(max_examples=6, deadline=None, derandomize=True, database=None)
def test_any_network_is_on_integers_from_its_input_to_its_result(model: ir.Model) -> None:
    original = model.clone()
    quantize(model)
    units = Counter(node.op_type for node in model.graph)
    assert units["QuantizeLinear"] > 2
    assert floats_inside(model) <= {"Add", "Conv", "ConvTranspose", "Mul", "Relu", "Sub", "Max"}  # clamps behind these
    assert decibels(original, model) > 15
    assert not quantize(model).modified


def test_what_another_tool_quantized_keeps_its_integers() -> None:
    body = "h = Conv(x, w) r = Relu(h) s = Sigmoid(r) c = Conv(s, v) y = Mul(c, s)"
    original = build(IMAGE, body, {"w": (4, 4, 1, 1), "v": (4, 4, 1, 1)})
    model = by_static(original, op_types_to_quantize=["Conv"], activation_type=QuantType.QInt8)
    before = roundings(model)
    told = actions(quantize(model))
    assert any(action == "Mul on int8" for action in told.values())
    assert floats_inside(model) == {"Relu", "Sigmoid"}  # a chain that was there before
    assert roundings(model) > before
    assert decibels(original, model) > 25


def test_the_same_model_becomes_the_same_bytes() -> None:
    body = "h = Conv(x, w) a = Relu(h) b = Sigmoid(h) m = Mul(a, b) y = Concat<axis = 1>(m, x)"
    made = set[bytes]()
    for _ in range(2):
        model = build(IMAGE, body, {"w": (4, 4, 1, 1)})
        quantize(model)
        made.add(model_bytes(model))
    assert len(made) == 1


def test_values_inside_subgraphs_stay_or_are_rounded_inside() -> None:
    body = """
      [layer] h = Conv(x, w)
      y = If (c) <
        then_branch = yes () => (float[1,4,8,8] t) { [inner] t = Sigmoid(h) },
        else_branch = no () => (float[1,4,8,8] e) { [other] e = Relu(h) }>
    """
    signature = "(float[1,4,8,8] x, bool c) => (float[1,4,8,8] y)"
    model, original = (build(signature, body, {"w": (4, 4, 1, 1)}) for _ in range(2))
    quantize(model)
    assert decibels(original, model) > 25


@pytest.mark.parametrize("opset", [9, 11, 13, 18, 21])
def test_any_opset_is_taken(opset: int) -> None:
    body = "h = Conv(x, w) r = Relu(h) m = MaxPool<kernel_shape = [2,2]>(r) s = Sigmoid(m) y = Mul(m, s)"
    model, original = (build(IMAGE, body, {"w": (4, 4, 1, 1)}, opset=opset) for _ in range(2))
    quantize(model)
    assert floats_inside(model) == {"Conv", "Relu", "Sigmoid", "Mul"}
    assert decibels(original, model) > 30


def test_only_listed_operators_are_touched() -> None:
    rules = IntegerRules(operators=frozenset({"Conv"}), activation="int8", static_only=True, integers_only=True)
    model = build(IMAGE, "h = Conv(x, w) [gate] y = Sigmoid(h)", {"w": (4, 4, 1, 1)})
    told: Mapping[str, str] = actions(quantize(model, Target(name="unit", integers=rules)))
    assert told["gate"] == "skipped: Sigmoid has no integer form on the target"
    assert roundings(model) == 2
