from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from text_models import build

from graphopt.analyses import Histogram
from graphopt.calibration import Dataset
from graphopt.errors import OptionError, PassError
from graphopt.model_io import ShapeBinding, input_specs, model_bytes
from graphopt.pass_base import Context, PassResult
from graphopt.reference import Feed, Reference
from graphopt.runner import run_pass
from graphopt.targets import IntegerRules, Target
from graphopt.testing import check_pass
from graphopt_passes.quant import Quant

GOLDEN = Path(__file__).parent.parent.parent / "fixtures" / "golden"
ORT = Target(name="ort")
ZOO = os.environ.get("GRAPHOPT_ZOO")
Array = np.ndarray
RNG = np.random.default_rng(0)

CNN = """
g (float[N,3,16,16] x) => (float[N,10] y) {
  [first] a = Conv<kernel_shape = [3,3], pads = [1,1,1,1]>(x, w1, b1)
  [rectify] b = Relu(a)
  [second] c = Conv<kernel_shape = [3,3], pads = [1,1,1,1], group = 16>(b, w2, b2)
  [clip] d = Clip(c, zero, six)
  [third] e = Conv<kernel_shape = [1,1]>(d, w3)
  [residual] f = Add(e, b)
  [pool] p = GlobalAveragePool(f)
  [flat] q = Flatten(p)
  [classify] y = Gemm<transB = 1>(q, w4, b4)
}"""
CNN_WEIGHTS = {
    "w1": (16, 3, 3, 3), "b1": (16,), "w2": (16, 1, 3, 3), "b2": (16,), "w3": (16, 16, 1, 1),
    "w4": (10, 16), "b4": (10,),
}  # fmt: skip


def cnn(**replaced: Array | tuple[int, ...]) -> ir.Model:
    limits = {"zero": np.array(0, np.float32), "six": np.array(6, np.float32)}
    return build(CNN, **{**CNN_WEIGHTS, **limits, **replaced})


def data(model: ir.Model, count: int = 8, size: int = 4) -> Dataset:
    def read() -> Iterator[Feed]:
        rng = np.random.default_rng(3)
        for _ in range(count):
            yield {
                spec.name: rng.standard_normal(spec.concrete(ShapeBinding(), size)).astype(np.float32)
                if spec.dtype.is_floating_point()
                else rng.integers(0, 2, spec.concrete(ShapeBinding(), size)).astype(spec.dtype.numpy())
                for spec in input_specs(model)
            }

    return Dataset("samples", "0", read)


def quantize(
    model: ir.Model, *, target: Target = ORT, static: bool = True, keep: bool = False, **options: object
) -> PassResult:
    """Run the pass as the host does, all checks included."""
    ctx = Context(model, target, calibration=data(model) if static else None, keep_opset=keep)
    return run_pass(Quant(**options), ctx).result  # type: ignore[arg-type]


def sqnr(before: ir.Model, after: ir.Model, count: int = 4) -> float:
    """The least over outputs and random inputs, in dB."""
    left, right, worst = Reference(before), Reference(after), np.inf
    for feed in data(before, count).feeds():
        expected, got = left.run(feed), right.run(feed)
        for name, reference in expected.items():
            noise = float(np.square(got[name] - reference).sum())
            worst = min(worst, 10 * np.log10(float(np.square(reference).sum()) / max(noise, 1e-30)))
    return worst


def kinds(model: ir.Model) -> list[str]:
    return sorted(node.op_type for graph in model.graphs() for node in graph)


def actions(result: PassResult) -> dict[str, str]:
    return {change.site: change.action for change in result.changes}


def producer(model: ir.Model, name: str) -> ir.Node:
    return next(node for graph in model.graphs() for node in graph if node.name == name)


# ---------------------------------------------------------------- static


def test_static_int8_agrees_with_the_float_model() -> None:
    model, original = cnn(), cnn()
    result = quantize(model)
    assert result.modified
    assert sqnr(original, model) > 25
    assert result.metrics["layers_static"] == 4
    assert len(model_bytes(model)) < len(model_bytes(original))


