"""What is quantized in a model already, and how.

    form         how it looks in the graph
    QDQ          DequantizeLinear before the weight and before the activations of a float operator
    QOperator    an operator on integers with fixed scales: QLinearConv, QLinearMatMul, QGemm, QLinearAdd, ...
    dynamic      an operator on integers whose input range is found on every run: MatMulInteger, ConvInteger, ...
    weight-only  integers behind DequantizeLinear, or behind Cast and Mul, MatMulNBits and the like; arithmetic in float

A layer whose weight is a float constant is none of these, whatever its activations are rounded to.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import onnx_ir as ir

from graphopt.analyses.names import Names
from graphopt.pass_base import Analysis, Context

__all__ = ["QUANTIZED", "Form", "QuantizedAnalysis", "QuantizedLayer", "find_quantized", "summary"]

Form = Literal["QDQ", "QOperator", "dynamic", "weight-only"]

_CARRIERS = frozenset(
    {"Cast", "Concat", "Expand", "Flatten", "Identity", "Reshape", "Slice", "Split", "Squeeze", "Transpose",
     "Unsqueeze"}
)  # fmt: skip
"""Operators behind which integers or rounded numbers are the same numbers."""

_ROUNDERS = frozenset({"DequantizeLinear", "DynamicQuantizeLinear", "QuantizeLinear"})
_INTEGER_OPERATORS: Mapping[str, tuple[Form, int, int | None]] = {
    "ConvInteger": ("dynamic", 1, None),
    "DynamicQuantizeLSTM": ("dynamic", 1, 8),
    "DynamicQuantizeMatMul": ("dynamic", 1, 2),
    "MatMulInteger": ("dynamic", 1, None),
    "MatMulIntegerToFloat": ("dynamic", 1, 3),
    "QAttention": ("QOperator", 1, 4),
    "QGemm": ("QOperator", 3, 4),
    "QLinearConv": ("QOperator", 3, 4),
    "QLinearMatMul": ("QOperator", 3, 4),
}
"""Operator -> form, index of its weight, index of the weight's scale; None where it is multiplied in later."""

_BLOCKWISE = {"GatherBlockQuantized": 0, "MatMulBnb4": 1, "MatMulFpQ4": 1, "MatMulNBits": 1, "QMoE": 2}
"""Operators on packed weights in blocks -> index of the weight."""

_RECURRENT = frozenset({"GRU", "LSTM", "RNN"})
_CUTTERS = frozenset({"BitShift", "BitwiseAnd", "Concat", "Split"})
_NARROW = 8  # bits of what counts as a stored weight
_WEIGHTED = _RECURRENT | {"Conv", "ConvTranspose", "Einsum", "Gather", "Gemm", "MatMul"}
_WEIGHT_SIZE = 64  # a float constant of this many elements makes an operator one with float weights


@dataclass(frozen=True)
class QuantizedLayer:
    """How one operator is quantized.

    Attributes:
        form: What the quantization looks like.
        bits: Bits of the weight; of the activations where there is no weight.
        number: Integers, or floats of that many bits.
        granularity: What has a scale of its own: "tensor", "channel", "block of 32", or empty without a weight.
    """

    form: Form
    bits: int
    number: Literal["int", "float"] = "int"
    granularity: str = ""

    @property
    def weighted(self) -> bool:
        """It has a constant weight."""
        return bool(self.granularity)

    def __str__(self) -> str:
        return f"{self.form} {self.number}{self.bits}"


@dataclass(frozen=True)
class QuantizedAnalysis(Analysis[Mapping[str, QuantizedLayer]]):
    """Name every operator that is quantized, subgraphs included; no weight is read."""

    name: ClassVar[str] = "quantized layers"

    def compute(self, model: ir.Model, ctx: Context) -> Mapping[str, QuantizedLayer]:
        """Look at every node."""
        labels = Names(model).labels
        return {labels[node]: layer for node, layer in find_quantized(model).items()}


QUANTIZED = QuantizedAnalysis()


def find_quantized(model: ir.Model) -> dict[ir.Node, QuantizedLayer]:
    """Find the nodes of a model that are quantized, in graph order."""
    found: dict[ir.Node, QuantizedLayer] = {}
    for graph in model.graphs():
        for node in graph:
            layer = _layer(node)
            if layer is not None:
                found[node] = layer
    return found


def summary(layers: Sequence[QuantizedLayer]) -> list[str]:
    """Say in a few words what is quantized: `21 layers QDQ int8 per channel`, the most frequent first."""
    kinds = Counter((str(layer), layer.granularity) for layer in layers)
    told: list[str] = []
    for (text, granularity), count in sorted(kinds.items(), key=lambda item: (not item[0][1], -item[1], item[0])):
        noun = ("layer" if granularity else "other operator") + ("s" if count > 1 else "")
        told.append(f"{count} {noun} {text}" + (f" per {granularity}" if granularity else ""))
    return told


@dataclass(frozen=True)
class _Stored:
    """A constant kept in few bits: its type and what shares a scale."""

    dtype: ir.DataType
    granularity: str
    rank: int = 2


