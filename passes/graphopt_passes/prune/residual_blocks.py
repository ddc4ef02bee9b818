"""Residual blocks: what lies between a value and the sum that adds it to what was made of it.

A block is a sum `s = x + F(x)` whose F serves nothing else, so that `s` can become `x`. The shortcut may pass through
operators that keep shapes (an Identity, an activation, a normalization): then `s` becomes what comes out of them. What
else F reads (masks, positions, other branches) does not matter, as long as nobody else reads what it computes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import onnx_ir as ir

from graphopt.analyses import Constants, Shapes
from graphopt.analyses.names import Names
from graphopt.errors import PassError
from graphopt_passes.prune.refit.stepwise import reads

__all__ = ["Block", "find_blocks", "join_shortcuts", "remove_block"]

_LAYERS = frozenset(
    {
        "Attention", "Conv", "ConvInteger", "ConvTranspose", "Einsum", "GRU", "Gemm", "GroupQueryAttention", "LSTM",
        "MatMul", "MatMulInteger", "MatMulNBits", "MultiHeadAttention", "QLinearConv", "QLinearMatMul", "RNN",
    }
)  # fmt: skip
_ON_SHORTCUTS = frozenset(
    {
        "BatchNormalization", "Cast", "Clip", "Dropout", "Elu", "Gelu", "HardSwish", "Identity", "LayerNormalization",
        "LeakyRelu", "PRelu", "RMSNormalization", "Relu", "Sigmoid", "SimplifiedLayerNormalization", "Tanh",
    }
)  # fmt: skip


@dataclass(frozen=True)
class Block:
    """A residual block.

    Attributes:
        name: Name of the sum's node.
        operator: Its operator, Add or Sum.
        output: Name of the sum.
        shortcut: Which operand of the sum stays, 0 or 1.
        nodes: Indices of the nodes that go, in the graph's order; the sum is not among them.
        layers: Names and operators of the layers among them.
    """

    name: str
    operator: str
    output: str
    shortcut: int
    nodes: tuple[int, ...]
    layers: tuple[tuple[str, str], ...]


def find_blocks(model: ir.Model, shapes: Shapes, constants: Constants) -> tuple[list[Block], list[tuple[str, str]]]:
    """Find the blocks of the main graph, nested ones included.

    Args:
        model: The model, in topological order.
        shapes: Its shapes; they have to prove that a sum has the shape of its shortcut.
        constants: Its constants.

    Returns:
        The blocks in the graph's order, and sums that are none with the reason. Sums without a layer on either side,
        such as those inside of activations and masks, are not mentioned.
    """
    finder = _Finder(model, shapes, constants)
    blocks, refused = list[Block](), list[tuple[str, str]]()
    for node in model.graph:
        if node.op_type in ("Add", "Sum") and node.domain in ("", "ai.onnx") and len(node.inputs) == 2:
            found = finder.look(node)
            if isinstance(found, Block):
                blocks.append(found)
            elif found is not None:
                refused.append((finder.label(node), found))
    return blocks, refused


class _Finder:
    """What the search needs to know of the graph."""

    def __init__(self, model: ir.Model, shapes: Shapes, constants: Constants) -> None:
        self.shapes, self.constants = shapes, constants
        self.nodes = list(model.graph)
        self.order = {id(node): i for i, node in enumerate(self.nodes)}
        self.label = Names(model).label

    def look(self, node: ir.Node) -> Block | str | None:
        """The block that a sum closes, why it closes none, or None where it is no sum of branches."""
        operands = [value for value in node.inputs if value is not None and self.constants.of(value) is None]
        if len(operands) != 2 or operands[0] is operands[1]:
            return None
        branches = [self._ancestors(value) for value in operands]
        for shortcut in (0, 1):
            between = self._between(operands[shortcut], branches[1 - shortcut])
            if any(self.nodes[i].op_type in _LAYERS for i in between):
                return self._block(node, shortcut, between, branches[1 - shortcut])
        return self._no_shortcut(node, operands, branches)

    def _ancestors(self, value: ir.Value) -> list[int]:
        """Nodes that a value is made by, in the graph's order."""
        found, waiting = set[int](), [value]
        while waiting:
            producer = waiting.pop().producer()
            at = None if producer is None else self.order.get(id(producer))
            if producer is not None and at is not None and at not in found:
                found.add(at)
                waiting.extend(reads(producer))
        return sorted(found)

    def _between(self, shortcut: ir.Value, branch: Sequence[int]) -> list[int]:
        """Nodes of a branch that follow from its shortcut, or from what the shortcut passes on."""
        passed_on = {id(value) for value in self._passed_on(shortcut)}
        sources, found = set(passed_on), list[int]()
        for i in branch:
            outputs = {id(output) for output in self.nodes[i].outputs}
            if not outputs & passed_on and any(id(value) in sources for value in reads(self.nodes[i])):
                found.append(i)
                sources |= outputs
        return found

    def _passed_on(self, value: ir.Value) -> Iterator[ir.Value]:
        yield value
        while (node := value.producer()) is not None and node.op_type in _ON_SHORTCUTS and node.inputs[0] is not None:
            value = node.inputs[0]
            yield value

    def _block(self, node: ir.Node, shortcut: int, between: Sequence[int], branch: Sequence[int]) -> Block | str | None:
        before, after = self.shapes.of(node.inputs[shortcut]), self.shapes.of(node.outputs[0])
        if before is not None and after is not None and _is_broadcast(before, after):
            return None  # a mask or a bias
        if before is None or after is None or before != after or None in before:
            return f"its shortcut has shape {_text(before)} and the sum {_text(after)}, not known to be equal"
        inside = self._private(node, 1 - shortcut, branch)
        outside = next((i for i in between if i not in inside), None)
        if outside is not None:
            last = next(i for i in reversed(between) if i not in inside)
            return self._reader(self.nodes[last], inside, node)
        name, layers = self.label(node), [self.nodes[i] for i in sorted(inside) if self.nodes[i].op_type in _LAYERS]
        named = tuple((self.label(layer), layer.op_type) for layer in layers)
        return Block(name, node.op_type, node.outputs[0].name or "", shortcut, tuple(sorted(inside)), named)

    def _private(self, node: ir.Node, operand: int, branch: Sequence[int]) -> set[int]:
        """Nodes of a branch whose outputs nothing reads but each other and one operand of the sum."""
        inside = set[int]()
        for i in reversed(branch):
            outputs = self.nodes[i].outputs
            if not any(output.is_graph_output() for output in outputs) and all(
                self.order.get(id(user)) in inside or (user is node and index == operand)
                for output in outputs
                for user, index in output.uses()
            ):
                inside.add(i)
        return inside

    def _reader(self, inner: ir.Node, inside: set[int], node: ir.Node) -> str:
        """Why a node on the way from the shortcut to the sum has to stay."""
        for output in inner.outputs:
            if output.is_graph_output():
                return f"{output.name!r} inside the block is an output of the graph"
            for user, _ in output.uses():
                if id(user) not in self.order:
                    return f"{output.name!r} inside the block is captured by a subgraph"
                if user is not node and self.order[id(user)] not in inside:
                    return f"{output.name!r} inside the block is read by {user.op_type} {self.label(user)!r} outside"
        return f"{inner.op_type} {self.label(inner)!r} inside the block serves more than its sum"

    def _no_shortcut(
        self, node: ir.Node, operands: Sequence[ir.Value], branches: Sequence[Sequence[int]]
    ) -> str | None:
        """Say so where two branches of one value meet, and a layer lies on one of them."""
        left, right = (set(branch) for branch in branches)
        fork = max(left & right, default=None)
        layers = [i for i in left ^ right if self.nodes[i].op_type in _LAYERS]
        rank = self.shapes.rank(node.outputs[0])
        if fork is None or not layers or self.shapes.rank(self.nodes[fork].outputs[0]) != rank:
            return None
        own = [sum(self.nodes[i].op_type in _LAYERS for i in branch if i > fork) for branch in branches]
        end = list(self._passed_on(operands[int(own[1] < own[0])]))[-1].producer()
        if end is None:
            return None
        return f"its shortcut passes through {end.op_type} {self.label(end)!r}, so the sum cannot become its input"


