"""Put rounded weights into a graph, in the forms that ONNX Runtime computes on where it has any.

| layer | form | what ONNX Runtime makes of it |
|---|---|---|
| MatMul, Gemm | DequantizeLinear of `[inputs, outputs]`, blocks along the inputs | MatMulNBits |
| Gather | bytes of rows are looked up, cut into codes, and these dequantized | runs as it stands |
| all others | DequantizeLinear, and Reshape for a convolution's kernel | the weight as float, made on every run |

ONNX Runtime fuses a MatMul only with integers, scales and zero points that no other node reads, so layers that share a
weight get copies, as long as these are smaller than the float weight. It would take rows that were looked up and
dequantized for a product's activations and compute on their integers, which it cannot with a scale for every block: a
Clip without bounds keeps them apart.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from graphopt_passes.quant.blockwise._grids import Blocks, GridRule
from graphopt_passes.quant.blockwise._packing import pack, pack_rows, row_bytes
from graphopt_passes.quant.blockwise.layout import Layout
from graphopt_passes.quant.builder import Builder
from graphopt_passes.quant.sites import graph_of

__all__ = ["BLOCKWISE_SINCE", "FUSED_GROUPS", "BlockStore", "is_fusable", "needed_opset"]

Array = np.ndarray[Any, np.dtype[Any]]

BLOCKWISE_SINCE = 21
TWO_BITS_SINCE = 25
FUSED_GROUPS = (16, 32, 64, 128, 256)
"""Group sizes that MatMulNBits takes; 0, one group, is among what it makes of its own."""
_PRODUCTS = frozenset({"Gemm", "MatMul"})
_REMOVED = frozenset({"Cast", "Dropout", "Flatten", "Identity", "Reshape", "Squeeze", "Transpose", "Unsqueeze"})

_DTYPES = {
    (2, False): ir.DataType.UINT2,
    (4, False): ir.DataType.UINT4,
    (8, False): ir.DataType.UINT8,
    (2, True): ir.DataType.INT2,
    (4, True): ir.DataType.INT4,
    (8, True): ir.DataType.INT8,
}


def needed_opset(bits: int) -> int:
    """The first opset with integers of so many bits in blocks."""
    return TWO_BITS_SINCE if bits == 2 else BLOCKWISE_SINCE


def is_fusable(node: ir.Node, index: int) -> bool:
    """Whether ONNX Runtime computes a layer on integers in blocks: a matrix on the right, its input not transposed."""
    if node.op_type == "MatMul":
        return index == 1
    return node.op_type == "Gemm" and not node.attributes.get_int("transA", 0)


@dataclass(frozen=True)
class _Table:
    """A table whose rows are looked up as bytes.

    Attributes:
        rows: `[rows, bytes]` uint8, codes and zero points.
        scales: `[rows, groups]`.
        cuts: How many codes, zero points and fillers a row has.
        parts: Length of `cuts`.
        rule: What its grids look like.
    """

    rows: ir.Value
    scales: ir.Value
    cuts: ir.Value
    parts: int
    rule: GridRule


class BlockStore:
    """Replaces weights of one model.

    Args:
        builder: Edits the model.
    """

    def __init__(self, builder: Builder) -> None:
        self._builder = builder
        self._spread: dict[tuple[ir.Value, Layout], ir.Value] = {}
        self._tables: dict[ir.Value, _Table] = {}

    def linear(self, node: ir.Node, index: int, blocks: Blocks) -> None:
        """Give a MatMul or Gemm integers of its own, `[inputs, outputs]` in its own graph."""
        graph, value = graph_of(node), node.inputs[index]
        name = (value.name if value is not None else None) or "weight"
        factor = 1.0
        if node.op_type == "Gemm":
            node.attributes.pop("transB", None)
            factor = node.attributes.get_float("alpha", 1.0)
            node.attributes.pop("alpha", None)
        up = self._dequantize(name, blocks, Layout(blocks.codes.shape, blocks.codes.shape, 0), graph, factor)
        graph.insert_before(node, up)
        node.replace_input_with(index, up.outputs[0])

    def spread(self, node: ir.Node, index: int, value: ir.Value, blocks: Blocks | None, layout: Layout) -> None:
        """Let a layer read the dequantized weight; layers that share it read the same.

        Args:
            node: The layer.
            index: Input of the node that the weight is.
            value: The weight.
            blocks: Its codes; None: those given for another layer, see `has_spread`.
            layout: How the matrix lies in the weight.
        """
        key = value, layout
        if key not in self._spread:
            if blocks is None:
                raise ValueError(f"{value.name!r} was not stored before")
            graph, name = self._builder.place(value), value.name or "weight"
            before = self._builder.first_user(value, graph)
            up = self._dequantize(name, blocks, layout, graph)
            graph.insert_before(before, up)
            real = up.outputs[0]
            if layout.reshaped and not _is_plain(layout, blocks):
                shape = self._builder.constant(f"{name}_shape", np.array(layout.shape, np.int64), graph)
                back = self._builder.node("Reshape", [real, shape], f"{name}_real")
                graph.insert_before(before, back)
                real = back.outputs[0]
            self._spread[key] = real
        node.replace_input_with(index, self._spread[key])

    def has_spread(self, value: ir.Value, layout: Layout) -> bool:
        """Whether the integers of a weight are there already."""
        return (value, layout) in self._spread

    def table(self, node: ir.Node, value: ir.Value, blocks: Blocks | None) -> None:
        """Let a Gather look up packed rows; `blocks` is None where another Gather stored the table before."""
        if value not in self._tables:
            if blocks is None:
                raise ValueError(f"{value.name!r} was not stored before")
            self._tables[value] = self._store_rows(value, blocks)
        table = self._tables[value]
        graph, found, make = graph_of(node), node.outputs[0], self._builder
        name, ids = found.name or "row", node.inputs[1]
        chain = [
            make.node("Gather", [table.rows, ids], f"{name}_bytes"),
            make.node("Gather", [table.scales, ids], f"{name}_scales"),
        ]
        codes = self._codes_of(chain, name, table.rule.bits)
        parts = [ir.Value(name=make.name(f"{name}_{part}")) for part in ("codes", "zeros", "rest")[: table.parts]]
        chain.append(ir.node("Split", [codes, table.cuts], {"axis": -1}, outputs=parts, name=make.name(f"{name}_cut")))
        # the result keeps its name, so that it may be an output of the model
        output = ir.Value(
            name=name, type=ir.TensorType(ir.DataType.FLOAT), shape=found.shape, doc_string=found.doc_string
        )
        output.metadata_props.update(found.metadata_props)
        inputs, attributes = [parts[0], chain[1].outputs[0], parts[1]], {"axis": -1, "block_size": table.rule.group}
        if _meets_product(found):
            chain.append(make.node("DequantizeLinear", inputs, f"{name}_dq", attributes))
            last = ir.node("Clip", chain[-1].outputs, outputs=[output], name=node.name)
        else:
            last = ir.node("DequantizeLinear", inputs, attributes, outputs=[output], name=node.name)
        last.metadata_props.update(node.metadata_props)
        found.replace_all_uses_with(output, replace_graph_outputs=True)
        found.name = make.name(f"{name}_float")
        graph.insert_before(node, [*chain, last])
        graph.remove(node, safe=True)

    def has_table(self, value: ir.Value) -> bool:
        """Whether the packed rows of a table are there already."""
        return value in self._tables

    def _store_rows(self, value: ir.Value, blocks: Blocks) -> _Table:
        """Store rows of codes and, behind them, zero points, packed alike, and the scales."""
        graph, name, bits = self._builder.place(value), value.name or "table", blocks.rule.bits
        codes = np.concatenate([blocks.codes.T, blocks.zeros.T], axis=1)
        lengths = [len(blocks.codes), len(blocks.zeros)]
        padding = row_bytes(codes.shape[1], bits) * 8 // bits - codes.shape[1]
        if padding:
            codes = np.pad(codes, ((0, 0), (0, padding)))
            lengths.append(padding)
        constant = self._builder.constant
        return _Table(
            rows=constant(f"{name}_rows", pack_rows(codes, bits), graph),
            scales=constant(f"{name}_scales", np.ascontiguousarray(blocks.scales.T), graph),
            cuts=constant(f"{name}_cuts", np.array(lengths, np.int64), graph),
            parts=len(lengths),
            rule=blocks.rule,
        )

    def _codes_of(self, chain: list[ir.Node], name: str, bits: int) -> ir.Value:
        """Cut looked-up bytes into codes; the nodes are appended to the chain."""
        packed, make = chain[0].outputs[0], self._builder
        if bits == 8:
            return packed
        parts: list[ir.Value] = []
        for i, shift in enumerate(range(0, 8, bits)):
            part = packed
            if shift:
                by = make.scalar(f"shift_{shift}", np.array(shift, np.uint8))
                chain.append(make.node("BitShift", [part, by], f"{name}_shift{i}"))
                chain[-1].attributes.add(ir.AttrString("direction", "RIGHT"))
                part = chain[-1].outputs[0]
            if shift + bits < 8:
                mask = make.scalar(f"mask_{bits}", np.array(2**bits - 1, np.uint8))
                chain.append(make.node("BitwiseAnd", [part, mask], f"{name}_part{i}"))
                part = chain[-1].outputs[0]
            parts.append(part)
        chain.append(make.node("Concat", parts, f"{name}_row", {"axis": -1}))
        return chain[-1].outputs[0]

    def _dequantize(self, name: str, blocks: Blocks, layout: Layout, graph: ir.Graph, factor: float = 1.0) -> ir.Node:
        """DequantizeLinear over integers, scales and zero points of its own; not inserted yet."""
        rule, make, codes = blocks.rule, self._builder, layout.tensor(blocks.codes)
        scales = blocks.scales if factor == 1.0 else (blocks.scales * np.float32(factor)).astype(np.float32)
        zeros = blocks.zeros
        if _is_plain(layout, blocks):
            place = {"axis": 1 - layout.axis}
            scales, zeros = scales.reshape(-1), zeros.reshape(-1)
            codes = codes.reshape(layout.shape)
        else:
            place = {"axis": layout.axis, "block_size": blocks.group}
            scales, zeros = layout.tensor(scales), layout.tensor(zeros)
        inputs = [
            self._integers(f"{name}_q{rule.bits}", codes, rule, graph),
            make.constant(f"{name}_scale", scales, graph),
        ]
        if not rule.symmetric:
            inputs.append(self._integers(f"{name}_zero", zeros, rule, graph))
        return make.node("DequantizeLinear", inputs, f"{name}_dq", place)

    def _integers(self, wish: str, codes: Array, rule: GridRule, graph: ir.Graph) -> ir.Value:
        """An initializer of packed codes; those of a symmetric grid become signed."""
        signed = codes ^ np.uint8(rule.middle) if rule.symmetric else codes
        dtype, name = _DTYPES[rule.bits, rule.symmetric], self._builder.name(wish)
        packed = pack(signed, rule.bits)
        tensor: ir.TensorProtocol
        if rule.bits == 8:
            tensor = ir.Tensor(packed.reshape(codes.shape).view(dtype.numpy()), dtype=dtype, name=name)
        else:
            tensor = ir.PackedTensor(packed, dtype, shape=ir.Shape(codes.shape), name=name)
        value = ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(codes.shape), const_value=tensor)
        graph.register_initializer(value)
        return value


def _meets_product(value: ir.Value) -> bool:
    """Whether a product reads a value, straight or behind operators that runtimes may remove or move."""
    return any(
        use.node.op_type in _PRODUCTS or (use.node.op_type in _REMOVED and _meets_product(use.node.outputs[0]))
        for use in value.uses()
    )


def _is_plain(layout: Layout, blocks: Blocks) -> bool:
    """One group for each index of the one other axis: ONNX's older form, which a kernel needs no Reshape for."""
    return len(blocks.scales) == 1 and len(layout.stored) == 2
