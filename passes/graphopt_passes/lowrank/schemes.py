"""Chains of thin layers that one layer can become, and what they cost.

Form       layers                                                  numbers, for I inputs, O outputs, a x b kernel
product    inputs to r, r to outputs                               r (I + O)
output     a x b to r channels, 1 x 1 to outputs                   r (I a b + O)
input      1 x 1 to r channels, a x b to outputs                   r (I + a b O)
spatial    a x 1 to r channels, 1 x b to outputs                   r (I a + b O)
tucker     1 x 1 to r channels, a x b to s, 1 x 1 to outputs       I r + r a b s + s O
cp         1 x 1 to r, a x 1 and 1 x b of each, 1 x 1 to outputs   r (I + a + b + O)

`output`: Zhang et al., 2015; `spatial`: Jaderberg et al., 2014; `tucker`: Kim et al., 2016; `cp`: Lebedev et al., 2015.

Parts that do not meet, the groups of a convolution or the matrices of a batch, have the same form and rank each; a
transposed convolution is one of its input spread out, with its kernel turned round.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from graphopt_passes.lowrank._cp import Kernel
from graphopt_passes.lowrank._factors import Parts, Problem, Split, split

__all__ = [
    "Chain", "Form", "Geometry", "Link", "Ranks", "Ready", "bytes_saved", "forms_of", "full_rank",
    "inner_of", "ladder", "macs_of", "params_of", "prepared",
]  # fmt: skip

Array = np.ndarray[Any, np.dtype[Any]]
Form = Literal["product", "output", "input", "spatial", "tucker", "cp"]
Ranks = tuple[int, ...]

_NODE_BYTES = 160
"""What one more node and the initializer that it reads take in a file, with their names."""

_PLACES: dict[Form, tuple[str, str]] = {
    "product": ("oo", "oo"),
    "output": ("oo", "io"),
    "input": ("io", "ii"),
    "spatial": ("mo", "im"),
    "tucker": ("ioo", "iio"),
    "cp": ("imoo", "iimo"),
}
"""Where each layer is computed, at the input's positions, in the middle, at the output's; transposed ones behind."""


@dataclass(frozen=True)
class Geometry:
    """The sizes of a layer.

    Attributes:
        inputs: Channels read, by each part.
        outputs: Channels made, by each part.
        kernel: Kernel sizes; empty for products of matrices.
        positions: Where it is computed for one run: at the input's, at those between a spatial pair, at the output's.
        counted: Whether positions are those of a run; else only their proportions are right.
        parts: Groups of a convolution, or matrices of a batch.
        transposed: It is a transposed convolution, which is computed where its input is.
        itemsize: Bytes of a number of the weight.
        readers: Nodes that share the weight.
    """

    inputs: int
    outputs: int
    kernel: tuple[int, ...] = ()
    positions: tuple[int, int, int] = (1, 1, 1)
    counted: bool = True
    parts: int = 1
    transposed: bool = False
    itemsize: int = 4
    readers: int = 1

    @property
    def window(self) -> int:
        """Positions of the kernel."""
        return math.prod(self.kernel)

    @property
    def params(self) -> int:
        """Numbers of the weight."""
        return self.parts * self.inputs * self.window * self.outputs

    @property
    def macs(self) -> int:
        """Multiply-accumulates of a run."""
        return self.params * self.positions[0 if self.transposed else 2]


@dataclass(frozen=True, eq=False)
class Link:
    """One layer of a chain.

    Attributes:
        weight: A matrix `[inputs, outputs]`, behind an axis for the parts where there are more than one; or a kernel
            `[outputs of all groups, inputs of a group, ...]`, never turned round.
        groups: Groups of a convolution.
        moves: Axes that it moves along as the whole convolution did.
    """

    weight: Array
    groups: int = 1
    moves: tuple[bool, ...] = ()


@dataclass(frozen=True, eq=False)
class Chain:
    """The weights of a chain of layers, first one first.

    Attributes:
        form: Which chain.
        links: Its layers.
        dense: `[inputs of a row, outputs]`: the weight that they stand for; of parts a list.
    """

    form: Form
    links: tuple[Link, ...]
    dense: Array

    @property
    def weights(self) -> tuple[Array, ...]:
        """The weights of its layers."""
        return tuple(link.weight for link in self.links)


def forms_of(geometry: Geometry) -> tuple[Form, ...]:
    """The chains that a layer of this size can become."""
    if not geometry.kernel:
        return ("product",)
    if geometry.window == 1:
        return ("output",)
    long = len([size for size in geometry.kernel if size > 1])
    spatial: tuple[Form, ...] = ("spatial",) if len(geometry.kernel) == long == 2 else ()
    return ("output", "input", *spatial, "tucker", *(("cp",) if len(geometry.kernel) <= 2 else ()))


def inner_of(form: Form, geometry: Geometry) -> int:
    """Length of the part of a row that the first layer leaves alone."""
    if form == "spatial":
        return geometry.kernel[-1]
    return geometry.window if form in ("input", "tucker", "cp") else 1


def full_rank(form: Form, geometry: Geometry) -> Ranks:
    """Ranks at which nothing is lost."""
    if form == "cp":
        return (geometry.inputs * geometry.window,)
    outer = geometry.inputs * geometry.window // inner_of(form, geometry)
    most = min(outer, geometry.outputs * inner_of(form, geometry))
    return (most, min(geometry.outputs, most * geometry.window)) if form == "tucker" else (most,)


def params_of(form: Form, geometry: Geometry, ranks: Ranks) -> int:
    """Numbers of a chain's weights."""
    return geometry.parts * sum(_sizes(form, geometry, ranks))


