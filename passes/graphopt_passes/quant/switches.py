"""What each layer's rounding does to the outputs of the whole model, while all other layers stay float.

One copy of the model carries a boolean input for every layer: true, and it reads its rounded input and weights. One
session then answers for all layers; a layer that looks harmless by itself but sits in front of something sensitive
is found, which no figure of the layer alone can do.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import numpy as np
import onnx_ir as ir

from graphopt.pass_base import Context
from graphopt.reference import Feed, Reference
from graphopt_passes.quant._maths import Grid
from graphopt_passes.quant.audit import powers
from graphopt_passes.quant.builder import Builder
from graphopt_passes.quant.plan import Plan, result_of
from graphopt_passes.quant.sites import Site, graph_of, keyed_nodes, tensor_of
from graphopt_passes.quant.static import adds_pairs, scale_axis

__all__ = ["Switches", "output_noise", "worst_noise"]

_USELESS = 1e9  # a finite stand-in for infinite noise, so that shares can be added


def output_noise(
    model: ir.Model,
    plan: Plan,
    grids: Mapping[str, Grid],
    static: Collection[Site],
    weight_only: Collection[Site],
    feeds: Sequence[Feed],
    ctx: Context,
    *,
    bits: int,
    per_channel: bool,
    power_of_two: bool = False,
) -> dict[str, float]:
    """Noise power over signal power at the worst output, the mean over feeds, for every site by key."""
    copy = model.clone()
    board = _Board(Builder(copy, bits, power_of_two=power_of_two), plan, grids)
    for site in static:
        board.add(site, activations=True, per_channel=per_channel)
    for site in weight_only:
        board.add(site, activations=False, per_channel=per_channel)
    flags = board.flags
    session = Reference(copy, threads=ctx.threads, extensions=ctx.extensions)
    off = {name: np.array(False) for name in flags.values()}
    found: dict[str, list[float]] = {key: [] for key in flags}
    for feed in ctx.progress(feeds, "finding sensitive layers"):
        exact = session.run({**feed, **off})
        for key, flag in flags.items():
            found[key].append(worst_noise(exact, session.run({**feed, **off, flag: np.array(True)})))
    return {key: float(np.mean(ratios)) for key, ratios in found.items()}


class Switches:
    """Builds boolean inputs into a copy of a model; true, and a site reads rounded activations.

    Args:
        builder: Edits the copy.
        plan: Which activations are rounded.
        grids: Their grids.
    """

    def __init__(self, builder: Builder, plan: Plan, grids: Mapping[str, Grid]) -> None:
        self.builder = builder
        self.nodes = keyed_nodes(builder.model)
        self.plan = plan
        self.grids = grids
        self.flags: dict[str, str] = {}
        self._exact: dict[ir.Value, ir.Value] = {}  # choice -> the value before any rounding

    def flag(self, site: Site) -> ir.Value:
        """A switch for a site."""
        name = self.builder.name(f"switch_{len(self.flags)}")
        flag = ir.Value(name=name, type=ir.TensorType(ir.DataType.BOOL), shape=ir.Shape([]))
        self.builder.model.graph.inputs.append(flag)
        self.flags[site.key] = name
        return flag

    def round_activations(self, site: Site, flag: ir.Value) -> None:
        """Let a switch round a site's activations as the plan says."""
        node = self.nodes[site.key]
        for index in self.plan.inputs[site.key]:
            value = node.inputs[index]
            if value is not None:
                self.choose(flag, self._rounded(self.exact(value)), value, node, index)
        result = result_of(node)
        if result.name in self.plan.results:
            for user, index in tuple(result.uses()):
                self.choose(flag, self._rounded(result), result, user, index)

    def exact(self, value: ir.Value) -> ir.Value:
        """What a value was before any switch stood in front of it."""
        return self._exact.get(value, value)

    def choose(self, flag: ir.Value, rounded: ir.Value, exact: ir.Value, user: ir.Node, index: int) -> None:
        """Let a node read one of two values."""
        node = self.builder.node("Where", [flag, rounded, exact], f"{exact.name}_choice")
        graph_of(user).insert_before(user, node)
        user.replace_input_with(index, node.outputs[0])
        self._exact[node.outputs[0]] = self.exact(exact)

    def _rounded(self, value: ir.Value) -> ir.Value:
        return self.builder.pair(value, self.grids[self.plan.grid_of(value.name or "")])


class _Board(Switches):
    """Switches that round weights as well."""

    def add(self, site: Site, *, activations: bool, per_channel: bool) -> None:
        """Give a site its switch."""
        node, flag = self.nodes[site.key], self.flag(site)
        for weight in site.weights:
            value = node.inputs[weight.index]
            tensor = tensor_of(value)
            if value is not None and tensor is not None:
                axis = weight.axis if per_channel else None
                if activations:
                    axis = scale_axis(site, per_channel=per_channel)
                paired = activations and adds_pairs(site, node)
                rounded, _ = self.builder.dequantized(value, tensor, axis, paired=paired)
                self.choose(flag, rounded, value, node, weight.index)
        if activations:
            self.round_activations(site, flag)


def worst_noise(exact: Feed, rounded: Feed) -> float:
    """Power of the noise over that of the signal at the worst float output."""
    ratios: list[float] = []
    for name, reference in exact.items():
        if not np.issubdtype(reference.dtype, np.floating):
            continue
        signal, noise = powers(reference, rounded[name])
        if signal > 0:
            ratios.append(min(noise / signal, _USELESS))
    return max(ratios, default=0.0)
