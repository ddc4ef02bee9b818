"""Refitting: what a pruned model computes is brought back, layer by layer, to what the whole model computed.

Layers are visited in the graph's order. Each is asked to make the output that it had in the whole model (the channels
that are left of it) from the input that it has now, with all layers before it refitted already. That is a linear least-
squares problem, solved from second moments (Channel Pruning, He et al., 2017; ThiNet, Luo et al., 2017). Where the
output is added to a shortcut, the layer makes up for what the shortcut lost as well; what a Relu or Clip then hides is
not fitted (Zhang et al., 2015). Batch norms behind a layer stay right, because what goes into them does.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from graphopt.analyses import CONSTANTS
from graphopt.analyses.names import Names, subgraphs
from graphopt.analyses.padding import heeded_rows
from graphopt.calibration import Dataset
from graphopt.pass_base import Change, Context
from graphopt.reference import Feed
from graphopt_passes.prune.refit.clipped_fit import Rows, fit
from graphopt_passes.prune.refit.least_squares import Correction
from graphopt_passes.prune.refit.linear_layers import LINEAR, WIDEST, LinearLayer, rows_worth_reading
from graphopt_passes.prune.refit.pairs import Joined, Pairs
from graphopt_passes.prune.refit.restate import Restated, restate
from graphopt_passes.prune.refit.sites import AxisName, Site, name_of, site_of
from graphopt_passes.prune.refit.stepwise import Stepwise, reads

__all__ = ["Refit", "batches_of", "refit", "rows_of"]

_SAMPLES, _MOST_SAMPLES = 256, 2000
_SAMPLE_BYTES = 64 << 20
_BATCH = 16
_HOLD_OUT = 5
_SAME = 1e-5
_UNCHANGED = "its output has not changed"
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


def refit(whole: ir.Model, model: ir.Model, lost: Mapping[AxisName, np.ndarray], data: Dataset, ctx: Context) -> Refit:
    """Refit the layers of a pruned model whose inputs are not what they were.

    Args:
        whole: The model before the removal.
        model: The model after it; its weights change, and layers may gain a bias.
        lost: Positions that were removed, by value and axis.
        data: Samples, of which 256 are used, up to 2,000 if they are small; every fifth batch is held out.
        ctx: Its random numbers choose the rows that are looked at.

    Raises:
        ModelError: ONNX Runtime cannot run one of the models.
    """
    feeds = list(batches_of(data))
    old, new = Stepwise(whole, feeds, ctx), Stepwise(model, feeds, ctx)
    changes, errors = list[Change](), list[tuple[float, float]]()
    names = ctx.fact(CONSTANTS).names
    affected = list(_affected(new, lost, names))
    pairs = Pairs(old, new, lost, len(affected))
    for node in ctx.progress(affected, "refitting"):
        constants = ctx.fact(CONSTANTS)
        layer, name = names.place(node) or LinearLayer.of(node, constants), names.label(node)
        if isinstance(layer, str):
            restated = None if names.place(node) else restate(node, old, new, lost, constants)
            if restated is not None:
                ctx.drop_facts()
                errors.append((restated.before, restated.after))
            changes.append(_restated(name, layer, restated))
            continue
        site = site_of(layer, old, new, lost, constants)
        found = _correction(site, old, new, ctx.rng)
        if not isinstance(found, str):
            layer.add(model.graph, found.weight, found.bias)
            ctx.drop_facts()
        joined = None if found == _UNCHANGED else pairs.improve(site, ctx.fact(CONSTANTS))
        if joined is not None:
            new.resume(pairs.new)
            ctx.drop_facts()
        pairs.passed(node, new)
        changes.append(_change(name, found, joined))
        errors += [each for each in [_errors(found, joined)] if each]
    before, after = np.mean(errors, axis=0).tolist() if errors else (0.0, 0.0)
    return Refit(tuple(changes), before, after)


def batches_of(data: Dataset) -> Iterator[Feed]:
    """At least ten batches where there are samples enough, so that some can be held out.

    Of small samples more are read than of large ones.
    """
    first = next(data.feeds(1), {})
    most = _SAMPLE_BYTES // max(1, sum(array.nbytes for array in first.values()))
    most = min(max(most, _SAMPLES), _MOST_SAMPLES)
    count = sum(1 for _ in data.feeds(most))
    return data.batches(max(1, min(_BATCH, count // 10)), most)


def _affected(run: Stepwise, lost: Mapping[AxisName, np.ndarray], names: Names) -> Iterator[ir.Node]:
    """Layers with weights whose input is not what it was: narrower, or behind something that is."""
    other = {name for name, _ in lost}

    def differs(values: Iterable[ir.Value | None]) -> bool:
        return any(v is not None and names.key(v) in other and not v.is_initializer() for v in values)

    def search(graph: ir.Graph) -> Iterator[ir.Node]:
        for node in graph:
            linear = node.op_type in LINEAR and node.domain in ("", "ai.onnx")
            if linear and differs(node.inputs[:1]) and name_of(node.inputs[1]) not in run.born:
                yield node
            for _, inner in subgraphs(node):
                if differs(node.inputs):
                    other.update(names.key(value) for value in inner.inputs)
                yield from search(inner)
            if differs(reads(node)):
                other.update(names.key(output) for output in node.outputs)

    yield from search(run.model.graph)


def _correction(site: Site, old: Stepwise, new: Stepwise, rng: np.random.Generator) -> Correction | str:
    """The correction of a layer, or why there is none."""
    rows = rows_of(site, old, new, rng)
    if isinstance(rows, str):
        return rows
    held_out = rows.of(rows.held_out)
    if held_out.error(held_out.now) < _SAME:
        return _UNCHANGED
    return fit(rows, offset=site.layer.offset) or "no better on held-out samples"


def rows_of(site: Site, old: Stepwise, new: Stepwise, rng: np.random.Generator, mask: str | None = None) -> Rows | str:
    """Rows that tell what a layer should make of what it reads now, or why there are none.

    Args:
        site: The layer.
        old: The whole model.
        new: The model that the layer is in.
        rng: Chooses among many rows.
        mask: Name of the input that says which positions count, see `PADDING`; None: all do.
    """
    layer = site.layer
    if layer.groups * layer.inputs**2 > WIDEST**2:
        return f"the second moments of its input are {layer.groups} x {layer.inputs} x {layer.inputs} numbers"
    with np.errstate(all="ignore"):  # what is not finite is looked for
        rows = _rows(site, old, new, rng, mask)
    if not rows.held_out.any() or rows.held_out.all():
        return "too few samples to hold some out"
    if not (np.isfinite(rows.x).all() and np.isfinite(rows.wanted).all() and np.isfinite(rows.now).all()):
        return "what goes through it is not finite"
    return rows


def _rows(site: Site, old: Stepwise, new: Stepwise, rng: np.random.Generator, mask: str | None) -> Rows:
    """As many rows of a layer as are worth reading."""
    layer, batches = site.layer, len(old.feeds)
    matrix, shift = layer.matrix().astype(np.float32), layer.shift.reshape(layer.groups, 1, -1).astype(np.float32)
    most = rows_worth_reading(layer.groups, layer.inputs, layer.outputs) // batches + 1
    parts, plain = {False: list[list[np.ndarray]](), True: list[list[np.ndarray]]()}, False
    for batch, sample in enumerate(site.samples(old, new)):
        count, kept = layer.positions(sample.output), None
        if mask is not None and layer.channel_axis == -1:
            kept = heeded_rows(count, sample.output, old.feeds[batch][mask])
        count = count if kept is None else len(kept)
        chosen = np.sort(rng.choice(count, most, replace=False)) if count > most else np.arange(count)
        chosen = chosen if kept is None else kept[chosen]
        held_out = _held_out(len(chosen), batch, batches)
        plain = plain or not sample.alike
        for late, some in _pieces(chosen, held_out, _CHUNK // (layer.groups * layer.inputs)):
            wanted, added = site.totals(sample, some)
            made_of = layer.rows(sample.x, some).astype(np.float32, copy=False)
            now = made_of @ matrix
            now += shift
            if added is not None:
                now += layer.grouped(added)
            parts[late].append([made_of, layer.grouped(wanted).astype(np.float32, copy=False), now])
    counts = [sum(part[0].shape[1] for part in parts[late]) for late in (False, True)]
    arrays = [_joined(parts[False] + parts[True], at) for at in range(3)]
    bounds = (site.outlook.low, site.outlook.high)
    low, high = (b.reshape(layer.groups, 1, -1).astype(np.float32) for b in bounds)
    if plain:
        low, high = np.full_like(low, -np.inf), np.full_like(high, np.inf)
    return Rows(arrays[0], arrays[1], arrays[2], np.arange(sum(counts)) >= counts[0], low, high)


def _pieces(chosen: np.ndarray, held_out: np.ndarray, size: int) -> Iterator[tuple[bool, np.ndarray]]:
    """Rows in pieces that are not too large, each all held out or all not."""
    for late in (False, True):
        some = chosen[held_out == late]
        yield from ((late, some[start : start + max(1, size)]) for start in range(0, len(some), max(1, size)))


def _joined(parts: Sequence[list[np.ndarray]], at: int) -> np.ndarray:
    """One array of several, `[groups, rows, ...]`; a part is given up as soon as it is copied."""
    first, rows = parts[0][at], sum(part[at].shape[1] for part in parts)
    found, start = np.empty((first.shape[0], rows, first.shape[2]), dtype=first.dtype), 0
    for part in parts:
        end = start + part[at].shape[1]
        found[:, start:end], start = part[at], end
        part[at] = part[at][:, :0]
    return found


def _held_out(count: int, batch: int, batches: int) -> np.ndarray:
    """`[count]`: rows to hold out: whole batches where there are enough, else a fifth of each."""
    if batches >= _HOLD_OUT:
        return np.full(count, batch % _HOLD_OUT == _HOLD_OUT // 2)
    places = np.arange(count)
    return (places >= 2 * count // _HOLD_OUT) & (places < 3 * count // _HOLD_OUT)


def _errors(found: Correction | str, joined: Joined | None) -> tuple[float, float] | None:
    """Error of a layer's output before it was refitted, and after all that was done; None if nothing was."""
    if isinstance(found, str):
        return None if joined is None else (joined.before, joined.after)
    # the pair was measured on samples of its own
    return found.before, found.after * (1.0 if joined is None else joined.after / max(joined.before, 1e-12))


def _restated(site: str, reason: str, found: Restated | None) -> Change:
    if found is None:
        return Change.skipped(site, f"not refitted: {reason}")
    details = {"error_before": round(found.before, 6), "error_after": round(found.after, 6)}
    action = f"restated {found.what}, as {reason}: output error {found.before:.2f} -> {found.after:.2f}"
    return Change(site, action, details=details)


def _change(site: str, found: Correction | str, joined: Joined | None) -> Change:
    errors = _errors(found, joined)
    if errors is None:
        return Change.skipped(site, f"not refitted: {found}")
    before, after = errors
    partner = "" if joined is None else f", together with {joined.first}"
    details = {"error_before": round(before, 6), "error_after": round(after, 6)}
    return Change(site, f"refitted: output error {before:.2f} -> {after:.2f}{partner}", details=details)
