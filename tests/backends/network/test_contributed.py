"""Operators of ONNX Runtime's transformer optimizer, and ONNX's own ones of attention, equal ONNX Runtime."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping

import numpy as np
import onnx_ir as ir
import pytest
from kernel_runner import runnable
from network_runner import run_network
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from graphopt.model_io import ShapeBinding
from graphopt.reference import Reference
from graphopt_backends._lower import lower

ISAS = runnable()
pytestmark = pytest.mark.skipif(not ISAS, reason="this CPU runs none of the kernels")

Array = np.ndarray
Feed = dict[str, Array]
Draw = Callable[[np.random.Generator], Feed]
MICROSOFT, ONNX = "com.microsoft", ""

_TURNS = itertools.cycle(ISAS or [None])
_FIXED = np.random.default_rng(11)


def _floats(random: np.random.Generator, *shape: int) -> Array:
    return random.standard_normal(shape).astype(np.float32)


def _model(
    operator: str,
    names: str,
    feed: Feed,
    constants: Mapping[str, Array],
    outputs: str,
    opset: int,
    **attributes: object,
) -> ir.Model:
    """A model of one node; a dot stands for an input or output that is not there."""
    inputs, made = (["" if name == "." else name for name in text.split()] for text in (names, outputs))
    domain = str(attributes.pop("domain", MICROSOFT if opset < 23 else ONNX))
    node = helper.make_node(operator, inputs, made, name="node", domain=domain, **attributes)
    declared = [
        helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(array.dtype), array.shape)
        for name, array in feed.items()
    ]
    kinds = {"counts": TensorProto.INT32}
    results = [helper.make_tensor_value_info(n, kinds.get(n, TensorProto.FLOAT), None) for n in made if n]
    held = [numpy_helper.from_array(np.asarray(array), name) for name, array in constants.items()]
    graph = helper.make_graph([node], "g", declared, results, held)
    imports = [helper.make_opsetid("", opset), helper.make_opsetid(MICROSOFT, 1)]
    return ir.from_proto(helper.make_model(graph, opset_imports=imports, ir_version=10))


def _check(
    operator: str, names: str, draw: Draw, constants: Mapping[str, Array] | None = None, outputs: str = "y",
    opset: int = 17, *, by_onnx: bool = False, **attributes: object,
) -> list[str]:  # fmt: skip
    """Four random inputs give what ONNX Runtime gives, or ONNX's reference; returns the kernels."""
    isa, ran = next(_TURNS), list[str]()
    assert isa is not None
    model = _model(operator, names, draw(np.random.default_rng(0)), constants or {}, outputs, opset, **attributes)
    runtime = None if by_onnx else Reference(model.clone(), threads=1)
    for seed in range(4):
        feed = draw(np.random.default_rng(seed))
        if runtime is None:
            expected = dict(zip(outputs.split(), ReferenceEvaluator(ir.to_proto(model)).run(None, feed), strict=True))
        else:
            expected = runtime.run(feed)
        got, ran = run_network(model, isa, feed)
        for name, value in expected.items():
            np.testing.assert_allclose(got[name], value, rtol=1e-4, atol=2e-5, err_msg=name)
    return ran


BATCH, ROWS, KEYS, HEADS, PAST = 2, 9, 11, 3, 6


def _sides(random: np.random.Generator, keys: int = KEYS, rows: int = ROWS) -> Feed:
    return {
        "q": _floats(random, BATCH, rows, 24), "k": _floats(random, BATCH, keys, 24),
        "v": _floats(random, BATCH, keys, 15),
    }  # fmt: skip


def _bits(random: np.random.Generator, *shape: int) -> Array:
    return (random.random(shape) > 0.3).astype(np.int32)


_MASKS: Mapping[str, Callable[[np.random.Generator], Array]] = {
    "of keys": lambda random: _bits(random, BATCH, KEYS),
    "of pairs": lambda random: _bits(random, BATCH, ROWS, KEYS),
    "ends": lambda random: random.integers(1, KEYS + 1, BATCH).astype(np.int32),
}


