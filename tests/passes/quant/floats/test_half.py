from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from graphopt.calibration import Dataset, open_calibration
from graphopt.errors import OptionError
from graphopt.model_io import ShapeBinding, input_specs, load_model, save_model, to_proto
from graphopt.pass_base import Context, PassResult
from graphopt.reference import Feed, Reference, random_feed
from graphopt.runner import run_pass
from graphopt.targets import Target
from graphopt.testing import check_pass
from graphopt_passes.quant import Quant

ORT = Target(name="ort")
BINDING = ShapeBinding(dims={"N": 2, "S": 5})
HALF, FLOAT = ir.DataType.FLOAT16, ir.DataType.FLOAT
RNG = np.random.default_rng(0)

CNN = """
  [first] a = Conv<kernel_shape = [3,3], pads = [1,1,1,1]>(x, w1, b1)
  [rectify] b = Relu(a)
  [second] c = Conv<kernel_shape = [1,1]>(b, w2)
  [residual] d = Add(c, b)
  [pool] e = GlobalAveragePool(d)
  [flat] f = Flatten(e)
  [classify] y = Gemm<transB = 1>(f, w3, b3)
"""
CNN_WEIGHTS: dict[str, Any] = {"w1": (16, 3, 3, 3), "b1": (16,), "w2": (16, 16, 1, 1), "w3": (10, 16), "b3": (10,)}


def build(signature: str, body: str, weights: Mapping[str, Any], opset: int = 17) -> ir.Model:
    """A model from text; weights are arrays, or shapes of random ones."""
    arrays = {
        k: w if isinstance(w, np.ndarray) else RNG.standard_normal(w).astype(np.float32) for k, w in weights.items()
    }
    proto = onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["" : {opset}]>\nmain {signature} {{\n{body}\n}}')
    proto.graph.initializer.extend(onnx.numpy_helper.from_array(array, name) for name, array in arrays.items())
    return ir.from_proto(proto)


def cnn(**replaced: Any) -> ir.Model:
    return build("(float[N,3,8,8] x) => (float[N,10] y)", CNN, {**CNN_WEIGHTS, **replaced})


def feeds(model: ir.Model, count: int = 4, scale: float = 1.0, seed: int = 1) -> list[Feed]:
    rng = np.random.default_rng(seed)
    found = [random_feed(input_specs(model), BINDING, rng) for _ in range(count)]
    return [{k: a * np.float32(scale) if a.dtype == np.float32 else a for k, a in feed.items()} for feed in found]


def samples(model: ir.Model, scale: float = 1.0) -> Dataset:
    given = feeds(model, 6, scale, seed=2)

    def read() -> Iterator[Feed]:
        return iter(given)

    return Dataset("samples", "0", read)


def halve(model: ir.Model, *, data: bool = True, scale: float = 1.0, **options: Any) -> PassResult:
    ctx = Context(model, ORT, calibration=samples(model, scale) if data else None, binding=BINDING)
    return run_pass(Quant(dtype="fp16", **options), ctx).result


def kinds(model: ir.Model) -> list[str]:
    return [node.op_type for graph in model.graphs() for node in graph]


def types(model: ir.Model) -> Mapping[str, ir.DataType | None]:
    """Element types by value name, from strict inference; what the model says of types must agree with it."""
    proto = onnx.shape_inference.infer_shapes(to_proto(model), check_type=True, strict_mode=True)
    inferred = ir.from_proto(proto)
    values = [v for g in inferred.graphs() for n in g for v in n.outputs]
    initializers = [v for g in inferred.graphs() for v in g.initializers.values()]
    return {v.name or "": v.dtype for v in (*values, *initializers, *inferred.graph.inputs)}


def reasons(result: PassResult) -> dict[str, str]:
    return {change.site: change.action for change in result.changes if not change.done}


