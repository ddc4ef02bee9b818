"""What the model's outputs lose, measured on a few samples without labels.

A change of one layer is felt behind it alone: what comes before is computed once for all questions that are asked in
the graph's order.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnx_ir as ir

from graphopt.analyses import CONSTANTS
from graphopt.analyses.padding import PADDING, heeded_rows
from graphopt.calibration import Dataset
from graphopt.pass_base import Context
from graphopt.reference import Feed, Reference
from graphopt_passes.lowrank.places import Place
from graphopt_passes.prune.refit.linear_layers import LinearLayer
from graphopt_passes.prune.refit.stepwise import Stepwise

__all__ = ["Judge", "Loss"]

Array = np.ndarray[Any, np.dtype[Any]]

_SAMPLES, _FEWEST = 16, 4
_ROWS = 128


@dataclass(frozen=True)
class Loss:
    """How far outputs are from the original's.

    Attributes:
        energy: Energy of the error in parts of that of the outputs' spread, the mean over all outputs.
        nats: Divergence of the classes that rows of an output would stand for if they were scores before a softmax, the
            mean over its rows, the most of all outputs. A language model's perplexity grows by its exponential; of
            outputs that are no scores it is small, as long as their greatest elements stay where they are.
    """

    energy: float = 0.0
    nats: float = 0.0


class Judge:
    """Compares outputs of changed models with the original's.

    Args:
        model: The original; it must not change while it is asked about single layers.
        data: Samples, of which 16 are used, evenly spread; for single layers as many of these, 4 at least, as make 128
            rows of an output: positions of a sequence tell what a layer matters as well as samples do.
        ctx: How ONNX Runtime runs.

    Raises:
        ModelError: ONNX Runtime cannot run the model.
    """

    def __init__(self, model: ir.Model, data: Dataset, ctx: Context) -> None:
        self._model, self._ctx = model, ctx
        self._mask = ctx.fact(PADDING)
        self._feeds = _spread(data)
        self._wanted = self._outputs(model, self._feeds)
        rows = max((len(array) for array in self._wanted.values()), default=0)
        self._few = _some(self._feeds, max(_FEWEST, -(-_ROWS * len(self._feeds) // max(1, rows))))
        self._wanted_of_few = self._outputs(model, self._few)
        self._before = Stepwise(model, self._few, ctx)

    @property
    def sees(self) -> bool:
        """Whether there are outputs to compare."""
        return bool(self._wanted)

    def loss(self, model: ir.Model) -> Loss:
        """What a changed model loses."""
        pairs = _pairs(self._wanted, self._outputs(model, self._feeds))
        return Loss(_mean_lost(pairs), max((_divergence(*pair) for pair in pairs), default=0.0))

    def lost_by(self, name: str, dense: Array, shift: Array) -> float:
        """What the outputs lose if one layer alone has another weight and bias.

        Args:
            name: Name of the layer.
            dense: `[inputs, outputs]`, or of each part, as `Place.matrices` gives it.
            shift: `[outputs]`: what the bias gains; zero where the layer cannot have one.
        """
        work = self._model.clone()
        inner = replace(self._ctx, model=work, _facts={})
        constants = inner.fact(CONSTANTS)
        node = next(node for node, label in constants.names.labels.items() if label == name)
        if shift.any():
            layer = LinearLayer.of(node, constants)
            assert isinstance(layer, LinearLayer)
            layer.add(work.graph, np.zeros((1, layer.inputs, layer.outputs)), shift[None])
        place = Place.of(node, constants)
        assert isinstance(place, Place)
        place.put(dense.reshape(place.parts, -1, dense.shape[-1]))
        found = self._collected(self._few, self._behind(work, place.readers, inner))
        return _mean_lost(_pairs(self._wanted_of_few, found))

    def _outputs(self, model: ir.Model, feeds: Sequence[Feed]) -> Mapping[str, Array]:
        """What counts of the floating-point outputs, all samples together."""
        session = Reference(model, threads=self._ctx.threads, extensions=self._ctx.extensions)
        return self._collected(feeds, (session.run(feed) for feed in feeds))

    def _collected(self, feeds: Sequence[Feed], runs: Iterable[Mapping[str, Array]]) -> Mapping[str, Array]:
        parts: dict[str, list[Array]] = {}
        for feed, outputs in zip(feeds, runs, strict=True):
            for name, array in outputs.items():
                if array.dtype.kind == "f":
                    mask = None if self._mask is None else feed[self._mask]
                    parts.setdefault(name, []).append(_heeded(array, mask))
        return {name: _joined(arrays) for name, arrays in parts.items()}

    def _behind(self, work: ir.Model, changed: Sequence[ir.Node], ctx: Context) -> Iterator[Mapping[str, Array]]:
        """Outputs of a model some of whose nodes have changed; those that follow from constants alone are left out."""
        run = Stepwise(work, self._few, ctx)
        start = min(run.order.get(id(node), 0) for node in changed)  # a node in a subgraph: all is computed
        if start < self._before.position:
            self._before = Stepwise(self._model, self._few, self._ctx)
        names = [name for name in self._wanted if name in run.born]
        for _ in self._before.run(start, [name for name in names if run.born[name] < start]):
            pass
        run.resume(self._before)
        for arrays in run.run(len(run.order), names):
            yield dict(zip(names, arrays, strict=True))


def _spread(data: Dataset) -> Sequence[Feed]:
    count = sum(1 for _ in data.feeds())
    chosen = {i * count // _SAMPLES for i in range(_SAMPLES)}
    return [feed for i, feed in enumerate(data.feeds()) if i in chosen]


def _some(feeds: Sequence[Feed], count: int) -> Sequence[Feed]:
    """So many, evenly spread; all if there are not more."""
    return feeds if count >= len(feeds) else [feeds[i * len(feeds) // count] for i in range(count)]


def _pairs(wanted: Mapping[str, Array], found: Mapping[str, Array]) -> Sequence[tuple[Array, Array]]:
    """Outputs as they should be and as they are; one that was not found is what it was."""
    return [(array, found.get(name, array)) for name, array in wanted.items()]


def _mean_lost(pairs: Sequence[tuple[Array, Array]]) -> float:
    return float(np.mean([_lost(*pair) for pair in pairs])) if pairs else 0.0


def _heeded(array: Array, mask: Array | None) -> Array:
    """`[rows, channels]`, or all numbers in a row where there are no rows."""
    if array.ndim < 2:
        return array.reshape(1, -1).astype(np.float64)
    table = array.reshape(-1, array.shape[-1]).astype(np.float64)
    kept = heeded_rows(len(table), array, mask)
    return table if kept is None else table[kept]


def _joined(tables: Sequence[Array]) -> Array:
    """All rows; where their lengths differ from sample to sample, all numbers are one column."""
    alike = len({table.shape[1] for table in tables}) == 1
    return np.concatenate(tables if alike else [table.reshape(-1, 1) for table in tables])


def _lost(wanted: Array, found: Array) -> float:
    spread = float(np.square(wanted - wanted.mean(axis=0)).sum())
    whole = spread if spread > 0 else float(np.square(wanted).sum())
    with np.errstate(all="ignore"):  # what is not finite is looked for
        lost = float(np.square(found - wanted).sum())
    lost = lost if np.isfinite(lost) else np.inf
    return lost / whole if whole > 0 else float(lost > 0)


def _divergence(wanted: Array, found: Array) -> float:
    """Mean Kullback-Leibler divergence of rows of class scores, in nats."""
    if not np.isfinite(found).all():
        return np.inf
    before, after = _log_softmax(wanted), _log_softmax(found)
    return float((np.exp(before) * (before - after)).sum(axis=1).mean())


def _log_softmax(scores: Array) -> Array:
    scores = scores - scores.max(axis=1, keepdims=True)
    return scores - np.log(np.exp(scores).sum(axis=1, keepdims=True))