def test_every_weight_is_int8_and_no_float_copy_is_left() -> None:
    model = cnn()
    quantize(model, bias_correction=False)
    tensors = {name: value.const_value for name, value in model.graph.initializers.items()}
    for name in ("w1", "w2", "w3", "w4"):
        assert name not in tensors
        assert tensors[f"{name}_q"].dtype == ir.DataType.INT8  # type: ignore[union-attr]
    assert tensors["b1_q"].dtype == ir.DataType.INT32  # type: ignore[union-attr]
    assert all(value.uses() for value in model.graph.initializers.values())


def test_nothing_stands_between_a_conv_and_its_activation() -> None:
    model = cnn()
    quantize(model)
    for activation, layer in (("rectify", "first"), ("clip", "second")):
        source = producer(model, activation).inputs[0]
        assert source is not None
        assert source.producer() is producer(model, layer)


def test_graph_outputs_stay_float() -> None:
    model = cnn()
    quantize(model)
    last = model.graph.outputs[0].producer()
    assert last is not None
    assert last.name == "classify"


def test_a_value_that_is_also_an_output_is_rounded_for_its_readers_only() -> None:
    text = CNN.replace("(float[N,10] y)", "(float[N,10] y, float[N,16,16,16] b)")
    limits = {"zero": np.array(0, np.float32), "six": np.array(6, np.float32)}
    model = build(text, **CNN_WEIGHTS, **limits)
    quantize(model)
    rounded = producer(model, "second").inputs[0]
    assert rounded is not None
    assert rounded.name == "b_dq"
    assert model.graph.outputs[1].producer() is producer(model, "rectify")


def test_scales_of_a_bias_are_input_times_weight() -> None:
    model = cnn()
    quantize(model, bias_correction=False)
    held = {name: value.const_value.numpy() for name, value in model.graph.initializers.items() if value.const_value}
    np.testing.assert_allclose(held["b1_scale"], held["x_scale"] * held["w1_scale"], rtol=1e-6)


def test_a_bias_of_tiny_weights_becomes_an_integer_and_only_their_channel_is_coarser() -> None:
    weight, bias = RNG.standard_normal((16, 3, 3, 3)).astype(np.float32), np.full(16, 1e3, np.float32)
    weight[3] *= 1e-12
    model, original = cnn(w1=weight, b1=bias), cnn(w1=weight, b1=bias)
    quantize(model, min_sqnr=-100.0, min_output_sqnr=-100.0, bias_correction=False, equalize=False)
    held = {name: value.const_value.numpy() for name, value in model.graph.initializers.items() if value.const_value}
    assert held["b1_q"].dtype == np.int32
    np.testing.assert_allclose(held["b1_q"] * held["b1_scale"].astype(np.float64), bias, rtol=1e-6)
    assert held["b1_q"][3] > 2**31 - 2**13
    np.testing.assert_allclose(np.delete(np.abs(held["w1_q"]).max(axis=(1, 2, 3)), 3), 127)
    assert sqnr(original, model) > 20


def test_a_bias_that_is_not_finite_stays_float() -> None:
    bias = np.zeros(10, np.float32)
    bias[4] = -np.inf
    model = cnn(b4=bias)
    quantize(model, min_sqnr=-100.0, min_output_sqnr=-100.0, bias_correction=False)
    assert "b4" in model.graph.initializers


def test_an_add_with_a_float_operand_stays_float() -> None:
    text = """g (float[N,8,8,8] x) => (float[N,8,8,8] y) {
      [first] a = Conv(x, w1)  [soft] s = Sigmoid(a)  [join] j = Add(a, s)  [second] y = Conv(j, w2)
    }"""
    model = build(text, w1=(8, 8, 1, 1), w2=(8, 8, 1, 1))
    result = quantize(model)
    source = producer(model, "join").inputs[1]
    assert source is not None
    assert source.producer() is producer(model, "soft")
    assert "join" not in actions(result)


def test_pooling_and_moves_keep_the_grid_of_their_input() -> None:
    text = """g (float[N,8,8,8] x) => (float[N,64] y) {
      [first] a = Conv(x, w1)  [pool] p = MaxPool<kernel_shape = [6,6]>(a)  [flat] f = Flatten(p)
      [last] y = Gemm(f, w2)
    }"""
    model = build(text, w1=(8, 8, 3, 3), w2=(8, 64))
    quantize(model)
    scales = {node.inputs[1].name for node in model.graph if node.op_type == "QuantizeLinear" and node.name != "x_q"}  # type: ignore[union-attr]
    assert scales == {"a_scale"}


