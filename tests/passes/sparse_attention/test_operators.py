"""Operators of ONNX Runtime against themselves, and against dense attention with a mask of the band."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from passes.sparse_attention.attention_models import banded_twin, rewrite
from passes.sparse_attention.operator_models import (
    HIDDEN,
    NAMES,
    OPERATORS,
    QKV,
    counting,
    difference,
    feed_of,
    is_causal,
    model,
    operator,
    spelled,
)  # fmt: skip

from graphopt.calibration import Dataset
from graphopt.model_io import model_bytes
from graphopt.pass_base import Context, PassResult
from graphopt.reference import Feed, Reference
from graphopt.targets import Target
from graphopt_passes.sparse_attention import SparseAttention
from graphopt_passes.sparse_attention._patterns import band_of


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("pattern", ["window", "strided"])
def test_an_operator_on_a_band_as_wide_as_the_sequence_computes_what_it_did(name: str, pattern: str) -> None:
    dense, sparse = operator(name), operator(name)
    result = rewrite(sparse, width=64, pattern=pattern)
    assert [change.done for change in result.changes] == [True]
    if pattern != "window" or not name.startswith("Group"):
        assert not [node for node in sparse.graph if node.domain or node.op_type == "Attention"]
        assert ("is spelled out" in result.changes[0].action) == (name in OPERATORS)
    first, second = Reference(dense), Reference(sparse)
    for seed, (batch, length) in enumerate(((1, 64), (3, 37), (2, 5), (1, 1))):
        feed = feed_of(dense, batch, length, seed)
        np.testing.assert_allclose(second.run(feed)["y"], first.run(feed)["y"], atol=1e-5)


@settings(max_examples=30, deadline=None)
@given(
    name=st.sampled_from(NAMES),
    width=st.integers(1, 30),
    leading=st.integers(0, 5),
    batch=st.sampled_from((1, 3)),
    length=st.integers(1, 70),
)
def test_an_operator_on_any_band_is_dense_attention_with_a_mask_of_it(
    name: str, width: int, leading: int, batch: int, length: int
) -> None:
    sparse, dense = operator(name), spelled(operator(name))
    assert rewrite(sparse, width=width, global_tokens=leading).modified
    twin = banded_twin(dense, band_of("window", width, causal=is_causal(dense), leading=leading), length)
    feed = feed_of(sparse, batch, length, 7)
    assert difference(Reference(twin), Reference(sparse), feed, counting(feed, width)) < 1e-5


@pytest.mark.parametrize("body", ["MultiHeadAttention<num_heads=4>(q, k, v)", "Attention<num_heads=4>(x, w, b)"])
def test_keys_and_values_stay_outputs(body: str) -> None:
    inputs = QKV if body.startswith("Multi") else f"float[B,N,{HIDDEN}] x"
    outputs = "y, keys, values" if body.startswith("Multi") else "y, caches"
    dense, sparse = model(body, inputs, outputs), model(body, inputs, outputs)
    assert rewrite(sparse, width=32).modified
    for seed in range(4):
        feed = feed_of(dense, 2, 21, seed)
        first, second = (Reference(each).run(feed) for each in (dense, sparse))
        for name in outputs.split(", "):
            np.testing.assert_allclose(second[name], first[name], atol=1e-5)


@pytest.mark.parametrize(
    ("inputs", "body", "reason"),
    [
        (f"{QKV}, float[B,4,P,8] pk, float[B,4,P,8] pv", "MultiHeadAttention<num_heads=4>(q, k, v, , , , pk, pv)",
         "a cache joins its keys"),
        (f"{QKV}, int32[M] mask", "MultiHeadAttention<num_heads=4>(q, k, v, , mask)",
         "nothing shows how many numbers of its mask 'mask' belong to a sample"),
        (f"float[B,N,{HIDDEN}] x, int32[B,1,N,N] mask", "Attention<num_heads=4>(x, w, b, mask)",
         "the rank of its mask 'mask' is 4"),
        (f"{QKV}, float[B,4,N,8] ks, float[B,4,N,8] vs", "MultiHeadAttention<num_heads=4>(q, ks, vs, b)",
         "nothing says whether its bias is meant for keys that come by head"),
        (f"float[B,N,{HIDDEN}] x", "Attention<num_heads=4, do_rotary=1>(x, w, b)", "it turns query and key itself"),
    ],
)  # fmt: skip
def test_an_operator_that_cannot_be_taken_apart_is_left_alone(inputs: str, body: str, reason: str) -> None:
    made = model(body, inputs)
    before = model_bytes(made)
    result = rewrite(made, width=8)
    assert not result.modified
    assert reason in result.changes[0].action
    assert model_bytes(made) == before


def two_layers() -> ir.Model:
    rng = np.random.default_rng(4)
    layer = "l{0} = com.microsoft.Attention<num_heads=4>({1}, w, b, mask) y{0} = Add({1}, l{0})"
    proto = onnx.parser.parse_model(
        f"""<ir_version: 10, opset_import: ["" : 17, "com.microsoft" : 1]>
        main (float[B,N,{HIDDEN}] x, int32[B,N] mask) => (float[B,N,{HIDDEN}] y)
        <float[{HIDDEN},{3 * HIDDEN}] w, float[{3 * HIDDEN}] b>
        {{ {layer.format(0, "x")} {layer.format(1, "y0")} y = Identity(y1) }}"""
    )
    w = (rng.standard_normal((HIDDEN, 3 * HIDDEN)) / 4).astype(np.float32)
    proto.graph.initializer.append(onnx.numpy_helper.from_array(w, "w"))
    proto.graph.initializer.append(onnx.numpy_helper.from_array(w[0], "b"))
    for i, node in enumerate(node for node in proto.graph.node if node.domain):
        node.name = f"attention{i}"
    return ir.from_proto(proto)


def learn(made: ir.Model, **options: Any) -> PassResult:
    def read() -> Iterator[Feed]:
        return (feed_of(made, 2, 96, seed) for seed in range(3))

    ctx = Context(made, Target(name="ort"), calibration=Dataset("random", "random", read, stacked=True))
    return SparseAttention(pattern="learned", **options).run(made, ctx)


def test_what_heads_of_an_operator_attend_to_is_measured() -> None:
    made = two_layers()
    result = learn(made, width=64, keep=0.2)
    assert [(change.site, change.done) for change in result.changes] == [("attention0", True), ("attention1", True)]
    assert all(0.2 <= float(result.changes[0].details[f"head {head}"]) <= 1 for head in range(4))  # type: ignore[arg-type]
    assert not [node for node in made.graph if node.domain]


def test_operators_that_keep_all_their_scores_are_what_they_were() -> None:
    made = two_layers()
    before = model_bytes(made)
    result = learn(made, width=4, keep=1.0)
    assert not result.modified
    assert {change.action for change in result.changes} == {"skipped: no pattern keeps 1 of what its heads attend to"}
    assert model_bytes(made) == before


def test_an_operator_beside_one_that_is_rewritten_stays() -> None:
    made, dense = two_layers(), two_layers()
    result = rewrite(made, width=64, skip=("attention0",))
    assert [change.done for change in result.changes] == [False, True]
    assert [node.name for node in made.graph if node.domain] == ["attention0"]
    for seed in range(4):
        feed = feed_of(dense, 2, 33, seed)
        np.testing.assert_allclose(Reference(made).run(feed)["y"], Reference(dense).run(feed)["y"], atol=1e-5)


def test_masks_of_operators_are_made_once() -> None:
    made = two_layers()
    spelled(made)
    assert [node.op_type for node in made.graph].count("Greater") == 1


@pytest.mark.parametrize(
    ("shape", "attributes", "mask"),
    [
        ("[B,N,32]", "q_num_heads=4, kv_num_heads=4", "bool[B,1,N,N] m"),
        ("[B,4,N,8]", "is_causal=1, softcap=3.0", ""),
        ("[B,4,N,8]", "scale=0.3", "float[1,4,N,N] m"),
    ],
)
def test_the_standard_operator_is_spelled_out_as_it_is(shape: str, attributes: str, mask: str) -> None:
    def made() -> ir.Model:
        return ir.from_proto(
            onnx.parser.parse_model(
                f"""<ir_version: 11, opset_import: ["" : 23]>
                main (float{shape} q, float{shape} k, float{shape} v{", " + mask if mask else ""})
                => (float{shape} y) {{ y = Attention<{attributes}>(q, k, v{", m" if mask else ""}) }}"""
            )
        )

    plain, written = made(), spelled(made())
    assert "Attention" not in [node.op_type for node in written.graph]
    rng = np.random.default_rng(0)
    for _ in range(4):
        feed: Feed = {}
        for value in plain.graph.inputs:
            size = [d if isinstance(d, int) else {"B": 2, "N": 17}[str(d.value)] for d in value.shape or ()]
            drawn = rng.standard_normal(size)
            feed[value.name or ""] = drawn > -1 if value.dtype == ir.DataType.BOOL else drawn.astype(np.float32)
        a, b = (Reference(each).run(feed)["y"] for each in (plain, written))
        np.testing.assert_allclose(b, a, atol=1e-5)
