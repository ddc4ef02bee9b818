"""Plan for targets that compute on integers only: all that they can compute is rounded, the rest is named.

    role      operators                                             inputs        result
    linear    Conv, Gemm, MatMul, ... with a constant weight        rounded       rounded, behind bias and Relu or Clip
    product   MatMul of two activations                             rounded       rounded, behind a Relu or Clip
    join      Add, Mul, ... of two activations, or with a tensor    rounded       likewise
    curve     Softmax, ReduceMean, AveragePool, ...                 rounded       likewise
    curve     functions of one number: Sigmoid, x + 1, ...          in front of   behind a chain
    move      MaxPool, Reshape, Transpose, ...                      rounded       on the grid of its input
    end       ArgMax                                                rounded       whole numbers already

Results of the model are rounded like all others. What depends on the sizes of inputs only is shape arithmetic, which
stays as it is.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from graphopt.analyses import Shapes
from graphopt.analyses.lifting import steady_dimensions, why_hidden
from graphopt.targets import IntegerRules
from graphopt_passes.quant._maths import Grid, activation_grid
from graphopt_passes.quant.biases import bias_of
from graphopt_passes.quant.plan import CURVES, MOVES, Plan, fused_activation, keeps_range
from graphopt_passes.quant.sites import KEPT, QUANTIZED_OPERATORS, RECURRENT, Site, key_of, tensor_of
from graphopt_passes.quant.whole.data import SIZES, computed_from_data, on_integers
from graphopt_passes.quant.whole.functions import BINARY, UNARY, operands
from graphopt_passes.quant.whole.roots import find_roots

__all__ = ["plan_whole"]

_JOINS = frozenset({"Add", "Concat", "Max", "Min", "Mul", "Sub"})
_WITH_TENSOR = _JOINS | {"PRelu"}
_OWN_RANGE = frozenset({"AveragePool", "BatchNormalization", "GlobalAveragePool", "ReduceMean", "ReduceSum"}) | CURVES
_PICKING = frozenset({"GlobalMaxPool", "ReduceMax", "ReduceMin"})
_CLAMPS = frozenset({"Clip", "Relu"})
_ENDS = frozenset({"ArgMax", "ArgMin"})
_LINEAR = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul"})


@dataclass(frozen=True)
class _Facts:
    linear: Mapping[str, Site]
    products: frozenset[str]
    shapes: Shapes
    rules: IntegerRules
    steady: frozenset[str]
    data: Collection[ir.Value]
    done: Collection[ir.Node]


@dataclass(frozen=True)
class _Step:
    """A node on integers: its part in the plan, its activations, its operands that are tensors, what it makes."""

    role: str
    inputs: tuple[int, ...]
    constants: tuple[int, ...] = ()
    results: tuple[ir.Value, ...] = ()


@dataclass
class _Draft:
    """All nodes on integers, and why others are not."""

    nodes: list[ir.Node]
    steps: dict[ir.Node, _Step] = field(default_factory=dict[ir.Node, _Step])
    functions: dict[ir.Node, tuple[int, ...]] = field(default_factory=dict[ir.Node, tuple[int, ...]])
    absorbed: set[ir.Node] = field(default_factory=set[ir.Node])
    left: dict[ir.Node, str] = field(default_factory=dict[ir.Node, str])


def plan_whole(
    model: ir.Model,
    linear: Collection[Site],
    shapes: Shapes,
    rules: IntegerRules,
    products: Collection[str] = (),
) -> Plan:
    """Plan the main graph and its subgraphs; arguments as those of `make_plan`."""
    sites = {site.key: site for site in linear}
    data, done = computed_from_data(model), on_integers(model)
    facts = _Facts(sites, frozenset(products), shapes, rules, steady_dimensions(model), data, done)
    draft = _Draft(list(model.graph.all_nodes()))
    for node in draft.nodes:
        if node not in draft.absorbed:
            _classify(draft, node, facts)
    _decide_functions(draft, facts)
    _leave_to_divisions(draft)
    _leave_idle_moves(draft)
    plan = Plan(to_outputs=True)
    for node in draft.nodes:
        _put(plan, node, draft, rules)
    _share_with_concats(plan, draft)
    return plan


def _classify(draft: _Draft, node: ir.Node, facts: _Facts) -> None:
    """Make a node a step, a function of one number, or say why it is neither."""
    key = key_of(node)
    if key in facts.linear:
        site = facts.linear[key]
        inputs = tuple(i for i in (0, 1) if i != site.weights[0].index)
        bias = bias_of(node, site)
        last = bias.node if bias is not None else node
        _add_step(draft, node, _Step("linear", inputs, results=(last.outputs[0],)), facts)
        if last is not node:
            draft.absorbed.add(last)
        return
    if key in facts.products:
        _add_step(draft, node, _Step("product", (0, 1), results=(node.outputs[0],)), facts)
        return
    if node.op_type in _LINEAR | RECURRENT or not _on_data(node, facts):
        return  # layers with weights are told of already
    reason = _why_not(node, facts)
    if reason:
        draft.left[node] = reason
        return
    found = operands(node, facts.shapes)
    if found is not None:
        draft.functions[node] = found
        return
    step = _step(node)
    if isinstance(step, str):
        draft.left[node] = step
    else:
        _add_step(draft, node, step, facts)


def _add_step(draft: _Draft, node: ir.Node, step: _Step, facts: _Facts) -> None:
    """Keep a step, with the Relu or Clip that belongs to it."""
    clamp = _clamp(step.results[0], facts) if step.role not in ("move", "end") else None
    if clamp is not None:
        draft.absorbed.add(clamp)
        step = _Step(step.role, step.inputs, step.constants, (clamp.outputs[0],))
    draft.steps[node] = step


def _clamp(value: ir.Value, facts: _Facts) -> ir.Node | None:
    """The Relu or Clip with constant limits that belongs to the maker of a value."""
    clamp = fused_activation(value)
    if clamp is None or clamp.op_type not in facts.rules.operators or KEPT in clamp.meta:
        return None
    return clamp if operands(clamp, facts.shapes) is not None else None


def _on_data(node: ir.Node, facts: _Facts) -> bool:
    """A node that computes on floats that depend on what the model is given, not yet on integers."""
    if node in facts.done or node.op_type in QUANTIZED_OPERATORS | SIZES:
        return False
    read = [value for value in node.inputs if value is not None and value in facts.data]
    floats = (facts.shapes.dtype(value) == ir.DataType.FLOAT for value in (*read, *node.outputs) if value.name)
    return bool(read) and any(floats)


def _why_not(node: ir.Node, facts: _Facts) -> str:
    """Why a node on floats stays there; empty if its kind, its types and its place allow integers."""
    if KEPT in node.meta:
        return str(node.meta[KEPT])
    if node.domain not in ("", "ai.onnx") or node.op_type not in facts.rules.operators:
        return f"{node.op_type} has no integer form on the target"
    made = () if node.op_type in _ENDS else tuple(value for value in node.outputs if value.name)
    read = node.inputs[:1] if node.op_type not in BINARY | {"Concat"} else node.inputs
    for value in (*made, *(value for value in read if value is not None)):
        if facts.shapes.dtype(value) not in (ir.DataType.FLOAT, None):
            return "it is not on float32 alone"
        hidden = why_hidden(value, facts.shapes, facts.steady) if tensor_of(value) is None else ""
        if hidden:
            return hidden
    return ""


def _step(node: ir.Node) -> _Step | str:
    """The step of a node that is no function of one number, or why there is none."""
    kind, made = node.op_type, tuple(value for value in node.outputs if value.name)
    if kind in UNARY:
        return "its limits are computed, or tensors"
    if kind in _ENDS:
        return _Step("end", (0,))
    if kind == "MaxPool" and len(made) > 1:
        return "its indices have no integer form on the target"
    if kind in _WITH_TENSOR:
        given = tuple(i for i, value in enumerate(node.inputs) if value is not None and tensor_of(value) is None)
        constants = tuple(i for i, value in enumerate(node.inputs) if value is not None and i not in given)
        finite = all(_is_finite(node.inputs[i]) for i in constants)
        return _Step("join", given, constants, made) if finite else "its constant operand holds infinities"
    if kind in MOVES | _PICKING:
        if keeps_range(node):
            return _Step("move", (0,), results=made)
        return _Step("curve", (0,), results=made) if _fills_with_number(node) else _OUTSIDE[kind]
    if kind in _OWN_RANGE:
        return _Step("curve", (0,), results=made)
    return f"{kind} with a tensor has no integer form on the target"


_OUTSIDE = {
    "Pad": "what it pads with is computed, or infinite",
    "Resize": "cubic interpolation has no integer form on the target",
}


def _fills_with_number(node: ir.Node) -> bool:
    """A Pad with a finite number that is known."""
    fill = tensor_of(node.inputs[2]) if node.op_type == "Pad" and len(node.inputs) > 2 else None
    return fill is not None and bool(np.isfinite(fill.numpy()).all())


def _is_finite(value: ir.Value | None) -> bool:
    tensor = tensor_of(value)
    return tensor is not None and bool(np.isfinite(tensor.numpy()).all())


def _decide_functions(draft: _Draft, facts: _Facts) -> None:
    """Make chains of functions of one number, and joins or reasons of those that turn out to be of several."""
    clamps = {node: clamp for node in draft.functions if (clamp := _clamp(node.outputs[0], facts)) is not None}
    joins = {node: clamp for node, clamp in clamps.items() if node.op_type in _JOINS}
    draft.functions = {node: read for node, read in draft.functions.items() if node not in draft.absorbed}
    roots = find_roots(draft.nodes, draft.functions, joins)
    for node in draft.nodes:
        if node not in draft.functions or node in draft.absorbed:
            continue
        value, read = node.outputs[0], draft.functions[node]
        if node in roots.several and node.op_type in _JOINS:
            _add_step(draft, node, _Step("join", read, results=(value,)), facts)
        elif node in roots.several:
            draft.left[node] = f"{node.op_type} of two activations has no integer form on the target"
        else:
            fresh = tuple(i for i in read if (v := node.inputs[i]) is not None and roots.of(v) is v)
            draft.steps[node] = _Step("curve", fresh, results=(value,) if value in roots.rounded else ())


def _leave_to_divisions(draft: _Draft) -> None:
    """Take off integers what only a division of two activations reads, which is computed in float.

    Normalizations written out divide by the root of a mean of squares, of which 256 steps say next to nothing.
    """
    floats = {node for node in draft.left if node.op_type == "Div"}
    for node in reversed(draft.nodes):
        step = draft.steps.get(node)
        if step is None or step.role not in ("curve", "join", "move"):
            continue
        made = step.results or node.outputs
        users = [user for value in made for user, _ in value.uses()]
        if users and floats.issuperset(users) and not any(value.is_graph_output() for value in made):
            floats.add(node)
            del draft.steps[node]
            draft.left[node] = "only a division of two activations reads it, which has no integer form on the target"


def _leave_idle_moves(draft: _Draft) -> None:
    """Take moves off integers that only move what others compute in float, from one of these to the next."""
    computing = {node for node, step in draft.steps.items() if step.role != "move"}
    fed, read = set(computing), set(computing)
    for node in draft.nodes:
        if node in draft.steps and node.inputs[0] is not None and node.inputs[0].producer() in fed:
            fed.add(node)
    for node in reversed(draft.nodes):
        if node in draft.steps and any(user in read for value in node.outputs for user, _ in value.uses()):
            read.add(node)
    for node in draft.steps.keys() - fed - read:
        del draft.steps[node]
        draft.left[node] = "nothing beside it computes on integers"


def _put(plan: Plan, node: ir.Node, draft: _Draft, rules: IntegerRules) -> None:
    """Write a node into the plan."""
    key, step = key_of(node), draft.steps.get(node)
    if step is None:
        if node in draft.left:
            plan.left[key] = draft.left[node]
        return
    plan.nodes[key], plan.inputs[key] = step.role, step.inputs
    results = {value.name or "" for value in step.results if value.uses() or value.is_graph_output()}
    plan.results |= results
    if step.role == "move":
        source = node.inputs[0].name if node.inputs[0] is not None else ""
        plan.like |= dict.fromkeys(results, source or "")
    if step.constants:
        plan.constants[key] = {index: _grid(node.inputs[index], rules) for index in step.constants}


def _grid(value: ir.Value | None, rules: IntegerRules) -> Grid:
    """The grid that fits a constant operand."""
    tensor = tensor_of(value)
    numbers = np.zeros(1, np.float32) if tensor is None or not tensor.size else tensor.numpy()
    low, high = float(numbers.min()), float(numbers.max())
    symmetric = rules.symmetric_activations
    return activation_grid(low, high, rules.activation, symmetric=symmetric, power_of_two=rules.power_of_two)


def _share_with_concats(plan: Plan, draft: _Draft) -> None:
    """Round what only a Concat reads to the grid of its result at once, so that nothing is left to rescale."""
    for node in draft.nodes:
        step = draft.steps.get(node)
        if step is None or node.op_type != "Concat" or not step.results:
            continue
        for index in step.inputs:
            value = _read_by_it_alone(node.inputs[index], plan)
            if value is not None:
                plan.like[value.name or ""] = step.results[0].name or ""


def _read_by_it_alone(value: ir.Value | None, plan: Plan) -> ir.Value | None:
    """Where the grid of a value was chosen, if nothing else depends on that grid; None otherwise."""
    while value is not None and len(value.uses()) == 1 and not value.is_graph_output():
        producer = value.producer()
        if producer is None or plan.nodes.get(key_of(producer)) != "move":
            return value
        if len([output for output in producer.outputs if output.name]) > 1:
            return None
        value = producer.inputs[0]
    return None
