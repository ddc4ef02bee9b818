"""How well fp16 keeps the outputs and every value on the way, and which nodes to blame where it does not.

Everything is measured on the simulation, against the float32 model, on calibration samples.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir

from graphopt.analyses.streaming import stream
from graphopt.calibration import Dataset
from graphopt.pass_base import Context
from graphopt.reference import Feed, Reference
from graphopt_passes.quant._maths import decibel
from graphopt_passes.quant.audit import powers
from graphopt_passes.quant.floats.plan import Plan, Survey
from graphopt_passes.quant.sites import keyed_nodes

__all__ = ["added_noise", "blame", "output_levels", "value_levels", "worst_level"]

_BEST = 80.0
_MARGIN = 10.0  # dB above the limit from which on a node is not suspected
_DROP = 6.0  # dB that a node must lose to be suspected


def output_levels(original: Reference, result: Reference, feeds: Sequence[Feed], ctx: Context) -> dict[str, float]:
    """Signal to noise in dB of every float output, the mean over feeds; minus infinity where one is not finite."""
    levels: dict[str, list[float]] = {}
    for feed in ctx.progress(feeds, "comparing outputs"):
        expected, got = original.run(feed), result.run(feed)
        for name, reference in expected.items():
            if np.issubdtype(reference.dtype, np.floating) and reference.size:
                levels.setdefault(name, []).append(_level(*powers(reference, got[name])))
    return {name: float(np.mean(found)) for name, found in levels.items()}


def worst_level(levels: Mapping[str, float]) -> float:
    """The least of some levels, the best there is if there are none."""
    return min(levels.values(), default=_BEST)


def value_levels(
    survey: Survey, plan: Plan, simulated: ir.Model, feeds: Sequence[Feed], ctx: Context
) -> dict[str, float]:
    """Signal to noise in dB over all feeds of every float value of the main graph that a node makes, by name."""
    names: list[str] = []
    for key, node in keyed_nodes(survey.model).items():
        if node.graph is survey.model.graph and (key in plan.narrow or key in plan.wide):
            names += [value.name for value in node.outputs if value.name and value not in survey.masked]
    data = Dataset("samples", None, lambda: iter(feeds))
    given = replace(ctx, model=survey.model, calibration=data)
    sums: dict[str, list[float]] = {}
    runs = (stream(model, names, given, "inspecting values") for model in (survey.model, simulated))
    for before, after in zip(*runs, strict=True):
        for name, reference in before.values.items():
            if np.issubdtype(reference.dtype, np.floating):
                total = sums.setdefault(name, [0.0, 0.0])
                for i, power in enumerate(powers(reference, after.values[name])):
                    total[i] += power
    return {name: _level(*total) for name, total in sums.items()}


@dataclass(frozen=True)
class _Seen:
    """A node with the levels of what it reads and makes."""

    key: str
    node: ir.Node
    before: float
    after: float


def blame(
    survey: Survey, plan: Plan, levels: Mapping[str, float], bad: Sequence[str], limit: float, hops: int
) -> dict[str, str]:
    """Nodes in fp16 to keep in float32, by key, with the reason; none if nothing is suspected any more.

    Suspected are the first nodes whose result is not finite; if all are finite, the nodes that lose most. A node that
    is float32 already and still loses amplifies what its inputs lost, and then what makes these is kept.

    Args:
        survey: The model.
        plan: What is fp16 now.
        levels: What `value_levels` found.
        bad: Outputs of the model that are too noisy.
        limit: Least signal to noise of an output in dB.
        hops: How many nodes behind a suspect are kept with it.
    """
    upstream = _upstream(survey, bad)
    seen = [_seen(key, node, levels) for key, node in survey.nodes if key in upstream]
    broken = [s for s in seen if s.after == -math.inf and s.before > -math.inf]
    suspects = broken or [s for s in seen if s.after < limit + _MARGIN and s.before - s.after > _DROP]
    suspects = suspects or [s for s in seen if s.after < limit]
    kept: dict[str, str] = {}
    for suspect in suspects:
        lost = f"keeps {suspect.after:.1f} dB of signal to noise" if suspect.after > -math.inf else "is not finite"
        if suspect.key in plan.narrow:
            kept[suspect.key] = f"its result {lost} in fp16"
        reach = 0 if broken else max(hops, suspect.key not in plan.narrow)
        for key in _narrow_makers(survey, plan, suspect.node, reach):
            kept.setdefault(key, f"the result of {suspect.node.name!r}, which it leads to, {lost} in fp16")
    kept |= _inside(survey, plan, [s.node for s in suspects])
    return kept


def added_noise(survey: Survey, levels: Mapping[str, float]) -> dict[str, float]:
    """Noise over signal that each node adds, by key: at its own results, or at those of a reader that amplifies it."""
    seen = {key: _seen(key, node, levels) for key, node in survey.nodes}
    added = {key: math.inf if s.after == -math.inf else _ratio(s.after) - _ratio(s.before) for key, s in seen.items()}
    keys = {node: key for key, node in survey.nodes}
    readers = {key: {keys[user] for value in node.outputs for user in value.consumers()} for key, node in survey.nodes}
    return {key: max([own, *(added[reader] for reader in readers[key])]) for key, own in added.items()}


def _ratio(level: float) -> float:
    return math.inf if level == -math.inf else 10 ** (-level / 10)


def _level(signal: float, noise: float) -> float:
    return min(_BEST, decibel(signal, noise)) if noise < math.inf else -math.inf


def _seen(key: str, node: ir.Node, levels: Mapping[str, float]) -> _Seen:
    before = [levels[v.name] for v in node.inputs if v is not None and v.name and v.name in levels]
    after = [levels[v.name] for v in node.outputs if v.name and v.name in levels]
    return _Seen(key, node, min(before, default=_BEST), min(after, default=_BEST))


def _upstream(survey: Survey, outputs: Sequence[str]) -> set[str]:
    """Keys of the nodes of the main graph that lead to some outputs of the model."""
    wanted = {value for value in survey.model.graph.outputs if value.name in outputs}
    found: set[str] = set()
    for key, node in reversed(survey.nodes):
        if node.graph is survey.model.graph and any(value in wanted for value in node.outputs):
            found.add(key)
            wanted.update(value for value in node.inputs if value is not None)
            for attribute in node.attributes.values():
                if attribute.type == ir.AttributeType.GRAPH and not attribute.is_ref():
                    inner = attribute.as_graph().all_nodes()
                    wanted.update(value for each in inner for value in each.inputs if value is not None)
    return found


def _narrow_makers(survey: Survey, plan: Plan, node: ir.Node, hops: int) -> list[str]:
    """Nodes in fp16 behind the inputs of a node, `hops` of them deep; nodes in float32 between them do not count."""
    keys = {value: key for key, each in survey.nodes for value in each.outputs}
    nodes, found = dict(survey.nodes), dict[str, None]()
    todo, depth = [(node, 0)], dict[str, int]()
    while todo:
        here, deep = todo.pop(0)
        for value in here.inputs:
            key = keys.get(value) if value is not None else None
            if key is None or deep >= hops or depth.get(key, hops) <= deep:
                continue
            depth[key] = deep
            if key in plan.narrow:
                found[key] = None
            todo.append((nodes[key], deep + (key in plan.narrow)))
    return list(found)


def _inside(survey: Survey, plan: Plan, owners: Sequence[ir.Node]) -> dict[str, str]:
    """Everything in the subgraphs of suspected nodes, where single values are not seen."""
    kept: dict[str, str] = {}
    inner = {node: owner for owner in owners for node in _inner_nodes(owner)}
    for key, node in survey.nodes:
        if key in plan.narrow and node in inner:
            kept[key] = f"the results of {inner[node].name!r} are too noisy in fp16"
    return kept


def _inner_nodes(owner: ir.Node) -> list[ir.Node]:
    graphs = (a.as_graph() for a in owner.attributes.values() if a.type == ir.AttributeType.GRAPH and not a.is_ref())
    return [node for graph in graphs for node in graph.all_nodes()]
