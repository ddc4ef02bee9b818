"""Shapes of operators that ONNX's shape inference does not know, most of them ONNX Runtime's own.

On the copy that shapes are inferred on, a standard operator with outputs of the same shape stands in for each of them,
so that one pass through the graph infers everything behind it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

__all__ = ["stand_in"]

_WINDOW = ("auto_pad", "ceil_mode", "dilations", "group", "kernel_shape", "pads", "strides")


class _Maker:
    """Writes nodes in front of the one that they stand in for."""

    def __init__(self, graph: ir.Graph, node: ir.Node, opset: int) -> None:
        self.graph, self.node, self.opset = graph, node, opset

    def input(self, index: int) -> ir.Value | None:
        return self.node.inputs[index] if index < len(self.node.inputs) else None

    def rank(self, index: int) -> int | None:
        value = self.input(index)
        return None if value is None or value.shape is None else len(value.shape)

    def make(self, op: str, *inputs: ir.Value | None, outputs: int = 1, **attributes: Any) -> Sequence[ir.Value]:
        """Append a standard node; attributes that are None are left out."""
        kept = {name: value for name, value in attributes.items() if value is not None}
        made = ir.node(op, inputs, attributes=kept, num_outputs=outputs)
        self.graph.insert_before(self.node, made)
        return made.outputs

    def copied(self, *names: str) -> dict[str, Any]:
        """Attributes of the node itself."""
        attributes = self.node.attributes
        return {name: attributes[name].value for name in names if name in attributes}

    def vector(self, numbers: Sequence[int]) -> ir.Value:
        return self.make("Constant", value=ir.tensor(np.array(numbers, dtype=np.int64)))[0]

    def widened(self, value: ir.Value | None, width: int) -> ir.Value:
        """A value with a last axis of another length."""
        return self.make("Gather", value, self.vector([0] * width), axis=-1)[0]

    def real(self, index: int) -> ir.Value | None:
        """A quantized input as floating point, which all stand-ins take."""
        value = self.input(index)
        return None if value is None else self.make("Cast", value, to=ir.DataType.FLOAT.value)[0]

    def quantized(self, value: ir.Value, scale: int, zero_point: int) -> ir.Value:
        """A floating-point value as integers of the type of an input's zero point."""
        return self.make("QuantizeLinear", value, self.input(scale), self.input(zero_point))[0]


_Outputs = Mapping[int, ir.Value]
_StandIn = Callable[[_Maker], _Outputs]


def stand_in(model: ir.Model) -> None:
    """Replace operators by standard ones with outputs of the same names and shapes; the model is for nothing else."""
    opset = model.graph.opset_imports.get("", 1)
    for graph in model.graphs():
        for node in list(graph):
            rule = _STAND_INS.get((node.domain, node.op_type))
            if rule is None:
                continue
            for index, value in rule(_Maker(graph, node, opset)).items():
                if index < len(node.outputs) and node.outputs[index].name:
                    _take_over(node.outputs[index], value)


def _take_over(old: ir.Value, new: ir.Value) -> None:
    """Let a value be known under the name of another, which nobody needs any more."""
    name = old.name
    old.name = f"{name} before"
    new.name, new.shape = name, old.shape
    if old.dtype is not None:
        new.dtype = old.dtype
    old.replace_all_uses_with(new, replace_graph_outputs=True)


def _like(*outputs: int) -> _StandIn:
    """Outputs of the shape of the first input."""
    return lambda maker: {index: maker.make("Identity", maker.input(0))[0] for index in outputs}


def _same(op: str, *indices: int, attributes: Sequence[str] = ()) -> _StandIn:
    """Another operator on some of the inputs."""

    def rule(maker: _Maker) -> _Outputs:
        return {0: maker.make(op, *(maker.input(i) for i in indices), **maker.copied(*attributes))[0]}

    return rule


