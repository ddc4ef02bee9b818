"""Which layers to leave in float first, when the outputs lose too much: the worst for the outputs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import onnx_ir as ir

from graphopt.pass_base import Context
from graphopt.reference import Feed
from graphopt_passes.quant.mixed.switchboard import Switchboard, Trial
from graphopt_passes.quant.mixed.table import Setting, measure
from graphopt_passes.quant.sites import Site, keyed_nodes, tensor_of
from graphopt_passes.quant.switches import worst_noise

__all__ = ["rank_alone", "rank_by_leaving_out"]

_FEEDS = 4
_RUNS = 128
Board = Callable[[Sequence[Site]], Switchboard]


def rank_alone(
    model: ir.Model, forms: Sequence[tuple[Site, Setting]], feeds: Sequence[Feed], ctx: Context, board: Board
) -> tuple[str, ...]:
    """Names of sites by the noise that each makes while all others stay float, most first.

    Args:
        model: The float model; it is not changed.
        forms: Sites with the form that they are going to take.
        feeds: Samples to judge on.
        ctx: Facts about the model.
        board: Makes the switchboard for sites.
    """
    table = measure(model, [((site,), [setting]) for site, setting in forms], feeds, ctx, board)
    return _ordered([(unit.sites[0].name, table.cost(unit.options[0])) for unit in table.units])


def rank_by_leaving_out(
    model: ir.Model,
    forms: Sequence[tuple[Site, Setting]],
    reverted: Sequence[str],
    feeds: Sequence[Feed],
    board: Board,
) -> tuple[str, ...]:
    """Names of sites by how much less noise there is without each, given the sites that are float already, most first.

    Noises of layers are not quite independent; once the first ranking has misled, this one counts.
    """
    nodes, names = keyed_nodes(model), frozenset(reverted)
    trials = {s.key: _trial(s, setting, nodes) for s, setting in forms if s.name not in names}
    switches = board([site for site, _ in forms])
    feeds = feeds[: max(1, min(_FEEDS, _RUNS // max(1, len(trials))))]
    gains: dict[str, float] = {}
    for feed in feeds:
        exact = switches.run(feed, {})
        whole = worst_noise(exact, switches.run(feed, trials))
        for name in dict.fromkeys(site.name for site, _ in forms if site.name not in names):
            keys = {site.key for site, _ in forms if site.name == name}
            others = {key: trial for key, trial in trials.items() if key not in keys}
            gains[name] = gains.get(name, 0.0) + whole - worst_noise(exact, switches.run(feed, others))
    return _ordered(list(gains.items()))


def _trial(site: Site, setting: Setting, nodes: Mapping[str, ir.Node]) -> Trial:
    tensors = [tensor_of(nodes[site.key].inputs[weight.index]) for weight in site.weights]
    weights = {
        i: setting.rounding(site, i, np.asarray(t.numpy()), None) for i, t in enumerate(tensors) if t is not None
    }
    return Trial(weights, site.key in setting.rounded)


def _ordered(noises: Sequence[tuple[str, float]]) -> tuple[str, ...]:
    """Names by what goes under them together, most first; names of equal noise stay in order."""
    together: dict[str, float] = {}
    for name, noise in noises:
        together[name] = together.get(name, 0.0) + noise
    return tuple(sorted(together, key=lambda name: -together[name]))
