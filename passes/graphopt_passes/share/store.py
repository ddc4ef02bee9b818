"""Put codebooks into a graph, in operators that every runtime has.

| codebooks | table | codes | what makes the weight |
|---|---|---|---|
| one for the tensor | `[entries]` | as the weight | Cast, Gather |
| one a column of a matrix | `[entries, columns]` | as the weight | Cast, GatherElements along axis 0 |
| one a row of a matrix | `[rows, entries]` | as the weight | Cast, GatherElements along axis 1 |
| one a group of channels | `[groups, entries]` | `[groups, members]` | the same, then Reshape and Transpose |
| one of vectors | `[entries, width]` | `[rows, vectors]` | Cast, Gather, Reshape |

The Transpose is there where the channels are not the first axis.
Codes are initializers of UINT2 (opset 25), UINT4 (opset 21) or UINT8, whichever is the narrowest that holds them.
Tables in INT8 pass a DequantizeLinear first.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir

from graphopt.opset import opset_version
from graphopt_passes.quant.blockwise._packing import pack
from graphopt_passes.quant.builder import Builder
from graphopt_passes.quant.sites import tensor_of
from graphopt_passes.share.cut import Cut
from graphopt_passes.share.fit import Shared, int8_scales

__all__ = ["UINT4_SINCE", "CodeStore", "code_bits", "needed_opset", "stored_bytes"]

Array = np.ndarray[Any, np.dtype[Any]]

UINT2_SINCE, UINT4_SINCE = 25, 21
_AXIS_SCALES_SINCE, _INT8_SINCE, _ELEMENTS_SINCE = 13, 10, 11
_DTYPES = {2: ir.DataType.UINT2, 4: ir.DataType.UINT4, 8: ir.DataType.UINT8}
_NODE_BYTES, _INITIALIZER_BYTES = 75, 40  # in a file, with names of common length


def code_bits(entries: int, opset: int) -> int:
    """Bits that a code takes in a file."""
    if entries <= 4 and opset >= UINT2_SINCE:
        return 2
    return 4 if entries <= 16 and opset >= UINT4_SINCE else 8


def needed_opset(entries: int, *, grouped: bool, int8: bool) -> int:
    """The first opset that stores codes of so many entries in as few bits as there are types for."""
    narrow = UINT2_SINCE if entries <= 4 else UINT4_SINCE if entries <= 16 else 1
    tables = (_AXIS_SCALES_SINCE if grouped else _INT8_SINCE) if int8 else 1
    return max(narrow, tables, _ELEMENTS_SINCE if grouped else 1)


def stored_bytes(cut: Cut, entries: int, opset: int, *, item: float, int8: bool) -> int:
    """Bytes of a file that codes, codebooks and what reads them take, about.

    Args:
        cut: Which weights share a codebook.
        entries: Size of a codebook.
        opset: Of the model.
        item: Bytes of a number of the weight.
        int8: Codebooks are stored in int8.
    """
    tables = cut.groups * entries * cut.width * (1 if int8 else item) + (4 * cut.groups if int8 else 0)
    nodes, constants = (2, 2) if cut.is_plain else (4, 3)
    nodes, constants = nodes + int8, constants + int8
    codes = -(-cut.codes * code_bits(entries, opset) // 8)
    return codes + int(tables) + nodes * _NODE_BYTES + constants * _INITIALIZER_BYTES


class CodeStore:
    """Replaces weights of one model.

    Args:
        builder: Edits the model.
    """

    def __init__(self, builder: Builder) -> None:
        self._builder = builder
        self._opset = opset_version(builder.model)

    def put(self, value: ir.Value, shared: Shared, cut: Cut, *, int8: bool) -> None:
        """Let all that reads a weight read what its codes stand for instead.

        Args:
            value: The weight: an initializer, or what a Constant node makes.
            shared: Its codes and codebooks.
            cut: Which weights share a codebook.
            int8: Store codebooks in int8; their entries are multiples of `int8_scales`.
        """
        graph, name, tensor = self._builder.place(value), value.name or "weight", tensor_of(value)
        if tensor is None:
            raise TypeError(f"{name!r} is not constant")
        dtype = tensor.dtype
        before, uses = self._builder.first_user(value, graph), tuple(value.uses())
        chain = self._lookup(name, shared, cut, graph, dtype, int8=int8)
        real = chain[-1].outputs[0]
        real.type, real.shape, real.doc_string = ir.TensorType(dtype), ir.Shape(cut.shape), value.doc_string
        real.metadata_props.update(value.metadata_props)
        graph.insert_before(before, chain)
        for use in uses:
            use.node.replace_input_with(use.idx, real)
        self._builder.discard(value)

    def put_values(self, value: ir.Value, shared: Shared, cut: Cut) -> None:
        """Let all that reads a weight read the entries that its codes stand for, as a weight like any other."""
        tensor = tensor_of(value)
        if tensor is None:
            raise TypeError(f"{value.name!r} is not constant")
        graph, uses = self._builder.place(value), tuple(value.uses())
        array = shared.real(cut).astype(tensor.dtype.numpy())
        new = self._builder.constant(f"{value.name or 'weight'}_shared", array, graph)
        new.metadata_props.update(value.metadata_props)
        for use in uses:
            use.node.replace_input_with(use.idx, new)
        self._builder.discard(value)

    def _lookup(
        self, name: str, shared: Shared, cut: Cut, graph: ir.Graph, dtype: ir.DataType, *, int8: bool
    ) -> list[ir.Node]:
        """The nodes that make the weight, the last one last."""
        make, codes = self._builder, cut.join(shared.codes) if cut.is_plain else shared.codes
        table, chain = self._table(name, shared, cut, graph, dtype, int8=int8)
        stored = self._codes(f"{name}_codes", codes.reshape(cut.code_shape), shared, cut, graph)
        chain.append(make.node("Cast", [stored], f"{name}_index", {"to": int(ir.DataType.INT32)}))
        if cut.groups == 1:
            chain.append(make.node("Gather", [table, chain[-1].outputs[0]], f"{name}_shared"))
        else:
            axis = 1 - cut.axis if cut.is_plain else 1
            chain.append(make.node("GatherElements", [table, chain[-1].outputs[0]], f"{name}_shared", {"axis": axis}))
        if not cut.is_plain:
            first = cut.groups > 1 and cut.axis > 0
            shape = make.constant(f"{name}_shape", np.array(cut.moved if first else cut.shape, np.int64), graph)
            chain.append(make.node("Reshape", [chain[-1].outputs[0], shape], f"{name}_whole"))
            if first:
                back = make.node("Transpose", chain[-1].outputs, f"{name}_turned")
                order = [*range(1, cut.axis + 1), 0, *range(cut.axis + 1, len(cut.shape))]
                back.attributes.add(ir.AttrInt64s("perm", order))
                chain.append(back)
        return chain

    def _table(
        self, name: str, shared: Shared, cut: Cut, graph: ir.Graph, dtype: ir.DataType, *, int8: bool
    ) -> tuple[ir.Value, list[ir.Node]]:
        """The codebooks in the shape that the lookup wants, and what has to be done to them first."""
        make, tables = self._builder, shared.tables
        turned = cut.groups > 1 and cut.is_plain and cut.axis == 1
        shaped = (
            tables[0] if cut.width == 1 and cut.groups == 1 else np.ascontiguousarray(tables.T) if turned else tables
        )
        if not int8:
            return make.constant(f"{name}_table", shaped.astype(dtype.numpy()), graph), []
        scales = int8_scales(tables if cut.width == 1 else tables.reshape(1, -1))
        spread = scales[0] if cut.groups == 1 else scales if turned else scales[:, None]
        steps = make.constant(f"{name}_table", np.rint(shaped / spread).astype(np.int8), graph)
        scale = make.constant(f"{name}_scale", (scales if cut.groups > 1 else scales[0]).astype(dtype.numpy()), graph)
        attributes = {"axis": 1 if turned else 0} if cut.groups > 1 else {}
        up = make.node("DequantizeLinear", [steps, scale], f"{name}_entries", attributes)
        return up.outputs[0], [up]

    def _codes(self, wish: str, codes: Array, shared: Shared, cut: Cut, graph: ir.Graph) -> ir.Value:
        """An initializer of packed codes."""
        bits = code_bits(len(shared.tables) if cut.width > 1 else shared.tables.shape[1], self._opset)
        if bits == 8:
            return self._builder.constant(wish, np.ascontiguousarray(codes), graph)
        name, dtype = self._builder.name(wish), _DTYPES[bits]
        tensor = ir.PackedTensor(pack(codes, bits), dtype, shape=ir.Shape(codes.shape), name=name)
        value = ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(codes.shape), const_value=tensor)
        graph.register_initializer(value)
        return value
