"""How much the outputs of the whole model change when a group loses units, measured at a few depths.

A layer's own error says little about what becomes of it further on: some layers' errors fade, others decide the output.
So units are taken out of one group at a time and the model is run on calibration samples. They are taken out the way
they will be: layers that read them make up for them with what the units that stay tell of them (a regression on the
calibration data), so that what is measured is what refitting cannot bring back.

Weights of those layers are inputs of one session, which serves all runs. Where units are read by anything else they are
set to zero there. Time is bounded by counting multiply-accumulates: fewer samples, then fewer depths.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnx_ir as ir

from graphopt.analyses import CONSTANTS, COST, SHAPES, LayerMoments, MomentsAnalysis
from graphopt.analyses.channels import ChannelGroup, Place
from graphopt.analyses.names import Names
from graphopt.analyses.unit_uses import UnitUse, unit_uses
from graphopt.calibration import Dataset
from graphopt.pass_base import Context
from graphopt.reference import Feed
from graphopt_passes.prune.allocation.rerun import Rerun, free_weight

__all__ = ["add_offset", "cost_curve", "held_out", "is_affordable", "make_up", "sensitivity"]

Array = np.ndarray[Any, np.dtype[Any]]

_DEPTHS = (0.3, 0.6, 1.0)
_SAMPLES = 32
_FEWEST_SAMPLES = 8
_HOLD_OUT = 4
_MACS = 5e11
_WIDEST = 4608
_MOST_BYTES = 1 << 30
_FLOATS = (ir.DataType.FLOAT, ir.DataType.DOUBLE, ir.DataType.FLOAT16)
_ZERO_POINTS = {
    ("ConvInteger", 0): 2, ("MatMulInteger", 0): 2, ("QGemm", 0): 2, ("QLinearConv", 0): 2, ("QLinearMatMul", 0): 2,
    ("QLinearMatMul", 3): 5,
}  # fmt: skip
"""Operator and index of a quantized input -> index of the input that says which integer stands for zero."""


def is_affordable(groups: Sequence[ChannelGroup], ctx: Context) -> bool:
    """Whether there is data, and few multiply-accumulates enough to measure every group at all depths."""
    run = max(1, ctx.fact(COST).macs) * len(groups) * len(_DEPTHS)
    return ctx.calibration is not None and run * _FEWEST_SAMPLES <= _MACS


def held_out(data: Dataset) -> tuple[Dataset, Dataset]:
    """Samples to fit and every fourth to measure on: what many inputs tell of few samples fits only those.

    Where there are fewer than eight samples, all of them are both.
    """
    if sum(1 for _ in data.feeds(2 * _HOLD_OUT)) < 2 * _HOLD_OUT:
        return data, data

    def some(*, held: bool) -> Callable[[], Iterator[Feed]]:
        return lambda: (feed for i, feed in enumerate(data.read()) if (i % _HOLD_OUT == _HOLD_OUT - 1) == held)

    return replace(data, read=some(held=False), digest=None), replace(data, read=some(held=True), digest=None)


def sensitivity(
    model: ir.Model,
    groups: Sequence[ChannelGroup],
    worth: Sequence[Array],
    ladders: Sequence[Sequence[int]],
    ctx: Context,
) -> list[Array]:
    """Measure what it costs to go down each ladder, in parts of the energy of the model's outputs.

    Args:
        model: The model; it does not change.
        groups: Groups that may lose units.
        worth: `[units]` scores of each group; units leave in ascending order.
        ladders: How many units each group may lose, ascending from 0.
        ctx: Holds the calibration data.

    Returns:
        For each group float64 `[rungs]`, ascending from 0.

    Raises:
        ModelError: ONNX Runtime cannot run the model.
    """
    run = max(1, ctx.fact(COST).macs) * max(1, len(groups))
    depths = _DEPTHS if is_affordable(groups, ctx) else _DEPTHS[1:2]
    samples = int(np.clip(_MACS / (run * len(depths)), _FEWEST_SAMPLES, _SAMPLES))
    trial = _Trial(model, groups, samples, ctx)
    orders = [np.argsort(scores, kind="stable") for scores in worth]
    jobs = [(i, lost) for i, steps in enumerate(ladders) for lost in _depths(steps, depths)]
    measured: list[list[tuple[int, float]]] = [[] for _ in groups]
    for i, lost in ctx.progress(jobs, "measuring sensitivity"):
        measured[i].append((lost, trial.change(i, orders[i][:lost])))
    predicted = [np.concatenate([[0.0], np.cumsum(w[order])]) for w, order in zip(worth, orders, strict=True)]
    curves = [
        cost_curve(np.array(steps), sums, found)
        for steps, sums, found in zip(ladders, predicted, measured, strict=True)
    ]
    level = float(np.median([curve[-1] for curve in curves if curve[-1] > 0] or [0.0]))
    for i, (group, steps, sums) in enumerate(zip(groups, ladders, predicted, strict=True)):
        if not curves[i][-1] and _is_inside(group, ctx):  # a branch that no sample takes is missed like the others
            curves[i] = level * sums[np.array(steps)] / max(float(sums[steps[-1]]), 1e-300)
    return curves


def _is_inside(group: ChannelGroup, ctx: Context) -> bool:
    """Whether only nodes of subgraphs make the units of a group."""
    names = ctx.fact(CONSTANTS).names
    return all(names.place(node) is not None for node, label in names.labels.items() if label in group.producers)


def _depths(steps: Sequence[int], fractions: Sequence[float]) -> list[int]:
    """Rungs nearest to fractions of the longest way down, each once."""
    found = [min(steps[1:], key=lambda lost: abs(lost - part * steps[-1])) for part in fractions]
    return list(dict.fromkeys(found))


def cost_curve(rungs: Array, predicted: Array, measured: Sequence[tuple[int, float]]) -> Array:
    """Bring what scores predict to the level that was measured.

    Args:
        rungs: Numbers of units, ascending from 0.
        predicted: `[units + 1]` sums of the scores of the first units to go.
        measured: Numbers of units with what losing them costs.

    Returns:
        `[rungs]`: the prediction times what it was off by at the depths measured, between them interpolated.
    """
    lost = np.array([count for count, _ in measured])
    costs = np.array([cost for _, cost in measured], dtype=np.float64)
    if not costs.max() > 0:
        return np.zeros(len(rungs))
    level = max(float(predicted[-1]), 1e-300)
    shape = np.maximum(predicted / level, 1e-9 * np.arange(len(predicted)))
    off = np.log(np.maximum(costs, 1e-6 * costs.max()) / shape[lost])
    return np.maximum.accumulate(shape[rungs] * np.exp(np.interp(rungs, lost, off)))


@dataclass(frozen=True, eq=False)
class _Reader:
    """A layer that can do without some of its inputs.

    Attributes:
        weight: Where the units sit on its weight, which is an input of the model under trial.
        offset: Name of the input that is added to what the layer makes.
        rank: Axes that the offset has.
        scale: What the product is multiplied with before that.
        moments: Of what it reads; None: not known.
    """

    weight: Place
    offset: str
    rank: int
    scale: float
    moments: LayerMoments | None

    def without(self, units: Array, inputs: Feed) -> Feed:
        """The inputs with which the other units make up for some."""
        old = inputs[self.weight.value]
        array = np.moveaxis(old.astype(np.float64), self.weight.axis, 0)
        array = np.moveaxis(array, 1, -1)
        length = math.prod(array.shape[1:-1])
        rows = array.reshape(-1, array.shape[-1])
        gone = (self.weight.positions[units].reshape(-1, 1) * length + np.arange(length)).reshape(-1)
        rows, offset = make_up(rows, gone, self.moments)
        weight = np.moveaxis(np.moveaxis(rows.reshape(array.shape), -1, 1), 0, self.weight.axis)
        added = (self.scale * offset).reshape(-1, *[1] * (self.rank - 1))
        changed = {self.weight.value: weight, self.offset: added}
        return {name: np.ascontiguousarray(array, dtype=old.dtype) for name, array in changed.items()}


@dataclass(frozen=True, eq=False)
class _Mask:
    """A value that is multiplied with a mask, an input of the model under trial, where something reads it."""

    place: Place
    name: str

    def without(self, units: Array, inputs: Feed) -> Feed:
        """The mask with which some units are zero."""
        mask = inputs[self.name].copy()
        mask.reshape(-1)[self.place.positions[units].reshape(-1)] = 0
        return {self.name: mask}


def make_up(weight: Array, gone: Array, moments: LayerMoments | None) -> tuple[Array, Array]:
    """Let the inputs that stay tell a layer what those that go would have told it.

    Args:
        weight: `[inputs, outputs]`.
        gone: Indices of inputs.
        moments: Of the inputs; without products, inputs that go are replaced by their means; None: by zero.

    Returns:
        `[inputs, outputs]`, zero for those that go, and `[outputs]` to add.
    """
    changed = weight.copy()
    changed[gone] = 0
    if moments is None or not moments.finite:
        return changed, np.zeros(weight.shape[1])
    mean, covariance = moments.mean[0], moments.covariance()
    if covariance is None:
        return changed, mean[gone] @ weight[gone]
    stay = np.setdiff1d(np.arange(len(weight)), gone)
    variances = np.maximum(np.diag(covariance[0]), 0)
    shrunk = covariance[0] / (1 + len(weight) / max(1, moments.rows))
    np.fill_diagonal(shrunk, variances + 1e-6 * variances.mean() + 1e-30)
    told = np.linalg.solve(shrunk[np.ix_(stay, stay)], shrunk[np.ix_(stay, gone)])
    changed[stay] += told @ weight[gone]
    return changed, (mean[gone] - mean[stay] @ told) @ weight[gone]


class _Trial:
    """A model that can be run without some units of a group.

    Args:
        model: The model.
        groups: The groups.
        samples: How many samples to run.
        ctx: Holds the data and says how ONNX Runtime runs.
    """

    def __init__(self, model: ir.Model, groups: Sequence[ChannelGroup], samples: int, ctx: Context) -> None:
        uses = [list(unit_uses(group, ctx)) for group in groups]
        plain = {use.layer: None for found in uses for use in found if use.layer is not None and _is_plain(use, ctx)}
        copy, self._inputs = model.clone(), Feed()
        names, nodes = ctx.fact(CONSTANTS).names, {label: node for node, label in Names(copy).labels.items()}
        assert ctx.calibration is not None
        seen_by_moments, data = held_out(ctx.calibration)
        moments = _channel_moments(model, list(plain), replace(ctx, calibration=seen_by_moments))
        offsets = {layer: add_offset(copy, nodes[layer], self._inputs) for layer in plain}
        masks: dict[tuple[str, int, str, int], str] = {}
        self._parts: list[list[_Reader | _Mask]] = [[] for _ in groups]
        for parts, found in zip(self._parts, uses, strict=True):
            for use in found:
                key = use.place.value, use.place.axis, names.label(use.node), use.index
                if use.layer is not None and use.layer in plain and use.weight is not None:
                    node, seen = use.node, moments.get(use.layer)
                    scale = node.attributes.get_float("alpha", 1.0) if node.op_type == "Gemm" else 1.0
                    rank = self._inputs[offsets[use.layer]].ndim
                    parts.append(_Reader(use.weight, offsets[use.layer], rank, scale, seen))
                elif _is_maskable(use, ctx):
                    if key not in masks:
                        masks[key] = _add_mask(copy, nodes[key[2]], use, self._inputs, ctx)
                    parts.append(_Mask(use.place, masks[key]))
        self._rerun = Rerun(copy, self._inputs, data, samples, ctx)

    def change(self, group: int, units: Array) -> float:
        """How far the outputs are from what they were without some units of a group, in parts of their energy."""
        inputs = dict(self._inputs)
        for part in self._parts[group]:
            inputs |= part.without(units, inputs)
        return self._rerun.moved(inputs)


def _is_plain(use: UnitUse, ctx: Context) -> bool:
    """Whether a layer can be changed in its weight, and nothing else with it, so that it does without units."""
    node, place = use.node, use.weight
    weight = node.inputs[1] if len(node.inputs) > 1 else None
    if place is None or weight is None or use.index != 0 or not weight.is_initializer():
        return False
    tensor, attributes = ctx.fact(CONSTANTS).of(weight), node.attributes
    if tensor is None or tensor.dtype not in _FLOATS or len(weight.uses()) != 1 or weight.is_graph_output():
        return False
    matrix = node.op_type == "MatMul" or (node.op_type == "Gemm" and not attributes.get_int("transA", 0))
    plain = len(tensor.shape) == 2 if matrix else node.op_type == "Conv" and attributes.get_int("group", 1) == 1
    return plain and weight.name == place.value and not weight.is_graph_input()


def _is_maskable(use: UnitUse, ctx: Context) -> bool:
    """Whether a value can be made zero where a node reads it."""
    if not ctx.fact(SHAPES).rank(use.value):
        return False
    slot = _ZERO_POINTS.get((use.node.op_type, use.index))
    if slot is None:
        return ctx.fact(SHAPES).dtype(use.value) in _FLOATS
    return slot < len(use.node.inputs) and use.node.inputs[slot] is not None


def _channel_moments(model: ir.Model, layers: Sequence[str], ctx: Context) -> Mapping[str, LayerMoments]:
    if not layers:
        return {}
    analysis = MomentsAnalysis(layers=tuple(layers), widest=_WIDEST, most_bytes=_MOST_BYTES)
    return analysis.compute(model, ctx).layers


def add_offset(model: ir.Model, node: ir.Node, inputs: Feed) -> str:
    """Make a layer's weight an input, add another to what it makes; returns the name of the second."""
    weight = node.inputs[1]
    assert weight is not None
    assert weight.const_value is not None
    array, dtype = weight.const_value.numpy(), weight.const_value.dtype
    free_weight(model, weight, inputs)
    if node.op_type == "Conv":
        zeros = np.zeros((len(array), *[1] * (array.ndim - 2)), array.dtype)
    else:
        zeros = np.zeros(array.shape[0 if node.attributes.get_int("transB", 0) else 1], array.dtype)
    name = f"graphopt.offset{len(inputs)}"
    offset = ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(zeros.shape))
    model.graph.inputs.append(offset)
    inputs[name] = zeros
    output, total = node.outputs[0], ir.node("Add", [None, offset], name=f"{name}.add")
    total.outputs[0].name = f"{name}.sum"
    ir.convenience.replace_all_uses_with(output, total.outputs[0], replace_graph_outputs=True)
    total.replace_input_with(0, output)
    model.graph.insert_after(node, total)
    return name


def _add_mask(model: ir.Model, node: ir.Node, use: UnitUse, inputs: Feed, ctx: Context) -> str:
    """Let an input choose what of a value a node sees, and where it sees zero; returns the input's name."""
    rank, dtype = ctx.fact(SHAPES).rank(use.value) or 0, ctx.fact(SHAPES).dtype(use.value) or ir.DataType.FLOAT
    slot = _ZERO_POINTS.get((node.op_type, use.index))
    dtype = dtype if slot is None else ir.DataType.BOOL
    ones = np.ones([use.place.size if axis == use.place.axis else 1 for axis in range(rank)], dtype.numpy())
    name = f"graphopt.mask{len(inputs)}"
    mask = ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(ones.shape))
    model.graph.inputs.append(mask)
    inputs[name] = ones
    if slot is None:
        product = ir.node("Mul", [node.inputs[use.index], mask], name=f"{name}.multiply")
    else:
        product = ir.node("Where", [mask, node.inputs[use.index], node.inputs[slot]], name=f"{name}.choose")
    product.outputs[0].name = f"{name}.product"
    graph = node.graph
    assert isinstance(graph, ir.Graph)
    graph.insert_before(node, product)
    node.replace_input_with(use.index, product.outputs[0])
    return name
