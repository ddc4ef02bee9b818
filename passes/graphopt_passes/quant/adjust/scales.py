"""Which channels can be given another scale without changing what the model computes.

Every channel that a layer makes gets an atom, and every atom may be given a positive factor: what makes the channel is
multiplied by it, what reads it divided. Rules, one an operator, say how atoms pass through the main graph; channels
that meet in an addition share their atom, so that all members of a residual group move together. What no rule vouches
for is fixed, with the reason. (Cross-layer equalization: Nagel et al., "Data-Free Quantization Through Weight
Equalization and Bias Correction", 2019.)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx_ir as ir

from graphopt.analyses import Shapes
from graphopt.analyses.channels.partition import Indices, Partition
from graphopt.analyses.names import subgraphs
from graphopt_passes.fold.rewiring import site
from graphopt_passes.quant.sites import tensor_of

__all__ = ["Refused", "Rule", "ScaleMap", "Term", "View", "apply_rule"]

Array = np.ndarray[Any, np.dtype[Any]]


class Refused(Exception):  # noqa: N818  a reason, not an error
    """Why the factors of a node's channels are fixed; caught within the package."""


@dataclass(frozen=True, eq=False)
class Term:
    """A constant that follows the factors `s`: it becomes `old * s[made] / s[read]`.

    Attributes:
        node: The node that reads the constant.
        index: Which of its inputs it is.
        made: Atoms that it is multiplied with, broadcastable with the constant; None: none.
        read: Atoms that it is divided by.
        layer: It is the weight of a linear layer, so that it is rounded.
    """

    node: ir.Node
    index: int
    made: Indices | None = None
    read: Indices | None = None
    layer: bool = False


@dataclass(eq=False)
class ScaleMap:
    """Atoms of the values of a main graph.

    Attributes:
        values: Atoms by value: of the value's rank, each axis as long as the value's or 1 where factors do not differ.
        terms: Constants that follow the factors.
    """

    partition: Partition = field(default_factory=Partition)
    values: dict[ir.Value, Indices] = field(default_factory=dict[ir.Value, Indices])
    terms: list[Term] = field(default_factory=list[Term])
    _pins: list[tuple[Indices, str]] = field(default_factory=list[tuple[Indices, str]])

    def pin(self, atoms: Indices, reason: str) -> None:
        """Fix the factors of some atoms at one."""
        self.partition.mark(atoms.reshape(-1))
        self._pins.append((atoms.reshape(-1), reason))

    def fixed(self, rank: int, reason: str) -> Indices:
        """Atoms of a value whose factor is one."""
        atom = self.partition.new(1)
        self.pin(atom, reason)
        return atom.reshape((1,) * rank)

    def free(self, atoms: Indices) -> Array:
        """Which atoms may get a factor; bool of their shape."""
        return ~self.partition.marked(atoms.reshape(-1)).reshape(atoms.shape)

    def unite(self, left: Indices, right: Indices) -> Indices:
        """Give two values the same factors where they meet; returns the atoms of the result."""
        rank = max(left.ndim, right.ndim)
        a, b = (atoms.reshape((1,) * (rank - atoms.ndim) + atoms.shape) for atoms in (left, right))
        try:
            first, second = np.broadcast_arrays(a, b)
        except ValueError as e:
            raise Refused("the shapes of what it joins are unclear") from e
        self.partition.unite(first.reshape(-1), second.reshape(-1))
        return np.ascontiguousarray(first)

    def roots(self, atoms: Indices) -> Indices:
        """The names of the sets of atoms, which share a factor."""
        return self.partition.find(atoms.reshape(-1)).reshape(atoms.shape)

    def reasons(self) -> dict[int, str]:
        """Why sets are fixed, the first reason met, by root."""
        found: dict[int, str] = {}
        for atoms, reason in self._pins:
            for root in np.unique(self.partition.find(atoms)).tolist():
                found.setdefault(root, reason)
        return found


