"""Element by element over tensors of any strides: chains of arithmetic, copies, transpositions, broadcasts.

Axes are put in the order of the result's memory and merged where all operands allow it; the last one is computed in
vectors with an exact tail.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from graphopt.targets import Isa
from graphopt_backends.kernels.emit import (
    Frame,
    Pointer,
    bind,
    load,
    loop,
    primitive,
    reach,
    share,
    spread,
    store,
    tirx,
    when,
)  # fmt: skip
from graphopt_backends.kernels.expression import Expression, evaluate, operands
from graphopt_backends.kernels.kernel import Kernel

__all__ = ["Loops", "merged_axes"]

_CHUNK = 4096  # elements of the last axis that are a unit of work
_UNROLLED = 4


@dataclass(frozen=True)
class Loops(Kernel):
    """result = expression(operands), element by element.

    Attributes:
        isa: The CPU.
        expression: What is computed.
        shape: Sizes of the axes, merged, the fastest last.
        result_strides: Of the result; the last is 1 unless the axis is not contiguous there.
        strides: Of each operand.
    """

    isa: Isa
    expression: Expression
    shape: tuple[int, ...]
    result_strides: tuple[int, ...]
    strides: tuple[tuple[int, ...], ...]

    @property
    def operations(self) -> int:
        """Elements of the result."""
        return math.prod(self.shape)

    @property
    def _lanes(self) -> int:
        """Elements of a vector: as many as the widest type allows."""
        kinds = [self.expression.dtype, *operands(self.expression).values()]
        widest = max(1 if kind == "bool" else np.dtype(kind).itemsize for kind in kinds)
        lanes = self.isa.vector_bits // (8 * max(4, widest))
        return lanes if self.result_strides[-1] == 1 else 1

    def primitive(self, name: str) -> Any:
        """The function: (operands..., result, task, tasks)."""
        dtypes = operands(self.expression)
        pointers = [
            Pointer(f"operand{i}", dtypes.get(i, "float32"), reach(self.shape, strides) + 1)
            for i, strides in enumerate(self.strides)
        ]
        pointers.append(Pointer("result", self.expression.dtype, reach(self.shape, self.result_strides) + 1))
        return primitive(name, pointers, self._body)

    def _body(self, frame: Frame) -> None:
        *outer, last = self.shape
        chunks = -(-last // _CHUNK)
        with share(frame, math.prod(outer) * chunks) as (unit, _):
            rest = bind(tirx.truncdiv(unit, chunks)) if chunks > 1 else unit
            at: list[Any] = [0] * (len(self.strides) + 1)
            for axis in reversed(range(len(outer))):
                index = bind(tirx.truncmod(rest, outer[axis])) if axis else rest
                rest = bind(tirx.truncdiv(rest, outer[axis])) if axis else rest
                for i, strides in enumerate((*self.strides, self.result_strides)):
                    if strides[axis]:
                        at[i] = at[i] + index * strides[axis]
            at = [bind(place) if not isinstance(place, int) else place for place in at]
            if chunks == 1:
                self._run(frame, at, 0, last)
            else:
                first = bind(tirx.truncmod(unit, chunks) * _CHUNK)
                tail = last % _CHUNK
                if not tail:
                    self._run(frame, at, first, _CHUNK)
                else:
                    when(first + _CHUNK <= last, lambda: self._run(frame, at, first, _CHUNK))
                    when(first + _CHUNK > last, lambda: self._run(frame, at, first, tail))

    def _run(self, frame: Frame, at: Sequence[Any], first: Any, count: int) -> None:
        lanes = self._lanes
        whole, rest = divmod(count, lanes)
        turns, single = divmod(whole, _UNROLLED)
        if turns:
            with loop(turns) as i:
                for j in range(_UNROLLED):
                    self._vector(frame, at, first + (i * _UNROLLED + j) * lanes, lanes)
        if single:
            with loop(single) as i:
                self._vector(frame, at, first + (turns * _UNROLLED + i) * lanes, lanes)
        if rest:
            with loop(rest) as i:
                self._vector(frame, at, first + whole * lanes + i, 1)

    def _vector(self, frame: Frame, at: Sequence[Any], index: Any, lanes: int) -> None:
        values: list[Any] = []
        for i, strides in enumerate(self.strides):
            source, step = frame[f"operand{i}"], strides[-1]
            if lanes == 1 or step == 1:
                values.append(bind(load(source, at[i] + index * step, lanes)))
            elif step == 0:
                values.append(bind(spread(source[(at[i],)], lanes)))
            else:
                apart = [source[(at[i] + (index + j) * step,)] for j in range(lanes)]
                values.append(bind(tirx.Shuffle(apart, list(range(lanes)))))
        value = evaluate(self.expression, values, lanes)
        store(frame["result"], value, at[-1] + index * self.result_strides[-1], lanes)


def merged_axes(
    shape: Sequence[int], strides: Sequence[Sequence[int]]
) -> tuple[tuple[int, ...], tuple[tuple[int, ...], ...]]:
    """Axes in the order of the last strides' memory, neighbours made one where all strides allow it.

    Args:
        shape: Sizes of the axes.
        strides: Of all operands, and last of the result.

    Returns:
        Sizes, and the strides of each for them; one axis at least.
    """
    result = strides[-1]
    kept = sorted((i for i in range(len(shape)) if shape[i] != 1), key=lambda i: (-abs(result[i]), i))
    sizes: list[int] = []
    steps: list[list[int]] = []
    for axis in kept:
        own = [s[axis] for s in strides]
        if sizes and all(before == mine * shape[axis] for before, mine in zip(steps[-1], own, strict=True)):
            sizes[-1] *= shape[axis]
            steps[-1] = own
        else:
            sizes.append(shape[axis])
            steps.append(own)
    if not sizes:
        return (1,), tuple((0,) if i < len(strides) - 1 else (1,) for i in range(len(strides)))
    return tuple(sizes), tuple(tuple(step[i] for step in steps) for i in range(len(strides)))
