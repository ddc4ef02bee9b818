"""Which values are rounded: as few as possible, so that chains of functions of one number are rounded once.

`x * sigmoid(x)`, a Gelu written out and the like become one table if nothing between their input and their result is
read by anything else. A value that something else reads is rounded, and what follows starts from there.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

import onnx_ir as ir

__all__ = ["Roots", "find_roots"]


@dataclass
class Roots:
    """What functions of one number come to.

    Attributes:
        rounded: Results of functions that are rounded.
        sources: For other results of functions, the value that they are a function of.
        several: Functions that turned out to be of several values.
    """

    rounded: set[ir.Value] = field(default_factory=set[ir.Value])
    sources: dict[ir.Value, ir.Value] = field(default_factory=dict[ir.Value, ir.Value])
    several: set[ir.Node] = field(default_factory=set[ir.Node])

    def of(self, value: ir.Value) -> ir.Value:
        """The rounded value that a value is a function of; itself if it is one, or is made by something else."""
        return value if value in self.rounded else self.sources.get(value, value)


def find_roots(
    nodes: Sequence[ir.Node], functions: Mapping[ir.Node, tuple[int, ...]], clamps: Mapping[ir.Node, ir.Node]
) -> Roots:
    """Find what to round.

    Args:
        nodes: All nodes, makers before readers.
        functions: Nodes that are functions, number by number, of these inputs.
        clamps: For some functions the Relu or Clip that belongs to them if they are of several values.
    """
    roots, known = Roots(), -1
    while known < len(roots.rounded):  # what is rounded ends chains, which makes others functions of several values
        known = len(roots.rounded)
        absorbed = _trace(nodes, functions, clamps, roots)
        _end_chains(nodes, functions, roots, absorbed)
    return roots


def _trace(
    nodes: Sequence[ir.Node],
    functions: Mapping[ir.Node, tuple[int, ...]],
    clamps: Mapping[ir.Node, ir.Node],
    roots: Roots,
) -> set[ir.Node]:
    """Follow sources from inputs to outputs; returns the clamps that belong to functions of several values."""
    roots.sources.clear()
    absorbed: set[ir.Node] = set()
    for node in nodes:
        if node not in functions or node in absorbed:
            continue
        values = [node.inputs[index] for index in functions[node]]
        found = {roots.of(value) for value in values if value is not None}
        if len(found) == 1:
            roots.sources[node.outputs[0]] = found.pop()
        else:
            roots.several.add(node)
            if node in clamps:
                absorbed.add(clamps[node])
    return absorbed


def _end_chains(
    nodes: Sequence[ir.Node],
    functions: Mapping[ir.Node, tuple[int, ...]],
    roots: Roots,
    absorbed: Collection[ir.Node],
) -> None:
    """Round what something else than a function reads, and what leads to several rounded values."""
    ends: dict[ir.Value, set[ir.Value]] = {}
    for node in reversed(nodes):
        value = node.outputs[0] if node.outputs else None
        if value is None or value not in roots.sources or node in absorbed:
            continue
        users = [user for user, _ in value.uses()]
        inner = all(user in functions and user.outputs[0] in roots.sources for user in users)
        inner = inner and all(user.graph is node.graph for user in users) and not value.is_graph_output()
        found = {end for user in users for end in ends.get(user.outputs[0], ())} if inner else set[ir.Value]()
        if len(found) != 1 and (users or value.is_graph_output()):
            roots.rounded.add(value)
        ends[value] = {value} if value in roots.rounded else found
