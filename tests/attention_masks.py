"""Attention as exporters write it, each as a small graph: scales, masks and biases."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx_ir as ir
from text_models import build

__all__ = ["END", "HEADS", "MASKED", "PROJECTED", "QKV", "SCORES", "WEIGHTS", "Case", "core", "ints", "number"]

Array = np.ndarray[Any, np.dtype[Any]]
I64 = np.int64


@dataclass(frozen=True)
class Case:
    """One way to write attention.

    Attributes:
        text: The graph.
        weights: Its constants.
        expected: Attributes of the block that must be found.
        opset: Operator set.
        masks: Kinds of its masks, `causal` behind those that say nothing else.
    """

    text: str
    expected: dict[str, object]
    weights: dict[str, Array] = field(default_factory=dict)
    opset: int = 17
    masks: tuple[str, ...] = ()

    def model(self) -> ir.Model:
        return build(self.text, self.opset, **self.weights)


def ints(*numbers: int) -> Array:
    return np.array(numbers, I64)


def number(number: float) -> Array:
    return np.array(number, np.float32)


QKV = "float[N,4,T,8] q, float[N,4,T,8] k, float[N,4,T,8] v"
_SHAPES = {"split": ints(0, 0, 4, 8), "flat": ints(0, 0, 32)}
_TRIANGLE = np.where(np.tri(64, dtype=bool), 0, -1e9).astype(np.float32)
_SEEN = np.tri(64, dtype=bool)[None, None]
HEADS = {"heads": 4, "kv_heads": 4, "width": 8, "value_width": 8, "dropped": "", "form": "products"}

PROJECTED = """m (float[N,T,32] x{inputs}) => (float[N,T,32] y) {{
    a = MatMul(x, wq)
    b = MatMul(x, wk)
    c = MatMul(x, wv)
    a4 = Reshape(a, split)
    b4 = Reshape(b, split)
    c4 = Reshape(c, split)
    q = Transpose<perm=[0,2,1,3]>(a4)
    v = Transpose<perm=[0,2,1,3]>(c4)
    {body}
    back = Transpose<perm=[0,2,1,3]>(z)
    y = Reshape(back, flat)
}}"""
WEIGHTS = {**{name: np.random.default_rng(3).standard_normal((32, 32)).astype(np.float32) / 4
               for name in ("wq", "wk", "wv")}, **_SHAPES}  # fmt: skip


def core(body: str, inputs: str = QKV, output: str = "float[N,4,T,8] z") -> str:
    return f"m ({inputs}) => ({output}) {{ {body} }}"


_POSITIONS = """
    shape = Shape(q)
    length = Gather(shape, two)
    line = Range(zero, length, one)
    columns = Unsqueeze(line, front)
    rows = Unsqueeze(line, back)