def bytes_saved(form: Form, geometry: Geometry, ranks: Ranks) -> int:
    """Bytes of a file that a chain saves, in the type of the weight, less those of the nodes that it adds."""
    fewer = geometry.params - params_of(form, geometry, ranks)
    nodes = (len(_sizes(form, geometry, ranks)) - 1) * geometry.readers
    return geometry.itemsize * fewer - _NODE_BYTES * nodes


def macs_of(form: Form, geometry: Geometry, ranks: Ranks) -> int:
    """Multiply-accumulates of a chain in one run."""
    sizes = _sizes(form, geometry, ranks)
    return geometry.parts * sum(s * at for s, at in zip(sizes, _places(form, geometry, len(sizes)), strict=True))


def _places(form: Form, geometry: Geometry, layers: int) -> list[int]:
    """At how many positions each layer of a chain is computed."""
    places = _PLACES["tucker" if layers == 3 else form][geometry.transposed]
    return [geometry.positions["imo".index(place)] for place in places]


def _sizes(form: Form, geometry: Geometry, ranks: Ranks) -> tuple[int, ...]:
    """Numbers of each weight of a chain, of one part."""
    rank = ranks[0]
    if form == "cp":
        return geometry.inputs * rank, *(rank * size for size in _long(geometry)), rank * geometry.outputs
    inner = inner_of(form, geometry)
    outer = geometry.inputs * geometry.window // inner
    if form == "tucker":
        return outer * rank, rank * inner * ranks[1], ranks[1] * geometry.outputs
    return outer * rank, rank * inner * geometry.outputs


def _long(geometry: Geometry) -> tuple[int, ...]:
    """Kernel sizes along which a convolution does look at more than one place."""
    return tuple(size for size in geometry.kernel if size > 1)


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


