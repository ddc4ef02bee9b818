"""What lies along the axes of a value, followed through the operators that only move elements.

A label is a tuple of parts, the slowest first: `("batch", "head")` where both share an axis, `()` for one of size 1.
`rows` are batch and heads on one axis, as long as nobody has told them apart.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import get_args

import onnx_ir as ir

from graphopt.analyses.attention.block import Axes, Axis
from graphopt.analyses.attention.sizes import Pair, Sizes

__all__ = ["CARRIERS", "LAYOUT", "Label", "Labels", "Parts", "as_axes"]

Label = tuple[str, ...]
Labels = tuple[Label, ...]

LAYOUT = frozenset({"Flatten", "Reshape", "Squeeze", "Transpose", "Unsqueeze"})
"""Operators that move elements."""

CARRIERS = frozenset({"Dropout", "Identity"})
"""Operators that do nothing when a model is used; Dropout by its first output."""

_SPLITS = {"rows": ("batch", "head"), "head": ("kv_head", "group"), "batch": ("sample", "window")}
_NAMES: dict[Label, str] = {
    (): "one",
    ("rows",): "batch*head",
    ("kv_head", "group"): "head",
    ("sample",): "batch",
    ("sample", "window"): "batch",
}


@dataclass
class Parts:
    """Sizes of the parts of one attention core; parts are told apart while its operands are followed.

    Attributes:
        sizes: Of each part.
    """

    sizes: dict[str, Pair] = field(default_factory=dict[str, Pair])

    def step_on(self, node: ir.Node, labels: Labels, sizes: Sizes) -> Labels | None:
        """Labels behind a node that moves elements or does nothing."""
        return self.forward(node, labels, sizes) if node.op_type in LAYOUT else labels

    def forward(self, node: ir.Node, labels: Labels, sizes: Sizes) -> Labels | None:
        """Labels behind a layout node, None if it mixes what labels keep apart."""
        source, made = node.inputs[0], node.outputs[0]
        if node.op_type == "Transpose":
            return tuple(labels[i] for i in _permutation(node, len(labels)))
        return self._moved(labels, source, made, sizes)

    def backward(self, node: ir.Node, labels: Labels, sizes: Sizes) -> Labels | None:
        """Labels ahead of a layout node."""
        source, made = node.inputs[0], node.outputs[0]
        if node.op_type == "Transpose":
            before: list[Label] = [()] * len(labels)
            for label, i in zip(labels, _permutation(node, len(labels)), strict=True):
                before[i] = label
            return tuple(before)
        return self._moved(labels, made, source, sizes)

    def _moved(self, labels: Labels, old: ir.Value | None, new: ir.Value | None, sizes: Sizes) -> Labels | None:
        blocks, rank = sizes.blocks(old, new), sizes.rank(new)
        if blocks is None or rank is None or sizes.rank(old) != len(labels):
            return None
        found: list[Label] = [()] * rank
        for olds, news in blocks:
            joined = tuple(part for axis in olds for part in labels[axis])
            wanted = [sizes.size(new, axis) for axis in news]
            split = self._split(joined, wanted)
            if split is None:
                return None
            for axis, label in zip(news, split, strict=True):
                found[axis] = label
        return tuple(found)

    def _split(self, label: Label, wanted: Sequence[Pair | None]) -> Sequence[Label] | None:
        """Spread the parts of a label over axes of these sizes."""
        if len(wanted) == 1:
            return [label]
        if not wanted:
            return [] if all(self.sizes.get(part, (1, 1)) == (1, 1) for part in label) else None
        rest, found = list(label), list[Label]()
        for size in wanted:
            taken = None if size is None else self._taken(rest, size)
            if taken is None:
                return None
            found.append(taken)
        return None if rest else found

    def _taken(self, rest: list[str], size: Pair) -> Label | None:
        """Take parts off the front that have this size together, splitting the last one where it is too large."""
        taken: list[str] = []
        left = size
        while rest and (left != (1, 1) or self.sizes.get(rest[0]) == (1, 1)):
            part = self.sizes.get(rest[0])
            if part is None:
                return None
            if _quotient(left, part) is None and not self._split_part(rest, part, left):
                return None
            part = self.sizes[rest[0]]
            left = _quotient(left, part) or left
            taken.append(rest.pop(0))
        return tuple(taken) if left == (1, 1) else None

    def _split_part(self, rest: list[str], part: Pair, size: Pair) -> bool:
        """Tell the first part in two: samples and heads, heads of keys and those that share them."""
        names, second = _SPLITS.get(rest[0]), _quotient(part, size)
        if names is None or second is None:
            return False
        self.sizes |= {names[0]: size, names[1]: second}
        rest[:1] = names
        return True


def _quotient(a: Pair, b: Pair) -> Pair | None:
    """One size in terms of another, None if it is no multiple of it."""
    return None if a[0] % b[0] or a[1] % b[1] else (a[0] // b[0], a[1] // b[1])


def as_axes(labels: Labels) -> Axes | None:
    """The names of labels, None if one has none."""
    names = [_NAMES.get(label, "*".join(label)) for label in labels]
    allowed: tuple[Axis, ...] = get_args(Axis)
    known = [name for name in names for axis in allowed if name == axis]
    return tuple(axis for name in known for axis in allowed if axis == name) if len(known) == len(names) else None


def _permutation(node: ir.Node, rank: int) -> tuple[int, ...]:
    return tuple(node.attributes.get_ints("perm", tuple(reversed(range(rank)))))
