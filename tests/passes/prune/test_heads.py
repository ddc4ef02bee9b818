"""Attention heads and channel shuffles: reshapes that split an axis."""

from __future__ import annotations

import onnx_ir as ir
import pytest
from small_models import IMAGE, assert_removal_is_exact, build, channel_groups

from graphopt.analyses import ChannelGroup

TOKENS = "(float[N,7,8] x) => (float[N,7,5] y)"


def attention(heads: int, size: int, kv_heads: int, rotate: bool = False) -> ir.Model:
    """Grouped-query attention as exporters write it; keys and values are repeated for the queries that share them."""

    def turn(v: str) -> str:
        halves = f"{v}a = Slice({v}3, zero, half, last) {v}b = Slice({v}3, half, end, last) {v}c = Neg({v}b)"
        return f"{halves} {v}r = Concat<axis=-1>({v}c, {v}a)" if rotate else f"{v}r = Identity({v}3)"

    body = f"""
        to_q = Constant<value_ints=[0,0,{heads},{size}]>() to_kv = Constant<value_ints=[0,0,{kv_heads},{size}]>()
        together = Constant<value_ints=[0,0,{heads * size}]>() two = Constant<value_ints=[2]>()
        repeats = Constant<value_ints=[1,1,{heads // kv_heads},1,1]>()
        repeated = Constant<value_ints=[0,{heads},-1,{size}]>()
        zero = Constant<value_ints=[0]>() half = Constant<value_ints=[{size // 2}]>()
        end = Constant<value_ints=[{size}]>() last = Constant<value_ints=[-1]>()
        [query] q0 = MatMul(x, wq) q1 = Add(q0, bq) q2 = Reshape(q1, to_q) q3 = Transpose<perm=[0,2,1,3]>(q2)
        {turn("q")}
        [key] k0 = MatMul(x, wk) k2 = Reshape(k0, to_kv) k3 = Transpose<perm=[0,2,1,3]>(k2) {turn("k")}
        k4 = Unsqueeze(kr, two) k5 = Expand(k4, repeats) k6 = Reshape(k5, repeated) k7 = Transpose<perm=[0,1,3,2]>(k6)
        [value] v0 = MatMul(x, wv) v2 = Reshape(v0, to_kv) v3 = Transpose<perm=[0,2,1,3]>(v2)
        v4 = Unsqueeze(v3, two) v5 = Expand(v4, repeats) v6 = Reshape(v5, repeated)
        s = MatMul(qr, k7) p = Softmax<axis=-1>(s) o = MatMul(p, v6) t = Transpose<perm=[0,2,1,3]>(o)
        m = Reshape(t, together) [project] y = MatMul(m, wo)
    """
    wide, narrow = heads * size, kv_heads * size
    return build(TOKENS, body, {"wq": (8, wide), "bq": (wide,), "wk": (8, narrow), "wv": (8, narrow), "wo": (wide, 5)})


def only(groups: tuple[ChannelGroup, ...]) -> ChannelGroup:
    (group,) = groups
    return group


@pytest.mark.parametrize(("heads", "size", "kv_heads"), [(6, 4, 6), (6, 4, 3), (4, 10, 2), (12, 2, 4)])
@pytest.mark.parametrize("rotate", [False, True])
def test_a_head_leaves_with_its_queries_keys_values_and_projection(
    heads: int, size: int, kv_heads: int, rotate: bool
) -> None:
    model = attention(heads, size, kv_heads, rotate)
    group = only(channel_groups(model).free)
    assert (group.kind, group.units) == ("heads", kv_heads)
    copies = {place.value: place.positions.shape[1] for place in group.places if place.constant}
    shared = heads // kv_heads
    assert copies == {"wq": shared * size, "bq": shared * size, "wk": size, "wv": size, "wo": shared * size}
    assert_removal_is_exact(model, [(group, [0, kv_heads - 1] if kv_heads > 2 else [1])])