def _layer(node: ir.Node) -> QuantizedLayer | None:
    kind = node.op_type
    if kind in _BLOCKWISE:
        bits = node.attributes.get_int("bits", 4)
        return QuantizedLayer("weight-only", bits, "int", f"block of {node.attributes.get_int('block_size', 128)}")
    if kind in _INTEGER_OPERATORS:
        return _integer_operator(node)
    if kind.startswith("QLinear") or (kind.startswith("Q") and node.domain == "com.microsoft"):
        return QuantizedLayer("QOperator", 8)
    if kind == "DequantizeLinear" and (rows := _packed_rows(node)) is not None:
        return rows
    if kind in _ROUNDERS or (kind in ("Constant", "Mul", "Sub") and _scales_a_constant(node)):
        return None
    if kind == "Gather" and (table := _looked_up(node)) is not None:
        return _describe("weight-only", table)
    return None if kind in _CARRIERS else _float_operator(node)


def _float_operator(node: ir.Node) -> QuantizedLayer | None:
    """An operator on floats that were integers before."""
    read = node.inputs[:3] if node.op_type in _RECURRENT else node.inputs
    stored = [found for value in read if (found := _stored(value)) is not None]
    weights = [found for found in stored if found.dtype != ir.DataType.INT32 and found.rank > 1]  # others are biases
    rounded = [dtype for value in node.inputs if (dtype := _rounded(value)) is not None]
    if any(_is_float_weight(value) for value in read):
        return None
    if weights:
        widest = max(weights, key=lambda found: found.dtype.bitwidth)
        layer = _describe("QDQ" if rounded else "weight-only", widest)
        return layer if node.op_type in _WEIGHTED else replace(layer, granularity="")
    return QuantizedLayer("QDQ", rounded[0].bitwidth, _number(rounded[0])) if rounded else None


def _integer_operator(node: ir.Node) -> QuantizedLayer:
    form, weight, scale = _INTEGER_OPERATORS[node.op_type]
    tensor = _constant(_input(node, weight))
    if node.op_type in ("ConvInteger", "MatMulInteger") and not _is_dynamic(node):
        form = "QOperator"
    if tensor is None and node.op_type == "MatMulInteger":
        tensor = _constant(_input(node, 0))  # a weight on the left
    if tensor is None:
        return QuantizedLayer(form, 8)
    factor = _constant(_input(node, scale)) if scale is not None else _later_scale(node)
    return QuantizedLayer(form, tensor.dtype.bitwidth, "int", _granularity(factor, 0))


def _is_dynamic(node: ir.Node) -> bool:
    for index in (0, 1):
        source = _source(_input(node, index))
        if source is not None and source.op_type == "DynamicQuantizeLinear":
            return True
    return False


def _describe(form: Form, stored: _Stored) -> QuantizedLayer:
    return QuantizedLayer(form, stored.dtype.bitwidth, _number(stored.dtype), stored.granularity)


def _number(dtype: ir.DataType) -> Literal["int", "float"]:
    return "float" if dtype.is_floating_point() else "int"


def _stored(value: ir.Value | None) -> _Stored | None:
    """The narrow constant that a value is made of."""
    node = _source(value)
    if node is None:
        return None
    if node.op_type == "DequantizeLinear":
        integers = _through(node.inputs[0])
        tensor, block = _constant(integers), node.attributes.get_int("block_size", 0)
        factor = _constant(_input(node, 1))
        if tensor is not None:
            return _Stored(tensor.dtype, _granularity(factor, block), len(tensor.shape))
        maker = integers.producer() if integers is not None else None
        floats = _constant(_through(maker.inputs[0])) if maker is not None else None
        if maker is not None and maker.op_type == "QuantizeLinear" and floats is not None:
            return _Stored(_rounds_to(maker), _granularity(factor, block), len(floats.shape))
    if node.op_type == "Mul" and (found := _scales_a_constant(node)) is not None:
        return found
    return None


def _scales_a_constant(node: ir.Node) -> _Stored | None:
    """`Mul(Cast(integers), scale)`, with or without a zero point taken off between."""
    if node.op_type == "Sub":
        readers = list(node.outputs[0].consumers())
        return _scales_a_constant(readers[0]) if len(readers) == 1 and readers[0].op_type == "Mul" else None
    if node.op_type != "Mul":
        return None
    for index in (0, 1):
        factor, source = _constant(_input(node, 1 - index)), _input(node, index)
        maker = source.producer() if source is not None else None
        if maker is not None and maker.op_type == "Sub":
            source = _input(maker, 0)
            maker = source.producer() if source is not None else None
        if factor is None or maker is None or maker.op_type != "Cast":
            continue
        tensor = _constant(_input(maker, 0))
        if tensor is not None and tensor.dtype.is_integer() and tensor.dtype.bitwidth <= _NARROW and tensor.size > 1:
            return _Stored(tensor.dtype, _granularity(factor, 0), len(tensor.shape))
    return None


