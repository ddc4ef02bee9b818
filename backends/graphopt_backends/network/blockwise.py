"""Products with constants of few bits, whose blocks have scales of their own; those of codes go to `codebook`.

| form | scales | zero points |
|---|---|---|
| MatMulNBits of `com.microsoft` | one for each block of a column | packed like weights, floats, or none: the middle |
| MatMul, Gemm of DequantizeLinear with blocks along k | the same | 4 bits, or none: 0 |
| MatMul, Gemm of DequantizeLinear | one for each column, or one for all | 4 bits, or none: 0 |

Activations are rounded to int8 block by block where ONNX Runtime does that too: in a MatMulNBits whose `accuracy_level`
is 4, and behind a DequantizeLinear. Weights of 8 bits in blocks become floats when the model is compiled.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir

from graphopt_backends._fold import is_constant, static_shape
from graphopt_backends.kernels.blockwise import MIDDLE, Activations, Blockwise
from graphopt_backends.kernels.gemm import Gemm
from graphopt_backends.network import codebook
from graphopt_backends.network.linear import flat_rows, float_epilogue
from graphopt_backends.network.network import Network, shape_of
from graphopt_backends.network.regions import Region

__all__ = ["OPERATORS", "convert", "is_supported", "keeps"]

OPERATORS = frozenset({"Gemm", "MatMul", "MatMulNBits"})
"""Operators that are converted here if `is_supported` says so."""

_CODES = (ir.DataType.INT4, ir.DataType.UINT4)
_BYTES = (ir.DataType.INT8, ir.DataType.UINT8)
_INT8_LEVEL = 4
_MOST_ROUNDED = 128  # activations that share a step where a column has one scale
_STEP = 16  # what blocks of the kernel are multiples of


@dataclass(frozen=True)
class _Blocks:
    """A weight.

    Attributes:
        codes: 0 to 15, or 0 to 255, [depth, columns].
        scales: [blocks, columns].
        shifts: What is added to the weights of a block, [blocks, columns]; None: nothing.
        block: Rows of a block.
        bits: Of a code.
    """

    codes: np.ndarray
    scales: np.ndarray
    shifts: np.ndarray | None
    block: int
    bits: int = 4

    def dense(self) -> np.ndarray:
        """The numbers that it stands for."""
        found = (self.codes - np.float32(MIDDLE)) * self._spread(self.scales)
        return found if self.shifts is None else found + self._spread(self.shifts)

    def _spread(self, values: np.ndarray) -> np.ndarray:
        return np.repeat(values, self.block, axis=0)[: len(self.codes)]

    def cut(self, most: int) -> _Blocks:
        """The same in blocks of at most `most` rows, if there is one block and that is larger."""
        if len(self.scales) > 1 or self.block <= most:
            return self
        times = -(-len(self.codes) // most)
        shifts = None if self.shifts is None else np.repeat(self.shifts, times, axis=0)
        return replace(self, scales=np.repeat(self.scales, times, axis=0), shifts=shifts, block=most)

    def scaled(self, factor: float) -> _Blocks:
        """The same times a number."""
        shifts = None if self.shifts is None else self.shifts * np.float32(factor)
        return replace(self, scales=self.scales * np.float32(factor), shifts=shifts)


def is_supported(node: ir.Node) -> bool:
    """True if the weight of a product is a constant of 4 bits that a kernel decodes."""
    if node.op_type not in OPERATORS or node.outputs[0].dtype != ir.DataType.FLOAT:
        return False
    source = node.inputs[0]
    if source is None or source.dtype != ir.DataType.FLOAT or static_shape(source) is None:
        return False
    if node.op_type == "MatMulNBits":
        return node.domain == "com.microsoft" and _n_bits_check(node)
    if node.domain not in ("", "ai.onnx") or (node.op_type == "Gemm" and not _gemm_check(node)):
        return False
    maker = _maker(node)
    return maker is not None and (_dequantize_check(node, maker) or codebook.is_supported(node))


def keeps(node: ir.Node) -> bool:
    """True for a node that makes weights of few bits for products that are computed here, and for nothing else."""
    users = list(node.outputs[0].uses())
    if node.op_type not in codebook.MAKERS or node.domain not in ("", "ai.onnx") or not users or _is_output(node):
        return False
    return all(_makes_with(user, place) if user.op_type in codebook.MAKERS else place == 1 and is_supported(user)
               for user, place in users)  # fmt: skip


def _makes_with(node: ir.Node, place: int) -> bool:
    """True for a node that makes weights of its input at this place."""
    return place in codebook.MAKERS[node.op_type] and keeps(node)


def _is_output(node: ir.Node) -> bool:
    return any(value.is_graph_output() for value in node.outputs)


def _maker(node: ir.Node) -> ir.Node | None:
    """What makes the weight of a product."""
    weight = node.inputs[1]
    return None if weight is None else weight.producer()


def _n_bits_check(node: ir.Node) -> bool:
    block, inputs = node.attributes.get_int("block_size", 0), [*node.inputs, *[None] * 6]
    constants = [inputs[1], inputs[2], *(value for value in (inputs[3], inputs[5]) if value is not None)]
    return (
        node.attributes.get_int("bits", 4) in (4, 8) and block > 0 and block % _STEP == 0 and inputs[4] is None
        and all(is_constant(value) for value in constants)
    )  # fmt: skip


def _gemm_check(node: ir.Node) -> bool:
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    columns = shape_of(node.outputs[0])[1]
    fits = bias is None or (is_constant(bias) and int(np.prod(shape_of(bias))) in (1, columns))
    return fits and not node.attributes.get_int("transA", 0)


def _is_flipped(node: ir.Node) -> bool:
    return node.op_type == "Gemm" and bool(node.attributes.get_int("transB", 0))


def _dequantize_check(node: ir.Node, maker: ir.Node) -> bool:
    """Scales stand for blocks along k, for columns, or for all."""
    if maker.op_type != "DequantizeLinear" or maker.domain not in ("", "ai.onnx"):
        return False
    values, scale = maker.inputs[0], maker.inputs[1]
    if values is None or scale is None or not all(v is None or is_constant(v) for v in maker.inputs):
        return False
    axis, block = maker.attributes.get_int("axis", 1) % 2, maker.attributes.get_int("block_size", 0)
    known = values.dtype in _CODES or (values.dtype in _BYTES and block > 0)
    if not known or len(shape_of(values)) != 2 or scale.dtype != ir.DataType.FLOAT:
        return False
    along = 1 if _is_flipped(node) else 0
    if block:
        return axis == along and (block % _STEP == 0 or block >= shape_of(values)[along])
    return int(np.prod(shape_of(scale))) == 1 or axis != along


def convert(network: Network, node: ir.Node, region: Region) -> None:
    """Compute a product that `is_supported`, and what follows it.

    Args:
        network: Where it is added.
        node: The product.
        region: It and what is done with its result.
    """
    if node.op_type != "MatMulNBits" and codebook.is_supported(node):
        codebook.convert(network, node, region, _bias(node))
        return
    weight, bias, activations = _blocks_of(node), _bias(node), _activations(node)
    if activations == "int8":
        weight = weight.cut(_MOST_ROUNDED)
    depth, columns = weight.codes.shape
    flat, pitch = flat_rows(network, network.input(node, 0), depth, node)
    result = network.new(region.result)
    epilogue, operands = float_epilogue(network, region, result, result.rank - 1, bias=bias is not None)
    kernel = Blockwise(
        network.isa, activations, result.size // columns, columns, depth, weight.block,
        weight.shifts is not None, epilogue, pitch,
    )  # fmt: skip
    if not kernel.is_known:
        kernel = replace(kernel, activations="float32")
    if weight.bits == 4:
        packed = kernel.pack(weight.codes, weight.scales, weight.shifts)
    else:  # bytes
        kernel = Gemm(network.isa, "f32", kernel.rows, columns, depth, epilogue, pitch)
        packed = kernel.pack(weight.dense())
    views = [flat, network.constant(packed)]
    if bias is not None:
        values = np.broadcast_to(bias.reshape(-1), (columns,)).astype(np.float32)
        views.append(network.constant(kernel.pack_column(values)))
    network.call(kernel, [*views, *operands, result], *region.nodes)


def _activations(node: ir.Node) -> Activations:
    if node.op_type == "MatMulNBits":
        return "int8" if node.attributes.get_int("accuracy_level", 0) == _INT8_LEVEL else "float32"
    maker = _maker(node)
    return "int8" if maker is not None and maker.op_type == "DequantizeLinear" else "float32"


def _bias(node: ir.Node) -> np.ndarray | None:
    place = {"Gemm": 2, "MatMulNBits": 5}.get(node.op_type, len(node.inputs))
    if len(node.inputs) <= place or node.inputs[place] is None:
        return None
    beta = node.attributes.get_float("beta", 1.0) if node.op_type == "Gemm" else 1.0
    return _array(node, place).astype(np.float32) * np.float32(beta)


def _array(node: ir.Node, index: int) -> np.ndarray:
    value = node.inputs[index]
    assert value is not None
    assert value.const_value is not None
    return value.const_value.numpy()


def _blocks_of(node: ir.Node) -> _Blocks:
    if node.op_type == "MatMulNBits":
        return _n_bits(node)
    maker = _maker(node)
    assert maker is not None
    found = _dequantized(maker, flipped=_is_flipped(node))
    return found.scaled(node.attributes.get_float("alpha", 1.0)) if node.op_type == "Gemm" else found


def _n_bits(node: ir.Node) -> _Blocks:
    """Codes of a column lie together, two of 4 bits in a byte, blocks as they follow each other."""
    depth, columns = node.attributes.get_int("K", 0), node.attributes.get_int("N", 0)
    block = node.attributes.get_int("block_size", 0)
    blocks, bits = -(-depth // block), node.attributes.get_int("bits", 4)
    unpacked = _halves if bits == 4 else np.asarray
    codes = unpacked(_array(node, 1).reshape(columns, -1))[:, :depth].T
    scales = _array(node, 2).reshape(columns, blocks).astype(np.float32).T
    if len(node.inputs) > 3 and node.inputs[3] is not None:
        zeros = _array(node, 3).reshape(columns, -1)
        zeros = unpacked(zeros)[:, :blocks].T if zeros.dtype == np.uint8 else zeros.T
    elif bits == 4:
        return _Blocks(codes, scales, None, block)
    else:
        zeros = np.full_like(scales, 128)
    return _Blocks(codes, scales, _shifts(scales, zeros), block, bits=bits)


def _halves(packed: np.ndarray) -> np.ndarray:
    """Both numbers of each byte, the lower one first."""
    return np.stack([packed & 15, packed >> 4], axis=-1).reshape(len(packed), -1)


def _shifts(scales: np.ndarray, zeros: np.ndarray) -> np.ndarray:
    """What the distance of zero points from the middle adds to weights."""
    return (MIDDLE - zeros.astype(np.float32)) * scales


def _dequantized(maker: ir.Node, *, flipped: bool) -> _Blocks:
    assert maker.inputs[0] is not None
    dtype = maker.inputs[0].dtype
    first = 8 if dtype == ir.DataType.INT4 else 128 if dtype == ir.DataType.INT8 else 0  # signed numbers become codes
    codes = (_array(maker, 0).astype(np.int16) + first).astype(np.uint8)
    zeros = np.zeros(1, np.int16)
    if len(maker.inputs) > 2 and maker.inputs[2] is not None:
        zeros = _array(maker, 2).astype(np.int16)
    scales, zeros = _array(maker, 1).astype(np.float32), zeros + first
    if flipped:
        codes, scales = codes.T, scales.T
        zeros = zeros.T
    depth, columns = codes.shape
    block = maker.attributes.get_int("block_size", 0)
    if not block:
        scales, zeros = scales.reshape(1, -1), zeros.reshape(1, -1)
    if not block or block % _STEP:
        block = -(-depth // _STEP) * _STEP
    scales = np.broadcast_to(scales, (-(-depth // block), columns))
    zeros = np.broadcast_to(zeros.reshape(1, 1) if zeros.size == 1 else zeros, scales.shape)
    shifts = None if (zeros == MIDDLE).all() else _shifts(scales, zeros)
    return _Blocks(codes, scales, shifts, block, bits=4 if dtype in _CODES else 8)
