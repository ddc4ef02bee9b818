"""What each channel is worth to the layers that read it, measured on calibration data.

A channel that the others can express is not missed: what matters is the part of it that they cannot, times the weights
that read it. With C the covariance of a layer's input channels, the part of channel u that the others leave unexplained
has variance 1 / (C^-1)_uu, and removing u costs the layer about `|W_u|^2 / (C^-1)_uu` of its output (the saliency of
Optimal Brain Surgeon, Hassibi and Stork, 1993, at the grain of channels). Channels are eliminated from the cheapest on,
with C^-1 brought up to date, so that the second of two copies is dear once the first is gone.

Where C would be too large, channels are taken for independent: removing u costs `|W_u|^2 C_uu`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from graphopt.analyses import CONSTANTS, LINEAR_LAYERS, LayerMoments, LinearInput, MomentsAnalysis
from graphopt.analyses.channels import ChannelGroup, Place
from graphopt.analyses.real_weights import real_weight
from graphopt.analyses.unit_uses import unit_uses
from graphopt.criterion_base import Criterion, axis_sums
from graphopt.pass_base import Context

__all__ = ["Reconstruction", "elimination_costs", "inverse_covariance"]

Part = tuple[np.ndarray, np.ndarray, np.ndarray]

_WIDEST = 4608
_AT_ONCE = 256 << 20
_MOST_BYTES = 1 << 30
_STEPS = 64
_MANY = 8


class Reconstruction(Criterion):
    """What layers lose of their outputs, on calibration data, when a channel leaves and the others make up for it."""

    name: ClassVar[str] = "reconstruction"
    needs_data: ClassVar[bool] = True
    comparable: ClassVar[bool] = True

    def scores(self, model: ir.Model, groups: Sequence[ChannelGroup], ctx: Context) -> list[np.ndarray | None]:
        """Judge in shares of the outputs of the layers that read the units; 256 samples are used."""
        readers = [list(_readers(group, ctx)) for group in groups]
        scores: list[np.ndarray | None] = [None] * len(groups)
        for portion in _portions(readers):
            layers = tuple(dict.fromkeys(reader.layer for i in portion for reader in readers[i]))
            analysis = MomentsAnalysis(layers=layers, windows=False, widest=_WIDEST, most_bytes=_MOST_BYTES)
            seen = analysis.compute(model, ctx).layers
            for i in portion:
                scores[i] = _costs(readers[i], seen, groups[i].units, ctx)
        return scores


@dataclass(frozen=True, eq=False)
class _Reader:
    """A layer that reads units of a group.

    Attributes:
        layer: Name of its node.
        reads: What it reads.
        place: Where the units sit on its weight, among its inputs.
    """

    layer: str
    reads: LinearInput
    place: Place

    def energy(self, ctx: Context) -> np.ndarray | None:
        """`[groups, channels]` squared weights that read each input; None where the weight has another layout."""
        groups, channels, place = self.reads.groups, self.reads.channels, self.place
        if place.size == groups * channels:
            return axis_sums(place, ctx, np.square).reshape(groups, channels)
        weight = real_weight(place.value, ctx.fact(CONSTANTS))
        if place.axis != 1 or place.size != channels or weight.shape[0] % groups:
            return None
        rows = np.square(weight.astype(np.float64)).reshape(groups, -1, channels, math.prod(weight.shape[2:]))
        return rows.sum(axis=(1, 3))

    def positions(self) -> list[np.ndarray] | None:
        """For each group of inputs `[units, copies]` positions in it; None where units do not sit alike in each."""
        groups, channels, positions = self.reads.groups, self.reads.channels, self.place.positions
        if self.place.size == channels:
            return [positions] * groups
        if positions.shape[1] % groups:
            return None
        within = positions.reshape(len(positions), groups, -1) - channels * np.arange(groups)[:, None]
        inside = (within >= 0).all() and (within < channels).all()
        return list(within.transpose(1, 0, 2)) if inside else None


def _readers(group: ChannelGroup, ctx: Context) -> Iterator[_Reader]:
    """Layers of the main graph that read units of a group through a constant weight."""
    linear = ctx.fact(LINEAR_LAYERS)
    for use in unit_uses(group, ctx):
        if use.layer is not None and use.weight is not None:
            yield _Reader(use.layer, linear.reads[use.layer], use.weight)


def _portions(readers: Sequence[Sequence[_Reader]]) -> Iterator[list[int]]:
    """Cut groups into portions whose moments stay below the memory limit."""
    portion, seen = list[int](), set[LinearInput]()
    for i, found in enumerate(readers):
        together = seen | {reader.reads for reader in found}
        if portion and sum(map(_size, together)) > _AT_ONCE:
            yield portion
            portion, together = [], {reader.reads for reader in found}
        portion, seen = [*portion, i] if found else portion, together
    if portion:
        yield portion


def _size(reads: LinearInput) -> int:
    return 8 * reads.groups * reads.channels**2 if reads.channels <= _WIDEST else 0


def _costs(readers: Sequence[_Reader], seen: Mapping[str, LayerMoments], units: int, ctx: Context) -> np.ndarray | None:
    """`[units]` what each costs its readers, None where nothing is known of them."""
    shares: dict[LinearInput, np.ndarray] = {}
    met: dict[LinearInput, tuple[list[np.ndarray], LayerMoments]] = {}
    for reader in readers:
        positions, moments, energy = reader.positions(), seen.get(reader.layer), reader.energy(ctx)
        if positions is None or moments is None or energy is None or not moments.finite:
            continue
        total = float((energy * moments.variances).sum())
        if total > 0:  # layers that read the same share one covariance
            shares[reader.reads] = shares.get(reader.reads, 0.0) + energy / total
            met[reader.reads] = positions, moments
    parts, alone = list[Part](), np.zeros(units)
    for reads, (positions, moments) in met.items():
        covariance = moments.covariance()
        for group, where in enumerate(positions):
            if covariance is None:
                alone += (shares[reads] * moments.variances)[group][where].sum(axis=1)
            elif (inverse := inverse_covariance(covariance[group], moments.rows)) is not None:
                parts.append((where, shares[reads][group], inverse))
    return elimination_costs(parts, alone) if met else None


def inverse_covariance(covariance: np.ndarray, rows: int) -> np.ndarray | None:
    """Invert a covariance, made safe.

    Few rows make channels look as if they explained each other, so the covariance is shrunk towards its diagonal: by
    half where there are as many rows as channels.

    Args:
        covariance: `[inputs, inputs]` of what a layer reads.
        rows: How many rows it was measured on.

    Returns:
        `[inputs, inputs]`, None where nothing varies.
    """
    variances, shrinkage = np.diag(covariance), len(covariance) / max(1, rows)
    if not variances.mean() > 0:
        return None
    shrunk = covariance / (1 + shrinkage)
    np.fill_diagonal(shrunk, np.maximum(variances, 0) + 1e-6 * variances.mean())
    return np.linalg.inv(shrunk)


def elimination_costs(parts: Sequence[Part], alone: np.ndarray) -> np.ndarray:
    """Eliminate units from the cheapest on, a sixty-fourth of those left at a time.

    Args:
        parts: For each reader `[units, copies]` positions, `[inputs]` squared weights as a share of its output per
            variance, `[inputs, inputs]` inverse covariance.
        alone: `[units]` what each costs besides, whatever else is gone.

    Returns:
        `[units]` what each costs when its turn comes, or what the dearest before it cost: never less.
    """
    inverses = [_Inverse(inverse) for _, _, inverse in parts]
    left, costs, dearest = np.arange(len(alone)), np.zeros(len(alone)), 0.0
    while len(left):
        cost = alone[left]
        for (positions, shares, _), inverse in zip(parts, inverses, strict=True):
            cost = cost + (shares / inverse.diagonal)[positions[left]].sum(axis=1)
        cheapest = np.argsort(cost, kind="stable")[: max(1, len(left) // _STEPS)]
        costs[left[cheapest]] = np.maximum(np.maximum.accumulate(cost[cheapest]), dearest)
        dearest = float(costs[left[cheapest]][-1])
        for (positions, _, _), inverse in zip(parts, inverses, strict=True):
            inverse.remove(np.unique(positions[left[cheapest]]))
        left = np.delete(left, cheapest)
    return costs


class _Inverse:
    """The inverse of a covariance while variables leave: `whole - across @ solved`, with its diagonal at hand.

    Both factors grow by the variables that leave; once these are many, all is multiplied out for those that are left.
    """

    def __init__(self, whole: np.ndarray) -> None:
        self.whole, self.diagonal = whole, np.diag(whole).copy()
        self.left, self.place = np.arange(len(whole)), np.arange(len(whole))
        self.across, self.solved = whole[:, :0], whole[:0]

    def remove(self, variables: np.ndarray) -> None:
        """Leave variables out; what the diagonal says of them is infinite from then on."""
        at = self.place[variables[np.isfinite(self.diagonal[variables])]]
        across = self.whole[:, at] - self.across @ self.solved[:, at]
        solved = np.linalg.solve(across[at], across.T)
        self.across, self.solved = np.hstack([self.across, across]), np.vstack([self.solved, solved])
        self.diagonal[self.left] -= (across * solved.T).sum(axis=1)
        self.diagonal[variables] = np.inf
        if _MANY * len(self.solved) >= len(self.left):
            self._multiply()

    def _multiply(self) -> None:
        stay = np.flatnonzero(np.isfinite(self.diagonal[self.left]))
        self.whole = self.whole[np.ix_(stay, stay)] - self.across[stay] @ self.solved[:, stay]
        self.left = self.left[stay]
        self.place[self.left] = np.arange(len(stay))
        self.across, self.solved = self.whole[:, :0], self.whole[:0]