def assert_close(before: ir.Model, after: ir.Model, scale: float = 1.0, least: float = 40.0) -> None:
    left, right = Reference(before), Reference(after)
    for feed in feeds(before, 4, scale):
        expected, got = left.run(feed), right.run(feed)
        for name, reference in expected.items():
            assert got[name].dtype == reference.dtype
            if reference.dtype.kind != "f":
                assert np.array_equal(got[name], reference)
                continue
            assert np.isfinite(got[name][np.isfinite(reference)]).all()
            noise = float(np.square(got[name] - reference, dtype=np.float64).sum())
            signal = float(np.square(reference, dtype=np.float64).sum())
            assert 10 * np.log10(signal / max(noise, 1e-30)) > least, name


# ---------------------------------------------------------------- the plain case


def test_a_network_computes_in_fp16_between_two_casts():
    model = cnn()
    before = model.clone()
    result = halve(model)
    assert result.modified
    assert not reasons(result)
    assert kinds(model).count("Cast") == 2
    assert all(value.dtype == HALF for value in model.graph.initializers.values())
    assert {value.name for value in model.graph.initializers.values()} == set(CNN_WEIGHTS)
    assert types(model)["d"] == HALF
    assert (model.graph.inputs[0].dtype, model.graph.outputs[0].dtype) == (FLOAT, FLOAT)
    assert float(result.metrics["output_sqnr_db"]) > 50
    assert_close(before, model, least=50)


@pytest.mark.parametrize("data", [True, False])
def test_the_contract_of_a_pass_holds(data: bool):
    model = cnn()
    check_pass(Quant(dtype="fp16"), model, calibration=samples(model) if data else None, binding=BINDING)


def test_a_model_in_opset_seven_is_converted_in_opset_seven():
    body = """
      a = Conv<kernel_shape = [3,3], pads = [1,1,1,1]>(x, w)
      b = BatchNormalization(a, scale, bias, mean, var)
      c = Clip<min = 0.0, max = 6.0>(b)
      d = Upsample<mode = "nearest", scales = [1.0, 1.0, 2.0, 2.0]>(c)
      y = Pow(d, two)
    """
    weights = {"w": (8, 3, 3, 3), "scale": (8,), "bias": (8,), "mean": (8,), "var": np.ones(8, np.float32)}
    model = build("(float[N,3,8,8] x) => (float[N,8,16,16] y)", body, {**weights, "two": np.array(2.0, np.float32)}, 7)
    before = model.clone()
    assert halve(model).modified
    assert model.opset_imports[""] == 7
    assert types(model)["d"] == HALF
    assert_close(before, model)


def test_inputs_and_outputs_keep_their_names_and_intermediate_outputs_too():
    body = "a = MatMul(x, w)\n y = Relu(a)\n z = MatMul(y, w)"
    model = build("(float[N,32] x) => (float[N,32] a, float[N,32] y, float[N,32] z)", body, {"w": (32, 32)})
    before = model.clone()
    assert halve(model).modified
    assert [value.name for value in model.graph.outputs] == ["a", "y", "z"]
    assert kinds(model).count("Cast") == 4
    assert_close(before, model)


def test_a_model_without_weights_gains_nothing():
    model = build("(float[N,32] x) => (float[N,32] y)", "a = Relu(x)\n y = Sigmoid(a)", {})
    result = halve(model)
    assert not result.modified
    assert all("only add casts" in reason for reason in reasons(result).values())


# ---------------------------------------------------------------- constants


def test_weights_beyond_fp16_keep_their_layer_in_float32():
    large = RNG.standard_normal((16, 16, 1, 1)).astype(np.float32)
    large[3, 2] = 1e6
    large[4, 2] = -1e5
    model = cnn(w2=large)
    before = model.clone()
    result = halve(model, data=False)
    assert "2 of 256 weights overflow fp16, the largest is 1e+06" in reasons(result)["second"]
    assert types(model)["c"] == FLOAT
    assert model.graph.initializers["w2"].dtype == FLOAT
    assert model.graph.initializers["w1"].dtype == HALF
    assert_close(before, model)


def test_weights_that_would_vanish_keep_their_layer_in_float32():
    model = cnn(w2=(RNG.standard_normal((16, 16, 1, 1)) * 1e-9).astype(np.float32))
    result = halve(model, data=False)
    assert "256 of 256 weights vanish" in reasons(result)["second"]


