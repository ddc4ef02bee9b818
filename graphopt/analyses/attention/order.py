"""Proof that a mask is the causal order: from what constants hold, and from comparisons of positions.

A position is an integer that grows by one along one axis: `value[..., i, ...] = i + offset`. Ranges are, and what
exporters make of them by reshaping, casting and adding; comparing those of keys and queries gives the order.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from graphopt.analyses.attention.labels import LAYOUT
from graphopt.analyses.attention.sizes import Pair, Sizes
from graphopt.analyses.attention.uniform import constant_array, uniform

__all__ = ["Bounds", "always", "hides_later", "order_of_mask", "order_of_test"]

_DEPTH = 32
_SQUARE = 2
_FOR_SURE = -1e3
_REACH = {"Greater": -1, "GreaterOrEqual": 0, "Less": -1, "LessOrEqual": 0}


@dataclass(frozen=True)
class Bounds:
    """Key j is seen by query i where `j <= i + last`.

    Attributes:
        last: How far ahead a query sees, negative where not even itself.
        fill: What is added to scores behind that, of float masks.
    """

    last: Pair
    fill: float = -np.inf


@dataclass(frozen=True)
class _Positions:
    """Integers that follow an axis, counted from the last (1); 0: one number for all."""

    axis: int
    offset: Pair


def order_of_test(value: ir.Value | None, sizes: Sizes, *, negated: bool) -> Bounds | None:
    """The order that a boolean mask (True: seen, unless negated) is, None if it is not nothing but an order."""
    node = _behind_copies(value, sizes)
    if isinstance(node, ir.Value):
        return _of_constant(node, sizes, negated=negated, boolean=True)
    if node is None:
        return None
    if node.op_type == "Equal" and uniform(node.inputs[1], sizes) == 0:
        return order_of_test(node.inputs[0], sizes, negated=not negated)
    if node.op_type == "Trilu":
        return _of_trilu(node, sizes, keeps_ones=not negated, boolean=True)
    if node.op_type == "Slice":
        return _of_slice(node, sizes, negated=negated, boolean=True)
    if node.op_type in _REACH:
        return _of_comparison(node, sizes, negated=negated)
    return None


def order_of_mask(value: ir.Value | None, sizes: Sizes) -> Bounds | None:
    """The order that an added mask (0: seen) is, None if it is not nothing but an order."""
    node = _behind_copies(value, sizes)
    if isinstance(node, ir.Value):
        return _of_constant(node, sizes, negated=False, boolean=False)
    if node is not None and node.op_type == "Trilu":
        return _of_trilu(node, sizes, keeps_ones=False, boolean=False)
    if node is not None and node.op_type == "Slice":
        return _of_slice(node, sizes, negated=False, boolean=False)
    return None


def hides_later(value: ir.Value | None, sizes: Sizes, *, negated: bool, boolean: bool) -> bool:
    """Whether a constant hides all later keys of as many queries, whatever else it hides."""
    array = constant_array(value, sizes)
    if array is None or array.ndim < _SQUARE or array.shape[-1] != array.shape[-2] or array.shape[-1] == 1:
        return False
    hidden = ((array != 0) == negated) if boolean else array <= _FOR_SURE
    return bool(np.all(hidden | np.tri(array.shape[-1], dtype=bool)))


def always(value: ir.Value | None, sizes: Sizes) -> bool | None:
    """What a boolean is everywhere, None if that depends."""
    number = uniform(value, sizes)
    if number is not None:
        return number != 0
    node = _behind_copies(value, sizes)
    if not isinstance(node, ir.Node) or node.op_type not in _REACH:
        return None
    positions, bound = _positions(node.inputs[0], sizes), sizes.content(node.inputs[1])
    floors = node.op_type in ("Greater", "GreaterOrEqual") and bound is not None and len(bound) == 1
    if positions is None or positions.axis == 0 or bound is None or not floors:
        return None
    least = min(positions.offset)
    return True if least > bound[0] or (least == bound[0] and node.op_type == "GreaterOrEqual") else None


def _behind_copies(value: ir.Value | None, sizes: Sizes) -> ir.Node | ir.Value | None:
    """What makes a mask, behind casts and axes of size 1 in front; the value itself where it is constant."""
    for _ in range(_DEPTH):
        if value is None or sizes.constants.of(value) is not None:
            return value
        node = value.producer()
        if node is None:
            return None
        if node.op_type not in ("Cast", "Expand", "Identity") and not _keeps_last_two(node, sizes):
            return node
        value = node.inputs[0]
    return None


def _keeps_last_two(node: ir.Node, sizes: Sizes) -> bool:
    """Whether a layout operator leaves the last two axes alone, and has nothing but ones in front."""
    if node.op_type not in ("Reshape", "Squeeze", "Unsqueeze"):
        return False
    source, made = node.inputs[0], node.outputs[0]
    ranks = sizes.rank(source), sizes.rank(made)
    if ranks[0] is None or ranks[1] is None or min(ranks[0], ranks[1]) < 2:
        return False
    same = all(sizes.size(source, a) is not None and sizes.size(source, a) == sizes.size(made, a) for a in (-1, -2))
    return same and all(sizes.fixed(v, a) == 1 for v, r in ((source, ranks[0]), (made, ranks[1])) for a in range(r - 2))


def _of_constant(value: ir.Value, sizes: Sizes, *, negated: bool, boolean: bool, shift: Pair = (0, 0)) -> Bounds | None:
    """Whether a constant is the order: all its matrices the same triangle."""
    array = constant_array(value, sizes)
    if array is None or array.ndim < 2 or min(array.shape[-2:]) < 2:
        return None
    matrices = array.reshape(-1, *array.shape[-2:])
    seen = ((matrices != 0) != negated) if boolean else matrices == 0
    last = int(seen[0, 0].sum()) - 1
    rows, columns = array.shape[-2:]
    if not np.all(seen == np.tri(rows, columns, last, dtype=bool)) or seen.all():
        return None
    hidden = matrices[~seen]
    fill = -np.inf if boolean else float(hidden.max())
    if not boolean and (fill >= 0 or fill != float(hidden.min())):
        return None
    return Bounds((last + shift[0], last + shift[1]), fill)


def _of_slice(node: ir.Node, sizes: Sizes, *, negated: bool, boolean: bool) -> Bounds | None:
    """A corner or a band of rows cut out of a constant."""
    shift: Pair = (0, 0)
    inner: ir.Node | None = node
    while inner is not None and inner.op_type in ("Slice", "Cast", "Identity"):
        if inner.op_type == "Slice":
            moved = _moved_by(inner, sizes)
            if moved is None:
                return None
            shift = (shift[0] + moved[0], shift[1] + moved[1])
        value = inner.inputs[0]
        if value is not None and sizes.constants.of(value) is not None:
            return _of_constant(value, sizes, negated=negated, boolean=boolean, shift=shift)
        inner = None if value is None else value.producer()
    return None


def _moved_by(node: ir.Node, sizes: Sizes) -> Pair | None:
    """How much further ahead a query sees behind a Slice: by the first row that is left, less the first column."""
    rank = sizes.rank(node.inputs[0])
    if rank is None or len(node.inputs) < 3:
        return None
    axes = (
        sizes.content(node.inputs[3])
        if len(node.inputs) > 3
        else tuple(range(len(sizes.content(node.inputs[1]) or ())))
    )
    steps = sizes.content(node.inputs[4]) if len(node.inputs) > 4 else (1,)
    if axes is None or len(axes) != 1 or steps != (1,):
        return None
    start = sizes.number(node.inputs[1])
    axis = int(axes[0]) % rank - rank
    if axis < -2:
        return (0, 0)
    if start is None or min(start) < 0:
        return None
    return start if axis == -2 else (-start[0], -start[1])


def _of_trilu(node: ir.Node, sizes: Sizes, *, keeps_ones: bool, boolean: bool) -> Bounds | None:
    """A triangle of a tensor that holds one number; what is not zero is seen, or is what hides."""
    number = uniform(node.inputs[0], sizes)
    diagonal: Pair | None = (0, 0)
    if len(node.inputs) > 1 and node.inputs[1] is not None:
        diagonal = sizes.number(node.inputs[1])
    upper = bool(node.attributes.get_int("upper", 1))
    if number is None or diagonal is None or number == 0 or upper == keeps_ones:
        return None  # what is seen would lie behind the diagonal
    last = (diagonal[0] - 1, diagonal[1] - 1) if upper else diagonal
    return Bounds(last, -np.inf if boolean else number)


def _of_comparison(node: ir.Node, sizes: Sizes, *, negated: bool) -> Bounds | None:
    left, right = (_positions(value, sizes) for value in node.inputs)
    operator = node.op_type
    if left is None or right is None:
        return None
    if negated:
        operator = {
            "Greater": "LessOrEqual", "GreaterOrEqual": "Less", "Less": "GreaterOrEqual", "LessOrEqual": "Greater"
        }[operator]  # fmt: skip
    keys, queries = (left, right) if operator.startswith("Less") else (right, left)
    if keys.axis != 1 or queries.axis != 2:
        return None
    a, b = (q - k + _REACH[operator] for q, k in zip(queries.offset, keys.offset, strict=True))
    return Bounds((a, b))


def _positions(value: ir.Value | None, sizes: Sizes, depth: int = _DEPTH) -> _Positions | None:
    """Positions along one axis, None if a value is anything else."""
    if value is None or depth == 0:
        return None
    array = constant_array(value, sizes)
    if array is not None:
        return _constant_positions(array)
    node = value.producer()
    number = sizes.number(value)
    if number is not None and not _is_range(node):
        return _Positions(0, number)
    if node is None or node.domain not in ("", "ai.onnx"):
        return None
    if node.op_type == "Range":
        start, step = sizes.number(node.inputs[0]), sizes.number(node.inputs[2])
        return None if start is None or step != (1, 1) else _Positions(1, start)
    first = _positions(node.inputs[0], sizes, depth - 1) if node.inputs else None
    if first is None:
        return None
    if node.op_type in ("Cast", "Expand", "Identity"):
        return first
    if node.op_type in LAYOUT:
        return _moved(first, node, sizes)
    if node.op_type in ("Add", "Sub"):
        return _shifted(first, _positions(node.inputs[1], sizes, depth - 1), node.op_type)
    return None


def _is_range(node: ir.Node | None) -> bool:
    """Whether a value that is one number here may be more at other sizes."""
    return node is not None and node.op_type in ("Range", "Expand", *LAYOUT)


def _constant_positions(array: np.ndarray) -> _Positions | None:
    if array.dtype.kind not in "iuf" or not array.size:
        return None
    if array.size == 1:
        return _Positions(0, (float(array.flat[0]), float(array.flat[0])))
    long = [axis for axis, size in enumerate(array.shape) if size > 1]
    start = float(array.flat[0])
    if len(long) != 1 or not np.array_equal(array.reshape(-1), start + np.arange(array.size)):
        return None
    return _Positions(array.ndim - long[0], (start, start))


def _shifted(first: _Positions, second: _Positions | None, operator: str) -> _Positions | None:
    if second is None or (first.axis and second.axis) or (operator == "Sub" and second.axis):
        return None
    sign = -1 if operator == "Sub" else 1
    a, b = (x + sign * y for x, y in zip(first.offset, second.offset, strict=True))
    return _Positions(first.axis or second.axis, (a, b))


def _moved(positions: _Positions, node: ir.Node, sizes: Sizes) -> _Positions | None:
    """Where positions lie behind a layout operator: on the one axis that still has their length."""
    if positions.axis == 0:
        return positions
    source, made = node.inputs[0], node.outputs[0]
    rank, length = sizes.rank(made), sizes.size(source, -positions.axis)
    if rank is None or length is None:
        return None
    if node.op_type == "Transpose":
        perm = node.attributes.get_ints("perm", tuple(reversed(range(rank))))
        return _Positions(rank - list(perm).index(rank - positions.axis), positions.offset)
    if length == (1, 1):
        return None
    long = [axis for axis in range(rank) if sizes.size(made, axis) != (1, 1)]
    if len(long) != 1 or sizes.size(made, long[0]) != length:
        return None
    return _Positions(rank - long[0], positions.offset)
