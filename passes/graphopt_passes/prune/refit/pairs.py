"""Pairs of layers with nothing but an activation between them, and the samples to refit them on together."""

from __future__ import annotations

from collections.abc import Mapping
from copy import copy
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from graphopt.analyses import Constants
from graphopt_passes.prune.refit.clipped_fit import Rows
from graphopt_passes.prune.refit.linear_layers import LINEAR, LinearLayer
from graphopt_passes.prune.refit.pair_fit import Pair, Weights, fit_pair
from graphopt_passes.prune.refit.sites import AxisName, Site, name_of, site_of
from graphopt_passes.prune.refit.stepwise import Stepwise

__all__ = ["Joined", "Pairs"]

_PRODUCTS = 6e9
_ALL_PRODUCTS = 1.2e11
_ELEMENTS = 2e7
_WIDEST = 2400
_ROWS_AN_INPUT = 4
_HOLD_OUT = 5
_ONNX = ("", "ai.onnx")


@dataclass(frozen=True)
class Joined:
    """Two layers were refitted together.

    Attributes:
        first: Name of the first.
        before: Relative error of the second's output on held-out samples, each layer refitted for itself.
        after: The same, together.
    """

    first: str
    before: float
    after: float


@dataclass(frozen=True, eq=False)
class _Samples:
    """Samples of a pair.

    Attributes:
        x: What goes in, samples on the first axis.
        wanted: `[samples, positions, outputs]`: totals in the whole model.
        bypass: `[samples, positions, outputs]`: what is added to the second layer's output.
        held_out: `[samples]`: not to be fitted, but to choose by.
    """

    x: np.ndarray
    wanted: np.ndarray
    bypass: np.ndarray
    held_out: np.ndarray


class Pairs:
    """Refits a layer together with the one before it, once each was refitted for itself.

    Args:
        old: The model before the removal; layers are visited with it where they are refitted for themselves.
        new: The model after it, on the same batches; its weights change.
        lost: Positions that were removed, by value and axis.
        layers: How many layers there are to refit at most; they share what may be multiplied in all.
    """

    def __init__(self, old: Stepwise, new: Stepwise, lost: Mapping[AxisName, np.ndarray], layers: int) -> None:
        self.old, self.new, self.lost = old, copy(new), lost
        self.share = min(_PRODUCTS, _ALL_PRODUCTS / max(1, layers))
        self.last: tuple[ir.Node, Stepwise] | None = None

    def passed(self, layer: ir.Node, run: Stepwise) -> None:
        """A run has read what a layer reads; to start there spares running the model up to it once more."""
        self.last = layer, copy(run)

    def improve(self, second: Site, constants: Constants) -> Joined | None:
        """Refit the layer of a site with the one before it.

        Args:
            second: A layer, refitted for itself.
            constants: The model's constants as they are now.

        Returns:
            What that gave, None where there is no such pair or it is no better on held-out samples. `new` then is
            where the first layer reads.
        """
        layer = LinearLayer.of(second.layer.node, constants)
        node = _before(second.layer.node)
        first = None if node is None else LinearLayer.of(node, constants)
        if not (isinstance(first, LinearLayer) and isinstance(layer, LinearLayer)) or not _simple(first, layer):
            return None
        if first.inputs**3 + layer.inputs**3 > self.share:  # each step solves for both
            return None
        site = site_of(first, self.old, self.new, self.lost, constants)
        shortcut, at = second.outlook.shortcut, site.positions[1]
        late = shortcut is not None and self.new.born[shortcut] >= at
        unclear = site.outlook.shortcut is not None or not site.outlook.bounded or not site.outlook.gain.all()
        if late or unclear or at < self.new.position:
            return None
        if self.last is not None and self.last[0] is node:
            self.new.resume(self.last[1])
        found = _samples(site, second, self.old, self.new, self.share)
        weights = None if found is None else _fit(first, layer, site, second, found)
        if weights is None:
            return None
        changed, before, after = weights
        pairs = ((first, changed.first, changed.first_bias), (layer, changed.second, changed.second_bias))
        for each, weight, bias in pairs:
            each.add(self.new.model.graph, weight[None] - each.matrix(), (bias - each.shift)[None])
        return Joined(first.node.name or name_of(first.node.outputs[0]), before, after)


def _before(node: ir.Node) -> ir.Node | None:
    """The layer whose output reaches another by a Relu or Clip, and by nothing else but constants and batch norms."""
    value, activated = node.inputs[0], False
    while value is not None and not value.is_graph_output() and len(value.uses()) == 1:
        maker = value.producer()
        if maker is None or maker.domain not in _ONNX or maker.graph is not node.graph:
            return None
        if maker.op_type in LINEAR:
            return maker if activated else None
        if maker.op_type in ("Relu", "Clip"):
            if activated:
                return None
            activated, value = True, maker.inputs[0]
        elif maker.op_type == "BatchNormalization" and activated:
            value = maker.inputs[0]
        elif maker.op_type in ("Add", "Mul") and activated:
            value = next((each for each in maker.inputs if _computed(each)), None)
        else:
            return None
    return None


