"""Each kind of layer in blocks: exact where its weight lies on the grid, and fused where ONNX Runtime can."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from passes.quant.blockwise.block_models import assert_exact, on_grid, optimized, quantize
from rewritten_models import kinds, sqnr
from text_models import build


@pytest.mark.parametrize("inputs", [64, 40, 33, 172])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", [4, 2, 8])
def test_a_matmul_is_exact_and_fused_for_any_number_of_inputs(
    tmp_path: Path, inputs: int, symmetric: bool, bits: int
) -> None:
    weight = on_grid(inputs, 24, axis=0, bits=bits, symmetric=symmetric)
    model = build(f"g (float[B,{inputs}] x) => (float[B,24] y) {{ y = MatMul(x, w) }}", w=weight)
    before = model.clone()
    extra = {"mode": "weight", "group_size": 32} if bits == 8 else {}
    result = quantize(model, algorithm="rtn", bits=bits, symmetric=symmetric, **extra)
    assert result.modified and model.opset_imports[""] == (25 if bits == 2 else 21)
    assert_exact(before, model)
    assert optimized(model, tmp_path)["MatMulNBits"] == 1


@pytest.mark.parametrize("group", [16, 64, 128, 256, 0])
def test_groups_that_onnx_runtime_knows_are_fused(tmp_path: Path, group: int) -> None:
    weight = on_grid(100, 24, axis=0, group=group or 100)
    model = build("g (float[B,T,100] x) => (float[B,T,24] y) { y = MatMul(x, w) }", w=weight)
    before = model.clone()
    result = quantize(model, algorithm="rtn", group_size=group)
    assert not any("become float weights" in note for note in result.notes)
    assert_exact(before, model)
    assert optimized(model, tmp_path)["MatMulNBits"] == 1


def test_groups_of_other_sizes_run_and_say_what_they_cost(tmp_path: Path) -> None:
    weight = on_grid(100, 24, axis=0, group=48)
    model = build("g (float[B,100] x) => (float[B,24] y) { y = MatMul(x, w) }", w=weight)
    before = model.clone()
    assert "become float weights on every run" in quantize(model, algorithm="rtn", group_size=48).notes[0]
    assert_exact(before, model)
    assert optimized(model, tmp_path)["MatMul"] == 1


@pytest.mark.parametrize("turned", [0, 1])
def test_a_gemm_is_exact_and_fused_whichever_way_its_weight_lies(tmp_path: Path, turned: int) -> None:
    weight = on_grid(*((24, 70) if turned else (70, 24)), axis=turned)
    text = f"g (float[B,70] x) => (float[B,24] y) {{ y = Gemm<transB = {turned}, alpha = 0.5>(x, w, b) }}"
    model = build(text, w=weight, b=(24,))
    before = model.clone()
    quantize(model, algorithm="rtn")
    assert_exact(before, model)
    assert optimized(model, tmp_path)["MatMulNBits"] == 1


def test_a_gemm_with_a_transposed_input_is_exact() -> None:
    model = build(
        "g (float[70,B] x) => (float[B,24] y) { y = Gemm<transA = 1, transB = 1, beta = 2.0>(x, w, b) }",
        w=on_grid(24, 70, axis=1),
        b=(24,),
    )
    before = model.clone()
    quantize(model, algorithm="rtn")
    assert_exact(before, model)


def test_a_weight_on_the_left_is_exact() -> None:
    model = build("g (float[B,40,6] x) => (float[B,24,6] y) { y = MatMul(w, x) }", w=on_grid(24, 40, axis=1))
    before = model.clone()
    assert quantize(model, algorithm="rtn").modified
    assert_exact(before, model)


def test_a_stack_of_weights_is_exact() -> None:
    model = build("g (float[3,B,40] x) => (float[3,B,24] y) { y = MatMul(x, w) }", w=on_grid(3, 40, 24, axis=1))
    before = model.clone()
    assert quantize(model, algorithm="rtn").modified
    assert_exact(before, model)


@pytest.mark.parametrize(
    ("shape", "attributes"),
    [
        ((16, 12, 3, 3), "pads = [1,1,1,1]"),
        ((96, 12, 1, 1), ""),
        ((32, 6, 3, 3), "group = 2, strides = [2,2]"),
        ((96, 1, 5, 5), "group = 12"),
    ],
)
@pytest.mark.parametrize("group", [32, 0])
def test_a_convolution_is_exact(shape: tuple[int, ...], attributes: str, group: int) -> None:
    inputs = int(np.prod(shape[1:]))
    weight = on_grid(shape[0], inputs, axis=1, group=group or inputs).reshape(shape)
    listed = f"<{attributes}>" if attributes else ""
    text = f"g (float[B,12,9,9] x) => (float[B,{shape[0]},H,W] y) {{ a = Conv{listed}(x, w, b) y = Relu(a) }}"
    model = build(text, w=weight, b=(shape[0],))
    before = model.clone()
    assert quantize(model, algorithm="rtn", group_size=group).modified
    assert_exact(before, model)
    assert kinds(model)["DequantizeLinear"] == 1


def test_a_transposed_convolution_is_exact() -> None:
    weight = on_grid(40, 6, 3, 3, axis=0)
    model = build("g (float[B,40,5,5] x) => (float[B,6,H,W] y) { y = ConvTranspose<strides = [2,2]>(x, w) }", w=weight)
    before = model.clone()
    assert quantize(model, algorithm="rtn").modified
    assert_exact(before, model)


def test_a_recurrent_layer_is_exact() -> None:
    weights = {"w": on_grid(1, 80, 33, axis=2), "r": on_grid(1, 80, 20, axis=2, seed=1), "b": (1, 160)}
    text = "g (float[4,B,33] x) => (float[4,1,B,20] y, float[1,B,20] h) { y, h = LSTM<hidden_size = 20>(x, w, r, b) }"
    model = build(text, **weights)
    before = model.clone()
    assert quantize(model, algorithm="rtn").modified
    assert kinds(model)["DequantizeLinear"] == 2
    assert_exact(before, model)


@pytest.mark.parametrize("bits", [4, 2, 8])
@pytest.mark.parametrize("width", [64, 33, 20])
def test_rows_are_looked_up_as_bytes_and_are_exact(bits: int, width: int) -> None:
    table = on_grid(300, width, axis=1, bits=bits)
    model = build("g (int64[B,T] ids) => (float[B,T,D] y) { [look] y = Gather(table, ids) }", table=table)
    before = model.clone()
    extra = {"mode": "weight", "group_size": 32} if bits == 8 else {}
    quantize(model, algorithm="rtn", bits=bits, **extra)
    assert_exact(before, model)
    stored = sum(v.const_value.nbytes for v in model.graph.initializers.values() if v.const_value)
    assert stored < 300 * (width * bits / 8 + 4 * -(-width // 32) + 3) + 64


def test_looked_up_rows_may_be_an_output_and_feed_a_branch() -> None:
    text = """
    g (int64[T] ids, bool flag) => (float[T,64] e, float[T,64] y) {
      e = Gather(table, ids)
      y = If<then_branch = t () => (float[T,64] u) { v = Gather(table, ids) u = Relu(v) },
             else_branch = f () => (float[T,64] n) { n = Neg(e) }>(flag)
    }"""
    model = build(text, table=on_grid(200, 64, axis=1))
    before = model.clone()
    result = quantize(model, algorithm="rtn")
    assert sum(change.done for change in result.changes) == 2
    assert_exact(before, model)


def test_layers_in_branches_and_loops_are_exact_and_fused(tmp_path: Path) -> None:
    text = """
    g (float[B,64] x, bool flag) => (float[B,64] y) {
      a = If<then_branch = t () => (float[B,64] u) { [inner] u = MatMul(x, w1) },
             else_branch = f () => (float[B,64] n) { n = Neg(x) }>(flag)
      y = Loop<body = l (int64 i, bool c, float[B,64] s) => (bool d, float[B,64] r)
               { d = Identity(c) [turn] p = MatMul(s, w2) r = Tanh(p) }>(three, , a)
    }"""
    weights = {"w1": on_grid(64, 64, axis=0), "w2": on_grid(64, 64, axis=0, seed=2)}
    model = build(text, three=np.array(3, np.int64), **weights)
    before = model.clone()
    quantize(model, algorithm="rtn")
    assert_exact(before, model)
    assert optimized(model, tmp_path)["MatMulNBits"] == 2


def test_layers_that_share_a_weight_get_copies_while_these_are_small(tmp_path: Path) -> None:
    chain = " ".join(f"h{i + 1} = MatMul(a{i}, w) a{i + 1} = Tanh(h{i + 1})" for i in range(3))
    text = f"g (float[B,64] x) => (float[B,64] a3) {{ a0 = Relu(x) {chain} }}"
    model = build(text, w=on_grid(64, 64, axis=0))
    before = model.clone()
    quantize(model, algorithm="rtn")
    assert_exact(before, model)
    assert optimized(model, tmp_path)["MatMulNBits"] == 3


def test_a_weight_that_many_layers_share_is_stored_once() -> None:
    chain = " ".join(f"h{i + 1} = MatMul(a{i}, w) a{i + 1} = Tanh(h{i + 1})" for i in range(9))
    text = f"g (float[B,64] x) => (float[B,64] a9) {{ a0 = Relu(x) {chain} }}"
    model = build(text, w=on_grid(64, 64, axis=0))
    before = model.clone()
    result = quantize(model, algorithm="rtn")
    assert kinds(model)["DequantizeLinear"] == 1 and sum(change.done for change in result.changes) == 9
    assert_exact(before, model)


@pytest.mark.parametrize("head", ["y = MatMul(n, t)", "y = Gemm<transB = 1>(n, table)"])
def test_an_embedding_tied_to_the_head_is_looked_up_and_fused(tmp_path: Path, head: str) -> None:
    turn = "t = Transpose<perm = [1,0]>(table)" if "t)" in head else ""
    text = f"g (int64[T] ids) => (float[T,200] y) {{ e = Gather(table, ids) n = Relu(e) {turn} {head} }}"
    model = build(text, table=on_grid(200, 64, axis=1))
    before = model.clone()
    result = quantize(model, algorithm="rtn")
    assert sum(change.done for change in result.changes) == 2 and kinds(model)["Transpose"] == 0
    assert_exact(before, model)
    assert optimized(model, tmp_path)["MatMulNBits"] == 1


def test_a_transposed_weight_that_stays_float_keeps_its_transpose() -> None:
    text = """
    g (float[B,64] x) => (float[B,200] y, float[B,64] z) {
      t = Transpose<perm = [1,0]>(w) [head] y = MatMul(x, t) [other] z = MatMul(x, v)
    }"""
    model = build(text, w=(200, 64), v=(64, 64))
    before = model.clone()
    quantize(model, skip=("head",))
    assert kinds(model)["Transpose"] == 1 and "w" in model.graph.initializers
    assert sqnr(before, model) > 15


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("between", ["e", "Identity(e)"])
def test_rows_that_a_product_reads_are_not_taken_for_its_activations(
    tmp_path: Path, between: str, bits: int, symmetric: bool
) -> None:
    text = f"g (int64[B,T] ids) => (float[B,T,24] y) {{ e = Gather(table, ids)  m = {between}  y = MatMul(m, w) }}"
    text = text if between != "e" else text.replace("  m = e ", "").replace("MatMul(m", "MatMul(e")
    table = on_grid(300, 64, axis=1, bits=bits, symmetric=symmetric)
    model = build(text, table=table, w=on_grid(64, 24, axis=0, bits=bits, symmetric=symmetric))
    before = model.clone()
    extra = {"mode": "weight", "group_size": 32} if bits == 8 else {}
    quantize(model, algorithm="rtn", bits=bits, symmetric=symmetric, **extra)
    assert_exact(before, model)
    assert optimized(model, tmp_path)["MatMulNBits"] == 1
    assert sqnr(before, model) > 30
