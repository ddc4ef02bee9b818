"""Second moments of what linear layers read, on the calibration data, streamed.

With `X` the rows that a layer multiplies with its weight (the im2col rows of a convolution), `X'X` says how much each
input matters, alone and given the others. It serves channel scores (Wanda, Sun et al., 2023), least squares (Channel
Pruning, He et al., 2017) and updates after removing or rounding weights (Optimal Brain Surgeon, Hassibi and Stork,
1993; SparseGPT, Frantar and Alistarh, 2023; GPTQ, Frantar et al., 2022).

Memory is bounded: activations are exposed some at a time (see `stream`), rows beyond what tells the inputs apart are
left out, evenly and always the same ones, and where products of all layers would take more than `most_bytes` the
widest layers keep only their diagonal. For exact products of many wide layers ask for portions:

    for part in MOMENTS.portions(ctx):
        moments = part.compute(model, ctx)
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import onnx_ir as ir

from graphopt.analyses.linear_inputs import LINEAR_LAYERS, LinearInput
from graphopt.analyses.padding import PADDING, heeded_rows
from graphopt.analyses.streaming import needed_samples, stream
from graphopt.pass_base import Analysis, Context

__all__ = ["MOMENTS", "LayerMoments", "Moments", "MomentsAnalysis", "spread_out"]

Array = np.ndarray[Any, np.dtype[Any]]

_ROWS = 30_000
_ELEMENTS = 1e8
_PRODUCTS = 1.5e10
_CHUNK = 1 << 22
_NARROW = 640
_GOLDEN = (5**0.5 - 1) / 2


@dataclass(frozen=True, eq=False)
class LayerMoments:
    """Moments of the rows that a layer reads; float64, inputs in the order of the weight: channels, then kernel.

    Attributes:
        rows: How many rows were seen.
        mean: `[groups, inputs]`.
        squares: `[groups, inputs]` sums of squares, the diagonal of X'X.
        xx: `[groups, inputs, inputs]` X'X, not divided by the rows; None where only its diagonal was asked for, or
            memory holds no more.
    """

    rows: int
    mean: Array
    squares: Array
    xx: Array | None

    @property
    def finite(self) -> bool:
        """No row held an infinity or NaN."""
        return bool(np.isfinite(self.squares).all())

    @property
    def norms(self) -> Array:
        """`[groups, inputs]` root mean square of each input."""
        return np.sqrt(self.squares / max(1, self.rows))

    @property
    def variances(self) -> Array:
        """`[groups, inputs]`."""
        return np.maximum(0.0, self.squares / max(1, self.rows) - np.square(self.mean))

    def covariance(self) -> Array | None:
        """`[groups, inputs, inputs]`, None where there is no X'X."""
        if self.xx is None:
            return None
        return self.xx / max(1, self.rows) - self.mean[:, :, None] * self.mean[:, None, :]


@dataclass(frozen=True)
class Moments:
    """Moments by name of the layer; layers that read the same share them.

    Attributes:
        layers: What was measured.
        left_out: Linear nodes without moments, and why.
    """

    layers: Mapping[str, LayerMoments]
    left_out: Mapping[str, str]

    def of(self, name: str | None) -> LayerMoments | None:
        """The moments of a layer by the name of its node; None where there are none."""
        return self.layers.get(name or "")


@dataclass(frozen=True)
class MomentsAnalysis(Analysis[Moments]):
    """Run the calibration data through the model and sum products of what linear layers read.

    Attributes:
        layers: Names of the nodes wanted; None: all linear layers of the main graph.
        samples: How many samples to use at most.
        pairs: False: the diagonal only.
        windows: False: each position of the activation is a row, whatever the kernel; inputs are channels then.
        widest: Layers with longer rows keep only their diagonal; None: no limit.
        most_bytes: What the products of all layers may take together.
        heeded: Leave out positions that no output depends on, see `PADDING`.
    """

    name: ClassVar[str] = "moments"
    layers: tuple[str, ...] | None = None
    samples: int = 256
    pairs: bool = True
    windows: bool = True
    widest: int | None = None
    most_bytes: int = 512 << 20
    heeded: bool = False

    def compute(self, model: ir.Model, ctx: Context) -> Moments:
        """Stream the calibration data.

        Raises:
            DataError: There is no calibration data.
            ModelError: ONNX Runtime cannot run the model on it.
        """
        data = needed_samples(ctx, "moments need")
        wanted = self._wanted(ctx)
        sums = self._sums(wanted.values())
        by_source: dict[str, list[_Sums]] = {}
        for one in sums.values():
            by_source.setdefault(one.layer.source, []).append(one)
        samples = sum(1 for _ in data.feeds(self.samples))
        masked, mask = ctx.fact(PADDING) if self.heeded else None, None
        names = [*by_source, *([masked] if masked else [])]
        for seen in stream(model, names, ctx, "measuring moments", self.samples):
            mask = seen.values.get(masked or "", mask)  # inputs come before what is computed from them
            for name, array in seen.values.items():
                for one in by_source.get(name, ()):
                    one.add(array, seen.samples / samples, mask)
        moments = {layer: one.moments() for layer, one in sums.items()}
        return Moments({name: moments[layer] for name, layer in wanted.items()}, ctx.fact(LINEAR_LAYERS).left_out)

    def portions(self, ctx: Context) -> tuple[MomentsAnalysis, ...]:
        """The same for some layers at a time, so that `most_bytes` hold the products of each portion in full.

        A layer that does not fit by itself makes a portion of its own, and keeps only its diagonal.
        """
        portions, filled, seen = list[list[str]](), 0, set[LinearInput]()
        for name, layer in self._wanted(ctx).items():
            size = 0 if layer in seen else _product_bytes(layer)
            if not portions or filled + size > self.most_bytes:
                portions.append([])
                filled, seen, size = 0, set[LinearInput](), _product_bytes(layer)
            portions[-1].append(name)
            filled += size
            seen.add(layer)
        return tuple(replace(self, layers=tuple(names)) for names in portions)

    def _wanted(self, ctx: Context) -> dict[str, LinearInput]:
        found = ctx.fact(LINEAR_LAYERS).reads
        names = found if self.layers is None else set(self.layers)
        wanted = {name: layer for name, layer in found.items() if name in names}
        return wanted if self.windows else {name: replace(layer, window=None) for name, layer in wanted.items()}

    def _sums(self, layers: Iterable[LinearInput]) -> dict[LinearInput, _Sums]:
        """Empty sums; the narrowest layers get their products first."""
        distinct = list(dict.fromkeys(layers))
        left, full = self.most_bytes, set[LinearInput]()
        for layer in sorted(distinct, key=_product_bytes):
            fits = self.pairs and (self.widest is None or layer.inputs <= self.widest)
            if fits and left >= _product_bytes(layer):
                left -= _product_bytes(layer)
                full.add(layer)
        return {layer: _Sums(layer, full=layer in full) for layer in distinct}


