"""Choose the codebooks of a tensor and the code of each weight, by data where there is any."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from graphopt.analyses import LayerMoments
from graphopt_passes.quant._maths import decibel
from graphopt_passes.quant.blockwise._rounding import damped
from graphopt_passes.quant.blockwise.layout import Layout
from graphopt_passes.share._importance import by_data, by_size, relative, supposed_moments
from graphopt_passes.share._kmeans import fit_tables, nearest
from graphopt_passes.share._rounding import Part, compensate, refine
from graphopt_passes.share._vectors import fit_vectors, nearest_vectors
from graphopt_passes.share.cut import Cut

__all__ = ["Algorithm", "Method", "Shared", "fits", "int8_scales", "share_weight"]

Array = np.ndarray[Any, np.dtype[Any]]
Algorithm = Literal["auto", "nearest", "relative", "weighted", "compensated"]

_SUPPOSED_DAMPING, _WIDEST_SUPPOSED = 0.001, 4608  # inputs of a kernel of 3 by 3 on 512 channels
_ZEROS = 0.001  # share of zeros that did not come by chance
_INT8_TOP = 127
_START_STEPS, _MOST_START_STEPS = 2500, 3e7  # a pair of entries that are fitted again; in all
_BLOCK = 1 << 20
_SCALED = "", ", errors relative to the size of each output"


@dataclass(frozen=True)
class Method:
    """How codebooks are found.

    Attributes:
        entries: Size of each.
        algorithm: nearest: k-means, all weights alike. relative: errors count by the size of row and column, and
            those of a convolution's kernel cancel each other, see `_importance`. weighted: by the second moment of the
            input. compensated: inputs make up for each other's errors, see `_rounding`. auto: the last; where there is
            no data, relative, as for all but nearest.
        scaled: With data, errors of outputs count relative to the size of each.
        damping: Share of the mean diagonal of moments that is added to them.
        int8: Entries are multiples of a 127th of the largest of each codebook.
    """

    entries: int
    algorithm: Algorithm = "auto"
    damping: float = 0.05
    int8: bool = False
    scaled: bool = False


@dataclass(frozen=True, eq=False)
class Shared:
    """A weight with codebooks.

    Attributes:
        codes: uint8, in the order of `Cut.split`, `[groups, codes of each]`.
        tables: `[groups, entries]`, or `[entries, width]` of vectors; float32.
        how: What found them, for reports.
        weight_sqnr: Signal to noise of the weight in dB.
        layer_sqnr: Signal to noise of the layer's output under the moments of its input in dB; None without those.
    """

    codes: Array
    tables: Array
    how: str
    weight_sqnr: float
    layer_sqnr: float | None = None

    def real(self, cut: Cut) -> Array:
        """The tensor that they stand for."""
        if cut.width > 1:
            return self.tables[self.codes[0]].reshape(cut.shape)
        if cut.groups == 1:
            return self.tables[0][self.codes].reshape(cut.shape)
        return cut.join(self.tables[np.arange(cut.groups)[:, None], self.codes])


def fits(moments: LayerMoments | None, layout: Layout) -> bool:
    """Whether moments are those of the matrix's inputs, and say something finite."""
    if moments is None or not moments.finite or moments.rows == 0 or not moments.squares.any():
        return False
    parts, inputs = moments.squares.shape
    return inputs == layout.inputs and layout.outputs % parts == 0


