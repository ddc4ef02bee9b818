"""Whether a channel whose weights are all zero is zero further on.

Operators that add over channels (a mean, a norm, the product of two activations) may lose a channel only where what it
would have brought is nothing: behind a Relu that holds, behind a Sigmoid it does not.
"""

from __future__ import annotations

import onnx_ir as ir

from graphopt.analyses.channels.axis_maps import AxisMaps
from graphopt.analyses.channels.rules.einsum import einsum_labels
from graphopt.analyses.channels.shape_values import numbers

__all__ = ["keeps_zero"]

_MADE = frozenset(
    {
        "BatchNormalization", "Conv", "ConvInteger", "ConvTranspose", "DeformConv", "GroupNormalization",
        "InstanceNormalization", "MoE", "QLinearConv",
    }
)  # fmt: skip
_KEEPS = frozenset(
    {
        "Abs", "Asin", "Asinh", "Atan", "Atanh", "AveragePool", "Cast", "CastLike", "Ceil", "Celu", "CenterCropPad",
        "Col2Im", "Compress", "CumSum", "DepthToSpace", "DequantizeLinear", "Dropout", "DynamicQuantizeLinear",
        "Elu", "Erf", "Flatten", "Floor", "Gather", "GatherElements", "GatherND", "Gelu",
        "GlobalAveragePool", "GlobalLpPool", "GlobalMaxPool", "GridSample", "HardSwish", "Identity", "LRN", "LeakyRelu",
        "LpNormalization", "LpPool", "MaxPool", "MaxRoiPool", "MeanVarianceNormalization", "Mish", "Neg", "PRelu",
        "QuantizeLinear", "QuickGelu", "ReduceL1", "ReduceL2", "ReduceMax", "ReduceMean", "ReduceMin", "ReduceSum",
        "ReduceSumSquare", "Relu", "Reshape", "Resize", "ReverseSequence", "RoiAlign", "RotaryEmbedding", "Round",
        "Selu", "Shrink", "Sign", "Sin", "Sinh", "Slice", "Softsign", "SpaceToDepth", "Split", "Sqrt", "Squeeze",
        "Swish", "Tan", "Tanh", "ThresholdedRelu", "Transpose", "Trilu", "Unsqueeze", "Upsample",
    }
)  # fmt: skip
_PRODUCTS = {
    "DynamicQuantizeMatMul": 1, "FusedMatMul": 1, "MatMul": 1, "MatMulInteger": 1, "MatMulIntegerToFloat": 1,
    "QLinearMatMul": 3, "TransposeMatMul": 1,
}  # fmt: skip
"""Products of two values -> which input the right one is."""
_RECURRENT = {"DynamicQuantizeLSTM": 3, "GRU": 2, "LSTM": 3, "RNN": 1}
"""Recurrent layers -> how many activations a direction has; all but the first of several make the state."""
_ATTENTIONS = ("Attention", "GroupQueryAttention", "MultiHeadAttention")
_ODD = frozenset({"LeakyRelu", "Relu", "ScaledTanh", "Softsign", "Tanh", "ThresholdedRelu"})
_ALL = frozenset({"Add", "BiasGelu", "Concat", "FastGelu", "Max", "Mean", "Min", "Sub", "Sum"})


def keeps_zero(maps: AxisMaps, node: ir.Node) -> bool:
    """Whether the outputs of a node are zero wherever a channel's weights, and the inputs that it makes, are.

    Args:
        maps: The state; `zeros` holds the names of the values so far for which this is so.
        node: A node whose rule was applied.
    """
    kind, output = node.op_type, node.outputs[0]
    inputs = [value for value in node.inputs if value is not None]
    if not inputs:
        return False
    if kind in _MADE:
        return True
    if kind in _RECURRENT:
        return _state_is_zero(node, _RECURRENT[kind])
    if kind == "Gemm":
        return _gemm_is_zero(maps, node)
    if kind in ("Div", "Expand", "Tile"):  # of a number that is repeated, nothing leaves
        return _zero_along(maps, inputs[0], output, tiled=kind == "Tile")
    if kind == "Sub" and _is_centring(node):
        return maps.is_zero(inputs[0])
    if kind in _ALL:
        return all(_zero_along(maps, value, output, concat=kind == "Concat") for value in inputs)
    if kind in ("Mul", "And"):
        return any(_zero_along(maps, value, output) for value in inputs)
    if kind == "Where":
        return all(_zero_along(maps, value, output) for value in inputs[1:])
    if kind == "Pow":
        exponents = numbers(maps.content(node.inputs[1]))
        positive = exponents is not None and all(exponent > 0 for exponent in exponents)
        return positive and _zero_along(maps, inputs[0], output)
    if kind == "Clip":
        return maps.is_zero(inputs[0]) and _clips_around_zero(maps, node)
    if kind == "Pad":
        filler = numbers(maps.content(node.inputs[2])) if len(node.inputs) > 2 and node.inputs[2] is not None else (0,)
        return maps.is_zero(inputs[0]) and filler == (node.attributes.get_float("value", 0.0),)
    if kind in _PRODUCTS:
        return _product_is_zero(maps, node, node.inputs[_PRODUCTS[kind]])
    if kind == "Einsum":
        return _einsum_is_zero(maps, node)
    if kind in _ATTENTIONS:
        return maps.is_zero(node.inputs[2] if len(node.inputs) > 2 and node.inputs[2] is not None else inputs[0])
    if kind.startswith("Skip") and kind.endswith("LayerNormalization"):
        last = len(maps.of(output) or ()) - 1
        return all(maps.is_zero(value) for value in inputs[:2]) and _carrying(maps, output) in ([], [last])
    if kind in ("LayerNormalization", "RMSNormalization", "SimplifiedLayerNormalization"):
        rank = len(maps.of(output) or ())
        first = node.attributes.get_int("axis", -1) % rank if rank else 0
        return all(axis >= first for axis in _carrying(maps, output))
    return kind in _KEEPS and maps.is_zero(inputs[0])


