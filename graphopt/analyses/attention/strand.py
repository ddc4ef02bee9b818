"""What a product multiplies, followed back to where it comes from: through scales, transposes and repeated heads."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import onnx_ir as ir

from graphopt.analyses.attention.labels import CARRIERS, LAYOUT, Labels, Parts, as_axes
from graphopt.analyses.attention.sizes import Pair, Sizes

__all__ = ["Strand", "follow_back", "packed_heads", "preferred"]

_SEPARATE = ("batch", "head", "length", "width")


@dataclass(frozen=True, eq=False)
class Strand:
    """A place on the way back from a product.

    Attributes:
        value: What stands there.
        labels: What lies along its axes.
        factor: What it is multiplied with from there to the product.
        nodes: From there to the product.
    """

    value: ir.Value
    labels: Labels
    factor: float = 1.0
    nodes: tuple[ir.Node, ...] = ()

    @property
    def repeats(self) -> bool:
        """Whether heads are repeated from there on."""
        return any("kv_head" in label and "group" not in label for label in self.labels)


def follow_back(start: Strand, parts: Parts, sizes: Sizes) -> list[Strand]:
    """All places from the product back that hold the same elements, nearest first."""
    found = [start]
    while (step := _step(found[-1], parts, sizes)) is not None:
        found.append(step)
    return found


def preferred(places: list[Strand], parts: Parts, repeats: bool) -> Strand:
    """The farthest place with one axis for each of batch, heads, length and width; else with axes that have names.

    Args:
        places: As from `follow_back`.
        parts: Sizes.
        repeats: Whether it may lie ahead of a repetition of heads.
    """
    usable = [p for p in places if repeats or not p.repeats]
    separate = [p for p in usable if _is_separate(p.labels)]
    named = [p for p in usable if as_axes(p.labels) is not None and ("head", "width") not in p.labels]
    small = [p for p in named if parts.sizes.get("batch", (0, 0)) != (1, 1) or len(p.labels) >= len(places[0].labels)]
    return (separate or small or places)[-1] if separate or small else places[0]


def _is_separate(labels: Labels) -> bool:
    names = sorted("head" if label == ("kv_head",) else label[0] if len(label) == 1 else "" for label in labels)
    return tuple(names) == _SEPARATE


def packed_heads(place: Strand, sizes: Sizes) -> Pair | None:
    """How many heads the reshape ahead of a place splits off an axis that holds them side by side.

    `[length, batch, heads * width] -> [length, batch * heads, width]`
    """
    node = place.value.producer()
    if node is None or node.op_type != "Reshape" or ("rows",) not in place.labels or ("width",) not in place.labels:
        return None
    width = sizes.size(place.value, place.labels.index(("width",)))
    whole = sizes.size(node.inputs[0], -1)
    if width is None or whole is None or place.labels[-1] != ("width",) or whole[0] % width[0] or whole == width:
        return None
    return whole[0] // width[0], whole[1] // width[1]


def _step(place: Strand, parts: Parts, sizes: Sizes) -> Strand | None:
    node = place.value.producer()
    if node is None or node.domain not in ("", "ai.onnx") or place.value is not node.outputs[0]:
        return None
    source, labels, factor = node.inputs[0] if node.inputs else None, None, place.factor
    if node.op_type in CARRIERS:
        labels = place.labels
    elif node.op_type in LAYOUT:
        labels = parts.backward(node, place.labels, sizes)
    elif node.op_type in ("Mul", "Div"):
        scaled = _scaled(node, sizes)
        if scaled is not None:
            source, labels, factor = scaled[0], place.labels, factor * scaled[1]
    elif node.op_type in ("Expand", "Tile", "Concat", "Gather"):
        labels = _repeated(node, place.labels, parts, sizes)
    if source is None or labels is None:
        return None
    return Strand(source, labels, factor, (node, *place.nodes))


def _scaled(node: ir.Node, sizes: Sizes) -> tuple[ir.Value, float] | None:
    """What is multiplied with a number, and the number."""
    for index, other in ((0, 1), (1, 0)):
        value, scalar = node.inputs[index], node.inputs[other]
        number = sizes.content(scalar)
        if value is None or number is None or len(number) != 1 or (node.op_type == "Div" and index == 1):
            continue
        if (sizes.rank(scalar) or 0) <= (sizes.rank(value) or 0) and (node.op_type == "Mul" or number[0] != 0):
            return value, number[0] if node.op_type == "Mul" else 1 / number[0]
    return None


def _repeated(node: ir.Node, labels: Labels, parts: Parts, sizes: Sizes) -> Labels | None:
    """Labels ahead of a repetition of heads, None if anything else is repeated, or in another order."""
    source, made, rank = node.inputs[0], node.outputs[0], len(labels)
    if source is None or sizes.rank(source) != rank:
        return None
    if node.op_type == "Concat" and Counter(node.inputs)[source] != len(node.inputs):
        return None
    if node.op_type == "Gather":
        return _gathered(node, labels, parts, sizes)
    found = list(labels)
    for axis in _grown(source, made, rank, sizes):
        if axis is None or labels[axis] not in (("group",), ("head",)) or sizes.size(source, axis) != (1, 1):
            return None
        if labels[axis] == ("head",):
            parts.sizes["kv_head"] = (1, 1)
        found[axis] = () if labels[axis] == ("group",) else ("kv_head",)
    return tuple(found)


def _grown(source: ir.Value, made: ir.Value, rank: int, sizes: Sizes) -> Iterator[int | None]:
    """Axes whose sizes differ, None for one that is not known."""
    for axis in range(rank):
        pair = sizes.size(source, axis), sizes.size(made, axis)
        if None in pair:
            yield None
        elif pair[0] != pair[1]:
            yield axis


def _gathered(node: ir.Node, labels: Labels, parts: Parts, sizes: Sizes) -> Labels | None:
    """Gather of each head several times over: 0, 0, 1, 1, ..."""
    indices = sizes.content(node.inputs[1])
    axis = node.attributes.get_int("axis", 0) % len(labels)
    count = sizes.size(node.inputs[0], axis)
    if indices is None or count is None or labels[axis] != ("head",) or len(indices) % count[0]:
        return None
    times = len(indices) // int(count[0])
    if list(indices) != [i // times for i in range(len(indices))]:
        return None
    parts.sizes["kv_head"] = count
    return (*labels[:axis], ("kv_head",), *labels[axis + 1 :])