@dataclass(frozen=True, eq=False)
class Ready:
    """A weight prepared for a form.

    Attributes:
        form: Which chain.
        geometry: Of the layer.
        problem: The weight.
        ways: Of each part, to write it as a product.
    """

    form: Form
    geometry: Geometry
    problem: Problem | Parts
    ways: tuple[Split | Kernel, ...]

    def error(self, ranks: Ranks) -> float:
        """Error of the output, in parts of its energy."""
        way = self.ways[0]
        if isinstance(self.problem, Problem) and isinstance(way, Split) and self.form != "tucker":
            return way.error(ranks[0])
        return self.problem.error(self.chain(ranks).dense)

    def chain(self, ranks: Ranks) -> Chain:
        """Factor the weight."""
        factored = [_factored(way, self.form, ranks) for way in self.ways]
        dense = [each[1] for each in factored]
        links = self._links([each[0] for each in factored])
        return Chain(self.form, links, dense[0] if isinstance(self.problem, Problem) else np.array(dense))

    def _links(self, parts: Sequence[tuple[Array, ...]]) -> tuple[Link, ...]:
        if self.form == "product":
            matrices = zip(*parts, strict=True)
            return tuple(Link(np.array(each) if len(parts) > 1 else each[0]) for each in matrices)
        made = [_layers(self.form, self.geometry, factors) for factors in parts]
        return tuple(_beside(each) for each in zip(*made, strict=True))


def prepared(form: Form, geometry: Geometry, problem: Problem | Parts) -> Ready:
    """Prepare a weight for a form."""
    parts = (problem,) if isinstance(problem, Problem) else problem.problems
    if form == "cp":
        return Ready(form, geometry, problem, tuple(Kernel(one, (geometry.inputs, *_long(geometry))) for one in parts))
    return Ready(form, geometry, problem, tuple(split(one, inner_of(form, geometry)) for one in parts))


def _factored(way: Split | Kernel, form: Form, ranks: Ranks) -> tuple[tuple[Array, ...], Array]:
    """Factors of one part, and the matrix that they stand for."""
    if isinstance(way, Kernel):
        found = way.factors(ranks[0])
        return found, way.dense(found)
    if form == "tucker":
        first, core, last = way.tucker((ranks[0], ranks[1]))
        return (first, core, last), way.dense(first, core @ last)
    first, last = way.factors(ranks[0])
    return (first, last), way.dense(first, last)


def _layers(form: Form, geometry: Geometry, factors: Sequence[Array]) -> list[Link]:
    """The convolutions of one part."""
    kernel, axes = geometry.kernel, len(geometry.kernel)
    still, all_ = (False,) * axes, (True,) * axes
    if form == "cp":
        first, *middle, last = factors
        return [_link(first, (), still), *_depthwise(geometry, middle), _link(last.T, (), still)]
    if form == "tucker":
        moves: Sequence[tuple[bool, ...]] = (still, all_, still)
    elif form == "spatial":
        moves = (True, False), (False, True)
    else:
        moves = ((all_, still), (still, all_))[form == "input"]
    sizes = [tuple(k if move else 1 for k, move in zip(kernel, each, strict=True)) for each in moves]
    return [_link(factor, size, move) for factor, size, move in zip(factors, sizes, moves, strict=True)]


def _depthwise(geometry: Geometry, factors: Sequence[Array]) -> list[Link]:
    """One convolution for each long axis, each channel by itself; the first moves along all short ones as well."""
    long = [axis for axis, size in enumerate(geometry.kernel) if size > 1]
    found = list[Link]()
    for factor, mine in zip(factors, long, strict=True):
        axes = range(len(geometry.kernel))
        moves = tuple(axis == mine or (mine == long[0] and axis not in long) for axis in axes)
        shape = [geometry.kernel[axis] if axis == mine else 1 for axis in axes]
        found.append(Link(factor.T.reshape(-1, 1, *shape), factor.shape[1], moves))
    return found


def _link(matrix: Array, kernel: tuple[int, ...], moves: tuple[bool, ...]) -> Link:
    """A convolution of `[inputs * kernel, outputs]`."""
    kernel = kernel or (1,) * len(moves)
    return Link(matrix.T.reshape(matrix.shape[1], -1, *kernel), 1, moves)


def _beside(links: Sequence[Link]) -> Link:
    """One convolution in groups of convolutions that do not meet."""
    weight = np.concatenate([link.weight for link in links])
    return Link(weight, sum(link.groups for link in links), links[0].moves)
