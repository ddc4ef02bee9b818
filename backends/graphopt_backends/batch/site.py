"""What is known of a node's inputs where the samples of a batch are followed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import onnx_ir as ir

from graphopt.analyses.channels.shape_values import Content

__all__ = ["CONSTANT", "Lay", "MixedError", "Rule", "Samples", "Site", "Size", "Times"]


class MixedError(Exception):
    """Samples do not stay apart; the text says what a node does, without a subject."""


@dataclass(frozen=True)
class Lay:
    """How samples lie in a value.

    Attributes:
        axis: Axis along which they lie one after the other, in order, with the same number of entries each; None: the
            value does not depend on the batch.
        numbers: `all`: every entry is the number of its sample; `first`: the first one along the last axis is.
        mixed: Why what belongs to a sample depends on more than this sample; the axis is then good for sizes only.
    """

    axis: int | None = None
    numbers: Literal["", "all", "first"] = ""
    mixed: str = ""


CONSTANT = Lay()


class Times:
    """So many times the size of the batch."""

    def __init__(self, factor: int) -> None:
        self.factor = factor

    def __mul__(self, other: Any) -> Times:
        return Times(self.factor * other) if isinstance(other, int) else NotImplemented

    __rmul__ = __mul__

    def __truediv__(self, other: Any) -> Times | int:
        divisor = other.factor if isinstance(other, Times) else other
        if not isinstance(divisor, int) or divisor <= 0 or self.factor % divisor:
            return NotImplemented
        return self.factor // divisor if isinstance(other, Times) else Times(self.factor // divisor)

    def __eq__(self, other: object) -> bool:
        if isinstance(other, Times):
            return self.factor == other.factor
        if isinstance(other, int) and other <= 0:
            return False
        raise TypeError("depends on the size of the batch")

    __hash__ = None  # type: ignore[assignment]


Size = Any
"""A number, or `Times` the size of the batch."""


@dataclass(frozen=True)
class Samples:
    """An input of a node.

    Attributes:
        name: Of the value; None where the input is left out.
        lay: How samples lie in it.
        shape: With the compiled size of the batch; None where it is not known.
        content: Its entries where they are constants, or sizes.
    """

    name: str | None
    lay: Lay = CONSTANT
    shape: tuple[int, ...] | None = None
    content: Content | None = None

    @property
    def numbers(self) -> tuple[Size, ...]:
        """Its entries, where they are known."""
        return () if self.content is None else tuple(entry.number for entry in self.content.reshape(-1))

    @property
    def counts(self) -> bool:
        """True if its entries hold the size of the batch."""
        return any(isinstance(number, Times) for number in self.numbers)

    @property
    def varies(self) -> bool:
        """True unless it is the same for all samples and batches."""
        return self.lay != CONSTANT or self.counts


class Site:
    """A node and what is known of its inputs; what is asked of an input raises `MixedError` where it is not known."""

    def __init__(self, node: ir.Node, size: int, inputs: Sequence[Samples]) -> None:
        self.node, self.size, self.inputs = node, size, inputs

    def given(self, index: int) -> bool:
        """True unless an input is left out."""
        return index < len(self.inputs) and self.inputs[index].name is not None

    def axis(self, index: int) -> int | None:
        """Axis of the samples in an input, None where they do not lie in it."""
        return self.inputs[index].lay.axis if self.given(index) else None

    def shape(self, index: int) -> tuple[int, ...]:
        """Shape of an input, with the compiled size of the batch."""
        shape = self.inputs[index].shape
        if shape is None:
            raise MixedError(f"reads {self.inputs[index].name!r}, whose shape is not known")
        return shape

    def rank(self, index: int) -> int:
        """Number of axes of an input."""
        return len(self.shape(index))

    def share(self, index: int) -> int:
        """Entries of a sample along the axis of samples."""
        axis = self.axis(index)
        return self.shape(index)[axis] // self.size if axis is not None else 0

    def sizes(self, index: int) -> tuple[Size, ...]:
        """The shape of an input for every size of the batch."""
        axis = self.axis(index)
        return tuple(Times(self.share(index)) if i == axis else n for i, n in enumerate(self.shape(index)))

    def numbers(self, index: int) -> tuple[Size, ...] | None:
        """Entries of an input, None where it is left out."""
        if not self.given(index):
            return None
        sample = self.inputs[index]
        if sample.content is None:
            raise MixedError(f"reads {sample.name!r}, which is not known before it runs")
        return sample.numbers

    def integer(self, name: str, default: int) -> int:
        """An attribute."""
        return self.node.attributes.get_int(name, default)

    def axes(self, index: int, rank: int) -> list[int] | None:
        """Axes that an attribute or an input names, None where nothing does."""
        named = self.node.attributes.get_ints("axes", None)
        found = self.numbers(index) if named is None else tuple(named)
        return None if found is None else [axis + rank if axis < 0 else axis for axis in found]

    def beside(self, axis: int, index: int = 0) -> int:
        """Axis of the samples in an input, which must be another one than the operator works along."""
        own = self.axis(index)
        assert own is not None
        if own == (axis + self.rank(index) if axis < 0 else axis):
            raise MixedError("works along the batch")
        return own

    def only(self, *indices: int) -> None:
        """All other inputs must be the same for all samples."""
        for i, sample in enumerate(self.inputs):
            if i not in indices and sample.lay.axis is not None:
                raise MixedError(f"takes {sample.name!r} from each sample")
        if all(self.axis(i) is None for i in indices):
            raise MixedError("takes the size of the batch")


Rule = Callable[[Site], Sequence[int | None]]
"""Axes of the samples in the first outputs; nobody may read the others."""
