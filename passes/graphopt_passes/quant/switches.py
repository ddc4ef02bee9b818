"""What each layer's rounding does to the outputs of the whole model, while all other layers stay float.

One copy of the model carries a boolean input for every layer: true, and it reads its rounded input and weights. One
session then answers for all layers; a layer that looks harmless by itself but sits in front of something sensitive
is found, which no figure of the layer alone can do.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import numpy as np
import onnx_ir as ir

from graphopt.pass_base import Context
from graphopt.reference import Feed, Reference
from graphopt_passes.quant._maths import Grid
from graphopt_passes.quant.builder import Builder
from graphopt_passes.quant.plan import Plan, result_of
from graphopt_passes.quant.sites import Site, keyed_nodes, tensor_of

__all__ = ["output_noise"]


def output_noise(
    model: ir.Model,
    plan: Plan,
    grids: Mapping[str, Grid],
    static: Collection[Site],
    weight_only: Collection[Site],
    feeds: Sequence[Feed],
    ctx: Context,
    *,
    bits: int,
    per_channel: bool,
) -> dict[str, float]:
    """Noise power over signal power at the worst output, the mean over feeds, for every site by key."""
    copy = model.clone()
    flags = _wire(copy, plan, grids, static, weight_only, bits=bits, per_channel=per_channel)
    session = Reference(copy, threads=ctx.threads, extensions=ctx.extensions)
    off = {name: np.array(False) for name in flags.values()}
    found: dict[str, list[float]] = {key: [] for key in flags}
    for feed in ctx.progress(feeds, "finding sensitive layers"):
        exact = session.run({**feed, **off})
        for key, flag in flags.items():
            found[key].append(_worst(exact, session.run({**feed, **off, flag: np.array(True)})))
    return {key: float(np.mean(ratios)) for key, ratios in found.items()}


def _wire(
    copy: ir.Model,
    plan: Plan,
    grids: Mapping[str, Grid],
    static: Collection[Site],
    weight_only: Collection[Site],
    *,
    bits: int,
    per_channel: bool,
) -> dict[str, str]:
    """Build the switches in; returns the names of the inputs by site."""
    builder, nodes = Builder(copy, bits), keyed_nodes(copy)
    computed = {site.key for site in static}
    flags: dict[str, str] = {}
    for site in (*static, *weight_only):
        node = nodes[site.key]
        flag = ir.Value(
            name=builder.name(f"switch_{len(flags)}"), type=ir.TensorType(ir.DataType.BOOL), shape=ir.Shape([])
        )
        copy.graph.inputs.append(flag)
        flags[site.key] = flag.name or ""
        for weight in site.weights:
            value = node.inputs[weight.index]
            tensor = tensor_of(value)
            if value is not None and tensor is not None:
                rounded, _ = builder.dequantized(value, tensor, weight.axis if per_channel else None, node)
                node.replace_input_with(weight.index, _choice(builder, flag, rounded, value, node))
        if site.key in computed:
            _wire_activations(builder, node, plan, grids, flag)
    return flags


def _wire_activations(
    builder: Builder, node: ir.Node, plan: Plan, grids: Mapping[str, Grid], flag: ir.Value
) -> None:
    for index in plan.inputs[next(o.name for o in node.outputs if o.name) or ""]:
        value = _source(node.inputs[index])
        if value is not None:
            rounded = builder.pair(value, grids[plan.grid_of(value.name or "")])
            node.replace_input_with(index, _choice(builder, flag, rounded, value, node))
    result = result_of(node)
    if result.name in plan.results:
        maker = result.producer()
        users = [(user, index) for user, index in result.uses() if user.op_type not in ("QuantizeLinear", "Where")]
        rounded = builder.pair(result, grids[plan.grid_of(result.name or "")])
        if maker is None or not users:
            return
        choice = builder.node("Where", [flag, rounded, result], f"{result.name}_choice", ir.DataType.FLOAT)
        builder.model.graph.insert_after(rounded.producer() or maker, choice)
        for user, index in users:
            user.replace_input_with(index, choice.outputs[0])


def _source(value: ir.Value | None) -> ir.Value | None:
    """The activation behind a switch that the layer before has put in."""
    producer = value.producer() if value is not None else None
    return producer.inputs[2] if producer is not None and producer.op_type == "Where" else value


def _choice(builder: Builder, flag: ir.Value, rounded: ir.Value, exact: ir.Value, user: ir.Node) -> ir.Value:
    node = builder.node("Where", [flag, rounded, exact], f"{exact.name}_choice", ir.DataType.FLOAT)
    graph = user.graph
    if not isinstance(graph, ir.Graph):
        raise TypeError(f"node {user.name!r} is in no graph")
    graph.insert_before(user, node)
    return node.outputs[0]


def _worst(exact: Feed, rounded: Feed) -> float:
    ratios: list[float] = []
    for name, reference in exact.items():
        if not np.issubdtype(reference.dtype, np.floating):
            continue
        finite = np.isfinite(reference)
        signal, error = reference[finite].astype(np.float64), rounded[name][finite].astype(np.float64)
        power = float(np.vdot(signal, signal))
        if power > 0:
            ratios.append(float(np.nan_to_num(np.vdot(error - signal, error - signal) / power, nan=1e9, posinf=1e9)))
    return max(ratios, default=0.0)