def test_an_epsilon_that_fp16_does_not_know_keeps_its_division_finite():
    body = """
      a = MatMul(x, w)
      m = ReduceMean<axes = [-1]>(a)
      c = Sub(a, m)
      s = Mul(c, c)
      v = ReduceMean<axes = [-1]>(s)
      [guard] e = Add(v, eps)
      r = Sqrt(e)
      n = Div(c, r)
      y = MatMul(n, w)
    """
    eps = np.array(1e-12, np.float32)
    model = build("(float[N,64] x) => (float[N,64] y)", body, {"w": (64, 64), "eps": eps})
    before = model.clone()
    result = halve(model)
    assert "1 of its constants vanish" in reasons(result)["guard"]
    assert_close(before, model)


def test_a_constant_that_several_nodes_read_is_stored_once():
    body = "[one] a = MatMul(x, w)\n [two] b = MatMul(a, w)\n [three] y = MatMul(b, v)"
    for keep in ((), ("two",)):
        model = build("(float[N,64] x) => (float[N,64] y)", body, {"w": (64, 64), "v": (64, 64)})
        before = model.clone()
        assert halve(model, keep=keep).modified
        assert list(model.graph.initializers) == ["w", "v"]
        # what the user keeps reads the weight as it was
        assert model.graph.initializers["w"].dtype == (FLOAT if keep else HALF)
        assert_close(before, model)


@pytest.mark.parametrize("fill", [-1e9, -3.4028235e38, -np.inf])
def test_masks_stay_masks(fill: float):
    body = """
      q = MatMul(x, w)
      t = Transpose<perm = [0,2,1]>(q)
      scores = MatMul(q, t)
      masked = Add(scores, mask)
      p = Softmax<axis = -1>(masked)
      y = MatMul(p, q)
    """
    mask = np.triu(np.full((5, 5), fill, np.float32), 1)
    model = build("(float[N,5,32] x) => (float[N,5,32] y)", body, {"w": (32, 32), "mask": mask})
    before = model.clone()
    for data in (True, False):
        work = before.clone()
        result = halve(work, data=data, scale=0.3)
        assert types(work)["masked"] == HALF, reasons(result)
        assert_close(before, work, 0.3)


@pytest.mark.parametrize("data", [True, False])
def test_a_mask_computed_from_whole_numbers_is_clipped_where_it_meets_the_data(data: bool):
    body = """
      some = Max(mask, first)
      f = Cast<to = 1>(some)
      inverted = Sub(one, f)
      far = Mul(inverted, least)
      bias = Unsqueeze(far, axes)
      q = MatMul(x, w)
      t = Transpose<perm = [0,2,1]>(q)
      scores = MatMul(q, t)
      masked = Add(scores, bias)
      p = Softmax<axis = -1>(masked)
      y = MatMul(p, q)
    """
    weights = {
        "w": (32, 32), "one": np.array(1, np.float32), "least": np.array(-3.4028235e38, np.float32),
        "axes": np.array([1], np.int64), "first": np.array([1, 0, 0, 0, 0], np.int64),
    }  # fmt: skip
    model = build("(float[N,5,32] x, int64[N,5] mask) => (float[N,5,32] y)", body, weights)
    before = model.clone()
    result = halve(model, data=data, scale=0.3)
    assert "positions, sizes or a mask" in reasons(result)["far"]
    assert "Clip" in kinds(model)
    assert types(model)["masked"] == HALF
    assert_close(before, model, 0.3)


def test_a_large_constant_that_the_model_returns_is_no_mask():
    body = "a = MatMul(x, w)\n [fill] y = Where(c, far, a)"
    weights = {"w": (32, 32), "far": np.array(-1e9, np.float32)}
    model = build("(float[N,32] x, bool[N,32] c) => (float[N,32] y)", body, weights)
    before = model.clone()
    halve(model)
    assert_close(before, model, least=60)


# ---------------------------------------------------------------- activations


