"""Boolean inputs of a model that switch layers to rounded activations, so that one session answers for all of them.

A layer that looks harmless by itself but sits in front of something sensitive is found, which no figure of the layer
alone can do.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir

from graphopt.reference import Feed
from graphopt_passes.quant._maths import Grid
from graphopt_passes.quant.audit import powers
from graphopt_passes.quant.builder import Builder
from graphopt_passes.quant.plan import Plan, result_of
from graphopt_passes.quant.sites import Site, graph_of, keyed_nodes

__all__ = ["Switches", "worst_noise"]

_USELESS = 1e9  # a finite stand-in for infinite noise, so that shares can be added


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
                self.choose(flag, self.rounded(self.exact(value)), value, node, index)
        result = result_of(node)
        if result.name in self.plan.results:
            for user, index in tuple(result.uses()):
                self.choose(flag, self.rounded(result), result, user, index)

    def exact(self, value: ir.Value) -> ir.Value:
        """What a value was before any switch stood in front of it."""
        return self._exact.get(value, value)

    def choose(self, flag: ir.Value, rounded: ir.Value, exact: ir.Value, user: ir.Node, index: int) -> None:
        """Let a node read one of two values."""
        node = self.builder.node("Where", [flag, rounded, exact], f"{exact.name}_choice")
        graph_of(user).insert_before(user, node)
        user.replace_input_with(index, node.outputs[0])
        self._exact[node.outputs[0]] = self.exact(exact)

    def rounded(self, value: ir.Value, graph: ir.Graph | None = None) -> ir.Value:
        """A value rounded to its grid, in its own graph or in one inside of that."""
        return self.builder.pair(value, self.grids[self.plan.grid_of(value.name or "")], graph)


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
