"""Random networks that are evaluated while they are drawn: every value is known, and how far rounding moves it.

Each operator runs in ONNX Runtime as soon as it is drawn, on some feeds. Beside each feed go copies of it in which
every float that is computed is moved a little, as another order of sums would. What moves too much, or changes where
it must be exact, is not drawn: integers and conditions that hang on a tie, differences of nearly equal numbers. How far
the copies of a value lie apart is how much another implementation may differ.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx_ir as ir

from graphopt.errors import ModelError
from graphopt.reference import Reference

__all__ = ["FEEDS", "Branch", "Case", "Drawing", "Rejected", "Step", "Tensor"]

Array = np.ndarray[Any, np.dtype[Any]]

FEEDS = 2
"""Feeds that a network is compared on."""

_COPIES = 3  # of a feed: one as it is, the others with moved numbers
_NOISE, _SPREAD = 2e-6, 1e-6  # how far a number is moved: of itself, and of the largest beside it
_MOVED, _SLACK = 1e-3, 8  # more than this is not drawn; a difference may be as many times what was seen
_ELEMENTS, _LARGEST = 6000, 1e4
_SHOWN = 8  # numbers of a constant in the text of a network
_HALF_STEP = {"float16": 2.0**-11, "bfloat16": 2.0**-8}


class Rejected(Exception):  # noqa: N818 - a draw that did not work out, no error
    """ONNX Runtime does not take an operator on these inputs, or its result is no good for a comparison."""


@dataclass(frozen=True)
class Branch:
    """A graph of an If."""

    steps: tuple[Step, ...]
    outputs: tuple[str, ...]


@dataclass(frozen=True)
class Step:
    """A node; an empty name is an input or output that is absent."""

    op: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: Mapping[str, Any] = field(default_factory=dict[str, Any])
    domain: str = ""

    @property
    def reads(self) -> tuple[str, ...]:
        """Names of what it reads, its branches included."""
        found = [name for name in self.inputs if name]
        for branch in self.attributes.values():
            if isinstance(branch, Branch):
                inside = {name for step in branch.steps for name in step.outputs}
                read = [name for step in branch.steps for name in step.reads]
                found += [name for name in (*read, *branch.outputs) if name not in inside]
        return tuple(dict.fromkeys(found))


@dataclass(frozen=True)
class Tensor:
    """A value: what it is for every copy of every feed."""

    name: str
    arrays: tuple[Array, ...]
    is_constant: bool = False

    @property
    def array(self) -> Array:
        """Its value for the first feed."""
        return self.arrays[0]

    @property
    def shape(self) -> tuple[int, ...]:
        """Sizes of its axes."""
        return self.array.shape

    @property
    def rank(self) -> int:
        """Axes."""
        return self.array.ndim

    @property
    def size(self) -> int:
        """Elements."""
        return self.array.size

    @property
    def dtype(self) -> str:
        """Name of its element type."""
        return str(self.array.dtype)

    def expected(self, feed: int) -> Array:
        """What it is for a feed."""
        return self.arrays[feed * _COPIES]

    @property
    def moved(self) -> float:
        """How far rounding moved it at most."""
        if not _is_float(self.array):
            return 0.0
        apart = 0.0
        for i, copy in enumerate(self.arrays):
            plain = self.expected(i // _COPIES)
            apart = max(apart, float(np.abs(copy.astype(np.float64) - plain.astype(np.float64)).max(initial=0)))
        return apart

    @property
    def greatest(self) -> float:
        """Its largest magnitude."""
        return max(float(np.abs(array.astype(np.float64)).max(initial=0)) for array in self.arrays)

    @property
    def tolerance(self) -> float:
        """How far another implementation may be off; 0: not at all."""
        if not _is_float(self.array):
            return 0.0
        return _SLACK * self.moved + _SPREAD * self.greatest * (1 if self.moved else 0)


@dataclass(frozen=True)
class Case:
    """A network with what it must give.

    Attributes:
        seed: What it was drawn from.
        opset: Version of its operators.
        steps: Its nodes in order.
        tensors: All values by name.
        outputs: Names of its outputs.
        names: Other names that some values have in the model.
    """

    seed: int
    opset: int
    steps: tuple[Step, ...]
    tensors: Mapping[str, Tensor]
    outputs: tuple[str, ...]
    names: Mapping[str, str] = field(default_factory=dict[str, str])

    @property
    def inputs(self) -> tuple[str, ...]:
        """Names of what is read or given back, and not made."""
        made = {name for step in self.steps for name in step.outputs}
        read = [name for step in self.steps for name in step.reads] + list(self.outputs)
        outside = dict.fromkeys(name for name in read if name not in made)
        return tuple(name for name in outside if not self.tensors[name].is_constant)

    def model(self) -> ir.Model:
        """The network; values that are read and not made are its inputs."""
        return _model(self.steps, self.tensors, self.inputs, self.outputs, self.opset, self.names)

    def feed(self, index: int) -> dict[str, Array]:
        """A feed by the names of the model."""
        return {self.names.get(name, name): self.tensors[name].expected(index) for name in self.inputs}

    def expected(self, index: int) -> list[tuple[str, Array, float]]:
        """Name, value and tolerance of every output."""
        found = [(name, self.tensors[name]) for name in self.outputs]
        return [(self.names.get(name, name), tensor.expected(index), tensor.tolerance) for name, tensor in found]

    def text(self) -> str:
        """Nodes in lines, with types and shapes."""
        given = [*self.inputs, *(name for name in self.tensors if self.tensors[name].is_constant)]
        read = {name for step in self.steps for name in step.reads} | set(self.outputs)
        lines = [f"opset {self.opset}, outputs {', '.join(self.outputs)}"]
        lines += [f"{self._described(name)} given" for name in given if name in read]
        for step in self.steps:
            made = ", ".join(self._described(name) for name in step.outputs if name)
            attributes = ", ".join(f"{name}={value}" for name, value in step.attributes.items())
            lines.append(f"{made} = {step.op}<{attributes}>({', '.join(step.inputs)})")
        return "\n".join(f"  {line}" for line in lines)

    def _described(self, name: str) -> str:
        tensor = self.tensors[name]
        value = f" = {tensor.array.tolist()}" if tensor.is_constant and tensor.size <= _SHOWN else ""
        return f"{tensor.dtype}{list(tensor.shape)} {name}{value}"

    def part(self, kept: Sequence[int]) -> Case:
        """Some of the nodes: what the others made is given, and what nobody reads any more is a result."""
        steps = tuple(self.steps[i] for i in kept)
        read = {name for step in steps for name in step.reads}
        made = [name for step in steps for name in step.outputs if name]
        outputs = tuple(name for name in made if name in self.outputs or name not in read)
        return Case(self.seed, self.opset, steps, self.tensors, outputs)


class Drawing:
    """A network that grows; see the module.

    Args:
        seed: Of everything that is drawn.
        opset: Version of the operators.
    """

    def __init__(self, seed: int, opset: int) -> None:
        self.rng, self.opset = np.random.default_rng(seed), opset
        self.tensors, self.steps = dict[str, Tensor](), list[Step]()

    # choices

    def number(self, least: int, most: int) -> int:
        """An integer, both ends included."""
        return int(self.rng.integers(least, most + 1))

    def one(self, options: Sequence[Any]) -> Any:
        """One of several."""
        return options[self.number(0, len(options) - 1)]

    def maybe(self, chance: float = 0.5) -> bool:
        """True as often as that."""
        return bool(self.rng.random() < chance)

    # tensors

    def find(self, fits: Callable[[Tensor], bool], chance: float = 0.9) -> Tensor | None:
        """A tensor that is there and fits, one of the last more likely; sometimes None though there is one."""
        fitting = [tensor for tensor in self.tensors.values() if not tensor.is_constant and fits(tensor)]
        if not fitting or not self.maybe(chance):
            return None
        return fitting[-1 - min(int(self.rng.exponential(3.0)), len(fitting) - 1)]

    def floats(self, least: int = 0, most: int = 5, fits: Callable[[Tensor], bool] = lambda _: True) -> Tensor:
        """A tensor of float32 whose rank lies between two numbers, new if need be.

        Raises:
            Rejected: The new one does not fit.
        """
        found = self.find(lambda t: t.dtype == "float32" and least <= t.rank <= most and fits(t))
        made = found or self.input(self.normal(self.shape(least, most)))
        if not fits(made):  # ONNX Runtime ends the process for a GRU without batches, for one
            raise Rejected("shape")
        return made

    def shape(self, least: int = 0, most: int = 5) -> tuple[int, ...]:
        """Sizes, odd ones mostly; rarely 0."""
        rank = self.number(max(least, min(2, most)), most) if self.maybe(0.8) else self.number(least, most)
        top = {0: 1, 1: 40, 2: 24, 3: 12, 4: 8}.get(rank, 5)
        sizes = [self.number(1, top) if self.maybe(0.85) else 1 for _ in range(rank)]
        if sizes and self.maybe(0.01):
            sizes[self.number(0, rank - 1)] = 0
        return tuple(sizes)

    def normal(self, shape: Sequence[int], scale: float = 1.0) -> list[Array]:
        """Random floats for every feed."""
        return [(scale * self.rng.standard_normal(shape)).astype(np.float32) for _ in range(FEEDS)]

    def input(self, arrays: Sequence[Array]) -> Tensor:
        """A new input."""
        return self._keep("x", tuple(array for array in arrays for _ in range(_COPIES)))

    def constant(self, array: Any, dtype: str = "") -> Tensor:
        """A constant, mostly one that others read as well where there is an equal one."""
        wanted = np.asarray(array, dtype or None)
        for tensor in self.tensors.values():
            same = tensor.is_constant and tensor.dtype == str(wanted.dtype) and tensor.shape == wanted.shape
            if same and np.array_equal(tensor.array, wanted) and self.maybe(0.8):
                return tensor
        return self._keep("c", (wanted,) * (FEEDS * _COPIES), is_constant=True)

    def factor(self, number: float) -> Tensor:
        """A constant that the copies of a feed see a little off: what it moves over a tie is not drawn."""
        array = np.array(number, np.float32)
        moved = [array if i % _COPIES == 0 else self._noisy(array) for i in range(FEEDS * _COPIES)]
        return self._keep("c", tuple(moved), is_constant=True)

    def ints(self, *numbers: int) -> Tensor:
        """A constant list of int64."""
        return self.constant(np.array(numbers, np.int64))

    def weight(self, *shape: int, scale: float = 0.0) -> Tensor:
        """A constant of random floats; their size keeps sums over all axes but the first near 1."""
        scale = scale or 1 / max(1.0, float(np.sqrt(np.prod(shape[1:]))))
        return self.constant(self.normal(shape, scale)[0])

    def _keep(self, stem: str, arrays: tuple[Array, ...], *, is_constant: bool = False) -> Tensor:
        tensor = Tensor(f"{stem}{len(self.tensors)}", arrays, is_constant)
        self.tensors[tensor.name] = tensor
        return tensor

    # nodes

    def add(self, op: str, *inputs: Tensor | None, count: int = 1, domain: str = "", **attributes: Any) -> Tensor:
        """Add a node; returns its first result, the others are there as well.

        Raises:
            Rejected: It cannot be.
        """
        return self.add_all(op, *inputs, count=count, domain=domain, **attributes)[0]

    def add_all(
        self, op: str, *inputs: Tensor | None, count: int = 1, domain: str = "", **attributes: Any
    ) -> list[Tensor]:
        """Add a node; returns all results."""
        first = len(self.tensors)
        outputs = tuple(f"v{first + i}" for i in range(count))
        names = tuple("" if tensor is None else tensor.name for tensor in inputs)
        step = Step(op, names, outputs, attributes, domain)
        found = [
            Tensor(name, self._moved(step, arrays)) for name, arrays in zip(outputs, self._results(step), strict=True)
        ]
        for tensor in found:
            _refuse_bad(tensor)
        self.steps.append(step)
        self.tensors |= {tensor.name: tensor for tensor in found}
        return found

    def _results(self, step: Step) -> list[list[Array]]:
        """Arrays of every copy of every feed, output by output."""
        reads = [self.tensors[name] for name in step.reads]
        given = [t for t in reads if not t.is_constant or any(array is not t.array for array in t.arrays)]
        typed = {name: Tensor(name, ()) for name in step.outputs}
        model = _model([step], self.tensors | typed, [t.name for t in given], step.outputs, self.opset, {})
        try:
            session = Reference(model, optimize=False)
            runs = [session.run({t.name: t.arrays[i] for t in given}) for i in range(FEEDS * _COPIES)]
        except ModelError as e:
            raise Rejected(step.op) from e
        return [[run[name] for run in runs] for name in step.outputs]

    def _moved(self, step: Step, arrays: Sequence[Array]) -> tuple[Array, ...]:
        """Move the numbers of the copies, unless the operator only moves elements, and what is constant throughout."""
        if _is_float(arrays[0]) and not all(np.isfinite(array).all() for array in arrays):
            raise Rejected("range")
        if step.op in _EXACT or not _is_float(arrays[0]) or all(self.tensors[n].is_constant for n in step.reads):
            return tuple(arrays)
        return tuple(array if i % _COPIES == 0 else self._noisy(array) for i, array in enumerate(arrays))

    def _noisy(self, array: Array) -> Array:
        wide = array.astype(np.float64)
        part = max(_NOISE, _HALF_STEP.get(str(array.dtype), 0.0))
        far = part * np.abs(wide) + _SPREAD * np.abs(wide).max(initial=0)
        return np.asarray(wide + np.where(wide == 0, 0, far) * self.rng.standard_normal(array.shape), array.dtype)


_EXACT = frozenset(
    {
        "Concat", "DepthToSpace", "Expand", "Flatten", "Gather", "GatherElements", "GatherND", "Identity", "MaxPool",
        "Pad", "Reshape", "ScatterElements", "ScatterND", "Slice", "SpaceToDepth", "Split", "Squeeze", "Tile",
        "Transpose", "Trilu", "Unsqueeze", "Where",
    }
)  # fmt: skip


def _is_float(array: Array) -> bool:
    return array.dtype.kind == "f" or array.dtype.name == "bfloat16"


def _refuse_bad(tensor: Tensor) -> None:
    """What cannot be compared: too large, or too near to where it would be something else."""
    plain = [tensor.expected(feed) for feed in range(FEEDS)]
    if tensor.size > _ELEMENTS or len({array.shape for array in tensor.arrays}) > 1:
        raise Rejected("size")
    if _is_float(tensor.array):
        if tensor.greatest > _LARGEST:
            raise Rejected("range")
        if tensor.moved > _MOVED * tensor.greatest:
            raise Rejected("unstable")
    else:
        if any(not np.array_equal(array, plain[i // _COPIES]) for i, array in enumerate(tensor.arrays)):
            raise Rejected("tie")
        if tensor.array.dtype.kind in "iu" and tensor.greatest > 2**30:
            raise Rejected("range")


def _model(
    steps: Sequence[Step], tensors: Mapping[str, Tensor], inputs: Sequence[str], outputs: Sequence[str], opset: int,
    names: Mapping[str, str],
) -> ir.Model:  # fmt: skip
    values: dict[str, ir.Value] = {}
    read = dict.fromkeys([*(name for step in steps for name in step.reads), *outputs])

    def described(name: str) -> ir.Value:
        value, tensor = ir.Value(name=names.get(name, name)), tensors.get(name)
        if tensor is not None and tensor.arrays:
            value.dtype = ir.DataType.from_numpy(tensor.array.dtype)
            value.shape = ir.Shape(tensor.shape)
        return value

    for name in dict.fromkeys([*inputs, *read]):
        if name in inputs or tensors[name].is_constant:
            values[name] = described(name)
        if name not in inputs and tensors[name].is_constant:
            values[name].const_value = ir.tensor(tensors[name].array, name=values[name].name)
    constants = [value for value in values.values() if value.const_value is not None]
    nodes = [_node(step, values, described, opset) for step in steps]
    graph = ir.Graph(
        [values[name] for name in inputs], [values[name] for name in outputs], nodes=nodes, initializers=constants,
        opset_imports={"": opset, "com.microsoft": 1}, name="network",
    )  # fmt: skip
    return ir.Model(graph, ir_version=10)


def _node(step: Step, values: dict[str, ir.Value], described: Callable[[str], ir.Value], opset: int) -> ir.Node:
    attributes: dict[str, Any] = {}
    for name, given in step.attributes.items():
        attributes[name] = _branch(given, values, described, opset) if isinstance(given, Branch) else given
    outputs = [described(name) if name else ir.Value(name="") for name in step.outputs]
    inputs = [values[name] if name else None for name in step.inputs]
    values |= {name: value for name, value in zip(step.outputs, outputs, strict=True) if name}
    return ir.Node(
        step.domain, step.op, inputs, ir.convenience.convert_attributes(attributes), outputs=outputs,
        name=f"{step.op}_{step.outputs[0]}",
    )  # fmt: skip


def _branch(
    branch: Branch, values: Mapping[str, ir.Value], described: Callable[[str], ir.Value], opset: int
) -> ir.Graph:
    inside = dict(values)
    nodes = [_node(step, inside, described, opset) for step in branch.steps]
    return ir.Graph(
        [], [inside[name] for name in branch.outputs], nodes=nodes, opset_imports={"": opset}, name="branch"
    )