def test_activations_near_the_limit_stay_float32():
    body = "[one] a = MatMul(x, w)\n [two] b = MatMul(a, w)\n [three] c = Mul(b, small)\n [four] y = MatMul(c, w)"
    weights = {"w": (64, 64), "small": np.array(0.01, np.float32)}
    model = build("(float[N,64] x) => (float[N,64] y)", body, weights)
    before = model.clone()
    result = halve(model, scale=300)
    assert "'b' reaches" in reasons(result).get("two", "") or "'b' reaches" in str(result.changes)
    found = types(model)
    assert (found["a"], found["b"], found["y_narrow"]) == (HALF, FLOAT, HALF)
    assert_close(before, model, 300)


def test_squares_stay_float32_where_nobody_shows_data():
    body = "a = MatMul(x, w)\n [square] s = Pow(a, two)\n m = ReduceMean<axes = [-1]>(s)\n r = Sqrt(m)\n y = Div(a, r)"
    weights = {"w": (64, 64), "two": np.array(2, np.float32)}
    model = build("(float[N,64] x) => (float[N,64] y)", body, weights)
    before = model.clone()
    result = halve(model, data=False)
    assert "no calibration data covers it" in reasons(result)["square"]
    assert types(model)["a"] == HALF
    assert_close(before, model, 300)  # 300 squared times 64 is beyond fp16
    shown = before.clone()
    halve(shown, scale=0.1)
    assert types(shown)["s"] == HALF


def test_sums_inside_a_mean_count():
    body = "a = MatMul(x, w)\n b = Abs(a)\n [mean] m = ReduceMean<axes = [-1]>(b)\n y = Sub(a, m)"
    model = build("(float[N,64] x) => (float[N,4096] y)", body, {"w": (64, 4096)})
    before = model.clone()
    result = halve(model, scale=4)
    assert "its sums reach" in reasons(result)["mean"]
    assert_close(before, model, 4)


def test_a_difference_of_nearly_equal_numbers_is_found_and_kept():
    body = """
      a = MatMul(x, w)
      [lift] b = Add(a, far)
      [drop] c = Sub(b, far)
      y = MatMul(c, w)
    """
    weights = {"w": (64, 64), "far": np.full(64, 20000, np.float32)}
    model = build("(float[N,64] x) => (float[N,64] y)", body, weights)
    before = model.clone()
    result = halve(model, min_output_sqnr=40.0)
    assert "lift" in reasons(result)
    assert float(result.metrics["output_sqnr_db"]) > 40
    assert types(model)["a"] == HALF
    assert_close(before, model)


def test_small_activations_keep_their_digits():
    body = "a = MatMul(x, w)\n [shrink] b = Mul(a, tiny)\n [grow] c = Mul(b, huge)\n y = MatMul(c, w)"
    tiny, huge = np.array(2.0**-14, np.float32), np.array(2.0**14, np.float32)
    model = build("(float[N,64] x) => (float[N,64] y)", body, {"w": (64, 64), "tiny": tiny, "huge": huge})
    before = model.clone()
    result = halve(model, scale=1e-3)
    assert "is so small" in reasons(result)["shrink"]
    assert_close(before, model, 1e-3)


# ---------------------------------------------------------------- operators


def test_resize_keeps_its_scales_in_float32():
    body = """
      a = Conv<kernel_shape = [3,3], pads = [1,1,1,1]>(x, w)
      b = Resize<mode = "linear">(a, roi, scales)
      y = Conv<kernel_shape = [3,3], pads = [1,1,1,1]>(b, v)
    """
    scales = np.array([1, 1, 2, 2], np.float32)
    weights = {"w": (8, 3, 3, 3), "v": (8, 8, 3, 3), "roi": np.zeros(0, np.float32), "scales": scales}
    model = build("(float[N,3,8,8] x) => (float[N,8,16,16] y)", body, weights, 13)
    before = model.clone()
    assert halve(model).modified
    assert types(model)["b"] == HALF
    assert model.graph.initializers["scales"].dtype == FLOAT
    assert_close(before, model)


