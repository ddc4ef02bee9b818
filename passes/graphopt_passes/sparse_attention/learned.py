"""A pattern for every head: scores go where the outputs of layers change most without them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from graphopt.allocation import Site, allocate
from graphopt.analyses.attention import AttentionBlock
from graphopt_passes.sparse_attention._patterns import Band, Kind, band_of, computed_scores
from graphopt_passes.sparse_attention._runs import in_runs
from graphopt_passes.sparse_attention.mass import Masses

__all__ = ["Choice", "Setting", "Tried", "choose", "settings"]

Array = np.ndarray[Any, np.dtype[Any]]
_FRACTIONS = (8, 4, 2, 1)
_SINKS = (0, 1, 4)
"""Many heads rest on the first tokens when they have nothing to say (Xiao et al. 2023), most of them on the first."""


@dataclass(frozen=True)
class Setting:
    """A pattern with its numbers."""

    kind: Kind
    width: int
    leading: int
    stride: int

    def band(self, *, causal: bool) -> Band:
        """The band that it stands for."""
        return band_of(self.kind, self.width, causal=causal, leading=self.leading, stride=self.stride)

    def __str__(self) -> str:
        text = f"{self.kind} {self.width}"
        return f"{text} and {self.leading} global" if self.leading else text


@dataclass(frozen=True)
class Choice:
    """What heads that share a pattern compute.

    Attributes:
        heads: Numbers of heads of keys and values, in order.
        setting: Number of their pattern; None: all scores.
    """

    heads: tuple[int, ...]
    setting: int | None


@dataclass(frozen=True, eq=False)
class Tried:
    """What patterns cost a core, and what it loses.

    Attributes:
        block: The core.
        masses: What patterns keep, and how far they move outputs.
        bands: The patterns.
    """

    block: AttentionBlock
    masses: Masses
    bands: Sequence[Band]

    @property
    def costs(self) -> Array:
        """`[patterns + 1]`, scores that a head computes for the longest sample; last those of everything."""
        length = self.masses.longest
        return np.array([*(computed_scores(in_runs(band)[0], length) for band in self.bands), length**2], np.float64)

    @property
    def groups(self) -> list[tuple[int, ...]]:
        """Heads of keys and values that must share a pattern."""
        numbers = tuple(range(self.block.kv_heads))
        return [numbers] if "batch*head" in self.block.score_axes else [(number,) for number in numbers]

    def heads(self, group: Sequence[int]) -> list[int]:
        """Heads of the queries that read these heads of keys and values."""
        each = self.block.heads // self.block.kv_heads
        return [number * each + i for number in group for i in range(each)]


def settings(width: int, leading: int, stride: int) -> list[Setting]:
    """Patterns to try: windows up to `width` and twice that, and strided ones, with and without global tokens."""
    widths = sorted({max(1, width // part) for part in _FRACTIONS} | {2 * width})
    firsts = sorted({max(leading, sinks) for sinks in _SINKS})
    windows = [Setting("window", w, first, stride) for w in widths for first in firsts]
    return windows + [Setting("strided", w, first, stride) for w in widths if w < width for first in firsts]


def choose(cores: Sequence[Tried], keep: float) -> list[list[Choice]]:
    """Groups of heads by their patterns, for each core, cheapest first; heads that read the same keys stay together.

    The budget are the scores computed if every head took the cheapest pattern that keeps enough of its attention. They
    are given out anew, over the heads of all cores together, so that the squared errors of what heads add to the
    outputs of their layers, each as a share of what all heads of the layer add, sum up to the least. An error counts
    that weights are spread anew over the keys that are left: a head that keeps much of its attention, but spreads the
    rest over a few first tokens, may lose more than one that keeps less of it.

    Args:
        cores: What was seen of them.
        keep: Share of its attention that a head must keep in the mean.
    """
    places = [(core, group) for core in cores for group in core.groups]
    sites, options, target = list[Site](), list[list[int]](), 0.0
    for core, group in places:
        heads = core.heads(group)
        costs = core.costs * len(heads)
        errors = np.append(core.masses.losses[:, heads].sum(axis=1), 0.0)
        worth = list(_worth(costs, errors))
        name = f"{core.block.name} {','.join(map(str, group))}"
        sites.append(Site(name, costs[-1] - costs[worth], errors[worth]))
        options.append(worth)
        target += float(costs[-1] - _cheapest(costs, core.masses.shares[:, heads].min(axis=1), keep))
    allocation = allocate(sites, target)
    taken = dict[AttentionBlock, dict[int, list[int]]]()
    for (core, group), worth, number in zip(places, options, allocation.choice, strict=True):
        taken.setdefault(core.block, {}).setdefault(worth[number], []).extend(group)
    return [_choices(core, taken[core.block]) for core in cores]


def _worth(costs: Array, errors: Array) -> Iterator[int]:
    """Numbers of patterns that lose less than all that cost no more, cheapest first; plain windows win ties.

    Everything comes last, and what costs as much never comes.
    """
    least, whole = np.inf, len(costs) - 1
    for i in np.lexsort((np.arange(whole), errors[:-1], costs[:-1])):
        if errors[i] < least and costs[i] < costs[whole]:
            least = errors[i]
            yield int(i)
    yield whole


def _cheapest(costs: Array, shares: Array, keep: float) -> float:
    """What the cheapest pattern costs that keeps enough."""
    return float(min([*costs[:-1][shares >= keep], costs[-1]]))


def _choices(core: Tried, taken: dict[int, list[int]]) -> list[Choice]:
    costs, whole = core.costs, len(core.bands)
    order = sorted(taken, key=lambda number: (costs[number], number))
    return [Choice(tuple(sorted(taken[i])), None if i == whole else i) for i in order]
