"""What a model costs as a function of how many units each group gives up, without touching the model."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import onnx_ir as ir

from graphopt.allocation import Site, allocate
from graphopt.analyses import Constants, Cost, Shapes
from graphopt.analyses.channels import ChannelGroup

__all__ = ["Budget", "Facts", "ladder", "plan_global", "plan_uniform", "step_of"]

AxisName = tuple[str, int]
Measure = Literal["macs", "params", "bytes"]

_LEAST_KEPT = 1 / 8
_SMALL_LAYER_STEPS = 4


@dataclass(frozen=True)
class Facts:
    """What is known about a model."""

    cost: Cost
    shapes: Shapes
    constants: Constants


class Budget:
    """Cost of the whole model by units removed: a sum of terms, each proportional to the lengths of some axes.

    Args:
        model: The model.
        facts: What is known about it.
        groups: The groups that may lose units.
        of: What is counted.
    """

    def __init__(self, model: ir.Model, facts: Facts, groups: Sequence[ChannelGroup], of: Measure) -> None:
        counted = {(place.value, place.axis): place.size for group in groups for place in group.places}
        index = {axis: i for i, axis in enumerate(counted)}
        self.copies = np.zeros((len(counted), len(groups)))
        for column, group in enumerate(groups):
            for place in group.places:
                self.copies[index[place.value, place.axis], column] = place.positions.shape[1]
        self.sizes = np.array(list(counted.values()), dtype=np.float64)
        terms = list(_mac_terms(model, facts) if of == "macs" else _weight_terms(facts.constants, of))
        self.terms = [(amount, [index[axis] for axis in axes if axis in index]) for amount, axes in terms]
        self.rest = float(facts.cost.macs) - sum(amount for amount, _ in terms) if of == "macs" else 0.0
        self.whole = self.rest + sum(amount for amount, _ in terms)

    def after(self, removed: Sequence[int]) -> float:
        """Cost once group i has lost `removed[i]` units."""
        kept = 1.0 - self.copies @ np.asarray(removed, dtype=np.float64) / self.sizes
        return self.rest + sum(amount * math.prod(kept[axis] for axis in axes) for amount, axes in self.terms)


def _mac_terms(model: ir.Model, facts: Facts) -> Iterator[tuple[float, list[AxisName]]]:
    for i, node in enumerate(model.graph):
        counted = facts.cost.nodes.get(node.name or f"{node.op_type}_{i}")
        if counted is not None and counted.macs:
            yield float(counted.macs), list(_mac_axes(node, facts.shapes))


def _mac_axes(node: ir.Node, shapes: Shapes) -> Iterator[AxisName]:
    """Axes that the multiply-accumulates of a linear node are proportional to."""
    left, right = node.inputs[0], node.inputs[1]
    if left is None or right is None:
        return
    if node.op_type in ("Conv", "ConvTranspose"):
        yield from ((right.name or "", axis) for axis in (0, 1))
    elif node.op_type in ("Gemm", "MatMul"):
        yield from ((left.name or "", axis) for axis in range(shapes.rank(left) or 0))
        flipped = node.op_type == "Gemm" and node.attributes.get_int("transB", 0)
        yield right.name or "", 0 if flipped else (shapes.rank(right) or 1) - 1


def _weight_terms(constants: Constants, of: Measure) -> Iterator[tuple[float, list[AxisName]]]:
    for name, tensor in constants.tensors.items():
        amount = tensor.size if of == "params" else tensor.nbytes
        yield float(amount), [(name, axis) for axis in range(len(tensor.shape))]


def step_of(units: int, round_to: int, target_round_to: int) -> int:
    """Units that leave at a time: what was asked for, or the target's, halved until a small layer has four steps."""
    if round_to:
        return round_to
    step = max(1, target_round_to)
    while step > 1 and step * _SMALL_LAYER_STEPS > units:
        step //= 2
    return step


def ladder(units: int, step: int) -> list[int]:
    """All numbers of units that a group may lose, ascending from 0: multiples of `step` remain, an eighth at least."""
    least = max(1, math.ceil(units * _LEAST_KEPT))
    return [0, *(units - kept for kept in range((units - 1) // step * step, 0, -step) if kept >= least)]


def plan_uniform(budget: Budget, ladders: Sequence[Sequence[int]], units: Sequence[int], target: float) -> list[int]:
    """Take the same fraction from every group, then settle single steps so that `target` is hit.

    Args:
        budget: The cost model.
        ladders: What each group may lose.
        units: How many units each group has.
        target: Cost to come down to.
    """

    def at(fraction: float) -> list[int]:
        return [min(rungs, key=lambda lost: abs(lost - fraction * n)) for rungs, n in zip(ladders, units, strict=True)]

    low, high = 0.0, 1.0
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if budget.after(at(middle)) > target else (low, middle)
    return _settled(budget, ladders, min((at(low), at(high)), key=lambda p: abs(budget.after(p) - target)), target)


def plan_global(
    budget: Budget, ladders: Sequence[Sequence[int]], scores: Sequence[np.ndarray], target: float
) -> list[int]:
    """Take units wherever they cost least, then settle single steps so that `target` is hit.

    Savings of groups that meet in one layer multiply; tables are linear, so the budget is asked for again until the
    true cost agrees.

    Args:
        budget: The cost model.
        ladders: What each group may lose.
        scores: What each unit is worth, ascending.
        target: Cost to come down to.
    """
    alone = [budget.whole - budget.after(_only(len(ladders), i)) for i in range(len(ladders))]
    sites = [
        Site(str(i), np.array(rungs) * alone[i], np.array([float(scores[i][:lost].sum()) for lost in rungs]))
        for i, rungs in enumerate(ladders)
    ]
    wanted, plan = budget.whole - target, [0] * len(ladders)
    low, high = 0.0, 2.0 * wanted
    for _ in range(16):
        middle = (low + high) / 2
        choice = allocate(sites, middle).choice
        plan = [rungs[i] for rungs, i in zip(ladders, choice, strict=True)]
        low, high = (middle, high) if budget.after(plan) > target else (low, middle)
    return _settled(budget, ladders, plan, target)


def _only(count: int, index: int) -> list[int]:
    return [int(i == index) for i in range(count)]


def _settled(budget: Budget, ladders: Sequence[Sequence[int]], plan: list[int], target: float) -> list[int]:
    """Move single groups by one step, each at most once, as long as that comes closer to the target."""
    near = [rungs[max(0, (at := rungs.index(n)) - 1) : at + 2] for rungs, n in zip(ladders, plan, strict=True)]
    error = abs(budget.after(plan) - target)
    while True:
        changed = [[*plan[:i], other, *plan[i + 1 :]] for i, rungs in enumerate(near) for other in rungs]
        best = min(changed, key=lambda p: abs(budget.after(p) - target), default=plan)
        distance = abs(budget.after(best) - target)
        if distance >= error * (1 - 1e-12):
            return plan
        error, plan = distance, best
