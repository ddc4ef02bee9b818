from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx_ir as ir
import pytest

from graphopt.analyses import MOMENTS, LayerMoments, Moments, MomentsAnalysis
from graphopt.analyses.moments import spread_out
from graphopt.analyses.streaming import expose
from graphopt.analyses.windows import position_rows
from graphopt.calibration import Dataset
from graphopt.errors import DataError
from graphopt.pass_base import Context
from graphopt.reference import Feed, Reference
from graphopt.targets import Target

BODY = """
    [first] a = Conv<pads=[1,1,1,1], strides=[2,1]>(x, w1) r = Relu(a)
    [grouped] c = Conv<group=3, auto_pad="SAME_UPPER", strides=[2,1]>(r, w2)
    [wide] e = Conv<dilations=[1,2]>(c, w7) ep = GlobalAveragePool(e) ef = Flatten(ep)
    [turned] t = ConvTranspose<group=2>(c, w3)
    g = GlobalAveragePool(t) f = Flatten(g)
    [dense] d = Gemm<transB=1>(f, w4)
    q = Transpose<perm=[1,0]>(d)
    [left] l = MatMul(w5, q)
    z = Transpose<perm=[1,0]>(l)
    wt = Transpose<perm=[1,0]>(w6)
    [right] o = MatMul(z, wt) y = Add(o, ef)
"""
SHAPES = {
    "w1": (6, 3, 3, 3),
    "w2": (6, 2, 2, 2),
    "w3": (6, 2, 2, 2),
    "w4": (7, 4),
    "w5": (8, 7),
    "w6": (5, 8),
    "w7": (5, 6, 2, 2),
}


def build(body: str = BODY, shapes: dict[str, tuple[int, ...]] = SHAPES) -> ir.Model:
    rng = np.random.default_rng(0)
    arrays = {name: rng.standard_normal(s).astype(np.float32) for name, s in shapes.items()}
    declared = ", ".join(f"float[{','.join(map(str, a.shape))}] {name}" for name, a in arrays.items())
    text = f'<ir_version: 8, opset_import: ["" : 17]> main (float[N,3,8,6] x) => (float[N,5] y) <{declared}> {{{body}}}'
    return ir.from_onnx_text(text, initializers=[ir.tensor(a, name=name) for name, a in arrays.items()])


def samples(count: int = 20, scale: float = 1.0) -> Dataset:
    def read() -> Iterator[Feed]:
        rng = np.random.default_rng(2)
        for _ in range(count):
            yield {"x": scale * rng.standard_normal((1, 3, 8, 6)).astype(np.float32)}

    return Dataset("random", None, read, stacked=True)


def context(model: ir.Model | None = None, data: Dataset | None = None) -> Context:
    return Context(model or build(), Target(name="ort"), calibration=data or samples())


def values(model: ir.Model, *names: str) -> dict[str, np.ndarray]:
    feed = {"x": np.concatenate([feed["x"] for feed in samples().feeds()])}
    return {**feed, **Reference(expose(model, names)).run(feed)}


def expected(rows: np.ndarray) -> tuple[int, np.ndarray, np.ndarray]:
    """Rows, mean and X'X of `[groups, rows, inputs]`."""
    rows = rows.astype(np.float64)
    return rows.shape[1], rows.mean(axis=1), rows.transpose(0, 2, 1) @ rows