class View:
    """A node as rules see it.

    Args:
        scales: What is known so far.
        node: The node.
        shapes: Types of the model's values.
    """

    def __init__(self, scales: ScaleMap, node: ir.Node, shapes: Shapes) -> None:
        self.scales, self.node, self.shapes = scales, node, shapes
        self.label = f"{node.op_type} {site(node)!r}"

    def atoms(self, index: int) -> Indices:
        """Atoms of an input.

        Raises:
            Refused: Its rank is unknown, or it is left out.
        """
        value = self.node.inputs[index] if index < len(self.node.inputs) else None
        if value is None:
            raise Refused("an input is left out")
        if value not in self.scales.values:
            rank = self.shapes.rank(value)
            if rank is None:
                raise Refused(f"the rank of {value.name!r} is unknown")
            word = "a constant" if value.is_initializer() or value.producer() is not None else "an input of the model"
            return self.scales.fixed(rank, f"{self.label} reads {word}")
        return self.scales.values[value]

    def constant(self, index: int) -> ir.TensorProtocol | None:
        """The tensor of a constant input; None if it is computed or left out."""
        value = self.node.inputs[index] if index < len(self.node.inputs) else None
        tensor, producer = tensor_of(value), value.producer() if value is not None else None
        if tensor is None and producer is not None and producer.op_type == "Constant" and not producer.domain:
            attribute = next(iter(producer.attributes.values()))
            if attribute.name in _PLAIN and not attribute.is_ref():
                return ir.tensor(attribute.value, dtype=_PLAIN[attribute.name])
        return tensor

    def given(self, index: int) -> bool:
        """Whether an input is there."""
        return index < len(self.node.inputs) and self.node.inputs[index] is not None

    def integers(self, index: int, attribute: str) -> tuple[int, ...] | None:
        """Whole numbers from an attribute, or from a constant input in newer opsets; None where neither is given."""
        if attribute in self.node.attributes:
            return tuple(self.node.attributes.get_ints(attribute) or ())
        if not self.given(index):
            return None
        tensor = self.constant(index)
        if tensor is None:
            raise Refused(f"its {attribute} are computed")
        return tuple(int(number) for number in tensor.numpy().reshape(-1))

    def weight(self, index: int) -> tuple[int, ...]:
        """Shape of a float32 constant that this node alone reads.

        Raises:
            Refused: It is something else.
        """
        value = self.node.inputs[index]
        tensor = tensor_of(value)
        if value is None or tensor is None or tensor.dtype != ir.DataType.FLOAT:
            raise Refused("its weight is no float32 constant")
        if len(tuple(value.uses())) > 1 or value.is_graph_output():
            raise Refused("its weight is shared")
        return tuple(int(size) for size in tensor.shape.numpy())

    def follow(
        self, index: int, made: Indices | None = None, read: Indices | None = None, *, layer: bool = False
    ) -> None:
        """Let a constant follow the factors.

        Raises:
            Refused: It is no float32 constant.
        """
        tensor = tensor_of(self.node.inputs[index])
        if tensor is None or tensor.dtype != ir.DataType.FLOAT:
            raise Refused("an operand is no float32 constant")
        self.scales.terms.append(Term(self.node, index, made, read, layer))

    def only_on(self, atoms: Indices, axis: int) -> Indices:
        """Atoms that differ along one axis at most, as a row.

        Raises:
            Refused: They differ along another one.
        """
        if any(size != 1 for i, size in enumerate(atoms.shape) if i != axis % max(1, atoms.ndim)):
            raise Refused("its input has channels on another axis")
        return atoms.reshape(-1)


_PLAIN = {
    "value_float": ir.DataType.FLOAT, "value_floats": ir.DataType.FLOAT,
    "value_int": ir.DataType.INT64, "value_ints": ir.DataType.INT64,
}  # fmt: skip
_SIZES = frozenset({"Shape", "Size"})

Rule = Callable[[View], Sequence[Indices]]
"""Says the atoms of a node's outputs; notes what they unite and which constants follow."""


def apply_rule(scales: ScaleMap, node: ir.Node, shapes: Shapes, rule: Rule | None) -> None:
    """Visit one node: its rule, or everything that it touches is fixed."""
    if node.op_type in _SIZES:
        _finish(scales, node, shapes, f"{node.op_type} tells a size")
        return
    view, before = View(scales, node, shapes), len(scales.terms)
    refusal = "needs its channels as they are"
    if any(True for _ in subgraphs(node)):
        rule = None
    if rule is not None and all(shapes.dtype(o) in (ir.DataType.FLOAT, None) for o in node.outputs[:1]):
        try:
            for output, atoms in zip(node.outputs, rule(view), strict=False):
                scales.values[output] = atoms
        except Refused as e:
            refusal = str(e)
        else:
            _finish(scales, node, shapes, view.label)
            return
    del scales.terms[before:]
    reason = f"{view.label}: {refusal}" if refusal[0] != "n" else f"{view.label} {refusal}"
    for value in node.inputs:
        if value in scales.values:
            scales.pin(scales.values[value], reason)
    _finish(scales, node, shapes, reason)


def _finish(scales: ScaleMap, node: ir.Node, shapes: Shapes, reason: str) -> None:
    """Outputs that no rule spoke of have a factor of one; what others see of the rest is fixed."""
    for output in node.outputs:
        rank = shapes.rank(output)
        if output not in scales.values and rank is not None:
            scales.values[output] = scales.fixed(rank, reason)
        elif output in scales.values and rank is not None and scales.values[output].ndim != rank:
            scales.pin(scales.values[output], f"the rank of {output.name!r} is unclear")
        if output not in scales.values:
            continue
        if output.is_graph_output():
            scales.pin(scales.values[output], f"{output.name!r} is an output of the model")
        elif any(use.node.graph is not node.graph for use in output.uses()):
            scales.pin(scales.values[output], f"{output.name!r} is read inside a subgraph")
