"""Making a layer sparse with samples at hand: which weights go, and what the others and the bias become.

With refitting, layers are visited in the graph's order, as SparseGPT does: each reads what the layers before it, sparse
already, make of the samples, and is asked for the output that it had in the whole model. Without, the inputs of the
whole model decide, kept weights stay (the update of the OBS sweep apart), and the bias takes over the mean shift.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
import onnx_ir as ir

from graphopt.analyses import CONSTANTS, MOMENTS, LayerMoments
from graphopt.analyses import Moments as InputMoments
from graphopt.calibration import Dataset
from graphopt.pass_base import Context
from graphopt.reference import Feed
from graphopt_passes.prune.pattern.obs import (
    Rule,
    cost,
    damped,
    find_sparse,
    inverse_factor,
    norm_scores,
    solve_kept,
    sweep,
)
from graphopt_passes.prune.pattern.sites import Site
from graphopt_passes.prune.refit.least_squares import Moments
from graphopt_passes.prune.refit.linear_layers import WIDEST, LinearLayer, rows_worth_reading
from graphopt_passes.prune.refit.stepwise import Stepwise

__all__ = ["Fitted", "Method", "Refitter", "Shifter", "layer_of"]

Method = Literal["magnitude", "wanda", "obs"]

_SAMPLES = 256
_BATCH = 16
_HOLD_OUT = 5
_CHUNK = 1 << 23
_RIDGES = (1e-3, 1e-2, 1e-1)
_RIDGE = 1e-2
_SAME = 1e-5


@dataclass(frozen=True, eq=False)
class Fitted:
    """A sparse layer.

    Attributes:
        weight: `[groups, inputs, outputs]` in the order of the site.
        bias: `[groups, outputs]`, to be added to the output.
        before: Relative error of the output with weights zeroed and nothing else; with refitting on held-out samples.
        after: The same with what the other weights and the bias make up for; None: not known, as `before`.
        done: False: there is nothing to do.
    """

    weight: np.ndarray
    bias: np.ndarray
    before: float | None = None
    after: float | None = None
    done: bool = True


@dataclass(frozen=True, eq=False)
class _Pairs:
    """Mean products of what a layer reads, `[groups, inputs, inputs]`.

    Attributes:
        products: As they are.
        varying: About the mean.
        free: What an error of the weights costs once the bias took over what it can.
    """

    products: np.ndarray
    varying: np.ndarray
    free: np.ndarray

    @cached_property
    def hessian(self) -> np.ndarray:
        """What `sweep` asks for."""
        return damped(self.free, _RIDGE)

    @cached_property
    def factor(self) -> np.ndarray:
        """What it asks for as well, and what takes longest."""
        return inverse_factor(self.hessian)


@dataclass(frozen=True, eq=False)
class _Read:
    """Moments of what a layer reads, inputs in the order of its site.

    Attributes:
        mean: `[groups, inputs]`.
        power: `[groups, inputs]` mean squares.
        pairs: None: not known.
    """

    mean: np.ndarray
    power: np.ndarray
    pairs: _Pairs | None

    @classmethod
    def of(cls, seen: LayerMoments, order: np.ndarray, *, offset: bool) -> _Read:
        mean, power = seen.mean[:, order], seen.squares[:, order] / seen.rows
        if seen.xx is None:
            return cls(mean, power, None)
        products = seen.xx[:, order[:, None], order] / seen.rows
        varying = products - mean[:, :, None] * mean[:, None, :]
        return cls(mean, power, _Pairs(products, varying, varying if offset else products))


class Shifter:
    """Makes layers sparse by what they read in the whole model; biases make up for the mean.

    Args:
        whole: The model as it was.
        ctx: Where samples come from.
    """

    def __init__(self, whole: ir.Model, ctx: Context) -> None:
        self.whole, self.ctx = whole, ctx
        self.all = list(MOMENTS.portions(ctx))
        self.portions, self.seen = [*self.all], InputMoments(layers={}, left_out={})
        self.last: tuple[Site, _Read] | None = None

    def rewind(self) -> None:
        """Begin with the first layer again."""
        if len(self.all) > 1:
            self.portions, self.seen = [*self.all], InputMoments(layers={}, left_out={})

    def fit(self, site: Site, layer: LinearLayer, method: Method, rule: Rule) -> Fitted | str:
        """A sparse layer, or why samples are of no use.

        Args:
            site: The weight.
            layer: The layer that reads it.
            method: How weights are judged; obs lets its sweep update the weights that are kept.
            rule: How many are dropped.
        """
        read = self._read(site, layer)
        if isinstance(read, str):
            return read
        weight = site.matrix()
        if rule.fits(weight):
            return Fitted(weight, np.zeros(()), done=False)
        dropped = rule.drop(norm_scores(weight, None if method == "magnitude" else read.power))
        left = bare = np.where(dropped, 0.0, weight)
        if (pairs := read.pairs) is None:
            if method == "obs":
                return "the second moments of its input are too large"
            return Fitted(bare, self._bias(layer, read.mean, weight - bare))
        if method == "obs":
            left, _ = sweep(weight, pairs.hessian, rule, pairs.factor)
        energy = max(cost(weight, pairs.varying), np.finfo(np.float64).tiny)
        before, after = cost(bare - weight, pairs.products), cost(left - weight, pairs.free)
        errors = np.sqrt(np.maximum(0, (before, after)) / energy)
        return Fitted(left, self._bias(layer, read.mean, weight - left), float(errors[0]), float(errors[1]))

    def _read(self, site: Site, layer: LinearLayer) -> _Read | str:
        """What a layer reads, kept until another layer is asked for."""
        if self.last is None or self.last[0] is not site:
            seen = self._moments(layer.node.name)
            if isinstance(seen, str):
                return seen
            self.last = site, _Read.of(seen, _order(site), offset=layer.offset)
        return self.last[1]

    def _moments(self, name: str | None) -> LayerMoments | str:
        """What a layer reads; layers are asked for in the order of the portions."""
        while (found := self.seen.of(name)) is None and self.portions:
            self.seen = self.portions.pop(0).compute(self.whole, self.ctx)
        if found is None or not found.rows:
            return self.seen.left_out.get(name or "", "no sample reaches it")
        return found if found.finite else "what goes through it is not finite"

    def _bias(self, layer: LinearLayer, mean: np.ndarray, lost: np.ndarray) -> np.ndarray:
        """`[groups, outputs]`: what lost weights added on average."""
        return _scale(layer) * layer.offset * (mean[:, None] @ lost)[:, 0]


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
        self.old, self.new, self.rng = Stepwise(whole, self.feeds, ctx), Stepwise(model, self.feeds, ctx), ctx.rng

    def fit(self, site: Site, layer: LinearLayer, method: Method, rule: Rule) -> Fitted | str:
        """A sparse layer, or why samples are of no use; sites come in the graph's order."""
        if layer.groups * layer.inputs**2 > WIDEST**2:
            return f"the second moments of its input are {layer.groups} x {layer.inputs} x {layer.inputs} numbers"
        if (layer.node.outputs[0].name or "") not in self.new.born:
            return "its input is constant"
        moments = self._moments(site, layer)
        if isinstance(moments, str):
            return moments
        seen, held_out = moments
        scale, offset = _scale(layer), layer.offset
        weight = scale * site.matrix()
        fixed = weight == 0 if rule.fits(weight) else None
        if fixed is not None and held_out.error() < _SAME:
            return Fitted(weight, np.zeros(()), done=False)

        def error(ridge: float) -> float:
            problem = _Problem.of(seen, weight, ridge, offset=offset)
            zeros = problem.zeros(weight, rule, "wanda" if method == "obs" else method) if fixed is None else fixed
            return held_out.error(*problem.change(weight, zeros, rough=True))

        ridge = min(_RIDGES, key=error)
        problem = _Problem.of(seen, weight, ridge, offset=offset)
        zeros = problem.zeros(weight, rule, method) if fixed is None else fixed
        before = held_out.error(np.where(zeros, -weight, 0.0), 0 * problem.missed)
        after = held_out.error(*problem.change(weight, zeros, rough=True))
        seen.merge(held_out)
        change, bias = _Problem.of(seen, weight, ridge, offset=offset).change(weight, zeros)
        return Fitted(np.where(zeros, 0.0, (weight + change) / scale), bias, before, after)

    def _moments(self, site: Site, layer: LinearLayer) -> tuple[Moments, Moments] | str:
        """Moments of what the layer reads now and of what it misses, to fit and to hold out."""
        order, batches = _order(site), len(self.feeds)
        matrix, shift = layer.matrix(), layer.shift.reshape(layer.groups, 1, -1)
        sums = [Moments.empty(*matrix.shape) for _ in range(2)]
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
        output, x = layer.node.outputs[0], layer.node.inputs[0]
        position, shortcut = self.new.born[output.name or ""], _shortcut(output, self.new)
        more = [shortcut] if shortcut is not None and self.new.born[shortcut] < position else []
        old = self.old.run(self.old.born[output.name or ""] + 1, [output.name or "", *more])
        new = self.new.run(position, [(x.name or "") if x is not None else "", *more])
        for (wanted, *was), (rows, *now) in zip(old, new, strict=True):
            for before, after in zip(was, now, strict=True):  # what the shortcut lost is made up for
                yield rows, wanted + before - after if before.shape == wanted.shape else wanted
            if not more:
                yield rows, wanted