@pytest.mark.parametrize("mask", _MASKS)
def test_attention_of_many_heads_with_biases_and_masks(mask: str) -> None:
    ran = _check(
        "MultiHeadAttention", "q k v b m", lambda random: {**_sides(random), "m": _MASKS[mask](random)},
        {"b": _floats(_FIXED, 63)}, num_heads=HEADS,
    )  # fmt: skip
    assert "Attention" in ran


@pytest.mark.parametrize("shape", [(BATCH, HEADS, ROWS, KEYS), (1, 1, ROWS, KEYS)])
def test_numbers_are_added_to_scores(shape: tuple[int, ...]) -> None:
    ran = _check(
        "MultiHeadAttention", "q k v . . a", lambda random: {**_sides(random), "a": _floats(random, *shape)},
        num_heads=HEADS, scale=0.3,
    )  # fmt: skip
    assert ran == ["Attention", "Loops"]


@pytest.mark.parametrize("rows", [1, ROWS])
def test_attention_of_many_heads_in_causal_order_behind_a_cache(rows: int) -> None:
    def draw(random: np.random.Generator) -> Feed:
        cache = {n: _floats(random, BATCH, HEADS, PAST, 8) for n in ("pk", "pv")}
        sides = {n: _floats(random, BATCH, rows, 24) for n in "qkv"}
        return {**sides, "m": _bits(random, BATCH, PAST + rows), **cache}

    _check("MultiHeadAttention", "q k v . m . pk pv", draw, outputs="y nk nv", num_heads=HEADS, unidirectional=1)


def test_keys_come_as_a_cache_and_scores_are_read() -> None:
    def draw(random: np.random.Generator) -> Feed:
        cache = {n: _floats(random, BATCH, HEADS, KEYS, 8) for n in "kv"}
        return {"q": _floats(random, BATCH, ROWS, 24), **cache}

    _check("MultiHeadAttention", "q k v", draw, num_heads=HEADS)
    _check("MultiHeadAttention", "q k v", _sides, outputs="y . . s", num_heads=HEADS)


_ENDS: Mapping[str, Callable[[np.random.Generator], Array]] = {
    "ends": lambda random: random.integers(1, ROWS + 1, BATCH).astype(np.int32),
    "ends and begins": lambda random: np.repeat([ROWS, 0], BATCH).astype(np.int32) + np.array([-2, 0, 1, 3], np.int32),
    "of keys": lambda random: _bits(random, BATCH, ROWS),
}


@pytest.mark.parametrize(("mask", "causal"), [("ends", 1), ("ends and begins", 0), ("of keys", 1)])
def test_attention_with_its_projection(mask: str, causal: int) -> None:
    ran = _check(
        "Attention", "x w b m", lambda random: {"x": _floats(random, BATCH, ROWS, 20), "m": _ENDS[mask](random)},
        {"w": _floats(_FIXED, 20, 72) / 4, "b": _floats(_FIXED, 72)}, num_heads=HEADS, unidirectional=causal,
    )  # fmt: skip
    assert ran[0] == "Gemm"
    assert "Attention" in ran


def test_attention_with_its_projection_and_a_cache_and_widths_of_its_own() -> None:
    weights = {"w": _floats(_FIXED, 20, 72) / 4, "b": _floats(_FIXED, 72)}
    _check(
        "Attention", "x w b . p",
        lambda random: {"x": _floats(random, BATCH, 1, 20), "p": _floats(random, 2, BATCH, HEADS, PAST, 8)},
        weights, outputs="y n", num_heads=HEADS, unidirectional=1,
    )  # fmt: skip
    narrow = {"w": weights["w"][:, :63], "b": weights["b"][:63]}
    _check(
        "Attention", "x w b", lambda random: {"x": _floats(random, BATCH, ROWS, 20)}, narrow, num_heads=HEADS,
        qkv_hidden_sizes=[24, 24, 15],
    )  # fmt: skip


