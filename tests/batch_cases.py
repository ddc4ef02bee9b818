"""Small models with an open batch: in some samples stay apart, in the others they do not.

Lines are separated by semicolons; `{1, 2}` is a list of integers, `scalar 1` an integer, `sizes` the first two sizes of
the input as `n` and `t`, and `numbers` the numbers of the samples as `r`.
"""

from __future__ import annotations

import re

import onnx_ir as ir
from small_models import Shape, build

__all__ = ["APART", "MIXED", "Case", "model_of"]

Case = tuple[str, str, dict[str, Shape], int]

_TOKENS = "(float[N,6,8] x) => (float[N,6,8] y)"
_ROWS = "(float[N,6] x) => (float[N,6] y)"
_IMAGE = "(float[N,4,8,8] x) => (float[N,4,8,8] y)"
_ANY = "(float[N,6] x) => (y)"
_SHORT = {
    "numbers": "z0 = scalar 0; o1 = scalar 1; nn = Squeeze(n); r = Range(z0, nn, o1)",
    "sizes": "s = Shape(x); zero = {0}; one = {1}; n = Gather(s, zero); t = Gather(s, one)",
    "branches": (
        "<then_branch = t () => (float[N,6] a) { a = Relu(x) }, else_branch = e () => (float[N,6] b) { b = Neg(x) }>"
    ),
}


def _case(signature: str, body: str, opset: int = 17, **weights: Shape) -> Case:
    return signature, body, weights, opset


def model_of(case: Case) -> ir.Model:
    """The model of a case."""
    signature, body, weights, opset = case
    for word, text in _SHORT.items():
        body = re.sub(rf"\b{word}\b", text, body)
    body = re.sub(r"scalar (\d+)", r"Constant<value = int64 {\1}>()", body)
    body = re.sub(r"= (\{([-\d]+(?:, [-\d]+)*)\})", _list, body)
    return build(signature, body.replace(";", "\n"), weights, opset)


def _list(found: re.Match[str]) -> str:
    return f"= Constant<value = int64[{len(found[2].split(','))}] {found[1]}>()"


