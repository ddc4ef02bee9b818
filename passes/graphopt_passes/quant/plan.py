"""Decide which values become 8-bit integers; nothing is changed here.

    role        operators                                        on integers if
    linear      Conv, Gemm, MatMul with a constant weight         chosen
    product     MatMul of two activations                         asked for
    join        Add, Mul, Concat, GlobalAveragePool, AveragePool  all its inputs come from integer operators
    curve       Softmax, LayerNormalization, Gelu, Sigmoid, ...   asked for, and its input does
    move        MaxPool, Reshape, Transpose, Slice, ...           its input comes from an integer operator; same grid

A Relu or Clip that alone reads a result belongs to its producer. Integers that only float operators would read are
not made, with one exception: runtimes compute a Conv on integers only if its result is integer too, so a Conv whose
result leads to another integer layer rounds it. The last results before the model's outputs stay float.

Subgraphs are planned like the main graph, each by itself: what it reads from outside is rounded inside, what it hands
out stays float. Values of a model to plan have names of their own (`tell_apart`).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

import onnx_ir as ir

from graphopt.analyses import Shapes
from graphopt.analyses.lifting import steady_dimensions, why_hidden
from graphopt.analyses.names import subgraphs
from graphopt.targets import IntegerRules
from graphopt_passes.quant._maths import Grid
from graphopt_passes.quant.borders import leads_to_other_integers
from graphopt_passes.quant.sites import Site, key_of, tensor_of

__all__ = ["CURVES", "MOVES", "Plan", "fused_activation", "keeps_range", "make_plan", "result_of"]

_JOINS = frozenset({"Add", "AveragePool", "Concat", "GlobalAveragePool", "Mul", "Sub"})
CURVES = frozenset(
    {"Elu", "Erf", "Gelu", "HardSigmoid", "HardSwish", "InstanceNormalization", "LayerNormalization", "LeakyRelu",
     "ReduceMean", "Sigmoid", "Softmax", "Tanh"}
)  # fmt: skip
"""Operators that compute on integers only where a target lists them or the user asks for it."""

MOVES = frozenset(
    {"Flatten", "Identity", "MaxPool", "Pad", "Relu", "Reshape", "Resize", "Slice", "Split", "Squeeze", "Transpose",
     "Unsqueeze", "DepthToSpace", "SpaceToDepth", "Clip"}
)  # fmt: skip
_STARTS = frozenset({"linear", "product"})  # their activations are rounded for them, wherever they come from
_ACTIVATIONS = frozenset({"Relu", "Clip"})
_OWN_GRID = frozenset({"Relu", "Clip"})


@dataclass
class Plan:
    """What becomes integer.

    Attributes:
        nodes: Keys of the nodes computed on integers, with their role: linear, product, join, curve or
            move.
        inputs: For each of them, the indices of its inputs that are integer activations.
        results: Values rounded where they are made; every reader gets the rounded ones.
        like: Value -> the value whose grid it shares.
        constants: For nodes with operands that are stored as integers, their grids by input.
        to_outputs: The model hands out results in their rounded form, too.
        left: Keys of nodes that compute on floats although the target does not, with the reason.
    """

    nodes: dict[str, str] = field(default_factory=dict[str, str])
    inputs: dict[str, tuple[int, ...]] = field(default_factory=dict[str, tuple[int, ...]])
    results: set[str] = field(default_factory=set[str])
    like: dict[str, str] = field(default_factory=dict[str, str])
    constants: dict[str, dict[int, Grid]] = field(default_factory=dict[str, dict[int, Grid]])
    to_outputs: bool = False
    left: dict[str, str] = field(default_factory=dict[str, str])

    def values(self, model: ir.Model) -> tuple[str, ...]:
        """Names of all values that need a grid of their own, in graph order."""
        found: dict[str, None] = {}
        for node in model.graph.all_nodes():
            for index in self.inputs.get(key_of(node), ()):
                value = node.inputs[index]
                found[self.grid_of(value.name or "" if value is not None else "")] = None
            made = (output.name or "" for output in node.outputs)
            found |= dict.fromkeys(self.grid_of(name) for name in made if name in self.results)
        return tuple(found)

    def touched(self, model: ir.Model) -> tuple[str, ...]:
        """Names of all values that nodes on integers read or make, with or without a grid of their own."""
        found: dict[str, None] = {}
        for node in model.graph.all_nodes():
            for index in self.inputs.get(key_of(node), ()):
                value = node.inputs[index]
                found[value.name or "" if value is not None else ""] = None
            if key_of(node) in self.nodes:
                found |= dict.fromkeys(value.name or "" for value in (*node.outputs, result_of(node)))
        found |= dict.fromkeys(sorted(self.results))
        found.pop("", None)
        return tuple(found)

    def grid_of(self, name: str) -> str:
        """The value whose grid a value uses."""
        while name in self.like:
            name = self.like[name]
        return name


@dataclass(frozen=True)
class _Facts:
    linear: Mapping[str, Site]
    shapes: Shapes
    rules: IntegerRules
    products: frozenset[str]
    steady: frozenset[str]


def make_plan(
    model: ir.Model,
    linear: Collection[Site],
    shapes: Shapes,
    rules: IntegerRules,
    products: Collection[str] = (),
) -> Plan:
    """Plan the main graph and its subgraphs.

    Args:
        model: The model, its values told apart.
        linear: Sites to compute on integers.
        shapes: Types of its values.
        rules: What the target can compute on integers.
        products: Keys of products of two activations to compute on integers.
    """
    facts = _Facts({site.key: site for site in linear}, shapes, rules, frozenset(products), steady_dimensions(model))
    plan = Plan()
    integer = _offer(model, facts, plan)
    _prune(model, plan, integer, rules)
    return plan


def result_of(node: ir.Node) -> ir.Value:
    """The value that carries a node's result: behind a Relu or Clip that alone reads it."""
    output = node.outputs[0]
    activation = fused_activation(output)
    return activation.outputs[0] if activation is not None else output