def test_queries_keys_and_values_of_one_product_are_told_apart() -> None:
    body = """
        to = Constant<value_ints=[0,7,3,4,6]>() together = Constant<value_ints=[0,7,24]>()
        first = Constant<value_int=0>() second = Constant<value_int=1>() third = Constant<value_int=2>()
        [qkv] a = MatMul(x, w1) b = Reshape(a, to) c = Transpose<perm=[2,0,3,1,4]>(b)
        q = Gather<axis=0>(c, first) k = Gather<axis=0>(c, second) v = Gather<axis=0>(c, third)
        kt = Transpose<perm=[0,1,3,2]>(k) s = MatMul(q, kt) biased = Add(s, bias) p = Softmax<axis=-1>(biased)
        o = MatMul(p, v) t = Transpose<perm=[0,2,1,3]>(o) m = Reshape(t, together) y = MatMul(m, w2)
    """
    model = build(TOKENS, body, {"w1": (8, 72), "w2": (24, 5), "bias": (1, 4, 7, 7)})
    group = only(channel_groups(model).free)
    assert (group.kind, group.units) == ("heads", 4)
    assert {p.value: p.positions.shape[1] for p in group.places if p.constant} == {"w1": 18, "w2": 6, "bias": 1}
    assert_removal_is_exact(model, [(group, [2])])


def test_a_shuffle_of_grouped_convolutions_keeps_groups_of_one_size() -> None:
    body = """
        apart = Constant<value_ints=[0,2,3,8,8]>() again = Constant<value_ints=[0,6,8,8]>()
        [one] a = Conv<group=2>(x, w1) b = Reshape(a, apart) c = Transpose<perm=[0,2,1,3,4]>(b) d = Reshape(c, again)
        [two] e = Conv<group=2>(d, w2) g = GlobalAveragePool(e) f = Flatten(g) y = Gemm<transB=1>(f, head)
    """
    weights = {"w1": (6, 2, 1, 1), "w2": (4, 3, 1, 1), "head": (5, 4)}
    model = build(IMAGE.replace("3,8", "4,8"), body, weights)
    one, two = channel_groups(model).free
    assert (one.name, one.units, two.name, two.units) == ("one", 1, "two", 2), "the shuffle makes neighbours of all"
    assert_removal_is_exact(model, [(two, [1])])


def test_a_shuffle_of_two_branches_ties_channels_of_the_same_place() -> None:
    body = """
        apart = Constant<value_ints=[0,2,4,8,8]>() again = Constant<value_ints=[0,8,8,8]>()
        [left] l = Conv(x, w1) [right] r = Conv(x, w2) a = Concat<axis=1>(l, r)
        b = Reshape(a, apart) c = Transpose<perm=[0,2,1,3,4]>(b) d = Reshape(c, again)
        s, t = Split<axis=1>(d) [inner] i = Conv(t, w3) j = Conv(i, w4) k = Concat<axis=1>(s, j)
        g = GlobalAveragePool(k) f = Flatten(g) y = Gemm<transB=1>(f, head)
    """
    weights = {"w1": (4, 3, 1, 1), "w2": (4, 3, 1, 1), "w3": (6, 4, 1, 1), "w4": (4, 6, 1, 1), "head": (5, 8)}
    model = build(IMAGE, body, weights)
    groups = channel_groups(model)
    tied, inner = groups.free[0], next(group for group in groups.free if group.name == "inner")
    assert tied.producers == ("left", "right")
    assert_removal_is_exact(model, [(tied, [1]), (inner, [0, 5])])


