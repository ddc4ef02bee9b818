"""How samples lie in the outputs of operators that compute, by how they lie in the inputs.

A rule is correct if the operator computes sample b of its outputs from sample b of its inputs, for every size of the
batch; where that is not so, or is not certain, it raises `MixedError`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

from graphopt_backends._einsum import letters
from graphopt_backends.batch.site import MixedError, Rule, Site

__all__ = ["LAYERS"]

_FIRST: Mapping[int, int] = {0: 0}
_NONE: Mapping[int, int] = {}

# ---------------------------------------------------------------- elements


def _aligned(site: Site, indices: Iterable[int]) -> int:
    """Axis of the samples, counted from the end, in operands that are broadcast."""
    found: set[tuple[int, int]] = set()
    rest: list[int] = []
    for i in indices:
        axis = site.axis(i)
        if axis is not None:
            found.add((axis - site.rank(i), site.share(i)))
        elif site.given(i):
            rest.append(i)
    if len(found) != 1:
        raise MixedError("combines samples that lie along different axes")
    axis = found.pop()[0]
    for i in rest:
        if site.rank(i) >= -axis and site.shape(i)[axis] != 1:
            raise MixedError(f"takes {site.inputs[i].name!r}, which has {site.shape(i)[axis]} entries along the batch")
    return axis


def _elementwise(site: Site) -> Sequence[int]:
    indices = range(len(site.inputs))
    axis = _aligned(site, indices)
    return [axis + max(site.rank(i) for i in indices if site.given(i))]


def _first_alone(site: Site) -> Sequence[int | None]:
    site.only(0)
    return [site.axis(0)]


def _dropout(site: Site) -> Sequence[int | None]:
    if site.given(2) and site.numbers(2) != (False,):
        raise MixedError("draws random numbers")
    return _first_alone(site)


def _quantize(site: Site) -> Sequence[int | None]:
    site.only(0)
    if math.prod(site.shape(1)) > 1:
        if site.rank(1) > 1:
            raise MixedError("has a scale for each block")
        site.beside(site.integer("axis", 1))
    return [site.axis(0)]


# ---------------------------------------------------------------- one sample after the other


def _each(axes: Mapping[int, int] = _FIRST, outputs: Sequence[int] = (0,), shared: Mapping[int, int] = _NONE) -> Rule:
    """An operator that works on samples one by one.

    Args:
        axes: Axis of the samples in the inputs that have them.
        outputs: Axis of the samples in the outputs.
        shared: Rank of inputs that may be the same for all samples, and begin with the axis of samples if not.
    """

    def rule(site: Site) -> Sequence[int]:
        site.only(*axes, *shared)
        found = [i for i in axes if site.given(i)]
        if any(site.axis(i) != axes[i] for i in found) or len({site.share(i) for i in found}) != 1:
            raise MixedError("does not take its samples as they lie")
        for i, rank in shared.items():
            if site.axis(i) is not None:
                if site.axis(i) != 0 or site.rank(i) != rank or site.share(i) != site.share(found[0]):
                    raise MixedError(f"takes {site.inputs[i].name!r}, which does not lie as its samples do")
            elif site.given(i) and site.rank(i) >= rank and site.shape(i)[0] != 1:
                raise MixedError(f"takes {site.inputs[i].name!r}, which has {site.shape(i)[0]} entries along the batch")
        return outputs

    return rule


def _batch_norm(site: Site) -> Sequence[int | None]:
    if site.integer("training_mode", 0):
        raise MixedError("takes mean and variance of all samples together")
    return _each()(site)


def _recurrent(*states: int) -> Rule:
    def rule(site: Site) -> Sequence[int | None]:
        first = site.integer("layout", 0) == 0
        axes = {0: int(first), 4: 0, **dict.fromkeys(states, int(first))}
        return _each(axes, (2, 1, 1) if first else (0, 0, 0))(site)

    return rule


def _rotary(site: Site) -> Sequence[int | None]:
    """Positions of a sample choose rows of the tables; without them each sample has tables of its own."""
    return _each({0: 0}, shared={3: 2} if site.given(3) else {1: 3, 2: 3})(site)


# ---------------------------------------------------------------- along an axis


def _along(default: int, outputs: int = 1, name: str = "axis") -> Rule:
    def rule(site: Site) -> Sequence[int]:
        site.only(0)
        return [site.beside(site.integer(name, default))] * outputs

    return rule


def _behind(default: int, indices: Sequence[int] = (0,), outputs: int = 1) -> Rule:
    """Works along an axis and all behind it."""

    def rule(site: Site) -> Sequence[int]:
        site.only(*indices)
        axis = _aligned(site, indices) + site.rank(0)
        start = site.integer("axis", default)
        if axis < 0 or axis >= (start + site.rank(0) if start < 0 else start):
            raise MixedError("works along the batch")
        return [axis] * outputs

    return rule


def _cumulative(site: Site) -> Sequence[int]:
    site.only(0)
    return [site.beside((site.numbers(1) or (0,))[0])]


def _reduce(site: Site) -> Sequence[int]:
    site.only(0)
    rank, own = site.rank(0), site.axis(0)
    axes = site.axes(1, rank)
    if not axes:
        if site.integer("noop_with_empty_axes", 0):
            return [own or 0]
        axes = list(range(rank))
    return _reduced(site, axes)


def _index(site: Site) -> Sequence[int]:
    return _reduced(site, [site.integer("axis", 0) % site.rank(0)])


def _mean(site: Site) -> Sequence[int]:
    site.only(0)
    return _reduced(site, site.axes(len(site.inputs), site.rank(0)) or list(range(site.rank(0))))


def _mean_variance(site: Site) -> Sequence[int | None]:
    for axis in site.node.attributes.get_ints("axes", (0, 2, 3)):
        site.beside(axis)
    return _first_alone(site)


def _reduced(site: Site, axes: Sequence[int]) -> Sequence[int]:
    own = site.axis(0)
    if own is None or own in axes:
        raise MixedError("reduces along the batch")
    return [own if site.integer("keepdims", 1) else own - sum(axis < own for axis in axes)]


def _of_matrices(site: Site) -> Sequence[int]:
    """Works on the last two axes."""
    site.only(0)
    own = site.axis(0) or 0
    if own >= site.rank(0) - 2:
        raise MixedError("works along the batch")
    return [own]


# ---------------------------------------------------------------- products


def _matmul(left: int = 0, right: int = 1) -> Rule:
    def rule(site: Site) -> Sequence[int]:
        site.only(left, right)
        if site.integer("transBatchA", 0) or site.integer("transBatchB", 0):
            raise MixedError("swaps axes of its operands")
        ranks = site.rank(left), site.rank(right)
        if ranks[1] == 1 and site.axis(right) is None:
            return [site.beside(-1, left)]
        if min(ranks) == 1:
            raise MixedError("multiplies a vector")
        row, column = _seen(site, left, "transA"), _seen(site, right, "transB")
        if row == -1 or column == -2:
            raise MixedError("sums over the batch")
        if (row, column) in ((-2, None), (None, -1)):
            return [max(ranks) + (-1 if row is None else -2)]
        if row == -2 or column == -1:
            raise MixedError("multiplies samples with one another")
        return [max(ranks) + _aligned(site, (left, right))]

    return rule


def _seen(site: Site, index: int, swap: str) -> int | None:
    """Axis of the samples, counted from the end, in an operand whose last two axes an attribute may swap."""
    axis = site.axis(index)
    if axis is None:
        return None
    axis -= site.rank(index)
    return -3 - axis if axis >= -2 and site.integer(swap, 0) else axis


def _gemm(*added: int) -> Rule:
    """Rows of the left operand are samples; what is added has a row for each, or one for all."""

    def rule(site: Site) -> Sequence[int]:
        site.only(0, *added)
        if site.axis(0) != site.integer("transA", 0):
            raise MixedError("sums over the batch")
        for i in added:
            if site.axis(i) is not None:
                if site.axis(i) != site.rank(i) - 2 or site.share(i) != site.share(0):
                    raise MixedError(f"adds {site.inputs[i].name!r}, which does not lie as its samples do")
            elif site.given(i) and site.rank(i) > 1 and site.shape(i)[0] != 1:
                raise MixedError(f"adds {site.inputs[i].name!r}, which has {site.shape(i)[0]} rows")
        return [0]

    return rule


def _packed(site: Site) -> Sequence[int]:
    site.only(0)
    return [site.beside(-1)]


def _einsum(site: Site) -> Sequence[int]:
    shapes = [site.shape(i) for i in range(len(site.inputs))]
    equation = site.node.attributes.get_string("equation", "").replace(" ", "")
    terms, result = letters(equation, shapes)
    if len(terms) != len(shapes) or any(len(set(term)) != len(term) for term in (*terms, result)):
        raise MixedError("is not followed")
    found = {(terms[i][axis], site.share(i)) for i in range(len(terms)) if (axis := site.axis(i)) is not None}
    letter = found.pop()[0]
    whole = all(letter not in term or site.axis(i) == term.index(letter) for i, term in enumerate(terms))
    if found or not whole or letter not in result:
        raise MixedError("sums over the batch, or combines samples that lie along different axes")
    return [result.index(letter)]


# ---------------------------------------------------------------- tables

_ELEMENTWISE = """
    Abs Acos Acosh Add And Asin Asinh Atan Atanh BitShift BitwiseAnd BitwiseNot BitwiseOr BitwiseXor Cast Ceil Celu Clip
    Cos Cosh Div Elu Equal Erf Exp Floor Gelu Greater GreaterOrEqual HardSigmoid HardSwish Identity IsInf IsNaN
    LeakyRelu Less LessOrEqual Log Max Mean Min Mish Mod Mul Neg Not Or PRelu Pow Reciprocal Relu Round Selu Shrink
    Sigmoid Sign Sin Sinh Softplus Softsign Sqrt Sub Sum Swish Tan Tanh ThresholdedRelu Where Xor