def fused_activation(value: ir.Value) -> ir.Node | None:
    """The Relu or Clip that belongs to the maker of a value."""
    producer = value.producer()
    if producer is None or producer.op_type in MOVES or value.is_graph_output():
        return None
    uses = value.uses()
    if len(uses) != 1:
        return None
    user, index = next(iter(uses))
    mine = user.op_type in _ACTIVATIONS and user.domain == "" and index == 0 and user.graph is producer.graph
    return user if mine else None


def _offer(model: ir.Model, facts: _Facts, plan: Plan) -> set[str]:
    """Mark every node that could compute on integers, in order; returns the values they make."""
    made: set[str] = set()
    rounded = _read_by_starts(model, facts)
    for node in model.graph.all_nodes():
        role, key = _role(node, facts), key_of(node)
        if role is None or _is_fused(node, plan):
            continue
        inputs = _activations(node, role, facts)
        if role not in _STARTS and not _all_made(node, role, inputs, made, rounded):
            continue
        plan.nodes[key], plan.inputs[key] = role, inputs
        for output in node.outputs if role == "move" else (result_of(node),):
            if output.name:
                made.add(output.name)
    return made


def _role(node: ir.Node, facts: _Facts) -> str | None:
    if key_of(node) in facts.linear:
        return "linear"
    if key_of(node) in facts.products:
        return "product"
    if node.domain not in ("", "ai.onnx") or node.op_type not in facts.rules.operators:
        return None
    if facts.shapes.dtype(node.outputs[0]) not in (ir.DataType.FLOAT, None):
        return None
    if any(why_hidden(value, facts.shapes, facts.steady) for value in (*node.outputs, result_of(node)) if value.name):
        return None
    if node.op_type == "MaxPool" and any(output.name for output in node.outputs[1:]):
        return None  # runtimes have no integer form that also returns indices
    if node.op_type in _JOINS:
        return "join"
    if node.op_type in CURVES:
        return "curve"
    return "move" if node.op_type in MOVES and keeps_range(node) else None


def keeps_range(node: ir.Node) -> bool:
    """Padding with anything but zero, and cubic interpolation, make values outside of the input's grid."""
    if node.op_type == "Pad" and node.attributes.get_string("mode", "constant") == "constant":
        if "value" in node.attributes:
            return node.attributes.get_float("value", 0.0) == 0
        fill = node.inputs[2] if len(node.inputs) > 2 else None
        tensor = tensor_of(fill)
        return fill is None or (tensor is not None and not tensor.numpy().any())
    if node.op_type == "Resize":
        return node.attributes.get_string("mode", "nearest") in ("nearest", "linear")
    return True


