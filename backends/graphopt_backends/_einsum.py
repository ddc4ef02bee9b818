"""Einsum as sums, transpositions and one matrix product for each pair of operands."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import onnx_ir as ir

from graphopt_backends._builder import Builder
from graphopt_backends._fold import static_shape

__all__ = ["einsum", "letters"]


@dataclass(frozen=True)
class _Term:
    """A value with a letter for each axis."""

    value: ir.Value
    letters: str


def einsum(graph: ir.Graph, node: ir.Node) -> bool:
    """Replace an Einsum whose operands name no axis twice."""
    shapes = [static_shape(value) for value in node.inputs]
    equation = node.attributes.get_string("equation", "").replace(" ", "")
    terms, result = letters(equation, [shape for shape in shapes if shape is not None])
    if len(terms) != len(node.inputs) or any(len(set(term)) != len(term) for term in (*terms, result)):
        return False
    sizes: dict[str, int] = {}
    for term, shape in zip(terms, shapes, strict=True):
        for letter, size in zip(term, shape or (), strict=True):
            if sizes.setdefault(letter, size) != size:
                return False  # a size of 1 that is repeated
    make = Builder(graph, node)
    waiting = [_Term(value, term) for value, term in zip(node.inputs, terms, strict=True) if value is not None]
    found = waiting.pop(0)
    while waiting:
        kept = set(result).union(*(term.letters for term in waiting[1:]))
        found = _product(make, found, waiting.pop(0), kept, sizes)
    found = _summed(make, found, set(result))
    make.finish("Transpose", [found.value], node.outputs[0], perm=[found.letters.index(i) for i in result])
    return True


def letters(equation: str, shapes: Sequence[Sequence[int]]) -> tuple[list[str], str]:
    """Letters of the operands and of the result; three dots become capitals that the equation has not."""
    left, arrow, result = equation.partition("->")
    terms = left.split(",")
    if len(terms) != len(shapes):
        return [], ""
    free = [letter for letter in "ABCDEFGHIJKLMNOPQRSTUVWXYZ" if letter not in equation]
    hidden = [len(shape) - len(term.replace("...", "")) for term, shape in zip(terms, shapes, strict=True)]
    most = max((count for term, count in zip(terms, hidden, strict=True) if "..." in term), default=0)
    dots = "".join(free[:most])
    terms = [
        term.replace("...", dots[most - count :] if count else "") for term, count in zip(terms, hidden, strict=True)
    ]
    if any(len(term) != len(shape) for term, shape in zip(terms, shapes, strict=True)):
        return [], ""
    if not arrow:
        everything = "".join(terms)
        result = dots + "".join(sorted(i for i in set(everything) - set(dots) if everything.count(i) == 1))
    return terms, result.replace("...", dots)


def _summed(make: Builder, term: _Term, kept: set[str]) -> _Term:
    """Without the axes that nothing names any more."""
    gone = [i for i, letter in enumerate(term.letters) if letter not in kept]
    if not gone:
        return term
    value = make("ReduceSum", [term.value, make.ints(gone)], keepdims=0)
    return _Term(value, "".join(letter for letter in term.letters if letter in kept))


def _product(make: Builder, left: _Term, right: _Term, kept: set[str], sizes: dict[str, int]) -> _Term:
    """Common axes that are kept are those of a batch, the other common ones are summed over."""
    left, right = _summed(make, left, kept | set(right.letters)), _summed(make, right, kept | set(left.letters))
    common = set(left.letters) & set(right.letters)
    batch = [i for i in left.letters if i in common and i in kept]
    inner = [i for i in left.letters if i in common and i not in kept]
    rows, columns = ([i for i in term.letters if i not in common] for term in (left, right))

    def matrices(term: _Term, letters: Sequence[str], parts: Sequence[Sequence[str]]) -> ir.Value:
        moved = make("Transpose", [term.value], perm=[term.letters.index(i) for i in letters])
        shape = [sizes[i] for i in batch] + [math.prod(sizes[i] for i in part) for part in parts]
        return make("Reshape", [moved, make.ints(shape)])

    a = matrices(left, [*batch, *rows, *inner], (rows, inner))
    b = matrices(right, [*batch, *inner, *columns], (inner, columns))
    letters = "".join((*batch, *rows, *columns))
    value = make("Reshape", [make("MatMul", [a, b]), make.ints([sizes[i] for i in letters])])
    return _Term(value, letters)
