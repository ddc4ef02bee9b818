from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from graphopt.calibration import Dataset, open_calibration
from graphopt.errors import OptionError, PassError
from graphopt.model_io import ShapeBinding, input_specs, load_model, model_bytes, save_model
from graphopt.pass_base import Context, PassResult
from graphopt.reference import Feed, Reference, random_feed
from graphopt.runner import run_pass
from graphopt.targets import IntegerRules, Target
from graphopt.testing import check_pass
from graphopt_passes.quant import Quant

ORT = Target(name="ort")
BINDING = ShapeBinding(dims={"N": 2})
BODY = """
  [table] e = Gather(t, i)
  [one] a = MatMul(e, w)
  b = Relu(a)
  [two] y = Gemm<transB = 1>(b, v, c)
"""
SHAPES: dict[str, tuple[int, ...]] = {"t": (50, 64), "w": (64, 64), "v": (32, 64), "c": (32,)}
FORMATS: dict[str, ir.DataType] = {"bf16": ir.DataType.BFLOAT16, "fp8": ir.DataType.FLOAT8E4M3FN}
Format = Literal["bf16", "fp8"]


def network(opset: int = 17, **replaced: np.ndarray) -> ir.Model:
    rng = np.random.default_rng(0)
    arrays = {k: rng.standard_normal(shape).astype(np.float32) for k, shape in SHAPES.items()} | replaced
    text = f'<ir_version: 8, opset_import: ["" : {opset}]> g (int64[N] i) => (float[N,32] y) {{ {BODY} }}'
    proto = onnx.parser.parse_model(text)
    proto.graph.initializer.extend(onnx.numpy_helper.from_array(array, name) for name, array in arrays.items())
    return ir.from_proto(proto)


def samples(model: ir.Model) -> Dataset:
    def read() -> Iterator[Feed]:
        rng = np.random.default_rng(3)
        return (random_feed(input_specs(model), BINDING, rng) for _ in range(6))

    return Dataset("samples", "0", read)


def narrow(model: ir.Model, dtype: str, *, data: bool = True, **options: Any) -> PassResult:
    ctx = Context(model, ORT, calibration=samples(model) if data else None, binding=BINDING)
    return run_pass(Quant(dtype=dtype, **options), ctx).result  # type: ignore[arg-type]


def level(before: ir.Model, after: ir.Model) -> float:
    """Signal to noise over four random inputs, in dB."""
    rng, left, right = np.random.default_rng(5), Reference(before), Reference(after)
    signal = noise = 0.0
    for _ in range(4):
        feed = {"i": rng.integers(0, 50, 2)}
        expected, got = left.run(feed)["y"], right.run(feed)["y"]
        signal, noise = signal + float(np.square(expected).sum()), noise + float(np.square(got - expected).sum())
    return float(10 * np.log10(signal / noise))


def stored(model: ir.Model) -> dict[str, ir.DataType | None]:
    return {value.name or "": value.dtype for graph in model.graphs() for value in graph.initializers.values()}


@pytest.mark.parametrize(("dtype", "least"), [("bf16", 45.0), ("fp8", 24.0)])
@pytest.mark.parametrize("data", [True, False])
def test_weights_are_stored_narrow_and_computed_wide(dtype: Format, least: float, data: bool):
    model = network()
    before = model.clone()
    result = narrow(model, dtype, data=data)
    assert {change.site for change in result.changes if change.done} == {"table", "one", "two"}
    found = stored(model)
    assert [found[f"{name}_{dtype}"] for name in "twv"] == [FORMATS[dtype]] * 3
    assert not {"t", "w", "v"} & set(found)
    assert level(before, model) > least
    assert len(model_bytes(model)) < {"bf16": 0.55, "fp8": 0.35}[dtype] * len(model_bytes(before))


@pytest.mark.parametrize("dtype", list(FORMATS))
def test_the_contract_of_a_pass_holds(dtype: Format):
    model = network()
    check_pass(Quant(dtype=dtype), model, calibration=samples(model), binding=BINDING)


def test_the_opset_is_raised_to_what_the_format_needs():
    for dtype, opset in (("bf16", 13), ("fp8", 19)):
        model = network(11)
        before = model.clone()
        assert narrow(model, dtype).modified
        assert model.opset_imports[""] == opset
        assert level(before, model) > 20


def test_a_kept_opset_is_an_error_that_says_so():
    ctx = Context(network(17), ORT, keep_opset=True)
    with pytest.raises(PassError, match="opset 17 is kept, 19 would be needed"):
        run_pass(Quant(dtype="fp8"), ctx)


