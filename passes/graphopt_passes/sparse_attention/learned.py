"""The cheapest pattern for every head that keeps enough of what the head attends to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from graphopt.analyses.attention import AttentionBlock
from graphopt_passes.sparse_attention._patterns import Band, Kind, band_of, computed_scores
from graphopt_passes.sparse_attention.mass import Masses

__all__ = ["Choice", "Setting", "choose", "settings"]

_FRACTIONS = (8, 4, 2, 1)
_SINKS = (0, 1, 4)
"""Many heads rest on the first tokens when they have nothing to say (Xiao et al. 2023), most of them on the first."""
_NOTHING = 1e-6
"""Share of attention that it is not worth while to keep."""


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
        setting: Their pattern; None: all scores.
    """

    heads: tuple[int, ...]
    setting: Setting | None


def settings(width: int, leading: int, stride: int) -> list[Setting]:
    """Patterns to try: windows up to `width` and twice that, and strided ones, with and without global tokens."""
    widths = sorted({max(1, width // part) for part in _FRACTIONS} | {2 * width})
    firsts = sorted({max(leading, sinks) for sinks in _SINKS})
    windows = [Setting("window", w, first, stride) for w in widths for first in firsts]
    return windows + [Setting("strided", w, first, stride) for w in widths if w < width for first in firsts]


def choose(
    block: AttentionBlock, masses: Masses, tried: Sequence[Setting], bands: Sequence[Band], keep: float
) -> list[Choice]:
    """Groups of heads by their patterns, cheapest first; heads that read the same keys stay together.

    What a pattern costs are the scores that it computes for the longest sample. Beside the cheapest that keeps enough,
    the same with more global tokens is looked at, and the one with the least product of cost and loss is taken: one
    more is cheap, and heads that rest on it keep much more.

    Args:
        block: The core.
        masses: What each pattern keeps.
        tried: The patterns.
        bands: Their bands.
        keep: Share of its attention that every head must keep in the mean.
    """
    together = np.reshape(masses.shares, (len(tried), block.kv_heads, -1)).min(axis=2)
    if "batch*head" in block.score_axes:
        together = np.repeat(together.min(axis=1, keepdims=True), block.kv_heads, axis=1)
    costs = [computed_scores(band, masses.longest) for band in bands]
    order = sorted(range(len(tried)), key=lambda i: (costs[i], i))
    lost = np.maximum(1 - together, _NOTHING)
    groups: dict[int | None, list[int]] = {}
    for head in range(block.kv_heads):
        good = [i for i in order if together[i, head] >= keep and costs[i] < masses.longest**2]
        alike = [i for i in good if (tried[i].kind, tried[i].width) == (tried[good[0]].kind, tried[good[0]].width)]
        best = min(alike, key=lambda i: float(costs[i] * lost[i, head]), default=None)
        groups.setdefault(best, []).append(head)
    ranked = sorted(groups.items(), key=lambda item: order.index(item[0]) if item[0] is not None else len(order))
    return [Choice(tuple(heads), None if i is None else tried[i]) for i, heads in ranked]
