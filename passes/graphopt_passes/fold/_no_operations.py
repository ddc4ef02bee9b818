"""Nodes that give back what they were given."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import onnx_ir as ir

from graphopt.analyses import Shapes
from graphopt.pass_base import Change
from graphopt_passes.fold.rewiring import DETERMINISTIC_DOMAINS, bypass, constant, site

__all__ = ["merge_transposes", "remove_no_operations"]

_SMALL = 4096
_INFERENCE_ONLY_SINCE = 7


def remove_no_operations(model: ir.Model, shapes: Shapes) -> list[Change]:
    """Remove Identity, inference-time Dropout, and casts, reshapes, pads, slices ... that change nothing."""
    opset = model.opset_imports.get("", 0)
    changes: list[Change] = []
    for graph in list(model.graphs()):
        for node in graph:
            test = _TESTS.get(node.op_type) if node.domain in DETERMINISTIC_DOMAINS else None
            if test is None or not node.inputs or node.inputs[0] is None:
                continue
            if node.op_type == "Dropout" and opset < _INFERENCE_ONLY_SINCE:
                continue
            source = test(node, shapes)
            if source is None:
                continue
            reason = bypass(node, source)
            name = site(node)
            changes.append(
                Change.skipped(name, reason)
                if reason
                else Change(name, f"removed: this {node.op_type} changes nothing")
            )
    return changes


def merge_transposes(model: ir.Model) -> list[Change]:
    """Turn two Transposes in a row into one."""
    changes: list[Change] = []
    for graph in list(model.graphs()):
        for node in graph:
            inner = node.inputs[0].producer() if node.op_type == "Transpose" and node.inputs[0] is not None else None
            if inner is None or inner.op_type != "Transpose" or inner.graph is not graph:
                continue
            first, second = inner.attributes.get_ints("perm"), node.attributes.get_ints("perm")
            if first is None or second is None:
                continue
            node.attributes["perm"] = ir.AttrInt64s("perm", [first[axis] for axis in second])
            node.replace_input_with(0, inner.inputs[0])
            changes.append(Change(site(node), f"merged with the Transpose {site(inner)!r} before it"))
    return changes


def _numbers(value: ir.Value | None) -> np.ndarray | None:
    tensor = constant(value)
    return None if tensor is None or tensor.size > _SMALL or tensor.dtype.is_string() else tensor.numpy()


def _input(node: ir.Node, index: int) -> ir.Value | None:
    return node.inputs[index] if index < len(node.inputs) else None


def _always(node: ir.Node, shapes: Shapes) -> ir.Value | None:  # noqa: ARG001
    return node.inputs[0]


def _dropout(node: ir.Node, shapes: Shapes) -> ir.Value | None:  # noqa: ARG001
    training = _input(node, 2)
    flag = _numbers(training)
    return node.inputs[0] if training is None or (flag is not None and not flag.any()) else None


def _cast(node: ir.Node, shapes: Shapes) -> ir.Value | None:
    kind = shapes.dtype(node.inputs[0])
    return node.inputs[0] if kind is not None and kind == node.attributes.get_int("to") else None


def _single(node: ir.Node, shapes: Shapes) -> ir.Value | None:  # noqa: ARG001
    return node.inputs[0] if len(node.inputs) == 1 else None


def _transpose(node: ir.Node, shapes: Shapes) -> ir.Value | None:  # noqa: ARG001
    perm = node.attributes.get_ints("perm")
    return node.inputs[0] if perm is not None and list(perm) == list(range(len(perm))) else None


def _same_shape(node: ir.Node, shapes: Shapes) -> ir.Value | None:
    before, after = shapes.static(node.inputs[0]), shapes.static(node.outputs[0])
    return node.inputs[0] if before is not None and before == after else None


def _reshape(node: ir.Node, shapes: Shapes) -> ir.Value | None:
    """A target that repeats the shape, with one dimension left to be computed or any copied by 0."""
    dims, target = shapes.of(node.inputs[0]), _numbers(_input(node, 1))
    if _same_shape(node, shapes) is not None:
        return node.inputs[0]
    if dims is None or target is None or target.shape != (len(dims),) or node.attributes.get_int("allowzero", 0):
        return None
    open_ends = sum(t == -1 and not isinstance(d, int) for t, d in zip(target, dims, strict=True))
    fits = all(t in (0, -1) or t == d for t, d in zip(target, dims, strict=True))
    return node.inputs[0] if fits and open_ends <= 1 else None


def _flatten(node: ir.Node, shapes: Shapes) -> ir.Value | None:
    return (
        node.inputs[0] if shapes.rank(node.inputs[0]) == 2 and node.attributes.get_int("axis", 1) in (1, -1) else None
    )


def _pad(node: ir.Node, shapes: Shapes) -> ir.Value | None:  # noqa: ARG001
    pads = node.attributes.get_ints("pads")
    widths = np.asarray(pads) if pads is not None else _numbers(_input(node, 1))
    return node.inputs[0] if widths is not None and not widths.any() else None


def _slice(node: ir.Node, shapes: Shapes) -> ir.Value | None:
    """Every axis from the start to the end, step 1."""
    if _same_shape(node, shapes) is not None and _steps(node) is not None:
        return node.inputs[0]
    starts, ends = _slice_bounds(node, "starts", 1), _slice_bounds(node, "ends", 2)
    steps = _steps(node)
    if starts is None or ends is None or steps is None or any(starts):
        return None
    return node.inputs[0] if all(end >= np.iinfo(np.int32).max for end in ends) else None


def _slice_bounds(node: ir.Node, name: str, index: int) -> Sequence[int] | None:
    found = node.attributes.get_ints(name)
    if found is None and (array := _numbers(_input(node, index))) is not None:
        found = [int(item) for item in array.reshape(-1)]
    return found


def _steps(node: ir.Node) -> Sequence[int] | None:
    """The steps, if they are all 1."""
    value = _input(node, 4)
    steps = _numbers(value)
    if value is None:
        return (1,)
    return None if steps is None or (steps != 1).any() else [int(step) for step in steps]


def _repeat(node: ir.Node, shapes: Shapes) -> ir.Value | None:
    """Tile or Expand by ones."""
    counts, rank = _numbers(_input(node, 1)), shapes.rank(node.inputs[0])
    if counts is not None and rank is not None and counts.size <= rank and (counts == 1).all():
        return node.inputs[0]
    return _same_shape(node, shapes)


def _neutral(element: float, *, either_side: bool) -> Callable[[ir.Node, Shapes], ir.Value | None]:
    """Arithmetic with a single neutral element that does not raise the rank."""

    def test(node: ir.Node, shapes: Shapes) -> ir.Value | None:
        for index in (1, 0) if either_side else (1,):
            number, other = _numbers(node.inputs[index]), node.inputs[1 - index]
            rank = shapes.rank(other)
            if number is None or number.size != 1 or rank is None or number.ndim > rank:
                continue
            if number.reshape(-1)[0] == element:
                return other
        return None

    return test


_TESTS: dict[str, Callable[[ir.Node, Shapes], ir.Value | None]] = {
    "Add": _neutral(0, either_side=True),
    "Cast": _cast,
    "Concat": _single,
    "Div": _neutral(1, either_side=False),
    "Dropout": _dropout,
    "Expand": _repeat,
    "Flatten": _flatten,
    "Identity": _always,
    "Max": _single,
    "Mean": _single,
    "Min": _single,
    "Mul": _neutral(1, either_side=True),
    "Pad": _pad,
    "Reshape": _reshape,
    "Slice": _slice,
    "Squeeze": _same_shape,
    "Sub": _neutral(0, either_side=False),
    "Sum": _single,
    "Tile": _repeat,
    "Transpose": _transpose,
    "Unsqueeze": _same_shape,
}