def _activations(node: ir.Node, role: str, facts: _Facts) -> tuple[int, ...]:
    """Indices of the inputs that are float activations."""
    if role == "linear":
        return tuple(i for i in (0, 1) if i != facts.linear[key_of(node)].weights[0].index)
    if role == "product":
        return (0, 1)
    if role in ("curve", "move") or node.op_type in ("AveragePool", "GlobalAveragePool"):
        return (0,)
    return tuple(i for i, value in enumerate(node.inputs) if value is not None and tensor_of(value) is None)


def _read_by_starts(model: ir.Model, facts: _Facts) -> set[str]:
    """Names of the values that linear nodes and products on integers round, whoever makes them."""
    found: set[str] = set()
    for node in model.graph.all_nodes():
        role = _role(node, facts)
        if role in _STARTS:
            values = [node.inputs[i] for i in _activations(node, role or "", facts)]
            found |= {value.name or "" for value in values if value is not None}
    return found


def _all_made(node: ir.Node, role: str, inputs: tuple[int, ...], made: set[str], rounded: set[str]) -> bool:
    """All inputs are integers already; a constant operand keeps a node in float, where it costs no resolution.

    Where a layer made in float begins a chain of residual sums, these would all stay float for its sake: a sum takes
    what is rounded for a convolution anyway, if its other input is made of integers.
    """
    with_constant = role == "join" and len(inputs) < sum(value is not None for value in node.inputs)
    values = [node.inputs[i] for i in inputs]
    if with_constant or not all(value is not None and value.graph is node.graph for value in values):
        return False
    names = {value.name or "" for value in values if value is not None}
    return bool(names & made) and names <= (made | rounded if role == "join" else made)


def _is_fused(node: ir.Node, plan: Plan) -> bool:
    """A Relu or Clip that belongs to a node on integers."""
    if node.op_type not in _ACTIVATIONS or node.inputs[0] is None:
        return False
    producer = node.inputs[0].producer()
    return producer is not None and key_of(producer) in plan.nodes and fused_activation(node.inputs[0]) is node


def _prune(model: ir.Model, plan: Plan, made: set[str], rules: IntegerRules) -> None:
    """Give up what would make integers for nobody, from the end; then fix results and shared grids."""
    leads = _leading(model, plan)
    for node in reversed(list(model.graph.all_nodes())):
        key = key_of(node)
        role = plan.nodes.get(key)
        if role is None:
            continue
        results = [o for o in node.outputs if o.name] if role == "move" else [result_of(node)]
        read = any(
            _read_by_integers(value, plan) or leads_to_other_integers(value, rules.activation) for value in results
        )
        if role not in _STARTS and not read:
            del plan.nodes[key], plan.inputs[key]
        elif read or (node.op_type == "Conv" and any(value.name in leads for value in results)):
            plan.results |= {value.name or "" for value in results}
            if role == "move" and node.op_type not in _OWN_GRID:
                source = node.inputs[0].name if node.inputs[0] is not None else ""
                plan.like |= {value.name or "": source or "" for value in results}
    plan.results &= made


def _leading(model: ir.Model, plan: Plan) -> set[str]:
    """Names of the values from which a linear node or product on integers can be reached."""
    leads: set[str] = set()
    nodes, handed = list(reversed(list(model.graph.all_nodes()))), _handed_out(model)
    before = -1
    while before < len(leads):  # twice where a loop hands something to its next turn
        before = len(leads)
        leads |= {value for value, behind in handed if behind in leads}
        for node in nodes:
            if plan.nodes.get(key_of(node)) in _STARTS or any(output.name in leads for output in node.outputs):
                leads |= {value.name for value in node.inputs if value is not None and value.name}
    leads.discard("")
    return leads


def _handed_out(model: ir.Model) -> list[tuple[str, str]]:
    """What subgraphs take and hand out, each with what it becomes: inside, outside, on the next turn of a loop."""
    found: list[tuple[str, str]] = []
    for node in model.graph.all_nodes():
        loop, skip = node.op_type == "Loop", 2 if node.op_type == "Loop" else 0
        for _, graph in subgraphs(node):
            starts, ends = graph.inputs[skip:], graph.outputs[1 if loop else 0 :]
            ways = ((node.inputs[skip:], starts), (ends, node.outputs), (ends, starts))
            pairs = (pair for left, right in ways for pair in zip(left, right, strict=False))
            found += [(one.name or "", other.name or "") for one, other in pairs if one is not None]
    return found


def _read_by_integers(value: ir.Value, plan: Plan) -> bool:
    return any(index in plan.inputs.get(key_of(user), ()) for user, index in value.uses())