def _real(op: str, *indices: int, attributes: Sequence[str] = (), zero: tuple[int, int] | None = None) -> _StandIn:
    """Another operator on some of the inputs as floating point.

    Args:
        op: The operator.
        indices: The inputs.
        attributes: What it takes over.
        zero: Inputs that hold scale and zero point of the output; None: it is floating point.
    """

    def rule(maker: _Maker) -> _Outputs:
        made = maker.make(op, *(maker.real(i) for i in indices), **maker.copied(*attributes))[0]
        quantized = zero is not None and maker.input(zero[0]) is not None
        return {0: maker.quantized(made, *zero) if quantized and zero is not None else made}

    return rule


def _where(maker: _Maker) -> _Outputs:
    made = maker.make("Where", maker.input(0), maker.real(1), maker.real(4))[0]
    return {0: maker.quantized(made, 7, 8)}


def _fused_matmul(maker: _Maker) -> _Outputs:
    sides: list[ir.Value | None] = []
    for index, name in enumerate(("transA", "transB")):
        value, rank = maker.input(index), maker.rank(index)
        if maker.node.attributes.get_int(name, 0):
            if rank is None:
                return {}
            order = [*range(rank - 2), rank - 1, rank - 2]
            value = maker.make("Transpose", value, perm=order)[0]
        sides.append(value)
    return {0: maker.make("MatMul", *sides)[0]}


def _concat(maker: _Maker) -> _Outputs:
    return {0: maker.make("Concat", *maker.node.inputs[2::3], **maker.copied("axis"))[0]}


def _pool(op: str) -> _StandIn:
    def rule(maker: _Maker) -> _Outputs:
        value = maker.real(0)
        last = maker.node.attributes.get_int("channels_last", 0)
        if last:
            value = maker.make("Transpose", value, perm=[0, 3, 1, 2])[0]
        value = maker.make(op, value, **({} if op.startswith("Global") else maker.copied(*_WINDOW)))[0]
        value = maker.make("Transpose", value, perm=[0, 2, 3, 1])[0] if last else value
        return {0: maker.quantized(value, 3, 4)}

    return rule


def _mean(maker: _Maker) -> _Outputs:
    axes, kept = list(maker.node.attributes.get_ints("axes", ())), maker.copied("keepdims")
    if not axes:
        return {}
    old = maker.opset < 18
    inputs, attributes = ([], {"axes": axes}) if old else ([maker.vector(axes)], {})
    made = maker.make("ReduceMean", maker.real(0), *inputs, **attributes, **kept)[0]
    return {0: maker.quantized(made, 3, 4)}


def _n_bits(maker: _Maker) -> _Outputs:
    return {0: maker.widened(maker.input(0), maker.node.attributes.get_int("N", 1))}


