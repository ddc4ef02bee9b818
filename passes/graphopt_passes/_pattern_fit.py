"""Making a layer sparse with samples at hand: which weights go, and what the others and the bias become.

With refitting, layers are visited in the graph's order, as SparseGPT does: each reads what the layers before it, sparse
already, make of the samples, and is asked for the output that it had in the whole model. Without, the inputs of the
whole model decide, kept weights stay (the update of the OBS sweep apart), and the bias takes over the mean shift.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import onnx_ir as ir

from graphopt.analyses import CONSTANTS, LayerMoments
from graphopt.calibration import Dataset
from graphopt.pass_base import Context
from graphopt.reference import Feed
from graphopt_passes._least_squares import Moments
from graphopt_passes._linear_layers import WIDEST, LinearLayer, rows_worth_reading
from graphopt_passes._pattern_sites import Site
from graphopt_passes._sparse_obs import Rule, cost, damped, find_sparse, norm_scores, solve_kept, sweep
from graphopt_passes._stepwise import Stepwise

__all__ = ["Fitted", "Method", "Refitter", "shifted", "too_wide"]

Method = Literal["magnitude", "wanda", "obs"]

_SAMPLES = 256
_BATCH = 16
_HOLD_OUT = 5
_CHUNK = 1 << 23
_RIDGES = (1e-3, 1e-2, 1e-1, 1.0)
_RIDGE = 1e-2


@dataclass(frozen=True, eq=False)
class Fitted:
    """A sparse layer.

    Attributes:
        weight: `[groups, inputs, outputs]` in the order of the site.
        bias: `[groups, outputs]`, to be added.
        before: Relative error of the output with weights zeroed and nothing else; with refitting on held-out samples.
        after: The same with what the other weights and the bias make up for; None: not known, as `before`.
    """

    weight: np.ndarray
    bias: np.ndarray
    before: float | None
    after: float | None


def too_wide(layer: LinearLayer) -> str | None:
    """Why there is no X'X for a layer, None if there is."""
    if layer.groups * layer.inputs**2 <= WIDEST**2:
        return None
    return f"the second moments of its input are {layer.groups} x {layer.inputs} x {layer.inputs} numbers"


def shifted(site: Site, layer: LinearLayer, method: Method, rule: Rule, seen: LayerMoments) -> Fitted | str:
    """A sparse layer whose kept weights stay, or why samples are of no use.

    Args:
        site: The weight.
        layer: The layer that reads it.
        method: How weights are judged; obs lets the sweep update the weights that it keeps.
        rule: How many are dropped.
        seen: What the layer reads in the whole model.
    """
    if not seen.rows or not seen.finite:
        return "what goes through it is not finite" if seen.rows else "no sample reaches it"
    order, weight = _order(site), site.matrix()
    mean, power = seen.mean[:, order] * layer.offset, seen.squares[:, order] / seen.rows
    if seen.xx is None:
        if method == "obs":
            return "the second moments of its input are too large"
        zeros = rule.drop(norm_scores(weight, power if method == "wanda" else None))
        return Fitted(np.where(zeros, 0.0, weight), _moved(mean, np.where(zeros, weight, 0.0)), None, None)
    products = seen.xx[:, order[:, None], order] / seen.rows
    spread = products - mean[:, :, None] * mean[:, None, :]  # the bias takes over what is constant
    zeros = rule.drop(norm_scores(weight, power if method != "magnitude" else None))
    bare = np.where(zeros, 0.0, weight)
    left = bare if method != "obs" else sweep(weight, damped(spread, _RIDGE), rule)[0]
    energy = max(cost(weight, spread), np.finfo(np.float64).tiny)
    before, after = (max(0.0, cost(*pair)) / energy for pair in ((bare - weight, products), (left - weight, spread)))
    return Fitted(left, _moved(mean, weight - left), float(np.sqrt(before)), float(np.sqrt(after)))


def _moved(mean: np.ndarray, lost: np.ndarray) -> np.ndarray:
    """`[groups, outputs]`: what lost weights added on average."""
    return (mean[:, None] @ lost)[:, 0]


def _order(site: Site) -> np.ndarray:
    """Where the inputs of the site, kernel first, are among those of the layer, channels first."""
    run = site.layout.run
    return np.arange(site.layout.inputs).reshape(run, -1).T.reshape(-1)


