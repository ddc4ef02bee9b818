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
from graphopt_passes.quant.builder import Builder, insert_behind
from graphopt_passes.quant.plan import Plan
from graphopt_passes.quant.sites import Site, graph_of, tensor_of
from graphopt_passes.quant.switches import Switches

__all__ = ["Switchboard", "Trial"]

Array = np.ndarray[Any, np.dtype[Any]]


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
                board.round_activations(site, board.flag(site))
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


class _Board(Switches):
    """Switches of activations, and weights that are inputs."""

    def __init__(self, copy: ir.Model, plan: Plan, grids: Mapping[str, Grid]) -> None:
        super().__init__(Builder(copy), plan, grids)
        self.inputs: dict[tuple[str, int], str] = {}  # site and place of a weight -> input of the model
        self.weights: dict[str, ir.TensorProtocol] = {}  # that input -> what it was
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

    def add_dynamic(self, site: Site) -> None:
        """A switch that rounds what a site reads to the range of each run."""
        node = self.nodes[site.key]
        index = next(i for i in (0, 1) if i not in {weight.index for weight in site.weights})
        value, graph = node.inputs[index], graph_of(node)
        if value is None:
            return
        exact = self.exact(value)
        if (exact, graph) not in self._dynamic:
            outputs = [ir.Value(name=self.builder.name(f"{exact.name}_{word}")) for word in ("u8", "step", "zero")]
            down = ir.node("DynamicQuantizeLinear", [exact], outputs=outputs, name=outputs[0].name)
            up = self.builder.node("DequantizeLinear", outputs, f"{exact.name}_rounded")
            insert_behind(exact, graph, [down, up])
            self._dynamic[exact, graph] = up.outputs[0]
        self.choose(self.flag(site), self._dynamic[exact, graph], value, node, index)