def _is_broadcast(dims: Sequence[int | str | None], into: Sequence[int | str | None]) -> bool:
    """Whether an operand is repeated in a sum: fewer axes, or an axis of size 1 where the sum's is another number."""
    if len(dims) != len(into):
        return True
    return any(dim == 1 and isinstance(other, int) and other > 1 for dim, other in zip(dims, into, strict=True))


def _text(dims: Sequence[int | str | None] | None) -> str:
    return "unknown" if dims is None else "x".join("?" if dim is None else str(dim) for dim in dims) or "scalar"


def remove_block(model: ir.Model, block: Block) -> None:
    """Let a block's sum pass its shortcut on, and remove what served the rest of it alone.

    The sum keeps its node and name, as an Identity; `join_shortcuts` takes it away. Other blocks of the same model
    stay what they are, unless they lie inside.

    Args:
        model: The model that the block was found in, or a copy.
        block: The block.

    Raises:
        PassError: The model has no such sum.
    """
    node = _sum(model, block)
    made = node.inputs[1 - block.shortcut]
    if block.shortcut:
        node.replace_input_with(0, node.inputs[1])
    node.resize_inputs(1)
    node.op_type = "Identity"
    if made is not None:
        _sweep(model.graph, made)


def join_shortcuts(model: ir.Model, blocks: Sequence[Block]) -> None:
    """Let the readers of removed blocks read their shortcuts; a sum that is an output of its graph keeps its Identity.

    Args:
        model: A model without those blocks.
        blocks: The blocks that were removed, nested ones included.
    """
    left = {node.outputs[0].name: node for node in model.graph if node.op_type == "Identity"}
    for block in blocks:
        node = left.get(block.output)
        source = None if node is None else node.inputs[0]
        if node is not None and source is not None and not node.outputs[0].is_graph_output():
            node.outputs[0].replace_all_uses_with(source)
            model.graph.remove(node, safe=True)


