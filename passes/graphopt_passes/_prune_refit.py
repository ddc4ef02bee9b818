"""Refitting: what a pruned model computes is brought back, layer by layer, to what the whole model computed.

Layers are visited in the graph's order. Each is asked to make the output that it had in the whole model (the channels
that are left of it) from the input that it has now, with all layers before it refitted already. That is a linear least-
squares problem, solved from second moments (Channel Pruning, He et al., 2017; ThiNet, Luo et al., 2017). Where the
output is added to a shortcut, the layer makes up for what the shortcut lost as well. Batch norms behind a layer stay
right, because what goes into them does.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from graphopt.analyses import CONSTANTS
from graphopt.calibration import Dataset
from graphopt.pass_base import Change, Context
from graphopt.reference import Feed
from graphopt_passes._least_squares import Correction, Moments, correct
from graphopt_passes._linear_layers import LINEAR, WIDEST, LinearLayer, rows_worth_reading
from graphopt_passes._stepwise import Stepwise, reads

__all__ = ["Refit", "refit"]

AxisName = tuple[str, int]

_SAMPLES = 256
_BATCH = 16
_HOLD_OUT = 5
_SAME = 1e-5
_CHUNK = 1 << 23


@dataclass(frozen=True)
class Refit:
    """What refitting did.

    Attributes:
        changes: One entry for every layer whose input is not what it was.
        before: Mean relative error of the refitted layers' outputs, on held-out samples.
        after: The same with the new weights.
    """

    changes: tuple[Change, ...] = ()
    before: float = 0.0
    after: float = 0.0

    @property
    def layers(self) -> int:
        """How many layers have new weights."""
        return sum(change.done for change in self.changes)


@dataclass(frozen=True, eq=False)
class _Site:
    """A layer to refit.

    Attributes:
        layer: The layer of the pruned model.
        positions: Its place in the order of nodes, in the whole and in the pruned model.
        shortcut: Name of what its output is added to, where both models know it before the layer runs.
        kept: `[outputs]` positions of its outputs in the whole model.
    """

    layer: LinearLayer
    positions: tuple[int, int]
    shortcut: str | None
    kept: np.ndarray

    def samples(self, whole: Stepwise, pruned: Stepwise) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """The layer's input and the output that it should have, batch after batch."""
        node, more = self.layer.node, [self.shortcut] if self.shortcut else []
        old = whole.run(self.positions[0] + 1, [node.outputs[0].name or "", *more])
        new = pruned.run(self.positions[1], [_name(node.inputs[0]), *more])
        axis = self.layer.channel_axis
        for (output, *was), (x, *now) in zip(old, new, strict=True):
            wanted = np.take(output, self.kept, axis=axis)
            for before, after in zip(was, now, strict=True):
                if before.shape == output.shape and after.shape == wanted.shape:
                    wanted += np.take(before, self.kept, axis=axis) - after
            yield x, wanted


def refit(whole: ir.Model, model: ir.Model, lost: Mapping[AxisName, np.ndarray], data: Dataset, ctx: Context) -> Refit:
    """Refit the layers of a pruned model whose inputs are not what they were.

    Args:
        whole: The model before the removal.
        model: The model after it; its weights change, and layers may gain a bias.
        lost: Positions that were removed, by value and axis.
        data: Samples, of which 256 are used; every fifth batch is held out.
        ctx: Its random numbers choose the rows that are looked at.

    Raises:
        ModelError: ONNX Runtime cannot run one of the models.
    """
    feeds = list(_batches(data))
    old, new = Stepwise(whole, feeds, ctx), Stepwise(model, feeds, ctx)
    constants = ctx.fact(CONSTANTS)
    changes, errors = list[Change](), list[tuple[float, float]]()
    for node in ctx.progress(list(_affected(new, lost)), "refitting"):
        layer = LinearLayer.of(node, constants)
        found = layer if isinstance(layer, str) else _correction(_site(layer, old, new, lost), old, new, ctx.rng)
        name = node.name or _name(node.outputs[0])
        if isinstance(layer, str) or isinstance(found, str):
            changes.append(Change.skipped(name, f"not refitted: {found}"))
        else:
            layer.add(model.graph, found.weight, found.bias)
            errors.append((found.before, found.after))
            changes.append(_change(name, found))
    before, after = np.mean(errors, axis=0).tolist() if errors else (0.0, 0.0)
    return Refit(tuple(changes), before, after)