def _grouped(rows: int, past: int, *, varies: bool, batch: int = BATCH, **options: object) -> list[str]:
    """Heads that share keys: 4 and 2; `varies`: entries of the batch have used different parts of the cache."""
    rotates, total = bool(options.get("do_rotary")), rows + (past if past < 12 else PAST)

    def draw(random: np.random.Generator) -> Feed:
        feed = {n: _floats(random, batch, rows, heads * 16) for n, heads in (("q", 4), ("k", 2), ("v", 2))}
        if past:
            feed |= {n: _floats(random, batch, 2, past, 16) for n in ("pk", "pv")}
        least = rows if past else rows - 4
        return feed | ({"n": random.integers(least, total, batch).astype(np.int32)} if varies else {})

    constants: dict[str, Array] = {"t": np.array(total, np.int32), "n": np.full(batch, total - 1, np.int32)}
    if varies:
        del constants["n"]
    if rotates:
        constants |= {"c": _floats(_FIXED, 40, 8), "s": _floats(_FIXED, 40, 8)}
    names = f"q k v {'pk pv' if past else '. .'} n t{' c s' if rotates else ''}"
    return _check(
        "GroupQueryAttention", names, draw, constants, "y nk nv", num_heads=4, kv_num_heads=2, **options
    )  # fmt: skip


@pytest.mark.parametrize(
    ("rows", "past", "batch", "varies"),
    [(9, 0, 2, True), (9, 0, 2, False), (1, 6, 2, False), (1, 14, 2, True), (5, 6, 1, True)],
)
def test_heads_that_share_keys_fill_a_cache(rows: int, past: int, batch: int, *, varies: bool) -> None:
    ran = _grouped(rows, past, batch=batch, varies=varies, do_rotary=1)
    assert ("Attention" in ran) == (rows > 1)


@pytest.mark.parametrize(
    "options",
    [{"local_window_size": 3}, {"softcap": 1.5, "scale": 0.2}, {"do_rotary": 1, "rotary_interleaved": 1}],
    ids=lambda options: next(iter(options)),
)
def test_heads_that_share_keys_have_windows_and_limits(options: dict[str, object]) -> None:
    _grouped(9, 0, varies=True, **options)


def test_queries_keys_and_values_in_one_and_numbers_that_are_added() -> None:
    constants = {"t": np.array(9, np.int32), "n": np.full(2, 8, np.int32)}

    def draw(random: np.random.Generator) -> Feed:
        return {"q": _floats(random, 2, 9, 128), "a": _floats(random, 1, 4, 9, 9)}

    _check("GroupQueryAttention", "q . . . . n t . . . a", draw, constants, "y nk nv", num_heads=4, kv_num_heads=2)


