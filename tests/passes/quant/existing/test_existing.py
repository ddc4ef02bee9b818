from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnxruntime.quantization import QuantFormat, QuantType
from quantized_models import (
    actions,
    by_blocks,
    by_dynamic,
    by_static,
    cnn,
    decibels,
    kinds,
    mlp,
    quantize,
    tensors,
)
from small_models import build

from graphopt.analyses.quantized import find_quantized
from graphopt.errors import OptionError
from graphopt.model_io import input_specs, model_bytes
from graphopt.reference import Reference
from graphopt.testing import check_pass
from graphopt_passes.quant import Quant
from graphopt_passes.quant._maths import Grid
from graphopt_passes.quant.borders import existing_pair
from graphopt_passes.quant.existing import as_floats

LSTM = "[cell] y, h, c = LSTM<hidden_size = 32>(x, w, r, b)"
EMBEDDING = "[embed] e = Gather(table, i)  [two] y = MatMul(e, w)"


def lstm() -> ir.Model:
    signature = "(float[5,N,16] x) => (float[5,1,N,32] y, float[1,N,32] h)"
    return build(signature, LSTM, {"w": (1, 128, 16), "r": (1, 128, 32), "b": (1, 256)})


def embedding(opset: int = 17) -> ir.Model:
    return build("(int64[N] i) => (float[N,64] y)", EMBEDDING, {"table": (100, 64), "w": (64, 64)}, opset)


def large_mlp(opset: int = 17) -> ir.Model:
    body = "[one] h = MatMul(x, a)  r = Relu(h)  [two] y = MatMul(r, b)"
    return build("(float[N,64] x) => (float[N,64] y)", body, {"a": (64, 64), "b": (64, 64)}, opset)


def attention() -> ir.Model:
    body = "q = MatMul(x, w)  k = Transpose<perm = [0,2,1]>(x)  [scores] y = MatMul(q, k)"
    return build("(float[N,8,32] x) => (float[N,8,8] y)", body, {"w": (32, 32)})


Made = tuple[Callable[[], ir.Model], Callable[[ir.Model], ir.Model]]


def static(**options: Any) -> Callable[[ir.Model], ir.Model]:
    return lambda model: by_static(model, **options)


QDQ, QOP = {"quant_format": QuantFormat.QDQ}, {"quant_format": QuantFormat.QOperator}
SIGNED = {"activation_type": QuantType.QInt8}
FOREIGN: dict[str, Made] = {
    "cnn-qdq": (cnn, static(**QDQ)),
    "cnn-qdq-channel": (cnn, static(**QDQ, per_channel=True)),
    "cnn-qdq-signed": (cnn, static(**QDQ, **SIGNED)),
    "cnn-qdq-symmetric": (cnn, static(**QDQ, **SIGNED, extra_options={"ActivationSymmetric": True})),
    "cnn-qdq-16": (lambda: cnn(21), static(**QDQ, activation_type=QuantType.QUInt16)),
    "cnn-qoperator": (cnn, static(**QOP)),
    "cnn-qoperator-channel": (cnn, static(**QOP, per_channel=True)),
    "mlp-qdq": (mlp, static(**QDQ, per_channel=True)),
    "mlp-qoperator": (mlp, static(**QOP)),
    "cnn-dynamic": (cnn, by_dynamic),
    "mlp-dynamic": (mlp, by_dynamic),
    "mlp-dynamic-channel": (mlp, lambda m: by_dynamic(m, per_channel=True, weight_type=QuantType.QUInt8)),
    "embedding-dynamic": (embedding, by_dynamic),
    "attention-dynamic": (
        attention,
        lambda m: by_dynamic(m, op_types_to_quantize=["MatMul"], extra_options={"MatMulConstBOnly": False}),
    ),
    "lstm-dynamic": (lstm, by_dynamic),
    "mlp-4bit": (large_mlp, lambda m: by_blocks(m, bits=4, block_size=32, is_symmetric=False)),
    "mlp-8bit": (large_mlp, lambda m: by_blocks(m, bits=8, block_size=32, is_symmetric=True)),
    "mlp-4bit-qdq": (
        lambda: large_mlp(21),
        lambda m: by_blocks(m, bits=4, block_size=32, is_symmetric=True, quant_format=QuantFormat.QDQ),
    ),
    "embedding-4bit": (
        embedding,
        lambda m: by_blocks(m, bits=4, block_size=32, is_symmetric=False, op_types_to_quantize=("MatMul", "Gather")),
    ),
}
WEIGHTS_ONLY = {"mlp-4bit", "mlp-8bit", "mlp-4bit-qdq", "embedding-4bit"}
OWN: dict[str, tuple[Callable[[], ir.Model], bool, dict[str, object]]] = {
    "static": (cnn, True, {}),
    "static-tensor": (cnn, True, {"per_channel": False, "calibrator": "mse"}),
    "static-mlp": (mlp, True, {}),
    "dynamic": (mlp, False, {}),
    "dynamic-convs": (cnn, False, {"mode": "dynamic", "dynamic_convs": True}),
    "weight": (cnn, False, {"mode": "weight"}),
    "weight-lstm": (lstm, False, {"mode": "weight"}),
    "embedding": (embedding, False, {}),
    "blocks": (large_mlp, False, {"bits": 4}),
    "blocks-rows": (embedding, False, {"bits": 4}),
}


