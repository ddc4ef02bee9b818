"""Where a model rounds values itself, new integers are on the same grid, so that nothing is rounded twice."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from onnxruntime.quantization import QuantFormat, QuantType
from quantized_models import actions, by_static, cnn, decibels, samples, tensors
from small_models import build, context

from graphopt.model_io import model_bytes
from graphopt.pass_base import PassResult
from graphopt.reference import Reference
from graphopt.runner import run_pass
from graphopt.targets import IntegerRules, Target
from graphopt_passes.quant import Quant
from graphopt_passes.quant._maths import Grid
from graphopt_passes.quant.borders import existing_grid
from graphopt_passes.quant.sites import tensor_of

INTEGER_ENDS = """
  step = Constant<value = float {0.02}>()  wide = Constant<value = float {0.5}>()  zero = Constant<value = TYPE {10}>()
  x = DequantizeLinear(q, step, zero)
  [one] a = Conv<pads = [1,1,1,1]>(x, w)  b = Relu(a)  [two] c = Conv<pads = [1,1,1,1]>(b, v)
  y = QuantizeLinear(c, wide, zero)
"""


def quantize(model: ir.Model, rules: IntegerRules | None = None, **options: object) -> PassResult:
    plain: dict[str, object] = {"equalize": False, "smooth": False, "bias_correction": False}
    ctx = context(model, calibration=samples(model), target=Target(name="unit", integers=rules or IntegerRules()))
    return run_pass(Quant(**{**plain, **options}), ctx).result  # type: ignore[arg-type]


def integer_ends(dtype: str) -> ir.Model:
    """A model that takes and gives integers."""
    signature, weights = f"({dtype}[2,8,6,6] q) => ({dtype}[2,8,6,6] y)", {"w": (8, 8, 3, 3), "v": (8, 8, 3, 3)}
    return build(signature, INTEGER_ENDS.replace("TYPE", dtype), weights)


def loaded(model: ir.Model, folder: Path) -> list[str]:
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath, options.log_severity_level = str(folder / "optimized.onnx"), 3
    onnxruntime.InferenceSession(model_bytes(model), options, providers=["CPUExecutionProvider"])
    return [node.op_type for node in onnx.load(folder / "optimized.onnx").graph.node]


def grids(model: ir.Model) -> dict[str, list[tuple[float, int]]]:
    """Scale, and zero point counted from the middle, of each chain of roundings, by where the chain begins."""
    found: dict[str, list[tuple[float, int]]] = {}
    for node in model.graph:
        if node.op_type == "QuantizeLinear":
            source = node.inputs[0]
            while source is not None and (maker := source.producer()) is not None:
                if maker.op_type not in ("DequantizeLinear", "QuantizeLinear"):
                    break
                source = maker.inputs[0]
            scale, zero = (tensor_of(node.inputs[i]).numpy() for i in (1, 2))  # type: ignore[union-attr]
            middle = 128 if zero.dtype == np.uint8 else 0
            found.setdefault(source.name or "" if source else "", []).append((float(scale), int(zero) - middle))
    return found


@pytest.mark.parametrize("dtype", ["int8", "uint8"])
@pytest.mark.parametrize("activation", ["int8", "uint8"])
def test_a_model_with_integer_ends_rounds_nothing_twice(dtype: str, activation: str, tmp_path: Path) -> None:
    model, original = integer_ends(dtype), integer_ends(dtype)
    rules = IntegerRules(activation=activation)  # type: ignore[arg-type]
    done = actions(quantize(model, rules, min_sqnr=-99.0, min_output_sqnr=-99.0))
    assert (done["one"], done["two"]) == ("int8, calibrated ranges", "int8, calibrated ranges")
    assert all(len(set(chain)) == 1 for chain in grids(model).values())
    if activation == "uint8":  # ONNX Runtime computes on int8 activations only where it was built for ARM
        assert loaded(model, tmp_path).count("QLinearConv") == 2
    left, right = Reference(original), Reference(model)
    for feed in samples(original, 4).feeds():
        expected, got = left.run(feed)["y"].astype(int), right.run(feed)["y"].astype(int)
        assert np.abs(expected - got).max() <= 2
        assert np.abs(expected - got).mean() < 0.35


@pytest.mark.parametrize("kind", [QuantType.QInt8, QuantType.QUInt8])
@pytest.mark.parametrize("form", [QuantFormat.QDQ, QuantFormat.QOperator])
@pytest.mark.parametrize("first", ["first", "second", "third"])
def test_layers_beside_quantized_ones_share_their_grids(kind: QuantType, form: QuantFormat, first: str) -> None:
    options = {"quant_format": form, "nodes_to_quantize": [first], "activation_type": kind}
    mixed = by_static(cnn(), weight_type=QuantType.QInt8, **options)
    before = decibels(cnn(), mixed)
    quantize(mixed)
    assert all(len(set(chain)) == 1 for chain in grids(mixed).values())
    assert decibels(cnn(), mixed) > min(before, 30) - 3


@pytest.mark.parametrize("kind", [QuantType.QInt8, QuantType.QUInt8])
def test_requantizing_drops_the_old_roundings(kind: QuantType) -> None:
    old = by_static(cnn(), activation_type=kind, weight_type=QuantType.QInt8)
    new = old.clone()
    quantize(new, requantize=True)
    assert {t.dtype for name, t in tensors(new).items() if name.endswith("_zero")} == {ir.DataType.UINT8}
    assert all(len(chain) == 1 for chain in grids(new).values())
    assert decibels(cnn(), new) > decibels(cnn(), old) - 1


def test_a_grid_moves_between_signed_and_unsigned() -> None:
    model = integer_ends("int8")
    value = next(node for node in model.graph if node.op_type == "DequantizeLinear").outputs[0]
    scale = float(np.float32(0.02))
    assert existing_grid(value, "int8") == Grid(scale, 10, "int8")
    assert existing_grid(value, "uint8") == Grid(scale, 138, "uint8")
    assert existing_grid(None, "uint8") is None
