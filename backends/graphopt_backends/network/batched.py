"""Products of two activations, or with many constant matrices: floats, or integers where both are."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir

from graphopt_backends.kernels.batched import Batched
from graphopt_backends.kernels.byte_products import ByteProducts
from graphopt_backends.kernels.epilogue import Epilogue
from graphopt_backends.kernels.expression import (
    Expression,
    as_type,
    call,
    operand,
    parameter,
    simplified,
    substituted,
)
from graphopt_backends.kernels.multiply import Stored
from graphopt_backends.network.integers import Bytes, bytes_of
from graphopt_backends.network.network import Network, shape_of
from graphopt_backends.network.regions import Region
from graphopt_backends.network.sums import matrices_of, taken_factor
from graphopt_backends.network.views import View

__all__ = ["multiply_batches", "order_of_reader"]


def multiply_batches(network: Network, node: ir.Node, region: Region) -> None:
    """Two activations, or many constant matrices."""
    result = network.new(region.result, order_of_reader(region.result))
    batch = result.shape[:-2]
    on, weight = bytes_of(node), node.inputs[1]
    assert weight is not None
    stored: Stored = "float32"
    if on is not None:
        left, right = (network.view(side) for side in on.sides)
    else:
        left, (right, stored) = network.input(node, 0), matrices_of(network, weight)
    if left.shape[-1] > 1 and left.strides[-1] != 1:
        left = network.copied(left, node=node)
    if result.strides[-1] != 1 and result.shape[-1] > 1:
        result = network.new(region.result)
    operands, strides, steps = list[View](), list[tuple[int, int]](), list[tuple[int, ...]]()
    for value in region.operands:
        view = network.view(value).broadcast(result.shape)
        if view.shape[-1] > 1 and view.strides[-1] not in (0, 1):
            view = network.copied(network.view(value)).broadcast(result.shape)
        operands.append(view)
        strides.append((view.strides[-2], view.strides[-1]))
        steps.append(view.strides[:-2])
    left, right = left.broadcast((*batch, *left.shape[-2:])), right.broadcast((*batch, *right.shape[-2:]))
    expression = region.expression if on is None else _of_sums(region.expression, on)
    expression, held = network.bound(simplified(expression), len(operands) + 1)
    operands += held
    strides += [(0, 0)] * len(held)
    steps += [(0,) * len(batch)] * len(held)
    epilogue, sizes = Epilogue(expression, tuple(strides)), (result.shape[-2], result.shape[-1], left.shape[-1])

    def kernel(right: View) -> Any:
        views = (left.strides[:-1], right.strides, result.strides[:-1])
        given = (network.isa, batch, *sizes, *views, epilogue, tuple(steps))
        if on is None:
            return Batched(*given, stored)
        return ByteProducts(*given, dtypes=(left.dtype, right.dtype), zeros=on.zeros)

    if on is not None and not kernel(right).reads(right.strides):
        right = network.copied(right, node=node)
    network.call(kernel(right), [left, right, *operands, result], *region.nodes)


def _of_sums(expression: Expression, on: Bytes) -> Expression:
    """An expression of a product, as one of the sums of integers that make it."""
    if on.scale is None:
        return expression
    own, scale = taken_factor(expression, np.array([on.scale], np.float32))
    product = call("mul", as_type(operand(0, "int32"), "float32"), parameter(float(scale[0])))
    return substituted(own, {operand(0): product})


def order_of_reader(value: ir.Value) -> tuple[int, ...] | None:
    """The order of axes that the only reader brings about, so that it need not."""
    users = list(value.uses())
    if len(users) != 1 or users[0][0].op_type != "Transpose" or value.is_graph_output():
        return None
    axes = users[0][0].attributes.get_ints("perm")
    rank = len(shape_of(value))
    return tuple(axes) if axes is not None and axes[-1] == rank - 1 else None
