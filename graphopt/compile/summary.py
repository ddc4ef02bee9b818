"""Turns models and steps into the counted figures of the report."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import onnx_ir as ir

from graphopt.analyses import COST, Cost, NodeCost
from graphopt.pass_base import Context
from graphopt.report.data import LayerCost, LayerNote, LayerRow, ModelSummary, Port, StepReport, Totals
from graphopt.runner import StepRun

__all__ = ["layer_rows", "model_summary", "step_report", "totals"]

_LEAST_PARAMS = 16  # below lie indices, axes and bounds, which are no weights


def totals(model: ir.Model, ctx: Context) -> Totals:
    """Count weights, parameters, MACs and nodes."""
    cost = ctx.fact(COST)
    return Totals(cost.weight_bytes, cost.params, _macs(cost), sum(1 for graph in model.graphs() for _ in graph))


def model_summary(model: ir.Model, ctx: Context, file_bytes: int) -> ModelSummary:
    """Count what is in a model."""
    operators = Counter(node.op_type for graph in model.graphs() for node in graph)
    return ModelSummary(
        file_bytes=file_bytes,
        totals=totals(model, ctx),
        macs_unknown=ctx.fact(COST).unknown,
        operators=dict(sorted(operators.items())),
        opsets={domain or "ai.onnx": number for domain, number in sorted(model.opset_imports.items())},
        inputs=tuple(_port(value) for value in model.graph.inputs if value.name not in model.graph.initializers),
        outputs=tuple(map(_port, model.graph.outputs)),
    )


def step_report(run: StepRun, after: Totals) -> StepReport:
    """Report one step."""
    step, result = run.step, run.result
    return StepReport(
        str(step), step.name, result.modified, step.lossy, result.changes, dict(sorted(result.metrics.items())), after
    )


def layer_rows(before: Cost, after: Cost, steps: Sequence[StepReport]) -> tuple[LayerRow, ...]:
    """One row for each layer with weights, with what every step said about it."""
    notes: dict[str, list[LayerNote]] = {}
    for step in steps:
        for change in step.changes:
            own = LayerNote(step.step, change.action, change.done, replaced=change.site in change.replaced)
            notes.setdefault(change.site, []).append(own)
            for name in change.replaced:
                if name != change.site:
                    said = f"replaced together with {change.site}: {change.action}"
                    notes.setdefault(name, []).append(LayerNote(step.step, said, done=True, replaced=True))
    rows: list[LayerRow] = []
    for cost in before.nodes.values():
        if cost.macs == 0 and cost.params < _LEAST_PARAMS:
            continue
        now, said = after.nodes.get(cost.node), list(notes.get(cost.node, ()))
        if now is not None and now.params != cost.params and not any(note.done for note in said):
            said.append(LayerNote("with its neighbours", "changed as they did", done=True))
        rows.append(
            LayerRow(cost.node, cost.operator, _layer_cost(cost), _layer_cost(now) if now else None, tuple(said))
        )
    return tuple(rows)


def _layer_cost(cost: NodeCost) -> LayerCost:
    return LayerCost(cost.macs, cost.params, cost.weight_bytes)


def _macs(cost: Cost) -> int | None:
    return cost.macs if cost.macs or not cost.unknown else None


def _port(value: ir.Value) -> Port:
    dims = "unknown" if value.shape is None else " x ".join(str(d) for d in value.shape) or "scalar"
    return Port(value.name or "", str(value.dtype.name if value.dtype else "unknown").lower(), dims)
