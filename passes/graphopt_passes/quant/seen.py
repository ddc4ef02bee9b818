"""What calibration does not see: values inside some subgraphs, branches that no sample takes, anything but zeros."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import onnx_ir as ir

from graphopt.analyses import SHAPES, RangesAnalysis, Shapes
from graphopt.analyses.lifting import steady_dimensions, why_hidden
from graphopt.pass_base import Context
from graphopt_passes.quant.audit import sample_feeds
from graphopt_passes.quant.decide import Decision, Settings, Workbench, fall_back
from graphopt_passes.quant.plan import result_of
from graphopt_passes.quant.planning import plan_for
from graphopt_passes.quant.sites import Site, keyed_nodes

__all__ = ["hidden_layers", "with_data", "workbench"]

_FEEDS = 8


def hidden_layers(model: ir.Model, sites: Sequence[Site], shapes: Shapes) -> dict[str, str]:
    """Layers of which calibration cannot see all activations, with the reason, by key."""
    nodes, steady, found = keyed_nodes(model), steady_dimensions(model), dict[str, str]()
    for site in sites:
        if site.main:
            continue
        node = nodes[site.key]
        weights = {weight.index for weight in site.weights}
        read = [value for i, value in enumerate(node.inputs[:2]) if i not in weights]
        seen = [value for value in (*read, node.outputs[0], result_of(node)) if value is not None]
        reason = next(filter(None, (why_hidden(value, shapes, steady) for value in seen)), "")
        if reason:
            found[site.key] = reason
    return found


def workbench(
    work: ir.Model, inner: Context, settings: Settings, decisions: Sequence[Decision], products: Mapping[str, str]
) -> Workbench:
    """Calibrate what the static layers among the decisions and the products touch."""
    shapes, static = inner.fact(SHAPES), [d.site for d in decisions if d.kind == "static"]
    bench = Workbench(work, inner, shapes, None, sample_feeds(inner, _FEEDS), settings, products=products)
    if inner.calibration is None or not (static or bench.allowed_products or settings.rules.integers_only):
        return bench
    touched = plan_for(work, static, shapes, settings.rules, bench.allowed_products).touched(work)
    return replace(bench, ranges=inner.fact(RangesAnalysis(values=touched)))


def with_data(bench: Workbench, decisions: Sequence[Decision]) -> list[Decision]:
    """Take layers off static integers whose activations the calibration data tells nothing about."""
    nodes = keyed_nodes(bench.model)

    def judged(decision: Decision) -> Decision:
        node = nodes[decision.site.key]
        why = _untold(bench, decision.site, node) if decision.kind == "static" else ""
        return fall_back(decision, node, bench.settings, why) if why else decision

    return [judged(decision) for decision in decisions]


def _untold(bench: Workbench, site: Site, node: ir.Node) -> str:
    """Why the data tells nothing of a layer's activations; empty if it does."""
    if bench.ranges is None:
        return ""
    result = bench.ranges.of(result_of(node))
    if not site.main and (result is None or not result.count):
        return "it stands in a subgraph that no calibration sample runs"
    weights = {weight.index for weight in site.weights}
    for index, value in enumerate(node.inputs[:2]):
        seen = bench.ranges.of(value) if index not in weights else None
        if value is None or seen is None:
            continue
        if not seen.count:
            return f"no finite number in {value.name!r} on the calibration data"
        if seen.low == seen.high == 0 and not bench.settings.rules.static_only:
            return f"{value.name!r} holds nothing but zeros on the calibration data"
    return ""
