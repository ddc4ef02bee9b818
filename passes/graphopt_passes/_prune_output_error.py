"""What each channel is worth to the layers that read it, measured on calibration data.

A channel that the others can express is not missed: what matters is the part of it that they cannot, times the weights
that read it. With C the covariance of a layer's input channels, the part of channel u that the others leave unexplained
has variance 1 / (C^-1)_uu, and removing u costs the layer about `|W_u|^2 / (C^-1)_uu` of its output (the saliency of
Optimal Brain Surgeon, Hassibi and Stork, 1993, at the grain of channels). Channels are eliminated from the cheapest on,
with C^-1 brought up to date, so that the second of two copies is dear once the first is gone.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from graphopt.analyses import CONSTANTS, Constants, Shapes
from graphopt.analyses.channels import ChannelGroup
from graphopt.analyses.ranges import expose
from graphopt.analyses.shapes import CONCRETE_SHAPES
from graphopt.calibration import Dataset
from graphopt.pass_base import Context
from graphopt.reference import Feed, Reference
from graphopt_passes._linear_layers import WIDEST, rows_worth_reading

__all__ = ["elimination_costs", "output_scores", "unexplained"]

_SAMPLES = 256
_BATCH = 16
_AT_ONCE = 512 << 20
_STEPS = 64
_GONE = 1e30
_FLOATS = (ir.DataType.FLOAT, ir.DataType.DOUBLE, ir.DataType.FLOAT16)


@dataclass(frozen=True, eq=False)
class _Reader:
    """A layer that reads the units of a group.

    Attributes:
        node: The layer.
        positions: `[units, copies]` where they are among its inputs.
        inputs: How many inputs it has.
        energy: `[inputs]` squared weights that read each.
    """

    node: ir.Node
    positions: np.ndarray
    inputs: int
    energy: np.ndarray

    @property
    def source(self) -> str:
        """Name of the activation it reads."""
        value = self.node.inputs[0]
        return "" if value is None else value.name or ""


@dataclass
class _Spread:
    """First and second moments of an activation's channels."""

    axis: int
    rows: int = 0
    sums: np.ndarray | float = 0.0
    products: np.ndarray | float = 0.0

    def add(self, activation: np.ndarray, most: int) -> None:
        """Count rows, evenly thinned down to about `most`."""
        table = np.moveaxis(activation, self.axis, -1).reshape(-1, activation.shape[self.axis])
        table = table[:: max(1, len(table) // most)].astype(np.float64)
        self.rows += len(table)
        self.sums = self.sums + table.sum(axis=0)
        self.products = self.products + table.T @ table

    def covariance(self) -> np.ndarray:
        """`[channels, channels]`."""
        mean = np.asarray(self.sums) / self.rows
        with np.errstate(all="ignore"):
            return np.asarray(self.products) / self.rows - np.outer(mean, mean)


def output_scores(
    model: ir.Model, groups: Sequence[ChannelGroup], fallback: Sequence[np.ndarray], data: Dataset, ctx: Context
) -> list[np.ndarray]:
    """What each unit is worth, in parts of the outputs of the layers that read it, so that groups can be compared.

    Args:
        model: The model that the groups were found in.
        groups: The groups.
        fallback: Scores by weights, for groups that no plain layer reads.
        data: Samples, of which 256 are used.
        ctx: How ONNX Runtime runs.

    Returns:
        For each group float64 `[units]`; ascending, it is the order to remove units in.

    Raises:
        ModelError: ONNX Runtime cannot run the model.
    """
    constants = ctx.fact(CONSTANTS)
    readers = [list(_readers(model, constants, group)) for group in groups]
    scores = [np.square(weights) / max(np.square(weights).sum(), 1e-300) for weights in fallback]
    for portion in _portions(readers, ctx.fact(CONCRETE_SHAPES)):
        seen = _measure(model, [reader for i in portion for reader in readers[i]], data, ctx)
        for i in portion:
            parts = [
                (reader.positions, share, inverse)
                for reader in readers[i]
                if (found := unexplained(seen[reader.source].covariance(), seen[reader.source].rows, reader.energy))
                for share, inverse in (found,)
            ]
            if parts:
                scores[i] = elimination_costs(parts, groups[i].units)
    return scores


def _readers(model: ir.Model, constants: Constants, group: ChannelGroup) -> Iterator[_Reader]:
    """Layers without groups that read units of a group through a weight of their own."""
    for place in group.places:
        value = model.graph.initializers.get(place.value)
        uses = [] if value is None else list(value.uses())
        if not place.constant or place.role != "input" or len(uses) != 1 or place.size > WIDEST:
            continue
        node, index = uses[0]
        tensor = constants.tensors[place.value]
        plain = node.op_type == "Conv" and node.attributes.get_int("group", 1) == 1
        plain = plain or (node.op_type == "MatMul" and len(tensor.shape) == 2)
        plain = plain or (node.op_type == "Gemm" and not node.attributes.get_int("transA", 0))
        if plain and index == 1 and tensor.dtype in _FLOATS:
            array = np.moveaxis(tensor.numpy().astype(np.float64), place.axis, 0)
            energy = np.square(array).reshape(place.size, -1).sum(axis=1)
            yield _Reader(node, place.positions, place.size, energy)


def _portions(readers: Sequence[Sequence[_Reader]], shapes: Shapes) -> Iterator[list[int]]:
    """Cut groups into portions whose activations and moments stay below the memory limit."""
    portion: list[int] = []
    filled = 0
    for i, found in enumerate(readers):
        size = sum(_size(reader, shapes) for reader in found)
        if portion and filled + size > _AT_ONCE:
            yield portion
            portion, filled = [], 0
        portion += [i] if found else []
        filled += size
    if portion:
        yield portion


def _size(reader: _Reader, shapes: Shapes) -> int:
    shape = shapes.static(reader.node.inputs[0])
    return 8 * reader.inputs**2 + (_AT_ONCE // 16 if shape is None else 4 * _BATCH * math.prod(shape))


def _measure(model: ir.Model, readers: Sequence[_Reader], data: Dataset, ctx: Context) -> Mapping[str, _Spread]:
    """Stream the data once."""
    by_source = {reader.source: reader for reader in readers}
    spreads = {name: _Spread(1 if reader.node.op_type == "Conv" else -1) for name, reader in by_source.items()}
    fed = {value.name for value in model.graph.inputs}
    computed = [name for name in by_source if name not in fed]
    session = Reference(expose(model, computed), threads=ctx.threads, extensions=ctx.extensions)
    batches = _SAMPLES // _BATCH
    for feed in ctx.progress(data.batches(_BATCH, _SAMPLES), "judging channels"):
        found: Feed = {**feed, **session.run(feed, computed)}
        for name, spread in spreads.items():
            with np.errstate(all="ignore"):  # what is not finite shows in the moments
                spread.add(found[name], rows_worth_reading(1, by_source[name].inputs) // batches + 1)
    return spreads


def unexplained(covariance: np.ndarray, rows: int, energy: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
    """Prepare one reader's part of the costs.

    Few rows make channels look as if they explained each other, so the covariance is shrunk towards its diagonal: by
    half where there are as many rows as channels.

    Args:
        covariance: `[inputs, inputs]` of what the reader reads.
        rows: How many rows it was measured on.
        energy: `[inputs]` squared weights.

    Returns:
        `[inputs]`: energy as a share of the reader's output, and `[inputs, inputs]`: the inverse covariance; None
        where nothing varies or something is not finite.
    """
    if not np.isfinite(covariance).all() or (total := float(energy @ np.diag(covariance))) <= 0:
        return None
    diagonal, shrinkage = np.arange(len(covariance)), len(covariance) / rows
    shrunk = covariance / (1 + shrinkage)
    shrunk[diagonal, diagonal] = np.diag(covariance) + 1e-6 * np.diag(covariance).mean()
    return energy / total, np.linalg.inv(shrunk)


def elimination_costs(parts: Sequence[tuple[np.ndarray, np.ndarray, np.ndarray]], units: int) -> np.ndarray:
    """Eliminate units from the cheapest on, a sixty-fourth of those left at a time.

    Args:
        parts: For each reader `[units, copies]` positions, `[inputs]` shares, `[inputs, inputs]` inverse covariance.
        units: How many units there are.

    Returns:
        `[units]` what each costs when its turn comes, or what the dearest before it cost: never less.
    """
    inverses = [inverse.copy() for _, _, inverse in parts]
    left, costs, dearest = np.arange(units), np.zeros(units), 0.0
    while len(left):
        cost = np.zeros(len(left))
        for (positions, shares, _), inverse in zip(parts, inverses, strict=True):
            cost += (shares / np.diag(inverse))[positions[left]].sum(axis=1)
        cheapest = np.argsort(cost, kind="stable")[: max(1, len(left) // _STEPS)]
        costs[left[cheapest]] = np.maximum(np.maximum.accumulate(cost[cheapest]), dearest)
        dearest = float(costs[left[cheapest]][-1])
        for (positions, _, _), inverse in zip(parts, inverses, strict=True):
            _eliminate(inverse, positions[left[cheapest]].reshape(-1))
        left = np.delete(left, cheapest)
    return costs


def _eliminate(inverse: np.ndarray, gone: np.ndarray) -> None:
    """Turn the inverse of a covariance into that of the variables that are left, in place."""
    inverse -= inverse[:, gone] @ np.linalg.solve(inverse[np.ix_(gone, gone)], inverse[gone])
    inverse[gone] = 0
    inverse[:, gone] = 0
    inverse[gone, gone] = _GONE
