"""Static INT8: activations rounded to grids fitted on calibration data, in QuantizeLinear/DequantizeLinear pairs."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import numpy as np
import onnx_ir as ir

from graphopt.analyses import Ranges
from graphopt.analyses.ranges import Method
from graphopt.targets import IntegerRules
from graphopt_passes.quant._maths import Grid, activation_grid, bias_floor, quantize_bias
from graphopt_passes.quant.adjust.bias import shift_bias
from graphopt_passes.quant.adjust.prepared import prepared_bias
from graphopt_passes.quant.biases import Bias, bias_of
from graphopt_passes.quant.borders import existing_grid
from graphopt_passes.quant.builder import Builder
from graphopt_passes.quant.plan import Plan
from graphopt_passes.quant.sites import Site, graph_of, key_of, tensor_of
from graphopt_passes.quant.weight import saved_bytes

__all__ = ["adds_pairs", "apply_plan", "integer_inputs", "make_grids", "scale_axis", "why_not_static"]

_SHARE = 0.5  # a pool keeps its input's grid if its own range is at least this part of it


def why_not_static(site: Site, node: ir.Node, rules: IntegerRules, per_channel: bool) -> str:
    """Reason why a site cannot be computed on static integers; empty if it can."""
    weight = site.weights[0]
    if site.operator not in rules.operators or site.operator == "Gather" or len(site.weights) > 1:
        return f"{site.operator} has no integer form on the target"
    bias = bias_of(node, site)
    if (
        saved_bytes(weight, per_channel=per_channel, bias=bias.tensor.size if bias is not None else 0) <= 0
        and not rules.static_only
    ):
        return f"{weight.size} weights, so few that scales would cost more than int8 saves"
    return ""


def make_grids(
    model: ir.Model,
    plan: Plan,
    ranges: Ranges,
    calibrator: Method,
    rules: IntegerRules,
    methods: Mapping[str, Method] | None = None,
) -> dict[str, Grid]:
    """Grid of every integer activation by value name; `methods` cuts some of them otherwise."""
    _share_pools(model, plan, ranges)
    grids: dict[str, Grid] = {}
    symmetric = rules.symmetric_activations
    values = _activations(model)
    for name in plan.values(model):
        old = existing_grid(values.get(name), rules.activation)
        centre = 128 if rules.activation == "uint8" else 0
        if old is not None and not rules.power_of_two and (not symmetric or old.zero_point == centre):
            grids[name] = old
            continue
        histogram = ranges.histograms[name]
        low, high = histogram.range((methods or {}).get(name, calibrator), symmetric=symmetric)
        grids[name] = activation_grid(low, high, rules.activation, symmetric=symmetric, power_of_two=rules.power_of_two)
    return grids


def _activations(model: ir.Model) -> dict[str, ir.Value]:
    """What nodes make and graphs are given, by name."""
    given = (value for graph in model.graphs() for value in graph.inputs)
    made = (output for node in model.graph.all_nodes() for output in node.outputs)
    return {value.name or "": value for value in (*given, *made)}


def _share_pools(model: ir.Model, plan: Plan, ranges: Ranges) -> None:
    """An AveragePool keeps the grid of its input, as integer kernels want, unless that would waste resolution."""
    for node in model.graph.all_nodes():
        if node.op_type != "AveragePool" or key_of(node) not in plan.nodes or node.inputs[0] is None:
            continue
        source, result = node.inputs[0].name or "", node.outputs[0].name or ""
        if result not in plan.results or result not in ranges.histograms:
            continue
        before, after = ranges.histograms.get(plan.grid_of(source)), ranges.histograms[result]
        if before is not None and _reach(after.minmax()) >= _SHARE * _reach(before.minmax()):
            plan.like[result] = source


def _reach(bounds: tuple[float, float]) -> float:
    return max(bounds[1], 0.0) - min(bounds[0], 0.0)


def apply_plan(
    builder: Builder,
    plan: Plan,
    grids: Mapping[str, Grid],
    sites: Collection[Site],
    *,
    per_channel: bool,
) -> dict[str, float]:
    """Put a plan into a model; returns the signal to noise of each weight in dB, by site."""
    by_key, values = {site.key: site for site in sites}, _activations(builder.model)
    quality: dict[str, float] = {}
    for node in list(builder.model.graph.all_nodes()):
        key = key_of(node)
        if key not in plan.nodes:
            continue
        if key in by_key:
            quality[key] = integer_inputs(builder, plan, grids, by_key[key], node, per_channel=per_channel)
        for index in plan.inputs[key]:
            value = node.inputs[index]
            if value is not None:
                grid = grids[plan.grid_of(value.name or "")]
                node.replace_input_with(index, builder.pair(value, grid, graph_of(node)))
        for index, grid in plan.constants.get(key, {}).items():
            _round_operand(builder, node, index, grid)
    for name in sorted(plan.results):
        rounded = builder.pair(values[name], grids[plan.grid_of(name)])
        quantizer = rounded.producer().inputs[0].producer()  # type: ignore[union-attr]
        for user, index in tuple(values[name].uses()):
            if user is not quantizer:
                user.replace_input_with(index, rounded)
        _hand_out(builder, plan, values[name], rounded)
    return quality


def _round_operand(builder: Builder, node: ir.Node, index: int, grid: Grid) -> None:
    value = node.inputs[index]
    tensor = tensor_of(value)
    if value is not None and tensor is not None:
        node.replace_input_with(index, builder.operand(value, tensor, grid, graph_of(node)))
        builder.discard(value)


def _hand_out(builder: Builder, plan: Plan, value: ir.Value, rounded: ir.Value) -> None:
    """Let a graph hand out the rounded form of a value: a subgraph, and the model where nothing is made in float.

    No runtime rounds a result of a subgraph that is also needed in float.
    """
    graph = value.graph
    if not value.is_graph_output() or not isinstance(graph, ir.Graph):
        return
    if graph is builder.model.graph:
        if not plan.to_outputs or rounded.is_graph_output():
            return
        rounded.name, value.name = value.name, builder.name(f"{value.name}_exact")
        rounded.doc_string, value.doc_string = value.doc_string, None
        rounded.metadata_props.update(value.metadata_props)
        value.metadata_props.clear()
    rounded.type, rounded.shape = value.type, value.shape
    graph.outputs[:] = [rounded if output is value else output for output in graph.outputs]


def integer_inputs(
    builder: Builder,
    plan: Plan,
    grids: Mapping[str, Grid],
    site: Site,
    node: ir.Node,
    *,
    per_channel: bool,
) -> float:
    """Replace weight and bias of a linear node by integers behind DequantizeLinear; returns the weight's dB."""
    weight = site.weights[0]
    value = node.inputs[weight.index]
    tensor = tensor_of(value)
    if value is None or tensor is None:
        raise TypeError(f"{site.name!r} has lost its weight")
    axis = scale_axis(site, per_channel=per_channel)
    paired = adds_pairs(site, node)
    shift = prepared_bias(node)
    if shift is not None:
        shift_bias(builder, node, shift)
    source = node.inputs[plan.inputs[site.key][0]]
    grid = grids[plan.grid_of(source.name or "" if source is not None else "")]
    bias, least = bias_of(node, site), None
    if bias is not None:
        least = bias_floor(bias.tensor.numpy(), grid.scale, weight.channels if axis is not None else 1)
    product = site.operator == "Gemm" or (site.operator == "MatMul" and bias is not None)  # a Gemm to ONNX Runtime
    dequantized, quality = builder.dequantized(
        value, tensor, axis, paired=paired, least=least, zero_point=product, graph=graph_of(node)
    )
    scale = builder.integers(value, tensor, axis, paired=paired, least=least).scale
    node.replace_input_with(weight.index, dequantized)
    builder.discard(value)
    if bias is not None:
        _round_bias(builder, bias, grid, scale)
    return quality