def _computed(value: ir.Value | None) -> bool:
    """Whether a node other than Constant makes a value."""
    maker = None if value is None else value.producer()
    return maker is not None and maker.op_type != "Constant"


def _simple(first: LinearLayer, second: LinearLayer) -> bool:
    """Whether two layers can be fitted together: both convolutions or both matrices, whole, narrow, with biases."""
    kinds = {layer.node.op_type == "Conv" for layer in (first, second)}
    known = all(layer.node.op_type in ("Conv", "Gemm", "MatMul") for layer in (first, second))
    plain = all(layer.groups == 1 and layer.offset and layer.inputs <= _WIDEST for layer in (first, second))
    return known and plain and len(kinds) == 1


def _samples(first: Site, second: Site, old: Stepwise, new: Stepwise, products: float) -> _Samples | None:
    """As many samples as are worth reading; None if they are too few, or not of one size."""
    parts, regular = list[tuple[np.ndarray, ...]](), True
    for i, sample in enumerate(second.samples(old, new, first)):
        x, count = sample.x, second.layer.positions(sample.output)
        regular = regular and sample.alike and x.ndim > 1 and len(x) == len(sample.output)
        regular = regular and (not parts or parts[0][0].shape[1:] == x.shape[1:])
        if not regular:
            continue
        positions = count // len(x)
        worth = _worth(first.layer, second.layer, x, positions, products)
        if i >= worth:
            continue
        x = x[: max(1, worth // len(old.feeds))]
        total, bypass = second.totals(sample, np.arange(len(x) * positions))
        assert bypass is not None
        tables = (array.reshape(len(x), positions, -1) for array in (total, bypass))
        parts.append((x, *tables, np.full(len(x), i % _HOLD_OUT == _HOLD_OUT // 2)))
    if not regular or len(parts) < _HOLD_OUT:
        return None
    return _Samples(*(np.concatenate(part) for part in zip(*parts, strict=True)))


def _worth(first: LinearLayer, second: LinearLayer, x: np.ndarray, after: int, most: float) -> int:
    """How many samples take no more than so many products, and no more memory than there should be."""
    between = int(np.prod(first.windows(x.shape[2:]).sizes(x.shape[2:]))) if first.array.ndim > 2 else after
    elements = between * first.inputs + after * second.inputs
    products = 3 * between * first.array.size + 4 * after * second.array.size + after * second.inputs**2 // 2
    return int(min(most / products, _ELEMENTS / elements))


def _fit(
    first: LinearLayer, second: LinearLayer, site: Site, after: Site, found: _Samples
) -> tuple[Weights, float, float] | None:
    """Fit the pair; None if there are too few rows, or it is no better."""
    outlook, kept = site.outlook, found.held_out
    if not all(np.isfinite(array).all() for array in (found.x, found.wanted, found.bypass)):
        return None
    low, high, offset, gain = (a.astype(np.float32) for a in (outlook.low, outlook.high, outlook.offset, outlook.gain))
    bounds = [bound.astype(np.float32).reshape(1, 1, -1) for bound in (after.outlook.low, after.outlook.high)]

    def pair(chosen: np.ndarray) -> Pair:
        x = found.x[chosen]
        at = first.windows(x.shape[2:])
        rows = at.rows(x).astype(np.float32, copy=False)
        shape = (len(x), first.outputs, *at.sizes(x.shape[2:])) if at.kernel else (*x.shape[:-1], first.outputs)
        wanted, bypass = (
            array[chosen].reshape(1, -1, second.outputs).astype(np.float32, copy=False)
            for array in (found.wanted, found.bypass)
        )
        out = Rows(wanted[:, :0], wanted, wanted[:, :0], np.zeros(wanted.shape[1], dtype=bool), bounds[0], bounds[1])
        return Pair(rows, shape, second.windows(shape[2:]), low, high, offset, gain, out, bypass[0])

    fitted = pair(~kept)
    rows = fitted.out.wanted.shape[1]
    if len(fitted.rows) < _ROWS_AN_INPUT * first.inputs or rows < _ROWS_AN_INPUT * second.inputs:
        return None
    start = Weights(*(a.astype(np.float32) for a in (first.matrix()[0], first.shift, second.matrix()[0], second.shift)))
    return fit_pair(fitted, pair(kept), lambda: pair(np.ones_like(kept)), start)
