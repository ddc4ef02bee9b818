"""What every way to store a layer saves and costs: one table, measured before anything is changed.

    column         what it says
    saved          bytes of the file
    layer_noise    noise over signal of the layer's own output, weights alone, under the moments of what it reads
    output_noise   noise over signal at the worst output of the model, while all other layers stay float

Layers that share a weight are one unit and get one setting. Where running the model once a layer and setting would take
too long, or there is no data, `output_noise` is left out and `layer_noise` stands for it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from graphopt.analyses import COST, MomentsAnalysis
from graphopt.analyses.moments import LayerMoments
from graphopt.analyses.names import Names
from graphopt.pass_base import Context
from graphopt.reference import Feed
from graphopt_passes.quant._maths import decibel
from graphopt_passes.quant.mixed._matrices import as_matrix, power
from graphopt_passes.quant.mixed.switchboard import Switchboard, Trial
from graphopt_passes.quant.sites import Site, keyed_nodes, tensor_of
from graphopt_passes.quant.switches import worst_noise

__all__ = ["Option", "Setting", "Table", "Unit", "measure", "units_of"]

Array = np.ndarray[Any, np.dtype[Any]]
Rounding = Callable[[Site, int, Array, LayerMoments | None], Array]
"""Site, place of the weight in `Site.weights`, the weight, moments of what it meets -> the weight rounded, in float."""

_BEST = 99.0
_MACS = 2e12  # minutes
_QUICK_MACS = 2e11  # more feeds only within this
_FEEDS = 4
_SAMPLES = 64


@dataclass(frozen=True, eq=False)
class Setting:
    """One way to store the sites of a unit.

    Attributes:
        label: What tables call it, such as `int4`.
        saved: Bytes of the file that it saves.
        rounding: Rounds the weights.
        rounded: Keys of the sites whose activations are rounded too.
        like: Label of a setting measured before that differs in the weights only; the outputs are not measured then,
            their noise follows that of the layer.
    """

    label: str
    saved: int
    rounding: Rounding
    rounded: frozenset[str] = frozenset()
    like: str = ""


@dataclass(frozen=True)
class Option:
    """A row of the table for one setting, see the module."""

    label: str
    saved: int
    layer_noise: float
    output_noise: float | None

    def figures(self) -> Iterator[tuple[str, float]]:
        """What reports show: signal to noise in dB, of the layer and of the outputs."""
        yield f"{self.label}_layer_db", _level(self.layer_noise)
        if self.output_noise is not None:
            yield f"{self.label}_output_db", _level(self.output_noise)


@dataclass(frozen=True)
class Unit:
    """Sites that share weights, or a single one, with what each setting saves and costs; float is not listed."""

    sites: tuple[Site, ...]
    options: tuple[Option, ...]


@dataclass(frozen=True)
class Table:
    """All units.

    Attributes:
        units: In the order of the graph.
        by_outputs: The outputs of the model were measured.
    """

    units: tuple[Unit, ...]
    by_outputs: bool

    def cost(self, option: Option) -> float:
        """What an option costs, in one unit for the whole table."""
        return option.layer_noise if option.output_noise is None else option.output_noise


def units_of(sites: Sequence[Site], model: ir.Model) -> tuple[tuple[Site, ...], ...]:
    """Put sites together that share a weight."""
    nodes, unit_of = keyed_nodes(model), dict[ir.Value, int]()
    units: dict[int, list[Site]] = {}
    for number, site in enumerate(sites):
        values = [v for weight in site.weights if (v := nodes[site.key].inputs[weight.index]) is not None]
        known = sorted({unit_of[value] for value in values if value in unit_of})
        first = known[0] if known else number
        units[first] = [one for unit in known for one in units.pop(unit)] + [site]
        unit_of |= dict.fromkeys(values, first)
        unit_of = {value: first if unit in known else unit for value, unit in unit_of.items()}
    return tuple(tuple(units[number]) for number in sorted(units))


def measure(
    model: ir.Model,
    settings: Sequence[tuple[tuple[Site, ...], Sequence[Setting]]],
    feeds: Sequence[Feed],
    ctx: Context,
    board: Callable[[Sequence[Site]], Switchboard],
) -> Table:
    """Measure all settings of all units, one rounding in memory at a time.

    Args:
        model: The float model; it is not changed.
        settings: Units, each with its settings.
        feeds: Samples to judge on; may be empty.
        ctx: Facts about the model.
        board: Makes the switchboard for sites, if it is going to be used.
    """
    count = sum(not option.like for _, options in settings for option in options)
    feeds = feeds[: _affordable_feeds(count, ctx)]
    switches = board([site for sites, _ in settings for site in sites]) if feeds and count else None
    exact = [switches.run(feed, {}) for feed in feeds] if switches is not None else []
    moments = _Moments(model, [site for sites, _ in settings for site in sites], ctx)
    units: list[Unit] = []
    for sites, options in ctx.progress(settings, "finding sensitive layers"):
        rows: dict[str, Option] = {}
        for setting in options:
            other = rows.get(setting.like)
            rows[setting.label] = _measure(sites, setting, moments, None if other else switches, feeds, exact, other)
        units.append(Unit(sites, tuple(rows.values())))
    return Table(tuple(units), switches is not None)


def _measure(
    sites: tuple[Site, ...],
    setting: Setting,
    moments: _Moments,
    switches: Switchboard | None,
    feeds: Sequence[Feed],
    exact: Sequence[Feed],
    like: Option | None,
) -> Option:
    trials: dict[str, Trial] = {}
    layer_noise = 0.0
    for site in sites:
        rounded: dict[int, Array] = {}
        for place in range(len(site.weights)):
            weight = moments.weight(site, place)
            rounded[place] = setting.rounding(site, place, weight, moments.of(site, place))
            signal, noise = moments.powers(site, place, weight, rounded[place])
            layer_noise = max(layer_noise, noise / signal if signal > 0 else 0.0)
        trials[site.key] = Trial(rounded, site.key in setting.rounded)
    output = None
    if like is not None and like.output_noise is not None:
        output = like.output_noise * (layer_noise / like.layer_noise if like.layer_noise > 0 else 1.0)
    if switches is not None:
        ratios = [worst_noise(before, switches.run(f, trials)) for f, before in zip(feeds, exact, strict=True)]
        output = float(np.mean(ratios))
    return Option(setting.label, setting.saved, layer_noise, output)


def _affordable_feeds(options: int, ctx: Context) -> int:
    run = max(1, ctx.fact(COST).macs) * max(1, options)
    return 0 if run > _MACS else max(1, min(_FEEDS, int(_QUICK_MACS / run)))


class _Moments:
    """Weights of sites, and the moments of what meets them."""

    def __init__(self, model: ir.Model, sites: Sequence[Site], ctx: Context) -> None:
        self._nodes = keyed_nodes(model)
        labels = Names(model).labels
        self._found: Mapping[str, LayerMoments] = {}
        if ctx.calibration is not None and ctx.fact(COST).macs * _SAMPLES <= _MACS:
            names = {site.key: labels[self._nodes[site.key]] for site in sites}
            moments = ctx.fact(MomentsAnalysis(layers=tuple(sorted(names.values())), samples=_SAMPLES))
            found = {key: moments.of(name) for key, name in names.items()}
            self._found = {key: layer for key, layer in found.items() if layer is not None and layer.finite}

    def weight(self, site: Site, place: int) -> Array:
        tensor = tensor_of(self._nodes[site.key].inputs[site.weights[place].index])
        if tensor is None:
            raise TypeError(f"{site.name!r} has lost its weight")
        return tensor.numpy()

    def of(self, site: Site, place: int) -> LayerMoments | None:
        """Moments of what meets a weight; None for tables, and for what a recurrent layer multiplies its state with."""
        return None if place > 0 or site.operator == "Gather" else self._found.get(site.key)

    def powers(self, site: Site, place: int, weight: Array, rounded: Array) -> tuple[float, float]:
        """Power of the output, and of the noise in it."""
        node, moments = self._nodes[site.key], self.of(site, place)
        if moments is None:
            return float(np.vdot(weight, weight)), float(np.square(weight - rounded).sum(dtype=np.float64))
        groups, transposed = node.attributes.get_int("group", 1), bool(node.attributes.get_int("transB", 0))
        before, after = (
            as_matrix(array, site.operator, site.weights[place].index, groups=groups, transposed=transposed)
            for array in (weight, rounded)
        )
        rows = max(1, moments.rows)
        xx, squares = None if moments.xx is None else moments.xx / rows, moments.squares / rows
        return power(before, xx, squares), power(before - after, xx, squares)


def _level(noise: float) -> float:
    return round(min(_BEST, decibel(1.0, noise) if noise < math.inf else -_BEST), 1)