def _packed_attention(maker: _Maker) -> _Outputs:
    weight, sizes = maker.input(1), maker.node.attributes.get_ints("qkv_hidden_sizes", None)
    if sizes:
        return {0: maker.widened(maker.input(0), sizes[2])}
    width = weight.shape[-1] if weight is not None and weight.shape is not None else None
    return {0: maker.widened(maker.input(0), width // 3)} if isinstance(width, int) else {}


def _quantized_attention(maker: _Maker) -> _Outputs:
    return {
        index: maker.make("Cast", made, to=ir.DataType.FLOAT.value)[0]
        for index, made in _packed_attention(maker).items()
    }


def _multi_head(maker: _Maker) -> _Outputs:
    query, value = maker.input(0), maker.input(2)
    flat = maker.vector([0, 0, -1])
    if value is None:  # packed: [batch, time, heads, 3, places], or [batch, time, heads, 2, places] of key and value
        one = maker.make("Gather", query, maker.make("Constant", value_int=0)[0], axis=3)[0]
        packed = maker.input(1) is None
        return {0: maker.make("Reshape", one, flat)[0] if packed else maker.make("Identity", query)[0]}
    heads = maker.make("Einsum", query, value, equation="bsq,bhtv->bshv")[0] if maker.rank(2) == 4 else None
    if heads is not None:
        return {0: maker.make("Reshape", heads, flat)[0]}
    return {0: maker.make("Einsum", query, value, equation="bsq,btv->bsv")[0]}


def _group_query(maker: _Maker) -> _Outputs:
    query, attributes = maker.input(0), maker.node.attributes
    if maker.input(1) is not None:
        return {0: maker.make("Identity", query)[0]}
    heads, shared = attributes.get_int("num_heads", 1), attributes.get_int("kv_num_heads", 1)
    count = heads + 2 * shared
    parts = maker.make("Split", query, outputs=count, axis=-1, num_outputs=count if maker.opset >= 18 else None)
    return {0: maker.make("Concat", *parts[:heads], axis=-1)[0]}


def _recurrent(maker: _Maker) -> _Outputs:
    source, weight = maker.input(0), maker.input(2)
    size: Any = maker.copied("hidden_size").get("hidden_size")
    if size is None and weight is not None and weight.shape is not None:
        size = weight.shape[1]
    if not isinstance(size, int):
        return {}
    made = maker.make(
        "LSTM", source, source, source, outputs=3, hidden_size=size, **maker.copied("direction", "layout")
    )
    return dict(enumerate(made))


_GEMM = ("transA", "transB")
_STANDARD = ("GroupNormalization", "MeanVarianceNormalization", "SimplifiedLayerNormalization")
"""Operators of the standard domain that inference gives up on, or that ONNX Runtime has put there."""
_STAND_INS: dict[tuple[str, str], _StandIn] = {
    **{("", name): _like(0) for name in _STANDARD},
    **{("com.microsoft", name): rule for name, rule in {
        "Attention": _packed_attention,
        "BiasAdd": _like(0),
        "BiasGelu": _same("Add", 0, 1),
        "DequantizeLinear": _same("DequantizeLinear", 0, 1, 2, attributes=("axis",)),
        "DynamicQuantizeLSTM": _recurrent,
        "DynamicQuantizeMatMul": _real("MatMul", 0, 1),
        "FastGelu": _like(0),
        "FusedConv": _same("Conv", 0, 1, 2, attributes=_WINDOW),
        "FusedGemm": _same("Gemm", 0, 1, 2, attributes=_GEMM),
        "FusedMatMul": _fused_matmul,
        "Gelu": _like(0),
        "GridSample": _same("GridSample", 0, 1),
        "GroupNorm": _like(0),
        "GroupQueryAttention": _group_query,
        "MatMulIntegerToFloat": _real("MatMul", 0, 1),
        "MatMulNBits": _n_bits,
        "MoE": _like(0),
        "MultiHeadAttention": _multi_head,
        "QAttention": _quantized_attention,
        "QGemm": _real("Gemm", 0, 3, attributes=_GEMM, zero=(7, 8)),
        "QLinearAdd": _real("Add", 0, 3, zero=(6, 7)),
        "QLinearAveragePool": _pool("AveragePool"),
        "QLinearConcat": _concat,
        "QLinearConv": _same("QLinearConv", *range(9), attributes=_WINDOW),
        "QLinearGlobalAveragePool": _pool("GlobalAveragePool"),
        "QLinearLeakyRelu": _like(0),
        "QLinearMul": _real("Mul", 0, 3, zero=(6, 7)),
        "QLinearReduceMean": _mean,
        "QLinearSigmoid": _like(0),
        "QLinearSoftmax": _like(0),
        "QLinearWhere": _where,
        "QMoE": _like(0),
        "QuantizeLinear": _same("QuantizeLinear", 0, 1, 2, attributes=("axis",)),
        "QuickGelu": _like(0),
        "RotaryEmbedding": _like(0),
        "SkipLayerNormalization": _like(0, 3),
        "SkipSimplifiedLayerNormalization": _like(0, 3),
        "TransposeMatMul": _fused_matmul,
        "Trilu": _like(0),
    }.items()},
}  # fmt: skip
