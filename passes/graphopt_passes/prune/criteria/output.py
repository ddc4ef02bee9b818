"""How much the outputs of the model change when a unit is masked, measured.

Every activation at which units are read is multiplied with a mask that comes in as a further input of the model, so
that one session serves all units: ones, but for zeros where the masked units sit. Each run computes the outputs for
32 samples (fewer where those outputs would take more than 256 MB).

Time is bounded by counting: there are no more runs than make up 4e12 multiply-accumulates, a minute or two on one core,
1,024 at most and two for each group at least. Where there are more units than runs, units of a group are masked in
chunks of equal size, those of similar weight norm together, and share what the chunk costs in proportion to their
squared norms.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from graphopt.analyses import CONSTANTS, COST, SHAPES
from graphopt.analyses.channels import ChannelGroup, Place
from graphopt.analyses.names import Names
from graphopt.analyses.unit_uses import unit_uses
from graphopt.criterion_base import Criterion, weights_of
from graphopt.pass_base import Context
from graphopt.reference import Feed, Reference
from graphopt_passes.prune.criteria.weights import L2

__all__ = ["OutputChange", "output_distance"]

_SAMPLES = 32
_BATCH = 16
_MACS = 4e12
_MOST_RUNS = 1024
_LEAST_CHUNKS = 2
_KEPT_BYTES = 256 << 20
_WORST = 1e6
_MASKABLE = (ir.DataType.FLOAT, ir.DataType.DOUBLE, ir.DataType.FLOAT16)
_RECURRENT = frozenset({"GRU", "LSTM", "RNN"})


class OutputChange(Criterion):
    """How much the outputs of the model change on 32 samples when a channel is masked."""

    name: ClassVar[str] = "output-change"
    needs_data: ClassVar[bool] = True
    comparable: ClassVar[bool] = True

    def scores(self, model: ir.Model, groups: Sequence[ChannelGroup], ctx: Context) -> list[np.ndarray | None]:
        """Judge in shares of the outputs' energy, the mean over all outputs."""
        masks = [list(dict.fromkeys(_masks(group, ctx))) for group in groups]
        if not any(masks):
            return [None] * len(groups)
        masked = _Masked(model, list(dict.fromkeys(mask for found in masks for mask in found)), ctx)
        norms = L2().scores(model, groups, ctx)
        most = _chunk_size(groups, masked.samples * max(1, ctx.fact(COST).macs))
        jobs = [(i, chunk) for i, found in enumerate(masks) if found for chunk in _chunks(norms[i], most)]
        scores = [np.zeros(group.units) if found else None for group, found in zip(groups, masks, strict=True)]
        for i, chunk in ctx.progress(jobs, "masking channels"):
            shares = np.square(norms[i][chunk])
            total = float(shares.sum())
            change = masked.change(groups[i], masks[i], chunk)
            mine = scores[i]
            if mine is not None:
                mine[chunk] = change * (shares / total if total > 0 else 1 / len(chunk))
        return scores


@dataclass(frozen=True)
class _Mask:
    """A value that is multiplied with a mask where a node reads it.

    Attributes:
        value: Name of the value.
        axis: Axis of the units.
        size: Length of that axis.
        node: Name of the node that reads it.
        index: Which of its inputs it is.
    """

    value: str
    axis: int
    size: int
    node: str
    index: int


def _masks(group: ChannelGroup, ctx: Context) -> Iterator[_Mask]:
    """Where to mask the units of a group; what recurrent layers read of themselves is masked in their weights."""
    names, shapes = ctx.fact(CONSTANTS).names, ctx.fact(SHAPES)
    for use in unit_uses(group, ctx):
        if shapes.dtype(use.value) in _MASKABLE and shapes.rank(use.value):
            yield _Mask(use.place.value, use.place.axis, use.place.size, names.label(use.node), use.index)
    for place in weights_of(group, "input"):
        value = names.value(place.value)
        for reader in () if value is None else value.uses():
            if reader.node.op_type in _RECURRENT and reader.idx == 2 and shapes.dtype(value) in _MASKABLE:
                yield _Mask(place.value, place.axis, place.size, names.label(reader.node), reader.idx)


