"""Grids that are made while a network runs: DynamicQuantizeLinear."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import onnx_ir as ir

from graphopt_backends.kernels.dynamic import Range, Round
from graphopt_backends.network.network import Network
from graphopt_backends.network.regions import Region

__all__ = ["CHECKS", "CONVERTERS"]


def _quantize(network: Network, node: ir.Node, _: Region | None) -> None:
    source = network.input(node)
    if not source.is_dense:
        source = network.copied(source, node=node)
    first = Range(network.isa, source.size)
    ranges = network.temporary((2 * first.chunks,), "float32")
    network.call(first, [source, ranges], node)
    integers, scale, zero = node.outputs
    results = [network.new(integers, source.order), network.new(scale), network.new(zero)]
    network.call(Round(network.isa, source.size), [source, ranges, *results], node)


def _check(node: ir.Node) -> bool:
    source = node.inputs[0]
    return source is not None and source.dtype == ir.DataType.FLOAT and all(value.name for value in node.outputs)


CONVERTERS: Mapping[str, Callable[[Network, ir.Node, Region | None], None]] = {"DynamicQuantizeLinear": _quantize}

CHECKS: Mapping[str, Callable[[ir.Node], bool]] = {"DynamicQuantizeLinear": _check}
