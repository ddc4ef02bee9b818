"""Refitting: what a pruned model computes is brought back, layer by layer, to what the whole model computed.

Layers are visited in the graph's order. Each is asked to make the output that it had in the whole model (the channels
that are left of it) from the input that it has now, with all layers before it refitted already. That is a linear least-
squares problem, solved from second moments (Channel Pruning, He et al., 2017; ThiNet, Luo et al., 2017). Where the
output is added to a shortcut, the layer makes up for what the shortcut lost as well; what a Relu or Clip then hides is
not fitted (Zhang et al., 2015). Batch norms behind a layer stay right, because what goes into them does.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from graphopt.analyses import CONSTANTS, Constants
from graphopt.calibration import Dataset
from graphopt.pass_base import Change, Context
from graphopt.reference import Feed
from graphopt_passes._clipped_fit import Rows, fit
from graphopt_passes._least_squares import Correction
from graphopt_passes._linear_layers import LINEAR, WIDEST, LinearLayer, rows_worth_reading
from graphopt_passes._outlook import Outlook, outlook
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
        outlook: What becomes of its output.
        kept: `[outputs]` positions of its outputs in the whole model.
    """

    layer: LinearLayer
    positions: tuple[int, int]
    outlook: Outlook
    kept: np.ndarray

    def samples(self, whole: Stepwise, pruned: Stepwise) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray | None]]:
        """The layer's input, the total that it should lead to, and what is added to its output, batch after batch.

        What is added is None where it has not the output's shape; then the total is the output alone.
        """
        node, axis, shortcut = self.layer.node, self.layer.channel_axis, self.outlook.shortcut
        more = [shortcut] if shortcut else []
        old = whole.run(self.positions[0] + 1, [_name(node.outputs[0]), *more])
        new = pruned.run(self.positions[1], [_name(node.inputs[0]), *more])
        for (output, *was), (x, *now) in zip(old, new, strict=True):
            wanted = np.take(output, self.kept, axis=axis)
            if any(a.shape != output.shape or b.shape != wanted.shape for a, b in zip(was, now, strict=True)):
                yield x, wanted, None
                continue
            before = self.outlook.bypass(np.take(was[0], self.kept, axis=axis) if was else None, wanted, axis)
            yield x, wanted + before, self.outlook.bypass(now[0] if now else None, wanted, axis)


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
        found = (
            layer if isinstance(layer, str) else _correction(_site(layer, old, new, lost, constants), old, new, ctx.rng)
        )
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


def _site(
    layer: LinearLayer, old: Stepwise, new: Stepwise, lost: Mapping[AxisName, np.ndarray], constants: Constants
) -> _Site:
    output = layer.node.outputs[0]
    name = _name(output)
    positions = old.born[name], new.born[name]
    gone = lost.get((_name(layer.weight), layer.axis), np.empty(0, dtype=np.int64))
    kept = np.delete(np.arange(layer.outputs + len(gone)), gone)
    known = {
        value
        for value in new.born
        if all(run.born.get(value, at) < at for run, at in zip((old, new), positions, strict=True))
    }
    seen = outlook(output, layer.outputs, layer.channel_axis, constants, known)
    return _Site(layer, positions, seen, kept)


def _correction(site: _Site, old: Stepwise, new: Stepwise, rng: np.random.Generator) -> Correction | str:
    """The correction of a layer, or why there is none."""
    layer = site.layer
    if layer.groups * layer.inputs**2 > WIDEST**2:
        return f"the second moments of its input are {layer.groups} x {layer.inputs} x {layer.inputs} numbers"
    with np.errstate(all="ignore"):  # what is not finite is looked for
        rows = _rows(site, old, new, rng)
    if not rows.held_out.any() or rows.held_out.all():
        return "too few samples to hold some out"
    if not (np.isfinite(rows.x).all() and np.isfinite(rows.wanted).all() and np.isfinite(rows.now).all()):
        return "what goes through it is not finite"
    held_out = rows.of(rows.held_out)
    if held_out.error(held_out.now) < _SAME:
        return "its output has not changed"
    return fit(rows, offset=layer.offset) or "no better on held-out samples"


def _rows(site: _Site, old: Stepwise, new: Stepwise, rng: np.random.Generator) -> Rows:
    """As many rows of a layer as are worth reading."""
    layer, batches = site.layer, len(old.feeds)
    matrix, shift = layer.matrix(), layer.shift.reshape(layer.groups, 1, -1)
    most = rows_worth_reading(layer.groups, layer.inputs) // batches + 1
    parts, held_out, plain = list[tuple[np.ndarray, ...]](), list[np.ndarray](), False
    for batch, (x, total, bypass) in enumerate(site.samples(old, new)):
        count = layer.positions(total)
        chosen = np.sort(rng.choice(count, most, replace=False)) if count > most else np.arange(count)
        held_out.append(_held_out(len(chosen), batch, batches))
        plain = plain or bypass is None
        for some in np.array_split(chosen, len(chosen) * layer.groups * layer.inputs // _CHUNK + 1):
            made_of, wanted = layer.rows(x, some), layer.wanted(total, some)
            added = 0.0 if bypass is None else layer.wanted(bypass, some)
            parts.append(tuple(a.astype(np.float32) for a in (made_of, wanted, made_of @ matrix + shift + added)))
    arrays = [np.concatenate(part, axis=1) for part in zip(*parts, strict=True)]
    bounds = (site.outlook.low, site.outlook.high)
    low, high = (b.reshape(layer.groups, 1, -1).astype(np.float32) for b in bounds)
    if plain:
        low, high = np.full_like(low, -np.inf), np.full_like(high, np.inf)
    return Rows(arrays[0], arrays[1], arrays[2], np.concatenate(held_out), low, high)


def _held_out(count: int, batch: int, batches: int) -> np.ndarray:
    """`[count]`: rows to hold out: whole batches where there are enough, else a fifth of each."""
    if batches >= _HOLD_OUT:
        return np.full(count, batch % _HOLD_OUT == _HOLD_OUT // 2)
    places = np.arange(count)
    return (places >= 2 * count // _HOLD_OUT) & (places < 3 * count // _HOLD_OUT)


def _change(site: str, found: Correction) -> Change:
    return Change(
        site,
        f"refitted: output error {found.before:.2f} -> {found.after:.2f}",
        details={"error_before": round(found.before, 6), "error_after": round(found.after, 6)},
    )
