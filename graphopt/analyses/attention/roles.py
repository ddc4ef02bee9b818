"""Which axis of the scores is which: samples, heads, queries, keys."""

from __future__ import annotations

from dataclasses import dataclass

from graphopt.analyses.attention.labels import Label, Labels, Parts
from graphopt.analyses.attention.product import Product
from graphopt.analyses.attention.sizes import Sizes
from graphopt.analyses.attention.softmax import Softmax
from graphopt.analyses.attention.trail import Trail

__all__ = ["Roles", "read_roles"]

_BATCHES: tuple[Labels, ...] = ((), (("rows",),), (("batch",), ("head",)))
_GROUPED: Labels = (("batch",), ("kv_head",), ("group",))
_WINDOWED: Labels = (("batch",), ("window",), ("head",))


@dataclass(frozen=True, eq=False)
class Roles:
    """What lies along the axes of the scores.

    Attributes:
        keys: Which operand of the first product the keys are.
        labels: Of its letters.
        made: Labels of its result.
        softmax: Labels of the scores where the softmax reads them.
        parts: Sizes of the parts.
    """

    keys: int
    labels: dict[str, Label]
    made: Labels
    softmax: Labels
    parts: Parts

    @property
    def names(self) -> set[str]:
        """All parts that the first product has."""
        return {part for label in self.labels.values() for part in label}


def read_roles(trail: Trail, softmax: Softmax, sizes: Sizes) -> Roles | None:
    """Find the operand whose own axis the softmax runs along: it holds the keys; None if there is none."""
    for keys in (1, 0):
        roles = _with_keys(keys, trail, softmax, sizes)
        if roles is not None:
            return roles
    return None


def _with_keys(keys: int, trail: Trail, softmax: Softmax, sizes: Sizes) -> Roles | None:
    product = trail.product
    labels = _letters(product, keys, sizes)
    if labels is None:
        return None
    made = tuple(labels[letter] for letter in product.out)
    parts = Parts()
    for axis, label in enumerate(made):
        size = sizes.size(product.node.outputs[0], axis)
        if size is not None and label:
            parts.sizes[label[0]] = size
    found: Labels | None = made
    for step in trail.steps:
        if step.kind == "layout" and found is not None:
            found = parts.step_on(step.node, found, sizes)
    if found is None or len(found) != softmax.rank or found[softmax.axis] != ("key",) or ("query",) not in found:
        return None
    return Roles(keys, labels, made, found, parts)


def _letters(product: Product, keys: int, sizes: Sizes) -> dict[str, Label] | None:
    """What the letters of the first product are, if the keys are this operand."""
    own, queries = product.own(keys), product.own(1 - keys)
    if len(own) != 1 or not queries:
        return None
    query = queries[-1]
    shared = [letter for letter in product.out if letter not in (own, query)]
    names = _names(product, keys, shared, sizes)
    if names is None:
        return None
    return dict(zip(shared, names, strict=True)) | {query: ("query",), own: ("key",)}


def _names(product: Product, keys: int, shared: list[str], sizes: Sizes) -> Labels | None:
    if len(shared) < len(_BATCHES):
        return _BATCHES[len(shared)]
    if len(shared) != len(_GROUPED):
        return None
    word, operand = product.letters[keys], product.operands[keys]
    last = shared[-1]
    grouped = last not in word or sizes.size(operand, word.index(last)) == (1, 1)
    return _GROUPED if grouped else _WINDOWED