class _Masked:
    """A model whose units can be masked.

    Args:
        model: The model.
        masks: Where to mask.
        ctx: Holds the data and says how ONNX Runtime runs.

    Raises:
        ModelError: ONNX Runtime cannot run the model.
    """

    def __init__(self, model: ir.Model, masks: Sequence[_Mask], ctx: Context) -> None:
        copy = model.clone()
        names, shapes = Names(copy), ctx.fact(SHAPES)
        nodes = {label: node for node, label in names.labels.items()}
        self._ones: dict[tuple[str, int], np.ndarray] = {}
        inputs: dict[tuple[str, int], ir.Value] = {}
        self._names: dict[tuple[str, int], str] = {}
        for mask in masks:
            node, key = nodes[mask.node], (mask.value, mask.axis)
            value = node.inputs[mask.index]
            if key not in inputs:
                rank, dtype = len(shapes.shapes[mask.value]), shapes.types[mask.value]
                ones = np.ones([mask.size if axis == mask.axis else 1 for axis in range(rank)], dtype.numpy())
                name = f"graphopt.mask{len(inputs)}"
                inputs[key] = ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(ones.shape))
                self._ones[key], self._names[key] = ones, name
            product = ir.node("Mul", [value, inputs[key]], name=f"{self._names[key]}.{mask.node}.{mask.index}")
            product.outputs[0].name = f"{product.name}.made"
            graph = node.graph
            assert isinstance(graph, ir.Graph)
            graph.insert_before(node, product)
            node.replace_input_with(mask.index, product.outputs[0])
        copy.graph.inputs.extend(inputs.values())
        self._session = Reference(copy, threads=ctx.threads, extensions=ctx.extensions)
        self._feeds, self._wanted = list[Feed](), list[Feed]()
        self._measure(ctx)

    def _measure(self, ctx: Context) -> None:
        """Run the samples unmasked, until there are enough or their outputs fill memory."""
        assert ctx.calibration is not None
        ones, kept = {self._names[key]: mask for key, mask in self._ones.items()}, 0
        self.samples = 0
        for feed in ctx.calibration.batches(_BATCH, _SAMPLES):
            outputs = self._session.run({**feed, **ones})
            kept += sum(np.asarray(array).nbytes for array in outputs.values())
            if self._feeds and kept > _KEPT_BYTES:
                break
            self._feeds.append(feed)
            self._wanted.append(outputs)
            self.samples += len(next(iter(feed.values()))) if ctx.calibration.stacked else 1

    def change(self, group: ChannelGroup, masks: Sequence[_Mask], units: np.ndarray) -> float:
        """How far the outputs are from what they were, with these units of a group masked."""
        keys = {(mask.value, mask.axis) for mask in masks}
        arrays = {self._names[key]: mask for key, mask in self._ones.items()}
        for place in group.places:
            if (key := (place.value, place.axis)) in keys:
                arrays[self._names[key]] = _without(self._ones[key], place, units)
        found = [self._session.run({**feed, **arrays}) for feed in self._feeds]
        changes = [output_distance([w[k] for w in self._wanted], [f[k] for f in found]) for k in self._wanted[0]]
        return float(np.mean(changes))


def _without(ones: np.ndarray, place: Place, units: np.ndarray) -> np.ndarray:
    mask = ones.copy()
    mask.reshape(-1)[place.positions[units].reshape(-1)] = 0
    return mask


def output_distance(wanted: Sequence[np.ndarray], found: Sequence[np.ndarray]) -> float:
    """Squared distance of an output in parts of its energy; a million where it is no longer finite.

    What is no float counts by the share of its elements that differ; an output of another shape is wholly different.

    Args:
        wanted: The output for each batch.
        found: What it is now.
    """
    pairs = [(np.asarray(a), np.asarray(b)) for a, b in zip(wanted, found, strict=True)]
    if any(a.shape != b.shape for a, b in pairs):
        return 1.0
    if any(a.dtype.kind != "f" for a, _ in pairs):
        count = sum(a.size for a, _ in pairs)
        return sum(int((a != b).sum()) for a, b in pairs) / max(1, count)
    with np.errstate(all="ignore"):
        energy = sum(float(np.square(a, dtype=np.float64).sum()) for a, _ in pairs)
        error = sum(float(np.square(np.subtract(b, a, dtype=np.float64)).sum()) for a, b in pairs)
    if not (math.isfinite(error) and math.isfinite(energy)):
        return _WORST
    return min(error / energy, _WORST) if energy > 0 else float(error > 0)


def _chunk_size(groups: Sequence[ChannelGroup], run_macs: float) -> int:
    """Units that are masked at a time."""
    runs = max(_LEAST_CHUNKS * len(groups), min(_MOST_RUNS, int(_MACS / run_macs)))
    return math.ceil(sum(group.units for group in groups) / runs)


def _chunks(norms: np.ndarray, most: int) -> list[np.ndarray]:
    """Units in ascending order of their norms, cut into chunks of about equal size: two at least."""
    order = np.argsort(norms, kind="stable")
    count = max(math.ceil(len(order) / most), min(_LEAST_CHUNKS, len(order)))
    return np.array_split(order, count)