@pytest.mark.parametrize("batch", [1, 2])
def test_heads_merged_with_the_batch_are_heads(batch: int) -> None:
    """What torch.nn.MultiheadAttention exports: [tokens, batch * heads, size]."""
    body = f"""
        to = Constant<value_ints=[7,{4 * batch},6]>() flat = Constant<value_ints=[{7 * batch},24]>()
        back = Constant<value_ints=[7,{batch},5]>() xt = Transpose<perm=[1,0,2]>(x)
        [query] q = MatMul(xt, wq) q1 = Reshape(q, to) q2 = Transpose<perm=[1,0,2]>(q1)
        [key] k = MatMul(xt, wk) k1 = Reshape(k, to) k2 = Transpose<perm=[1,2,0]>(k1)
        [value] v = MatMul(xt, wv) v1 = Reshape(v, to) v2 = Transpose<perm=[1,0,2]>(v1)
        s = MatMul(q2, k2) p = Softmax<axis=-1>(s) o = MatMul(p, v2)
        ot = Transpose<perm=[1,0,2]>(o) m = Reshape(ot, flat) z = MatMul(m, wo) zt = Reshape(z, back)
        y = Transpose<perm=[1,0,2]>(zt)
    """
    weights = {"wq": (8, 24), "wk": (8, 24), "wv": (8, 24), "wo": (24, 5)}
    model = build(TOKENS.replace("N,7", f"{batch},7"), body, weights)
    group = only(channel_groups(model).free)
    assert (group.kind, group.units) == ("heads", 4)
    assert_removal_is_exact(model, [(group, [1, 2])])


def test_a_size_of_heads_that_is_computed_from_the_width_stays() -> None:
    """`x.shape[2] // heads` of a width that itself can shrink, as image transformers export it."""
    body = """
        last = Constant<value_ints=[2]>() first = Constant<value_ints=[0]>() second = Constant<value_ints=[1]>()
        four = Constant<value_ints=[4]>() together = Constant<value_ints=[0,0,24]>()
        [stem] e = MatMul(x, w0) s = Shape(e) n = Gather(s, first) t = Gather(s, second) c = Gather(s, last)
        size = Div(c, four) to = Concat<axis=0>(n, t, four, size) whole = Concat<axis=0>(n, t, c)
        float = Cast<to=1>(size) root = Sqrt(float)
        [query] q0 = MatMul(e, wq) q1 = Reshape(q0, to) q2 = Transpose<perm=[0,2,1,3]>(q1) q3 = Div(q2, root)
        [key] k0 = MatMul(e, wk) k1 = Reshape(k0, to) k2 = Transpose<perm=[0,2,3,1]>(k1)
        [value] v0 = MatMul(e, wv) v1 = Reshape(v0, to) v2 = Transpose<perm=[0,2,1,3]>(v1)
        w = MatMul(q3, k2) p = Softmax<axis=-1>(w) o = MatMul(p, v2) ot = Transpose<perm=[0,2,1,3]>(o)
        m = Reshape(ot, whole) r = MatMul(m, wo) z = Add(r, e) y = MatMul(z, w1)
    """
    weights = {"w0": (8, 24), "wq": (24, 24), "wk": (24, 24), "wv": (24, 24), "wo": (24, 24), "w1": (24, 5)}
    model = build(TOKENS, body, weights)
    stem, heads = channel_groups(model).free
    assert (stem.units, stem.producers, heads.kind, heads.units) == (24, ("stem", "MatMul_30"), "heads", 4)
    assert_removal_is_exact(model, [(stem, [0, 7, 23]), (heads, [2])])


