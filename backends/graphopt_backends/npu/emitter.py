"""A TOSA graph under construction: constants, names, and how tensors lie.

Images of ONNX lie as N, C, H, W, those of TOSA as N, H, W, C. A tensor keeps, beside its TOSA form, the order of the
axes of the ONNX value that it stands for, and is transposed only when an operation wants it otherwise: transposes of
neighbours cancel, and those at the borders of a graph remain.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

import numpy as np

from graphopt_backends.npu.tosa import DType, Graph, Operator, Tensor

__all__ = ["LIMITS", "Emitter", "Order", "Placed", "Refusal", "multiplier"]

Array = np.ndarray[Any, np.dtype[Any]]
Order = tuple[int, ...]
"""For each axis in memory, the axis of the ONNX value that lies there."""

LIMITS: dict[str, tuple[int, int]] = {"int8": (-128, 127), "int16": (-32768, 32767), "int32": (-(2**31), 2**31 - 1)}
_MOST_MOVED = 1 << 16
"""Elements along an axis, or any axes but two, of a transpose on U55 and U65 (Vela, constraints of TRANSPOSE)."""
_KEEPS_RANGE = {"nan_mode": "PROPAGATE"}


class Refusal(Exception):  # noqa: N818
    """Why the NPU cannot compute something."""


@dataclass(frozen=True, eq=False)
class Placed:
    """A tensor that stands for an ONNX value.

    Attributes:
        tensor: How it lies in memory.
        order: Which axis of the ONNX value lies where.
    """

    tensor: Tensor
    order: Order

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the ONNX value."""
        found = [0] * len(self.order)
        for size, axis in zip(self.tensor.shape, self.order, strict=True):
            found[axis] = size
        return tuple(found)


def multiplier(ratio: Fraction, bits: int = 31) -> tuple[int, int]:
    """The integers m and s for which m / 2**s is nearest to a ratio, 2**(bits - 1) <= m < 2**bits, 2 <= s <= 62.

    Args:
        ratio: Not negative.
        bits: 31, or 15 for sums in 48 bits.

    Raises:
        Refusal: The ratio is out of their reach.
    """
    if ratio == 0:
        return 0, bits
    if ratio < 0:
        raise Refusal(f"scales give the negative ratio {float(ratio):g}")
    shift = bits - 1 - _floor_log2(ratio)
    found = round(ratio * Fraction(2) ** shift)
    if found == 1 << bits:
        found, shift = found >> 1, shift - 1
    if shift > 62:  # too small for the full precision of the multiplier
        found, shift = round(ratio * Fraction(2) ** 62), 62
    if shift < 2:
        raise Refusal(f"scales differ by {float(ratio):.3g}, more than RESCALE can multiply by")
    return found, shift


def _runs(order: Sequence[int], shape: Sequence[int]) -> list[list[int]]:
    """Axes in a new order, those together that are neighbours before and after, up to a size."""
    runs, size = list[list[int]](), 1
    kept = sorted(order)
    for axis in order:
        if runs and kept.index(axis) == kept.index(runs[-1][-1]) + 1 and size * shape[axis] <= _MOST_MOVED:
            runs[-1].append(axis)
            size *= shape[axis]
        else:
            runs.append([axis])
            size = shape[axis]
    return runs


def _floor_log2(ratio: Fraction) -> int:
    guess = ratio.numerator.bit_length() - ratio.denominator.bit_length()
    return guess if ratio >= Fraction(2) ** guess else guess - 1