def own(name: str) -> tuple[ir.Model, ir.Model]:
    """A float model and what the pass makes of it."""
    maker, data, options = OWN[name]
    model = maker()
    assert quantize(model, data=data, **options).modified
    return maker(), model


def foreign(name: str) -> tuple[ir.Model, ir.Model]:
    maker, quantizer = FOREIGN[name]
    return maker(), quantizer(maker())


def made(name: str) -> tuple[ir.Model, ir.Model]:
    original, model = _stored(name)
    return ir.from_proto(onnx.ModelProto.FromString(original)), ir.from_proto(onnx.ModelProto.FromString(model))


@cache
def _stored(name: str) -> tuple[bytes, bytes]:
    original, model = own(name) if name in OWN else foreign(name)
    return model_bytes(original), model_bytes(model)


# ---------------------------------------------------------------- left alone


@pytest.mark.parametrize("name", [*FOREIGN, *OWN])
def test_a_quantized_model_is_never_quantized_again(name: str) -> None:
    model = made(name)[1]
    before = model_bytes(model)
    for data in (False, True):
        result = quantize(model, data=data)
        assert not result.modified
        assert any("already quantized (" in change.action for change in result.changes)
        assert model_bytes(model) == before


def test_the_reason_says_how_a_layer_is_quantized() -> None:
    told = {name: actions(quantize(made(name)[1])) for name in ("cnn-qdq", "cnn-qoperator", "mlp-dynamic")}
    assert told["cnn-qdq"]["first"] == "skipped: already quantized (QDQ int8)"
    assert told["cnn-qoperator"]["first_quant"] == "skipped: already quantized (QOperator int8)"
    assert told["mlp-dynamic"]["one_quant"] == "skipped: already quantized (dynamic int8)"


@pytest.mark.parametrize("data", [False, True])
@pytest.mark.parametrize("first", ["first", "second", "third", "classify"])
def test_only_what_is_float_in_a_mixed_model_is_quantized(first: str, data: bool) -> None:
    mixed = by_static(cnn(), quant_format=QuantFormat.QDQ, nodes_to_quantize=[first])
    before, old = tensors(mixed), mixed.clone()
    node = next(node for node in mixed.graph if node.name == first)
    kept = {value.name for value in node.inputs if value is not None}
    result = quantize(mixed, data=data)
    assert result.modified
    assert actions(result)[first] == "skipped: already quantized (QDQ int8)"
    after = tensors(mixed)
    stored = {name: tensor for name, tensor in before.items() if tensor.dtype != ir.DataType.FLOAT}
    assert stored
    for name, tensor in stored.items():
        np.testing.assert_array_equal(tensor.numpy(), after[name].numpy())
    again = next(node for node in mixed.graph if node.name == first)
    assert {value.name for value in again.inputs if value is not None} == kept
    done = {change.site for change in result.changes if change.done}
    assert {"first", "second", "third", "classify"} - {first} <= done | {"classify"}
    assert decibels(old, mixed) > 22


