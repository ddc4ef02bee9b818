"""What becomes of a layer's output on its way to the next activation.

    total = output + bypass            bypass: what a shortcut adds, and constants, in units of the output
    seen  = clip(total, low, high)     an activation lets through no more than this

Batch norms and constant factors on the way are undone, so that all of it is told in the layer's own units.
"""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from graphopt.analyses import Constants

__all__ = ["Outlook", "outlook"]

_ONNX = ("", "ai.onnx")
_DEAD = 1e-6


@dataclass(frozen=True, eq=False)
class Outlook:
    """How a layer's output is looked at.

    Attributes:
        shortcut: Name of the value that is added, None where there is none.
        share: `[channels]`: how much of the shortcut is added, in units of the output.
        offset: `[channels]`: what constants add, in units of the output.
        low: `[channels]`: totals below look the same.
        high: `[channels]`: totals above look the same.
        gain: `[channels]`: what one unit of the total is worth at its end; 0 where nothing is left of it.
    """

    shortcut: str | None
    share: np.ndarray
    offset: np.ndarray
    low: np.ndarray
    high: np.ndarray
    gain: np.ndarray

    @property
    def bounded(self) -> bool:
        """Whether an activation hides anything."""
        return bool(np.isfinite(self.low).any() or np.isfinite(self.high).any())

    def bypass(self, shortcut: np.ndarray | None, like: np.ndarray, axis: int) -> np.ndarray:
        """What is added to an output.

        Args:
            shortcut: The value added, of the output's shape.
            like: An array of the output's shape.
            axis: The output's channel axis.
        """
        shape = [1] * like.ndim
        shape[axis] = -1
        offset = self.offset.reshape(shape).astype(like.dtype)
        if shortcut is None:
            return np.broadcast_to(offset, like.shape)
        return self.share.reshape(shape).astype(like.dtype) * shortcut + offset


@dataclass
class _Path:
    """`gain * output + carry * shortcut + shift` so far."""

    gain: np.ndarray
    carry: np.ndarray
    shift: np.ndarray
    shortcut: str | None = None

    def scale(self, factor: np.ndarray, shift: np.ndarray | float = 0.0) -> None:
        self.gain, self.carry = self.gain * factor, self.carry * factor
        self.shift = self.shift * factor + shift


def outlook(output: ir.Value, channels: int, axis: int, constants: Constants, known: Container[str]) -> Outlook:
    """Follow a layer's output to the first activation, or as far as it can be followed.

    Args:
        output: The output.
        channels: How many channels it has.
        axis: Its channel axis, counted from the last.
        constants: The model's constants.
        known: Names of the values that are known before the layer runs; no other counts as a shortcut.
    """
    path = _Path(np.ones(channels), np.zeros(channels), np.zeros(channels))
    while (node := _only_reader(output)) is not None and node.op_type != "Identity":
        if node.op_type in ("Relu", "Clip") and (limits := _limits(node, constants)) is not None:
            return _told(path, *limits)
        if not _step(path, node, output, axis, constants, known):
            break
        output = node.outputs[0]
    return _told(path, -np.inf, np.inf)


def _only_reader(value: ir.Value) -> ir.Node | None:
    """The node that alone reads a value, or one of several that all are Relu."""
    readers = list(value.consumers())
    if not readers or value.is_graph_output() or any(node.domain not in _ONNX for node in readers):
        return None
    alike = len(readers) == 1 or all(node.op_type == "Relu" for node in readers)
    return readers[0] if alike else None


def _limits(node: ir.Node, constants: Constants) -> tuple[float, float] | None:
    """Least and greatest value of a Relu or Clip; None if they are computed."""
    if node.op_type == "Relu":
        return 0.0, np.inf
    found = [node.attributes.get_float("min", -np.inf), node.attributes.get_float("max", np.inf)]
    for i, value in enumerate(node.inputs[1:3]):
        tensor = constants.of(value)
        if value is not None and (tensor is None or tensor.size != 1):
            return None
        if tensor is not None:
            found[i] = float(tensor.numpy().reshape(-1)[0])
    return found[0], found[1]


def _step(
    path: _Path,
    node: ir.Node,
    value: ir.Value,
    axis: int,
    constants: Constants,
    known: Container[str],
) -> bool:
    """Take one node into account; False if it cannot be."""
    if node.op_type == "BatchNormalization" and node.inputs[0] is value:
        maker = value.producer()
        if axis == -1 and (maker is None or maker.op_type != "Gemm"):  # a batch norm's channels are on axis 1
            return False
        affine = _affine(node, constants)
        if affine is None or len(affine[0]) != len(path.gain):
            return False
        path.scale(*affine)
        return True
    if node.op_type not in ("Add", "Mul") or len(node.inputs) != 2 or node.inputs[0] is node.inputs[1]:
        return False
    other = node.inputs[1] if node.inputs[0] is value else node.inputs[0]
    numbers = _per_channel(other, len(path.gain), axis, constants)
    if numbers is not None and node.op_type == "Mul":
        path.scale(numbers)
    elif numbers is not None:
        path.shift = path.shift + numbers
    else:
        name = "" if other is None else other.name or ""
        if node.op_type == "Mul" or path.shortcut is not None or name not in known:
            return False
        path.shortcut, path.carry = name, np.ones_like(path.carry)
    return True


def _affine(node: ir.Node, constants: Constants) -> tuple[np.ndarray, np.ndarray] | None:
    """What a batch norm multiplies by and adds."""
    if node.attributes.get_int("training_mode", 0):
        return None
    tensors = [constants.of(value) for value in node.inputs[1:5]]
    arrays = [tensor.numpy().astype(np.float64) for tensor in tensors if tensor is not None]
    if len(arrays) != 4:
        return None
    scale, shift, mean, variance = arrays
    gain = scale / np.sqrt(variance + node.attributes.get_float("epsilon", 1e-5))
    return gain, shift - gain * mean


def _per_channel(value: ir.Value | None, channels: int, axis: int, constants: Constants) -> np.ndarray | None:
    """`[channels]` numbers of a constant that is the same at all positions."""
    tensor = constants.of(value)
    if tensor is None or tensor.size not in (1, channels):
        return None
    sizes = list(tensor.shape.numpy())
    if tensor.size > 1 and sizes.index(channels) - len(sizes) != axis:
        return None
    return np.broadcast_to(tensor.numpy().astype(np.float64).reshape(-1), (channels,))


def _told(path: _Path, low: float, high: float) -> Outlook:
    """All of it in units of the output; channels that nothing is left of are looked at as they are."""
    dead = np.abs(path.gain) <= _DEAD * np.abs(path.gain).max(initial=0.0)
    gain = np.where(dead, 1.0, path.gain)
    edges = np.array([[low], [high]]) / gain
    lowest, highest = np.where(dead, -np.inf, edges.min(axis=0)), np.where(dead, np.inf, edges.max(axis=0))
    share, offset = np.where(dead, 0.0, path.carry / gain), np.where(dead, 0.0, path.shift / gain)
    return Outlook(path.shortcut, share, offset, lowest, highest, np.where(dead, 0.0, gain))