def test_heads_merged_with_an_open_batch_are_heads() -> None:
    body = """
        zero = Constant<value_ints=[0]>() one = Constant<value_ints=[1]>() four = Constant<value_ints=[4]>()
        six = Constant<value_ints=[6]>() seven = Constant<value_ints=[7]>() wide = Constant<value_ints=[24]>()
        five = Constant<value_ints=[5]>() minus = Constant<value_ints=[-1]>()
        xt = Transpose<perm=[1,0,2]>(x) shape = Shape(x) n = Gather(shape, zero) both = Mul(n, four)
        to = Concat<axis=0>(seven, both, six) apart = Concat<axis=0>(n, four, seven, six)
        flat = Concat<axis=0>(minus, wide) back = Concat<axis=0>(seven, n, five)
        [query] q = MatMul(xt, wq) q1 = Reshape(q, to) q2 = Transpose<perm=[1,0,2]>(q1) q3 = Reshape(q2, apart)
        [key] k = MatMul(xt, wk) k1 = Reshape(k, to) k2 = Transpose<perm=[1,0,2]>(k1) k3 = Reshape(k2, apart)
        k4 = Transpose<perm=[0,1,3,2]>(k3)
        [value] v = MatMul(xt, wv) v1 = Reshape(v, to) v2 = Transpose<perm=[1,0,2]>(v1) v3 = Reshape(v2, apart)
        s = MatMul(q3, k4) p = Softmax<axis=-1>(s) o = MatMul(p, v3)
        ot = Transpose<perm=[2,0,1,3]>(o) m = Reshape(ot, flat) z = MatMul(m, wo) zt = Reshape(z, back)
        y = Transpose<perm=[1,0,2]>(zt)
    """
    model = build(TOKENS, body, {"wq": (8, 24), "wk": (8, 24), "wv": (8, 24), "wo": (24, 5)})
    group = only(channel_groups(model).free)
    assert (group.kind, group.units) == ("heads", 4)
    assert_removal_is_exact(model, [(group, [1, 2])])


def test_heads_of_a_product_with_an_open_batch_of_heads_are_heads() -> None:
    """Attention that multiplies [batch * heads, tokens, size] directly."""
    body = """
        zero = Constant<value_ints=[0]>() four = Constant<value_ints=[4]>() six = Constant<value_ints=[6]>()
        seven = Constant<value_ints=[7]>() wide = Constant<value_ints=[24]>() minus = Constant<value_ints=[-1]>()
        five = Constant<value_ints=[5]>()
        xt = Transpose<perm=[1,0,2]>(x) shape = Shape(x) n = Gather(shape, zero) both = Mul(n, four)
        to = Concat<axis=0>(seven, both, six) flat = Concat<axis=0>(minus, wide) back = Concat<axis=0>(seven, n, five)
        [query] q = MatMul(xt, wq) q1 = Reshape(q, to) q2 = Transpose<perm=[1,0,2]>(q1)
        [key] k = MatMul(xt, wk) k1 = Reshape(k, to) k2 = Transpose<perm=[1,2,0]>(k1)
        [value] v = MatMul(xt, wv) v1 = Reshape(v, to) v2 = Transpose<perm=[1,0,2]>(v1)
        s = MatMul(q2, k2) p = Softmax<axis=-1>(s) o = MatMul(p, v2)
        ot = Transpose<perm=[1,0,2]>(o) m = Reshape(ot, flat) z = MatMul(m, wo) zt = Reshape(z, back)
        y = Transpose<perm=[1,0,2]>(zt)
    """
    model = build(TOKENS, body, {"wq": (8, 24), "wk": (8, 24), "wv": (8, 24), "wo": (24, 5)})
    group = only(channel_groups(model).free)
    assert (group.kind, group.units) == ("heads", 4)
    assert_removal_is_exact(model, [(group, [3])])


def test_a_request_with_two_open_sizes_is_merged_with_the_stated_one() -> None:
    body = """
        first = Constant<value_ints=[0]>() second = Constant<value_ints=[1]>() last = Constant<value_ints=[12]>()
        shape = Shape(x) n = Gather(shape, first) t = Gather(shape, second) swapped = Concat<axis=0>(t, n, last)
        [up] a = MatMul(x, w1) b = Transpose<perm=[1,0,2]>(a) c = Reshape(b, swapped) d = Transpose<perm=[1,0,2]>(c)
        y = MatMul(d, w2)
    """
    model = build("(float[N,T,8] x) => (float[N,T,5] y)", body, {"w1": (8, 12), "w2": (12, 5)})
    group = only(channel_groups(model).free)
    assert_removal_is_exact(model, [(group, [0, 11])])
