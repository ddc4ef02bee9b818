from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from passes.sparse_attention.attention_models import attention, banded_twin, distance, feeds, rewrite

from graphopt.errors import OptionError
from graphopt.model_io import ShapeBinding, model_bytes
from graphopt.reference import Reference
from graphopt_passes.sparse_attention._patterns import band_of


def parsed(text: str) -> ir.Model:
    return ir.from_proto(onnx.parser.parse_model(text))


def reason(model: ir.Model, **options: Any) -> str:
    before = model_bytes(model)
    result = rewrite(model, **options)
    assert not result.modified
    assert model_bytes(model) == before
    (change,) = result.changes
    return change.action


def test_a_short_sequence_is_left_alone() -> None:
    model = attention("no mask")
    for value in (*model.graph.inputs, *model.graph.outputs):
        value.shape = ir.Shape([2, 100, *list(value.shape or ())[2:]])
    assert "a sequence of 100 is too short for a width of 64" in reason(model, width=64)
    assert rewrite(model, width=40).modified


def test_a_length_that_the_user_fixes_counts() -> None:
    model, binding = attention("no mask"), ShapeBinding(dims={"N": 90, "B": 1})
    assert "a sequence of 90 is too short" in reason(model, width=64, binding=binding)


def test_cross_attention_is_left_alone() -> None:
    model = parsed(
        """<ir_version: 8, opset_import: ["" : 17]>
        main (float[B,4,N,8] q, float[B,4,8,M] k, float[B,4,M,8] v) => (float[B,4,N,8] y)
        { s = MatMul(q, k) p = Softmax<axis=-1>(s) y = MatMul(p, v) }"""
    )
    assert "nothing shows that there are as many keys as queries" in reason(model)


def test_windows_of_an_image_are_left_alone() -> None:
    """Swin cuts its image into windows ahead of the heads: whatever its length, a query sees its window."""
    model = parsed(
        """<ir_version: 8, opset_import: ["" : 17]>
        main (float[B,64,32] x) => (float[B,64,32] y)
        <int64[6] cut = {-1, 2, 4, 2, 4, 32}, int64[3] rows = {-1, 16, 32}, int64[4] split = {0, 0, 4, 8},
         int64[3] join = {0, 0, 32}, int64[6] back = {-1, 2, 2, 4, 4, 32}, int64[3] whole = {-1, 64, 32}>
        { grid = Reshape(x, cut) windows = Transpose<perm=[0,1,3,2,4,5]>(grid) w = Reshape(windows, rows)
          p4 = Reshape(w, split) q = Transpose<perm=[0,2,1,3]>(p4) k = Transpose<perm=[0,2,3,1]>(p4)
          s = MatMul(q, k) p = Softmax<axis=-1>(s) o = MatMul(p, q) o4 = Transpose<perm=[0,2,1,3]>(o)
          joined = Reshape(o4, join) parts = Reshape(joined, back) turned = Transpose<perm=[0,1,3,2,4,5]>(parts)
          y = Reshape(turned, whole) }"""
    )
    assert reason(model, width=4) == "skipped: its windows of 16 are local already"


def test_scores_that_the_model_returns_are_left_alone() -> None:
    model = parsed(
        """<ir_version: 8, opset_import: ["" : 17]>
        main (float[B,4,N,8] q, float[B,4,8,N] k, float[B,4,N,8] v) => (float[B,4,N,8] y, float[B,4,N,N] p)
        { s = MatMul(q, k) p = Softmax<axis=-1>(s) y = MatMul(p, v) }"""
    )
    assert reason(model).startswith("skipped: ")


def test_a_model_without_attention_is_left_alone() -> None:
    model = parsed('<ir_version: 8, opset_import: ["" : 9]> main (float[N] x) => (float[N] y) { y = Relu(x) }')
    before = model_bytes(model)
    result = rewrite(model)
    assert (result.modified, result.changes) == (False, ())
    assert model_bytes(model) == before


def test_names_choose_and_must_fit() -> None:
    name = rewrite(attention("no mask"), width=8).changes[0].site
    assert "sparse-attention.skip names it" in reason(attention("no mask"), width=8, skip=(name,))
    assert rewrite(attention("no mask"), width=8, only=(name,)).modified
    with pytest.raises(OptionError, match="'nothing' fits no attention"):
        rewrite(attention("no mask"), width=8, only=("nothing",))


def test_a_mask_that_leaves_hidden_keys_some_weight_is_left_alone() -> None:
    model = parsed(
        """<ir_version: 8, opset_import: ["" : 17]>
        main (float[B,4,N,8] q, float[B,4,8,N] k, float[B,4,N,8] v, bool[B,1,1,N] m) => (float[B,4,N,8] y)
        <float low = {-5.0}>
        { s = MatMul(q, k) u = Where(m, s, low) p = Softmax<axis=-1>(u) y = MatMul(p, v) }"""
    )
    assert "-5 in the place of scores" in reason(model)


def operator(window: int = -1) -> ir.Model:
    return parsed(
        f"""<ir_version: 8, opset_import: ["" : 17, "com.microsoft" : 1]>
        main (float[B,N,32] q, float[B,N,16] k, float[B,N,16] v, int32[B] last, int32 total) => (float[B,N,32] y)
        {{ y = com.microsoft.GroupQueryAttention<num_heads=4, kv_num_heads=2, local_window_size={window}>
               (q, k, v, , , last, total) }}"""
    )


