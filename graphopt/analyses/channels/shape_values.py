"""Small integer tensors that shape arithmetic computes, with the axes that each entry was read from.

Exporters leave `Shape -> Gather -> Concat -> Reshape` behind. Following it tells which sizes such a chain reads, and
gives the numbers of one that reads none.
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

__all__ = ["AxisName", "Content", "Entry", "constant_content", "evaluate", "numbers", "reads"]

AxisName = tuple[str, int]
"""Name of a value, and one of its axes."""
Content = np.ndarray[Any, np.dtype[np.object_]]
"""Array of `Entry`."""

_LARGEST = 64


@dataclass(frozen=True)
class Entry:
    """One entry of a small tensor.

    Attributes:
        number: Its value, None where unknown.
        axis: The axis whose size it is, if it is nothing but that.
        reads: All axes whose sizes went into it.
    """

    number: float | int | None
    axis: AxisName | None = None
    reads: tuple[AxisName, ...] = ()


def constant_content(tensor: ir.TensorProtocol) -> Content | None:
    """Entries of a constant, None if it is large or not numeric."""
    if tensor.size > _LARGEST or tensor.dtype == ir.DataType.STRING:
        return None
    array = tensor.numpy()
    return _pack([Entry(number) for number in array.reshape(-1).tolist()], array.shape)


def numbers(content: Content | None) -> tuple[Any, ...] | None:
    """All entries as numbers, None unless all are known."""
    if content is None:
        return None
    found = tuple(entry.number for entry in content.reshape(-1))
    return None if any(number is None for number in found) else found


def reads(content: Content | None) -> tuple[AxisName, ...]:
    """All axes that went into a tensor."""
    return () if content is None else tuple(sorted({axis for entry in content.reshape(-1) for axis in entry.reads}))


def evaluate(node: ir.Node, inputs: Sequence[Content | None]) -> Content | None:
    """Compute the output of a shape-arithmetic node, None if it is something else or too large."""
    function = _OPERATORS.get(node.op_type)
    if function is None or node.domain not in ("", "ai.onnx") or not inputs or inputs[0] is None:
        return None
    if any(content is None and value is not None for content, value in zip(inputs, node.inputs, strict=True)):
        return None
    try:
        result = function(node, [content for content in inputs if content is not None])
    except (ValueError, IndexError, TypeError, ArithmeticError):
        return None  # an unknown number where one is needed: the chain ends here, and its reader pins what it read
    return None if result is None or result.size > _LARGEST else result


def _pack(entries: Sequence[Entry], shape: Sequence[int]) -> Content:
    packed = np.empty(len(entries), dtype=object)
    for i, entry in enumerate(entries):
        packed[i] = entry
    return packed.reshape(tuple(shape))


def _integers(content: Content) -> list[int]:
    """Numbers of an operand that must be fixed; raises TypeError where one is unknown or was read from a shape."""
    found = [entry.number if not entry.reads else None for entry in content.reshape(-1)]
    return [int(number) for number in found]  # type: ignore[arg-type]


def _gather(node: ir.Node, inputs: list[Content]) -> Content:
    index = np.array(_integers(inputs[1]), dtype=np.int64).reshape(inputs[1].shape)
    taken: Any = np.take(inputs[0], index, axis=node.attributes.get_int("axis", 0))
    return taken if isinstance(taken, np.ndarray) else _pack([taken], ())  # type: ignore[return-value]


def _slice(node: ir.Node, inputs: list[Content]) -> Content:
    if len(inputs) > 1:
        lists = [_integers(content) for content in inputs[1:]]
    else:
        lists = [list(node.attributes.get_ints(name, ())) for name in ("starts", "ends")]
        lists += [list(node.attributes.get_ints("axes", ()))] if "axes" in node.attributes else []
    starts, ends = lists[0], lists[1]
    axes = lists[2] if len(lists) > 2 else list(range(len(starts)))
    steps = lists[3] if len(lists) > 3 else [1] * len(starts)
    result = inputs[0]
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        size = result.shape[axis]
        stop = None if step < 0 and end < -size else end
        index: list[slice] = [slice(None)] * result.ndim
        index[axis] = slice(start, stop, step)
        result = result[tuple(index)]
    return result


def _axes(node: ir.Node, inputs: list[Content]) -> list[int]:
    return _integers(inputs[1]) if len(inputs) > 1 else list(node.attributes.get_ints("axes", ()))


def _unsqueeze(node: ir.Node, inputs: list[Content]) -> Content:
    return np.expand_dims(inputs[0], tuple(_axes(node, inputs)))


def _squeeze(node: ir.Node, inputs: list[Content]) -> Content:
    return np.squeeze(inputs[0], tuple(_axes(node, inputs)) or None)


def _reshape(node: ir.Node, inputs: list[Content]) -> Content:  # noqa: ARG001
    target = _integers(inputs[1])
    return inputs[0].reshape([inputs[0].shape[i] if size == 0 else size for i, size in enumerate(target)])


def _cast(node: ir.Node, inputs: list[Content]) -> Content:
    kind = int if ir.DataType(node.attributes.get_int("to", 1)).is_integer() else float

    def convert(entry: Entry) -> Entry:
        if entry.number is None or type(entry.number) is kind:
            return entry
        # a size cast to float is no longer taken for the size itself, so that rounding cannot go unseen
        return Entry(kind(entry.number), None, entry.reads)

    return _pack([convert(entry) for entry in inputs[0].reshape(-1)], inputs[0].shape)


def _constant_of_shape(node: ir.Node, inputs: list[Content]) -> Content | None:
    shape = _integers(inputs[0])
    if math.prod(shape) > _LARGEST:
        return None
    attribute = node.attributes.get("value")
    number = attribute.as_tensor().numpy().reshape(-1).tolist()[0] if attribute is not None else 0.0
    return _pack([Entry(number)] * math.prod(shape), shape)


def _elementwise(function: Callable[..., Any]) -> Callable[[ir.Node, list[Content]], Content]:
    def apply(node: ir.Node, inputs: list[Content]) -> Content:  # noqa: ARG001
        operands = np.broadcast_arrays(*inputs)
        results: list[Entry] = []
        for entries in zip(*(operand.reshape(-1) for operand in operands), strict=True):
            known = [entry.number for entry in entries]
            number = None if any(n is None for n in known) else function(*known)
            results.append(Entry(number, None, _united(*entries)))
        return _pack(results, operands[0].shape)

    return apply


def _equal(node: ir.Node, inputs: list[Content]) -> Content:  # noqa: ARG001
    """Comparison; a size that is open is no negative number, as which exporters write "leave as it is"."""

    def compare(a: Entry, b: Entry) -> Entry:
        for size, other in ((a, b), (b, a)):
            if size.number is None and size.axis is not None and other.number is not None and other.number < 0:
                return Entry(False)
        known = a.number is not None and b.number is not None
        return Entry(a.number == b.number if known else None, None, _united(a, b))

    left, right = np.broadcast_arrays(*inputs)
    return _pack([compare(a, b) for a, b in zip(left.reshape(-1), right.reshape(-1), strict=True)], left.shape)


def _where(node: ir.Node, inputs: list[Content]) -> Content:  # noqa: ARG001
    """Each entry from the side that a known condition picks, so that sizes are still known as such."""
    operands = np.broadcast_arrays(*inputs)
    results: list[Entry] = []
    for condition, yes, no in zip(*(operand.reshape(-1) for operand in operands), strict=True):
        if condition.number is None:
            raise TypeError("an unknown condition")
        chosen = yes if condition.number else no
        results.append(Entry(chosen.number, None if condition.reads else chosen.axis, _united(chosen, condition)))
    return _pack(results, operands[0].shape)


def _united(*entries: Entry) -> tuple[AxisName, ...]:
    return tuple(sorted({axis for entry in entries for axis in entry.reads}))


def _reduce(function: Callable[..., Any]) -> Callable[[ir.Node, list[Content]], Content]:
    """All entries together."""

    def apply(node: ir.Node, inputs: list[Content]) -> Content:
        entries = list(inputs[0].reshape(-1))
        axes = _axes(node, inputs)
        if inputs[0].ndim != 1 or axes not in ([], [0], [-1]) or any(entry.number is None for entry in entries):
            raise TypeError("not one list of known numbers")
        number = functools.reduce(function, (entry.number for entry in entries))
        return _pack([Entry(number, None, _united(*entries))], (1,) if node.attributes.get_int("keepdims", 1) else ())

    return apply


def _expand(node: ir.Node, inputs: list[Content]) -> Content:  # noqa: ARG001
    shape = _integers(inputs[1])
    if math.prod(shape) > _LARGEST:
        raise ValueError("too large")
    return np.broadcast_to(inputs[0], np.broadcast_shapes(inputs[0].shape, tuple(shape)))


def _range(node: ir.Node, inputs: list[Content]) -> Content:  # noqa: ARG001
    start, stop, step = (_integers(content)[0] for content in inputs)
    found = range(start, stop, step)
    if len(found) > _LARGEST:
        raise ValueError("too large")
    return _pack([Entry(number) for number in found], (len(found),))


def _divide(a: float, b: float) -> float:
    if isinstance(a, int) and isinstance(b, int):
        return abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)
    return a / b


def _power(a: float, b: float) -> float:
    return a**b


def _floor(a: float) -> float:
    return float(math.floor(a))


def _ceil(a: float) -> float:
    return float(math.ceil(a))


_OPERATORS: dict[str, Callable[[ir.Node, list[Content]], Content | None]] = {
    "Gather": _gather,
    "Slice": _slice,
    "Concat": lambda node, inputs: np.concatenate(inputs, axis=node.attributes.get_int("axis", 0)),
    "Unsqueeze": _unsqueeze,
    "Squeeze": _squeeze,
    "Reshape": _reshape,
    "Transpose": lambda node, inputs: np.transpose(inputs[0], node.attributes.get_ints("perm", None)),
    "Cast": _cast,
    "Identity": lambda node, inputs: inputs[0],  # noqa: ARG005
    "ConstantOfShape": _constant_of_shape,
    "Add": _elementwise(operator.add),
    "Sub": _elementwise(operator.sub),
    "Mul": _elementwise(operator.mul),
    "Div": _elementwise(_divide),
    "Neg": _elementwise(operator.neg),
    "Abs": _elementwise(abs),
    "Mod": _elementwise(operator.mod),
    "Pow": _elementwise(_power),
    "And": _elementwise(min),
    "Or": _elementwise(max),
    "Sqrt": _elementwise(math.sqrt),
    "Min": _elementwise(min),
    "Max": _elementwise(max),
    "Equal": _equal,
    "Greater": _elementwise(operator.gt),
    "Less": _elementwise(operator.lt),
    "Not": _elementwise(operator.not_),
    "Where": _where,
    "ReduceProd": _reduce(operator.mul),
    "ReduceSum": _reduce(operator.add),
    "ReduceMax": _reduce(max),
    "ReduceMin": _reduce(min),
    "Expand": _expand,
    "Range": _range,
    "Floor": _elementwise(_floor),
    "Ceil": _elementwise(_ceil),
}
