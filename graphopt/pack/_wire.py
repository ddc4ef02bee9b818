"""Where the bytes of tensors lie in an ONNX file: a walk over its protobuf fields that reads no tensor.

message        field and what it holds
ModelProto     7 graph, 20 training (1 and 2 graphs), 25 functions
GraphProto     1 nodes, 5 tensors, 15 sparse tensors
FunctionProto  7 nodes
NodeProto      2 outputs, 5 attributes
AttributeProto 1 name, 5 tensor, 6 graph, 10 tensors, 11 graphs, 22 sparse tensor, 23 sparse tensors
SparseTensor   1 values, 2 indices
TensorProto    1 dims, 2 type, 4 floats, 8 name, 9 bytes, 10 doubles, 13 place in another file
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from dataclasses import dataclass, field
from math import prod

from graphopt.pack.decoder import AXES, BITS

__all__ = ["Span", "WireError", "spans"]

_DEPTH = 100
_MODEL = {7: "graph", 20: "training", 25: "function"}
_INNER = {
    "model": _MODEL,
    "training": {1: "graph", 2: "graph"},
    "graph": {1: "node", 5: "tensor", 15: "sparse"},
    "function": {7: "node"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph", 22: "sparse", 23: "sparse"},
    "sparse": {1: "tensor", 2: "tensor"},
}
_FLOATS, _RAW, _DOUBLES = 4, 9, 10
_TYPED = {_FLOATS: (1, 14), _DOUBLES: (11, 15)}

Bytes = bytes | mmap.mmap


class WireError(ValueError):
    """The bytes are no protobuf message."""


@dataclass(frozen=True)
class Span:
    """Where the elements of a tensor lie, all of them and nothing else.

    Attributes:
        name: Its name, or the first output of the node that holds it.
        dtype: Its type, by ONNX's numbers; 0: nothing is known but the file that it lies in.
        dims: Its shape.
        location: Name of the other file; empty: this one.
        offset: Where they begin there.
        size: Their bytes.
    """

    name: str
    dtype: int
    dims: tuple[int, ...]
    location: str
    offset: int
    size: int


@dataclass
class _Draft:
    """A tensor while it is read."""

    name: str = ""
    dtype: int = 0
    dims: list[int] = field(default_factory=list[int])
    inside: list[tuple[int, int, int]] = field(default_factory=list[tuple[int, int, int]])
    place: dict[str, str] = field(default_factory=dict[str, str])


def spans(content: Bytes) -> Iterator[Span]:
    """Find the tensors of a model, in the order of the file.

    Left out are tensors without elements of a fixed size (text), with elements as varints, and damaged ones.

    Raises:
        WireError: It is no ONNX file, or cut short.
    """
    yield from _walk(content, "model", 0, len(content), "", _DEPTH)


def _walk(content: Bytes, kind: str, at: int, end: int, name: str, depth: int) -> Iterator[Span]:
    if not depth:
        raise WireError("graphs are nested too deeply")
    if kind == "node":
        name = next((_text(content, *place) for number, place in _messages(content, at, end) if number == 2), "")
    inner = _INNER[kind]
    for number, place in _messages(content, at, end):
        below = inner.get(number)
        if below == "tensor":
            span = _tensor(content, *place, name)
            if span is not None:
                yield span
        elif below is not None:
            yield from _walk(content, below, *place, name, depth - 1)


def _tensor(content: Bytes, at: int, end: int, name: str) -> Span | None:
    """Read what a tensor says of itself."""
    draft = _Draft()
    for number, wire, value, place in _fields(content, at, end):
        if number == 1:
            draft.dims += [value] if wire == 0 else _varints(content, *place)
        elif number == 2 and wire == 0:
            draft.dtype = value
        elif number == 8 and wire == 2:
            draft.name = _text(content, *place)
        elif number in (_FLOATS, _RAW, _DOUBLES) and wire == 2:
            draft.inside.append((number, *place))
        elif number == 13 and wire == 2:
            pair = {n: _text(content, *p) for n, p in _messages(content, *place)}
            draft.place[pair.get(1, "")] = pair.get(2, "")
    return _span(draft, name)


def _span(draft: _Draft, name: str) -> Span | None:
    """A draft as a span, if the elements lie in one piece of the size that follows from type and shape."""
    fits = draft.dtype in BITS and len(draft.dims) <= AXES and all(dim < 1 << 62 for dim in draft.dims)
    size = -(-prod(draft.dims) * BITS[draft.dtype] // 8) if fits else -1
    location = draft.place.get("location", "")
    if location:
        return _elsewhere(draft, name, location, size)
    if len(draft.inside) != 1:
        return None
    number, at, end = draft.inside[0]
    if end - at != size or draft.dtype not in _TYPED.get(number, (draft.dtype,)):
        return None
    return Span(draft.name or name, draft.dtype, tuple(draft.dims), "", at, size)


def _elsewhere(draft: _Draft, name: str, location: str, size: int) -> Span:
    """A draft with elements in another file, which belongs to the model even if nothing is known of them."""
    offset, length = draft.place.get("offset", "0"), draft.place.get("length", str(size))
    if draft.inside or not (offset.isdecimal() and length.isdecimal()) or int(length) != size:
        return Span(draft.name or name, 0, (), location, 0, 0)
    return Span(draft.name or name, draft.dtype, tuple(draft.dims), location, int(offset), size)


def _messages(content: Bytes, at: int, end: int) -> Iterator[tuple[int, tuple[int, int]]]:
    for number, wire, _, place in _fields(content, at, end):
        if wire == 2:
            yield number, place


def _fields(content: Bytes, at: int, end: int) -> Iterator[tuple[int, int, int, tuple[int, int]]]:
    """Number, wire type, value of a varint, and place of the bytes, of each field."""
    while at < end:
        key, at = _varint(content, at, end)
        number, wire, value, size = key >> 3, key & 7, 0, 0
        if wire == 0:
            value, at = _varint(content, at, end)
        elif wire == 2:
            size, at = _varint(content, at, end)
        elif wire in (1, 5):
            size = 8 if wire == 1 else 4
        else:
            raise WireError(f"has a field of the unknown kind {wire}")
        if not number or size > end - at:
            raise WireError("is cut short, or no protobuf message")
        yield number, wire, value, (at, at + size)
        at += size


def _varint(content: Bytes, at: int, end: int) -> tuple[int, int]:
    if at < end and content[at] < 128:  # nearly always
        return content[at], at + 1
    value = 0
    for shift in range(0, 70, 7):
        if at >= end:
            break
        byte = content[at]
        at += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, at
    raise WireError("is cut short, or no protobuf message")


def _varints(content: Bytes, at: int, end: int) -> list[int]:
    found: list[int] = []
    while at < end:
        value, at = _varint(content, at, end)
        found.append(value)
    return found


def _text(content: Bytes, at: int, end: int) -> str:
    return content[at:end].decode("utf8", "replace")
