from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from quantized_models import actions, decibels, kinds, optimized, quantize, samples, tensors
from small_models import build

from graphopt.model_io import input_specs
from graphopt.reference import Reference
from graphopt.testing import check_pass
from graphopt_passes.quant import Quant
from graphopt_passes.quant.dynamic import why_not_dynamic
from graphopt_passes.quant.sites import find_sites

Shape = tuple[int, ...]
DONE = "int8, input ranges found on every run"


def dynamic(
    signature: str, body: str, weights: dict[str, Shape], opset: int = 17, least: float = 35, **options: object
) -> ir.Model:
    """Quantize a model whose layer is called `it`, check that it became dynamic and that its results are near."""
    model, original = build(signature, body, weights, opset), build(signature, body, weights, opset)
    result = quantize(model, mode="dynamic", **options)
    assert actions(result)["it"] == DONE
    assert decibels(original, model) > least
    assert input_specs(model) == input_specs(original)
    assert [value.name for value in model.graph.outputs] == [value.name for value in original.graph.outputs]
    assert all(value.uses() for value in model.graph.initializers.values())
    return model


@pytest.mark.parametrize("mode", ["dynamic", "auto"])
def test_a_product_becomes_one_fused_kernel(mode: str) -> None:
    signature, body = "(float[N,32] x) => (float[N,64] y)", "[it] h = MatMul(x, w)  y = Add(h, b)"
    model = build(signature, body, {"w": (32, 64), "b": (64,)})
    quantize(model, mode=mode)
    assert optimized(model) == ["DynamicQuantizeMatMul"]


def test_layers_that_read_the_same_value_share_its_range_and_are_fused() -> None:
    body = "[it] a = MatMul(x, q)  b = MatMul(x, k)  c = Gemm(x, v, bias)  d = Add(a, b)  y = Add(c, d)"
    shapes = {"q": (32, 64), "k": (32, 64), "v": (32, 64), "bias": (64,)}
    model = dynamic("(float[N,32] x) => (float[N,64] y)", body, shapes)
    assert optimized(model).count("MatMulIntegerToFloat") == 3
    assert optimized(model).count("DynamicQuantizeLinear") == 1


@pytest.mark.parametrize(
    "attributes",
    ["alpha = 1.0", "transA = 1", "transB = 1", "transA = 1, transB = 1", "alpha = 0.5", "beta = -2.0", "beta = 0.0"],
)
@pytest.mark.parametrize("bias", ["constant", "computed", "none"])
def test_a_gemm_keeps_its_attributes_and_its_bias(attributes: str, bias: str) -> None:
    source = "float[32,N] x" if "transA" in attributes else "float[N,32] x"
    weights: dict[str, Shape] = {"w": (64, 32) if "transB" in attributes else (32, 64), "b": (64,)}
    third = {"constant": ", b", "computed": ", c", "none": ""}[bias]
    start = "c = Neg(b)" if bias == "computed" else ""
    if bias == "none":
        del weights["b"]
    dynamic(f"({source}) => (float[N,64] y)", f"{start} [it] y = Gemm<{attributes}>(x, w{third})", weights)


@pytest.mark.parametrize("rank", [2, 3, 4])
def test_a_weight_on_the_left_is_multiplied_between_transposes(rank: int) -> None:
    batch = "2," * (rank - 2)
    body = "h = Identity(x)  [it] y = MatMul(w, h)"  # the rank of h follows from inference alone
    model = dynamic(f"(float[{batch}128,N] x) => (float[{batch}96,N] y)", body, {"w": (96, 128)})
    assert tensors(model)["w_q"].shape == ir.Shape([128, 96])