def test_new_integers_take_over_the_grid_at_the_border() -> None:
    kind = QuantType.QUInt8
    mixed = by_static(cnn(), quant_format=QuantFormat.QDQ, nodes_to_quantize=["second"], activation_type=kind)
    quantize(mixed, data=True)
    readers = {
        value.name: [user.op_type for user in value.consumers()]
        for node in mixed.graph
        for value in node.outputs
        if any(user.op_type == "QuantizeLinear" for user in value.consumers())
    }
    assert all(users.count("QuantizeLinear") == 1 for users in readers.values())
    for node in mixed.graph:
        if node.op_type == "QuantizeLinear":
            source = node.inputs[0].producer() if node.inputs[0] is not None else None
            assert source is None or source.op_type != "DequantizeLinear"
    third = next(node for node in mixed.graph if node.name == "third")
    up = third.inputs[0].producer() if third.inputs[0] is not None else None
    assert up is not None
    assert up.op_type == "DequantizeLinear"


def test_a_pair_is_found_from_either_side() -> None:
    model = made("static")[1]
    by_name = {node.name: node for node in model.graph}
    down, up = by_name["x_q"], by_name["x_dq"]
    for value in (model.graph.inputs[0], up.outputs[0]):
        found = existing_pair(value)
        assert found is not None
        assert found[0] is up.outputs[0]
        assert isinstance(found[1], Grid)
    assert existing_pair(down.outputs[0]) is None
    weight = by_name["first"].inputs[1]
    assert weight is not None
    assert existing_pair(weight) is None  # a weight is no activation


# ---------------------------------------------------------------- back to floats


@pytest.mark.parametrize("name", [*FOREIGN, *OWN])
def test_floats_compute_what_the_integers_stood_for(name: str) -> None:
    original, model = made(name)
    floats, undone = as_floats(model)
    assert undone.left == ()
    assert undone.layers
    assert not find_quantized(floats)
    assert not {"QuantizeLinear", "DequantizeLinear", "MatMulInteger", "Cast"} & set(kinds(floats))
    assert all(tensor.dtype in (ir.DataType.FLOAT, ir.DataType.INT64) for tensor in tensors(floats).values())
    assert [(v.name, v.shape, v.dtype) for v in floats.graph.outputs] == [
        (v.name, v.shape, v.dtype) for v in model.graph.outputs
    ]
    assert input_specs(floats) == input_specs(model)
    exact = name in WEIGHTS_ONLY or name.startswith(("weight", "blocks"))
    assert decibels(model, floats) > (100 if exact else 25)
    assert decibels(original, floats) > (12 if "4bit" in name or "blocks" in name else 25)


def test_floats_keep_the_names_of_layers_and_weights() -> None:
    for name, layers in (
        ("cnn-qdq", {"first", "classify"}),
        ("cnn-qoperator", {"first", "classify"}),
        ("mlp-4bit", {"one"}),
    ):
        floats, undone = as_floats(made(name)[1])
        assert layers <= {node.name for node in floats.graph}
        assert layers <= set(undone.layers)
    assert {"w1", "w2", "w3", "w4"} <= set(tensors(as_floats(made("static")[1])[0]))


def test_a_relu_that_a_grid_stood_for_comes_back() -> None:
    model = made("cnn-qdq")[1]
    assert "Relu" not in kinds(model)
    floats, _ = as_floats(model)
    assert kinds(floats).count("Clip") == 2  # both Relus; pooling of what is positive needs none
    feed = {"x": -10 * np.ones((1, 3, 8, 8), np.float32)}
    assert np.isfinite(Reference(floats).run(feed)["y"]).all()


def test_master_weights_that_are_rounded_on_the_way_come_back_as_they_are() -> None:
    body = """
      q = QuantizeLinear(w, s, z)  d = DequantizeLinear(q, s, z)
      xq = QuantizeLinear(x, s, z)  xd = DequantizeLinear(xq, s, z)  [layer] y = MatMul(xd, d)
    """
    model = build("(float[N,32] x) => (float[N,32] y)", body, {"w": (32, 32)})
    for name, array in (("s", np.array(0.03, np.float32)), ("z", np.array(0, np.int8))):
        value = ir.Value(name=name, const_value=ir.tensor(array, name=name))
        model.graph.register_initializer(value)
        for node in model.graph:
            for index, old in enumerate(node.inputs):
                if old is not None and old.name == name:
                    node.replace_input_with(index, value)
    assert actions(quantize(model))["layer"] == "skipped: already quantized (QDQ int8)"
    expected = tensors(model)["w"].numpy()
    floats, undone = as_floats(model)
    assert undone.layers == {"layer": "QDQ int8"}
    assert kinds(floats) == ["MatMul"]
    np.testing.assert_array_equal(tensors(floats)["w"].numpy(), expected)


