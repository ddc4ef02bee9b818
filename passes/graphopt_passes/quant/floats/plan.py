"""Decide which nodes compute in fp16; nothing is changed here.

Every node does, unless ONNX, the user, its constants or the ranges of its activations say otherwise. Then what gains
nothing is given up: nodes between float32 operators that hold no weights would only add casts.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import onnx_ir as ir

from graphopt.analyses import Shapes
from graphopt.opset import opset_version
from graphopt_passes._own_constants import constant_tensor
from graphopt_passes.quant.floats._rounding import HALF_MAX, LEAST_WEIGHT_SQNR, Rounding, rounding_of
from graphopt_passes.quant.floats.extremes import Extremes
from graphopt_passes.quant.floats.hazards import Hazards, growing_nodes
from graphopt_passes.quant.floats.origins import (
    MASK_CARRIERS,
    MASK_LIMIT,
    hidden_values,
    index_nodes,
    masked_values,
)
from graphopt_passes.quant.floats.ports import Ports, is_widening, ports_of
from graphopt_passes.quant.sites import keyed_nodes

__all__ = ["Choice", "Plan", "Survey", "matches"]

_BOUNDS = frozenset({"Clip", "Max", "Min"})
_WORTH = 64  # elements of a constant that make it a weight
_LINEAR = frozenset({"Conv", "ConvTranspose", "Einsum", "GRU", "Gemm", "LSTM", "MatMul", "RNN"})


@dataclass(frozen=True)
class Choice:
    """Which nodes the user leaves to the pass: shell patterns of node names or operator types.

    Attributes:
        only: No others are touched, if there are any.
        skip: Left alone.
        keep: Left alone.
    """

    only: tuple[str, ...] = ()
    skip: tuple[str, ...] = ()
    keep: tuple[str, ...] = ()

    def refusal(self, node: ir.Node) -> str:
        """Which option leaves a node alone, and why; empty if none does."""
        if self.only and not matches(node, self.only):
            return "not named by only"
        if matches(node, self.skip):
            return "named by skip"
        return "named by keep" if matches(node, self.keep) else ""


@dataclass
class Plan:
    """What becomes fp16.

    Attributes:
        narrow: What becomes narrow at a node, by key.
        wide: Why a node through which floats pass stays float32, by key.
        clipped: (key of a node, output index) of float32 results whose extremes are a mask's.
        store: Whether weights of float32 nodes are stored in fp16.
    """

    narrow: dict[str, Ports] = field(default_factory=dict[str, Ports])
    wide: dict[str, str] = field(default_factory=dict[str, str])
    clipped: set[tuple[str, int]] = field(default_factory=set[tuple[str, int]])
    store: bool = True


def matches(node: ir.Node, patterns: Sequence[str]) -> bool:
    """Whether one of the patterns fits a node's name or operator type."""
    names = (node.name or "", node.op_type)
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns for name in names)


