"""Turn a quantized model back into a float one, so that it can be quantized anew."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import onnx_ir as ir

from graphopt.analyses.quantized import find_quantized
from graphopt.opset import opset_version
from graphopt.pass_base import Change
from graphopt_passes.quant.builder import Builder
from graphopt_passes.quant.existing.floats import Floats
from graphopt_passes.quant.existing.moves import MOVES
from graphopt_passes.quant.existing.operators import OPERATORS
from graphopt_passes.quant.existing.products import PRODUCTS
from graphopt_passes.quant.prepare import drop_unread

__all__ = ["Undone", "as_floats", "dequantize_model"]

_HANDLERS: Mapping[str, Callable[[Floats, ir.Node], str]] = {**MOVES, **OPERATORS, **PRODUCTS}


@dataclass(frozen=True)
class Undone:
    """What became of the quantized layers of a model.

    Attributes:
        layers: How each layer that is float now was quantized, by the name of its node.
        left: Layers that stayed as they were, with the reason.
    """

    layers: Mapping[str, str] = field(default_factory=dict[str, str])
    left: tuple[Change, ...] = ()

    def told(self, changes: Sequence[Change]) -> tuple[Change, ...]:
        """Changes of the layers since, with how each was quantized before, and the layers that stayed."""
        known = {change.site for change in self.left}
        since = (change for change in changes if change.site not in known)
        return (*self.left, *(self._with_past(change) for change in since))

    def _with_past(self, change: Change) -> Change:
        was = self.layers.get(change.site)
        return change if was is None else replace(change, details={**change.details, "was": was})


def as_floats(model: ir.Model) -> tuple[ir.Model, Undone]:
    """A copy of a model whose quantized layers are float again."""
    copy = model.clone()
    return copy, dequantize_model(copy)


def dequantize_model(model: ir.Model) -> Undone:
    """Turn everything quantized into floats, in place.

    Weights become float initializers, computed only where they are read; activations are no longer rounded; operators
    on integers become the float operators they stand for. Where a grid without negative numbers did the work of a
    Relu or Clip that its quantizer took away, a Clip does it again. Inputs and outputs keep names and types.

    Leaves alone what it cannot follow: grids that are computed, integers that come from an input, fused operators such
    as QAttention.
    """
    before = {node: (node.name or "", str(layer)) for node, layer in find_quantized(model).items()}
    floats = Floats(Builder(model), opset_version(model))
    reasons: dict[ir.Node, str] = {}
    for graph in _outside_in(model.graph):
        for node in list(graph):
            handler = _HANDLERS.get(node.op_type)
            reason = handler(floats, node) if handler is not None else ""
            if reason:
                reasons[node] = reason
    _sweep(model, floats)
    after = find_quantized(model)
    gone = {node: text for node, text in before.items() if node not in after}
    layers = {floats.names.get(node) or _plain(name): text for node, (name, text) in gone.items()}
    left = [
        Change.skipped(node.name or node.op_type, f"stays quantized ({layer}): {_reason(node, reasons)}")
        for node, layer in after.items()
    ]
    return Undone(layers, tuple(left))


def _reason(node: ir.Node, reasons: Mapping[ir.Node, str]) -> str:
    """Why a node is still quantized: its own reason, or that of an operator right before it."""
    makers = (value.producer() for value in node.inputs if value is not None)
    found = (reasons[near] for near in (node, *makers) if near is not None and near in reasons)
    return next(
        found, "no float form is known" if node.op_type not in _HANDLERS else "its integers come from elsewhere"
    )


def _outside_in(graph: ir.Graph) -> list[ir.Graph]:
    """A graph and all graphs inside it; a subgraph reads what its surroundings made before it."""
    return [graph, *graph.subgraphs()]


def _plain(name: str) -> str:
    """Name of a layer without what quantizers add to it."""
    for suffix in ("_quant", "_Q2", "_Q4", "_Q8"):
        name = name.removesuffix(suffix)
    return name


def _tell_apart(model: ir.Model, floats: Floats) -> None:
    """Rename nodes that have the name of another one, as where integers stay beside their float form."""
    taken: set[str] = set()
    for graph in model.graphs():
        for node in graph:
            if node.name and node.name in taken:
                node.name = floats.builder.name(node.name)
            taken.add(node.name or "")


def _sweep(model: ir.Model, floats: Floats) -> None:
    """Remove what was replaced, and what only served it, inner graphs first."""
    dead = dict.fromkeys(floats.replaced)
    for graph in reversed(list(model.graphs())):
        for node in reversed(list(graph)):
            unread = all(not output.uses() and not output.is_graph_output() for output in node.outputs)
            if unread and node in dead:
                makers = (value.producer() for value in node.inputs if value is not None)
                dead |= dict.fromkeys(maker for maker in makers if maker is not None)
                graph.remove(node, safe=True)
    drop_unread(model)
    _tell_apart(model, floats)
