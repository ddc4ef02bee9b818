"""Products with constants that are looked up in tables, by codes of few bits.

| table | codes | what makes the weight |
|---|---|---|
| `[entries]` | any shape | Gather |
| `[entries, columns]` | `[depth, columns]` | GatherElements along axis 0 |
| `[columns, entries]` | `[columns, depth]` | GatherElements along axis 1; something transposes it |
| `[groups, entries]` | `[groups, members]` | the same with a Reshape between, to `[columns, depth]` |

Codes are constants of 2, 4 or 8 bits without a sign, which a Cast makes indices; a Reshape may follow a Gather as well,
a Transpose any lookup. Tables are constants, or constants behind a DequantizeLinear. Their entries are 64 at most:
memory is as fast as what looks up more.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from graphopt_backends._fold import is_constant, static_shape
from graphopt_backends.kernels.codebook import Codebook
from graphopt_backends.kernels.gemm import Gemm
from graphopt_backends.kernels.multiply import stored_as
from graphopt_backends.kernels.tables import SIZES
from graphopt_backends.network.half import narrowed
from graphopt_backends.network.linear import flat_rows, float_epilogue
from graphopt_backends.network.network import Network
from graphopt_backends.network.regions import Region

__all__ = ["MAKERS", "convert", "is_supported", "lookup_of"]

MAKERS: Mapping[str, Sequence[int]] = {
    "Cast": (), "DequantizeLinear": (), "Gather": (0, 1), "GatherElements": (0, 1), "Reshape": (0,), "Transpose": (0,),
}  # fmt: skip
"""Operators that make a weight, and which of their inputs others of them make."""

_CODES = (ir.DataType.UINT2, ir.DataType.UINT4, ir.DataType.UINT8)
_BYTES = (ir.DataType.INT8, ir.DataType.UINT8)


@dataclass(frozen=True)
class Lookup:
    """How a weight [depth, columns] is made.

    Attributes:
        table: What the lookup reads.
        codes: A constant.
        shape: Of the weight, or of its transpose.
        turned: It is the transpose.
        axis: That along which a table of several is looked up; None: there is one.
    """

    table: ir.Value
    codes: ir.Value
    shape: tuple[int, ...]
    turned: bool
    axis: int | None

    @property
    def columns(self) -> int:
        """Columns of the weight."""
        return self.shape[0 if self.turned else 1]

    def tables(self) -> np.ndarray:
        """Tables [number, entries] of float32, each for as many neighbouring columns."""
        found = _numbers(self.table)
        return found.reshape(1, -1) if self.axis is None else found.T if self.axis == 0 else found

    def places(self) -> np.ndarray:
        """Codes [depth, columns]."""
        found = _array(self.codes).astype(np.uint8).reshape(self.shape)
        return found.T if self.turned else found


def lookup_of(product: ir.Node) -> Lookup | None:
    """What makes the weight of a MatMul or Gemm, if that is one of the forms above."""
    weight = product.inputs[1] if len(product.inputs) > 1 else None
    turned = product.op_type == "Gemm" and bool(product.attributes.get_int("transB", 0))
    maker = _maker(weight, "Transpose")
    if maker is not None and tuple(maker.attributes.get_ints("perm") or (1, 0)) == (1, 0):
        weight, turned = maker.inputs[0], not turned
    shape = static_shape(weight)
    maker = _maker(weight, "Reshape")
    if maker is not None:
        weight = maker.inputs[0]
    if shape is None or len(shape) != 2 or 0 in shape:
        return None
    return _looked_up(weight, shape, turned=turned, whole=maker is None)


def _maker(value: ir.Value | None, *operators: str) -> ir.Node | None:
    """What computes a value, if it is one of these operators."""
    node = None if value is None else value.producer()
    return node if node is not None and node.op_type in operators and node.domain in ("", "ai.onnx") else None


def _looked_up(value: ir.Value | None, shape: tuple[int, ...], *, turned: bool, whole: bool) -> Lookup | None:
    """A lookup whose result becomes a matrix; `whole`: it is that."""
    node = _maker(value, "Gather", "GatherElements")
    cast = None if node is None else _maker(node.inputs[1], "Cast")
    table, codes = None if node is None else node.inputs[0], None if cast is None else cast.inputs[0]
    sizes = static_shape(table)
    if node is None or table is None or sizes is None or codes is None or not _is_table(table) or not _is_codes(codes):
        return None
    axis = node.attributes.get_int("axis", 0)
    if node.op_type == "Gather":
        fits = len(sizes) == 1 and axis in (0, -1)
        return Lookup(table, codes, shape, turned, None) if fits and sizes[0] <= SIZES[-1] else None
    axis, of_codes = axis % 2, static_shape(codes)
    if len(sizes) != 2 or of_codes is None or len(of_codes) != 2 or sizes[axis] > SIZES[-1]:
        return None
    number, columns = sizes[1 - axis], 0 if turned else 1
    whole = whole or of_codes == shape
    right = axis == 1 - columns if whole else axis == 1 and columns == 0 and shape[0] % number == 0
    return Lookup(table, codes, shape, turned, axis) if right and of_codes[1 - axis] == number else None


def _is_codes(value: ir.Value) -> bool:
    return is_constant(value) and value.dtype in _CODES


def _is_table(value: ir.Value) -> bool:
    """A constant of float32, or one of bytes with scales and zero points."""
    if is_constant(value):
        return value.dtype == ir.DataType.FLOAT
    maker = _maker(value, "DequantizeLinear")
    if maker is None or maker.attributes.get_int("block_size", 0) or not all(map(_is_given, maker.inputs)):
        return False
    steps, scale = maker.inputs[0], maker.inputs[1]
    return steps is not None and scale is not None and steps.dtype in _BYTES and scale.dtype == ir.DataType.FLOAT


def _is_given(value: ir.Value | None) -> bool:
    return value is None or is_constant(value)


def _numbers(table: ir.Value) -> np.ndarray:
    maker = table.producer()
    if maker is None:
        return _array(table).astype(np.float32)
    steps, scale, *zeros = (_array(value) for value in maker.inputs if value is not None)
    spread = [1] * steps.ndim
    spread[maker.attributes.get_int("axis", 1) % steps.ndim] = -1
    whole = steps.astype(np.int32)
    for zero in zeros:
        whole = whole - zero.astype(np.int32).reshape(spread if zero.size > 1 else ())
    return whole.astype(np.float32) * scale.reshape(spread if scale.size > 1 else ())


def _array(value: ir.Value) -> np.ndarray:
    assert value.const_value is not None
    return value.const_value.numpy()


def is_supported(product: ir.Node) -> bool:
    """True if the weight of a product is looked up in tables of a known form."""
    return lookup_of(product) is not None


def convert(network: Network, node: ir.Node, region: Region, bias: np.ndarray | None) -> None:
    """Compute a product that `is_supported`, and what follows it; its codes were checked by `look_up`.

    Args:
        network: Where it is added.
        node: The product.
        region: It and what is done with its result.
        bias: What sums begin with, if that is not zero.
    """
    lookup = lookup_of(node)
    assert lookup is not None
    tables, codes, columns = lookup.tables(), lookup.places(), lookup.columns
    alpha = node.attributes.get_float("alpha", 1.0) if node.op_type == "Gemm" else 1.0
    tables, span, entries = tables * np.float32(alpha), columns // len(tables), tables.shape[1]
    flat, pitch = flat_rows(network, network.input(node, 0), len(codes), node)
    result = network.new(region.result)
    epilogue, operands = float_epilogue(network, region, result, result.rank - 1, bias=bias is not None)
    size = next(size for size in SIZES if size >= entries)
    kernel = Codebook(network.isa, result.size // columns, columns, len(codes), size, span, epilogue, pitch)
    if kernel.is_known and np.isfinite(tables).all():  # codes are followed by zeros, which meet zeros
        views = [flat, network.constant(kernel.pack(codes)), network.constant(kernel.pack_tables(tables))]
    else:
        weight = narrowed(tables[np.arange(columns) // span, codes])
        kernel = Gemm(network.isa, "f32", kernel.rows, columns, len(codes), epilogue, pitch, stored=stored_as(weight))
        views = [flat, network.constant(kernel.pack(weight))]
    if bias is not None:
        values = np.broadcast_to(bias.reshape(-1), (columns,)).astype(np.float32)
        views.append(network.constant(kernel.pack_column(values)))
    network.call(kernel, [*views, *operands, result], *region.nodes)
