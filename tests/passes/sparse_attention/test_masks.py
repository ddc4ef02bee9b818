from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from passes.sparse_attention.attention_models import (
    FORMS,
    HEADS,
    HIDDEN,
    WIDTH,
    attention,
    banded_twin,
    feeds,
    is_causal,
    rewrite,
)

from graphopt.analyses.streaming import expose
from graphopt.reference import Reference
from graphopt_passes.sparse_attention._patterns import band_of, visible


def largest_value(model: ir.Model, length: int) -> int:
    """Elements of the largest value that the model computes for one sample."""
    names = [out.name for node in model.graph for out in node.outputs if out.name]
    session = Reference(expose(model, names), optimize=False)
    found = session.run(feeds(model, 1, length)[0], names)
    return max(np.asarray(value).size for value in found.values())


@pytest.mark.parametrize("form", FORMS)
def test_nothing_grows_with_the_square_of_the_length(form: str) -> None:
    model = attention(form)
    result = rewrite(model, width=8)
    assert "quadratic" not in result.changes[0].action
    assert largest_value(model, 512) < 1.1 * 4 * largest_value(model, 128)
    assert largest_value(attention(form), 512) > 3.9 * 4 * largest_value(attention(form), 128)


def products(masking: str, signature: str, *, declared: str = "", opset: int = 17, heads: str = "H") -> ir.Model:
    text = f"""<ir_version: 10, opset_import: ["" : {opset}]>
    main (float[B,{heads},N,{WIDTH}] q, float[B,{heads},{WIDTH},N] k, float[B,{heads},N,{WIDTH}] v{signature})
    => (float[B,{heads},N,{WIDTH}] y) <float scale = {{0.35355338}}{declared}>
    {{ s = MatMul(q, k) t = Mul(s, scale) {masking} y = MatMul(p, v) }}"""
    return ir.from_proto(onnx.parser.parse_model(text))


