"""Keep the few channels of an activation that dominate its range in float.

A product with constant weights is split by input channels: the outliers meet their rows of the weight in float, all
others in integers (LLM.int8, Dettmers et al., 2022). The channels are those of the calibration data.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx_ir as ir

from graphopt.analyses import SHAPES
from graphopt.pass_base import Change, Context
from graphopt_passes.fold.rewiring import FreshNames
from graphopt_passes.quant.adjust.constants import replace_constant
from graphopt_passes.quant.adjust.statistics import ChannelStatistics, ChannelStatisticsAnalysis
from graphopt_passes.quant.sites import KEPT, Site, keyed_nodes, tensor_of

__all__ = ["outlying", "split_outliers"]

Array = np.ndarray[Any, np.dtype[Any]]

_PAYS = 4.0  # the rest has at most half the range, which is six decibels


def outlying(low: Array, high: Array, fraction: float) -> Array:
    """The channels without which the range of an activation is at most half; empty if there are not so few.

    Args:
        low: `[channels]` least values.
        high: `[channels]` greatest values.
        fraction: Part of the channels at most.
    """
    reach = np.maximum(np.abs(low), np.abs(high))
    order = np.argsort(-reach, kind="stable")
    most = math.ceil(fraction * reach.size) if fraction > 0 else 0
    for count in range(1, min(most, reach.size - 1) + 1):
        if reach[order[0]] ** 2 >= _PAYS * reach[order[count]] ** 2:
            return np.sort(order[:count])
    return order[:0]


def split_outliers(model: ir.Model, sites: Sequence[Site], fraction: float, ctx: Context) -> list[Change]:
    """Split products by input channels, in place; the model computes the same.

    Args:
        model: A float model.
        sites: Layers that will be quantized.
        fraction: Part of the input channels that may stay float.
        ctx: Facts about the model, with calibration data.

    Returns:
        What happened at each MatMul and Gemm of the main graph.
    """
    nodes, shapes = keyed_nodes(model), ctx.fact(SHAPES)
    wanted = [site for site in sites if site.main and site.operator in ("Gemm", "MatMul")]
    refused = {site.key: _refusal(nodes[site.key], site, shapes.rank(nodes[site.key].inputs[0])) for site in wanted}
    read = {site.key: nodes[site.key].inputs[0] for site in wanted if not refused[site.key]}
    names = dict.fromkeys(value.name or "" for value in read.values() if value is not None)
    values = tuple((name, -1) for name in names)
    seen = ChannelStatisticsAnalysis(values=values).compute(model, ctx) if values else {}
    surgery = _Surgery(model, seen, fraction)
    changes: list[Change] = []
    for site in wanted:
        reason = refused[site.key]
        changes.append(
            Change.skipped(site.name, f"no outliers split off: {reason}")
            if reason
            else surgery.split(nodes[site.key], site)
        )
    return changes


def _refusal(node: ir.Node, site: Site, rank: int | None) -> str:
    if site.weights[0].index != 1 or len(site.weights[0].shape) != 2 or not rank:
        return "its weight is no matrix on the right"
    if node.attributes.get_int("transA", 0) or node.attributes.get_float("alpha", 1.0) != 1.0:
        return "its input is transposed or scaled"
    value = node.inputs[1]
    return "its weight is shared" if value is not None and len(tuple(value.uses())) > 1 else ""


@dataclass(eq=False)
class _Surgery:
    model: ir.Model
    seen: Mapping[str, ChannelStatistics]
    fraction: float
    parts: dict[str, tuple[ir.Value, ir.Value]] = field(default_factory=dict[str, tuple[ir.Value, ir.Value]])

    def __post_init__(self) -> None:
        self.names = FreshNames(self.model)

    def split(self, node: ir.Node, site: Site) -> Change:
        source, tensor = node.inputs[0], tensor_of(node.inputs[1])
        if source is None or tensor is None:
            raise TypeError(f"{site.name!r} has lost an input")
        seen = self.seen.get(source.name or "")
        if seen is None or not seen.finite:
            return Change.skipped(site.name, "no outliers split off: what it reads is not finite, or was not seen")
        chosen = outlying(seen.low, seen.high, self.fraction)
        if not chosen.size:
            return Change.skipped(site.name, "no outliers split off: no few channels dominate what it reads")
        axis = 1 if site.operator == "Gemm" and node.attributes.get_int("transB", 0) else 0
        rest, few = self._parts(node, source, chosen, seen.low.size)
        weight = tensor.numpy()
        rows = np.ascontiguousarray(np.moveaxis(weight, axis, 0)[chosen])
        mask = _mask(chosen, weight.shape[axis])[:, None] if axis == 0 else _mask(chosen, weight.shape[axis])[None]
        node.replace_input_with(0, rest)
        replace_constant(node, 1, weight.shape, lambda: tensor.numpy() * mask, self.names)
        self._add(node, few, rows)
        return Change(site.name, "outlier channels split off, in float", details={"channels": int(chosen.size)})

    def _parts(self, node: ir.Node, source: ir.Value, chosen: Array, count: int) -> tuple[ir.Value, ir.Value]:
        """An activation without its outliers, and the outliers alone; made once."""
        name = source.name or ""
        if name not in self.parts:
            mask = self._constant(f"{name}_mask", _mask(chosen, count))
            index = self._constant(f"{name}_outlier_index", chosen.astype(np.int64))
            rest = self._node("Mul", [source, mask], f"{name}_inliers")
            few = self._node("Gather", [source, index], f"{name}_outliers", {"axis": -1})
            self.model.graph.insert_before(node, [rest, few])
            self.parts[name] = rest.outputs[0], few.outputs[0]
        return self.parts[name]

    def _add(self, node: ir.Node, few: ir.Value, rows: Array) -> None:
        """Add the product of the outliers to that of the others, which keeps its name for nobody else."""
        output, readers = node.outputs[0], tuple(node.outputs[0].uses())
        held = self._constant(f"{output.name}_outlier_weight", rows)
        product = self._node("MatMul", [few, held], f"{output.name}_outliers")
        product.meta[KEPT] = "outlier channels stay in float"
        total = self._node("Add", [output, product.outputs[0]], f"{output.name}_whole")
        self.model.graph.insert_after(node, [product, total])
        for user, index in readers:
            user.replace_input_with(index, total.outputs[0])
        if output.is_graph_output():
            name, inner = output.name, self.names.make(f"{output.name}_inliers")
            whole = total.outputs[0]
            self.model.graph.outputs[list(self.model.graph.outputs).index(output)] = whole
            output.name, whole.name, whole.type, whole.shape = inner, name, output.type, output.shape

    def _constant(self, wish: str, array: Array) -> ir.Value:
        name = self.names.make(wish)
        tensor = ir.Tensor(array, name=name)
        value = ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=ir.Shape(array.shape), const_value=tensor)
        self.model.graph.register_initializer(value)
        return value

    def _node(
        self, kind: str, inputs: Sequence[ir.Value], wish: str, attributes: Mapping[str, int] | None = None
    ) -> ir.Node:
        name = self.names.make(wish)
        return ir.node(kind, inputs, dict(attributes or {}), outputs=[ir.Value(name=name)], name=name)


def _mask(chosen: Array, count: int) -> Array:
    mask = np.ones(count, np.float32)
    mask[chosen] = 0.0
    return mask