@dataclass
class Emitter:
    """Adds operations to a graph; every method returns what its operation makes.

    Attributes:
        family: `u55`, `u65` or `u85`.
        graph: What was made so far.
        site: Name of the node of the model that operations stand for now.
    """

    family: str
    graph: Graph = field(default_factory=Graph)
    site: str = ""
    _constants: dict[tuple[bytes, tuple[int, ...], DType], Tensor] = field(default_factory=dict, repr=False)
    _reshaped: dict[Tensor, Tensor] = field(default_factory=dict[Tensor, Tensor], repr=False)
    _count: int = 0

    def input(self, name: str, shape: tuple[int, ...], dtype: DType) -> Tensor:
        """An input of the graph."""
        self.graph.inputs.append(Tensor(name, shape, dtype))
        return self.graph.inputs[-1]

    def constant(self, array: Any, dtype: DType) -> Tensor:
        """A constant; equal ones are one."""
        kind = np.int64 if dtype in ("shape", "int48") else np.dtype(dtype)
        held = np.ascontiguousarray(array, kind)
        key = held.tobytes(), held.shape, dtype
        if key not in self._constants:
            self._constants[key] = Tensor(f"c{len(self._constants)}", held.shape, dtype, held)
        return self._constants[key]

    def shape(self, sizes: Sequence[int]) -> Tensor:
        """A constant shape, or pads, or whatever TOSA takes as such."""
        return self.constant(np.asarray(sizes, np.int64), "shape")

    def add(self, kind: str, inputs: Sequence[Tensor], shape: Sequence[int], dtype: DType, **attributes: Any) -> Tensor:
        """Add any operation."""
        self._count += 1
        result = Tensor(f"t{self._count}", tuple(int(size) for size in shape), dtype)
        self.graph.operators.append(Operator(kind, tuple(inputs), result, attributes, self.site))
        return result

    def rescale(
        self,
        tensor: Tensor,
        ratios: Fraction | Sequence[Fraction],
        dtype: DType,
        zero_in: int = 0,
        zero_out: int = 0,
    ) -> Tensor:
        """`round((x - zero_in) * ratio) + zero_out`, saturated; one ratio, or one for each index of the last axis.

        Ties are rounded up: TOSA's single rounding, `(x * multiplier + 2**(shift - 1)) >> shift` (TOSA 1.0, RESCALE).
        """
        wide = tensor.dtype == "int48"  # which takes 16-bit multipliers alone
        whole = [ratios] if isinstance(ratios, Fraction) else ratios
        factors = [multiplier(ratio, 15 if wide else 31) for ratio in whole]
        inputs = [
            tensor,
            self.constant([m for m, _ in factors], "int16" if wide else "int32"),
            self.constant([s for _, s in factors], "int8"),
            self.constant([zero_in], tensor.dtype),
            self.constant([zero_out], dtype),
        ]
        return self.add(
            "RESCALE", inputs, tensor.shape, dtype, scale32=not wide, rounding_mode="SINGLE_ROUND",
            per_channel=len(factors) > 1, input_unsigned=False, output_unsigned=False,
        )  # fmt: skip

    def clamp(self, tensor: Tensor, low: int, high: int) -> Tensor:
        """Limit values; nothing where all values of the type are within."""
        least, most = LIMITS[tensor.dtype]
        if low <= least and high >= most:
            return tensor
        kind = np.dtype(tensor.dtype)
        ends = [list(kind.type(min(max(end, least), most)).tobytes()) for end in (low, high)]
        return self.add("CLAMP", [tensor], tensor.shape, tensor.dtype, min_val=ends[0], max_val=ends[1], **_KEEPS_RANGE)

    def reshape(self, tensor: Tensor, shape: Sequence[int]) -> Tensor:
        """The same elements in the same order; nothing where the shape is that already, once for several in a row."""
        tensor = self._reshaped.get(tensor, tensor)
        if tuple(shape) == tensor.shape:
            return tensor
        found = self.add("RESHAPE", [tensor, self.shape(shape)], shape, tensor.dtype)
        self._reshaped[found] = tensor
        return found

    def transpose(self, tensor: Tensor, order: Sequence[int]) -> Tensor:
        """Axes in another order; a reshape where only axes of one element move.

        Axes that stay neighbours are one on U55 and U65, which takes half the cycles there and hundreds of times as
        many on U85 (Vela 5.2).

        Raises:
            Refusal: It is larger than the NPU's.
        """
        shape = [tensor.shape[axis] for axis in order]
        moved = [axis for axis in order if tensor.shape[axis] != 1]
        if moved == sorted(moved):
            return self.reshape(tensor, shape)
        if self.family == "u85":
            return self.add("TRANSPOSE", [tensor], shape, tensor.dtype, perms=list(order))
        runs = _runs(moved, tensor.shape)
        short = [int(np.prod([tensor.shape[axis] for axis in run])) for run in sorted(runs)]
        perms = [sorted(runs).index(run) for run in runs]
        widest = int(np.prod(sorted(short)[2:])) if len(short) > 3 else max(short)
        if widest > _MOST_MOVED:
            raise Refusal(f"it would transpose {'x'.join(map(str, tensor.shape))}, more than the NPU does")
        found = self.reshape(tensor, short)
        made = [short[axis] for axis in perms]
        return self.reshape(self.add("TRANSPOSE", [found], made, tensor.dtype, perms=perms), shape)

    def arrange(self, placed: Placed, order: Order) -> Tensor:
        """A value with its axes in a given order."""
        return self.transpose(placed.tensor, [placed.order.index(axis) for axis in order])

    def slice(self, tensor: Tensor, starts: Sequence[int], sizes: Sequence[int]) -> Tensor:
        """A part of a tensor; nothing where it is the whole."""
        if tuple(sizes) == tensor.shape:
            return tensor
        return self.add("SLICE", [tensor, self.shape(starts), self.shape(sizes)], sizes, tensor.dtype)

    def pad(self, tensor: Tensor, pads: Sequence[tuple[int, int]], value: int) -> Tensor:
        """A constant around a tensor; nothing where there is nothing to add."""
        if not any(begin or end for begin, end in pads):
            return tensor
        shape = [size + begin + end for size, (begin, end) in zip(tensor.shape, pads, strict=True)]
        flat = self.shape([amount for pair in pads for amount in pair])
        return self.add("PAD", [tensor, flat, self.constant([value], tensor.dtype)], shape, tensor.dtype)

    def concat(self, tensors: Sequence[Tensor], axis: int) -> Tensor:
        """Tensors one behind the other."""
        shape = list(tensors[0].shape)
        shape[axis] = sum(tensor.shape[axis] for tensor in tensors)
        return self.add("CONCAT", tensors, shape, tensors[0].dtype, axis=axis) if len(tensors) > 1 else tensors[0]

    def elementwise(self, kind: str, left: Tensor, right: Tensor, **attributes: Any) -> Tensor:
        """An operation on pairs of elements, with axes of one element repeated."""
        shape = np.broadcast_shapes(left.shape, right.shape)
        inputs = [left, right]
        if kind == "MUL":
            inputs.append(self.constant([attributes.pop("shift", 0)], "int8"))
        if kind in ("MAXIMUM", "MINIMUM"):
            attributes |= _KEEPS_RANGE
        return self.add(kind, inputs, shape, left.dtype, **attributes)

    def table(self, tensor: Tensor, entries: Array) -> Tensor:
        """Look up each int8 among 256 int8 entries, that of -128 first."""
        return self.add("TABLE", [tensor, self.constant(entries, "int8")], tensor.shape, "int8")
