"""Names that find one value or one node in a whole model.

ONNX lets the branches of an If use the same names, and nodes need no names at all. Facts go by name nevertheless, so
whatever shares its name with another is called after the place where it stands: `node/attribute/name`. Values of the
main graph keep theirs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import count
from typing import TypeVar

import onnx_ir as ir

__all__ = ["Names", "Scope", "subgraphs"]

_T = TypeVar("_T")


@dataclass(frozen=True, eq=False)
class Scope:
    """A graph with the place where it stands.

    Attributes:
        graph: The main graph, or one inside a node.
        path: `node/attribute`, from the main graph down; empty for the main graph.
        owner: The node that holds it, None for the main graph.
    """

    graph: ir.Graph
    path: str = ""
    owner: ir.Node | None = None


class Names:
    """Names of all values and nodes of a model, its functions left out; they hold until the model changes.

    Two models of the same structure, such as a model and its clone, have the same names.

    Args:
        model: The model; None gives values their own names.
    """

    def __init__(self, model: ir.Model | None = None) -> None:
        self.scopes: tuple[Scope, ...] = () if model is None else tuple(_scopes(Scope(model.graph)))
        self.renamed = _distinct(list(_values(self.scopes))) if len(self.scopes) > 1 else {}

    def key(self, value: ir.Value) -> str:
        """What a value is called; empty for an output that is left out."""
        if self.renamed and value in self.renamed:
            return self.renamed[value]
        return value.name or ""

    def label(self, node: ir.Node) -> str:
        """What a node is called in reports; it must be one of the model's."""
        return self.labels[node]

    def order(self) -> Iterator[str]:
        """What nodes are called, in the order in which they run: those inside a node follow it."""
        return (self.labels[node] for node in _nodes(self.scopes[0].graph)) if self.scopes else iter(())

    def values(self) -> Iterator[ir.Value]:
        """Every value that has a name, once."""
        return (value for value, _, _ in _values(self.scopes))

    def value(self, key: str) -> ir.Value | None:
        """The value of a name."""
        return self._by_key.get(key)

    @cached_property
    def labels(self) -> dict[ir.Node, str]:
        """What each node is called: those of the main graph first, then graph by graph."""
        wanted = ((node, _base(node, i), scope.path) for scope in self.scopes for i, node in enumerate(scope.graph))
        nodes = list(wanted)
        return {node: base for node, base, _ in nodes} | _distinct(nodes)

    def place(self, node: ir.Node) -> str | None:
        """Where a node stands: `inside the subgraph of If 'choice'`, None in the main graph."""
        return self._places.get(node.graph) if isinstance(node.graph, ir.Graph) else None

    def owner(self, graph: ir.Graph) -> ir.Node | None:
        """The node that holds a graph of the model; None for the main graph."""
        return self._owners.get(graph)

    @cached_property
    def _owners(self) -> dict[ir.Graph, ir.Node]:
        return {scope.graph: scope.owner for scope in self.scopes if scope.owner is not None}

    @cached_property
    def _places(self) -> dict[ir.Graph, str]:
        return {g: f"inside the subgraph of {o.op_type} {self.labels[o]!r}" for g, o in self._owners.items()}

    @cached_property
    def _by_key(self) -> dict[str, ir.Value]:
        return {self.key(value): value for value in self.values()}


def subgraphs(node: ir.Node) -> Iterator[tuple[str, ir.Graph]]:
    """Graphs in the attributes of a node, with where they stand in it."""
    for attribute in node.attributes.values():
        if attribute.is_ref():
            continue
        if attribute.type == ir.AttributeType.GRAPH:
            yield attribute.name, attribute.as_graph()
        elif attribute.type == ir.AttributeType.GRAPHS:
            yield from ((f"{attribute.name}{i}", graph) for i, graph in enumerate(attribute.as_graphs()))


def _base(node: ir.Node, index: int) -> str:
    return node.name or f"{node.op_type}_{index}"


def _scopes(scope: Scope) -> Iterator[Scope]:
    """A graph and all graphs inside it, in the order in which they run."""
    yield scope
    for i, node in enumerate(scope.graph):
        for attribute, graph in subgraphs(node):
            place = f"{_base(node, i)}/{attribute}"
            yield from _scopes(Scope(graph, f"{scope.path}/{place}" if scope.path else place, node))


def _nodes(graph: ir.Graph) -> Iterator[ir.Node]:
    for node in graph:
        yield node
        for _, inner in subgraphs(node):
            yield from _nodes(inner)


def _values(scopes: Sequence[Scope]) -> Iterator[tuple[ir.Value, str, str]]:
    """Every named value once, with its name and where it stands."""
    for scope in scopes:
        own = (*scope.graph.inputs, *scope.graph.initializers.values())
        for value in dict.fromkeys((*own, *(output for node in scope.graph for output in node.outputs))):
            if value.name:
                yield value, value.name, scope.path


def _distinct(wanted: Sequence[tuple[_T, str, str]]) -> dict[_T, str]:
    """Names for those that share theirs; the first in the main graph keeps it."""
    counts = Counter(name for _, name, _ in wanted)
    taken, met, found = set(counts), set[str](), dict[_T, str]()
    for item, name, path in wanted:
        if counts[name] > 1 and (path or name in met):
            stem = f"{path}/{name}" if path else name
            found[item] = next(key for i in count(1) if (key := f"{stem}_{i}" if i > 1 else stem) not in taken)
            taken.add(found[item])
        met.add(name)
    return found
