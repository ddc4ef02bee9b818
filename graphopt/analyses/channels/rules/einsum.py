"""How channels pass through Einsum: every letter is an axis that its operands and the output share."""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from graphopt.analyses.channels.node_view import NodeView

__all__ = ["einsum", "einsum_labels"]

Labels = tuple[str, ...]
_Uses = list[tuple[ir.Value, int]]


def einsum_labels(equation: str, ranks: Sequence[int]) -> tuple[tuple[Labels, ...], Labels] | None:
    """What every axis of the operands and of the output is called.

    Args:
        equation: Such as `bij,bjk->bik`; axes under an ellipsis are called `.1`, `.2` ... from the right.
        ranks: Rank of every operand.

    Returns:
        Labels of the operands, and of the output; None where the equation does not fit the ranks.
    """
    left, arrow, right = equation.replace(" ", "").partition("->")
    terms = left.split(",")
    if len(terms) != len(ranks):
        return None
    hidden = [rank - len(term.replace("...", "")) for term, rank in zip(terms, ranks, strict=True)]
    if any(count < 0 or (count and "..." not in term) for count, term in zip(hidden, terms, strict=True)):
        return None
    operands = tuple(_expand(term, count) for term, count in zip(terms, hidden, strict=True))
    if arrow:
        return operands, _expand(right, max(hidden))
    every = [label for labels in operands for label in labels]
    alone = sorted({label for label in every if every.count(label) == 1 and not label.startswith(".")})
    return operands, (*_expand("...", max(hidden)), *alone)


def _expand(term: str, hidden: int) -> Labels:
    before, dots, after = term.partition("...")
    middle = [f".{i}" for i in range(hidden, 0, -1)] if dots else []
    return (*before, *middle, *after)


def einsum(view: NodeView) -> None:
    """Tie the axes of every letter; a letter twice in one operand is a diagonal, and stays."""
    output, operands = view.node.outputs[0], [value for value in view.inputs if value is not None]
    ranks = [rank for value in operands if (rank := view.rank(value)) is not None]
    named = (
        einsum_labels(view.node.attributes.get_string("equation", ""), ranks) if len(ranks) == len(operands) else None
    )
    if named is None or len({id(value) for value in operands}) < len(operands) or view.rank(output) != len(named[1]):
        return
    _roles(view, operands, *named)
    uses: dict[str, _Uses] = {}
    for value, labels in zip(operands, named[0], strict=True):
        for axis, label in enumerate(labels):
            uses.setdefault(label, []).append((value, axis))
    for label, places in uses.items():
        values = [value for value, _ in places]
        if len({id(value) for value in values}) < len(values):
            for value, axis in places:
                view.maps.pin(view.atoms(value, axis), view.reason)
        elif label in named[1]:
            for value, axis in places:
                view.link(value, axis, output, named[1].index(label))
        elif any(view.maps.origin(value) is not None or view.is_zero(value) for value in values):
            _add_over(view, places)
    for label, value, axis in ((label, output, axis) for axis, label in enumerate(named[1])):
        if label not in uses:
            view.maps.pin(view.atoms(value, axis), view.reason)


def _add_over(view: NodeView, places: _Uses) -> None:
    """A letter that the output does not have: what is zero in one operand adds nothing."""
    first, axis = places[0]
    if len(places) == 1 and view.atoms(first, axis) is not None and view.is_zero(first):
        view.settle(first, axis)
    for value, own in places[1:]:
        view.link(first, axis, value, own)


def _roles(view: NodeView, operands: Sequence[ir.Value], labels: Sequence[Labels], made: Labels) -> None:
    """A constant operand is a weight: it reads the letters that are added over and makes those that only it has."""
    for i, value in enumerate(operands):
        if view.maps.origin(value) is None:
            continue
        if len(labels[i]) > 2 and labels[i][0] in made:
            view.stack(value, 0)
        elsewhere = {label for j, other in enumerate(labels) if j != i for label in other}
        for axis, label in enumerate(labels[i]):
            if label in made and label not in elsewhere:
                view.role(value, axis, "output")
            elif label not in made and label in elsewhere:
                view.role(value, axis, "input")
