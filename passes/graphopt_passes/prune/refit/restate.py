"""Layers whose weight must stay: what follows them is brought back to the mean and the spread that it had.

Where a batch norm follows, its mean and variance are stated anew, so that each channel leaves it with the mean and
variance that it had in the whole model (Jordan et al., REPAIR, 2023). Where only a bias can change, it takes back the
mean error (Nagel et al., Data-Free Quantization through Bias Correction, 2019).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from graphopt.analyses import Constants
from graphopt_passes.prune.refit.carriers import constant_behind, set_constant
from graphopt_passes.prune.refit.linear_layers import add_bias, own_bias
from graphopt_passes.prune.refit.sites import AxisName, name_of
from graphopt_passes.prune.refit.stepwise import Stepwise

__all__ = ["Restated", "restate"]

_LEAST_GAIN = 1e-3
_SAME = 1e-5
_FLOATS = (ir.DataType.FLOAT, ir.DataType.DOUBLE, ir.DataType.FLOAT16)


@dataclass(frozen=True)
class Restated:
    """What was stated anew.

    Attributes:
        what: In words.
        before: Relative error of the layer's output on held-out samples as it was.
        after: The same with it.
    """

    what: str
    before: float
    after: float


@dataclass(eq=False)
class _Channels:
    """Sums over all positions of channels, in the whole model `y` and now `z`: `[channels]` each."""

    rows: int
    y: np.ndarray
    z: np.ndarray
    yy: np.ndarray
    zz: np.ndarray
    yz: np.ndarray

    @classmethod
    def empty(cls, channels: int) -> _Channels:
        return cls(0, *(np.zeros(channels) for _ in range(5)))

    def add(self, wanted: np.ndarray, now: np.ndarray) -> None:
        """Count rows `[rows, channels]`."""
        y, z = wanted.astype(np.float64), now.astype(np.float64)
        self.rows += len(y)
        self.y += y.sum(axis=0)
        self.z += z.sum(axis=0)
        self.yy += np.square(y).sum(axis=0)
        self.zz += np.square(z).sum(axis=0)
        self.yz += (y * z).sum(axis=0)

    def plus(self, other: _Channels) -> _Channels:
        arrays = ((self.y, other.y), (self.z, other.z), (self.yy, other.yy), (self.zz, other.zz), (self.yz, other.yz))
        return _Channels(self.rows + other.rows, *(a + b for a, b in arrays))

    def error(self, factor: np.ndarray | float, shift: np.ndarray | float) -> float:
        """Relative error of `factor * z + shift`."""
        missed = self.yy - 2 * (factor * self.yz + shift * self.y)
        missed = missed + factor**2 * self.zz + 2 * factor * shift * self.z + self.rows * np.square(shift)
        spread, power = float((self.yy - np.square(self.y) / self.rows).sum()), float(self.yy.sum())
        scale = spread if spread > 1e-12 * power else power
        return float(np.sqrt(max(0.0, float(missed.sum())) / scale)) if scale > 0 else 0.0

    def alike(self) -> tuple[np.ndarray, np.ndarray]:
        """Factor and shift that give `z` the mean and the variance of `y`; the factor is 1 where either is constant."""
        mean_y, mean_z = self.y / self.rows, self.z / self.rows
        of_y, of_z = self.yy / self.rows - mean_y**2, self.zz / self.rows - mean_z**2
        varies = (of_y > 1e-9 * self.yy / self.rows) & (of_z > 1e-9 * self.zz / self.rows)
        factor = np.sqrt(np.where(varies, of_y, 1.0) / np.where(varies, of_z, 1.0))
        return factor, mean_y - factor * mean_z

    def moved(self) -> np.ndarray:
        """What gives `z` the mean of `y`."""
        return (self.y - self.z) / self.rows


def restate(
    node: ir.Node,
    old: Stepwise,
    new: Stepwise,
    lost: Mapping[AxisName, np.ndarray],
    constants: Constants,
) -> Restated | None:
    """Bring the output of a layer whose weight stays back to the mean and spread that it had.

    Args:
        node: Conv, ConvTranspose, Gemm or MatMul.
        old: The model before the removal.
        new: The model after it.
        lost: Positions that were removed, by value and axis.
        constants: The model's constants.

    Returns:
        What was done; None where nothing can be, or it is no better on held-out samples.
    """
    seen = _channels(node, old, new, lost)
    if seen is None:
        return None
    fitted, held_out = seen
    norm, (bias, addable) = _norm(node, constants), own_bias(node, constants, len(fitted.y))
    before, both = held_out.error(1.0, 0.0), fitted.plus(held_out)
    if before < _SAME or not np.isfinite(before):
        return None
    if norm is not None and (after := held_out.error(*fitted.alike())) < before * (1 - _LEAST_GAIN):
        _set_norm(norm, *both.alike())
        return Restated("mean and variance of its batch norm", before, after)
    if (after := held_out.error(1.0, fitted.moved())) >= before * (1 - _LEAST_GAIN):
        return None
    if bias is not None:
        tensor = constant_behind(bias)
        set_constant(bias, tensor.numpy().astype(np.float64) + both.moved().reshape(tensor.shape.numpy()))
        return Restated("its bias", before, after)
    if norm is not None:
        _set_norm(norm, np.ones_like(both.y), both.moved())
        return Restated("mean of its batch norm", before, after)
    weight = node.inputs[1]
    if addable and weight is not None and constants.of(weight) is not None and isinstance(node.graph, ir.Graph):
        add_bias(node.graph, node, weight, both.moved())
        return Restated("a bias of its own", before, after)
    return None


def _channels(
    node: ir.Node, old: Stepwise, new: Stepwise, lost: Mapping[AxisName, np.ndarray]
) -> tuple[_Channels, _Channels] | None:
    """Sums of a layer's output over the samples to fit, and over those held out; None if they are too few."""
    name = name_of(node.outputs[0])
    if name not in old.born or name not in new.born:
        return None
    before, after = (run.run(run.born[name] + 1, [name]) for run in (old, new))
    found: list[_Channels] = []
    alike = True
    for i, ((wanted,), (now,)) in enumerate(zip(before, after, strict=True)):
        axis = 1 if node.op_type in ("Conv", "ConvTranspose") else now.ndim - 1
        gone = lost.get((name, axis), np.empty(0, dtype=np.int64))
        wanted = np.delete(wanted, gone, axis=axis)
        alike = alike and wanted.shape == now.shape
        if not alike:
            continue
        channels = now.shape[axis]
        found = found or [_Channels.empty(channels), _Channels.empty(channels)]
        rows = [np.moveaxis(array, axis, -1).reshape(-1, channels) for array in (wanted, now)]
        found[i % 5 == 2].add(*rows)
    return (found[0], found[1]) if alike and found and all(part.rows for part in found) else None