def test_a_batch_of_weights_has_scales_of_its_own() -> None:
    signature, body = "(float[4,N,32] x) => (float[4,N,64] y)", "[it] y = MatMul(x, w)"
    model = build(signature, body, {"w": (4, 32, 64)})
    weight = tensors(model)["w"].numpy() * np.logspace(-3, 3, 4, dtype=np.float32).reshape(4, 1, 1)
    model.graph.initializers["w"].const_value = ir.tensor(weight, name="w")
    original = model.clone()
    assert actions(quantize(model, mode="dynamic"))["it"] == DONE
    np.testing.assert_allclose(tensors(model)["w_scale"].numpy(), np.abs(weight).max(1, keepdims=True) / 127, rtol=1e-6)
    feed = next(iter(samples(model).feeds(1)))
    expected, got = Reference(original).run(feed)["y"], Reference(model).run(feed)["y"]
    noise = np.square(got - expected).sum((1, 2)) / np.square(expected).sum((1, 2))
    assert (10 * np.log10(noise) < -30).all()  # of every entry, the smallest too


def test_a_weight_shared_by_layers_is_stored_once() -> None:
    body = "[it] h = MatMul(x, w)  r = Tanh(h)  s = MatMul(r, w)  y = Gemm<transB = 1>(s, w)"
    model = dynamic("(float[N,32] x) => (float[N,32] y)", body, {"w": (32, 32)}, least=30, per_channel=False)
    assert sorted(tensors(model)) == ["w_q", "w_q_1", "w_scale", "w_scale_1"]  # once as it is, once turned


def test_both_branches_compute_on_integers() -> None:
    body = """[choose] y = If(c) <
        then_branch = yes () => (float[4,64] a) { [it] a = MatMul(x, w) },
        else_branch = no () => (float[4,64] b) { [other] h = MatMul(x, w)  b = Neg(h) }
      >"""
    model = dynamic("(bool c, float[4,32] x) => (float[4,64] y)", body, {"w": (32, 64)})
    assert optimized(model).count("DynamicQuantizeMatMul") == 2
    assert "DynamicQuantizeLinear" not in [node.op_type for node in model.graph]
    assert sorted(model.graph.initializers) == ["w_q", "w_scale"]


def test_a_loop_finds_the_range_of_every_turn() -> None:
    body = """
      yes = Constant<value = bool {1}>()  three = Constant<value = int64 {3}>()
      [turn] y, all = Loop(three, yes, x) <
        body = b (int64 i, bool t, float[4,32] s) => (bool u, float[4,32] o, float[4,32] p) {
          u = Identity(t)  [it] h = MatMul(s, w)  o = Tanh(h)  p = MatMul(o, v)
        }
      >"""
    signature = "(float[4,32] x) => (float[4,32] y, float[3,4,32] all)"
    model = dynamic(signature, body, {"w": (32, 32), "v": (32, 32)}, least=20)  # every turn adds its noise
    assert kinds(model).count("MatMulInteger") == 2
    assert sorted(model.graph.initializers) == ["v_q", "v_scale", "w_q", "w_scale"]


def test_a_result_inside_a_branch_that_is_its_output_keeps_its_name() -> None:
    body = """y = If(c) <
        then_branch = yes () => (float[4,64] same) { [it] same = MatMul(x, w) },
        else_branch = no () => (float[4,64] same) { same = Identity(z) }
      >"""
    dynamic("(bool c, float[4,32] x, float[4,64] z) => (float[4,64] y)", body, {"w": (32, 64)})


@pytest.mark.parametrize("opset", [9, 11, 17, 21])
def test_products_become_dynamic_in_every_opset(opset: int) -> None:
    dynamic("(float[N,32] x) => (float[N,64] y)", "[it] y = MatMul(x, w)", {"w": (32, 64)}, opset)


def test_opset_11_is_enough_with_one_scale() -> None:
    signature, body = "(float[N,32] x) => (float[N,64] y)", "[it] y = MatMul(x, w)"
    model = dynamic(signature, body, {"w": (32, 64)}, 11, keep_opset=True, per_channel=False)
    assert model.opset_imports[""] == 11


