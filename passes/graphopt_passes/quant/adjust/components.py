"""Sets of channels that can be scaled together: what makes them, what reads them, and who fixes the others."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from graphopt.analyses import Shapes
from graphopt.analyses.channels.partition import Indices, Partition
from graphopt_passes.quant.adjust.rules import CONTRIB_RULES, RULES
from graphopt_passes.quant.adjust.scales import ScaleMap, Term, apply_rule

__all__ = ["Component", "components", "find_scales", "fixed_layers"]


@dataclass(frozen=True, eq=False)
class Component:
    """Channels that meet on some axis, and so share ranges.

    Attributes:
        roots: Their free sets of atoms, ascending.
        values: Activations that carry them, in the graph's order.
        makers: Constants that are multiplied by their factors.
        readers: Constants that are divided by them.
    """

    roots: Indices
    values: tuple[ir.Value, ...]
    makers: tuple[Term, ...]
    readers: tuple[Term, ...]

    def slots(self, scales: ScaleMap, atoms: Indices) -> Indices:
        """Which of the factors an atom has; one that is fixed has the number after the last."""
        roots = scales.roots(atoms)
        found = np.minimum(np.searchsorted(self.roots, roots), len(self.roots) - 1)
        return np.where(self.roots[found] == roots, found, len(self.roots))


def find_scales(model: ir.Model, shapes: Shapes) -> ScaleMap:
    """Apply the rules to the main graph."""
    scales = ScaleMap()
    for node in model.graph:
        rules = RULES if node.domain in ("", "ai.onnx") else CONTRIB_RULES
        rule = None if node.op_identifier() in model.functions else rules.get(node.op_type)
        apply_rule(scales, node, shapes, rule)
    return scales


def components(scales: ScaleMap) -> list[Component]:
    """Collect the free channels, in the order in which they are made."""
    joint = Partition()
    joint.new(len(scales.partition))
    for atoms in scales.values.values():
        free = _free_roots(scales, atoms)
        joint.unite(np.full_like(free[1:], free[0] if len(free) else 0), free[1:])
    roots = _free_roots(scales, np.arange(len(scales.partition)))
    names = joint.find(roots)
    values, makers, readers = dict[int, list[ir.Value]](), dict[int, list[Term]](), dict[int, list[Term]]()
    for value, atoms in scales.values.items():
        for name in _names(scales, joint, atoms):
            values.setdefault(name, []).append(value)
    for term in scales.terms:
        for side, found in ((term.made, makers), (term.read, readers)):
            for name in [] if side is None else _names(scales, joint, side):
                found.setdefault(name, []).append(term)
    return [
        Component(
            roots[names == name],
            tuple(values[name]),
            tuple(makers.get(name, ())),
            tuple(readers.get(name, ())),
        )
        for name in sorted(values)
    ]


def fixed_layers(scales: ScaleMap) -> Mapping[ir.Node, str]:
    """Layers whose output channels are all fixed, and why."""
    reasons = scales.reasons()
    found: dict[ir.Node, str] = {}
    for term in scales.terms:
        if term.layer and term.made is not None and not scales.free(term.made).any():
            found[term.node] = reasons[int(scales.roots(term.made).reshape(-1)[0])]
    return found


def _free_roots(scales: ScaleMap, atoms: Indices) -> Indices:
    flat = atoms.reshape(-1)
    return np.unique(scales.roots(flat[scales.free(flat)]))


def _names(scales: ScaleMap, joint: Partition, atoms: Indices) -> list[int]:
    return np.unique(joint.find(_free_roots(scales, atoms))).tolist()
