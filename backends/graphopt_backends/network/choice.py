"""Choices: a Where whose condition is a single boolean takes one of two values as a whole.

What only the value that is not taken needs is skipped: the kernels of such nodes run under the condition. This is how
both branches of an If become steps of one network.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import onnx_ir as ir

from graphopt_backends.kernels.condition import Guarded
from graphopt_backends.network.elementwise import is_choice
from graphopt_backends.network.network import Call, Network
from graphopt_backends.network.regions import Region
from graphopt_backends.network.views import View

__all__ = ["CHECKS", "CONVERTERS", "Guard", "find_guards", "put_under"]


@dataclass(frozen=True)
class Guard:
    """When a node is needed."""

    condition: ir.Value
    wanted: bool


def find_guards(graph: ir.Graph) -> dict[ir.Node, Guard]:
    """Nodes that only one side of a choice needs, and that stand behind its condition.

    Args:
        graph: Nodes in topological order.
    """
    places = {node: i for i, node in enumerate(graph)}
    found: dict[ir.Node, Guard] = {}
    for node in reversed(list(graph)):
        needs = {_need(user, index, found) for output in node.outputs for user, index in output.uses()}
        guard = needs.pop() if len(needs) == 1 else None
        if guard is None or any(output.is_graph_output() for output in node.outputs):
            continue
        maker = guard.condition.producer()
        if maker is None or (maker in places and places[maker] < places[node]):
            found[node] = guard
    return found


def _need(user: ir.Node, index: int, guards: Mapping[ir.Node, Guard]) -> Guard | None:
    if is_choice(user) and index > 0:
        condition = user.inputs[0]
        assert condition is not None
        return Guard(condition, index == 1)
    return guards.get(user)


def put_under(
    network: Network, first: int, guard: Guard, known: set[ir.Value], guards: Mapping[ir.Node, Guard]
) -> None:
    """Let calls run only if they are needed.

    Args:
        network: Where they are.
        first: The first of them; all behind it are theirs too.
        guard: When they are needed.
        known: Values that were there before them; what they made for others as well must always be there.
        guards: Of all nodes.
    """
    makers = [value.producer() for value in network.views if value not in known]
    if any(maker is not None and guards.get(maker) != guard for maker in makers):
        return
    condition = network.view(guard.condition)
    network.calls[first:] = [_guarded(call, condition, guard.wanted) for call in network.calls[first:]]


def _guarded(call: Call, condition: View, wanted: bool) -> Call:
    return Call(Guarded(call.kernel, wanted), (condition, *call.views), call.sites)


def _choose(network: Network, node: ir.Node, _: Region | None) -> None:
    condition, *sides = (network.input(node, i) for i in range(3))
    dense = [side for side in sides if side.is_dense and side.rank == len(node.outputs[0].shape or ())]
    result = network.new(node.outputs[0], dense[0].order if dense and dense[0].size > 1 else None)
    for side, wanted in zip(sides, (True, False), strict=True):
        first = len(network.calls)
        network.copy(side, result, node)
        network.calls[first:] = [_guarded(call, condition, wanted) for call in network.calls[first:]]


CONVERTERS: Mapping[str, Callable[[Network, ir.Node, Region | None], None]] = {"Where": _choose}

CHECKS: Mapping[str, Callable[[ir.Node], bool]] = {"Where": is_choice}