"""
_RANGES = {"two": np.array(2, I64), "zero": np.array(0, I64), "one": np.array(1, I64), "front": ints(0, 1, 2),
           "back": ints(0, 1, 3)}  # fmt: skip
SCORES = "kt = Transpose<perm=[0,1,3,2]>(k)\n s = MatMul(q, kt)\n"
END = "w = Softmax<axis=-1>(m)\n z = MatMul(w, v)"

MASKED: dict[str, Case] = {
    "script: divided, a padding mask of -10000": Case(
        PROJECTED.format(inputs=", int64[N,T] padding", body="""
            kt = Transpose<perm=[0,2,3,1]>(b4)
            raw = MatMul(q, kt)
            s = Div(raw, root)
            present = Cast<to=1>(padding)
            absent = Sub(unit, present)
            wide = Unsqueeze(absent, axes)
            mask = Mul(wide, low)
            m = Add(s, mask)
            w = Softmax<axis=-1>(m)
            z = MatMul(w, v)
        """),
        {**HEADS, "causal": "no", "scale": 1 / np.sqrt(8), "query_axes": ("batch", "length", "head", "width"),
         "key_axes": ("batch", "length", "head", "width"), "same_length": True, "queries": None},
        {**WEIGHTS, "root": number(np.sqrt(8)), "unit": number(1), "low": number(-10000), "axes": ints(1, 2)},
        masks=("add",),
    ),
    "dynamo: a root of the scale on both sides, keys flattened, a guard against NaN": Case(
        PROJECTED.format(inputs=", bool[N,1,1,T] padding", body="""
            kh = Transpose<perm=[0,2,1,3]>(b4)
            shape = Shape(kh)
            long = Gather(shape, two)
            size = Concat<axis=0>(minus, long, eight)
            flatk = Reshape(kh, size)
            turned = Transpose<perm=[0,2,1]>(flatk)
            whole = Concat<axis=0>(same, eight, long)
            kt = Reshape(turned, whole)
            qs = Mul(q, root)
            ks = Mul(kt, root)
            s = MatMul(qs, ks)
            mask = Where(padding, nothing, low)
            m = Add(s, mask)
            p = Softmax<axis=-1>(m)
            bad = IsNaN(p)
            w = Where(bad, nothing, p)
            z = MatMul(w, v)
        """),
        {**HEADS, "causal": "no", "scale": 8**-0.5, "zero_rows": True, "same_length": True,
         "key_axes": ("batch", "length", "head", "width")},
        {**WEIGHTS, "root": number(8**-0.25), "nothing": number(0), "low": number(-np.inf), "two": ints(2),
         "minus": ints(-1), "eight": ints(8), "same": ints(-1, 4)},
        masks=("keep",),
    ),
    "a scale from the shape": Case(
        core("""
            shape = Shape(q)
            last = Gather(shape, minus)
            wide = Cast<to=1>(last)
            root = Sqrt(wide)
        """ + SCORES + "m = Div(s, root)\n" + END),
        {**HEADS, "scale": 8**-0.5, "causal": "no"},
        {"minus": np.array(-1, I64)},
    ),
    "positions compared, with padding, as transformers does": Case(
        core(_POSITIONS + """
            order = LessOrEqual(columns, rows)
            both = And(order, padding)
            large = Expand(both, sizes)
            mask = Where(large, nothing, low)
        """ + SCORES + "m = Add(s, mask)\n" + END, QKV + ", bool[N,1,1,T] padding"),
        {**HEADS, "causal": "yes", "past": False},
        {**_RANGES, "sizes": ints(1, 4, 1, 1), "nothing": number(0), "low": number(-3.4028235e38)},
        masks=("keep",),
    ),
    "hidden where a key comes later": Case(
        core(_POSITIONS + "later = Greater(columns, rows)\n" + SCORES + "m = Where(later, low, s)\n" + END),
        {**HEADS, "causal": "yes"},
        {**_RANGES, "low": number(-1e4)},
        masks=("keep causal",),
    ),
    "a window of positions is no order": Case(
        core(_POSITIONS + """
            order = LessOrEqual(columns, rows)
            behind = Sub(rows, width)
            near = Greater(columns, behind)
            both = And(order, near)
        """ + SCORES + "m = Where(both, s, low)\n" + END),
        {**HEADS, "causal": "yes"},
        {**_RANGES, "width": ints(3), "low": number(-np.inf)},
        masks=("keep",),
    ),
    "positions that see one key ahead": Case(
        core(_POSITIONS + "far = Add(rows, ahead)\n order = LessOrEqual(columns, far)\n" + SCORES
              + "m = Where(order, s, low)\n" + END),
        {**HEADS, "causal": "unknown"},
        {**_RANGES, "ahead": ints(1), "low": number(-np.inf)},
        masks=("keep",),
    ),
    "a triangle of -inf": Case(
        core("""
            shape = Shape(q)
            length = Slice(shape, two, three)
            square = Concat<axis=0>(length, length)
            full = Expand(low, square)
            mask = Trilu<upper=1>(full, above)
        """ + SCORES + "m = Add(s, mask)\n" + END),
        {**HEADS, "causal": "yes"},
        {"two": ints(2), "three": ints(3), "low": number(-np.inf), "above": np.array(1, I64)},
        masks=("add causal",),
    ),
    "a triangle of ones": Case(
        core("""
            shape = Shape(q)
            length = Slice(shape, two, three)
            square = Concat<axis=0>(length, length)
            full = Expand(yes, square)
            lower = Trilu<upper=0>(full)
            order = Cast<to=9>(lower)
        """ + SCORES + "m = Where(order, s, low)\n" + END),
        {**HEADS, "causal": "yes"},
        {"two": ints(2), "three": ints(3), "yes": np.array(1, np.int32), "low": number(-1e9)},
        masks=("keep causal",),
    ),
    "a corner of a stored mask": Case(
        core("""
            shape = Shape(q)
            length = Slice(shape, two, three)
            some = Slice(stored, zero, length, zero, one)
            mask = Slice(some, zero, length, one, one)
        """ + SCORES + "m = Add(s, mask)\n" + END),
        {**HEADS, "causal": "yes"},
        {"two": ints(2), "three": ints(3), "zero": ints(0), "one": ints(1), "stored": _TRIANGLE},
        masks=("add causal",),
    ),
    "GPT-2: rows of a stored triangle behind a cache": Case(
        core("""
            keys = Concat<axis=2>(old, k)
            kt = Transpose<perm=[0,1,3,2]>(keys)
            values = Concat<axis=2>(old_v, v)
            kshape = Shape(keys)
            qshape = Shape(q)
            nk = Slice(kshape, two, three)
            nq = Slice(qshape, two, three)
            first = Sub(nk, nq)
            some = Slice(stored, first, nk, two, one)
            order = Slice(some, zero, nk, three, one)
            s = MatMul(q, kt)
            m = Where(order, s, low)
            w = Softmax<axis=-1>(m)
            z = MatMul(w, values)
        """, QKV + ", float[N,4,P,8] old, float[N,4,P,8] old_v"),
        {**HEADS, "causal": "yes", "past": True, "same_length": False},
        {"two": ints(2), "three": ints(3), "zero": ints(0), "one": ints(1), "stored": _SEEN, "low": number(-1e4)},
        masks=("keep causal",),
    ),
    "Swin: a bias of its own for each pair": Case(
        core(SCORES + "m = Add(s, bias)\n" + END, QKV.replace("T", "5"), "float[N,4,5,8] z"),
        {**HEADS, "causal": "no", "queries": 5, "keys": 5},
        {"bias": np.random.default_rng(1).standard_normal((1, 4, 5, 5)).astype(np.float32)},
        masks=("add",),
    ),
    "T5: a bias from a table, hidden by padding": Case(
        core(_POSITIONS + """
            flat_rows = Squeeze(rows, front_two)
            flat_columns = Squeeze(columns, front_two)
            away = Sub(flat_columns, flat_rows)
            low_end = Max(away, least)
            bucket = Min(low_end, most)
            index = Add(bucket, most)
            rowed = Gather(table, index)
            headed = Transpose<perm=[2,0,1]>(rowed)
            bias = Unsqueeze(headed, start)
            mask = Where(padding, bias, low)
        """ + SCORES + "m = Add(s, mask)\n" + END, QKV + ", bool[N,1,1,T] padding"),
        {**HEADS, "causal": "no", "scale": 1.0},
        {**_RANGES, "front_two": ints(0, 1), "least": ints(-2), "most": ints(2), "start": ints(0),
         "table": np.random.default_rng(2).standard_normal((5, 4)).astype(np.float32),
         "low": number(-3.4028235e38)},
        masks=("add", "keep"),
    ),
    "scores capped": Case(
        core(SCORES + """
            scaled = Mul(s, half)
            small = Div(scaled, cap)
            bent = Tanh(small)
            m = Mul(bent, cap)
        """ + END),
        {**HEADS, "scale": 0.5, "softcap": 3.0, "causal": "no"},
        {"half": number(0.5), "cap": number(3)},
    ),
}  # fmt: skip