class Survey:
    """Everything about a model that plans are made of; it is read once, and plans may be made again and again.

    Args:
        model: The model.
        shapes: Types of its values.
        ranges: How far its activations reach, by name; None without calibration data.
        choice: What the user leaves to the pass.

    Attributes:
        model: The model.
        nodes: All nodes with their keys, every graph in order and after the one around it.
        masked: Values whose extremes are a mask's.
        left: Why the user leaves a node alone, by key.
        widening: Keys of the nodes that make float32 of fp16.
    """

    def __init__(self, model: ir.Model, shapes: Shapes, ranges: Mapping[str, Extremes] | None, choice: Choice) -> None:
        self.model = model
        self.nodes = list(keyed_nodes(model).items())
        found = ((key, choice.refusal(node)) for key, node in self.nodes)
        self.left = {key: refusal for key, refusal in found if refusal}
        self.widening = tuple(key for key, node in self.nodes if is_widening(node, shapes.dtype))
        self._roundings: dict[ir.Value, Rounding | None] = {}
        self._ports: dict[str, Ports] = {}
        self._wide: dict[str, str] = {}
        inputs = [value for graph in model.graphs() for value in graph.inputs]
        index = index_nodes(self.nodes, inputs)
        hidden = hidden_values(self.nodes)
        self.masked = masked_values(self.nodes, hidden, self._too_large)
        growing, main = growing_nodes(self.nodes), set(model.graph)
        hazards = Hazards(ranges, self.masked) if ranges is not None else None
        opset = opset_version(model)
        for key, node in self.nodes:
            if node.op_type == "Constant":
                continue
            ports = ports_of(node, opset, shapes.dtype)
            if isinstance(ports, Ports) and not ports:
                continue
            refusal = self.left.get(key, "")
            if not refusal and isinstance(ports, str):
                refusal = ports
            if not refusal and key in index and not _is_exact(node, shapes):
                refusal = "computes positions, sizes or a mask"
            if not refusal and isinstance(ports, Ports):
                unseen = growing.get(key, "") if hazards is None or node not in main else ""
                refusal = self._constants(node, ports) or unseen
                refusal = refusal or (hazards.of(node, ports) if hazards is not None else "")
            if refusal:
                self._wide[key] = refusal
            elif isinstance(ports, Ports):
                self._ports[key] = ports
        self._beside_integers()

    def rounding(self, value: ir.Value | None) -> Rounding | None:
        """What fp16 does to a constant; None for everything else. Each constant is read once."""
        if value is None:
            return None
        if value not in self._roundings:
            tensor = constant_tensor(value)
            floats = tensor is not None and tensor.dtype == ir.DataType.FLOAT
            self._roundings[value] = rounding_of(tensor, ir.DataType.FLOAT16) if tensor is not None and floats else None
        return self._roundings[value]

    def plan(self, kept: Mapping[str, str]) -> Plan:
        """Make a plan.

        Args:
            kept: More nodes that stay float32, by key, with the reason.
        """
        plan = Plan(dict(self._ports), dict(self._wide))
        for key, reason in kept.items():
            if plan.narrow.pop(key, None) is not None:
                plan.wide[key] = reason
        self._give_islands_up(plan)
        for key, node in self.nodes:
            if key not in plan.narrow:
                plan.clipped |= {(key, i) for i, value in enumerate(node.outputs) if value in self.masked}
        return plan

    def weights(self, node: ir.Node, ports: Ports) -> int:
        """Elements of the weights of a node in fp16."""
        roundings = (self.rounding(node.inputs[i]) for i in ports.inputs)
        return sum(rounding.count for rounding in roundings if rounding is not None and rounding.count >= _WORTH)

    def limit(self, node: ir.Node) -> float:
        """Magnitude to which constants of a node in fp16 are clipped."""
        if node.op_type in MASK_CARRIERS and all(value in self.masked for value in node.outputs if value.name):
            return MASK_LIMIT
        return HALF_MAX

    def _too_large(self, thing: ir.Value | ir.Node) -> bool:
        rounding = _filling(thing) if isinstance(thing, ir.Node) else self.rounding(thing)
        return rounding is not None and rounding.overflows > 0

    def _constants(self, node: ir.Node, ports: Ports) -> str:
        """Reason why the constants of a node do not fit fp16; empty if they do."""
        bounded = node.op_type in _BOUNDS or self.limit(node) == MASK_LIMIT
        filling = _filling(node) if node.op_type == "ConstantOfShape" else None
        for rounding in (filling, *(self.rounding(node.inputs[index]) for index in ports.inputs)):
            if rounding is None:
                continue
            count = f"{rounding.count} weights" if rounding.count >= _WORTH else "its constants"
            if rounding.overflows and not bounded:
                top = max(-rounding.low, rounding.high)
                return f"{rounding.overflows} of {count} overflow fp16, the largest is {top:.3g}"
            if rounding.sqnr < LEAST_WEIGHT_SQNR and not rounding.overflows:
                lost = f"{rounding.vanished} of {count} vanish" if rounding.vanished else f"{count} are very small"
                return f"{lost} in fp16, which leaves {rounding.sqnr:.1f} dB of signal to noise"
        return ""

    def _beside_integers(self) -> None:
        """Leave alone what reads dequantized or makes to-be-quantized values: runtimes fuse it with its neighbours."""
        for key, node in self.nodes:
            made = (v.producer() for v in node.inputs if v is not None)
            users = [user for output in node.outputs for user in output.consumers()]
            beside = any(p is not None and p.op_type == "DequantizeLinear" for p in made)
            if key in self._ports and (beside or any(user.op_type == "QuantizeLinear" for user in users)):
                self._wide[key] = "beside quantized values"
                del self._ports[key]

    def _give_islands_up(self, plan: Plan) -> None:
        nodes = dict(self.nodes)
        for island in _islands(self.nodes, plan.narrow):
            if not any(self._gains(nodes[key], plan.narrow[key]) for key in island):
                for key in island:
                    del plan.narrow[key]
                    plan.wide[key] = "between float32 operators, where fp16 would only add casts"

    def _gains(self, node: ir.Node, ports: Ports) -> bool:
        return node.op_type in _LINEAR or self.weights(node, ports) > 0


def _is_exact(node: ir.Node, shapes: Shapes) -> bool:
    """Whether fp16 takes nothing from a node that computes from sizes or small whole numbers."""
    small = (ir.DataType.BOOL, ir.DataType.INT8, ir.DataType.UINT8)
    return node.op_type == "ConstantOfShape" or (node.op_type == "Cast" and shapes.dtype(node.inputs[0]) in small)


def _filling(node: ir.Node) -> Rounding | None:
    """What fp16 does to the value that a ConstantOfShape repeats."""
    attribute = node.attributes.get("value")
    tensor = None if attribute is None or attribute.is_ref() else attribute.as_tensor()
    floats = tensor is not None and tensor.dtype == ir.DataType.FLOAT
    return rounding_of(tensor, ir.DataType.FLOAT16) if tensor is not None and floats else None


def _islands(nodes: Sequence[tuple[str, ir.Node]], narrow: Mapping[str, Ports]) -> list[list[str]]:
    """Sets of narrow nodes that hand narrow values to each other, each in order."""
    parent: dict[str, str] = {key: key for key in narrow}

    def root(key: str) -> str:
        while parent[key] != key:
            parent[key] = key = parent[parent[key]]
        return key

    maker = {node.outputs[i]: key for key, node in nodes if key in narrow for i in narrow[key].outputs}
    for key, node in nodes:
        for index in narrow[key].inputs if key in narrow else ():
            value = node.inputs[index]
            if value is not None and value in maker:
                parent[root(key)] = root(maker[value])
    found: dict[str, list[str]] = {}
    for key, _ in nodes:
        if key in narrow:
            found.setdefault(root(key), []).append(key)
    return list(found.values())