def test_operators_without_fp16_stay_float32_by_the_models_own_opset():
    body = "a = MatMul(x, w)\n [sum] b = CumSum(a, axis)\n y = MatMul(b, w)"
    weights = {"w": (32, 32), "axis": np.array(1, np.int32)}
    for opset, type_ in ((13, FLOAT), (14, HALF)):
        model = build("(float[N,32] x) => (float[N,32] y)", body, weights, opset)
        before = model.clone()
        result = halve(model, scale=0.1)
        assert types(model)["b"] == type_, reasons(result)
        assert ("takes no fp16 in opset 13" in reasons(result).get("sum", "")) == (type_ == FLOAT)
        assert_close(before, model, 0.1)


def test_detection_boxes_go_through_non_max_suppression():
    body = """
      a = MatMul(x, w)
      boxes = Sigmoid(a)
      s = MatMul(x, v)
      t = Transpose<perm = [0,2,1]>(s)
      [nms] y = NonMaxSuppression(boxes, t, most)
      z = Identity(t)
    """
    weights = {"w": (32, 4), "v": (32, 3), "most": np.array([2], np.int64)}
    model = build("(float[1,6,32] x) => (int64[K,3] y, float[1,3,6] z)", body, weights)
    result = halve(model)
    assert "takes no fp16" in reasons(result)["nms"]
    Reference(model).run(feeds(model)[0])


def test_positions_keep_their_precision():
    body = """
      shape = Shape(x)
      size = Gather(shape, one)
      scalar = Squeeze(size)
      real = Cast<to = 1>(scalar)
      position = Range(zero, real, step)
      [angle] sine = Sin(position)
      row = Unsqueeze(sine, last)
      a = MatMul(x, w)
      y = Mul(a, row)
    """
    weights = {
        "one": np.array([1], np.int64), "zero": np.array(0, np.float32), "step": np.array(1, np.float32),
        "last": np.array([1], np.int64), "w": (32, 32),
    }  # fmt: skip
    model = build("(float[N,4000,32] x) => (float[N,4000,32] y)", body, weights)
    before = model.clone()
    result = halve(model, data=False)
    assert "positions" in reasons(result)["angle"]
    assert_close(before, model)


def test_casts_and_fillings_change_their_attribute():
    body = """
      shape = Shape(x)
      [fill] state = ConstantOfShape<value = float[1] {0.5}>(shape)
      [cast] c = Cast<to = 1>(k)
      a = MatMul(x, w)
      b = Mul(a, c)
      d = Add(b, state)
      i = Cast<to = 6>(d)
      y = Cast<to = 1>(i)
    """
    model = build("(float[N,32] x, bool[N,32] k) => (float[N,32] y)", body, {"w": (32, 32)})
    before = model.clone()
    halve(model)
    found = types(model)
    assert (found["state"], found["b"]) == (HALF, HALF)
    Reference(model).run(feeds(before)[0])


def test_a_cast_from_fp16_is_not_undone_and_redone():
    body = "f = Cast<to = 1>(x)\n [keep] r = Sin(f)\n a = MatMul(f, w)\n y = Mul(a, r)"
    model = build("(float16[N,32] x) => (float[N,32] y)", body, {"w": (32, 32)})
    before = model.clone()
    assert halve(model, data=False, keep=("keep",)).modified
    chains = [n for n in model.graph if n.op_type == "Cast" and n.inputs[0].producer() is not None]
    assert all(n.inputs[0].producer().op_type != "Cast" for n in chains)
    assert_close(before, model)


@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN"])
def test_recurrent_layers_compute_in_fp16(kind: str):
    rows = {"LSTM": 64, "GRU": 48, "RNN": 16}[kind]
    body = f"y, h = {kind}<hidden_size = 16>(x, w, r, b)"
    weights = {"w": (1, rows, 32), "r": (1, rows, 16), "b": (1, 2 * rows)}
    small = {k: (RNG.standard_normal(s) / 4).astype(np.float32) for k, s in weights.items()}
    model = build("(float[S,N,32] x) => (float[S,1,N,16] y, float[1,N,16] h)", body, small)
    before = model.clone()
    assert halve(model).modified
    assert all(value.dtype == HALF for value in model.graph.initializers.values())
    assert_close(before, model)