def test_a_shared_weight_is_stored_once() -> None:
    text = "g (float[N,32] x) => (float[N,32] y) { [one] h = MatMul(x, w)  r = Relu(h)  [two] y = MatMul(r, w) }"
    model, original = build(text, w=(32, 32)), build(text, w=(32, 32))
    quantize(model)
    assert sorted(n for n in model.graph.initializers if n.startswith("w")) == ["w_q", "w_scale"]
    assert sqnr(original, model) > 25


def test_a_weight_that_a_float_operator_reads_too_is_left_alone() -> None:
    text = "g (float[N,32] x) => (float[32,32] z, float[N,32] y) { [one] y = MatMul(x, w)  [other] z = Neg(w) }"
    model = build(text, w=(32, 32))
    result = quantize(model)
    assert not result.modified
    assert actions(result)["one"] == "skipped: its weight is shared with 'other', which stays in float"


def test_a_noisy_layer_steps_back_and_says_so() -> None:
    text = "g (float[N,64] x) => (float[N,64] y) { [scale] s = Mul(x, big)  [one] y = MatMul(s, w) }"
    big = np.ones(64, np.float32)
    big[0] = 3e4  # one channel fills the grid, all others round to zero
    weight = np.random.default_rng(0).standard_normal((64, 64)).astype(np.float32)
    weight[0] = 0
    model = build(text, big=big, w=weight)
    original = build(text, big=big, w=weight)
    result = quantize(model)
    assert "8-bit activations would leave" in actions(result)["one"]
    assert sqnr(original, model) > 25 or not result.modified


def test_ranges_follow_the_target() -> None:
    for activation, symmetric, zero in (("int8", True, {0}), ("uint8", True, {128})):
        rules = IntegerRules(activation=activation, symmetric_activations=symmetric, weight_bits=7)  # type: ignore[arg-type]
        model, original = cnn(), cnn()
        quantize(model, target=Target(name="odd", integers=rules))
        held = {
            name: value.const_value.numpy() for name, value in model.graph.initializers.items() if value.const_value
        }
        assert {int(a) for name, a in held.items() if name.endswith("_zero")} == zero
        for array in (a.astype(int) for a in held.values() if a.dtype == np.int8 and a.ndim > 1 and a.shape[1] > 1):
            rows = array.reshape(len(array), -1)
            assert np.abs(rows[:, 1:] + rows[:, :-1]).max() <= 128
        assert sqnr(original, model) > 20


def test_a_static_only_target_computes_everything_on_integers() -> None:
    model = cnn()
    result = quantize(model, target=Target(name="unit", integers=IntegerRules(static_only=True)), min_sqnr=200.0)
    assert result.metrics["layers_static"] == 4


def test_batch_norms_left_in_the_model_are_folded() -> None:
    text = """g (float[N,3,8,8] x) => (float[N,16,8,8] y) {
      [layer] a = Conv(x, w)  [norm] b = BatchNormalization(a, s, o, m, v)  [end] y = Conv(b, w2)
    }"""
    weights = {
        "w": (16, 3, 1, 1),
        "s": (16,),
        "o": (16,),
        "m": (16,),
        "v": np.ones(16, np.float32),
        "w2": (16, 16, 1, 1),
    }
    model, original = build(text, **weights), build(text, **weights)  # type: ignore[arg-type]
    quantize(model)
    assert "BatchNormalization" not in kinds(model)
    assert sqnr(original, model) > 25


# ---------------------------------------------------------------- without data


def test_without_data_products_are_dynamic_and_the_rest_stores_int8() -> None:
    text = """g (float[N,8,8,8] x) => (float[N,32] y) {
      [conv] a = Conv(x, w1)  p = GlobalAveragePool(a)  f = Flatten(p)
      [dense] d = Gemm(f, w2, b)  [last] y = MatMul(d, w3)
    }"""
    weights = {"w1": (16, 8, 3, 3), "w2": (16, 64), "b": (64,), "w3": (64, 32)}
    model, original = build(text, **weights), build(text, **weights)  # type: ignore[arg-type]
    result = quantize(model, static=False)
    assert actions(result) == {
        "conv": "weights in int8, arithmetic in float: no calibration data",
        "dense": "int8, input ranges found on every run: no calibration data",
        "last": "int8, input ranges found on every run: no calibration data",
    }
    assert kinds(model).count("MatMulInteger") == 2
    assert sqnr(original, model) > 25