"""
_REDUCTIONS = "L1 L2 LogSum LogSumExp Max Mean Min Prod Sum SumSquare"
_BY_SAMPLE = """
    AveragePool Col2Im Conv ConvInteger ConvTranspose DepthToSpace GlobalAveragePool GlobalLpPool GlobalMaxPool
    GroupNormalization InstanceNormalization LRN LpPool MaxPool QLinearConv SpaceToDepth
"""
_FUSED_ELEMENTWISE = """
    BiasAdd BiasGelu FastGelu Gelu QLinearAdd QLinearLeakyRelu QLinearMul QLinearSigmoid QLinearWhere QuickGelu
"""
_FUSED_BY_SAMPLE = """
    GroupNorm QLinearAveragePool QLinearConv QLinearGlobalAveragePool
"""
LAYERS: Mapping[str, Rule] = {
    **dict.fromkeys(_ELEMENTWISE.split(), _elementwise),
    **dict.fromkeys(_BY_SAMPLE.split(), _each()),
    **{f"Reduce{name}": _reduce for name in _REDUCTIONS.split()},
    **{f"com.microsoft.{name}": _elementwise for name in _FUSED_ELEMENTWISE.split()},
    **{f"com.microsoft.{name}": _each() for name in _FUSED_BY_SAMPLE.split()},
    "ArgMax": _index,
    "ArgMin": _index,
    "Attention": _each(dict.fromkeys((0, 1, 2, 4, 5, 6), 0), (0, 0, 0, 0), {3: 4}),
    "BatchNormalization": _batch_norm,
    "CastLike": _first_alone,
    "CumSum": _cumulative,
    "DeformConv": _each(dict.fromkeys((0, 2, 4), 0)),
    "DequantizeLinear": _quantize,
    "Det": _of_matrices,
    "Dropout": _dropout,
    "Einsum": _einsum,
    "GRU": _recurrent(5),
    "Gemm": _gemm(2),
    "GridSample": _each({0: 0, 1: 0}),
    "Hardmax": _along(-1),
    "LSTM": _recurrent(5, 6),
    "LayerNormalization": _behind(-1, outputs=3),
    "LogSoftmax": _along(-1),
    "LpNormalization": _along(-1),
    "MatMul": _matmul(),
    "MatMulInteger": _matmul(),
    "MeanVarianceNormalization": _mean_variance,
    "QLinearMatMul": _matmul(0, 3),
    "QuantizeLinear": _quantize,
    "RMSNormalization": _behind(-1),
    "RNN": _recurrent(5),
    "RotaryEmbedding": _rotary,
    "SimplifiedLayerNormalization": _behind(-1, outputs=2),
    "Softmax": _along(-1),
    "TopK": _along(-1, 2),
    "Trilu": _of_matrices,
    "com.microsoft.Attention": _each({0: 0, 3: 0, 4: 1}, (0, 1), {5: 4}),
    "com.microsoft.DequantizeLinear": _quantize,
    "com.microsoft.EmbedLayerNormalization": _each({0: 0, 1: 0, 7: 0}, (0, 0, 0), {8: 2}),
    "com.microsoft.FusedConv": _each({0: 0, 3: 0}),
    "com.microsoft.FusedGemm": _gemm(2),
    "com.microsoft.FusedMatMul": _matmul(),
    "com.microsoft.GridSample": _each({0: 0, 1: 0}),
    "com.microsoft.GroupQueryAttention": _each(dict.fromkeys((0, 1, 2, 3, 4, 5, 9), 0), (0, 0, 0), {10: 4}),
    "com.microsoft.MatMulIntegerToFloat": _matmul(),
    "com.microsoft.MatMulNBits": _packed,
    "com.microsoft.MultiHeadAttention": _each(dict.fromkeys((0, 1, 2, 4, 6, 7), 0), (0, 0, 0), {5: 4}),
    "com.microsoft.QAttention": _each({0: 0, 5: 0, 8: 1}, (0, 1)),
    "com.microsoft.QGemm": _gemm(6),
    "com.microsoft.QLinearReduceMean": _mean,
    "com.microsoft.QLinearSoftmax": _behind(-1),
    "com.microsoft.QuantizeLinear": _quantize,
    "com.microsoft.RotaryEmbedding": _each(shared={1: 2}),
    "com.microsoft.SkipLayerNormalization": _behind(-1, (0, 1), 4),
    "com.microsoft.SkipSimplifiedLayerNormalization": _behind(-1, (0, 1), 4),
    "com.microsoft.TransposeMatMul": _matmul(),
    "com.microsoft.Trilu": _of_matrices,
}
"""Rules by operator."""