def test_an_operator_with_windows_of_its_own_gets_one() -> None:
    model = operator()
    assert rewrite(model, width=7).modified
    rng = np.random.default_rng(0)
    for _ in range(4):
        feed = {n: rng.standard_normal((2, 50, w)).astype(np.float32) for n, w in (("q", 32), ("k", 16), ("v", 16))}
        feed |= {"last": np.full(2, 49, np.int32), "total": np.array(50, np.int32)}
        q = feed["q"].reshape(2, 50, 4, 8).swapaxes(1, 2)
        k, v = (np.repeat(feed[n].reshape(2, 50, 2, 8).swapaxes(1, 2), 2, axis=1) for n in "kv")
        scores = q @ k.swapaxes(2, 3) / np.sqrt(8)
        away = np.arange(50)[:, None] - np.arange(50)
        weights = np.where((away >= 0) & (away < 7), np.exp(scores), 0)
        expected = (weights / weights.sum(axis=-1, keepdims=True)) @ v
        found = Reference(model).run(feed)["y"]
        np.testing.assert_allclose(found, expected.swapaxes(1, 2).reshape(2, 50, 32), atol=1e-5)


def test_an_operator_that_has_a_window_keeps_it() -> None:
    assert "local already" in reason(operator(9), width=7)


def attend(mask: str = "") -> ir.Model:
    return parsed(
        f"""<ir_version: 11, opset_import: ["" : 23]>
        main (float[B,N,32] x, int64[B,N] mask) => (float[B,N,32] y)
        {{ y = Attention<q_num_heads=4, kv_num_heads=4, is_causal={0 if mask else 1}>(x, x, x{mask}) }}"""
    )


def test_the_standard_operator_becomes_a_band() -> None:
    model = attend()
    assert rewrite(model, width=6).modified
    assert "Attention" not in [node.op_type for node in model.graph]
    session = Reference(model)
    for feed in feeds(model, 2, 40, 4):
        x = feed["x"].reshape(2, 40, 4, 8).swapaxes(1, 2).astype(np.float64)
        away = np.arange(40)[:, None] - np.arange(40)
        weights = np.where((away >= 0) & (away < 6), np.exp(x @ x.swapaxes(2, 3) / np.sqrt(8)), 0)
        expected = (weights / weights.sum(axis=-1, keepdims=True)) @ x
        np.testing.assert_allclose(session.run(feed)["y"], expected.swapaxes(1, 2).reshape(2, 40, 32), atol=1e-5)


def test_attention_inside_a_branch_is_rewritten_there() -> None:
    inner = """q4 = Reshape(x, split) q = Transpose<perm=[0,2,1,3]>(q4) k = Transpose<perm=[0,2,3,1]>(q4)
        s = MatMul(q, k) p = Softmax<axis=-1>(s) o = MatMul(p, q) o4 = Transpose<perm=[0,2,1,3]>(o)"""
    text = f"""<ir_version: 8, opset_import: ["" : 17]>
        main (float[B,N,32] x, int64[B,N] mask, bool c) => (float[B,N,32] y)
        <int64[4] split = {{0, 0, 4, 8}}, int64[3] join = {{0, 0, 32}}>
        {{ y = If(c) <then_branch = then () => (float[B,N,32] a) {{ {inner} a = Reshape(o4, join) }},
                      else_branch = otherwise () => (float[B,N,32] b) {{ b = Identity(x) }}> }}"""
    dense, sparse = parsed(text), parsed(text)
    result = rewrite(sparse, width=64)
    assert result.modified
    for feed in feeds(dense, 2, 30, 4):
        for choice in (True, False):
            given = feed | {"c": np.array(choice)}
            a, b = (Reference(each).run(given)["y"] for each in (dense, sparse))
            np.testing.assert_allclose(a, b, atol=1e-5)


def test_two_layers_share_what_depends_on_the_length_only() -> None:
    layer = """q{i} = Reshape({x}, split) t{i} = Transpose<perm=[0,2,1,3]>(q{i}) k{i} = Transpose<perm=[0,2,3,1]>(q{i})
        s{i} = MatMul(t{i}, k{i}) u{i} = Add(s{i}, low) p{i} = Softmax<axis=-1>(u{i}) o{i} = MatMul(p{i}, t{i})
        b{i} = Transpose<perm=[0,2,1,3]>(o{i}) y{i} = Reshape(b{i}, join)"""

    def model(layers: int) -> ir.Model:
        body = "\n".join(layer.format(i=i, x="x" if i == 0 else f"y{i - 1}") for i in range(layers))
        return parsed(
            f"""<ir_version: 8, opset_import: ["" : 17]>
            main (float[B,N,32] x, int64[B,N] mask) => (float[B,N,32] y)
            <int64[4] split = {{0, 0, 4, 8}}, int64[3] join = {{0, 0, 32}}, int64[2] middle = {{1, 2}},
             float minus = {{-10000.0}}, float one = {{1.0}}>
            {{ real = Cast<to=1>(mask) gone = Sub(one, real) far = Unsqueeze(gone, middle) low = Mul(far, minus)
               {body} y = Identity(y{layers - 1}) }}"""
        )

    counts: list[int] = []
    for layers in (1, 2, 3):
        sparse = model(layers)
        rewrite(sparse, width=6)
        counts.append(len(sparse.graph))
        twin = banded_twin(model(layers), band_of("window", 6, causal=False), 33)
        assert distance(twin, sparse, feeds(sparse, 2, 33, 4)) < 1e-4
    assert counts[2] - counts[1] == counts[1] - counts[0] < counts[0] / 2
