"""Refitting: what a pruned model computes is brought back, layer by layer, to what the whole model computed.

Layers are visited in the graph's order. Each is asked to make the output that it had in the whole model (the channels
that are left of it) from the input that it now has, with all layers before it refitted already. That is a linear least-
squares problem, solved from second moments (Channel Pruning, He et al., 2017; ThiNet, Luo et al., 2017). Batch norms
behind a layer stay right, because what goes into them does.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from graphopt.analyses import CONSTANTS
from graphopt.calibration import Dataset
from graphopt.pass_base import Change, Context
from graphopt.reference import Feed
from graphopt_passes._least_squares import Correction, Moments, correct
from graphopt_passes._linear_layers import LINEAR, LinearLayer
from graphopt_passes._stepwise import Stepwise, reads

__all__ = ["Refit", "refit"]

AxisName = tuple[str, int]

_SAMPLES = 256
_BATCH = 16
_ROWS = 100_000
_WORK = 3e10
_WIDEST = 4608
_HOLD_OUT = 5
_SAME = 1e-5


@dataclass(frozen=True)
class Refit:
    """What refitting did.

    Attributes:
        changes: One entry for every layer whose input had changed.
        before: Mean relative error of the refitted layers' outputs, on held-out samples.
        after: The same with new weights.
    """

    changes: tuple[Change, ...]
    before: float = 0.0
    after: float = 0.0


def refit(
    whole: ir.Model, model: ir.Model, lost: Mapping[AxisName, np.ndarray], data: Dataset, ctx: Context
) -> Refit:
    """Refit the layers of a pruned model whose inputs are not what they were.

    Args:
        whole: The model before the removal.
        model: The model after it; its weights change.
        lost: Positions that were removed, by value and axis.
        data: Samples, of which 256 are used; every fifth batch is held out.
        ctx: Random numbers choose which rows are looked at.

    Raises:
        ModelError: ONNX Runtime cannot run one of the models.
    """
    feeds = list(_batches(data))
    old, new = Stepwise(whole, feeds, ctx), Stepwise(model, feeds, ctx)
    places = {name: i for i, node in enumerate(whole.graph) for name in _names(node.outputs)}
    changes, errors = list[Change](), list[tuple[float, float]]()
    for node in ctx.progress(list(_affected(model, lost)), "refitting"):
        site = node.name or node.outputs[0].name or node.op_type
        layer = LinearLayer.of(node, ctx.fact(CONSTANTS))
        reason = layer if isinstance(layer, str) else _too_wide(layer)
        if reason is not None or isinstance(layer, str):
            changes.append(Change.skipped(site, f"not refitted: {reason}"))
            continue
        name = node.outputs[0].name or ""
        other = _other(node, new, old, places)
        pairs = zip(old.run(places[name] + 1, [name, *other]), new.run(new.order[id(node)], [node.inputs[0].name, *other]), strict=True)
        gone = lost.get((layer.weight.name or "", layer.axis), np.empty(0, dtype=np.int64))
        kept = np.delete(np.arange(layer.outputs + len(gone)), gone)
        found = _correction(layer, pairs, kept, len(feeds), ctx.rng)
        if isinstance(found, str):
            changes.append(Change.skipped(site, f"not refitted: {found}"))
            continue
        layer.add(model.graph, found.weight, found.bias)
        errors.append((found.before, found.after))
        changes.append(_change(site, found))
    before, after = np.mean(errors, axis=0).tolist() if errors else (0.0, 0.0)
    return Refit(tuple(changes), before, after)


def _batches(data: Dataset) -> Iterator[Feed]:
    """At least ten batches where there are samples enough, so that some can be held out."""
    count = sum(1 for _ in data.feeds(_SAMPLES))
    return data.batches(max(1, min(_BATCH, count // 10)), _SAMPLES)


def _names(values: Sequence[ir.Value]) -> list[str]:
    return [value.name for value in values if value.name]


def _affected(model: ir.Model, lost: Mapping[AxisName, np.ndarray]) -> Iterator[ir.Node]:
    """Linear layers whose input is not what it was: narrower, or behind something that is."""
    other = {name for name, _ in lost}
    for node in model.graph:
        source = node.inputs[0] if node.inputs else None
        constant = node.op_type == "Constant" or not any(True for _ in reads(node))
        if node.op_type in LINEAR and node.domain in ("", "ai.onnx") and source is not None and source.name in other:
            yield node
        if not constant and any(value.name in other and not value.is_initializer() for value in reads(node)):
            other.update(_names(node.outputs))


COMP = True
def _other(node, new, old, places):
    uses = node.outputs[0].uses()
    if not COMP or len(uses) != 1 or uses[0].node.op_type != "Add" or node.outputs[0].is_graph_output():
        return []
    other = uses[0].node.inputs[1 - uses[0].idx]
    if other.name in new.born and new.born[other.name] < new.order[id(node)] and other.name in old.born and other.name!=node.outputs[0].name:
        return [other.name]
    return []


def _too_wide(layer: LinearLayer) -> str | None:
    if layer.inputs**2 * layer.groups > _WIDEST**2:
        return f"its second moments need {layer.groups} x {layer.inputs} x {layer.inputs} numbers"
    return None


def _correction(
    layer: LinearLayer,
    pairs: Iterator[tuple[np.ndarray, np.ndarray]],
    kept: np.ndarray,
    batches: int,
    rng: np.random.Generator,
) -> Correction | str:
    """The correction of a layer from its old outputs and its new inputs, or why there is none."""
    matrix, shift = layer.matrix(), layer.shift.reshape(layer.groups, 1, -1)
    sums = [Moments.empty(*matrix.shape) for _ in range(2)]
    most = min(_ROWS, max(4 * layer.inputs, int(_WORK / (layer.inputs**2 * layer.groups)))) // batches + 1
    for i, ((output, *was), (x, *now)) in enumerate(pairs):
        if was and now:
            axis = 1 if layer.node.op_type=='Conv' else -1
            diff = np.take(was[0], kept, axis=axis) - now[0]
            output = output.copy()
            if axis==1: output[:, kept] += diff
            else: output[..., kept] += diff
        count = layer.positions(output)
        chosen = np.sort(rng.choice(count, most, replace=False)) if count > most else np.arange(count)
        for held_out, part in enumerate(_parts(chosen, i, batches)):
            if len(part):
                rows, wanted = layer.rows(x, part), layer.wanted(output, part, kept)
                sums[held_out].add(rows, wanted - rows @ matrix - shift, wanted)
    seen, held_out = sums
    if not (np.isfinite(seen.xx).all() and np.isfinite(seen.rr).all() and np.isfinite(held_out.rr).all()):
        return "what goes through it is not finite"
    if not seen.rows or not held_out.rows:
        return "too few samples to hold some out"
    return correct(seen, held_out, offset=layer.offset) or "no better on held-out samples"


def _parts(chosen: np.ndarray, batch: int, batches: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows to fit and rows to hold out: whole batches where there are enough, else a fifth of each."""
    none = chosen[:0]
    if batches >= _HOLD_OUT:
        return (none, chosen) if batch % _HOLD_OUT == _HOLD_OUT // 2 else (chosen, none)
    first, last = 2 * len(chosen) // _HOLD_OUT, 3 * len(chosen) // _HOLD_OUT
    return np.concatenate([chosen[:first], chosen[last:]]), chosen[first:last]


def _change(site: str, found: Correction) -> Change:
    return Change(
        site,
        f"refitted: output error {found.before:.2f} -> {found.after:.2f}",
        details={"error_before": round(found.before, 6), "error_after": round(found.after, 6)},
    )