def _name(value: ir.Value | None) -> str:
    return "" if value is None else value.name or ""


def _batches(data: Dataset) -> Iterator[Feed]:
    """At least ten batches where there are samples enough, so that some can be held out."""
    count = sum(1 for _ in data.feeds(_SAMPLES))
    return data.batches(max(1, min(_BATCH, count // 10)), _SAMPLES)


def _affected(run: Stepwise, lost: Mapping[AxisName, np.ndarray]) -> Iterator[ir.Node]:
    """Layers with weights whose input is not what it was: narrower, or behind something that is."""
    other = {name for name, _ in lost}
    for node in run.model.graph:
        linear = node.op_type in LINEAR and node.domain in ("", "ai.onnx")
        if linear and _name(node.inputs[0]) in other and _name(node.inputs[1]) not in run.born:
            yield node
        if any(_name(value) in other and not value.is_initializer() for value in reads(node)):
            other.update(_name(output) for output in node.outputs)


def _site(layer: LinearLayer, old: Stepwise, new: Stepwise, lost: Mapping[AxisName, np.ndarray]) -> _Site:
    name = _name(layer.node.outputs[0])
    positions = old.born[name], new.born[name]
    gone = lost.get((_name(layer.weight), layer.axis), np.empty(0, dtype=np.int64))
    kept = np.delete(np.arange(layer.outputs + len(gone)), gone)
    shortcut = _shortcut(layer.node.outputs[0], new)
    known = shortcut is not None and all(
        run.born.get(shortcut, at) < at for run, at in zip((old, new), positions, strict=True)
    )
    return _Site(layer, positions, shortcut if known else None, kept)


def _shortcut(output: ir.Value, run: Stepwise) -> str | None:
    """What alone is done to an output, but for adding constants, is adding this to it."""
    while len(uses := list(output.uses())) == 1 and not output.is_graph_output():
        node, index = uses[0]
        if node.op_type != "Add":
            return None
        other = _name(node.inputs[1 - index])
        if other in run.born:
            return other
        output = node.outputs[0]
    return None


def _correction(site: _Site, old: Stepwise, new: Stepwise, rng: np.random.Generator) -> Correction | str:
    """The correction of a layer, or why there is none."""
    layer, batches = site.layer, len(old.feeds)
    if layer.groups * layer.inputs**2 > WIDEST**2:
        return f"the second moments of its input are {layer.groups} x {layer.inputs} x {layer.inputs} numbers"
    matrix, shift = layer.matrix(), layer.shift.reshape(layer.groups, 1, -1)
    sums = [Moments.empty(*matrix.shape) for _ in range(2)]
    most = rows_worth_reading(layer.groups, layer.inputs) // batches + 1
    for batch, (x, output) in enumerate(site.samples(old, new)):
        count = layer.positions(output)
        chosen = np.sort(rng.choice(count, most, replace=False)) if count > most else np.arange(count)
        for moments, part in zip(sums, _parts(chosen, batch, batches), strict=True):
            for rows in np.array_split(part, len(part) * layer.groups * layer.inputs // _CHUNK + 1):
                made_of, wanted = layer.rows(x, rows), layer.wanted(output, rows)
                with np.errstate(all="ignore"):  # what is not finite shows in the moments
                    moments.add(made_of, wanted - made_of @ matrix - shift, wanted)
    seen, held_out = sums
    if not seen.rows or not held_out.rows:
        return "too few samples to hold some out"
    if not (seen.finite and held_out.finite):
        return "what goes through it is not finite"
    if held_out.error() < _SAME:
        return "its output has not changed"
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
