"""Operators of ONNX Runtime against themselves, and against dense attention with a mask of the band."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from passes.sparse_attention.attention_models import banded_twin, rewrite

from graphopt.analyses import SHAPES
from graphopt.analyses.attention import ATTENTION
from graphopt.calibration import Dataset
from graphopt.model_io import model_bytes
from graphopt.pass_base import Context, PassResult
from graphopt.reference import Feed, Reference
from graphopt.targets import Target
from graphopt_passes.sparse_attention import SparseAttention
from graphopt_passes.sparse_attention._patterns import band_of
from graphopt_passes.sparse_attention.spelled import spell_out

Array = np.ndarray[Any, np.dtype[Any]]
HEADS, WIDTH = 4, 8
HIDDEN = HEADS * WIDTH
_QKV = f"float[B,N,{HIDDEN}] q, float[B,N,{HIDDEN}] k, float[B,N,{HIDDEN}] v"
_PROJECTION = f"float[{HIDDEN},{3 * HIDDEN}] w, float[{3 * HIDDEN}] b"
_MANY = f"<num_heads={HEADS}"
OPERATORS: dict[str, tuple[str, str]] = {
    "MultiHeadAttention, bias": (_QKV, f"MultiHeadAttention{_MANY}>(q, k, v, b)"),
    "MultiHeadAttention, mask": (f"{_QKV}, int32[B,N] mask", f"MultiHeadAttention{_MANY}>(q, k, v, , mask)"),
    "MultiHeadAttention, lengths": (f"{_QKV}, int32[B] ends", f"MultiHeadAttention{_MANY}>(q, k, v, , ends)"),
    "MultiHeadAttention, square mask": (
        f"{_QKV}, int32[B,N,N] square", f"MultiHeadAttention{_MANY}>(q, k, v, , square)"),
    "MultiHeadAttention, all": (
        f"{_QKV}, int32[B,N] mask, float[1,{HEADS},N,N] added",
        f"MultiHeadAttention{_MANY}, scale=0.2, unidirectional=1>(q, k, v, b, mask, added)"),
    "Attention": (f"float[B,N,{HIDDEN}] x", f"Attention{_MANY}>(x, w, b)"),
    "Attention, causal, mask": (
        f"float[B,N,{HIDDEN}] x, int32[B,N] mask", f"Attention{_MANY}, unidirectional=1>(x, w, b, mask)"),
    "Attention, lengths": (
        f"float[B,N,{HIDDEN}] x, int32[B] ends", f"Attention{_MANY}, mask_filter_value=-3e4>(x, w, b, ends)"),
    "Attention, added": (
        f"float[B,N,{HIDDEN}] x, float[B,{HEADS},N,N] added", f"Attention{_MANY}>(x, w, b, , , added)"),
    "QAttention": (
        f"uint8[B,N,{HIDDEN}] bytes, int32[B,N] mask",
        f"QAttention{_MANY}>(bytes, weight, b, scale, scales, mask, zero)"),
    "GroupQueryAttention": (
        f"float[B,N,{HIDDEN}] q, float[B,N,{HIDDEN // 2}] k2, float[B,N,{HIDDEN // 2}] v2, int32[B] last, int32 total",
        f"GroupQueryAttention{_MANY}, kv_num_heads=2>(q, k2, v2, , , last, total)"),
    "GroupQueryAttention, packed": (
        f"float[B,N,{2 * HIDDEN}] packed, int32[B] last, int32 total",
        f"GroupQueryAttention{_MANY}, kv_num_heads=2, softcap=2.0>(packed, , , , , last, total)"),
}  # fmt: skip


def model(body: str, inputs: str, outputs: str = "y", opset: int = 17) -> ir.Model:
    rng = np.random.default_rng(3)
    arrays: dict[str, Array] = {
        "w": (rng.standard_normal((HIDDEN, 3 * HIDDEN)) / 4).astype(np.float32),
        "b": rng.standard_normal(3 * HIDDEN).astype(np.float32),
        "weight": rng.integers(-90, 90, (HIDDEN, 3 * HIDDEN)).astype(np.int8),
        "scale": np.array(0.02, np.float32),
        "scales": np.array(0.004, np.float32),
        "zero": np.array(131, np.uint8),
    }
    words = set(re.split(r"\W+", body))
    used = {name: array for name, array in arrays.items() if name in words}
    kinds = {np.dtype(np.float32): "float", np.dtype(np.int8): "int8", np.dtype(np.uint8): "uint8"}
    declared = ", ".join(f"{kinds[a.dtype]}[{','.join(map(str, a.shape))}] {n}" for n, a in used.items())
    results = ", ".join(f"float {name}" for name in outputs.split(", ") if name)
    proto = onnx.parser.parse_model(
        f"""<ir_version: 10, opset_import: ["" : {opset}, "com.microsoft" : 1]>
        main ({inputs}) => ({results}) <{declared}> {{ {outputs} = com.microsoft.{body} }}"""
    )
    proto.graph.initializer.extend(onnx.numpy_helper.from_array(a, n) for n, a in used.items())
    for output in proto.graph.output:
        output.type.tensor_type.ClearField("shape")
    return ir.from_proto(proto)


def feed_of(made: ir.Model, batch: int, length: int, seed: int, band: Array | None = None) -> Feed:
    """Random inputs; what a band hides is added to the one input that says what is added."""
    rng, found = np.random.default_rng(seed), dict[str, Array]()
    for value in made.graph.inputs:
        sizes = {"B": batch, "N": length}
        shape = [d if isinstance(d, int) else sizes[str(d.value)] for d in value.shape or ()]
        name = value.name or ""
        if name in ("mask", "square"):
            found[name] = (rng.random(shape) < 0.7).astype(np.int32)
            found[name][..., 0] = 1
        elif name == "ends":
            found[name] = rng.integers(1, length + 1, shape).astype(np.int32)
        elif name == "last":
            found[name] = np.full(shape, length - 1, np.int32)
        elif name == "total":
            found[name] = np.array(length, np.int32)
        elif name == "bytes":
            found[name] = rng.integers(0, 256, shape).astype(np.uint8)
        else:
            found[name] = rng.standard_normal(shape).astype(np.float32)
            if name == "added" and band is not None:
                found[name] = np.where(band, found[name], np.float32(-30000)).astype(np.float32)
    return found


@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.parametrize("pattern", ["window", "strided"])
def test_an_operator_on_a_band_as_wide_as_the_sequence_computes_what_it_did(name: str, pattern: str) -> None:
    inputs, body = OPERATORS[name]
    dense, sparse = model(body, inputs), model(body, inputs)
    result = rewrite(sparse, width=64, pattern=pattern)
    assert [change.done for change in result.changes] == [True]
    if pattern != "window" or not name.startswith("Group"):
        assert not [node for node in sparse.graph if node.domain]
        assert "is spelled out" in result.changes[0].action
    first, second = Reference(dense), Reference(sparse)
    for seed, (batch, length) in enumerate(((1, 64), (3, 37), (2, 5), (1, 1))):
        feed = feed_of(dense, batch, length, seed)
        np.testing.assert_allclose(second.run(feed)["y"], first.run(feed)["y"], atol=1e-5)


def spelled(made: ir.Model) -> ir.Model:
    """The same with its operators spelled out."""
    ctx = Context(made, Target(name="ort"))
    spell_out(made, ctx.fact(ATTENTION), ctx.fact(SHAPES))
    return made


@settings(max_examples=20, deadline=None)
@given(
    name=st.sampled_from(sorted(OPERATORS)),
    width=st.integers(1, 30),
    leading=st.integers(0, 5),
    batch=st.sampled_from((1, 3)),
    length=st.integers(1, 70),
)
def test_an_operator_on_any_band_is_dense_attention_with_a_mask_of_it(
    name: str, width: int, leading: int, batch: int, length: int
) -> None:
    inputs, body = OPERATORS[name]
    sparse, dense = model(body, inputs), spelled(model(body, inputs))
    causal = Context(dense, Target(name="ort")).fact(ATTENTION)[0].causal == "yes"
    assert rewrite(sparse, width=width, global_tokens=leading).modified
    twin = banded_twin(dense, band_of("window", width, causal=causal, leading=leading), length)
    feed = feed_of(sparse, batch, length, 7)
    a, b = (Reference(each).run(feed)["y"] for each in (twin, sparse))
    hidden = np.zeros((batch, length), bool)  # where a band and a mask leave a query nothing, any result will do
    for mask in (feed.get("mask"), None if "ends" not in feed else np.arange(length) < feed["ends"][:, None]):
        if mask is not None:
            away = np.abs(np.arange(length)[:, None] - np.arange(length)) < width
            hidden |= ~(mask[:, None].astype(bool) & away).any(axis=2)
    if "square" not in feed:
        np.testing.assert_allclose(b[~hidden], a[~hidden], atol=1e-5)
    assert np.isfinite(b).all()


@pytest.mark.parametrize("body", ["MultiHeadAttention<num_heads=4>(q, k, v)", "Attention<num_heads=4>(x, w, b)"])
def test_keys_and_values_stay_outputs(body: str) -> None:
    inputs = _QKV if body.startswith("Multi") else f"float[B,N,{HIDDEN}] x"
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
        (f"{_QKV}, float[B,4,P,8] pk, float[B,4,P,8] pv", "MultiHeadAttention<num_heads=4>(q, k, v, , , , pk, pv)",
         "a cache joins its keys"),
        (f"{_QKV}, int32[M] mask", "MultiHeadAttention<num_heads=4>(q, k, v, , mask)",
         "nothing shows how many numbers of its mask 'mask' belong to a sample"),
        (f"float[B,N,{HIDDEN}] x, int32[B,1,N,N] mask", "Attention<num_heads=4>(x, w, b, mask)",
         "the rank of its mask 'mask' is 4"),
        (f"{_QKV}, float[B,4,N,8] ks, float[B,4,N,8] vs", "MultiHeadAttention<num_heads=4>(q, ks, vs, b)",
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