def test_layers_in_branches_become_floats_too() -> None:
    body = """y = If(c) <
        then_branch = yes () => (float[4,64] a) { [it] a = MatMul(x, w) },
        else_branch = no () => (float[4,64] b) { [other] h = Gemm(x, w, v)  b = Neg(h) }
      >"""
    signature, weights = "(bool c, float[4,32] x) => (float[4,64] y)", {"w": (32, 64), "v": (64,)}
    for mode in ("dynamic", "weight"):
        model = build(signature, body, weights)
        quantize(model, mode=mode)
        floats, undone = as_floats(model)
        assert set(undone.layers) == {"it", "other"}
        assert "MatMul" in kinds(floats)
        assert not find_quantized(floats)
        assert decibels(model, floats) > (100 if mode == "weight" else 30)


def test_what_cannot_become_float_stays_and_says_why() -> None:
    body = "[layer] y = QAttention<num_heads = 2>(x, w, b, xs, ws, m, xz, wz)"
    inputs = "uint8[1,4,8] x, int8[8,24] w, float[24] b, float xs, float ws, int32[1] m, uint8 xz, int8 wz"
    text = (
        f'<ir_version: 8, opset_import: ["" : 17, "com.microsoft" : 1]> g ({inputs}) => (float[1,4,8] y) {{ {body} }}'
    )
    model = ir.from_onnx_text(text.replace("QAttention", "com.microsoft.QAttention"))
    floats, undone = as_floats(model)
    assert kinds(floats) == ["QAttention"]
    assert actions_of(undone.left) == {"layer": "skipped: stays quantized (QOperator int8): no float form is known"}


def actions_of(changes: tuple[Any, ...]) -> dict[str, str]:
    return {change.site: change.action for change in changes}


def test_integers_from_an_input_stay() -> None:
    text = """<ir_version: 8, opset_import: ["" : 17]> g (uint8[2,16] x) => (float[2,8] y)
      <float s = {0.1}, uint8 z = {3}> { d = DequantizeLinear(x, s, z)  y = Neg(d) }"""
    model = ir.from_onnx_text(text)
    floats, _ = as_floats(model)
    assert kinds(floats) == ["DequantizeLinear", "Neg"]


# ---------------------------------------------------------------- quantized anew


@pytest.mark.parametrize("name", ["cnn-qdq-signed", "cnn-qoperator", "mlp-dynamic", "mlp-4bit", "static-tensor"])
@pytest.mark.parametrize("data", [False, True])
def test_requantize_takes_the_normal_path(name: str, data: bool) -> None:
    original, model = made(name)
    source = model.clone()
    result = quantize(model, data=data, requantize=True)
    assert result.modified
    assert {layer.form for layer in find_quantized(model).values()} <= ({"QDQ"} if data else {"dynamic", "weight-only"})
    told = [change.details["was"] for change in result.changes if change.done and "was" in change.details]
    assert told
    assert set(told) == {str(layer) for layer in find_quantized(source).values()}
    assert decibels(source, model) > 20
    assert decibels(original, model) > (12 if "4bit" in name else 20)


def test_requantize_changes_nothing_about_a_float_model() -> None:
    one, two = cnn(), cnn()
    quantize(one, data=True)
    quantize(two, data=True, requantize=True)
    assert model_bytes(one) == model_bytes(two)


def test_patterns_name_layers_of_the_float_model() -> None:
    model = made("cnn-qoperator")[1]
    result = quantize(model, data=True, requantize=True, only=("first", "third"))
    assert actions(result)["classify"] == "skipped: not named by only"
    with pytest.raises(OptionError, match="matches no layer"):
        quantize(made("cnn-qoperator")[1], requantize=False, only=("first",))


@pytest.mark.parametrize("name", ["cnn-qdq", "mlp-dynamic", "embedding-4bit"])
def test_requantize_keeps_the_contract(name: str) -> None:
    assert check_pass(Quant(requantize=True), made(name)[1]).modified