def _state_is_zero(node: ir.Node, each: int) -> bool:
    """A recurrent layer whose hidden units are zero: what makes them does so of zero, and only gates do otherwise."""
    named = node.attributes.get_strings("activations", ())
    return all(name in _ODD for i, name in enumerate(named) if i % each or each == 1)


def _gemm_is_zero(maps: AxisMaps, node: ir.Node) -> bool:
    """A Gemm: like a MatMul, with a bias that may be repeated."""
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    return _product_is_zero(maps, node, node.inputs[1]) and (bias is None or _zero_along(maps, bias, node.outputs[0]))


def _is_centring(node: ir.Node) -> bool:
    """Taking away the mean, as layer normalization does: a channel that was zero counts as zero still."""
    mean = None if node.inputs[1] is None else node.inputs[1].producer()
    return mean is not None and mean.op_type == "ReduceMean" and mean.inputs[0] is node.inputs[0]


def _carrying(maps: AxisMaps, value: ir.Value) -> list[int]:
    """Axes of a value that channels are on."""
    axes = maps.of(value) or ()
    return [i for i, atoms in enumerate(axes) if atoms is not None and maps.partition.marked(atoms).any()]


def _zero_along(
    maps: AxisMaps, value: ir.Value, output: ir.Value, *, concat: bool = False, tiled: bool = False
) -> bool:
    """Whether an operand is zero and reaches all over the channels of the output: what is repeated is not theirs."""
    own, made = maps.of(value), maps.of(output)
    if own is None or made is None or not maps.is_zero(value):
        return False
    lacking, carrying = len(made) - len(own), _carrying(maps, output)
    for axis, whole in enumerate(made):
        if carrying and axis not in carrying:
            continue
        if not carrying and (whole is None or len(whole) == 1 or (axis == 0 and len(made) > 2)):
            continue  # made of constants, and channels may come to be on any axis but that of the batch
        mine = own[axis - lacking] if axis >= lacking else None
        if mine is None or whole is None:
            return False
        if len(mine) != len(whole) and not concat and not (tiled and len(mine) > 1):
            return False
    return True


def _clips_around_zero(maps: AxisMaps, node: ir.Node) -> bool:
    for index, name, sign in ((1, "min", 1), (2, "max", -1)):
        limit: tuple[float, ...] | None = (node.attributes.get_float(name, 0.0),)
        if index < len(node.inputs) and node.inputs[index] is not None:
            limit = numbers(maps.content(node.inputs[index]))
        if limit is None or any(sign * number > 0 for number in limit):
            return False
    return True


def _einsum_is_zero(maps: AxisMaps, node: ir.Node) -> bool:
    """An Einsum: an axis of the output follows any operand that has its letter."""
    operands, output = [value for value in node.inputs if value is not None], node.outputs[0]
    ranks = [len(maps.of(value) or ()) for value in operands]
    named = einsum_labels(node.attributes.get_string("equation", ""), ranks)
    if named is None:
        return False
    pairs = zip(operands, named[0], strict=True)
    zero = {label for value, labels in pairs if maps.is_zero(value) for label in labels}
    return all(axis < len(named[1]) and named[1][axis] in zero for axis in _carrying(maps, output))


def _product_is_zero(maps: AxisMaps, node: ir.Node, right: ir.Value | None) -> bool:
    """A MatMul: rows follow the left side, columns the right one, and batches either."""
    left, output = node.inputs[0], node.outputs[0]
    rank = len(maps.of(output) or ())
    carrying = _carrying(maps, output)
    rows, columns = rank - 2 in carrying, rank - 1 in carrying
    zero = maps.is_zero(left), maps.is_zero(right)
    return any(zero) and (zero[0] or not rows) and (zero[1] or not columns)