def _norm(node: ir.Node, constants: Constants) -> ir.Node | None:
    """The batch norm that alone reads a layer's output, if its mean and variance are its own."""
    readers = list(node.outputs[0].uses())
    if len(readers) != 1 or node.outputs[0].is_graph_output() or node.op_type == "MatMul":
        return None
    norm = readers[0].node
    if norm.op_type != "BatchNormalization" or readers[0].idx or norm.attributes.get_int("training_mode", 0):
        return None
    for value in norm.inputs[3:5]:
        tensor = constants.of(value)
        if value is None or tensor is None or tensor.dtype not in _FLOATS:
            return None
        if len(value.uses()) != 1 or value.is_graph_output():
            return None
    return norm


def _set_norm(norm: ir.Node, factor: np.ndarray, shift: np.ndarray) -> None:
    """Let a batch norm see `factor * x + shift` instead of `x`."""
    mean, variance = norm.inputs[3], norm.inputs[4]
    if mean is None or variance is None:
        return
    epsilon = norm.attributes.get_float("epsilon", 1e-5)
    old_mean, old_variance = (constant_behind(value).numpy().astype(np.float64) for value in (mean, variance))
    # where epsilon is most of it, what is left of the variance could be less than nothing
    changed = np.maximum((old_variance + epsilon) / np.square(factor) - epsilon, 0.0)
    set_constant(variance, changed)
    set_constant(mean, (old_mean - shift) / factor)
