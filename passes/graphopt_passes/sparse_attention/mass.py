"""How much of what heads attend to a pattern keeps, and how far their outputs move, measured on calibration data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from graphopt.analyses import CONSTANTS, SHAPES
from graphopt.analyses.attention import AttentionBlock, Axis
from graphopt.analyses.padding import PADDING
from graphopt.analyses.streaming import stream
from graphopt.pass_base import Context
from graphopt_passes.sparse_attention._losses import root_of, seen_part, squares
from graphopt_passes.sparse_attention._patterns import Band, visible_rows
from graphopt_passes.sparse_attention.axes import atoms
from graphopt_passes.sparse_attention.projection import projection_of

__all__ = ["Masses", "measured", "shares_of_heads", "weights_of"]

Array = np.ndarray[Any, np.dtype[Any]]
_SAMPLES = 32
_QUERIES = 64
"""Of a sample: what the others attend to says little more."""
_FINITE = 1e-30
_AXES = (["batch", "head", "length", "width"], ["batch", "kv_head", "length", "width"])
"""Of values, in alphabetical order."""


@dataclass
class Masses:
    """Sums over queries of one core.

    Attributes:
        kept: `[patterns, heads]`, attention that each pattern keeps.
        errors: `[patterns, heads]`, squares of how far it moves what the head adds to the output of its layer.
        squares: `[heads]`, squares of what the head adds.
        queries: How many there were.
        longest: Length of the longest sample.
    """

    kept: Array
    errors: Array
    squares: Array
    queries: int = 0
    longest: int = 0

    @property
    def shares(self) -> Array:
        """`[patterns, heads]`, mean share of a query's attention that is kept."""
        return self.kept / max(self.queries, 1)

    @property
    def losses(self) -> Array:
        """`[patterns, heads]`, errors as a share of what all heads add: comparable from layer to layer."""
        return self.errors / max(float(self.squares.sum()), _FINITE)


def weights_of(block: AttentionBlock) -> ir.Value | None:
    """The attention of a core as the model computes it; None where nothing but an operator knows it."""
    found = [node.outputs[0] for node in block.nodes if node.op_type == "Softmax"]
    lead = [axis for axis in block.score_axes[:-2] if axis != "one"]
    return found[0] if len(found) == 1 and "batch" in lead[:1] else None


def measured(
    model: ir.Model, blocks: Sequence[AttentionBlock], bands: Sequence[Sequence[Band]], ctx: Context
) -> list[Masses]:
    """What patterns keep of each core's attention, and how far they move its outputs.

    A few queries of every sample are looked at; padded ones do not count, where an input tells which they are. A mean
    of a far block counts as nothing.

    Args:
        model: The model; it does not change.
        blocks: Cores whose attention can be seen.
        bands: Patterns to try, for each of them as many.
        ctx: Holds the data.
    """
    padding = ctx.fact(PADDING)
    cores = [_Core(block, own, ctx) for block, own in zip(blocks, bands, strict=True)]
    readers = dict[str, list[_Core]]()
    for core in cores:
        for name in core.reads:
            readers.setdefault(name, []).append(core)
    wanted = [*readers, *(() if padding is None else (padding,))]
    mask: Array | None = None
    for part in stream(model, wanted, ctx, "weighing attention", _SAMPLES):
        if padding is not None and padding in part.values:
            mask = part.values[padding] != 0
        for name, array in part.values.items():
            for core in readers.get(name, ()):
                core.take(name, array, part.batch, mask)
    return [core.masses for core in cores]


class _Core:
    """Adds up what one core shows of itself, batch by batch; its values come before its weights or behind them."""

    def __init__(self, block: AttentionBlock, bands: Sequence[Band], ctx: Context) -> None:
        constants, shapes = ctx.fact(CONSTANTS), ctx.fact(SHAPES)
        weights, value = weights_of(block), block.value
        self._block = block
        self._bands = bands
        self._weights = "" if weights is None else constants.names.key(weights)
        self._values = "" if value.is_initializer() else constants.names.key(value)
        if sorted(atoms(block.value_axes)) not in _AXES:
            self._values = ""
        found = projection_of(block, constants, shapes) if self._values else None
        self._root = None if found is None else root_of(found)
        self._held = dict[str, Array]()
        self.reads = [name for name in (self._values, self._weights) if name]
        counts = len(bands), block.heads
        self.masses = Masses(np.zeros(counts), np.zeros(counts), np.zeros(block.heads))

    def take(self, name: str, array: Array, batch: int, mask: Array | None) -> None:
        """Hold an array of a batch until all of them are there."""
        self._held[name] = array
        if len(self._held) == len(self.reads):
            weights = self._held[self._weights]
            weights = weights.reshape(-1, self._block.heads, *weights.shape[-2:])
            values = _by_head(self._held[self._values], self._block) if self._values else None
            self._held = {}
            for number, sample in enumerate(weights):
                own = values[number] if values is not None and len(values) == len(weights) else None
                real = mask[number] if mask is not None and mask.shape == (len(weights), weights.shape[-2]) else None
                self._add(sample, own, _chosen(sample, real, batch, number))

    def _add(self, weights: Array, values: Array | None, queries: Array) -> None:
        """Add a sample: `[heads, queries, keys]` and `[heads, keys, width]`."""
        masses, length = self.masses, weights.shape[-1]
        masses.longest = max(masses.longest, length)
        masses.queries += len(queries)
        some: Array = weights[:, queries].astype(np.float32)
        if values is not None and self._root is not None:
            values = values @ self._root
        outputs = some if values is None else some @ values
        masses.squares += squares(outputs)
        for number, band in enumerate(self._bands):
            seen = visible_rows(band, queries, length)
            kept, moved = seen_part(some, values, outputs, seen)
            masses.kept[number] += kept
            masses.errors[number] += moved


def _chosen(weights: Array, real: Array | None, batch: int, number: int) -> Array:
    """Positions of some queries of a sample, the same ones in every run."""
    live = np.isfinite(weights[:, :, 0]).all(axis=0)
    found = np.flatnonzero(live if real is None else live & real)
    if len(found) > _QUERIES:
        found = np.sort(np.random.default_rng((batch, number)).choice(found, _QUERIES, replace=False))
    return found


def _by_head(values: Array, block: AttentionBlock) -> Array:
    """`[batch, heads, keys, width]` of what enters a core as values."""
    split = atoms(block.value_axes)
    sizes: dict[Axis, int] = {"head": block.kv_heads, "kv_head": block.kv_heads, "width": block.value_width}
    if "length" in block.value_axes:
        sizes["length"] = values.shape[block.value_axes.index("length")]
    whole = values.astype(np.float32).reshape([sizes.get(axis, -1) for axis in split])
    order: list[Axis] = ["batch", "kv_head" if "kv_head" in split else "head", "length", "width"]
    whole = whole.transpose([split.index(axis) for axis in order])
    return np.repeat(whole, block.heads // block.kv_heads, axis=1)


def shares_of_heads(masses: Masses, number: int) -> Mapping[str, float]:
    """Share of the attention that a pattern keeps, by head."""
    return {f"head {head}": round(float(share), 4) for head, share in enumerate(masses.shares[number])}