APART: dict[str, Case] = {
    "layers over images": _case(
        _IMAGE,
        "c = Conv<pads=[1,1,1,1]>(x, w); r = Relu(c); p = MaxPool<kernel_shape=[3,3],pads=[1,1,1,1]>(r); "
        "g = GlobalAveragePool(p); m = Mul(r, g); y = Add(m, b)",
        w=(4, 4, 3, 3),
        b=(4, 1, 1),
    ),
    "heads of attention by computed sizes": _case(
        _TOKENS,
        "sizes; f = {2, 4}; to = Concat<axis=0>(n, t, f); h = Reshape(x, to); "
        "q = Transpose<perm=[0,2,1,3]>(h); k = Transpose<perm=[0,2,3,1]>(h); a = MatMul(q, k); "
        "p = Softmax(a); o = MatMul(p, q); u = Transpose<perm=[0,2,1,3]>(o); w8 = {8}; "
        "back = Concat<axis=0>(n, t, w8); y = Reshape(u, back)",
    ),
    "heads of all samples along one axis": _case(
        _TOKENS,
        "sizes; two = {2}; f = {4}; e = {8}; m = Mul(n, two); split = Concat<axis=0>(n, t, two, f); "
        "h = Reshape(x, split); q = Transpose<perm=[0,2,1,3]>(h); to = Concat<axis=0>(m, t, f); "
        "r = Reshape(q, to); k = Transpose<perm=[0,2,1]>(r); a = MatMul(r, k); o = MatMul(a, r); "
        "apart = Concat<axis=0>(n, two, t, f); u = Reshape(o, apart); v = Transpose<perm=[0,2,1,3]>(u); "
        "back = Concat<axis=0>(n, t, e); y = Reshape(v, back)",
    ),
    "tokens of all samples as rows": _case(
        _TOKENS,
        "r = {-1, 8}; f = Reshape(x, r); g = Gemm(f, w, b); b3 = {-1, 6, 8}; y = Reshape(g, b3)",
        w=(8, 8),
        b=(8,),
    ),
    "a token that is the same for all": _case(
        "(float[N,6,8] x) => (float[N,7,8] y)",
        "sizes; o = {1, 8}; to = Concat<axis=0>(n, o); c = Expand(w, to); y = Concat<axis=1>(c, x)",
        w=(1, 1, 8),
    ),
    "samples along the second axis": _case(
        "(float[5,batch,4] x, float[1,batch,3] h) => (float[5,1,batch,3] y, float[1,batch,3] z)",
        "y, z = GRU<hidden_size=3>(x, w, r, , , h)",
        w=(1, 9, 4),
        r=(1, 9, 3),
    ),
    "a state of zeros": _case(
        "(float[N,5,4] x) => (float[1,N,3] z)",
        "sizes; o = {1}; h = {3}; to = Concat<axis=0>(o, n, h); s0 = ConstantOfShape(to); "
        "u = Transpose<perm=[1,0,2]>(x); , z, c = LSTM<hidden_size=3>(u, w, r, , , s0, s0)",
        w=(1, 12, 4),
        r=(1, 12, 3),
    ),
    "an index with the numbers of samples": _case(
        "(float[N,6] x) => (float[N,1,6] y)",
        "sizes; z0 = scalar 0; o1 = scalar 1; nn = Squeeze(n); tt = Squeeze(t); b = Range(z0, nn, o1); "
        "k = Range(z0, tt, o1); a12 = {1, 2}; a01 = {0, 1}; b3 = Unsqueeze(b, a12); "
        "k3 = Unsqueeze(k, a01); m = Max(b3, k3); full = Shape(m); be = Expand(b3, full); "
        "ke = Expand(k3, full); last = {-1}; b4 = Unsqueeze(be, last); k4 = Unsqueeze(ke, last); "
        "i = Concat<axis=-1>(b4, k4); y = GatherND(x, i)",
    ),
    "sizes from the input": _case(
        _IMAGE,
        "s = Shape(x); a = {0}; e = {2}; f = Slice(s, a, e); g = {16, 16}; to = Concat<axis=0>(f, g); "
        'r = Resize<mode="nearest">(x, , , to); y = AveragePool<kernel_shape=[2,2],strides=[2,2]>(r)',
    ),
    "moves": _case(
        "(float[N,6] x) => (float[4,1,N] y)",
        "p = {0, 1, 0, 1}; a = Pad(x, p); st = {0, 1}; en = {2147483647, 5}; b = Slice(a, st, en); "
        "c = Transpose<perm=[1,0]>(b); i1 = {1}; y = Unsqueeze(c, i1)",
    ),
    "an einsum and the best entries": _case(
        "(float[N,6] x) => (int64[N,2] i, float[6,N] y)",
        'k = {2}; v, i = TopK(x, k); y = Einsum<equation="nt,to->on">(x, w)',
        w=(6, 6),
    ),
    "a branch that is the same for all": _case("(float[N,6] x, bool[1] c) => (float[N,6] y)", "y = If (c) branches"),
    "a mean over another axis": _case(_ANY, "m = ReduceMean<axes=[1],keepdims=0>(x); y = Exp(m)"),
    "norms": _case(
        _IMAGE,
        "i = InstanceNormalization(x, w, b); l = LayerNormalization<axis=1>(i, g); "
        "y = BatchNormalization(l, w, b, w, var)",
        w=(4,),
        b=(4,),
        g=(4, 8, 8),
        var=(4,),
    ),
    "windows of all samples": _case(
        _IMAGE,
        "sizes; d = {4, 2, 4, 2, 4}; to = Concat<axis=0>(n, d); a = Reshape(x, to); "
        "b = Transpose<perm=[0,2,4,1,3,5]>(a); f = {4}; m = Mul(n, f); e = {4, 16}; "
        "w1 = Concat<axis=0>(m, e); c = Reshape(b, w1); s2 = Softmax(c); q = Shape(s2); "
        "q0 = Gather(q, zero); k = Div(q0, f); g = {2, 2, 4, 4, 4}; h = Concat<axis=0>(k, g); "
        "l = Reshape(s2, h); o = Transpose<perm=[0,3,1,4,2,5]>(l); y = Reshape(o, s)",
    ),
}
"""Models in which samples stay apart, by what they show."""