def test_fp8_neither_overflows_nor_forgets_small_channels():
    scaled = np.random.default_rng(1).standard_normal((32, 64)) * np.logspace(-4, 6, 32)[:, None]
    model = network(v=scaled.astype(np.float32))
    before = model.clone()
    narrow(model, "fp8")
    (node,) = [n for n in model.graph if n.op_type == "DequantizeLinear" and "v" in (n.outputs[0].name or "")]
    assert node.attributes.get_int("axis", -1) == 0
    expected, got = (Reference(m).run({"i": np.arange(50)})["y"] for m in (before, model))
    bias = before.graph.initializers["c"].const_value.numpy()  # type: ignore[union-attr]
    signal, noise = np.square(expected - bias).sum(axis=0), np.square(got - expected).sum(axis=0)
    assert (10 * np.log10(signal / noise) > 15).all()


def test_a_table_is_not_dequantized_on_every_run():
    model = network()
    narrow(model, "fp8", data=False)
    assert [n.op_type for n in model.graph if "DequantizeLinear" in n.op_type] == ["DequantizeLinear"] * 2
    gather = next(n for n in model.graph if n.op_type == "Gather")
    chain = gather.inputs[0].producer()  # type: ignore[union-attr]
    assert chain is not None
    assert chain.op_type == "Mul"


@pytest.mark.parametrize("dtype", list(FORMATS))
def test_a_weight_that_two_layers_share_is_stored_once(dtype: Format):
    text = """<ir_version: 8, opset_import: ["" : 17]>
    g (float[N,64] x) => (float[N,64] y) { [one] a = MatMul(x, w)  [two] y = MatMul(a, w) }"""
    proto = onnx.parser.parse_model(text)
    weight = np.random.default_rng(0).standard_normal((64, 64)).astype(np.float32)
    proto.graph.initializer.append(onnx.numpy_helper.from_array(weight, "w"))
    model = ir.from_proto(proto)
    result = narrow(model, dtype, data=False)
    assert [change.site for change in result.changes if change.done] == ["one", "two"]
    assert sum(value.dtype == FORMATS[dtype] for value in model.graph.initializers.values()) == 1


@pytest.mark.parametrize("dtype", list(FORMATS))
def test_the_noisiest_weights_step_back_below_the_limit(dtype: Format):
    model = network()
    limit = 1 + float(narrow(model.clone(), dtype).metrics["output_sqnr_db"])
    result = narrow(model, dtype, min_output_sqnr=limit)
    left = [change for change in result.changes if not change.done]
    assert left
    assert all("an output would keep" in change.action for change in left)
    assert float(result.metrics.get("output_sqnr_db", limit)) >= limit
    assert result.modified == (len(left) < 3)


@pytest.mark.parametrize("dtype", list(FORMATS))
def test_what_the_user_keeps_stays_as_it_is(dtype: Format):
    model = network()
    result = narrow(model, dtype, keep=("Gather",), skip=("two",))
    why = {change.site: change.action for change in result.changes if not change.done}
    assert (why["table"], why["two"]) == ("skipped: named by keep", "skipped: named by skip")
    assert stored(model)["t"] == stored(model)["v"] == ir.DataType.FLOAT


@pytest.mark.parametrize("options", [{"mode": "static"}, {"bits": 4}, {"requantize": True}])
def test_options_of_integers_are_refused(options: dict[str, Any]):
    with pytest.raises(OptionError, match="belongs to integers"):
        narrow(network(), "bf16", **options)


def test_a_target_of_static_integers_takes_no_floats():
    target = Target(name="npu", integers=IntegerRules(static_only=True))
    with pytest.raises(OptionError, match="computes on static int8 only"):
        run_pass(Quant(dtype="fp8"), Context(network(), target))


@pytest.mark.parametrize("dtype", list(FORMATS))
def test_weights_in_files_are_narrowed_when_they_are_written(tmp_path: Path, dtype: Format):
    save_model(network(), tmp_path / "m.onnx", embed_limit=0)
    model = load_model(tmp_path / "m.onnx")
    before = model.clone()
    narrow(model, dtype)
    tensor = model.graph.initializers[f"w_{dtype}"].const_value
    assert isinstance(tensor, ir.LazyTensor)
    save_model(model, tmp_path / "out.onnx", embed_limit=0)
    assert level(before, load_model(tmp_path / "out.onnx")) > 20


@pytest.mark.parametrize("dtype", list(FORMATS))
def test_a_real_model_keeps_its_outputs(zoo: Callable[..., Path], dtype: Format):
    folder = zoo("tiny_kws", samples=8, limit=8)
    model = load_model(folder / "model.onnx")
    calibration = open_calibration(folder / "calib.npz", input_specs(model), ShapeBinding())
    result = run_pass(Quant(dtype=dtype), Context(model, ORT, calibration=calibration)).result
    assert float(result.metrics["output_sqnr_db"]) > {"bf16": 40, "fp8": 20}[dtype]