# ---------------------------------------------------------------- graphs in graphs


def branches() -> ir.Model:
    body = """
      a = MatMul(x, w)
      y = If(c) <
        then_branch = yes () => (float[N,32] p) { t = MatMul(a, v)  p = Relu(t) },
        else_branch = no () => (float[N,32] q) { u = MatMul(x, w)  q = Add(u, a) }
      >
      z = MatMul(y, v)
    """
    weights = {"w": (32, 32), "v": (32, 32)}
    return build("(float[N,32] x, bool c) => (float[N,32] y, float[N,32] z)", body, weights)


def test_branches_compute_in_fp16_and_read_what_is_outside():
    model = branches()
    before = model.clone()
    assert halve(model).modified
    assert {value.dtype for value in model.graph.initializers.values()} == {HALF}
    assert types(model)["t"] == HALF
    assert_close(before, model)


def test_loops_hand_float32_on():
    body = """
      [start] s = MatMul(x, w)
      y = Loop(trips, go, s) <
        body = step (int64 i, bool g, float[N,32] before) => (bool again, float[N,32] after) {
          again = Identity(g)
          m = MatMul(before, w)
          after = Tanh(m)
        }
      >
    """
    weights = {"w": (32, 32), "trips": np.array(3, np.int64), "go": np.array(True)}
    model = build("(float[N,32] x) => (float[N,32] y)", body, weights)
    before = model.clone()
    assert halve(model).modified
    assert types(model)["m"] == HALF
    assert_close(before, model, 0.2)


def test_scans_work_on_float32_slices():
    body = """
      state, y = Scan(h, x) <
        num_scan_inputs = 1,
        body = step (float[32] old, float[32] now) => (float[32] new, float[32] out) {
          m = MatMul(now, w)
          sum = Add(m, old)
          new = Tanh(sum)
          out = Identity(new)
        }
      >
    """
    model = build("(float[32] h, float[S,32] x) => (float[32] state, float[S,32] y)", body, {"w": (32, 32)})
    before = model.clone()
    assert halve(model, scale=0.2).modified
    assert_close(before, model, 0.2)


def test_functions_are_left_alone():
    text = """<ir_version: 9, opset_import: ["" : 17, "mine" : 1]>
    g (float[2,32] x, float[32,32] w) => (float[2,32] y) { a = MatMul(x, w)  b = mine.twice(a)  y = MatMul(b, w) }
    <domain: "mine", opset_import: ["" : 17]> twice (p) => (q) { q = Add(p, p) }"""
    model = ir.from_onnx_text(text)
    weight = model.graph.inputs.pop()
    weight.const_value = ir.tensor(RNG.standard_normal((32, 32)).astype(np.float32), name="w")
    model.graph.register_initializer(weight)
    before = model.clone()
    result = halve(model)
    assert reasons(result)["twice/Add"] == "skipped: stays float32: inside a function; inline it first"
    assert [n.op_type for f in model.functions.values() for n in f] == ["Add"]
    assert_close(before, model)


def test_what_is_quantized_already_is_left_alone():
    body = """
      q = QuantizeLinear(x, s, z)
      d = DequantizeLinear(q, s, z)
      wd = DequantizeLinear<axis = 1>(wq, ws)
      [integer] a = MatMul(d, wd)
      aq = QuantizeLinear(a, s, z)
      ad = DequantizeLinear(aq, s, z)
      [float] y = MatMul(ad, v)
      [other] o = MatMul(x, u)
    """
    weights = {
        "s": np.array(0.05, np.float32), "z": np.array(128, np.uint8), "ws": np.full(32, 0.01, np.float32),
        "wq": RNG.integers(-127, 127, (32, 32)).astype(np.int8), "v": (32, 32), "u": (32, 32),
    }  # fmt: skip
    model = build("(float[N,32] x) => (float[N,32] y, float[N,32] o)", body, weights)
    before = model.clone()
    result = halve(model)
    assert reasons(result)["integer"] == "skipped: stays float32: beside quantized values"
    assert model.graph.initializers["s"].dtype == FLOAT
    assert types(model)["o_narrow"] == HALF
    assert_close(before, model)