def heads_feed(length: int, batch: int = 2, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    shapes = {"q": (length, WIDTH), "k": (WIDTH, length), "v": (length, WIDTH)}
    return {name: rng.standard_normal((batch, HEADS, *shape)).astype(np.float32) for name, shape in shapes.items()}


def test_a_mask_that_is_an_input_with_both_axes_is_banded_and_reported() -> None:
    def model() -> ir.Model:
        return products("u = Add(t, m) p = Softmax<axis=-1>(u)", ", float[B,1,N,N] m", heads=str(HEADS))

    dense, sparse = model(), model()
    result = rewrite(sparse, width=6, global_tokens=2)
    assert "'m', which stays quadratic" in result.changes[0].action
    band = band_of("window", 6, causal=False, leading=2)
    for seed in range(4):
        rng = np.random.default_rng(seed)
        feed = heads_feed(45, seed=seed) | {"m": rng.standard_normal((2, 1, 45, 45)).astype(np.float32)}
        a, b = (Reference(each).run(feed)["y"] for each in (banded_twin(dense, band, 45), sparse))
        np.testing.assert_allclose(a, b, atol=1e-5)


@pytest.mark.parametrize("leading", [0, 3])
def test_a_constant_mask_is_banded_ahead_of_time(leading: int) -> None:
    rng = np.random.default_rng(0)
    bias = rng.standard_normal((1, HEADS, 64, 64)).astype(np.float32)

    def model() -> ir.Model:
        made = products("u = Add(t, m) p = Softmax<axis=-1>(u)", ", float[1,4,64,64] m", heads=str(HEADS))
        value = made.graph.inputs[3]
        made.graph.inputs.remove(value)
        value.const_value = ir.tensor(bias, name="m")
        made.graph.register_initializer(value)
        for given in made.graph.inputs:
            given.shape = ir.Shape(
                [64 if d == "N" else d for d in (str(s) if not isinstance(s, int) else s for s in given.shape or ())]
            )
        return made

    dense, sparse = model(), model()
    result = rewrite(sparse, width=5, global_tokens=leading)
    assert result.modified
    assert "quadratic" not in result.changes[0].action
    band = band_of("window", 5, causal=False, leading=leading)
    for seed in range(4):
        feed = heads_feed(64, seed=seed)
        a, b = (Reference(each).run(feed)["y"] for each in (banded_twin(dense, band, 64), sparse))
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_a_query_all_of_whose_neighbours_are_hidden_stays_finite() -> None:
    def model() -> ir.Model:
        return products("u = Add(t, m) p = Softmax<axis=-1>(u)", ", float[B,1,1,N] m", heads=str(HEADS))

    sparse = model()
    rewrite(sparse, width=4)
    feed = heads_feed(40)
    mask = np.zeros((2, 1, 1, 40), np.float32)
    mask[..., 20:] = -np.inf
    found = Reference(sparse).run(feed | {"m": mask})["y"]
    assert np.isfinite(found).all()
    twin = banded_twin(model(), band_of("window", 4, causal=False), 40)
    expected = Reference(twin).run(feed | {"m": mask})["y"]
    assert np.isnan(expected[:, :, 23:]).all()
    np.testing.assert_allclose(found[:, :, :23], expected[:, :, :23], atol=1e-5)


def test_rows_that_a_model_makes_zero_are_zero() -> None:
    guard = "u = Add(t, m) w = Softmax<axis=-1>(u) bad = IsNaN(w) p = Where(bad, nought, w)"
    sparse = products(guard, ", float[B,1,1,N] m", declared=", float nought = {0.0}", heads=str(HEADS))
    assert rewrite(sparse, width=4).modified
    feed = heads_feed(40)
    mask = np.zeros((2, 1, 1, 40), np.float32)
    mask[..., 20:] = -np.inf
    found = Reference(sparse).run(feed | {"m": mask})["y"]
    assert not found[:, :, 23:].any()
    assert np.isfinite(found).all()
    assert (np.abs(found[:, :, :23]).max(axis=-1) > 0).all()


def summarized(feed: dict[str, np.ndarray], width: int, causal: bool, shared: bool = False) -> np.ndarray:
    """Attention to own and neighbouring blocks, and to the means of what padding leaves of all others, one by one."""
    wq, wk, wv = (
        np.asarray(value.const_value)  # type: ignore[arg-type]
        for name in ("wq", "wk", "wv")
        if (value := attention("no mask").graph.initializers[name]) is not None
    )
    x, mask = feed["x"].astype(np.float64), feed["mask"]
    out = np.zeros_like(x)
    for sample in range(len(x)):
        length = x.shape[1]
        q, k, v = ((x[sample] @ w).reshape(length, HEADS, WIDTH) for w in (wq, wk, wv))
        if shared:
            k, v = (np.repeat(each[:, :2], 2, axis=1) for each in (k, v))
        for at in range(length):
            keys, values, bias = [], [], []
            for block in range(-(-length // width)):
                inside = np.arange(block * width, min(length, block * width + width))
                away = at // width - block if causal else abs(at // width - block)
                if away < 0:
                    continue
                if away <= 1:
                    inside = inside[inside <= at] if causal else inside
                    keys += list(k[inside])
                    values += list(v[inside])
                    bias += list(-10000.0 * (1 - mask[sample, inside]))
                elif (real := inside[mask[sample, inside] != 0]).size:
                    keys.append(k[real].mean(axis=0))
                    values.append(v[real].mean(axis=0))
                    bias.append(np.log(real.size))
            scores = np.einsum("hd,khd->hk", q[at], np.array(keys)) / np.sqrt(WIDTH) + np.array(bias)
            weights = np.exp(scores - scores.max(axis=1, keepdims=True))
            weights /= weights.sum(axis=1, keepdims=True)
            out[sample, at] = np.einsum("hk,khd->hd", weights, np.array(values)).reshape(HIDDEN)
    return out


@pytest.mark.parametrize("form", ["scaled after, padding added", "causal by a triangle", "two heads of keys"])
def test_far_blocks_count_as_the_mean_of_what_padding_leaves_of_them(form: str) -> None:
    model = attention(form)
    causal = is_causal(model)
    assert rewrite(model, pattern="block", width=8).modified
    for feed in feeds(model, 2, 45, 4):
        if "padding" not in form:
            feed["mask"][:] = 1
        found = Reference(model).run(feed)["y"]
        expected = summarized(feed, 8, causal, form == "two heads of keys")
        real = feed["mask"] != 0
        np.testing.assert_allclose(found[real], expected[real], atol=1e-4)


def test_blocks_are_not_summarized_under_a_mask_that_depends_on_the_query() -> None:
    result = rewrite(attention("relative bias"), pattern="block", width=8)
    assert not result.modified
    assert "depends on the query" in result.changes[0].action


def test_what_a_query_sees_is_what_the_patterns_say() -> None:
    distance_of = np.abs(np.arange(50)[:, None] - np.arange(50))
    assert (visible(band_of("window", 7, causal=False), 50) == (distance_of < 7)).all()
    assert (visible(band_of("window", 7, causal=True), 50) == np.tril(distance_of < 7)).all()
    every = np.arange(50) % 3 == 0
    expected = (distance_of < 5) | (every & (distance_of < 15))
    assert (visible(band_of("strided", 5, causal=False, stride=3), 50) == expected).all()
    leading = (np.arange(50) < 2) | (np.arange(50)[:, None] < 2)
    assert (visible(band_of("window", 7, causal=False, leading=2), 50) == ((distance_of < 7) | leading)).all()
