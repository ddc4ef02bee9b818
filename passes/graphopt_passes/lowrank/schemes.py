"""Chains of thin layers that one layer can become, and what they cost.

Form       layers                                                  numbers, for I inputs, O outputs, a x b kernel
product    inputs to r, r to outputs                               r (I + O)
output     a x b to r channels, 1 x 1 to outputs                   r (I a b + O)
input      1 x 1 to r channels, a x b to outputs                   r (I + a b O)
spatial    a x 1 to r channels, 1 x b to outputs                   r (I a + b O)
tucker     1 x 1 to r channels, a x b to s, 1 x 1 to outputs       I r + r a b s + s O

`output`: Zhang et al., 2015; `spatial`: Jaderberg et al., 2014; `tucker`: Kim et al., 2016.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from graphopt_passes.lowrank._factors import Problem, Split, split

__all__ = [
    "Chain", "Form", "Geometry", "Ranks", "chain_of", "forms_of", "full_rank", "inner_of", "ladder", "macs_of",
    "params_of", "prepared",
]  # fmt: skip

Array = np.ndarray[Any, np.dtype[Any]]
Form = Literal["product", "output", "input", "spatial", "tucker"]
Ranks = tuple[int, ...]


@dataclass(frozen=True)
class Geometry:
    """The sizes of a layer.

    Attributes:
        inputs: Channels read.
        outputs: Channels made.
        kernel: Kernel sizes; empty for products of matrices.
        positions: Where it is computed for one run: at the input's, at those between a spatial pair, at the output's.
        counted: Whether positions are those of a run; else only their proportions are right.
    """

    inputs: int
    outputs: int
    kernel: tuple[int, ...] = ()
    positions: tuple[int, int, int] = (1, 1, 1)
    counted: bool = True

    @property
    def window(self) -> int:
        """Positions of the kernel."""
        return math.prod(self.kernel)

    @property
    def params(self) -> int:
        """Numbers of the weight."""
        return self.inputs * self.window * self.outputs

    @property
    def macs(self) -> int:
        """Multiply-accumulates of a run."""
        return self.params * self.positions[2]


@dataclass(frozen=True, eq=False)
class Chain:
    """The weights of a chain of layers, first one first.

    Attributes:
        form: Which chain.
        weights: In the layout of the operators: matrices `[inputs, outputs]`, or kernels `[outputs, inputs, ...]`.
        dense: `[inputs of a row, outputs]`: the weight that they stand for.
    """

    form: Form
    weights: tuple[Array, ...]
    dense: Array


def forms_of(geometry: Geometry) -> tuple[Form, ...]:
    """The chains that a layer of this size can become."""
    if not geometry.kernel:
        return ("product",)
    if geometry.window == 1:
        return ("output",)
    long = [size for size in geometry.kernel if size > 1]
    spatial: tuple[Form, ...] = ("spatial",) if len(geometry.kernel) == len(long) == 2 else ()
    return ("output", "input", *spatial, "tucker")


def inner_of(form: Form, geometry: Geometry) -> int:
    """Length of the part of a row that the first layer leaves alone."""
    if form == "spatial":
        return geometry.kernel[-1]
    return geometry.window if form in ("input", "tucker") else 1


def full_rank(form: Form, geometry: Geometry) -> Ranks:
    """Ranks at which nothing is lost."""
    outer = geometry.inputs * geometry.window // inner_of(form, geometry)
    most = min(outer, geometry.outputs * inner_of(form, geometry))
    return (most, min(geometry.outputs, most * geometry.window)) if form == "tucker" else (most,)


def params_of(form: Form, geometry: Geometry, ranks: Ranks) -> int:
    """Numbers of a chain's weights."""
    return sum(_sizes(form, geometry, ranks))


def macs_of(form: Form, geometry: Geometry, ranks: Ranks) -> int:
    """Multiply-accumulates of a chain in one run."""
    before, between, after = geometry.positions
    at = {"input": (before, after), "spatial": (between, after), "tucker": (before, after, after)}.get(form)
    return sum(size * count for size, count in zip(_sizes(form, geometry, ranks), at or (after, after), strict=True))


def _sizes(form: Form, geometry: Geometry, ranks: Ranks) -> tuple[int, ...]:
    """Numbers of each weight of a chain."""
    inner, rank = inner_of(form, geometry), ranks[0]
    outer = geometry.inputs * geometry.window // inner
    if form == "tucker":
        return outer * rank, rank * inner * ranks[1], ranks[1] * geometry.outputs
    return outer * rank, rank * inner * geometry.outputs


def ladder(form: Form, geometry: Geometry, step: int) -> list[Ranks]:
    """Ranks below the full one, ascending, multiples of `step`; two ranks keep the same part of theirs.

    Args:
        form: Which chain.
        geometry: Of the layer.
        step: What ranks are multiples of.
    """
    full = full_rank(form, geometry)
    steps = [max(1, min(step, size)) for size in full]
    top = max(size // each for size, each in zip(full, steps, strict=True))
    found = (
        tuple(min(size, s * max(1, round(size / s * rung / top))) for size, s in zip(full, steps, strict=True))
        for rung in range(1, top + 1)
    )
    return [ranks for ranks in dict.fromkeys(found) if ranks != full]


def chain_of(form: Form, geometry: Geometry, ready: Split, ranks: Ranks) -> Chain:
    """Factor a weight.

    Args:
        form: Which chain.
        geometry: Of the layer.
        ready: What `split` made of the weight, with `inner_of` this form.
        ranks: One, or two for `tucker`.
    """
    if form == "tucker":
        first, core, last = ready.tucker((ranks[0], ranks[1]))
        dense = ready.dense(first, core @ last)
        weights = (_kernel(first, ()), _kernel(core, geometry.kernel), _kernel(last, ()))
        return Chain(form, tuple(_spatial_ones(w, geometry) for w in weights), dense)
    first, last = ready.factors(ranks[0])
    dense = ready.dense(first, last)
    if form == "product":
        return Chain(form, (first, last), dense)
    kernels: Sequence[tuple[int, ...]] = ((geometry.kernel, ()), ((), geometry.kernel))[form == "input"]
    if form == "spatial":
        kernels = ((geometry.kernel[0], 1), (1, geometry.kernel[1]))
    weights = (_kernel(first, kernels[0]), _kernel(last, kernels[1]))
    return Chain(form, tuple(_spatial_ones(w, geometry) for w in weights), dense)


def _kernel(matrix: Array, kernel: tuple[int, ...]) -> Array:
    """`[outputs, inputs, *kernel]` of `[inputs * kernel, outputs]`."""
    return matrix.T.reshape(matrix.shape[1], -1, *kernel)


def _spatial_ones(kernel: Array, geometry: Geometry) -> Array:
    return kernel.reshape(*kernel.shape, *[1] * (2 + len(geometry.kernel) - kernel.ndim))


def prepared(form: Form, geometry: Geometry, problem: Problem) -> Split:
    """Prepare a weight for a form."""
    return split(problem, inner_of(form, geometry))