def _product_bytes(layer: LinearInput) -> int:
    return 8 * layer.groups * layer.inputs**2


class _Sums:
    """Sums over the rows of one input, as they come in."""

    def __init__(self, layer: LinearInput, *, full: bool) -> None:
        shape = layer.groups, layer.inputs
        self.layer, self.rows = layer, 0
        self.x, self.squares = np.zeros(shape), np.zeros(shape)
        self.xx = np.zeros((*shape, layer.inputs)) if full else None
        self.waiting, self.most = list[Array](), max(1, min(layer.inputs // 2, _CHUNK // (shape[0] * shape[1])))

    def add(self, activation: Array, share: float, mask: Array | None = None) -> None:
        """Count rows of a batch that holds this share of all samples; where there is a mask, what it keeps."""
        count = self.layer.count(activation)
        last = self.layer.window is None and self.layer.axis == -1
        kept = heeded_rows(count, activation, mask) if last else None
        chosen = spread_out(count if kept is None else len(kept), math.ceil(self._enough() * share))
        chosen = chosen if kept is None else kept[chosen]
        for rows in np.array_split(chosen, len(chosen) * self.layer.groups * self.layer.inputs // _CHUNK + 1):
            self.waiting.append(self.layer.rows(activation, rows))
            if sum(x.shape[1] for x in self.waiting) >= self.most:
                self._count()

    def _count(self) -> None:
        """Count the rows that wait; few at a time would cost as much as many."""
        if not self.waiting:
            return
        x, self.waiting = np.concatenate(self.waiting, axis=1), list[Array]()
        self.rows += x.shape[1]
        with np.errstate(all="ignore"):  # what is not finite shows in the sums
            self.x += x.sum(axis=1, dtype=np.float64)
            self.squares += np.square(x, dtype=np.float64).sum(axis=1)
            if self.xx is not None:
                for group, part in zip(self.xx, x, strict=True):
                    group += _products(part)

    def moments(self) -> LayerMoments:
        self._count()
        return LayerMoments(self.rows, self.x / max(1, self.rows), self.squares, self.xx)

    def _enough(self) -> float:
        """Rows that tell the inputs apart, then as many as take seconds."""
        groups, inputs = self.layer.groups, self.layer.inputs
        quick = _ELEMENTS / (groups * inputs)
        if self.xx is not None:
            quick = max(3 * inputs, min(quick, _PRODUCTS / (groups * inputs**2)))
        return min(_ROWS, quick)


def _products(x: Array) -> Array:
    """`[inputs, inputs]` X'X of rows `[rows, inputs]`; of wide ones about their mean, and in float32."""
    if x.shape[1] <= _NARROW:
        wide = x.astype(np.float64)
        return wide.T @ wide
    mean = x.mean(axis=0, dtype=np.float64).astype(np.float32)
    centred = x.astype(np.float32) - mean
    crossed = np.outer(centred.sum(axis=0, dtype=np.float64), mean)  # what rounding left of the mean
    return centred.T @ centred + crossed + crossed.T + len(x) * np.outer(mean, mean.astype(np.float64))


def spread_out(count: int, most: int) -> Array:
    """At most so many of the indices below `count`, ascending, spread evenly but in step with no row length.

    Multiples of the golden ratio fill an interval evenly, whatever their number.
    """
    if count <= most:
        return np.arange(count)
    return np.unique((count * ((np.arange(most) * _GOLDEN) % 1.0)).astype(np.int64))


MOMENTS = MomentsAnalysis()