def _sum(model: ir.Model, block: Block) -> ir.Node:
    for node in model.graph:
        if node.outputs[0].name == block.output and len(node.inputs) == 2:
            return node
    raise PassError(f"prune: {block.name}", f"no sum makes {block.output!r}")


def _sweep(graph: ir.Graph, value: ir.Value) -> None:
    """Remove a value that nothing reads any more, with all that was computed for it alone."""
    waiting = [value]
    while waiting:
        value = waiting.pop()
        if value.uses() or value.is_graph_output() or value.is_graph_input():
            continue
        node = value.producer()
        if node is None:
            if graph.initializers.get(value.name or "") is value:
                graph.initializers.pop(value.name or "")
        elif node.graph is graph and not any(output.uses() or output.is_graph_output() for output in node.outputs):
            waiting.extend(list(reads(node)))
            _detach(node)
            graph.remove(node, safe=True)


def _detach(node: ir.Node) -> None:
    """Let the subgraphs of a node that goes read nothing any more."""
    for attribute in node.attributes.values():
        graphs = (
            (attribute.as_graph(),)
            if attribute.type == ir.AttributeType.GRAPH
            else tuple(attribute.as_graphs())
            if attribute.type == ir.AttributeType.GRAPHS
            else ()
        )
        for graph in graphs:
            for inner in graph:
                _detach(inner)
                for i in range(len(inner.inputs)):
                    inner.replace_input_with(i, None)
