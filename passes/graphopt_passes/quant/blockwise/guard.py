"""Where few bits would drown the outputs, let the layers that make most of the noise take more bits, or stay float."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx_ir as ir

from graphopt.analyses import COST
from graphopt.errors import ModelError, UsageError
from graphopt.model_io import EMBED_LIMIT, input_specs, weight_bytes
from graphopt.pass_base import Context
from graphopt.reference import Feed, Reference, random_feed
from graphopt_passes.quant._maths import decibel
from graphopt_passes.quant.audit import powers, sample_feeds
from graphopt_passes.quant.blockwise.layout import Layout
from graphopt_passes.quant.guards import makes_scores, step_noisiest
from graphopt_passes.quant.mixed.switchboard import Switchboard, Trial
from graphopt_passes.quant.mixed.table import units_of
from graphopt_passes.quant.sites import Site
from graphopt_passes.quant.switches import worst_noise

__all__ = ["OutputGuard", "first_bits", "open_guard"]

Array = np.ndarray[Any, np.dtype[Any]]
Rounding = Callable[[Site, int, int], Array]
"""Site, place of the weight in `Site.weights`, bits -> the rounded weight, in float."""

_RANDOM = "without calibration data the outputs were judged on random inputs"
_SCORES = 4.0  # dB more for class scores: where one is near 1, noise of 1 % is a class that changes in 200 samples
_FEW = 32
_WIDER = {2: 4, 4: 8, 8: 0}
_FLOAT = 32
_FEEDS = (4, 32)
_MACS = 5e10  # to compare outputs on, beyond the least number of feeds
_RANDOM_FEEDS = 8
_RANDOM_BYTES = 256 << 20  # of weights: larger models without data are not run
_SHARE_FEEDS = 4
_SHARE_RUNS = 256
_ROUNDS = 4


def first_bits(site: Site, layouts: Sequence[Layout], bits: int) -> tuple[int, str]:
    """Bits that a site begins with, whatever its noise, and why these are more than asked for.

    A scale for a handful of weights takes as much as their codes save: nine weights of a depthwise kernel are 9 bytes
    in 4 bits and 14 in 8, of 36. Their errors hardly average out, and all that the layer reads passes through them,
    which is not so with the rows of a table.
    """
    least = min(layout.inputs for layout in layouts)
    if bits == 8 or least >= _FEW or site.operator == "Gather":
        return bits, ""
    return 8, f"{least} weights to an output are too few for {bits} bits"


def open_guard(ctx: Context, floor: float) -> OutputGuard | str:
    """A guard for a float model, or why its outputs cannot be judged.

    Without calibration data they are judged on random inputs: only weights are rounded, no range depends on them.

    Args:
        ctx: The context of the float model.
        floor: Least signal to noise at every output, in dB.
    """
    model, limit = ctx.model, EMBED_LIMIT if ctx.calibration is not None else _RANDOM_BYTES
    if weight_bytes(model) > limit:
        return "the model is too large to compare its outputs before and after"
    least, most = _FEEDS
    count = max(least, min(most, int(_MACS / max(1, ctx.fact(COST).macs))))
    if ctx.calibration is not None:
        return OutputGuard(ctx, floor, sample_feeds(ctx, count))
    rng = np.random.default_rng(0)  # the step's own stream is for choices
    try:
        feeds = [random_feed(input_specs(model), ctx.binding, rng) for _ in range(min(count, _RANDOM_FEEDS))]
        guard = OutputGuard(ctx, floor, feeds)
        guard.levels(model)
    except (ModelError, UsageError) as e:
        return f"its outputs were not judged, as there is no calibration data and random inputs do not do: {e.fact}"
    return guard


@dataclass(frozen=True, eq=False)
class _Shares:
    """Units of sites that share weights, by the key of the first.

    Attributes:
        units: The sites.
        bits: Bits of their weights, 0 for float.
        noise: Noise over signal at the worst output that each unit makes alone.
        cost: Bits that its next wider form takes.
    """

    units: Mapping[str, tuple[Site, ...]]
    bits: dict[str, int]
    noise: dict[str, float]
    cost: dict[str, float] = field(default_factory=dict[str, float])

    def __post_init__(self) -> None:
        for unit in self.units:
            self._count(unit)

    def wider(self, unit: str) -> int:
        """Take the next wider form of a unit; a step between codes becomes so much finer."""
        old = self.bits[unit]
        new = _WIDER[old]
        self.noise[unit] *= ((2**old - 1) / (2**new - 1)) ** 2 if new else 0.0
        self.bits[unit] = new
        self._count(unit)
        return old

    def _count(self, unit: str) -> None:
        old = self.bits[unit]
        more = (_WIDER[old] or _FLOAT) - old if old else _FLOAT
        self.cost[unit] = more * max(sum(weight.size for weight in site.weights) for site in self.units[unit])


class OutputGuard:
    """Judges outputs, and chooses the layers that step back.

    Args:
        ctx: The context of the float model.
        floor: Least signal to noise at every output, in dB.
        feeds: Samples to judge on.
    """

    def __init__(self, ctx: Context, floor: float, feeds: Sequence[Feed]) -> None:
        self._ctx, self._feeds = ctx, feeds
        self._floors = {o.name: floor + (_SCORES if makes_scores(o) else 0.0) for o in ctx.model.graph.outputs}
        self.notes = () if ctx.calibration is not None else (_RANDOM,)
        self._original = Reference(ctx.model, threads=ctx.threads, extensions=ctx.extensions)

    def levels(self, result: ir.Model) -> dict[str, float]:
        """Signal to noise in dB of every float output, all samples together.

        The mean of decibels would not do for class scores: many samples with one score near 1 hide those that change.
        """
        after = Reference(result, threads=self._ctx.threads, extensions=self._ctx.extensions)
        sums: dict[str, tuple[float, float]] = {}
        for feed in self._ctx.progress(self._feeds, "comparing outputs"):
            expected, got = self._original.run(feed), after.run(feed)
            for name, reference in expected.items():
                if np.issubdtype(reference.dtype, np.floating):
                    signal, noise = powers(reference, got[name])
                    before = sums.get(name, (0.0, 0.0))
                    sums[name] = before[0] + signal, before[1] + noise
        return {name: decibel(signal, noise) for name, (signal, noise) in sums.items() if signal > 0}

    def step_back(
        self, sites: Sequence[Site], bits: dict[str, int], levels: Mapping[str, float], round_: int, rounded: Rounding
    ) -> dict[str, str]:
        """Give the noisiest sites more bits until what remains should fit.

        Args:
            sites: All sites.
            bits: Bits of each by key, 0 for float; changed.
            levels: What `levels` says of them.
            round_: How often this was done before; from the fifth time on all step back.
            rounded: Finds the weights as they are now.

        Returns:
            Reasons by key of those that changed; none if the outputs are good enough, or all is float.
        """
        margin = min((level - self._floors[name] for name, level in levels.items()), default=0.0)
        stored = [site for site in sites if bits[site.key]]
        if margin >= 0 or not stored:
            return {}
        shares, reasons = self._shares(stored, bits, rounded), dict[str, str]()

        def step(unit: str) -> None:
            share = 100 * shares.noise[unit]
            old = shares.wider(unit)
            shown = f"{share:.0f}" if share >= 10 else f"{share:.2g}"
            for site in shares.units[unit]:
                reasons[site.key] = f"in {old} bits its noise would be {shown} % of the signal at an output"
                bits[site.key] = shares.bits[unit]

        if round_ >= _ROUNDS:
            for unit in shares.units:
                step(unit)
        else:
            limit = sum(shares.noise.values()) * 10 ** (margin / 10) / 2**round_  # noises do not quite add up
            step_noisiest(shares.noise, limit, step, shares.cost)
        self._ctx.log.info("quant: %.1f dB below the limit at an output, %d layers step back", -margin, len(reasons))
        return reasons

    def _shares(self, sites: Sequence[Site], bits: Mapping[str, int], rounded: Rounding) -> _Shares:
        """Measure the noise of each unit while all others are float."""
        board, model = Switchboard(self._ctx.model, sites, self._ctx), self._ctx.model
        units = {unit[0].key: unit for unit in units_of(sites, model)}
        feeds = self._feeds[: max(1, min(_SHARE_FEEDS, _SHARE_RUNS // len(units)))]
        exact = [board.run(feed, {}) for feed in feeds]
        noise: dict[str, float] = {}
        for key, unit in self._ctx.progress(list(units.items()), "finding sensitive layers"):
            trials = {s.key: Trial({i: rounded(s, i, bits[s.key]) for i in range(len(s.weights))}) for s in unit}
            pairs = zip(exact, feeds, strict=True)
            noise[key] = float(np.mean([worst_noise(before, board.run(feed, trials)) for before, feed in pairs]))
        return _Shares(units, {key: bits[key] for key in units}, noise)