@pytest.mark.parametrize("attributes", ["<transB = 1>", "<alpha = 0.5>", ""])
def test_a_dynamic_gemm_keeps_its_attributes(attributes: str) -> None:
    text = f"g (float[N,16] x) => (float[N,48] y) {{ [dense] y = Gemm{attributes}(x, w, b) }}"
    weights = {"w": (48, 16) if "transB" in attributes else (16, 48), "b": (48,)}
    model, original = build(text, **weights), build(text, **weights)  # type: ignore[arg-type]
    assert quantize(model, static=False).metrics["layers_dynamic"] == 1
    assert sqnr(original, model) > 30
    assert [value.name for value in model.graph.outputs] == ["y"]


def test_layers_that_read_the_same_value_share_its_dynamic_range() -> None:
    text = "g (float[N,32] x) => (float[N,32] y) { [q] a = MatMul(x, w1)  [k] b = MatMul(x, w2)  y = Add(a, b) }"
    model = build(text, w1=(32, 32), w2=(32, 32))
    quantize(model, static=False)
    assert kinds(model).count("DynamicQuantizeLinear") == 1


def test_an_embedding_looks_integers_up() -> None:
    text = "g (int64[N] i) => (float[N,64] y) { [embed] y = Gather(table, i) }"
    model, original = build(text, table=(100, 64)), build(text, table=(100, 64))
    quantize(model, static=False)
    table = producer(model, "embed").inputs[0]
    assert table is not None
    assert table.dtype == ir.DataType.INT8
    assert sqnr(original, model) > 35


@pytest.mark.parametrize("groups", [1, 2])
def test_a_transposed_conv_has_its_scales_on_the_second_axis(groups: int) -> None:
    text = f"g (float[N,8,4,4] x) => (float[N,M,H,W] y) {{ [up] y = ConvTranspose<group = {groups}>(x, w) }}"
    weight = np.random.default_rng(0).standard_normal((8, 16, 3, 3)).astype(np.float32)
    weight *= np.logspace(-2, 2, 16, dtype=np.float32).reshape(1, 16, 1, 1)
    model, original = build(text, w=weight), build(text, w=weight)
    quantize(model, static=False)
    scale = model.graph.initializers["w_scale"].const_value
    assert scale is not None
    np.testing.assert_allclose(scale.numpy(), np.abs(weight).max((0, 2, 3)) / 127, rtol=1e-6)
    assert sqnr(original, model) > 35


def test_recurrent_weights_are_stored_in_int8() -> None:
    text = "g (float[5,N,16] x) => (float[5,1,N,32] y) { [cell] y = LSTM<hidden_size = 32>(x, w, r) }"
    model, original = build(text, w=(1, 128, 16), r=(1, 128, 32)), build(text, w=(1, 128, 16), r=(1, 128, 32))
    assert quantize(model, static=False).metrics["layers_weight"] == 1
    assert sqnr(original, model) > 30


def test_weights_read_inside_branches_are_stored_in_int8() -> None:
    text = """g (bool c, float[4,32] x) => (float[4,32] y) {
      [choose] y = If(c) <
        then_branch = yes () => (float[4,32] a) { [left] a = MatMul(x, w) },
        else_branch = no () => (float[4,32] b) { h = MatMul(x, w)  b = Neg(h) }
      >
    }"""
    model, original = build(text, w=(32, 32)), build(text, w=(32, 32))
    result = quantize(model, mode="weight")
    assert actions(result)["left"] == "weights in int8, arithmetic in float"
    assert sorted(model.graph.initializers) == ["w_q", "w_scale"]
    assert sqnr(original, model) > 35


def test_a_weight_of_one_branch_is_dequantized_only_where_it_is_read() -> None:
    text = """g (bool c, float[4,32] x) => (float[4,32] y) {
      [choose] y = If(c) <
        then_branch = yes () => (float[4,32] a) { [left] a = MatMul(x, w) },
        else_branch = no () => (float[4,32] b) { b = Neg(x) }
      >
    }"""
    model, original = build(text, w=(32, 32)), build(text, w=(32, 32))
    quantize(model, mode="weight")
    assert not model.graph.initializers
    assert sqnr(original, model) > 35