def share_weight(weight: Array, cut: Cut, layout: Layout, method: Method, moments: LayerMoments | None) -> Shared:
    """Give one weight codebooks.

    Args:
        weight: The weight in its own shape; may be memory-mapped.
        cut: Which weights share a codebook.
        layout: How it is a matrix.
        method: How codebooks are found.
        moments: Moments of what the layer reads, in the order of the matrix; None: unknown.
    """
    known = moments if method.algorithm not in ("nearest", "relative") and fits(moments, layout) else None
    zero = bool(np.count_nonzero(weight) <= (1 - _ZEROS) * weight.size)
    supposed = known is None and method.algorithm != "nearest" and _is_kernel(layout)
    if cut.width > 1:
        shared = _by_vectors(weight, cut, layout, method, known, zero=zero)
    elif known is not None and known.xx is not None and method.algorithm in ("auto", "compensated"):
        shared = _by_moments(weight, cut, layout, method, known, zero=zero)
    elif supposed:
        shared = _by_supposed(weight, cut, layout, method, zero=zero)
    else:
        shared = _by_numbers(weight, cut, layout, method, known, zero=zero)
    real = shared.real(cut)
    layer = _layer_sqnr(weight, real, layout, moments) if fits(moments, layout) else None
    return replace(shared, weight_sqnr=_weight_sqnr(weight, real), layer_sqnr=layer)


def _is_kernel(layout: Layout) -> bool:
    """A convolution's kernel of several taps, of moderate size."""
    return layout.reshaped and layout.inputs <= _WIDEST_SUPPOSED


def _taps(layout: Layout) -> int:
    return math.prod(layout.shape[2:]) if layout.reshaped else 1  # only the kernels of convolutions are


def _by_supposed(weight: Array, cut: Cut, layout: Layout, method: Method, *, zero: bool) -> Shared:
    """Without data: codes whose errors cancel each other where neighbours resemble each other."""
    xx = supposed_moments(layout.matrix(weight), layout.parts, _taps(layout))
    squares = np.einsum("gii->gi", xx)
    moments = LayerMoments(1, np.zeros_like(squares), squares, xx)
    sized = replace(method, damping=_SUPPOSED_DAMPING)
    shared = _by_moments(weight, cut, layout, sized, moments, zero=zero)
    return replace(shared, how="errors of a kernel cancelling, relative to the size of rows")


def _by_numbers(
    weight: Array, cut: Cut, layout: Layout, method: Method, moments: LayerMoments | None, *, zero: bool
) -> Shared:
    """Exact k-means, and the nearest entries."""
    numbers, (weights, by) = cut.split(weight), _importance(weight, layout, method, moments)
    found = fit_tables(numbers, None if weights is None else cut.split(weights), method.entries, zero=zero)
    tables = _snapped(found.values, method)
    return Shared(nearest(numbers, tables), tables, ("exact k-means" if found.exact else "k-means") + by, 0.0)


def _by_vectors(
    weight: Array, cut: Cut, layout: Layout, method: Method, moments: LayerMoments | None, *, zero: bool
) -> Shared:
    vectors = np.ascontiguousarray(weight).reshape(-1, cut.width)
    weights, by = _importance(weight, layout, method, moments)
    if weights is not None:
        weights = np.ascontiguousarray(weights).reshape(-1, cut.width)
    table = fit_vectors(vectors, weights, method.entries, zero=zero)
    if method.int8:
        table = _snapped(table.reshape(1, -1), method).reshape(table.shape)
    return Shared(nearest_vectors(vectors, weights, table)[None], table, "k-means of vectors" + by, 0.0)


def _importance(
    weight: Array, layout: Layout, method: Method, moments: LayerMoments | None
) -> tuple[Array | None, str]:
    """What an error of each weight counts, in the shape of the weight, and what that is called; None: all the same."""
    if method.algorithm == "nearest":
        return None, ""
    matrix = layout.matrix(weight)
    if moments is None:
        found, by = by_size(matrix, layout.parts, _taps(layout)), ", errors relative to the size of row and column"
    else:
        squares = moments.squares / max(1, moments.rows)
        powers = [s @ np.square(w, dtype=np.float32) for s, w in zip(squares, _columns(matrix, moments), strict=True)]
        found, by = by_data(matrix, squares, _gains(powers, method)), f" weighted by data{_SCALED[method.scaled]}"
    return layout.tensor(found).reshape(layout.shape), by


def _columns(matrix: Array, moments: LayerMoments) -> list[Array]:
    """The matrix of each part that has inputs of its own."""
    return np.split(matrix, len(moments.squares), axis=1)


