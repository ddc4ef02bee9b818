"""Products of two activations, as attention has them: on integers where asked for."""

from __future__ import annotations

from pathlib import Path

import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from quantized_models import actions, decibels, samples
from small_models import build, context

from graphopt.errors import OptionError
from graphopt.model_io import model_bytes
from graphopt.pass_base import PassResult
from graphopt.runner import run_pass
from graphopt.targets import IntegerRules, Target
from graphopt_passes.quant import Quant

Shape = tuple[int, ...]
ATTENTION = """
 s = Constant<value = int64[4] {0, 0, 4, 16}>()  t = Constant<value = int64[3] {0, 0, 64}>()
 r = Constant<value = float {32.0}>()
 [q] a = MatMul(x, wq)  a2 = Add(a, bq)  [k] b = MatMul(x, wk)  [v] c = MatMul(x, wv)
 a3 = Reshape(a2, s)  a4 = Transpose<perm = [0,2,1,3]>(a3)
 b3 = Reshape(b, s)  b4 = Transpose<perm = [0,2,3,1]>(b3)
 c3 = Reshape(c, s)  c4 = Transpose<perm = [0,2,1,3]>(c3)
 [scores] d = MatMul(a4, b4)  e = Div(d, r)  f = Softmax(e)  [mix] g = MatMul(f, c4)
 h = Transpose<perm = [0,2,1,3]>(g)  i = Reshape(h, t)  [out] y = MatMul(i, wo)
"""
WEIGHTS: dict[str, Shape] = {"wq": (64, 64), "bq": (64,), "wk": (64, 64), "wv": (64, 64), "wo": (64, 64)}
PLAIN: dict[str, object] = {"equalize": False, "smooth": False, "min_sqnr": -99.0, "min_output_sqnr": -99.0}
FLOAT = "skipped: both operands are computed"
INTEGER = "MatMul on int8"


def attention() -> ir.Model:
    return build("(float[2,10,64] x) => (float[2,10,64] y)", ATTENTION, WEIGHTS)


def quantize(model: ir.Model, rules: IntegerRules | None = None, **options: object) -> PassResult:
    target = Target(name="unit", integers=rules or IntegerRules())
    ctx = context(model, calibration=samples(model), target=target)
    return run_pass(Quant(**{**PLAIN, **options}), ctx).result  # type: ignore[arg-type]


def loaded(model: ir.Model, folder: Path) -> list[str]:
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath, options.log_severity_level = str(folder / "optimized.onnx"), 3
    onnxruntime.InferenceSession(model_bytes(model), options, providers=["CPUExecutionProvider"])
    return [node.op_type for node in onnx.load(folder / "optimized.onnx").graph.node]


def test_attention_computes_on_integers_where_asked(tmp_path: Path) -> None:
    model, original = attention(), attention()
    done = actions(quantize(model, also=("MatMul",)))
    assert (done["scores"], done["mix"]) == (INTEGER, INTEGER)
    kinds = loaded(model, tmp_path)
    assert not {"MatMul", "FusedMatMul"} & set(kinds)
    assert kinds.count("QLinearMatMul") == 3
    assert decibels(original, model) > 25


def test_products_of_activations_stay_float_otherwise() -> None:
    model, original = attention(), attention()
    done = actions(quantize(model))
    assert (done["scores"], done["mix"]) == (FLOAT, FLOAT)
    assert decibels(original, model) > 25


def test_a_target_of_static_integers_needs_no_asking() -> None:
    model, original = attention(), attention()
    rules = IntegerRules(static_only=True, activation="int8", symmetric_activations=True)
    done = actions(quantize(model, rules))
    assert (done["scores"], done["mix"]) == (INTEGER, INTEGER)
    assert decibels(original, model) > 20


def test_a_noisy_product_stays_float() -> None:
    done = actions(quantize(attention(), also=("MatMul",), min_sqnr=60.0))
    assert done["scores"].startswith("skipped: 8-bit activations would leave ")


def test_outputs_come_before_products() -> None:
    model, original = attention(), attention()
    level = float(quantize(attention(), also=("MatMul",)).metrics["output_sqnr_db"])
    result = quantize(model, also=("MatMul",), min_output_sqnr=level + 0.5)
    done = actions(result)
    assert done["mix"] == "skipped: with it and others in int8 an output would be too noisy"
    assert float(result.metrics["output_sqnr_db"]) >= level + 0.5
    assert decibels(original, model) > level - 3


def test_patterns_choose_among_products_too() -> None:
    done = actions(quantize(attention(), also=("MatMul",), skip=("m?x",)))
    assert (done["scores"], done["mix"]) == (INTEGER, "skipped: named by skip")
    done = actions(quantize(attention(), also=("MatMul",), only=("scores", "q")))
    assert (done["scores"], done["mix"]) == (INTEGER, "skipped: not named by only")
    with pytest.raises(OptionError, match="'mixx' matches no layer that can be quantized"):
        quantize(attention(), also=("MatMul",), skip=("mixx",))


def test_a_product_in_a_branch_without_data_says_so() -> None:
    body = """[choose] y = If(c) <
      then_branch = yes () => (float[4,32] o) { [one] h = MatMul(x, w)  t = Transpose(x)  p = MatMul(x, t)
        [two] o = MatMul(p, h) },
      else_branch = no () => (float[4,32] o) { z = Transpose(x)  [three] u = MatMul(x, z)  [four] o = MatMul(u, x) }
    >"""
    model = build("(float[4,32] x, bool c) => (float[4,32] y)", body, {"w": (32, 32)})
    original = model.clone()
    done = actions(quantize(model, also=("MatMul",)))
    assert {done[name] for name in ("two", "three", "four")} == {INTEGER}
    assert decibels(original, model) > 25