def test_a_loop_dequantizes_its_weights_once() -> None:
    text = """g (int64 n, float[4,32] x) => (float[4,32] y) {
      yes = Constant<value = bool {1}>()
      [turn] y = Loop(n, yes, x) <body = b (int64 i, bool t, float[4,32] s) => (bool u, float[4,32] o) {
        u = Identity(t)  h = MatMul(s, w)  [bound] o = Tanh(h)
      }>
    }"""
    model = build(text, w=(32, 32))
    quantize(model, static=False, mode="weight")
    assert "DequantizeLinear" in [node.op_type for node in model.graph]


# ---------------------------------------------------------------- refusals


def test_nothing_to_quantize_changes_nothing() -> None:
    model = build("g (float[N,4] x) => (float[N,4] y) { h = Add(x, w)  y = Relu(h) }", w=(4,))
    result = quantize(model)
    assert not result.modified
    assert result.changes == ()


@pytest.mark.parametrize(
    ("body", "weights", "reason"),
    [
        ("[it] y = MatMul(x, x)", {}, "both operands are computed"),
        ("h = Neg(w)  [it] y = Gemm(x, h)", {"w": (8, 8)}, "its weight is computed; fold constants first"),
        ("[it] y = MatMul(x, w)", {"w": (8,)}, "its weight is a vector"),
        ("[it] y = MatMul(x, w)", {"w": (8, 4)}, "32 weights, so few that scales would cost more than int8 saves"),
        ("[it] y = PRelu(x, w)", {"w": (8, 8)}, "PRelu stays in float"),
    ],
)
def test_what_is_left_alone_has_a_reason(body: str, weights: dict[str, tuple[int, ...]], reason: str) -> None:
    model = build(f"g (float[8,8] x, float[1] unused) => (float[N,M] y) {{ {body} }}", **weights)
    result = quantize(model)
    assert not result.modified
    assert reason in actions(result)["it"]


def test_other_types_are_left_alone() -> None:
    text = '<ir_version: 8, opset_import: ["" : 17]> g (double[8,2] x) => (double[8,2] y) <double[2,2] w = {1,2,3,4}>'
    model = ir.from_onnx_text(text + "{ [it] y = MatMul(x, w) }")
    ctx = Context(model, ORT)
    assert actions(run_pass(Quant(), ctx).result)["it"] == "skipped: its weight is double, only float32 is quantized"


def test_a_quantized_model_is_recognised_and_left_alone() -> None:
    model = cnn()
    quantize(model)
    before = model_bytes(model)
    again = quantize(model)
    assert not again.modified
    assert {action for site, action in actions(again).items()} == {"skipped: already quantized (QDQ int8)"}
    assert model_bytes(model) == before
    dynamic = build("g (float[N,32] x) => (float[N,32] y) { [one] y = MatMul(x, w) }", w=(32, 32))
    quantize(dynamic, static=False)
    assert not quantize(dynamic, static=False).modified


def test_a_file_that_would_grow_is_left_as_it_is() -> None:
    model = build("g (float[N,16] x) => (float[N,4] y) { [one] y = MatMul(x, w) }", w=(16, 4))
    result = quantize(model)
    assert not result.modified
    assert actions(result)["one"].startswith("skipped: the file would grow from")


def test_static_without_data_is_a_usage_error() -> None:
    with pytest.raises(OptionError, match=r"quant\.mode: 'static' needs calibration data; give --calibration") as e:
        quantize(cnn(), static=False, mode="static")
    assert e.value.exit_code == 2


def test_a_static_only_target_without_data_is_a_usage_error() -> None:
    target = Target(name="unit", integers=IntegerRules(static_only=True))
    with pytest.raises(OptionError, match="unit computes on static int8 only, which needs calibration data"):
        quantize(cnn(), static=False, target=target)
    with pytest.raises(OptionError, match="'dynamic' does not run on unit"):
        quantize(cnn(), mode="dynamic", target=target)


@pytest.mark.parametrize("option", ["only", "skip"])
def test_a_pattern_that_matches_nothing_is_an_error(option: str) -> None:
    with pytest.raises(OptionError, match=rf"quant\.{option}: 'nothing\*' matches no layer"):
        quantize(cnn(), **{option: ("nothing*",)})