# ---------------------------------------------------------------- options


def test_keep_takes_names_and_operator_types():
    model = cnn()
    result = halve(model, keep=("Gemm", "sec*"))
    assert {site for site, why in reasons(result).items() if "named by keep" in why} == {"second", "classify"}
    assert model.graph.initializers["w2"].dtype == FLOAT
    assert model.graph.initializers["w1"].dtype == HALF


def test_only_and_skip_mean_what_they_mean_for_integers():
    model = cnn()
    result = halve(model, data=False, only=("first", "rectify", "second"), skip=("second",))
    why = reasons(result)
    assert why["classify"] == "skipped: stays float32: not named by only"
    assert why["second"] == "skipped: stays float32: named by skip"
    assert types(model)["a"] == HALF


@pytest.mark.parametrize("option", ["keep", "only", "skip"])
def test_a_pattern_that_fits_nothing_is_an_error(option: str):
    with pytest.raises(OptionError, match=rf"quant.{option}: 'Softmax' matches no node of the model"):
        halve(cnn(), **{option: ("Softmax",)})


def test_keep_belongs_to_floats():
    with pytest.raises(OptionError, match=r"quant.keep"):
        run_pass(Quant(keep=("Gemm",)), Context(cnn(), ORT))


# ---------------------------------------------------------------- guards, storage


def test_a_runtime_that_refuses_an_operator_gets_it_in_float32(monkeypatch: pytest.MonkeyPatch):
    body = "a = MatMul(x, w)\n [one] b = EyeLike<dtype = 1>(a)\n c = Add(a, b)\n y = MatMul(c, w)"
    model = build("(float[32,32] x) => (float[32,32] y)", body, {"w": (32, 32)})
    before = model.clone()
    assert "states the type that it makes" in reasons(halve(model))["one"]
    assert_close(before, model)
    monkeypatch.setattr("graphopt_passes.quant.floats.ports._OWN_TYPE", frozenset())
    again = before.clone()
    assert any("ONNX Runtime does not run it in fp16: " in why for why in reasons(halve(again)).values())
    assert types(again)["a"] == HALF
    assert_close(before, again)


def test_layers_in_float32_store_their_weights_in_fp16():
    body = "[one] a = MatMul(x, w)\n [two] b = Mul(a, large)\n [three] y = MatMul(b, v)"
    weights = {"w": (64, 64), "v": (64, 64), "large": np.array(1e4, np.float32)}
    model = build("(float[N,64] x) => (float[N,64] y)", body, weights)
    before = model.clone()
    result = halve(model, scale=100)
    action = next(change.action for change in result.changes if change.site == "three")
    assert action.startswith("weights in fp16, arithmetic in float32: 'y' reaches")
    assert {v.dtype for k, v in model.graph.initializers.items() if k != "large"} == {HALF}
    assert_close(before, model, 100)


def test_weights_in_files_stay_there_until_they_are_written(tmp_path: Path):
    model = cnn(w2=(16, 16, 1, 1))
    save_model(model, tmp_path / "m.onnx", embed_limit=0)
    loaded = load_model(tmp_path / "m.onnx")
    before = loaded.clone()
    assert halve(loaded).modified
    assert isinstance(loaded.graph.initializers["w1"].const_value, ir.LazyTensor)
    save_model(loaded, tmp_path / "out.onnx", embed_limit=0)
    assert_close(before, load_model(tmp_path / "out.onnx"))


@pytest.mark.parametrize("case", ["mnist_cntk", "tiny_kws"])
def test_real_models_keep_their_outputs(zoo: Callable[..., Path], case: str):
    folder = zoo(case, samples=8, limit=8)
    model = load_model(folder / "model.onnx")
    calibration = open_calibration(folder / "calib.npz", input_specs(model), ShapeBinding())
    result = run_pass(Quant(dtype="fp16"), Context(model, ORT, calibration=calibration)).result
    assert float(result.metrics["output_sqnr_db"]) > 50