def _by_moments(
    weight: Array, cut: Cut, layout: Layout, method: Method, moments: LayerMoments, *, zero: bool
) -> Shared:
    """Codes that make up for each other's errors, and entries refitted to them."""
    parts = _parts(weight, cut, layout, method, moments, zero=zero)
    matrix, importance = layout.matrix(weight), np.stack([part.importance for part in parts])
    weights = layout.tensor(by_data(matrix, importance, [part.gain for part in parts])).reshape(layout.shape)
    steps = min(_START_STEPS * max(20, method.entries) ** 2, _MOST_START_STEPS)
    found = fit_tables(cut.split(weight), cut.split(weights), method.entries, zero=zero, steps=steps)
    tables = _snapped(found.values, method)
    codes, fitted = refine(parts, [compensate(part, tables) for part in parts], tables)
    tables = _snapped(fitted, method)
    if method.int8:
        codes, tables = refine(parts, codes, tables, fit=False)
    ordered = layout.tensor(np.concatenate(codes, axis=1)).reshape(cut.shape)
    return Shared(cut.split(ordered), tables, f"compensated on data{_SCALED[method.scaled]}", 0.0)


def _parts(weight: Array, cut: Cut, layout: Layout, method: Method, moments: LayerMoments, *, zero: bool) -> list[Part]:
    """Parts with inputs of their own."""
    if moments.xx is None:
        raise ValueError("moments without products")
    owners = np.split(cut.owner(layout), len(moments.xx))
    found: list[Part] = []
    for columns, xx, owner in zip(_columns(layout.matrix(weight), moments), moments.xx, owners, strict=True):
        part = np.ascontiguousarray(columns, np.float32)
        h = damped(xx / max(1, moments.rows), method.damping)
        found.append(Part.of(part, h, owner, part == 0 if zero else None))
    gains = _gains([part.powers for part in found], method)
    return [replace(part, gain=gain) for part, gain in zip(found, gains, strict=True)]


def _gains(powers: Sequence[Array], method: Method) -> list[Array]:
    """For each part what a square error of its outputs counts, given their mean squares."""
    if not method.scaled:
        return [np.ones(len(power), np.float32) for power in powers]
    return np.split(relative(np.concatenate(powers)), len(powers))


def _snapped(tables: Array, method: Method) -> Array:
    """Tables as they are stored: float32, and with `int8` steps of the scale in float32."""
    tables = tables.astype(np.float32)
    if not method.int8:
        return tables
    scales = int8_scales(tables)
    return (np.rint(tables / scales[:, None]) * scales[:, None]).astype(np.float32)


def int8_scales(tables: Array) -> Array:
    """Steps of codebooks in int8, float32 `[groups]`."""
    reach = np.abs(tables).max(axis=1).astype(np.float32)
    return np.where(reach > 0, np.maximum(reach / np.float32(_INT8_TOP), np.float32(2.0**-100)), np.float32(1))


def _weight_sqnr(weight: Array, real: Array) -> float:
    signal = noise = 0.0
    before, after = weight.reshape(-1), real.reshape(-1)
    for start in range(0, len(before), _BLOCK):
        x = before[start : start + _BLOCK].astype(np.float64)
        signal += float(x @ x)
        x -= after[start : start + _BLOCK]
        noise += float(x @ x)
    return decibel(signal, noise)


def _layer_sqnr(weight: Array, real: Array, layout: Layout, moments: LayerMoments | None) -> float | None:
    if moments is None or moments.xx is None:
        return None
    signal = noise = 0.0
    both = _columns(layout.matrix(weight), moments), _columns(layout.matrix(real), moments)
    for before, after, xx in zip(*both, moments.xx, strict=True):
        h, x = xx.astype(np.float32) / np.float32(max(1, moments.rows)), np.asarray(before, np.float32)
        signal += float(np.vdot(x, h @ x))
        x = x - after
        noise += float(np.vdot(x, h @ x))
    return decibel(signal, max(0.0, noise))