def test_only_and_skip_choose_layers() -> None:
    result = quantize(cnn(), only=("first", "th*"), skip=("third",))
    assert {site for site, action in actions(result).items() if "int8, cal" in action} == {"first"}
    assert actions(result)["third"] == "skipped: named by skip"
    assert actions(result)["classify"] == "skipped: not named by only"


def test_the_opset_is_raised_only_as_far_as_needed() -> None:
    text = """g (float[2,8,8,8] x) => (float[N,M,H,W] y) {
      [one] a = Conv(x, w)  [pool] y = MaxPool<kernel_shape = [2,2]>(a)
    }"""
    for options, opset in (({}, 13), ({"per_channel": False, "mode": "static"}, 10)):
        model, original = build(text, opset=9, w=(16, 8, 3, 3)), build(text, opset=9, w=(16, 8, 3, 3))
        quantize(model, **options)  # type: ignore[arg-type]
        assert model.opset_imports[""] == opset
        assert sqnr(original, model) > 25


def test_a_kept_opset_allows_what_it_allows() -> None:
    text = "g (float[2,8,8,8] x) => (float[N,M,H,W] y) { [one] y = Conv(x, w) }"
    model = build(text, opset=11, w=(16, 8, 3, 3))
    result = quantize(model, keep=True)
    assert model.opset_imports[""] == 11
    assert {change.details["scales"] for change in result.changes if change.done} == {"tensor"}
    with pytest.raises(PassError, match="opset 9 is kept, 13 would be needed; integers need opset 10 at least"):
        quantize(build(text, opset=9, w=(16, 8, 3, 3)), keep=True)


def test_a_model_that_cannot_be_raised_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("graphopt_passes.quant.prepare._difference", lambda *_: "y")
    with pytest.raises(PassError, match="raised to opset 13 it computes something else: output 'y'"):
        quantize(build("g (float[2,64] x) => (float[2,64] y) { y = MatMul(x, w) }", opset=9, w=(64, 64)))


def test_a_model_that_does_not_run_with_a_raised_opset_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(model: ir.Model, version: int) -> bool:
        model.opset_imports[""] = version
        model.graph[0].op_type = "NoSuchOperator"
        return True

    monkeypatch.setattr("graphopt_passes.quant.prepare.raise_opset", broken)
    with pytest.raises(PassError, match=r"raised to opset 13 it does not run: .*NoSuchOperator"):
        quantize(build("g (float[2,64] x) => (float[2,64] y) { y = MatMul(x, w) }", opset=9, w=(64, 64)))


# ---------------------------------------------------------------- contract


@pytest.mark.parametrize(
    "options", [{}, {"mode": "weight"}, {"mode": "dynamic"}, {"calibrator": "mse", "per_channel": False}]
)
def test_quant_keeps_the_contract(options: dict[str, object]) -> None:
    model = cnn()
    result = check_pass(Quant(**options), model, calibration=data(model))  # type: ignore[arg-type]
    assert result.modified
    assert check_pass(Quant(mode="auto"), model).modified


@pytest.mark.parametrize("before", sorted(GOLDEN.glob("quant_*.before.onnxtxt")), ids=lambda path: path.stem)
def test_quant_writes_the_golden_text(before: Path) -> None:
    model = ir.from_onnx_text(before.read_text("utf8"))

    def read() -> Iterator[Feed]:  # whole numbers: their sums are exact on every machine
        return ({"x": np.random.default_rng(i).integers(-8, 9, (1, 4, 6, 6)).astype(np.float32)} for i in range(4))

    calibration = Dataset("samples", "0", read) if "static" in before.name else None
    step = Quant(min_sqnr=-99.0, bias_correction=False)
    assert run_pass(step, Context(model, ORT, calibration=calibration)).result.modified
    after = before.with_name(before.name.replace(".before.", ".after."))
    assert ir.to_onnx_text(model) + "\n" == after.read_text("utf8")


def test_calibration_holds_no_activations() -> None:
    small, large = Histogram(), Histogram()
    small.add(np.ones(10, np.float32))
    for _ in range(50):
        large.add(RNG.standard_normal(10_000).astype(np.float32))
    assert small.counts.nbytes == large.counts.nbytes
