"""Where the units of a channel group are read: the activations at which their way through the graph ends."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import onnx_ir as ir

from graphopt.analyses.channels import ChannelGroup, Place
from graphopt.analyses.constants import CONSTANTS
from graphopt.analyses.linear_inputs import LINEAR_LAYERS
from graphopt.pass_base import Context

__all__ = ["UnitUse", "unit_uses"]


_SIZES = frozenset({"Shape", "Size"})


@dataclass(frozen=True, eq=False)
class UnitUse:
    """An activation whose channels a node sums up, so that units are gone behind it.

    Attributes:
        place: Where the units sit on the activation.
        value: The activation.
        node: The node that reads it.
        index: Which of its inputs it is.
        layer: Name of the node if it is a linear layer with a weight that has the units as inputs.
        weight: Where the units sit on that weight.
    """

    place: Place
    value: ir.Value
    node: ir.Node
    index: int
    layer: str | None = None
    weight: Place | None = None


def unit_uses(group: ChannelGroup, ctx: Context) -> Iterator[UnitUse]:
    """Find where the units of a group are read, in the main graph and in subgraphs.

    A linear layer reads units where its weight has them as inputs, even if what it makes is added to the same channels
    again; any other node reads them where none of its outputs has them.
    """
    names, linear = ctx.fact(CONSTANTS).names, ctx.fact(LINEAR_LAYERS)
    inputs = [place for place in group.places if place.constant and place.role == "input"]
    weights = {label: place for place in inputs for label in linear.weights.get(place.value, ())}
    carried = {place.value for place in group.places if not place.constant}
    for place in group.places:
        value = None if place.constant else names.value(place.value)
        if value is None:
            continue
        for use in value.uses():
            if use.node.op_type in _SIZES:
                continue
            label = names.label(use.node)
            if label in weights and linear.reads[label].source == place.value:
                yield UnitUse(place, value, use.node, use.idx, label, weights[label])
            elif not any(names.key(output) in carried for output in use.node.outputs):
                yield UnitUse(place, value, use.node, use.idx)