def layer_of(site: Site, ctx: Context) -> LinearLayer | str:
    """The layer of a site, or why samples are of no use to it."""
    if site.alone is not None:
        return site.alone
    layer = LinearLayer.of(site.node, ctx.fact(CONSTANTS))
    if isinstance(layer, LinearLayer) and layer.node.attributes.get_float("alpha", 1.0) == 0:
        return "its product is multiplied by zero"
    return layer


def _order(site: Site) -> np.ndarray:
    """Where the inputs of the site, kernel first, are among those of the layer, channels first."""
    return np.arange(site.layout.inputs).reshape(site.layout.run, -1).T.reshape(-1)


def _scale(layer: LinearLayer) -> float:
    return layer.node.attributes.get_float("alpha", 1.0) if layer.node.op_type == "Gemm" else 1.0


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
        system, (change, _) = seen.system(ridge, offset=offset), seen.solve(ridge, offset=offset)
        return cls(weight + change, system.matrix / seen.rows, system.mean, offset * seen.r / seen.rows)

    def change(self, old: np.ndarray, zeros: np.ndarray, *, rough: bool = False) -> tuple[np.ndarray, np.ndarray]:
        """What to add to weight and bias once these are zero."""
        change = solve_kept(self.weight, self.hessian, zeros, old, rough=rough) - old
        return change, self.missed - (self.mean[:, None] @ change)[:, 0]

    def zeros(self, old: np.ndarray, rule: Rule, method: Method) -> np.ndarray:
        """What is dropped."""
        if method == "obs":
            return find_sparse(self.weight, self.hessian, rule)
        power = None if method == "magnitude" else np.diagonal(self.hessian, axis1=1, axis2=2)
        return rule.drop(norm_scores(old, power))