def scale_axis(site: Site, *, per_channel: bool) -> int | None:
    """Axis of the scales of a weight that is multiplied as integers; None: one for all.

    Integer products take a scale a column of a matrix on the right, and one for all of any other factor.
    """
    weight = site.weights[0]
    plain = site.operator != "MatMul" or (weight.index == 1 and len(weight.shape) == 2)
    return weight.axis if per_channel and plain else None


def adds_pairs(site: Site, node: ir.Node) -> bool:
    """Kernels of this layer may add two products in 16 bits; those of a depthwise Conv take one at a time."""
    shape = site.weights[0].shape
    depthwise = site.operator == "Conv" and shape[1] == 1 and node.attributes.get_int("group", 1) == shape[0] > 1
    return site.operator in ("Conv", "Gemm", "MatMul") and not depthwise


def _round_bias(builder: Builder, bias: Bias, grid: Grid, weight_scale: ir.Value) -> None:
    value = bias.node.inputs[bias.index]
    if value is None or weight_scale.const_value is None:
        return
    scale = (weight_scale.const_value.numpy().astype(np.float64) * grid.scale).astype(np.float32)
    if scale.ndim and bias.tensor.size != scale.size:  # the groups of a ConvTranspose share their scales
        scale = np.tile(scale, bias.tensor.size // scale.size)
    integers = quantize_bias(bias.tensor.numpy(), scale)
    if integers is None:  # not finite
        return
    name = value.name or "bias"
    inputs = [builder.constant(f"{name}_q", integers), builder.constant(f"{name}_scale", scale)]
    up = builder.node("DequantizeLinear", inputs, f"{name}_dq", {"axis": 0} if scale.ndim else {})
    graph_of(bias.node).insert_before(bias.node, up)
    bias.node.replace_input_with(bias.index, up.outputs[0])
    builder.discard(value)
