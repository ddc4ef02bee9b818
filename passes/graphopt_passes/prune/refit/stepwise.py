"""A model run piece by piece on many samples, so that no layer is computed twice although weights change on the way."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import onnx_ir as ir

from graphopt.analyses.streaming import ahead
from graphopt.pass_base import Context
from graphopt.reference import Feed, Reference

__all__ = ["Stepwise", "reads"]

_KEPT_BYTES = 256 << 20


def reads(node: ir.Node) -> Iterator[ir.Value]:
    """Values that a node reads, those that its subgraphs capture included."""
    yield from (value for value in node.inputs if value is not None)
    for attribute in node.attributes.values():
        graphs = (
            (attribute.as_graph(),)
            if attribute.type == ir.AttributeType.GRAPH
            else attribute.as_graphs()
            if attribute.type == ir.AttributeType.GRAPHS
            else ()
        )
        for graph in graphs:
            yield from graph.outputs
            for inner in graph:
                yield from reads(inner)


class Stepwise:
    """Values of a model on batches of samples, asked for in the graph's order.

    What later nodes need, and what was asked for, is kept between two calls where it fits into memory; where it does
    not, the next call starts from what was kept last. Weights behind the last position may change between calls.

    Args:
        model: The model, in topological order.
        feeds: The batches.
        ctx: How ONNX Runtime runs.
    """

    def __init__(self, model: ir.Model, feeds: Sequence[Feed], ctx: Context) -> None:
        self.model, self.ctx, self.feeds = model, ctx, feeds
        self.order = {id(node): i for i, node in enumerate(model.graph)}
        self.kept: list[Feed] | None = None
        self.position = -1
        fed = [value for value in model.graph.inputs if value.name not in model.graph.initializers]
        self.values = {value.name or "": value for value in fed}
        self.born, self.dies = dict.fromkeys(self.values, -1), dict.fromkeys(self.values, -1)
        for i, node in enumerate(model.graph):
            computed = False
            for value in reads(node):
                if (name := value.name or "") in self.born:
                    self.dies[name], computed = i, True
            if computed:  # what follows from constants alone is made anew in every piece
                self.values |= {output.name or "": output for output in node.outputs if output.name}
                self.born |= {output.name: i for output in node.outputs if output.name}

    def run(self, position: int, wanted: Sequence[str]) -> Iterator[list[np.ndarray]]:
        """Run the nodes before a position and yield values, batch after batch; to be read to the end.

        While a batch is looked at, another thread computes the next one.

        Args:
            position: Index of a node; not before that of the last call.
            wanted: Names of values that nodes before it compute, or of inputs; not constants.

        Raises:
            ModelError: ONNX Runtime cannot run this piece.
        """
        self.position = position
        live = [n for n, born in self.born.items() if born < position <= self.dies.get(n, -1)]
        start = self.feeds if self.kept is None else self.kept
        have = [name for name in start[0] if name in self.values]
        keep = list(dict.fromkeys((*live, *wanted)))
        outputs = [name for name in keep if name not in have]
        session = self._piece(start[0], have, outputs) if outputs else None
        kept: list[Feed] | None = []
        for found in ahead(lambda feed: {**feed, **session.run(feed, outputs)} if session else feed, start):
            if kept is not None:
                kept.append({name: found[name] for name in keep})
                kept = kept if _is_light(kept[0], len(start)) else None
            yield [found[name] for name in wanted]
        self.kept = self.kept if kept is None else kept

    def resume(self, other: Stepwise) -> None:
        """Go on from where another run of the same model on the same batches stands; weights behind it have changed."""
        self.kept, self.position = other.kept, other.position

    def _piece(self, feed: Feed, inputs: Sequence[str], outputs: Sequence[str]) -> Reference:
        graph = ir.convenience.extract(self.model.graph, [self.values[n] for n in inputs], list(outputs))
        for value in graph.inputs:
            if self.born[name := value.name or ""] >= 0:
                value.type = ir.TensorType(ir.DataType.from_numpy(feed[name].dtype))
                value.shape = ir.Shape([None] * feed[name].ndim)
        for value in graph.outputs:
            value.shape = None  # the runtime knows better than a stale annotation
        piece = ir.Model(graph, ir_version=self.model.ir_version, functions=list(self.model.functions.values()))
        return Reference(piece, threads=self.ctx.threads, extensions=self.ctx.extensions)


def _is_light(feed: Feed, count: int) -> bool:
    """Whether so many feeds of this size can be kept; sequences and texts never are."""
    arrays: list[object] = list(feed.values())
    plain = [array for array in arrays if isinstance(array, np.ndarray) and array.dtype.kind != "O"]
    return len(plain) == len(arrays) and sum(array.nbytes for array in plain) * count <= _KEPT_BYTES