MIXED: dict[str, tuple[Case, str]] = {
    "a mean over samples": (_case(_ROWS, "m = ReduceMean<axes=[0]>(x); y = Sub(x, m)"), "ReduceMean"),
    "a mean over everything": (_case(_ROWS, "m = ReduceMean(x); y = Sub(x, m)"), "reduces along the batch"),
    "softmax over samples": (_case(_ROWS, "y = Softmax<axis=0>(x)"), "works along the batch"),
    "a running sum": (_case(_ROWS, "z = scalar 0; y = CumSum(x, z)"), "works along the batch"),
    "the best sample": (_case(_ANY, "y = ArgMax<axis=0>(x)"), "reduces along the batch"),
    "the best samples": (_case(_ANY, "k = {1}; y, i = TopK<axis=0>(x, k)"), "works along the batch"),
    "the first sample": (_case(_ROWS, "z = {0}; f = Gather<axis=0>(x, z); y = Sub(x, f)"), "Gather"),
    "samples backwards": (
        _case(_ROWS, "a = {-1}; e = {-9223372036854775807}; z = {0}; y = Slice(x, a, e, z, a)"),
        "takes some of the samples",
    ),
    "all but the first": (
        _case(_ANY, "a = {1}; e = {2147483647}; z = {0}; y = Slice(x, a, e, z)"),
        "some of the samples",
    ),
    "a product of samples": (_case(_ANY, "u = Transpose(x); y = MatMul(x, u)"), "multiplies samples"),
    "a sum over samples": (_case(_ANY, "u = Transpose(x); y = MatMul(u, x)"), "sums over the batch"),
    "a sum of letters": (_case(_ANY, 'y = Einsum<equation="nt,nt->t">(x, x)'), "sums over the batch"),
    "pairs of samples": (
        _case("(float[N] x) => (y)", "z = {0}; o = {1}; a = Unsqueeze(x, z); b = Unsqueeze(x, o); y = Sub(a, b)"),
        "different axes",
    ),
    "another order of entries": (_case(_ROWS, "a = {6, -1}; b = Reshape(x, a); y = Transpose(b)"), "whole samples"),
    "a turned batch in one row": (_case(_ANY, "u = Transpose(x); a = {-1}; y = Reshape(u, a)"), "whole samples"),
    "a constant for the rows of one sample": (
        _case(_ANY, "a = {-1}; b = Reshape(x, a); y = Mul(b, w)", w=(6,)),
        "6 entries along the batch",
    ),
    "a fixed size": (_case(_ANY, "a = {1, 6}; y = Reshape(x, a)"), "fixes the size of the batch"),
    "a scale from all samples": (
        _case(_ANY, "q, s, z = DynamicQuantizeLinear(x); y = DequantizeLinear(q, s, z)"),
        "scale",
    ),
    "the size as a number": (
        _case(_ROWS, "sizes; f = Cast<to=1>(n); y = Mul(x, f)"),
        "computes with the size of the batch",
    ),
    "the total as a number": (_case(_ROWS, "n = Size(x); f = Cast<to=1>(n); y = Div(x, f)"), "size of the batch"),
    "the number of a sample": (
        _case(_ROWS, "sizes; numbers; f = Cast<to=1>(r); c = Unsqueeze(f, one); y = Add(x, c)"),
        "numbers of samples",
    ),
    "a row by the number of a sample": (
        _case(_ROWS, "sizes; numbers; f = Gather(w, r); y = Add(x, f)", w=(16, 6)),
        "numbers of samples",
    ),
    "a column by the number of a sample": (
        _case(_ANY, "sizes; numbers; u = Unsqueeze(r, one); i = Concat<axis=1>(u, u); y = GatherND(x, i)"),
        "GatherND",
    ),
    "the next sample": (
        _case(_ANY, "sizes; numbers; m = Neg(r); k = Sub(m, o1); y = Gather(x, k)"),
        "Gather|numbers of samples",
    ),
    "a branch by the size": (
        _case(_ROWS, "sizes; c = Equal(n, one); y = If (c) branches"),
        "computes with the size of the batch",
    ),
    "a branch by the samples": (
        _case(
            _ROWS,
            "m = ReduceMax<keepdims=0>(x); z = Constant<value = float {0}>(); c = Greater(m, z); y = If (c) branches",
        ),
        "reduces along the batch",
    ),
    "statistics of training": (
        _case(
            "(float[N,4] x) => (y)", "y, a, b = BatchNormalization<training_mode=1>(x, w, w, w, var)", w=(4,), var=(4,)
        ),
        "all samples together",
    ),
    "a convolution over the batch": (
        _case("(float[1,4,batch] x) => (y)", "y = Conv<pads=[1,1]>(x, w)", w=(4, 4, 3)),
        "as they lie",
    ),
    "weights from each sample": (
        _case("(float[N,4,3] x) => (y)", "y = Conv(w, x)", w=(1, 4, 8)),
        "takes 'x' from each sample",
    ),
    "an output that is always the same": (_case(_ANY, "y = Relu(w)", w=(2, 6)), "same for every batch"),
    "the size as an output": (_case(_ANY, "y = Shape(x)"), "same for every batch"),
    "samples that are there more than once": (_case(_ANY, "a = {2, 1}; y = Tile(x, a)"), "repeats samples"),
    "another axis of one entry": (_case("(float[N,1] x) => (y)", "y = Squeeze(x)"), "drop the axis"),
    "what is not zero": (_case(_ANY, "y = NonZero(x)"), "NonZero"),
    "places in the whole batch": (
        _case("(float[N,2,4] x) => (y, i)", "y, i = MaxPool<kernel_shape=[2]>(x)"),
        "gives more than",
    ),
    "rows before the batch": (_case(_ANY, "p = {1, 0, 0, 0}; y = Pad(x, p)"), "pads the batch"),
    "a constant beside samples": (_case(_ANY, "y = Concat<axis=0>(x, w)", w=(1, 6)), "joins"),
    "two halves of the batch": (_case(_ANY, "a, b = Split<axis=0>(x); y = Add(a, b)"), "works along the batch"),
    "random numbers": (_case(_ROWS, "r = RandomNormalLike(x); y = Add(x, r)"), "random"),
    "a triangle over samples": (_case(_ANY, "y = Trilu(x)"), "works along the batch"),
    "everything in one row": (_case(_ANY, "f = Flatten<axis=0>(x); y = Softmax(f)"), "works along the batch"),
    "a norm over the batch": (
        _case("(float[N,4,3,3] x) => (y)", "y = MeanVarianceNormalization(x)"),
        "works along the batch",
    ),
}
"""Models in which they do not, and what the reason says."""
