"""The noise that 8 bits add to layers that read the same channels, as a function of the channels' factors.

An activation x is stored as s x with one grid for all channels, so that its rounding adds span^2 / 12 / 255^2 to every
channel, or all it has if that is less; a weight W is stored as W / s with one grid a row. In units of the exact result,
with w_o what a row counts, the noise of a layer is

    sum_oi w_o W_oi^2 min((span(s x) / 255 / s_i)^2 / 12, E[x_i^2])
    + sum_oi w_o (W_oi / s_i - Q(W_oi / s_i))^2 s_i^2 E[x_i^2]

and w_o is one over the power of row o, so that it does not matter in which scale other channels are written down.
The factors come from a one-parameter family between range equalization of the activation and of the weight
(SmoothQuant, Xiao et al. 2022, with `strength` its alpha; at one half that of cross-layer equalization, Nagel et al.
2019). Plain numpy.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from graphopt_passes.quant._maths import weight_scales

__all__ = ["STRENGTHS", "Activation", "Problem", "Reader", "best_factors", "family"]

Array = np.ndarray[Any, np.dtype[Any]]

STRENGTHS = (0.0, 0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 0.875)  # 1 would bring all channels to the verge of clipping
_LEVELS = 255
_REACH = 2.0**12  # factors within one tensor differ by this much at most
_LEAST = 1e-30
_TURNS = 4
_SETTLED = 0.01  # relative; factors that move less are where they belong


@dataclass(frozen=True, eq=False)
class Activation:
    """What layers read.

    Attributes:
        slots: `[channels]` which factor each channel has.
        low: `[channels]` least value.
        high: `[channels]` greatest value.
        square: `[channels]` mean square.
        rounded: It is stored in 8 bits.
    """

    slots: Array
    low: Array
    high: Array
    square: Array
    rounded: bool = True

    def span(self, factors: Array) -> float:
        """Width of the range of all channels, which holds zero."""
        s = factors[self.slots]
        return float(max(0.0, (self.high * s).max(initial=0.0)) - min(0.0, (self.low * s).min(initial=0.0)))


@dataclass(frozen=True, eq=False)
class Reader:
    """A layer; rows are output channels, columns those inputs that the row multiplies.

    Attributes:
        activation: What it reads.
        columns: `[1 or rows, columns]` channels of the activation.
        weight: `[rows, columns, taps]`, maybe not all rows of the layer.
        importance: `[rows]` what one unit of noise power in a row counts; one over the power of the row, and so many
            times as there are rows like it.
        bits: Bits of the weight, as `weight_scales` takes them.
    """

    activation: Activation
    columns: Array
    weight: Array
    importance: Array
    bits: int = 8

    @property
    def energy(self) -> Array:
        """`[1 or rows, columns]` what one unit of noise power in an input counts."""
        squares = np.square(self.weight, dtype=np.float64).sum(axis=2)
        if len(self.columns) == 1:
            return (self.importance @ squares)[None]
        return squares * self.importance[:, None]


@dataclass(frozen=True, eq=False)
class Problem:
    """Everything that depends on one set of factors.

    Attributes:
        count: Number of factors; a slot of this number is fixed at one.
        readers: Layers that read the channels.
        relays: Activations that are rounded on their way, by addition for instance, and read by no layer themselves.
        per_channel: A weight has one scale for each row.
    """

    count: int
    readers: Sequence[Reader]
    relays: Sequence[Activation]
    per_channel: bool

    def noise(self, factors: Array) -> float:
        """Noise over signal, summed over the rows of all layers.

        Args:
            factors: `[count]`, positive.
        """
        s = np.append(factors, 1.0)
        total, gains = 0.0, np.zeros(self.count + 1)
        for reader in self.readers:
            slots = reader.activation.slots[reader.columns]
            energy = reader.energy
            np.add.at(gains, slots, energy)
            total += self._weight_noise(reader, s[slots])
            if reader.activation.rounded:
                total += float((energy * _rounding(reader.activation, s)[reader.columns]).sum())
        for relay in self.relays:
            total += float(gains[relay.slots] @ _rounding(relay, s))
        return total

    def _weight_noise(self, reader: Reader, s: Array) -> float:
        scaled = (reader.weight / s[:, :, None]).astype(np.float32)
        step = weight_scales(scaled, 0 if self.per_channel else None, reader.bits).reshape(-1, 1, 1)
        errors = np.square(scaled - np.rint(scaled / step) * step).sum(axis=2)
        inputs = reader.activation.square[reader.columns] * np.square(s)
        return float(reader.importance @ (errors * inputs).sum(axis=1))

    def reach(self, factors: Array) -> Array:
        """`[count]` greatest magnitude of each channel over that of its tensor."""
        s, found = np.append(factors, 1.0), np.zeros(self.count + 1)
        for activation in (*(reader.activation for reader in self.readers), *self.relays):
            size = np.maximum(np.abs(activation.low), np.abs(activation.high)) * s[activation.slots]
            np.maximum.at(found, activation.slots, size / max(float(size.max(initial=0.0)), _LEAST))
        return found[: self.count]

    def columns(self, factors: Array) -> Array:
        """`[count]` greatest magnitude of what each channel is multiplied with, over that of its row."""
        s, found = np.append(factors, 1.0), np.zeros(self.count + 1)
        for reader in self.readers:
            slots = reader.activation.slots[reader.columns]
            peak = np.abs(reader.weight).max(axis=2) / s[slots]
            rows = np.maximum(peak.max(axis=1, keepdims=True, initial=0.0), _LEAST)
            np.maximum.at(found, np.broadcast_to(slots, peak.shape), peak / rows)
        return found[: self.count]


def _rounding(activation: Activation, s: Array) -> Array:
    """`[channels]` mean square of the rounding of an activation; a channel that rounds to zero loses what it had."""
    step = (activation.span(s) / _LEVELS) ** 2 / 12
    return np.minimum(step / np.square(s[activation.slots]), activation.square)


def family(reach: Array, columns: Array, strength: float) -> Array:
    """Factors of one strength: 1 gives all channels one range, 0 all columns of the weight.

    Channels that are always zero, or that nothing reads, keep theirs; the widest channel keeps its range.

    Args:
        reach: `[count]` ranges of the channels.
        columns: `[count]` ranges of the columns of the weight.
        strength: Between 0 and 1.
    """
    live = (reach > 0) & (columns > 0)
    factors = np.ones_like(reach)
    if not live.any():
        return factors
    factors[live] = columns[live] ** (1 - strength) / reach[live] ** strength
    factors[live] /= (reach * factors)[live].max() / reach[live].max()
    middle = float(np.exp(np.log(factors[live]).mean()))
    return np.clip(factors, middle / _REACH**0.5, middle * _REACH**0.5)


def best_factors(problem: Problem, strengths: Sequence[float] = STRENGTHS) -> tuple[Array, float, float]:
    """The factors of the family with the least noise.

    A channel's range counts relative to its tensor and its row, which the other channels' factors change; so each
    member of the family is found in a few turns, and does not depend on the scales that the model came with.

    Returns:
        Factors `[count]`, their strength, and the noise before over that after; ones and 1 where none is better.
    """
    best, chosen = np.ones(problem.count), 0.0
    start = least = problem.noise(best)
    for strength in strengths:
        factors = np.ones(problem.count)
        for _ in range(_TURNS):
            before, factors = factors, _turned(problem, factors, strength)
            if np.allclose(factors, before, rtol=_SETTLED):
                break
        noise = problem.noise(factors)
        if noise < least:
            best, chosen, least = factors, strength, noise
    return best, chosen, start / least if least > 0 else 1.0


def _turned(problem: Problem, factors: Array, strength: float) -> Array:
    return factors * family(problem.reach(factors), problem.columns(factors), strength)