@pytest.mark.parametrize(
    ("data", "attributes", "weights"),
    [
        ("N,8,9,9", "pads = [1,1,1,1], strides = [2,2]", {"w": (16, 8, 3, 3), "b": (16,)}),
        ("N,8,9,9", "group = 4, pads = [0,1,1,0]", {"w": (16, 2, 3, 3), "b": (16,)}),
        ("N,8,9,9", "dilations = [2,2]", {"w": (16, 8, 3, 3)}),
        ("N,8,9", 'auto_pad = "SAME_UPPER"', {"w": (16, 8, 3), "b": (16,)}),
        ("N,4,5,5,5", "pads = [1,1,1,1,1,1]", {"w": (16, 4, 3, 3, 3)}),
    ],
)
def test_convs_compute_on_integers_on_request(data: str, attributes: str, weights: dict[str, Shape]) -> None:
    body = f"[it] y = Conv<{attributes}>(x, w{', b' if 'b' in weights else ''})"
    rank = ",".join("ABCDE"[: data.count(",") + 1])
    model = dynamic(f"(float[{data}] x) => (float[{rank}] y)", body, weights, dynamic_convs=True)
    assert tensors(model)["w_q"].dtype == ir.DataType.UINT8
    assert tensors(model)["w_scale"].size == 16


def test_convs_stay_in_float_arithmetic_by_default_and_say_why() -> None:
    model = build("(float[N,8,9,9] x) => (float[N,16,7,7] y)", "[it] y = Conv(x, w)", {"w": (16, 8, 3, 3)})
    action = actions(quantize(model, mode="dynamic"))["it"]
    assert action == "weights in int8, arithmetic in float: ConvInteger is slower than Conv"


@pytest.mark.parametrize(
    ("output", "body", "weights", "reason"),
    [
        ("64,8", "[it] y = MatMul(x, w)", {"w": (64, 8)}, "its weight is 64 x 8: rounding the input on every run"),
        ("64,64", "[it] y = MatMul(w, x)", {"w": (64, 64)}, "its weight on the left is 64 x 64: transposing costs"),
        (
            "1,16,7,7",
            "[it] y = ConvTranspose(x4, w)",
            {"w": (4, 16, 3, 3)},
            "ConvTranspose has no dynamic integer form",
        ),
        ("2,1,1,16", "[it] y = LSTM<hidden_size = 16>(x3, w, r)", {"w": (1, 64, 8), "r": (1, 64, 16)}, "LSTM has no"),
    ],
)
def test_what_does_not_become_dynamic_has_a_reason(
    output: str, body: str, weights: dict[str, Shape], reason: str
) -> None:
    inputs = "float[64,64] x, float[1,4,5,5] x4, float[2,1,8] x3"
    model = build(f"({inputs}) => (float[{output}] y)", body, weights)
    assert reason in actions(quantize(model, mode="dynamic"))["it"]


def test_a_weight_on_the_left_of_something_without_a_rank_is_stored_only() -> None:
    signature, body = "(float[N,128] x, int64[R] s) => (float[96,N] y)", "h = Reshape(x, s)  [it] y = MatMul(w, h)"
    model = build(signature, body, {"w": (96, 128)})
    (site,), _ = find_sites(model)
    assert why_not_dynamic(site, list(model.graph)[1], per_channel=True).endswith("nothing tells the rank of its input")


def test_names_documentation_and_metadata_stay_with_the_layer() -> None:
    model = build("(float[N,32] x) => (float[N,64] y)", "[it] y = Gemm(x, w, b)", {"w": (32, 64), "b": (64,)})
    node = next(iter(model.graph))
    node.doc_string = "the layer"
    node.metadata_props["origin"] = "here"
    quantize(model, mode="dynamic")
    made = next(node for node in model.graph if node.op_type == "MatMulInteger")
    assert (made.name, made.doc_string, made.metadata_props["origin"]) == ("it", "the layer", "here")


@pytest.mark.parametrize("options", [{}, {"dynamic_convs": True}, {"per_channel": False}])
def test_dynamic_keeps_the_contract(options: dict[str, object]) -> None:
    body = "a = Conv(x, w)  f = Flatten(a)  y = Gemm(f, v, b)"
    model = build("(float[N,4,6,6] x) => (float[N,32] y)", body, {"w": (16, 4, 3, 3), "v": (256, 32), "b": (32,)})
    assert check_pass(Quant(mode="dynamic", **options), model).modified  # type: ignore[arg-type]
