"""Integer tensors that follow from shapes, element by element.

Exporters write a shape like `[N, 16, 8, 8]` as Shape, Gather, Unsqueeze and Concat. With N unknown the whole is no
constant, but three of its elements are. So every element is followed on its own: it is a number, or the name of a
dimension, or nothing known. What comes out as numbers throughout becomes a constant, and the target of a Reshape
becomes one even with dimensions left open.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import onnx_ir as ir

from graphopt.analyses import Shapes
from graphopt.pass_base import Change
from graphopt_passes.fold.rewiring import DETERMINISTIC_DOMAINS, FreshNames, constant, make_constant, site, subgraphs

__all__ = ["fold_shapes"]

Element = int | str | None
_INTEGERS = frozenset({ir.DataType.INT32, ir.DataType.INT64})
_SMALL = 1024


def fold_shapes(model: ir.Model, shapes: Shapes, names: FreshNames) -> list[Change]:
    """Replace integer values that follow from static dimensions by constants; give every Reshape a constant target."""
    known = _Follower(shapes)
    known.follow(model.graph)
    changes: list[Change] = []
    for value, elements in known.computed.items():
        numbers = _numbers(elements)
        node = value.producer()
        if numbers is None or node is None or not _read_by_others(value, known.computed):
            continue
        if node.op_type == "Identity" and constant(node.inputs[0]) is not None:
            continue  # how a constant output stands in the model
        kind = shapes.dtype(value) or value.dtype
        if kind is not None and kind in _INTEGERS:
            make_constant(value, ir.Tensor(numbers.astype(kind.numpy())), names)
            changes.append(Change(site(node), f"folded: always {numbers.tolist()}"))
    for graph in known.graphs:
        for node in graph:
            if node.op_type == "Reshape" and node.domain in DETERMINISTIC_DOMAINS:
                changes.extend(_settle_reshape(node, known, names))
    return changes


def _numbers(elements: np.ndarray) -> np.ndarray | None:
    flat = elements.reshape(-1)
    if any(type(element) is not int for element in flat):
        return None
    return np.array([*flat], dtype=np.int64).reshape(elements.shape)


def _read_by_others(value: ir.Value, computed: Mapping[ir.Value, np.ndarray]) -> bool:
    """Whether anything but arithmetic that is itself known reads the value."""
    if value.is_graph_output():
        return True
    for node, _ in value.uses():
        if any(out not in computed or _numbers(computed[out]) is None for out in node.outputs):
            return True
    return False


def _settle_reshape(node: ir.Node, known: _Follower, names: FreshNames) -> list[Change]:
    """Write the target as a constant: 0 copies a dimension of the input, one -1 is computed from the rest."""
    data, target = node.inputs[0], node.inputs[1] if len(node.inputs) > 1 else None
    elements = known.computed.get(target) if target is not None else None
    if data is None or target is None or elements is None or elements.ndim != 1 or node.graph is None:
        return []
    if node.attributes.get_int("allowzero", 0) or _numbers(elements) is not None:
        return []
    wanted: list[Element] = list(elements)
    if sum(not isinstance(item, int) or item == -1 for item in wanted) > 1:
        dims = known.dims(data) or ()
        wanted = [0 if isinstance(d, str) and i < len(dims) and dims[i] == d else d for i, d in enumerate(wanted)]
    settled = [item if isinstance(item, int) else -1 for item in wanted]
    if settled.count(-1) > 1:
        return [Change.skipped(site(node), "more than one dimension of its target is unknown")]
    name = names.make(f"{target.name}_settled")
    tensor = ir.Tensor(np.array(settled, dtype=np.int64), name=name)
    held = ir.Value(name=name, shape=ir.Shape([len(settled)]), type=ir.TensorType(tensor.dtype), const_value=tensor)
    node.graph.register_initializer(held)
    node.replace_input_with(1, held)
    return [Change(site(node), f"its target is the constant {settled}")]


class _Follower:
    """Follows elements through the main graph and the branches of If; bodies of loops change from turn to turn."""

    def __init__(self, shapes: Shapes) -> None:
        self.computed: dict[ir.Value, np.ndarray] = {}
        self.graphs: list[ir.Graph] = []
        self._shapes = shapes

    def follow(self, graph: ir.Graph) -> None:
        self.graphs.append(graph)
        for node in graph:
            if node.domain in DETERMINISTIC_DOMAINS and (rule := _RULES.get(node.op_type)) is not None:
                elements = rule(self, node)
                if elements is not None and elements.size <= _SMALL:
                    self.computed[node.outputs[0]] = elements
            if node.op_type == "If":
                for inner in subgraphs(node):
                    self.follow(inner)

    def dims(self, value: ir.Value | None) -> Sequence[Element] | None:
        """Shape of a value; a dimension without a name is called after the value."""
        dims = self._shapes.of(value)
        return (
            None
            if value is None or dims is None
            else [f"{value.name}[{i}]" if d is None else d for i, d in enumerate(dims)]
        )

    def of(self, node: ir.Node, index: int) -> np.ndarray | None:
        """Elements of an input, None if it is missing or nothing is known."""
        value = node.inputs[index] if index < len(node.inputs) else None
        if value is None:
            return None
        tensor = constant(value)
        if tensor is None:
            return self.computed.get(value)
        if tensor.dtype not in _INTEGERS | {ir.DataType.BOOL} or tensor.size > _SMALL:
            return None
        array = tensor.numpy()
        flat: list[Element] = array.reshape(-1).tolist()
        return _objects(flat, array.shape)

    def ints(self, node: ir.Node, index: int, name: str) -> list[int] | None:
        """A list of numbers that is an attribute in old opsets and an input in new ones."""
        listed = node.attributes.get_ints(name)
        if listed is not None:
            return list(listed)
        elements = self.of(node, index)
        numbers = None if elements is None else _numbers(elements)
        return None if numbers is None else [int(item) for item in numbers.reshape(-1)]


def _objects(flat: Sequence[Element], shape: tuple[int, ...]) -> np.ndarray:
    """An array of elements; numpy must not guess a type from them."""
    array = np.empty(len(flat), dtype=object)
    array[:] = list(flat)
    return array.reshape(shape)


def _shape(known: _Follower, node: ir.Node) -> np.ndarray | None:
    dims = known.dims(node.inputs[0])
    if dims is None:
        return None
    dims = dims[node.attributes.get_int("start", 0) : node.attributes.get_int("end", len(dims))]
    return _objects(dims, (len(dims),))


def _size(known: _Follower, node: ir.Node) -> np.ndarray | None:
    dims = known.dims(node.inputs[0])
    if dims is None or not all(isinstance(d, int) for d in dims):
        return None
    return _objects([math.prod(int(d) for d in dims if d is not None)], ())


def _same(known: _Follower, node: ir.Node) -> np.ndarray | None:
    return known.of(node, 0)


def _cast(known: _Follower, node: ir.Node) -> np.ndarray | None:
    to = node.attributes.get_int("to", 0)
    elements = known.of(node, 0)
    if elements is None or to not in _INTEGERS:
        return None
    fits = all(type(e) is not bool and (not isinstance(e, int) or abs(e) < 2**31) for e in elements.reshape(-1))
    return elements if fits else None


def _gather(known: _Follower, node: ir.Node) -> np.ndarray | None:
    data, indices = known.of(node, 0), known.of(node, 1)
    numbers = None if indices is None else _numbers(indices)
    if data is None or numbers is None or data.ndim != 1 or node.attributes.get_int("axis", 0) not in (0, -1):
        return None
    if numbers.size and not (-data.size <= numbers.min() and numbers.max() < data.size):
        return None
    return _objects([data[int(i)] for i in numbers.reshape(-1)], numbers.shape)


def _slice(known: _Follower, node: ir.Node) -> np.ndarray | None:
    data = known.of(node, 0)
    starts, ends = known.ints(node, 1, "starts"), known.ints(node, 2, "ends")
    if data is None or data.ndim != 1 or starts is None or ends is None or len(starts) != 1:
        return None
    has_axes = len(node.inputs) > 3 and node.inputs[3] is not None
    axes = known.ints(node, 3, "axes") if has_axes or "axes" in node.attributes else [0]
    has_steps = len(node.inputs) > 4 and node.inputs[4] is not None
    steps = known.ints(node, 4, "steps") if has_steps else [1]
    if axes not in ([0], [-1]) or not steps or steps[0] < 1:
        return None
    return data[starts[0] : ends[0] : steps[0]]


def _concat(known: _Follower, node: ir.Node) -> np.ndarray | None:
    parts = [known.of(node, i) for i in range(len(node.inputs))]
    whole = [part for part in parts if part is not None and part.ndim == 1]
    return np.concatenate(whole) if len(whole) == len(parts) else None


def _unsqueeze(known: _Follower, node: ir.Node) -> np.ndarray | None:
    data, axes = known.of(node, 0), known.ints(node, 1, "axes")
    return data.reshape(1) if data is not None and data.ndim == 0 and axes in ([0], [-1]) else None


def _squeeze(known: _Follower, node: ir.Node) -> np.ndarray | None:
    data = known.of(node, 0)
    return data.reshape(()) if data is not None and data.shape == (1,) else None


def _reshape(known: _Follower, node: ir.Node) -> np.ndarray | None:
    data, target = known.of(node, 0), known.ints(node, 1, "shape")
    if data is None or target is None or 0 in target or data.size == 0:
        return None
    fits = -1 in target or math.prod(target) == data.size
    return data.reshape(target) if fits and target.count(-1) <= 1 else None


def _elementwise(operation: Callable[[Element, Element], Element]) -> Callable[[_Follower, ir.Node], np.ndarray | None]:
    def rule(known: _Follower, node: ir.Node) -> np.ndarray | None:
        left, right = known.of(node, 0), known.of(node, 1)
        if left is None or right is None or len(node.inputs) != 2:
            return None
        left, right = np.broadcast_arrays(left, right)
        pairs = zip(left.reshape(-1), right.reshape(-1), strict=True)
        return _objects([_bounded(operation(a, b)) for a, b in pairs], left.shape)

    return rule


def _bounded(element: Element) -> Element:
    """Numbers outside 32 bits might wrap in the model; they are left to it."""
    return None if type(element) is int and abs(element) >= 2**31 else element


def _add(a: Element, b: Element) -> Element:
    if isinstance(a, int) and isinstance(b, int):
        return a + b
    return a if b == 0 else b if a == 0 else None


def _subtract(a: Element, b: Element) -> Element:
    if isinstance(a, int) and isinstance(b, int):
        return a - b
    return a if b == 0 else 0 if a is not None and a == b else None


def _multiply(a: Element, b: Element) -> Element:
    if isinstance(a, int) and isinstance(b, int):
        return a * b
    return a if b == 1 else b if a == 1 else None


def _divide(a: Element, b: Element) -> Element:
    """Runtimes differ from Python where a sign is involved; those are left to the model."""
    if isinstance(a, int) and isinstance(b, int):
        return a // b if a >= 0 and b > 0 else None
    return a if b == 1 else None


def _equal(a: Element, b: Element) -> Element:
    if isinstance(a, int) and isinstance(b, int):
        return bool(a == b)
    number = a if isinstance(a, int) else b
    if isinstance(number, int) and number < 0 and None not in (a, b):
        return False  # a dimension is never negative
    return True if a is not None and a == b else None


def _where(known: _Follower, node: ir.Node) -> np.ndarray | None:
    parts = [known.of(node, i) for i in range(3)]
    if any(part is None for part in parts):
        return None
    condition, yes, no = np.broadcast_arrays(*(part for part in parts if part is not None))
    rows = zip(condition.reshape(-1), yes.reshape(-1), no.reshape(-1), strict=True)
    picked: list[Element] = [(y if c else n) if isinstance(c, bool) else y if y == n else None for c, y, n in rows]
    return _objects(picked, condition.shape)


_RULES: dict[str, Callable[[_Follower, ir.Node], np.ndarray | None]] = {
    "Add": _elementwise(_add),
    "Cast": _cast,
    "Concat": _concat,
    "Div": _elementwise(_divide),
    "Equal": _elementwise(_equal),
    "Gather": _gather,
    "Identity": _same,
    "Mul": _elementwise(_multiply),
    "Reshape": _reshape,
    "Shape": _shape,
    "Size": _size,
    "Slice": _slice,
    "Squeeze": _squeeze,
    "Sub": _elementwise(_subtract),
    "Unsqueeze": _unsqueeze,
    "Where": _where,
}
