"""What each layer's rounding does to the outputs of the whole model, while all other layers stay float.

In a copy of the model every layer stands in an If: true, and it computes with rounded input and weights. One session
then answers for all layers, and runs as fast as the float model, because of the two forms only one is computed.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from graphopt.pass_base import Context
from graphopt.reference import Feed, Reference
from graphopt_passes.quant._maths import Grid
from graphopt_passes.quant.adjust.layout import channel_axis
from graphopt_passes.quant.adjust.prepared import prepared_bias
from graphopt_passes.quant.builder import Builder, insert_behind
from graphopt_passes.quant.plan import Plan, result_of
from graphopt_passes.quant.sites import Site, graph_of, tensor_of
from graphopt_passes.quant.static import adds_pairs, scale_axis
from graphopt_passes.quant.switches import Switches, worst_noise

__all__ = ["LayerNoise", "Weights"]


@dataclass(frozen=True)
class Weights:
    """How weights are stored.

    Attributes:
        bits: Bits of weights that kernels add in pairs.
        per_channel: One scale for each output channel.
        power_of_two: Scales are powers of two.
    """

    bits: int
    per_channel: bool
    power_of_two: bool = False


@dataclass
class LayerNoise:
    """Noise power over signal power at the worst output, the mean over feeds, that single layers make.

    Attributes:
        session: Computes all of them, each behind a switch.
        flags: The switch of each layer, by key.
        feeds: Samples to judge on.
        exact: Outputs with all switches off, one for each feed.
        known: What was measured.
    """

    session: Reference
    flags: Mapping[str, str]
    feeds: Sequence[Feed]
    exact: list[Feed] = field(default_factory=list[Feed])
    known: dict[str, float] = field(default_factory=dict[str, float])

    @classmethod
    def prepare(
        cls,
        model: ir.Model,
        plan: Plan,
        grids: Mapping[str, Grid],
        sites: Collection[Site],
        feeds: Sequence[Feed],
        ctx: Context,
        weights: Weights,
        *,
        activations: bool,
    ) -> LayerNoise:
        """Build the session.

        Args:
            model: The float model; it is not changed.
            plan: Which activations are rounded.
            grids: Their grids.
            sites: Layers to give a switch.
            feeds: Samples to judge on.
            ctx: Threads and custom operators.
            weights: How weights are stored.
            activations: Round what layers read and make as well, as the plan says.
        """
        builder = Builder(model.clone(), weights.bits, power_of_two=weights.power_of_two)
        board = _Board(builder, plan, grids)
        for site in sites:
            board.add(site, weights, activations=activations)
        session = Reference(builder.model, threads=ctx.threads, extensions=ctx.extensions)
        return cls(session, board.flags, feeds)

    def of(self, key: str) -> float:
        """The noise of a layer, measured when it is first asked for."""
        if key not in self.known:
            off = {flag: np.array(False) for flag in self.flags.values()}
            if not self.exact:
                self.exact += [self.session.run({**feed, **off}) for feed in self.feeds]
            on = {**off, self.flags[key]: np.array(True)}
            runs = zip(self.feeds, self.exact, strict=True)
            self.known[key] = float(np.mean([worst_noise(exact, self.session.run({**f, **on})) for f, exact in runs]))
        return self.known[key]


class _Board(Switches):
    """Layers in two forms, a switch for each."""

    def add(self, site: Site, weights: Weights, *, activations: bool) -> None:
        """Let a switch choose between a layer as it is and its rounded form."""
        node, flag = self.nodes[site.key], self.flag(site)
        rounded = ir.Graph((), (), nodes=(), name=self.builder.name(f"{site.key}_rounded"))
        inputs = list(node.inputs)
        for weight in site.weights:
            axis = weight.axis if weights.per_channel else None
            if activations:
                axis = scale_axis(site, per_channel=weights.per_channel)
            value = self._weight(node, weight.index, axis, rounded, paired=activations and adds_pairs(site, node))
            inputs[weight.index] = value
        if activations:
            for index in self.plan.inputs[site.key]:
                value = inputs[index]
                if value is not None:
                    inputs[index] = self.rounded(self.exact(value), rounded)
        twin = self._twin(node, inputs, rounded)
        if activations and (shift := prepared_bias(node)) is not None:
            self._shift(twin, node, shift, len(site.weights[0].shape), rounded)
        result = result_of(node)
        made_on_integers = activations and result.name in self.plan.results
        moved = self._choose_layer(flag, node, rounded)
        if made_on_integers:
            self._choose_result(flag, moved.get(result, result))

    def _weight(self, node: ir.Node, index: int, axis: int | None, graph: ir.Graph, *, paired: bool) -> ir.Value | None:
        """The rounded form of a weight, by Cast and Mul: ONNX Runtime loads no branch that dequantizes from outside."""
        value = node.inputs[index]
        tensor = tensor_of(value)
        if value is None or tensor is None:
            return value
        integers = self.builder.integers(value, tensor, axis, paired=paired)
        scale, steps = integers.scale, integers.scale.const_value
        if axis is not None and steps is not None:
            shape = [-1 if i == axis % len(tensor.shape) else 1 for i in range(len(tensor.shape))]
            scale = self.builder.constant(f"{value.name}_factor", steps.numpy().reshape(shape))
        cast = self.builder.node("Cast", [integers.value], f"{value.name}_cast", {"to": int(ir.DataType.FLOAT)})
        up = self.builder.node("Mul", [cast.outputs[0], scale], f"{value.name}_dq")
        graph.extend([cast, up])
        return up.outputs[0]

    def _twin(self, node: ir.Node, inputs: Sequence[ir.Value | None], graph: ir.Graph) -> ir.Node:
        """The layer with other inputs; all that it makes is handed out."""
        outputs = [ir.Value(name=self.builder.name(f"{o.name}_rounded") if o.name else "") for o in node.outputs]
        twin = ir.node(node.op_type, inputs, dict(node.attributes), domain=node.domain, outputs=outputs)
        twin.name = self.builder.name(f"{node.name}_rounded")
        graph.append(twin)
        for made, output in zip(outputs, node.outputs, strict=True):
            made.type = output.type or ir.TensorType(ir.DataType.FLOAT)
        graph.outputs.extend(output for output in outputs if output.name)
        return twin

    def _shift(self, twin: ir.Node, node: ir.Node, shift: np.ndarray, rank: int, graph: ir.Graph) -> None:
        """What the corrected bias will add."""
        axis = channel_axis(node)
        shape = [-1 if i == axis % rank else 1 for i in range(rank)] if node.op_type != "MatMul" else [-1]
        held = self.builder.constant(f"{node.name}_shift", shift.astype(np.float32).reshape(shape))
        add = self.builder.node("Add", [twin.outputs[0], held], f"{node.name}_shifted")
        add.outputs[0].type = twin.outputs[0].type
        graph.append(add)
        graph.outputs[0] = add.outputs[0]

    def _choose_layer(self, flag: ir.Value, node: ir.Node, rounded: ir.Graph) -> dict[ir.Value, ir.Value]:
        """Put a layer into an If beside its rounded form; returns what the If makes instead of what the layer made."""
        graph, made = graph_of(node), [output for output in node.outputs if output.name]
        outputs = [ir.Value(name=o.name, type=o.type, shape=o.shape) for o in made]
        exact = ir.Graph((), (), nodes=(), name=self.builder.name(f"{node.name}_exact"))
        choice = _choice(flag, rounded, exact, outputs, self.builder.name(f"{node.name}_choice"))
        graph.insert_after(node, choice)
        for old, new in zip(made, outputs, strict=True):
            old.replace_all_uses_with(new, replace_graph_outputs=True)
            old.name = self.builder.name(f"{old.name}_exact")
            old.type = old.type or ir.TensorType(ir.DataType.FLOAT)
        graph.remove(node)
        exact.append(node)
        exact.outputs.extend(made)
        return dict(zip(made, outputs, strict=True))

    def _choose_result(self, flag: ir.Value, result: ir.Value) -> None:
        """Let a switch round a result for all nodes that read it."""
        users, here = tuple(result.uses()), result.graph
        if not isinstance(here, ir.Graph):
            return
        rounded, exact = (ir.Graph((), (), nodes=(), name=self.builder.name(f"{result.name}_{w}")) for w in "re")
        pair = self.rounded(result, rounded)
        same = self.builder.node("Identity", [result], f"{result.name}_same")
        exact.append(same)
        for graph, value in ((rounded, pair), (exact, same.outputs[0])):
            value.type = ir.TensorType(ir.DataType.FLOAT)
            graph.outputs.append(value)
        output = ir.Value(name=self.builder.name(f"{result.name}_choice"))
        choice = _choice(flag, rounded, exact, [output], output.name or "")
        insert_behind(result, here, [choice])
        for user, index in users:
            user.replace_input_with(index, output)
        self._exact[output] = result


def _choice(flag: ir.Value, yes: ir.Graph, no: ir.Graph, outputs: Sequence[ir.Value], name: str) -> ir.Node:
    branches = (ir.AttrGraph("then_branch", yes), ir.AttrGraph("else_branch", no))
    return ir.node("If", [flag], {branch.name: branch for branch in branches}, outputs=outputs, name=name)
