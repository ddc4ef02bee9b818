from __future__ import annotations

import json
from pathlib import Path

import onnx_ir as ir
import pytest
from onnxruntime.quantization import QuantFormat
from quantized_models import by_blocks, by_dynamic, by_static, cnn, mlp, quantize
from small_models import build, context

from graphopt.analyses import QUANTIZED
from graphopt.analyses.quantized import QuantizedLayer, find_quantized, summary
from graphopt.cli.main import _run
from graphopt.model_io import save_model


def told(model: ir.Model) -> list[str]:
    return summary(list(find_quantized(model).values()))


def test_a_float_model_holds_nothing_quantized() -> None:
    assert told(cnn()) == []
    assert told(mlp()) == []


@pytest.mark.parametrize(
    ("options", "layers", "others"),
    [
        ({"quant_format": QuantFormat.QDQ, "per_channel": True}, "4 layers QDQ int8 per channel", "3 other"),
        ({"quant_format": QuantFormat.QDQ}, "4 layers QDQ int8 per tensor", "3 other"),
        ({"quant_format": QuantFormat.QOperator}, "4 layers QOperator int8 per tensor", "2 other"),
    ],
)
def test_static_models_of_onnxruntime_are_recognised(options: dict[str, object], layers: str, others: str) -> None:
    form = layers.split()[2]
    assert told(by_static(cnn(), **options)) == [layers, f"{others} operators {form} int8"]


def test_dynamic_models_of_onnxruntime_are_recognised() -> None:
    assert told(by_dynamic(mlp())) == ["2 layers dynamic int8 per tensor"]
    assert told(by_dynamic(mlp(), per_channel=True)) == ["2 layers dynamic int8 per channel"]


@pytest.mark.parametrize(
    ("form", "bits"), [(QuantFormat.QDQ, 4), (QuantFormat.QOperator, 4), (QuantFormat.QOperator, 8)]
)
def test_blocks_of_onnxruntime_are_recognised(form: QuantFormat, bits: int) -> None:
    model = by_blocks(mlp(21), bits=bits, block_size=32, is_symmetric=True, quant_format=form)
    assert told(model) == [f"1 layer weight-only int{bits} per block of 32"]


@pytest.mark.parametrize(
    ("data", "options", "layers"),
    [
        (True, {}, "4 layers QDQ int8 per channel"),
        (True, {"per_channel": False}, "4 layers QDQ int8 per tensor"),
        (False, {"mode": "weight"}, "4 layers weight-only int8 per channel"),
        (False, {"mode": "dynamic", "dynamic_convs": True, "skip": ("classify",)}, "3 layers dynamic int8 per channel"),
    ],
)
def test_own_models_are_recognised(data: bool, options: dict[str, object], layers: str) -> None:
    model = cnn()
    quantize(model, data=data, **options)
    assert told(model)[0] == layers


def test_an_embedding_and_its_product_are_recognised() -> None:
    model = build(
        "(int64[N] i) => (float[N,32] y)", "e = Gather(t, i)  y = MatMul(e, w)", {"t": (90, 64), "w": (64, 32)}
    )
    quantize(model)
    assert told(model) == ["1 layer dynamic int8 per channel", "1 layer weight-only int8 per channel"]


def test_recurrent_weights_are_recognised_whatever_the_bias_is() -> None:
    model = build(
        "(float[5,N,16] x) => (float[5,1,N,32] y)",
        "y = LSTM<hidden_size = 32>(x, w, r, b)",
        {"w": (1, 128, 16), "r": (1, 128, 32), "b": (1, 256)},
    )
    quantize(model, mode="weight")
    assert told(model) == ["1 layer weight-only int8 per channel"]


def test_weights_that_are_multiplied_out_at_load_are_recognised() -> None:
    text = """<ir_version: 8, opset_import: ["" : 17]> g (float[N,2] x) => (float[N,4] y)
      <int8[2,4] w = {1, 2, 3, 4, 5, 6, 7, 8}, float[4] s = {1, 2, 3, 4}, float zero = {3}> {
        c = Cast<to = 1>(w)  [off] o = Sub(c, zero)  m = Mul(o, s)  [layer] y = MatMul(x, m)
      }"""
    found = find_quantized(ir.from_onnx_text(text))
    assert {node.name: (str(layer), layer.granularity) for node, layer in found.items()} == {
        "layer": ("weight-only int8", "channel")
    }


def test_a_layer_with_float_weights_between_rounded_values_is_not_quantized() -> None:
    model = by_static(cnn(), quant_format=QuantFormat.QDQ, nodes_to_quantize=["second"])
    names = {node.name for node in find_quantized(model)}
    assert "second" in names
    assert "third" not in names  # it reads a rounded value, and its weight is float


def test_layers_inside_branches_are_named() -> None:
    body = """y = If(c) <
        then_branch = yes () => (float[4,64] a) { [it] a = MatMul(x, w) },
        else_branch = no () => (float[4,64] b) { b = Identity(z) }
      >"""
    model = build("(bool c, float[4,32] x, float[4,64] z) => (float[4,64] y)", body, {"w": (32, 64)})
    quantize(model, mode="weight")
    assert context(model).fact(QUANTIZED) == {"it": QuantizedLayer("weight-only", 8, "int", "channel")}


def test_inspect_says_what_is_quantized(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, model in (("float", cnn()), ("int", by_static(cnn(), quant_format=QuantFormat.QDQ, per_channel=True))):
        save_model(model, tmp_path / f"{name}.onnx")
    assert _run(["inspect", str(tmp_path / "int.onnx")]) == 0
    assert "quantized  4 layers QDQ int8 per channel, 3 other operators QDQ int8\n" in capsys.readouterr().out
    assert _run(["inspect", str(tmp_path / "float.onnx")]) == 0
    assert "\nquantized" not in capsys.readouterr().out
    assert _run(["inspect", str(tmp_path / "float.onnx"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["quantized"] == []


@pytest.mark.parametrize(("options", "granularity"), [({}, "block of 32"), ({"group_size": 0}, "channel")])
def test_packed_rows_of_an_embedding_are_one_layer(options: dict[str, object], granularity: str) -> None:
    model = build("(int64[N] i) => (float[N,64] y)", "[embed] y = Gather(t, i)", {"t": (90, 64)})
    quantize(model, bits=4, **options)
    assert told(model) == [f"1 layer weight-only int4 per {granularity}"]
    assert not quantize(model).modified
