"""One session that answers for all layers in all roundings: what does this choice do to the outputs of the model?

Weights of the sites are inputs of the session, so that any rounding of them can be fed, and each site has a boolean
input: true, and it reads rounded activations. A layer that looks harmless by itself but sits in front of something
sensitive is found, which no figure of the layer alone can do.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx_ir as ir

from graphopt.pass_base import Context
from graphopt.reference import Feed, Reference
from graphopt_passes.quant._maths import Grid
from graphopt_passes.quant.audit import powers
from graphopt_passes.quant.builder import Builder
from graphopt_passes.quant.dynamic.rounding import insert_after_value
from graphopt_passes.quant.plan import Plan, result_of
from graphopt_passes.quant.sites import Site, keyed_nodes, tensor_of

__all__ = ["Switchboard", "Trial", "worst_noise"]

Array = np.ndarray[Any, np.dtype[Any]]
_USELESS = 1e9  # a finite stand-in for infinite noise, so that shares can be added


@dataclass(frozen=True, eq=False)
class Trial:
    """How one site is computed.

    Attributes:
        weights: Rounded weights by their place in `Site.weights`; weights left out stay as they are.
        rounded: Its activations are rounded too.
    """

    weights: Mapping[int, Array] = field(default_factory=dict[int, Array])
    rounded: bool = False


class Switchboard:
    """A model whose sites can be switched to other weights and rounded activations.

    Args:
        model: The float model; it is not changed.
        sites: The sites.
        dynamic: Keys of those whose activations are rounded to a range found on every run; others follow the plan.
        plan: Which activations are rounded where the ranges are calibrated.
        grids: Their grids.
        ctx: Threads and custom operators.
    """

    def __init__(
        self,
        model: ir.Model,
        sites: Sequence[Site],
        ctx: Context,
        *,
        dynamic: Collection[str] = (),
        plan: Plan | None = None,
        grids: Mapping[str, Grid] | None = None,
    ) -> None:
        board = _Board(model.clone(), plan or Plan(), grids or {})
        for site in sites:
            board.free_weights(site)
        for site in sites:
            if site.key in dynamic:
                board.add_dynamic(site)
            elif site.key in board.plan.nodes:
                board.add_static(site)
        self._flags, self._inputs, self._weights = board.flags, board.inputs, board.weights
        self._session = Reference(board.builder.model, threads=ctx.threads, extensions=ctx.extensions)

    def run(self, feed: Feed, trials: Mapping[str, Trial]) -> Feed:
        """Run once; sites without a trial stay float.

        Args:
            feed: Inputs of the model.
            trials: By key of the site.
        """
        inputs = {**feed, **{name: np.asarray(tensor.numpy()) for name, tensor in self._weights.items()}}
        for key, flag in self._flags.items():
            inputs[flag] = np.array(key in trials and trials[key].rounded)
        for key, trial in trials.items():
            inputs |= {self._inputs[key, place]: weight for place, weight in trial.weights.items()}
        return self._session.run(inputs)


class _Board:
    """Builds inputs and switches into a copy of the model."""

    def __init__(self, copy: ir.Model, plan: Plan, grids: Mapping[str, Grid]) -> None:
        self.builder = Builder(copy)
        self.nodes = keyed_nodes(copy)
        self.plan = plan
        self.grids = grids
        self.flags: dict[str, str] = {}
        self.inputs: dict[tuple[str, int], str] = {}  # site and place of a weight -> input of the model
        self.weights: dict[str, ir.TensorProtocol] = {}  # that input -> what it was
        self._exact: dict[ir.Value, ir.Value] = {}  # choice -> the value before any rounding
        self._dynamic: dict[tuple[ir.Value, ir.Graph], ir.Value] = {}

    def free_weights(self, site: Site) -> None:
        """Make the weights of a site inputs of the model; one that sites share becomes one input."""
        for place, weight in enumerate(site.weights):
            value = self.nodes[site.key].inputs[weight.index]
            tensor = tensor_of(value)
            if value is not None and tensor is not None:
                name = self.builder.name(f"{weight.value}_free")
                free = ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=ir.Shape(weight.shape))
                value.replace_all_uses_with(free)
                self.builder.discard(value)
                self.builder.model.graph.inputs.append(free)
                self.weights[name] = tensor
                value = free
            self.inputs[site.key, place] = value.name or "" if value is not None else ""

    def add_static(self, site: Site) -> None:
        """A switch that rounds a site's activations as the plan says."""
        node, flag = self.nodes[site.key], self._flag(site)
        for index in self.plan.inputs[site.key]:
            value = node.inputs[index]
            if value is not None:
                self._choose(flag, self._rounded(self._exact.get(value, value)), value, node, index)
        result = result_of(node)
        if result.name in self.plan.results:
            for user, index in tuple(result.uses()):
                self._choose(flag, self._rounded(result), result, user, index)

    def add_dynamic(self, site: Site) -> None:
        """A switch that rounds what a site reads to the range of each run."""
        node = self.nodes[site.key]
        index = next(i for i in (0, 1) if i not in {weight.index for weight in site.weights})
        value, graph = node.inputs[index], _graph_of(node)
        if value is None:
            return
        exact = self._exact.get(value, value)
        if (exact, graph) not in self._dynamic:
            outputs = [ir.Value(name=self.builder.name(f"{exact.name}_{word}")) for word in ("u8", "step", "zero")]
            down = ir.node("DynamicQuantizeLinear", [exact], outputs=outputs, name=outputs[0].name)
            up = self.builder.node("DequantizeLinear", outputs, f"{exact.name}_rounded")
            insert_after_value(exact, graph, [down, up])
            self._dynamic[exact, graph] = up.outputs[0]
        self._choose(self._flag(site), self._dynamic[exact, graph], value, node, index)

    def _flag(self, site: Site) -> ir.Value:
        name = self.builder.name(f"switch_{len(self.flags)}")
        flag = ir.Value(name=name, type=ir.TensorType(ir.DataType.BOOL), shape=ir.Shape([]))
        self.builder.model.graph.inputs.append(flag)
        self.flags[site.key] = name
        return flag

    def _rounded(self, value: ir.Value) -> ir.Value:
        return self.builder.pair(value, self.grids[self.plan.grid_of(value.name or "")])

    def _choose(self, flag: ir.Value, rounded: ir.Value, exact: ir.Value, user: ir.Node, index: int) -> None:
        node = self.builder.node("Where", [flag, rounded, exact], f"{exact.name}_choice")
        _graph_of(user).insert_before(user, node)
        user.replace_input_with(index, node.outputs[0])
        self._exact[node.outputs[0]] = self._exact.get(exact, exact)


def _graph_of(node: ir.Node) -> ir.Graph:
    graph = node.graph
    if not isinstance(graph, ir.Graph):
        raise TypeError(f"node {node.name!r} is in no graph")
    return graph


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
