"""Convolutions and products with constants, and what happens to their results."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import onnx_ir as ir

from graphopt_backends._fold import is_constant, static_shape
from graphopt_backends.kernels.conv import Window
from graphopt_backends.kernels.depthwise import Depthwise
from graphopt_backends.kernels.epilogue import Epilogue
from graphopt_backends.kernels.expression import (
    Expression,
    as_type,
    call,
    operand,
    parameter,
    simplified,
    substituted,
)  # fmt: skip
from graphopt_backends.kernels.gemm import Gemm
from graphopt_backends.kernels.multiply import stored_as
from graphopt_backends.network.batched import multiply_batches
from graphopt_backends.network.half import narrowed
from graphopt_backends.network.integers import bytes_of, is_weight
from graphopt_backends.network.network import Network, shape_of
from graphopt_backends.network.products import convolution, on_tiles, product
from graphopt_backends.network.regions import Region
from graphopt_backends.network.sums import Operands, Sums, Term, is_depthwise, operands_of, taken_factor
from graphopt_backends.network.views import View

__all__ = ["CONVERTERS", "accepts", "flat_rows", "float_epilogue", "is_supported"]


def is_supported(node: ir.Node) -> bool:
    """True if a kernel computes this convolution or product."""
    check = _CHECKS[node.op_type]
    output = node.outputs[0]
    return (
        node.domain in ("", "ai.onnx")
        and output.dtype == (ir.DataType.INT32 if node.op_type.endswith("Integer") else ir.DataType.FLOAT)
        and all(v is None or static_shape(v) is not None for v in (*node.inputs, output))
        and check(node)
    )


def accepts(anchor: ir.Node, result: tuple[int, ...], value: ir.Value) -> bool:
    """An epilogue reads anything that is repeated to the shape of the result."""
    del anchor
    shape = shape_of(value)
    wide = (1,) * (len(result) - len(shape)) + shape
    return len(shape) <= len(result) and all(have in (1, want) for have, want in zip(wide, result, strict=True))


def _conv_check(node: ir.Node) -> bool:
    weight = node.inputs[1]
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    return (
        weight is not None
        and is_weight(weight)
        and len(shape_of(weight)) in (3, 4)
        and (bias is None or is_weight(bias))
        and node.attributes.get_string("auto_pad", "NOTSET") in ("NOTSET", "VALID")
    )


def _gemm_check(node: ir.Node) -> bool:
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    weight = node.inputs[1]
    if weight is None or not is_weight(weight) or (bias is not None and not is_weight(bias)):
        return False
    return bias is None or int(np.prod(shape_of(bias))) in (1, shape_of(node.outputs[0])[1])


def _matmul_check(node: ir.Node) -> bool:
    return all(value is not None and len(shape_of(value)) >= 2 for value in node.inputs[:2])


def _has_packed_weight(node: ir.Node) -> bool:
    """One constant matrix stands on the right."""
    weight = _value(node, 1)
    return is_weight(weight) and len(shape_of(weight)) == 2


def _integer_check(node: ir.Node) -> bool:
    """Weights and their zero points are constants, grids of activations one for all; or all zero points are."""
    weight, zero = node.inputs[1], node.inputs[2] if len(node.inputs) > 2 else None
    constants = [weight, *node.inputs[3:]]
    single = zero is None or int(np.prod(shape_of(zero))) == 1
    ranks = (3, 4) if node.op_type == "ConvInteger" else (2,)
    plain = node.attributes.get_string("auto_pad", "NOTSET") in ("NOTSET", "VALID")
    if node.op_type == "MatMulInteger" and bytes_of(node) is not None:
        return _matmul_check(node)
    if not single or not plain or not all(value is None or is_constant(value) for value in constants):
        return False
    return len(shape_of(_value(node, 1))) in ranks


_CHECKS: Mapping[str, Callable[[ir.Node], bool]] = {
    "Conv": _conv_check,
    "ConvInteger": _integer_check,
    "Gemm": _gemm_check,
    "MatMul": _matmul_check,
    "MatMulInteger": _integer_check,
}


def window_of(node: ir.Node, size: Sequence[int]) -> Window:
    """Taps of a convolution or pooling; one along the width becomes one along a height of 1."""
    rank = len(size)
    strides = node.attributes.get_ints("strides") or [1] * rank
    dilations = node.attributes.get_ints("dilations") or [1] * rank
    pads = node.attributes.get_ints("pads") or [0] * (2 * rank)
    if node.attributes.get_string("auto_pad", "NOTSET") == "VALID":
        pads = [0] * (2 * rank)
    if rank == 1:
        return Window((1, size[0]), (1, strides[0]), (1, dilations[0]), (0, pads[0], 0, pads[1]))
    return Window(
        (size[0], size[1]), (strides[0], strides[1]), (dilations[0], dilations[1]), (pads[0], pads[1], pads[2], pads[3])
    )


def channels_last(network: Network, view: View, node: ir.Node) -> tuple[View, int]:
    """An image whose channels lie together, and the elements from pixel to pixel."""
    _, channels, *sizes = view.shape
    batch_stride, channel_stride, *strides = view.strides
    pitch = strides[-1] if sizes[-1] > 1 else strides[0] if len(sizes) > 1 and sizes[0] > 1 else channels
    fits = (channel_stride == 1 or channels == 1) and pitch >= channels
    step = pitch
    for size, stride in zip(reversed(sizes), reversed(strides), strict=True):
        fits = fits and (size == 1 or stride == step)
        step *= size
    fits = fits and (view.shape[0] == 1 or batch_stride == step)
    if fits:
        return view, pitch
    order = (0, *range(2, view.rank), 1)
    return network.copied(view, order, node), channels


def image_order(rank: int) -> tuple[int, ...]:
    """Axes of an image from the slowest to the fastest."""
    return (0, *range(2, rank), 1)


def _convolve(network: Network, node: ir.Node, region: Region | None) -> None:
    assert region is not None
    on = operands_of(network, node, 0)
    source, pitch = channels_last(network, on.source, node)
    batch, channels, *sizes = source.shape
    height, width = (1, sizes[0]) if len(sizes) == 1 else (sizes[0], sizes[1])
    groups, weight = node.attributes.get_int("group", 1), on.weight
    window, filters = window_of(node, weight.shape[2:]), weight.shape[0]
    if weight.ndim == 3:
        weight = weight[:, :, None]
    result = network.new(region.result, image_order(source.rank))
    depthwise = is_depthwise(node, weight)
    weight = weight if depthwise else narrowed(weight)
    stored = stored_as(weight)
    isa, zero = network.isa, on.zero_point if isinstance(on.zero_point, int) else None
    image, plain = (batch, height, width, channels), window == Window((1, 1)) and groups == 1

    def kernel(on: Operands, filters: int, epilogue: Epilogue) -> Any:
        if depthwise:
            return Depthwise(isa, batch, height, width, channels, window, epilogue, source.dtype, zero, pitch)
        if plain:
            return product(isa, on, batch * height * width, filters, channels, epilogue, pitch, stored)
        return convolution(isa, on, image, filters, window, groups, epilogue, pitch, stored)

    def put(made: Any, weight: np.ndarray, bias: np.ndarray | None, operands: Sequence[View], result: View) -> None:
        packed = weight[:, :, 0, 0].T if plain else weight
        given = [] if isinstance(on.zero_point, int) or plain else [network.view(on.zero_point)]
        _call(network, made, source, packed, bias, [*operands, *given], result, *region.nodes)

    def totals() -> View:
        total = network.temporary((batch, 1, *result.shape[2:]), "int32", image_order(source.rank))
        ones = np.ones((1, *weight.shape[1:]), np.int8)
        plainly = replace(on, tiles=False)
        bias = Sums(replace(plainly, zero_point=0, excess=None), ones.reshape(1, -1).T).bias(isa, None)
        put(kernel(plainly, 1, Epilogue(operand(0, "int32"), bias=bias is not None)), ones, bias, [], total)
        return total

    bias, terms = on.bias, list[Term]()
    if not depthwise:
        on = on_tiles(on, lambda on, epilogue: kernel(on, filters, epilogue))
        sums = Sums(on, weight.reshape(filters, -1).T)
        bias, terms = sums.bias(isa, bias), sums.terms(network, (1, filters, *[1] * len(sizes)), totals)
    epilogue, operands = _epilogue(network, region, result, 1, bias is not None, on, terms, exact=depthwise)
    put(kernel(on, filters, epilogue), weight, bias, operands, result)


def _multiply(network: Network, node: ir.Node, region: Region | None) -> None:
    assert region is not None
    if not _has_packed_weight(node):
        multiply_batches(network, node, region)
        return
    flipped = node.op_type == "Gemm" and bool(node.attributes.get_int("transB", 0))
    on = operands_of(network, node, 0 if flipped else 1)
    source, weight, bias = on.source, on.weight.T if flipped else on.weight, on.bias
    if node.op_type == "Gemm":
        if node.attributes.get_int("transA", 0):
            source = source.permuted((1, 0))
        alpha, beta = node.attributes.get_float("alpha", 1.0), node.attributes.get_float("beta", 1.0)
        if (alpha, beta) != (1.0, 1.0):
            weight = weight * np.float32(alpha)
            bias = None if bias is None or not beta else bias * np.float32(beta)
    weight = narrowed(weight)
    depth, columns = weight.shape
    rows = source.size // depth
    flat, pitch = flat_rows(network, source, depth, node)
    if bias is not None:
        bias = np.ascontiguousarray(np.broadcast_to(bias.reshape(-1), (columns,)))
    result, isa = network.new(region.result), network.isa

    def totals() -> View:
        total = network.temporary((*result.shape[:-1], 1), "int32")
        ones = np.ones((depth, 1), np.int8)
        bias = Sums(replace(on, zero_point=0, excess=None, tiles=False), ones).bias(isa, None)
        plain = Epilogue(operand(0, "int32"), bias=bias is not None)
        _call(network, Gemm(isa, on.kind, rows, 1, depth, plain, pitch), flat, ones, bias, [], total, node)
        return total

    def kernel(on: Operands, epilogue: Epilogue) -> Any:
        return product(isa, on, rows, columns, depth, epilogue, pitch, stored_as(weight))

    on = on_tiles(on, kernel)
    sums = Sums(on, weight)
    bias, terms = sums.bias(isa, bias), sums.terms(network, (columns,), totals)
    epilogue, operands = _epilogue(network, region, result, result.rank - 1, bias is not None, on, terms)
    _call(network, kernel(on, epilogue), flat, weight, bias, operands, result, *region.nodes)


def flat_rows(network: Network, source: View, depth: int, node: ir.Node) -> tuple[View, int]:
    """Activations as rows of consecutive elements, and the elements from row to row."""
    rows = source.size // depth
    flat = source.reshaped((rows, depth))
    if flat is None or (depth > 1 and flat.strides[1] != 1) or (rows > 1 and flat.strides[0] < depth):
        flat = network.copied(source, node=node).reshaped((rows, depth))
        assert flat is not None
    return flat, flat.strides[0] if rows > 1 else depth


def _value(node: ir.Node, index: int) -> ir.Value:
    value = node.inputs[index]
    assert value is not None
    return value


def _epilogue(
    network: Network, region: Region, result: View, axis: int, bias: bool, on: Operands, terms: Sequence[Term] = (),
    *, exact: bool = False,
) -> tuple[Epilogue, list[View]]:  # fmt: skip
    """The epilogue of a region and its operands; all axes but one are rows, and must follow each other alike.

    Args:
        network: Where operands are.
        region: What is computed.
        result: Where it goes.
        axis: That of the columns.
        bias: Sums begin with one.
        on: What the sums are made of.
        terms: What is added to sums of integers.
        exact: Those sums are floats.
    """
    views: list[View] = []
    strides: list[tuple[int, int]] = []
    rows = [i for i in result.order if i != axis]
    sizes = (result.size // result.shape[axis], result.shape[axis])

    def read(view: View) -> Expression:
        """One more operand."""
        view = view.broadcast(result.shape)
        flat = view.permuted((*rows, axis)).reshaped(sizes)
        if flat is None or (flat.shape[1] > 1 and flat.strides[1] not in (0, 1)):
            flat = network.copied(view, result.order).permuted((*rows, axis)).reshaped(sizes)
            assert flat is not None
        views.append(flat)
        strides.append((flat.strides[0] if flat.shape[0] > 1 else 0, flat.strides[1] if flat.shape[1] > 1 else 1))
        return operand(len(views), flat.dtype)

    for value in region.operands:
        read(network.view(value))
    expression = region.expression
    if on.kind != "f32":
        sums = operand(0, "float32" if exact else "int32")
        for left, right in terms:
            product = call("mul", as_type(read(left), "int32"), as_type(read(right), "int32"))
            sums = call("add", as_type(sums, "int32"), product)
        if on.scale is None:
            expression = substituted(expression, {operand(0, "int32"): as_type(sums, "int32")})
        else:
            own, scale = taken_factor(expression, on.scale)
            step = parameter(float(scale[0])) if scale.size == 1 else operand(len(views) + 1)
            if scale.size > 1:
                views.append(network.constant(scale))
                strides.append((0, 1))
            expression = substituted(own, {operand(0): call("mul", as_type(sums, "float32"), step)})
    expression, held = network.bound(simplified(expression), len(views) + 1)
    return Epilogue(expression, (*strides, *((0, 0) for _ in held)), bias), [*views, *held]


def float_epilogue(
    network: Network, region: Region, result: View, axis: int, *, bias: bool
) -> tuple[Epilogue, list[View]]:
    """The epilogue of a region whose sums are floats, and its operands; see `_epilogue`."""
    return _epilogue(network, region, result, axis, bias, Operands(result, np.empty(0), None))


def _call(
    network: Network, kernel: Any, source: View, weight: np.ndarray, bias: np.ndarray | None, operands: Sequence[View],
    result: View, *nodes: ir.Node,
) -> None:  # fmt: skip
    views = [source, network.constant(kernel.pack(weight))]
    if bias is not None:
        views.append(network.constant(kernel.pack_column(bias)))
    network.call(kernel, [*views, *operands, result], *nodes)


CONVERTERS: Mapping[str, Callable[[Network, ir.Node, Region | None], None]] = {
    "Conv": _convolve,
    "ConvInteger": _convolve,
    "Gemm": _multiply,
    "MatMul": _multiply,
    "MatMulInteger": _multiply,
}
