"""Each kind of layer with codebooks: exact where its weight has few numbers, and what the pass leaves alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from passes.share.share_models import ORT, levels, share, stored
from rewritten_models import actions, assert_exact, data, kinds, outputs, sqnr
from text_models import build

from graphopt.errors import GraphoptError, OptionError
from graphopt.model_io import load_model, model_bytes, save_model
from graphopt.pass_base import Context
from graphopt.runner import run_pass
from graphopt.testing import check_pass
from graphopt_passes.fold import Fold
from graphopt_passes.share import Share

MATMUL = "g (float[B,64] x) => (float[B,48] y) { [layer] y = MatMul(x, w) }"
LAYERS = {
    "matmul": (MATMUL, (64, 48), 1),
    "left": ("g (float[B,40,6] x) => (float[B,48,6] y) { y = MatMul(w, x) }", (48, 40), 0),
    "stack": ("g (float[3,B,40] x) => (float[3,B,48] y) { y = MatMul(x, w) }", (3, 40, 48), 2),
    "gemm": ("g (float[B,40] x) => (float[B,48] y) { y = Gemm(x, w) }", (40, 48), 1),
    "turned": ("g (float[B,40] x) => (float[B,48] y) { y = Gemm<transB = 1>(x, w) }", (48, 40), 0),
    "conv": ("g (float[B,12,7,7] x) => (float[B,48,H,W] y) { y = Conv(x, w) }", (48, 12, 3, 3), 0),
    "grouped": ("g (float[B,12,7,7] x) => (float[B,48,H,W] y) { y = Conv<group = 3>(x, w) }", (48, 4, 3, 3), 0),
    "depthwise": ("g (float[B,96,7,7] x) => (float[B,96,H,W] y) { y = Conv<group = 96>(x, w) }", (96, 1, 5, 5), 0),
    "transposed": ("g (float[B,40,5,5] x) => (float[B,6,H,W] y) { y = ConvTranspose(x, w) }", (40, 6, 3, 3), 1),
    "table": ("g (int64[B,T] ids) => (float[B,T,32] y) { y = Gather(w, ids) }", (300, 32), 1),
}


@pytest.mark.parametrize("calibrated", [False, True])
@pytest.mark.parametrize("layer", LAYERS)
def test_a_weight_of_few_numbers_is_stored_exactly(layer: str, calibrated: bool) -> None:
    text, shape, _ = LAYERS[layer]
    model = build(text, w=levels(*shape))
    before = model.clone()
    result = share(model, calibrated=calibrated)
    assert result.modified and kinds(model)["Gather"] >= 1
    assert stored(model) < stored(before) / 6
    assert_exact(before, model)


@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize("layer", LAYERS)
def test_groups_of_channels_have_codebooks_of_their_own(layer: str, channels: int) -> None:
    text, shape, axis = LAYERS[layer]
    groups = shape[axis] // channels
    model = build(text, w=levels(*shape, entries=4, axis=axis, groups=groups))
    before = model.clone()
    result = share(model, entries=4, channels=channels)
    assert result.modified and result.changes[0].details["codebooks"] == groups
    assert kinds(model)["GatherElements"] == 1
    assert_exact(before, model)


@pytest.mark.parametrize("width", [2, 4])
@pytest.mark.parametrize("layer", LAYERS)
def test_neighbours_can_share_a_code(layer: str, width: int) -> None:
    text, shape, _ = LAYERS[layer]
    codes = np.random.default_rng(1).integers(0, 16, int(np.prod(shape)) // width)
    table = np.random.default_rng(2).standard_normal((16, width)).astype(np.float32)
    model = build(text, w=table[codes].reshape(shape))
    before = model.clone()
    assert share(model, width=width).modified
    assert_exact(before, model)
    assert stored(model) < stored(before) / (6 * width) + 300


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 6, 8])
def test_codes_take_the_narrowest_type_that_holds_them(bits: int) -> None:
    model = build("g (float[B,96] x) => (float[B,96] y) { y = MatMul(x, w) }", w=levels(96, 96, entries=2**bits))
    before = model.clone()
    result = share(model, bits=bits)
    assert_exact(before, model)
    width = 2 if bits <= 2 else 4 if bits <= 4 else 8
    assert result.changes[0].details["code_bits"] == width
    assert model.opset_imports[""] == {2: 25, 4: 21, 8: 17}[width]
    assert stored(model) <= 96 * 96 * width / 8 + 4 * 2**bits


@pytest.mark.parametrize("opset", [7, 9, 11, 13, 17, 21, 23])
@pytest.mark.parametrize("keep", [False, True])
def test_old_and_new_opsets_do(opset: int, keep: bool) -> None:
    text = "g (float[B,64] x) => (float[B,48] y) { a = MatMul(x, w)  y = Relu(a) }"
    model = build(text, opset=opset, w=levels(64, 48))
    before = model.clone()
    result = share(model, keep=keep)
    assert_exact(before, model)
    assert model.opset_imports[""] == (opset if keep else max(opset, 21))
    assert result.changes[0].details["code_bits"] == (8 if keep and opset < 21 else 4)


def test_an_opset_without_groups_is_kept_and_says_so() -> None:
    model = build(MATMUL, opset=9, w=levels(64, 48))
    assert "opset 9 is kept, 11 would be needed" in actions(share(model, keep=True, channels=1, bits=2))["layer"]


def test_a_recurrent_layer_is_exact() -> None:
    text = "g (float[4,B,33] x) => (float[4,1,B,20] y, float[1,B,20] h) { y, h = LSTM<hidden_size = 20>(x, w, r, b) }"
    model = build(text, w=levels(1, 80, 33), r=levels(1, 80, 20, seed=1), b=(1, 160))
    before = model.clone()
    assert share(model, calibrated=True).modified
    assert kinds(model)["Gather"] == 2
    assert_exact(before, model)


def test_layers_that_share_a_weight_go_on_sharing_it() -> None:
    text = """g (float[B,64] x) => (float[B,64] y, float[64,64] z) {
      [one] a = MatMul(x, w) [two] b = MatMul(a, w) t = Transpose<perm = [1,0]>(w) y = MatMul(b, t) z = Tanh(w) }"""
    model = build(text, w=levels(64, 64))
    before = model.clone()
    result = share(model, calibrated=True)
    assert kinds(model)["Gather"] == 1 and "w" not in model.graph.initializers
    assert "shared with 'one'" in actions(result)["two"]
    assert_exact(before, model)


def test_layers_in_branches_and_loops_are_exact() -> None:
    text = """
    g (float[B,64] x, bool flag) => (float[B,64] y) {
      a = If<then_branch = t () => (float[B,64] u) { [inner] u = MatMul(x, w1) },
             else_branch = f () => (float[B,64] n) { n = Neg(x) }>(flag)
      y = Loop<body = l (int64 i, bool c, float[B,64] s) => (bool d, float[B,64] r)
               { d = Identity(c) [turn] p = MatMul(s, w2) r = Tanh(p) }>(three, , a)
    }"""
    model = build(text, three=np.array(3, np.int64), w1=levels(64, 64), w2=levels(64, 64, seed=2))
    before = model.clone()
    result = share(model, calibrated=True)
    assert {change.site for change in result.changes if change.done} == {"inner", "turn"}
    assert_exact(before, model)


def test_a_constant_node_serves_as_well_as_an_initializer() -> None:
    model = build("g (float[B,64] x) => (float[B,48] y) { y = MatMul(x, w) }", w=levels(64, 48))
    value = model.graph.initializers.pop("w")
    node = ir.node("Constant", [], {"value": value.const_value}, outputs=[ir.Value(name="held")])
    model.graph.insert_before(model.graph[0], node)
    model.graph[1].replace_input_with(1, node.outputs[0])
    before = model.clone()
    assert share(model).modified and kinds(model)["Constant"] == 0
    assert_exact(before, model)


@pytest.mark.parametrize("channels", [0, 1])
def test_weights_of_16_bits_stay_such(channels: int) -> None:
    text = "g (float[B,64] x) => (float[B,48] y) { a = Cast<to = 10>(x) b = MatMul(a, w) y = Cast<to = 1>(b) }"
    model = build(text, w=levels(64, 48))
    held = model.graph.initializers["w"]
    held.const_value = ir.tensor(levels(64, 48).astype(np.float16), name="w")
    held.type = ir.TensorType(ir.DataType.FLOAT16)
    before = model.clone()
    assert share(model, channels=channels, int8=True, entries=8 if channels else 16).modified
    assert any(v.dtype == ir.DataType.FLOAT16 for v in model.graph.initializers.values())
    assert sqnr(before, model) > (15 if channels else 60)


@pytest.mark.parametrize("layer", ["matmul", "turned", "conv"])
@pytest.mark.parametrize("channels", [0, 1, 4])
def test_codebooks_in_int8_lose_little_more(layer: str, channels: int) -> None:
    text, shape, _ = LAYERS[layer]
    model = build(text, w=shape)
    before, plain = model.clone(), model.clone()
    share(plain, entries=16 if channels != 1 else 8, channels=channels)
    share(model, entries=16 if channels != 1 else 8, channels=channels, int8=True)
    assert kinds(model)["DequantizeLinear"] == 1 and stored(model) < stored(plain)
    assert sqnr(before, model) > sqnr(before, plain) - 1


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"channels": 4},
        {"int8": True},
        {"algorithm": "nearest"},
        {"algorithm": "relative"},
        {"algorithm": "weighted"},
    ],
)
def test_weights_that_are_zero_stay_zero(options: dict[str, Any]) -> None:
    weight = np.random.default_rng(0).standard_normal((96, 48)).astype(np.float32) + 0.2
    weight[np.random.default_rng(1).random(weight.shape) < 0.6] = 0
    text = "g (float[B,96] x) => (float[B,48] y, float[96,48] v) { y = MatMul(x, w) v = Neg(w) }"
    model = build(text, w=weight)
    share(model, calibrated=True, bits=3, **options)
    assert not outputs(model, 1)[0]["v"][weight == 0].any()


@pytest.mark.parametrize("layer", ["matmul", "left", "gemm", "turned", "conv", "grouped", "depthwise", "transposed"])
@pytest.mark.parametrize("channels", [0, 2])
def test_data_makes_the_outputs_better(layer: str, channels: int) -> None:
    text, shape, _ = LAYERS[layer]
    by_data, plain = build(text, w=shape), build(text, w=shape)
    before = plain.clone()
    share(plain, bits=3, channels=channels)
    result = share(by_data, bits=3, channels=channels, calibrated=True)
    assert "layer_sqnr_db" in result.changes[0].details
    together = layer in ("matmul", "gemm", "turned")  # their inputs depend on each other in the samples
    alone = layer in ("left", "depthwise", "transposed")
    assert sqnr(before, by_data) > sqnr(before, plain) + (1.0 if together else -0.1 if alone else 0.2)


def test_biases_take_up_what_codebooks_add_to_the_mean() -> None:
    text = "g (float[B,64] x) => (float[B,48] y) { a = Abs(x) m = MatMul(a, w) y = Add(m, b) }"
    off: dict[bool, float] = {}
    for correct in (False, True):
        model = build(text, w=(64, 48), b=(48,))
        before = model.clone()
        result = share(model, bits=2, calibrated=True, bias_correction=correct)
        assert ("bias corrected" in result.changes[0].action) == correct
        pairs = zip(data(model).feeds(), outputs(before, 8), outputs(model, 8), strict=True)
        off[correct] = float(
            np.square(np.mean([got["y"] - wanted["y"] for _, wanted, got in pairs], axis=(0, 1))).sum()
        )
    assert off[True] < 1e-4 * off[False]


@pytest.mark.parametrize(
    ("text", "weight", "options", "reason"),
    [
        (MATMUL, (8, 5), {"bits": 2}, "so few that a codebook would cost more"),
        (MATMUL, (64, 48), {"bits": 6, "channels": 1}, "64 codes would share a codebook of 64 entries"),
        (MATMUL, (63, 47), {"width": 2}, "2961 weights are no whole number of vectors of 2"),
        (MATMUL, np.full((64, 48), np.inf, np.float32), {}, "its weight holds infinities"),
        (MATMUL, np.ones((64, 48)), {}, "only floats of 32 or 16 bits get codebooks"),
        ("g (float[B,64] x) => (float[B,48] y, float[64,48] w) { [layer] y = MatMul(x, w) }", (64, 48), {}, "output"),
        ("g (float[B,64] x, float[64,48] w) => (float[B,48] y) { [layer] y = MatMul(x, w) }", None, {}, "computed"),
        (
            "g (float[B,64] x) => (float[B,48] y) { v = Neg(w) [layer] y = MatMul(x, v) }",
            (64, 48),
            {},
            "fold constants",
        ),
    ],
)
def test_what_is_left_alone_says_why(text: str, weight: Any, options: dict[str, Any], reason: str) -> None:
    sized = text.replace("64", str(weight[0])).replace("48", str(weight[1])) if isinstance(weight, tuple) else text
    model = build(sized) if weight is None else build(sized, w=weight)
    if isinstance(weight, np.ndarray):
        held = model.graph.initializers["w"]
        held.type = ir.TensorType(ir.DataType.from_numpy(weight.dtype))
    size = len(model_bytes(model))
    result = Share(**options).run(model, Context(model, ORT))
    assert not result.modified and len(model_bytes(model)) == size
    assert reason in actions(result)["layer"]


def test_patterns_choose_layers() -> None:
    text = "g (float[B,64] x) => (float[B,64] z) { [one] y = MatMul(x, v)  [two] z = MatMul(y, w) }"
    model = build(text, v=(64, 64), w=(64, 64))
    other = model.clone()
    assert actions(share(model, only=("one",)))["two"] == "skipped: not named by only"
    step = Share().without(["one"])
    assert step.skip == ("one",) and Share().revertible(other, ["one", "three"]) == ("one",)
    assert actions(share(other, skip=step.skip))["one"] == "skipped: named by skip"


def test_the_layer_that_makes_most_noise_steps_back_first() -> None:
    text = """g (float[4,B,33] x) => (float[4,1,B,20] z, float[1,B,20] h) {
      [fine] y = MatMul(x, v)  [coarse] u = MatMul(y, w)  [last] z, h = LSTM<hidden_size = 20>(u, k, r, b) }"""
    coarse = np.random.default_rng(0).standard_t(2, (48, 33)).astype(np.float32)
    model = build(text, v=levels(33, 48), w=coarse, k=levels(1, 80, 33), r=levels(1, 80, 20, seed=1), b=(1, 160))
    ctx = Context(model, ORT)
    order = Share().worst_first(model, ctx, ("fine", "coarse", "last"), (), list(data(model, 4).feeds()))
    assert order[0] == "coarse" and set(order) == {"fine", "coarse", "last"}


def test_a_weight_stays_where_one_of_its_layers_is_left_alone() -> None:
    text = "g (float[B,64] x) => (float[B,64] z) { [one] y = MatMul(x, w)  [two] z = MatMul(y, w) }"
    result = share(build(text, w=(64, 64)), skip=("two",))
    assert not result.modified and "shared with 'two', which is left alone" in actions(result)["one"]


@pytest.mark.parametrize(
    ("options", "subject", "fact"),
    [
        ({"only": ("nothing",)}, "share.only", "'nothing' matches no layer with a weight"),
        ({"algorithm": "weighted"}, "share.algorithm", "'weighted' needs calibration data"),
        ({"width": 2, "channels": 1}, "share.channels", "codebooks of numbers"),
        ({"width": 2, "algorithm": "compensated"}, "share.algorithm", "single numbers"),
        ({"bits": 3, "entries": 9}, "share.entries", "9 do not fit codes of 3 bits"),
    ],
)
def test_a_wrong_option_is_one_clear_line(options: dict[str, Any], subject: str, fact: str) -> None:
    with pytest.raises(OptionError) as caught:
        share(build(MATMUL, w=(64, 48)), **options)
    assert caught.value.subject == subject and fact in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("step", [Share(), Share(channels=4, bits=3), Share(width=2, int8=True), Share(bits=2)])
def test_the_contract_of_passes_is_kept(step: Share) -> None:
    text = """g (float[B,12,7,7] x) => (float[B,10] y) {
      a = Conv(x, c, b) r = Relu(a) p = GlobalAveragePool(r) f = Flatten(p) y = Gemm<transB = 1>(f, w, d) }"""
    model = build(text, c=(32, 12, 3, 3), b=(32,), w=(10, 32), d=(10,))
    assert check_pass(step, model, calibration=data(model)).modified


def test_weights_beside_the_model_are_read_one_at_a_time(tmp_path: Path) -> None:
    text = "g (float[B,64] x) => (float[B,64] z) { [one] y = MatMul(x, v)  [two] z = MatMul(y, w) }"
    proto = ir.to_proto(build(text, v=levels(64, 64), w=levels(64, 64, seed=1)))
    onnx.save(proto, tmp_path / "m.onnx", save_as_external_data=True, location="m.data", size_threshold=0)
    model = load_model(tmp_path / "m.onnx")
    before = load_model(tmp_path / "m.onnx")
    assert share(model).modified
    save_model(model, tmp_path / "after.onnx")
    assert_exact(before, load_model(tmp_path / "after.onnx"))


def test_the_report_tells_file_and_memory_apart() -> None:
    model = build(MATMUL, w=(64, 48))
    result = share(model)
    assert result.metrics["resident_bytes_onnxruntime"] == 4 * 64 * 48
    assert 64 * 48 / 2 < float(result.metrics["stored_bytes"]) < 64 * 48 / 2 + 400
    assert "kB in the file stand for 12.3 kB of weights" in result.notes[0]
    assert "memory and speed are those of float weights" in result.notes[0]


def test_onnx_runtime_computes_the_lookup_when_it_loads_the_model(tmp_path: Path) -> None:
    import onnxruntime

    model = build(MATMUL, w=(64, 48))
    share(model)
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath, options.log_severity_level = str(tmp_path / "o.onnx"), 4
    onnxruntime.InferenceSession(model_bytes(model), options, providers=["CPUExecutionProvider"])
    assert [node.op_type for node in onnx.load(tmp_path / "o.onnx").graph.node] == ["MatMul"]


@pytest.mark.parametrize("options", [{}, {"bits": 8}, {"bits": 2}, {"width": 4}, {"channels": 4, "int8": True}])
def test_folding_constants_leaves_codes_alone(options: dict[str, Any]) -> None:
    model = build(MATMUL, w=(64, 48))
    share(model, **options)
    size = stored(model)
    run_pass(Fold(), Context(model, ORT))
    assert stored(model) == size


def test_a_model_without_weights_is_left_as_it_is() -> None:
    model = build("g (float[B,64] x) => (float[B,64] y) { y = Relu(x) }")
    assert not share(model).modified
    with pytest.raises(GraphoptError):
        share(model, only=("Relu",))