def check(found: LayerMoments | None, rows: np.ndarray) -> None:
    assert found is not None
    count, mean, xx = expected(rows)
    assert found.rows == count
    assert found.xx is not None
    np.testing.assert_allclose(found.mean, mean, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(found.xx, xx, rtol=1e-5, atol=1e-3)
    np.testing.assert_allclose(found.squares, np.diagonal(xx, axis1=1, axis2=2), rtol=1e-5, atol=1e-3)
    np.testing.assert_allclose(found.norms, np.sqrt(np.square(rows).mean(axis=1)), rtol=1e-5, atol=1e-5)
    covariance = found.covariance()
    assert covariance is not None
    for one, part in zip(covariance, rows, strict=True):
        np.testing.assert_allclose(one, np.cov(part.T, bias=True), rtol=1e-4, atol=1e-4)


def im2col(x: np.ndarray, kernel: tuple[int, int], strides: tuple[int, int], dilations: tuple[int, int]) -> np.ndarray:
    """`[rows, channels * kernel]`, window by window."""
    (kh, kw), (sh, sw), (dh, dw) = kernel, strides, dilations
    found = [
        image[:, i : i + dh * kh : dh, j : j + dw * kw : dw].reshape(-1)
        for image in x
        for i in range(0, image.shape[1] - dh * (kh - 1), sh)
        for j in range(0, image.shape[2] - dw * (kw - 1), sw)
    ]
    return np.stack(found)


def test_every_kind_of_layer_has_the_moments_that_numpy_finds() -> None:
    model = build()
    moments, seen = context(model).fact(MOMENTS), values(model, "r", "c", "f", "q", "z")
    padded = np.pad(seen["x"], [(0, 0), (0, 0), (1, 1), (1, 1)])
    check(moments.of("first"), im2col(padded, (3, 3), (2, 1), (1, 1))[None])
    same = np.pad(seen["r"], [(0, 0), (0, 0), (0, 0), (0, 1)])
    rows = im2col(same, (2, 2), (2, 1), (1, 1))
    check(moments.of("grouped"), rows.reshape(len(rows), 3, 8).transpose(1, 0, 2))
    check(moments.of("wide"), im2col(seen["c"], (2, 2), (1, 1), (1, 2))[None])
    pixels = seen["c"].transpose(0, 2, 3, 1).reshape(-1, 2, 3)
    check(moments.of("turned"), pixels.transpose(1, 0, 2))
    check(moments.of("dense"), seen["f"][None])
    check(moments.of("right"), seen["z"][None])
    assert moments.left_out == {}


def test_rows_of_a_layer_with_its_weight_on_the_left_are_columns() -> None:
    body = "f = Flatten(x) t = Transpose<perm=[1,0]>(f) [left] l = MatMul(w, t) y = Transpose<perm=[1,0]>(l)"
    model = build(body, {"w": (5, 144)})
    check(context(model).fact(MOMENTS).of("left"), values(model, "f")["f"][None])


def test_without_windows_every_position_is_a_row() -> None:
    model = build()
    pixels = values(model)["x"].transpose(0, 2, 3, 1).reshape(1, -1, 3)
    check(context(model).fact(MomentsAnalysis(windows=False)).of("first"), pixels)


def test_only_layers_that_were_asked_for_are_measured() -> None:
    moments = context().fact(MomentsAnalysis(layers=("dense", "nothing")))
    assert list(moments.layers) == ["dense"]
    assert moments.of("first") is None
    assert moments.of(None) is None


def test_the_diagonal_alone_is_the_same_diagonal() -> None:
    ctx = context()
    whole, alone = ctx.fact(MOMENTS), ctx.fact(MomentsAnalysis(pairs=False))
    for name, moments in alone.layers.items():
        assert moments.xx is None
        assert moments.covariance() is None
        np.testing.assert_allclose(moments.squares, whole.layers[name].squares)
        np.testing.assert_allclose(moments.mean, whole.layers[name].mean)


def test_the_widest_layers_lose_their_products_where_memory_is_short() -> None:
    ctx = context()
    full = ctx.fact(MOMENTS)
    sizes = {name: moments.xx.nbytes for name, moments in full.layers.items() if moments.xx is not None}
    found = ctx.fact(MomentsAnalysis(most_bytes=sum(sizes.values()) - 1))
    assert [name for name, moments in found.layers.items() if moments.xx is None] == ["first"]
    assert max(sizes, key=lambda name: sizes[name]) == "first"


def test_portions_hold_every_layer_once_with_its_products() -> None:
    model = build()
    ctx, analysis = context(model), MomentsAnalysis(most_bytes=5000)
    portions = analysis.portions(ctx)
    names = [name for portion in portions for name in portion.layers or ()]
    whole = ctx.fact(MOMENTS)
    assert names == list(whole.layers)
    assert len(portions) > 1
    for portion in portions:
        moments = portion.compute(model, ctx)
        assert sum(m.xx.nbytes for m in moments.layers.values() if m.xx is not None) <= 5000
        for name, found in moments.layers.items():
            np.testing.assert_allclose(found.squares, whole.layers[name].squares)
            assert (found.xx is None) == (name == "first")


def test_layers_that_read_the_same_share_their_moments() -> None:
    body = "f = Flatten(x) [a] a = MatMul(f, w) [b] b = MatMul(f, v) y = Add(a, b)"
    moments = context(build(body, {"w": (144, 5), "v": (144, 5)})).fact(MOMENTS)
    assert moments.of("a") is moments.of("b")
    assert moments.of("a") is not None


def test_layers_without_moments_say_why() -> None:
    body = """
        f = Flatten(x) [a] a = MatMul(f, w) t = Transpose<perm=[1,0]>(a) [computed] p = MatMul(a, t)
        [folded] k = MatMul(v, v) n = MatMul(p, a) y = Add(n, k)
    """
    moments = context(build(body, {"w": (144, 5), "v": (1, 1)})).fact(MOMENTS)
    assert list(moments.layers) == ["a"]
    assert moments.left_out["computed"] == "its weight is computed"
    assert moments.left_out["folded"] == "its input is constant"


def test_memory_for_activations_changes_no_number(monkeypatch: pytest.MonkeyPatch) -> None:
    def summary(moments: Moments) -> list[np.ndarray]:
        return [m.squares for m in moments.layers.values()]

    together = summary(context().fact(MOMENTS))
    monkeypatch.setattr("graphopt.analyses.streaming._RUN_BYTES", 1)
    for alone, expected_ in zip(summary(context().fact(MOMENTS)), together, strict=True):
        np.testing.assert_allclose(alone, expected_, rtol=1e-5)


def test_two_runs_give_the_same_numbers() -> None:
    first, second = (context().fact(MOMENTS).of("first") for _ in range(2))
    assert first is not None
    assert second is not None
    np.testing.assert_array_equal(first.xx, second.xx)


def test_many_rows_are_thinned_evenly(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = context().fact(MOMENTS).of("first")
    monkeypatch.setattr("graphopt.analyses.moments._ROWS", 200)
    thinned = context().fact(MOMENTS).of("first")
    assert whole is not None
    assert thinned is not None
    assert 190 <= thinned.rows <= 220
    assert whole.rows == 480
    np.testing.assert_allclose(thinned.norms, whole.norms, rtol=0.3)


@pytest.mark.parametrize(("count", "most"), [(5, 5), (1000, 7), (1024, 100), (3, 10), (0, 4)])
def test_indices_are_spread_out(count: int, most: int) -> None:
    found = spread_out(count, most)
    assert len(found) <= most
    assert (np.diff(found) > 0).all()
    assert len(found) >= 0.9 * min(count, most)
    if count > most:
        assert np.diff(found).max() <= 3 * count / most


def test_no_row_length_is_met_in_step() -> None:
    for width in range(2, 300):
        columns = np.unique(spread_out(100 * width, 10 * width) % width)
        assert len(columns) > 0.9 * width


def test_infinities_show() -> None:
    moments = context(data=samples(scale=float("inf"))).fact(MOMENTS)
    first = moments.of("first")
    assert first is not None
    assert not first.finite


def test_moments_need_samples() -> None:
    with pytest.raises(DataError, match="moments need samples; give --calibration"):
        Context(build(), Target(name="ort")).fact(MOMENTS)


@pytest.mark.parametrize("axis", [0, 1, -1])
def test_rows_at_positions_are_what_lies_along_the_axis(axis: int) -> None:
    x = np.random.default_rng(0).standard_normal((3, 4, 5))
    table = np.moveaxis(x, axis, -1).reshape(-1, x.shape[axis])
    np.testing.assert_array_equal(position_rows(x, axis, np.array([0, 2, 7])), table[[0, 2, 7]])
    np.testing.assert_array_equal(position_rows(x[0, 0], 0, np.array([0])), x[:1, 0])
