"""Which operators compute on static integers, with which scales, as the target and the user ask."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from quantized_models import actions, cnn, decibels, kinds, samples, tensors
from small_models import build, context

from graphopt.errors import OptionError
from graphopt.model_io import model_bytes
from graphopt.pass_base import PassResult
from graphopt.runner import run_pass
from graphopt.targets import INTEGER_OPERATORS, WEIGHT_AXES, IntegerRules, Target
from graphopt_passes.quant import Quant

Shape = tuple[int, ...]


def quantize(model: ir.Model, rules: IntegerRules | None = None, **options: object) -> PassResult:
    """Run the pass with data for a target with these rules."""
    ctx = context(model, calibration=samples(model), target=Target(name="unit", integers=rules or IntegerRules()))
    return run_pass(Quant(**options), ctx).result  # type: ignore[arg-type]


def static(
    signature: str, body: str, weights: dict[str, Shape], rules: IntegerRules | None = None, **options: object
) -> ir.Model:
    """Quantize a model whose layer `it` has to become static, and compare it with the original on random inputs."""
    model, original = build(signature, body, weights), build(signature, body, weights)
    result = quantize(model, rules, bias_correction=False, **options)
    assert actions(result)["it"] == "int8, calibrated ranges"
    assert decibels(original, model) > 27
    return model


def test_a_weight_on_the_left_has_one_scale() -> None:
    model = static("(float[2,48,32] x) => (float[2,64,32] y)", "[it] y = MatMul(w, x)", {"w": (64, 48)})
    assert tensors(model)["w_scale"].shape.numpy() == ()
    assert kinds(model).count("QuantizeLinear") == 1


def test_a_batch_of_weights_has_one_scale() -> None:
    model = static("(float[2,48,32] x) => (float[2,48,64] y)", "[it] y = MatMul(x, w)", {"w": (2, 32, 64)})
    assert tensors(model)["w_scale"].shape.numpy() == ()


@pytest.mark.parametrize("groups", [1, 2])
def test_a_transposed_conv_computes_on_integers_where_the_target_can(groups: int) -> None:
    signature, body = "(float[N,8,4,4] x) => (float[N,M,H,W] y)", f"[it] y = ConvTranspose<group = {groups}>(x, w, b)"
    rules = IntegerRules(operators=INTEGER_OPERATORS | {"ConvTranspose"}, static_only=True)
    model = static(signature, body, {"w": (8, 8, 3, 3), "b": (8 * groups,)}, rules)
    held = tensors(model)
    np.testing.assert_allclose(
        held["b_scale"].numpy(), np.tile(held["w_scale"].numpy(), groups) * held["x_scale"].numpy(), rtol=1e-6
    )


def test_a_transposed_conv_keeps_float_arithmetic_elsewhere() -> None:
    model = build("(float[N,8,4,4] x) => (float[N,M,H,W] y)", "[it] y = ConvTranspose(x, w)", {"w": (8, 8, 3, 3)})
    action = actions(quantize(model))["it"]
    assert action == "weights in int8, arithmetic in float: ConvTranspose has no integer form on the target"


def test_a_target_may_ask_for_powers_of_two() -> None:
    model, original = cnn(), cnn()
    rules = IntegerRules(power_of_two=True, activation="int8", symmetric_activations=True)
    quantize(model, rules, bias_correction=False)
    scales = {name: tensor.numpy() for name, tensor in tensors(model).items() if "scale" in name}
    assert len(scales) > 8
    for name, scale in scales.items():
        exponent = np.log2(scale)
        np.testing.assert_array_equal(exponent, np.rint(exponent), err_msg=name)
    assert decibels(original, model) > 15


def test_weights_that_are_only_stored_keep_all_bits() -> None:
    model = build("(float[N,8,8,8] x) => (float[N,M,H,W] y)", "[it] y = Conv(x, w)", {"w": (8, 8, 3, 3)})
    quantize(model, IntegerRules(weight_bits=7), mode="weight")
    assert (np.abs(tensors(model)["w_q"].numpy()).max(axis=(1, 2, 3)) == 127).all()


def test_a_depthwise_conv_keeps_all_bits_where_products_are_added_in_pairs() -> None:
    signature, body = "(float[N,16,8,8] x) => (float[N,M,H,W] y)", "[it] y = Conv<group = 16>(x, w)"
    model = static(signature, body, {"w": (16, 1, 3, 3)}, IntegerRules(weight_bits=7))
    assert (np.abs(tensors(model)["w_q"].numpy()).max(axis=(1, 2, 3)) == 127).all()


CURVES = ["Softmax", "Sigmoid", "Tanh", "LeakyRelu"]


@pytest.mark.parametrize("curve", CURVES)
def test_a_curve_computes_on_integers_only_on_request(curve: str) -> None:
    signature = "(float[N,32] x) => (float[N,32] y)"
    body = f"[one] a = MatMul(x, w)  [curve] s = {curve}(a)  [it] y = MatMul(s, v)"
    asked = static(signature, body, {"w": (32, 32), "v": (32, 32)}, also=(curve,), equalize=False, smooth=False)
    plain = static(signature, body, {"w": (32, 32), "v": (32, 32)}, equalize=False, smooth=False)
    assert kinds(asked).count("QuantizeLinear") == 3
    assert kinds(plain).count("QuantizeLinear") == 2


def test_a_normalization_computes_on_integers_only_on_request() -> None:
    signature = "(float[N,32] x) => (float[N,32] y)"
    body = "[one] a = MatMul(x, w)  [norm] s = LayerNormalization(a, g, c)  [it] y = MatMul(s, v)"
    weights: dict[str, Shape] = {"w": (32, 32), "v": (32, 32), "g": (32,), "c": (32,)}
    model, original = build(signature, body, weights), build(signature, body, weights)
    result = quantize(model, also=("LayerNormalization",), equalize=False, smooth=False, bias_correction=False)
    assert actions(result)["norm"] == "LayerNormalization on int8"
    assert decibels(original, model) > 25


def test_an_operator_without_integers_is_a_usage_error() -> None:
    with pytest.raises(OptionError, match=r"quant\.also: 'Softmaxx' has no int8 form; did you mean 'Softmax'\?"):
        quantize(cnn(), also=("Softmaxx",))


@pytest.mark.parametrize("calibrator", ["auto", "minmax", "percentile", "mse", "entropy"])
def test_every_calibrator_keeps_the_results_and_repeats_itself(calibrator: str) -> None:
    model, again, original = cnn(), cnn(), cnn()
    quantize(model, calibrator=calibrator)
    quantize(again, calibrator=calibrator)
    assert decibels(original, model) > 25
    assert model_bytes(model) == model_bytes(again)


LAYERS: dict[str, tuple[str, str, dict[str, Shape]]] = {
    "Conv": ("(float[2,8,6,6] x) => (float[N,M,H,W] y)", "[it] y = Conv(x, w)", {"w": (16, 8, 3, 3)}),
    "ConvTranspose": ("(float[2,8,6,6] x) => (float[N,M,H,W] y)", "[it] y = ConvTranspose(x, w)", {"w": (8, 16, 3, 3)}),
    "Gather": ("(int64[6] x) => (float[6,16] y)", "[it] y = Gather(w, x)", {"w": (64, 16)}),
    "Gemm": ("(float[4,32] x) => (float[4,16] y)", "[it] y = Gemm(x, w)", {"w": (32, 16)}),
    "Gemm, transB": ("(float[4,32] x) => (float[4,16] y)", "[it] y = Gemm<transB = 1>(x, w)", {"w": (16, 32)}),
    "MatMul": ("(float[4,32] x) => (float[4,16] y)", "[it] y = MatMul(x, w)", {"w": (32, 16)}),
    "MatMul, left": ("(float[32,4] x) => (float[16,4] y)", "[it] y = MatMul(w, x)", {"w": (16, 32)}),
    "GRU": ("(float[5,1,8] x) => (float[5,1,1,16] y)", "[it] y = GRU<hidden_size = 16>(x, w, r)",
            {"w": (1, 48, 8), "r": (1, 48, 16)}),
    "LSTM": ("(float[5,1,8] x) => (float[5,1,1,16] y)", "[it] y = LSTM<hidden_size = 16>(x, w, r)",
             {"w": (1, 64, 8), "r": (1, 64, 16)}),
    "RNN": ("(float[5,1,16] x) => (float[5,1,1,32] y)", "[it] y = RNN<hidden_size = 32>(x, w, r)",
            {"w": (1, 32, 16), "r": (1, 32, 32)}),
}  # fmt: skip


def test_every_operator_of_the_table_is_tried() -> None:
    assert {name.partition(",")[0] for name in LAYERS} == set(WEIGHT_AXES)


@pytest.mark.parametrize("name", LAYERS)
def test_scales_lie_along_the_axis_of_the_table(name: str) -> None:
    signature, body, weights = LAYERS[name]
    model, original = build(signature, body, weights), build(signature, body, weights)
    channels = {key: np.ones(shape, np.float32) for key, shape in weights.items()}
    sides = WEIGHT_AXES[name.partition(",")[0]]
    axes = dict(zip(weights, sides[1:] if "left" in name else sides, strict=False))
    for key, shape in weights.items():  # every other channel is a thousand times smaller
        axis = axes[key].axis % len(shape)
        axis = 1 - axis if "transB" in name else axis
        small = np.arange(shape[axis]) % 2 == 1
        channels[key] = np.where(small, 1e-3, 1.0).reshape([-1 if i == axis else 1 for i in range(len(shape))])
        for one in (model, original):
            value = one.graph.initializers[key]
            array = np.asarray(value.const_value.numpy()) / 4 * channels[key]  # type: ignore[union-attr]
            value.const_value = ir.tensor(array.astype(np.float32), name=key)
    assert actions(quantize(model, mode="weight"))["it"] == "weights in int8, arithmetic in float"
    for key, shape in weights.items():
        scale = tensors(model)[f"{key}_scale"].numpy()
        assert scale.shape == (shape[channels[key].shape.index(max(channels[key].shape))],)
        assert scale[1::2].max() < scale[::2].min() / 100
    assert decibels(original, model) > 30


def test_residual_sums_stay_on_integers_behind_a_layer_that_does_not() -> None:
    model = static(
        "(float[1,16,6,6] x) => (float[1,16,6,6] y)",
        """[first] a = Conv<pads=[1,1,1,1]>(x, w1)
        b = Relu(a)
        [it] c = Conv<pads=[1,1,1,1]>(b, w2)
        d = Add(c, b)
        e = Relu(d)
        [other] f = Conv<pads=[1,1,1,1]>(e, w3)
        y = Add(f, e)""",
        {"w1": (16, 16, 3, 3), "w2": (16, 16, 3, 3), "w3": (16, 16, 3, 3)}, skip=("first",),
    )  # fmt: skip
    first = next(node for node in model.graph if node.op_type == "Add")
    assert [value.producer().op_type for value in first.inputs] == ["DequantizeLinear"] * 2  # type: ignore[union-attr]
    result = first.outputs[0].uses()
    assert [user.op_type for user, _ in result] == ["Relu"]
    assert kinds(model).count("QuantizeLinear") == 3