class Refitter:
    """Makes layers sparse one after the other, in the graph's order.

    Args:
        whole: The model as it was.
        model: The model whose layers change.
        data: Samples, of which 256 are used; every fifth batch is held out.
        ctx: Its random numbers choose the rows that are looked at.
    """

    def __init__(self, whole: ir.Model, model: ir.Model, data: Dataset, ctx: Context) -> None:
        count = sum(1 for _ in data.feeds(_SAMPLES))
        self.feeds: list[Feed] = list(data.batches(max(1, min(_BATCH, count // 10)), _SAMPLES))
        self.old, self.new = Stepwise(whole, self.feeds, ctx), Stepwise(model, self.feeds, ctx)
        self.rng, self.constants = ctx.rng, ctx.fact(CONSTANTS)

    def fit(self, site: Site, layer: LinearLayer, method: Method, rule: Rule) -> Fitted | str:
        """A sparse layer, or why samples are of no use; sites come in the graph's order."""
        moments = self._moments(site, layer)
        if isinstance(moments, str):
            return moments
        seen, held_out = moments
        weight, offset = layer.matrix()[:, _order(site)], layer.offset
        fixed = weight == 0 if rule.fits(weight) else None

        def error(ridge: float) -> float:
            problem = _Problem.of(seen, weight, ridge, offset=offset)
            zeros = problem.zeros(weight, rule, "wanda" if method == "obs" else method) if fixed is None else fixed
            return held_out.error(*problem.change(weight, zeros))

        ridge = min(_RIDGES, key=error)
        problem = _Problem.of(seen, weight, ridge, offset=offset)
        zeros = problem.zeros(weight, rule, method) if fixed is None else fixed
        before = held_out.error(np.where(zeros, -weight, 0.0), 0 * problem.missed)
        after = held_out.error(*problem.change(weight, zeros))
        seen.merge(held_out)
        change, bias = _Problem.of(seen, weight, ridge, offset=offset).change(weight, zeros)
        return Fitted(np.where(zeros, 0.0, weight + change), bias, before, after)

    def _moments(self, site: Site, layer: LinearLayer) -> tuple[Moments, Moments] | str:
        """Moments of what the layer reads now and of what it misses, to fit and to hold out."""
        matrix, shift, order = layer.matrix(), layer.shift.reshape(layer.groups, 1, -1), _order(site)
        sums = [Moments.empty(*matrix.shape) for _ in range(2)]
        batches = len(self.feeds)
        most = rows_worth_reading(layer.groups, layer.inputs) // batches + 1
        for batch, (x, output) in enumerate(self._samples(layer)):
            count = layer.positions(output)
            chosen = np.sort(self.rng.choice(count, most, replace=False)) if count > most else np.arange(count)
            for moments, part in zip(sums, _parts(chosen, batch, batches), strict=True):
                for rows in np.array_split(part, len(part) * layer.groups * layer.inputs // _CHUNK + 1):
                    made_of, wanted = layer.rows(x, rows), layer.wanted(output, rows)
                    with np.errstate(all="ignore"):  # what is not finite shows in the moments
                        moments.add(made_of[:, :, order], wanted - made_of @ matrix - shift, wanted)
        seen, held_out = sums
        if not seen.rows or not held_out.rows:
            return "too few samples to hold some out"
        return (seen, held_out) if seen.finite and held_out.finite else "what goes through it is not finite"

    def _samples(self, layer: LinearLayer) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """The layer's input and the output that it should have, batch after batch."""
        output, x = layer.node.outputs[0].name or "", layer.node.inputs[0]
        position, shortcut = self.new.born[output], _shortcut(layer.node.outputs[0], self.new)
        more = [shortcut] if shortcut is not None and self.new.born[shortcut] < position else []
        old = self.old.run(position + 1, [output, *more])
        new = self.new.run(position, [x.name or "" if x is not None else "", *more])
        for (wanted, *was), (rows, *now) in zip(old, new, strict=True):
            for before, after in zip(was, now, strict=True):
                if before.shape == wanted.shape:
                    wanted = wanted + before - after
            yield rows, wanted


def _shortcut(output: ir.Value, run: Stepwise) -> str | None:
    """What alone is done to an output, but for adding constants, is adding this to it."""
    while len(uses := list(output.uses())) == 1 and not output.is_graph_output():
        node, index = uses[0]
        if node.op_type != "Add":
            return None
        other = node.inputs[1 - index]
        if other is not None and (other.name or "") in run.born:
            return other.name
        output = node.outputs[0]
    return None


def _parts(chosen: np.ndarray, batch: int, batches: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows to fit and rows to hold out: whole batches where there are enough, else a fifth of each."""
    none = chosen[:0]
    if batches >= _HOLD_OUT:
        return (none, chosen) if batch % _HOLD_OUT == _HOLD_OUT // 2 else (chosen, none)
    first, last = 2 * len(chosen) // _HOLD_OUT, 3 * len(chosen) // _HOLD_OUT
    return np.concatenate([chosen[:first], chosen[last:]]), chosen[first:last]


@dataclass(frozen=True, eq=False)
class _Problem:
    """The least squares of a layer: `weight` is best without zeros, departing from it by D costs `trace(D'HD)`.

    Attributes:
        weight: `[groups, inputs, outputs]`.
        hessian: `[groups, inputs, inputs]`.
        mean: `[groups, inputs]` of the rows; zero where the bias may not change.
        missed: `[groups, outputs]` mean of what the layer misses with its old weights; zero likewise.
    """

    weight: np.ndarray
    hessian: np.ndarray
    mean: np.ndarray
    missed: np.ndarray

    @classmethod
    def of(cls, seen: Moments, weight: np.ndarray, ridge: float, *, offset: bool) -> _Problem:
        mean, missed = (seen.x / seen.rows, seen.r / seen.rows) if offset else (0 * seen.x, 0 * seen.r)
        hessian = damped(seen.xx / seen.rows - mean[:, :, None] * mean[:, None, :], ridge)
        pull = seen.xr / seen.rows - mean[:, :, None] * missed[:, None, :]
        return cls(weight + np.linalg.solve(hessian, pull), hessian, mean, missed)

    def change(self, old: np.ndarray, zeros: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """What to add to weight and bias once these are zero."""
        change = solve_kept(self.weight, self.hessian, zeros, old) - old
        return change, self.missed - (self.mean[:, None] @ change)[:, 0]

    def zeros(self, old: np.ndarray, rule: Rule, method: Method) -> np.ndarray:
        """What is dropped."""
        if method == "obs":
            return find_sparse(self.weight, self.hessian, rule)
        power = None if method == "magnitude" else np.diagonal(self.hessian, axis1=1, axis2=2)
        return rule.drop(norm_scores(old, power))
