"""Attention as exporters write it, each as a small graph: name -> text, weights, and what must be found."""

from __future__ import annotations

import numpy as np
from attention_masks import END, HEADS, MASKED, PROJECTED, QKV, SCORES, WEIGHTS, Case, core, ints, number

__all__ = ["CASES", "Case"]

_LAYOUTS: dict[str, Case] = {
    "GQA by Expand": Case(
        core("""
            k5 = Unsqueeze(k, two)
            ke = Expand(k5, repeats)
            kr = Reshape(ke, sizes)
            v5 = Unsqueeze(v, two)
            ve = Expand(v5, repeats)
            vr = Reshape(ve, sizes)
            kt = Transpose<perm=[0,1,3,2]>(kr)
            m = MatMul(q, kt)
            w = Softmax<axis=-1>(m)
            z = MatMul(w, vr)
        """, "float[N,4,T,8] q, float[N,2,T,8] k, float[N,2,T,8] v"),
        {**HEADS, "kv_heads": 2, "key_axes": ("batch", "kv_head", "length", "width")},
        {"two": ints(2), "repeats": ints(1, 1, 2, 1, 1), "sizes": ints(0, 4, -1, 8)},
    ),
    "GQA by Tile and by Concat": Case(
        core("""
            k5 = Unsqueeze(k, two)
            ke = Tile(k5, repeats)
            kr = Reshape(ke, sizes)
            v5 = Unsqueeze(v, two)
            ve = Concat<axis=2>(v5, v5)
            vr = Reshape(ve, sizes)
            kt = Transpose<perm=[0,1,3,2]>(kr)
            m = MatMul(q, kt)
            w = Softmax<axis=-1>(m)
            z = MatMul(w, vr)
        """, "float[N,4,T,8] q, float[N,2,T,8] k, float[N,2,T,8] v"),
        {**HEADS, "kv_heads": 2},
        {"two": ints(2), "repeats": ints(1, 1, 2, 1, 1), "sizes": ints(0, 4, -1, 8)},
    ),
    "GQA by Gather": Case(
        core("""
            kr = Gather<axis=1>(k, each)
            vr = Gather<axis=1>(v, each)
            kt = Transpose<perm=[0,1,3,2]>(kr)
            m = MatMul(q, kt)
            w = Softmax<axis=-1>(m)
            z = MatMul(w, vr)
        """, "float[N,4,T,8] q, float[N,2,T,8] k, float[N,2,T,8] v"),
        {**HEADS, "kv_heads": 2},
        {"each": ints(0, 0, 1, 1)},
    ),
    "heads repeated in another order stay repeated": Case(
        core("""
            kr = Concat<axis=1>(k, k)
            vr = Concat<axis=1>(v, v)
            kt = Transpose<perm=[0,1,3,2]>(kr)
            m = MatMul(q, kt)
            w = Softmax<axis=-1>(m)
            z = MatMul(w, vr)
        """, "float[N,4,T,8] q, float[N,2,T,8] k, float[N,2,T,8] v"),
        {**HEADS},
    ),
    "one head of keys for all queries": Case(
        core(SCORES.replace("s =", "m =") + END, "float[N,4,T,8] q, float[N,1,T,8] k, float[N,1,T,8] v"),
        {**HEADS, "kv_heads": 1},
    ),
    "bmm: samples and heads on one axis": Case(
        PROJECTED.format(inputs="", body="""
            kh = Transpose<perm=[0,2,1,3]>(b4)
            q3 = Reshape(q, rows)
            k3 = Reshape(kh, rows)
            v3 = Reshape(v, rows)
            kt = Transpose<perm=[0,2,1]>(k3)
            m = MatMul(q3, kt)
            w = Softmax<axis=-1>(m)
            z3 = MatMul(w, v3)
            z = Reshape(z3, parted)
        """).replace("N,T", "N,7"),
        {**HEADS, "score_axes": ("batch*head", "length", "length")},
        {**WEIGHTS, "rows": ints(-1, 7, 8), "parted": ints(-1, 4, 7, 8)},
    ),
    "bmm: time first, as torch's own module": Case(
        """m (float[T,N,32] x) => (float[M,T,8] y) {
            k = MatMul(x, wk)
            v = MatMul(x, wv)
            q3 = Reshape(x, rows)
            k3 = Reshape(k, rows)
            v3 = Reshape(v, rows)
            qh = Transpose<perm=[1,0,2]>(q3)
            kt = Transpose<perm=[1,2,0]>(k3)
            vh = Transpose<perm=[1,0,2]>(v3)
            m = MatMul(qh, kt)
            w = Softmax<axis=-1>(m)
            y = MatMul(w, vh)
        }""",
        {**HEADS, "output_axes": ("batch*head", "length", "width")},
        {**WEIGHTS, "rows": ints(0, -1, 8)},
    ),
    "a tracer's length: open, and written into a Reshape all the same": Case(
        """m (float[N,T,32] x) => (float[T,N,32] y) {
            a = MatMul(x, wq)
            b = MatMul(x, wk)
            c = MatMul(x, wv)
            first = Transpose<perm=[1,0,2]>(a)
            second = Transpose<perm=[1,0,2]>(b)
            third = Transpose<perm=[1,0,2]>(c)
            shape = Shape(first)
            samples = Slice(shape, one, two)
            length = Slice(shape, zero, one)
            many = Mul(samples, four)
            size = Concat<axis=0>(length, many, eight)
            traced = Concat<axis=0>(seven, many, eight)
            q3 = Reshape(first, size)
            k3 = Reshape(second, traced)
            v3 = Reshape(third, traced)
            q = Transpose<perm=[1,0,2]>(q3)
            kt = Transpose<perm=[1,2,0]>(k3)
            v = Transpose<perm=[1,0,2]>(v3)
            m = MatMul(q, kt)
            w = Softmax<axis=-1>(m)
            z = MatMul(w, v)
            back = Transpose<perm=[1,0,2]>(z)
            y = Reshape(back, shape)
        }""",
        {**HEADS, "queries": 7, "keys": 7, "same_length": True, "score_axes": ("batch*head", "length", "length")},
        {**WEIGHTS, "zero": ints(0), "one": ints(1), "two": ints(2), "four": ints(4), "seven": ints(7),
         "eight": ints(8)},
    ),
    "torch's own module: masks of samples and heads on one axis": Case(
        """m (float[N,T,32] x, float[N,T] low, float[T,T] later) => (float[N,4,T,8] z) {
            a = MatMul(x, wq)
            a4 = Reshape(a, split)
            q = Transpose<perm=[0,2,1,3]>(a4)
            kt = Transpose<perm=[0,2,3,1]>(a4)
            shape = Shape(x)
            samples = Slice(shape, zero, one)
            length = Slice(shape, one, two)
            many = Mul(samples, four)
            by_key = Concat<axis=0>(samples, one, one, length)
            low4 = Reshape(low, by_key)
            lows = Expand(low4, heads)
            by_row = Concat<axis=0>(many, one, length)
            rows = Reshape(lows, by_row)
            later3 = Unsqueeze(later, zero)
            both = Add(later3, rows)
            apart = Concat<axis=0>(samples, four, minus, length)
            mask = Reshape(both, apart)
            s = MatMul(q, kt)
            m = Add(s, mask)
            w = Softmax<axis=-1>(m)
            z = MatMul(w, q)
        }""",
        {**HEADS, "causal": "unknown", "same_length": True},
        {**WEIGHTS, "zero": ints(0), "one": ints(1), "two": ints(2), "four": ints(4), "minus": ints(-1),
         "heads": ints(1, 4, 1, 1)},
        masks=("add", "add"),
    ),
    "one head without an axis for it": Case(
        core("""
            kt = Transpose<perm=[0,2,1]>(k)
            m = MatMul(q, kt)
            w = Softmax<axis=-1>(m)
            z = MatMul(w, v)
        """, "float[N,T,8] q, float[N,T,8] k, float[N,T,6] v", "float[N,T,6] z"),
        {**HEADS, "heads": 1, "kv_heads": 1, "value_width": 6, "query_axes": ("batch", "length", "width")},
    ),
    "tf2onnx: Einsum": Case(
        core("""
            s = Einsum<equation="bthd,bshd->bhts">(q, k)
            m = Mul(s, half)
            w = Softmax<axis=3>(m)
            z = Einsum<equation="bhts,bshd->bthd">(w, v)
        """, "float[N,T,4,8] q, float[N,S,4,8] k, float[N,S,4,8] v", "float[N,T,4,8] z"),
        {**HEADS, "scale": 0.5, "output_axes": ("batch", "length", "head", "width"), "same_length": False,
         "query_axes": ("batch", "length", "head", "width")},
        {"half": number(0.5)},
    ),
    "scores with keys in front of queries": Case(
        core("""
            qt = Transpose<perm=[0,1,3,2]>(q)
            s = MatMul(k, qt)
            w = Softmax<axis=2>(s)
            vt = Transpose<perm=[0,1,3,2]>(v)
            z = MatMul(vt, w)
        """, output="float[N,4,8,T] z"),
        {**HEADS, "output_axes": ("batch", "head", "width", "length")},
    ),
    "softmax spelled out": Case(
        core(SCORES + """
            top = ReduceMax<axes=[-1]>(s)
            low = Sub(s, top)
            e = Exp(low)
            total = ReduceSum(e, last)
            w = Div(e, total)
            z = MatMul(w, v)
        """),
        {**HEADS},
        {"last": ints(-1)},
    ),
    "an old softmax over the last axis": Case(
        core(SCORES + "w = Softmax<axis=3>(s)\n z = MatMul(w, v)"), {**HEADS}, opset=11
    ),
    "two products make the scores": Case(
        core(SCORES + """
            rt = Transpose<perm=[0,1,3,2]>(r)
            t = MatMul(u, rt)
            m = Add(s, t)
        """ + END, QKV + ", float[N,4,T,8] u, float[N,4,T,8] r"),
        {**HEADS, "causal": "unknown"},
        masks=("add",),
    ),
    "queries that were learned": Case(
        core(SCORES.replace("s =", "m =") + END, "float[N,4,T,8] k, float[N,4,T,8] v", "float[N,4,3,8] z"),
        {**HEADS, "queries": 3, "keys": None, "same_length": False},
        {"q": np.random.default_rng(1).standard_normal((1, 4, 3, 8)).astype(np.float32)},
    ),
}  # fmt: skip

CASES = MASKED | _LAYOUTS