def _looked_up(node: ir.Node) -> _Stored | None:
    """A table of integers whose rows become floats, or meet integer weights, after they were looked up."""
    tensor, readers = _constant(_input(node, 0)), list(node.outputs[0].consumers())
    known = {"DequantizeLinear", *_INTEGER_OPERATORS}
    if tensor is None or not readers or any(reader.op_type not in known for reader in readers):
        return None
    if tensor.dtype.bitwidth > _NARROW:
        return None  # scales that are looked up with the rows
    if readers[0].op_type != "DequantizeLinear":
        return _Stored(tensor.dtype, "tensor")
    return _Stored(tensor.dtype, _granularity(_constant(_input(readers[0], 1)), 0))


def _packed_rows(node: ir.Node) -> QuantizedLayer | None:
    """Rows of a table that are looked up as bytes, cut into numbers, and scaled by what is looked up beside them."""
    scales, maker = _maker(_input(node, 1)), _maker(_input(node, 0))
    steps = _constant(_input(scales, 0)) if scales is not None and scales.op_type == "Gather" else None
    parts = 1
    while maker is not None and maker.op_type in _CUTTERS:
        parts = max(parts, len(maker.inputs) if maker.op_type == "Concat" else 1)
        maker = _maker(_input(maker, 0))
    table = _constant(_input(maker, 0)) if maker is not None and maker.op_type == "Gather" else None
    if steps is None or table is None or table.dtype.bitwidth > _NARROW:
        return None
    block = node.attributes.get_int("block_size", 0) if steps.shape.numpy()[-1] > 1 else 0
    granularity = f"block of {block}" if block else "channel"
    return QuantizedLayer("weight-only", table.dtype.bitwidth // parts, "int", granularity)


def _rounded(value: ir.Value | None) -> ir.DataType | None:
    """Type of the integers that an activation was rounded to."""
    node = _source(value)
    if node is None or node.op_type != "DequantizeLinear" or _stored(value) is not None:
        return None
    integers = _through(node.inputs[0])
    maker = integers.producer() if integers is not None else None
    if maker is not None and maker.op_type == "QuantizeLinear":
        return _rounds_to(maker)
    if maker is not None and maker.op_type == "Gather" and _constant(_input(maker, 0)) is not None:
        return None  # rows of a table, which nothing rounded on this run
    if _packed_rows(node) is not None:
        return None
    zero = _constant(_input(node, 2))
    return zero.dtype if zero is not None else ir.DataType.UINT8


def _rounds_to(node: ir.Node) -> ir.DataType:
    zero = _constant(_input(node, 2))
    if zero is not None:
        return zero.dtype
    return ir.DataType(node.attributes.get_int("output_dtype", 0) or int(ir.DataType.UINT8))


def _later_scale(node: ir.Node) -> ir.TensorProtocol | None:
    """The constant part of what an integer product is multiplied with once it is float."""
    for later in _readers(node, depth=3):
        if later.op_type == "Mul":
            for value in later.inputs:
                maker = value.producer() if value is not None else None
                factors = maker.inputs if maker is not None and maker.op_type == "Mul" else (value,)
                found = next((t for factor in factors if (t := _constant(factor)) is not None), None)
                if found is not None:
                    return found
    return None


def _readers(node: ir.Node, depth: int) -> Iterator[ir.Node]:
    for reader in node.outputs[0].consumers():
        yield reader
        if depth > 1:
            yield from _readers(reader, depth - 1)


def _granularity(scale: ir.TensorProtocol | None, block: int) -> str:
    if block:
        return f"block of {block}"
    return "channel" if scale is not None and scale.size > 1 else "tensor"


def _is_float_weight(value: ir.Value | None) -> bool:
    tensor = _constant(value)
    return (
        tensor is not None
        and tensor.dtype.is_floating_point()
        and tensor.dtype.bitwidth > _NARROW
        and len(tensor.shape) > 1
        and tensor.size >= _WEIGHT_SIZE
    )


def _source(value: ir.Value | None) -> ir.Node | None:
    """The node that made a value, operators that only move its elements left out."""
    value = _through(value)
    return value.producer() if value is not None else None


def _through(value: ir.Value | None) -> ir.Value | None:
    while value is not None and (node := value.producer()) is not None and node.op_type in _CARRIERS and node.inputs:
        value = node.inputs[0]
    return value


def _maker(value: ir.Value | None) -> ir.Node | None:
    return value.producer() if value is not None else None


def _input(node: ir.Node, index: int) -> ir.Value | None:
    return node.inputs[index] if index < len(node.inputs) else None


def _constant(value: ir.Value | None) -> ir.TensorProtocol | None:
    """The tensor of an initializer that no caller can replace, or of a Constant node."""
    if value is None or value.is_graph_input():
        return None
    node = value.producer()
    if node is None:
        return value.const_value if value.is_initializer() else None
    attribute = node.attributes.get("value") if node.op_type == "Constant" and not node.domain else None
    if attribute is None or attribute.is_ref():
        return None
    tensor: ir.TensorProtocol = attribute.value  # as_tensor() would compare it with the whole protocol
    return tensor