@pytest.mark.parametrize(("interleaved", "size"), [(0, 4), (1, 0)])
def test_rotary_embeddings(interleaved: int, size: int) -> None:
    tables = {"c": _floats(_FIXED, 40, (size or 8) // 2), "s": _floats(_FIXED, 40, (size or 8) // 2)}
    options = {"interleaved": interleaved, "rotary_embedding_dim": size}

    def flat(random: np.random.Generator) -> Feed:
        return {"x": _floats(random, 2, 9, 24), "p": random.integers(0, 40, (2, 9))}

    def apart(random: np.random.Generator) -> Feed:
        return {"x": _floats(random, 2, 3, 9, 8), "p": random.integers(0, 20, 1)}

    _check("RotaryEmbedding", "x c s p", flat, tables, opset=23, num_heads=3, **options)
    _check("RotaryEmbedding", "x p c s", apart, tables, num_heads=3, **options)


def _heads(random: np.random.Generator, rows: int = 9, keys: int = 11) -> Feed:
    return {
        "q": _floats(random, 2, 4, rows, 8), "k": _floats(random, 2, 2, keys, 8), "v": _floats(random, 2, 2, keys, 5)
    }  # fmt: skip


@pytest.mark.parametrize(("rows", "causal"), [(1, 0), (9, 1)])
def test_onnx_attention_with_a_cache(rows: int, causal: int) -> None:
    def draw(random: np.random.Generator) -> Feed:
        cache = {n: _floats(random, 2, 2, 6, w) for n, w in (("pk", 8), ("pv", 5))}
        return {**_heads(random, rows, rows), "m": random.random((2, 1, rows, 6 + rows)) > 0.3, **cache}

    _check("Attention", "q k v m pk pv", draw, outputs="y nk nv", opset=23, is_causal=causal)


@pytest.mark.parametrize("mode", range(1, 4))
def test_onnx_attention_shows_what_it_computes(mode: int) -> None:
    _check(
        "Attention", "q k v m", lambda random: {**_heads(random), "m": _floats(random, 9, 11)}, outputs="y . . s",
        opset=24, qk_matmul_output_mode=mode, softcap=2.0,
    )  # fmt: skip


@pytest.mark.parametrize("causal", [0, 1])
def test_onnx_attention_with_lengths_and_with_rows_that_see_nothing(causal: int) -> None:
    def lengths(random: np.random.Generator) -> Feed:
        return {**_heads(random), "n": random.integers(1, 12, 2)}

    def nothing(random: np.random.Generator) -> Feed:
        return {**_heads(random), "m": (random.random((9, 11)) > 0.4) & (random.random((9, 1)) > 0.4)}

    _check("Attention", "q k v . . . n", lengths, opset=24, is_causal=causal)
    _check("Attention", "q k v m", nothing, opset=24, is_causal=causal)


def test_a_mask_that_ends_early_hides_the_other_keys() -> None:
    def draw(random: np.random.Generator) -> Feed:
        return {**_heads(random), "m": random.random((9, 7)) > 0.3, "n": random.integers(1, 7, 2)}

    _check("Attention", "q k v m . . n", draw, opset=24, by_onnx=True)


def _pair(random: np.random.Generator) -> Feed:
    return {"x": _floats(random, 2, 5, 40), "s": _floats(random, 2, 5, 40)}


_WEIGHTS = {name: _floats(_FIXED, 40) for name in ("w", "b", "c")}


@pytest.mark.parametrize(
    ("operator", "names", "outputs"),
    [
        ("SkipLayerNormalization", "x s w b c", "y . . t"),
        ("SkipLayerNormalization", "x s w", "y"),
        ("SkipSimplifiedLayerNormalization", "x s w c", "y . . t"),
    ],
)
def test_sums_and_their_normalizations(operator: str, names: str, outputs: str) -> None:
    constants = {name: _WEIGHTS[name] for name in names.split()[2:]}
    assert _check(operator, names, _pair, constants, outputs, epsilon=1e-3) == ["Loops", "Normalize"]


def test_a_skipped_value_is_repeated_for_the_batch() -> None:
    def draw(random: np.random.Generator) -> Feed:
        return {"x": _floats(random, 2, 5, 40), "s": _floats(random, 5, 40)}

    _check("SkipLayerNormalization", "x s w", draw, {"w": _WEIGHTS["w"]})


def test_a_normalization_without_mean_that_onnx_does_not_define() -> None:
    draw: Draw = lambda random: {"x": _floats(random, 2, 5, 40)}  # noqa: E731
    ran = _check("SimplifiedLayerNormalization", "x w", draw, {"w": _WEIGHTS["w"]}, domain="", axis=-1)
    assert ran == ["Normalize"]


@pytest.mark.parametrize(("operator", "names"), [("QuickGelu", "x"), ("FastGelu", "x b"), ("BiasGelu", "x b")])
def test_activations_of_transformers(operator: str, names: str) -> None:
    constants = {"b": _WEIGHTS["b"]} if "b" in names else {}
    assert _check(operator, names, lambda random: {"x": _floats(random, 2, 5, 40)}, constants) == ["Loops"]


@pytest.mark.parametrize(("left", "right"), [(0, 1), (1, 0)])
def test_a_product_with_turned_operands_and_a_factor(left: int, right: int) -> None:
    def draw(random: np.random.Generator) -> Feed:
        sizes = ((2, 3, 5, 7) if left else (2, 3, 7, 5)), ((2, 3, 6, 5) if right else (2, 3, 5, 6))
        return {name: _floats(random, *size) for name, size in zip("ab", sizes, strict=True)}

    _check("FusedMatMul", "a b", draw, transA=left, transB=right, alpha=0.3)


def test_embeddings_are_looked_up_added_and_normalized() -> None:
    tables = {"we": _floats(_FIXED, 30, 40), "pe": _floats(_FIXED, 16, 40), "se": _floats(_FIXED, 2, 40)}
    constants = {**tables, "w": _WEIGHTS["w"], "b": _WEIGHTS["b"]}

    def draw(random: np.random.Generator) -> Feed:
        ids = {n: random.integers(0, most, (2, 5)).astype(np.int32) for n, most in (("i", 30), ("g", 2), ("p", 16))}
        return {**ids, "m": _bits(random, 2, 5)}

    _check("EmbedLayerNormalization", "i g we pe se w b m p", draw, constants, "y counts t")


def test_integers_whose_product_is_a_float() -> None:
    constants = {
        "b": _FIXED.integers(-127, 128, (33, 12)).astype(np.int8), "sb": _FIXED.uniform(0.001, 0.01, 12).astype("f4"),
        "zb": np.zeros(12, np.int8), "c": _floats(_FIXED, 12),
    }  # fmt: skip

    def draw(random: np.random.Generator) -> Feed:
        a = random.integers(0, 256, (2, 7, 33)).astype(np.uint8)
        return {
            "a": a,
            "sa": np.array(random.uniform(0.01, 0.02), np.float32),
            "za": np.array(random.integers(0, 256), np.uint8),
        }

    assert _check("MatMulIntegerToFloat", "a b sa sb za zb c", draw, constants) == ["Loops", "Gemm"]


def test_attention_whose_projection_is_one_of_integers() -> None:
    constants = {
        "w": _FIXED.integers(-127, 128, (20, 72)).astype(np.int8), "b": _floats(_FIXED, 72), "sx": np.float32(0.02),
        "sw": np.float32(0.01), "zx": np.uint8(128), "zw": np.int8(0),
    }  # fmt: skip

    def draw(random: np.random.Generator) -> Feed:
        return {"x": random.integers(0, 256, (2, 9, 20)).astype(np.uint8), "m": _ENDS["ends"](random)}

    model = _model("QAttention", "x w b sx sw m zx zw", draw(_FIXED), constants, "y", 17, num_heads=HEADS)
    lowered = lower(model, ShapeBinding(), "x86").model
    assert "MatMulInteger" in [node.op_type for node in lowered.graph]
    assert "Attention" in _check("QAttention", "x w b sx sw m zx zw", draw, constants, num_heads=HEADS)


@pytest.mark.parametrize(
    ("operator", "names", "options"),
    [
        ("Attention", "q k v", {"opset": 23, "softmax_precision": int(TensorProto.DOUBLE)}),
        ("MultiHeadAttention", "q k v . . . . . p", {"num_heads": 2}),
    ],
)
def test_options_that_nothing_computes_leave_the_operator(operator: str, names: str, options: dict[str, int]) -> None:
    opset = options.pop("opset", 17)
    feed = _heads(_FIXED) if opset > 17 else {**_sides(_FIXED), "p": np.zeros(1, np.int32)}
    model = _model(operator, names, feed, {}, "y", opset, **options)
    lowered = lower(model, ShapeBinding(), "x86").model
    assert [node.op_type for node in lowered.graph] == [operator]
