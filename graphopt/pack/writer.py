"""Packing: the files of a model in, one container out, a block at a time."""

from __future__ import annotations

import errno
import hashlib
import json
import mmap
import os
import posixpath
import shutil
import tempfile
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from importlib.util import find_spec
from math import prod
from pathlib import Path
from typing import IO

import numpy as np
import onnx_ir as ir

from graphopt.errors import ModelError, UsageError, WriteError
from graphopt.pack._blocks import coded_block
from graphopt.pack._symbols import coded_bytes, xz
from graphopt.pack._wire import Span, WireError, spans
from graphopt.pack.decoder import BITS, BLOCK, HEADER, INDEX, MAGIC, VERSION, block_dims, is_inside

__all__ = ["Packed", "Row", "check_coder", "pack"]

_SMALL = 512
"""Tensors below this many bytes stay with the graph: a block of their own costs more than it saves."""

_StoredBlock = tuple[int, str, int, int]
"""Elements, coding, length, CRC-32: a block in the index."""


@dataclass(frozen=True)
class Row:
    """A tensor that was coded: what it is, its bytes before and after, and how."""

    name: str
    dtype: str
    dims: tuple[int, ...]
    bytes: int
    packed: int
    coding: str


@dataclass(frozen=True)
class Packed:
    """What `pack` made.

    Attributes:
        path: The container.
        files: Names of the files inside.
        bytes: Bytes of these files.
        packed: Bytes of the container.
        graph: Bytes of what is in no coded tensor.
        graph_packed: What these take, with header and index.
        tensors: All coded tensors.
    """

    path: str
    files: tuple[str, ...]
    bytes: int
    packed: int
    graph: int
    graph_packed: int
    tensors: tuple[Row, ...]


@dataclass(frozen=True)
class _Content:
    """The bytes of an open file, read where they are asked for: a mapping would count as memory of the process."""

    descriptor: int
    size: int

    def __len__(self) -> int:
        return self.size

    def read(self, begin: int, end: int) -> bytes:
        """Read from one place to another.

        Raises:
            OSError: The file became shorter.
        """
        found = os.pread(self.descriptor, end - begin, begin)
        if len(found) != end - begin:
            raise OSError(errno.EIO, "a file of the model changed while it was packed")
        return found


@dataclass(frozen=True)
class _Source:
    """A file of the model: its name inside, its bytes, the tensors that are coded, and those that are only named."""

    name: str
    path: Path
    content: _Content
    coded: tuple[Span, ...]
    views: tuple[Span, ...]

    def rest(self) -> Iterator[bytes]:
        """Everything between the coded tensors, a block at a time."""
        kept = bytearray()
        at = 0
        for end, following in [
            *((span.offset, span.offset + span.size) for span in self.coded),
            (len(self.content), 0),
        ]:
            while at < end:
                part = self.content.read(at, min(end, at + BLOCK - len(kept)))
                kept += part
                at += len(part)
                if len(kept) == BLOCK:
                    yield bytes(kept)
                    kept.clear()
            at = following
        if kept:
            yield bytes(kept)


def pack(model: str | Path, out: str | Path) -> Packed:
    """Pack a model, with the files of its weights, into one container.

    Args:
        model: An ONNX file, or a bundle.
        out: The container to write; it appears when it is whole.

    Raises:
        ModelError: The model cannot be read.
        UsageError: The entropy coder is not installed, or the container would replace a file of the model.
        WriteError: The container cannot be written.
    """
    check_coder()
    model, out = Path(model), Path(out)
    if model.is_dir():
        if not (model / "model.onnx").is_file():
            raise ModelError(str(model), "holds no model.onnx", "name an ONNX file, or a folder that graphopt wrote")
        model = model / "model.onnx"
    with ExitStack() as opened:
        sources = _sources(model, opened)
        if any(out.exists() and out.samefile(source.path) for source in sources):
            raise UsageError(f"-o {out}", "is a file of the model", "choose another file")
        try:
            out.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(prefix=f".{out.name}.", suffix=".partial", dir=out.parent) as folder:
                packed = _write(sources, out, Path(folder))
                (Path(folder) / "whole").replace(out)
        except OSError as e:
            raise WriteError(
                str(out), (e.strerror or str(e)).lower(), "free some space or choose another with -o"
            ) from e
    return packed


def check_coder() -> None:
    """Refuse to pack without the entropy coder.

    Raises:
        UsageError: It is not installed.
    """
    if find_spec("constriction") is None:
        raise UsageError("packing", "needs the package constriction", "install it with pip install 'graphopt[pack]'")


def _sources(model: Path, opened: ExitStack) -> list[_Source]:
    if not is_inside(model.name):
        raise ModelError(str(model), "has a name that not every system knows", "rename it")
    content = _opened(model, str(model), opened)
    if not len(content):
        raise ModelError(str(model), "is empty", "export it again")
    if content.read(0, min(len(MAGIC), len(content))) == MAGIC:
        raise ModelError(str(model), "is packed already", "name an ONNX file, or a folder that graphopt wrote")
    try:
        with mmap.mmap(content.descriptor, 0, access=mmap.ACCESS_READ) as mapped:
            found = list(spans(mapped))
    except WireError as e:
        raise ModelError(str(model), f"is not an ONNX model: {e}", "export it again") from e
    places = {span: _normal(span.location) for span in found if span.location}
    names = sorted(set(places.values()))
    others = [_beside(model, name) for name in names]
    contents = [content, *(_opened(path, f"{model}: data file", opened) for path in others)]
    files = zip((model.name, *names), (model, *others), contents, strict=True)
    return [
        _source(name, path, part, [s for s in found if places.get(s) == (name if i else None) and s.dtype])
        for i, (name, path, part) in enumerate(files)
    ]


def _normal(location: str) -> str:
    """One spelling for all of a file: ./weights.bin is weights.bin. Way up may lead through what is not packed."""
    return location if ".." in location.split("/") else posixpath.normpath(location)


def _beside(model: Path, name: str) -> Path:
    """A data file, which a container can hold if it lies in the model's folder."""
    path = model.parent / name
    outside = (
        name.startswith("/") or ".." in name.split("/") or not path.resolve().is_relative_to(model.parent.resolve())
    )
    if outside or name == model.name:
        fact = "lies outside the model's folder" if outside else "is the model itself"
        raise ModelError(str(model), f"its data file {name!r} {fact}", "copy it beside the model")
    if not is_inside(name):
        raise ModelError(str(model), f"its data file {name!r} has a name that not every system knows", "rename it")
    return path


def _opened(path: Path, subject: str, opened: ExitStack) -> _Content:
    try:
        stream = opened.enter_context(path.open("rb"))
        return _Content(stream.fileno(), path.stat().st_size)
    except FileNotFoundError as e:
        raise ModelError(subject, f"{path.name!r} does not exist") from e
    except OSError as e:
        raise ModelError(subject, f"{path.name!r} cannot be read: {(e.strerror or str(e)).lower()}") from e


def _source(name: str, path: Path, content: _Content, found: Iterable[Span]) -> _Source:
    """Divide tensors into those that are coded and those that are small, or share bytes with another."""
    coded: list[Span] = []
    views: list[Span] = []
    end = 0
    for span in sorted(found, key=lambda span: (span.offset, -span.size)):
        if span.offset + span.size > len(content):
            fact = f"the data of tensor {span.name!r} is cut short"
            raise ModelError(str(path), fact, "copy it again")
        if span.size < _SMALL or span.offset < end:
            views.append(span)
        else:
            coded.append(span)
            end = span.offset + span.size
    return _Source(name, path, content, tuple(coded), tuple(views))


def _write(sources: Sequence[_Source], out: Path, folder: Path) -> Packed:
    """Write all blocks, then header and index before them."""
    names = _unique(sources)
    with (folder / "blocks").open("w+b") as blocks:
        files = [_file(source, blocks) for source in sources]
        of_graph = blocks.tell()
        rows: list[Row] = []
        tensors: list[object] = []
        for number, source in enumerate(sources):
            end = 0
            for span in source.coded:
                crc, stored = _tensor(source.content, span, blocks)
                place = (number, span.offset - end, span.size, crc, stored)
                tensors.append((names[number, span], span.dtype, span.dims, *place))
                rows.append(_row(names[number, span], span, stored))
                end = span.offset + span.size
        views = [
            (names[number, span], span.dtype, span.dims, number, span.offset, span.size)
            for number, source in enumerate(sources)
            for span in source.views
        ]
        head = _head(sources[0], {"files": files, "tensors": tensors, "views": views}, blocks.tell())
        blocks.seek(0)
        with (folder / "whole").open("wb") as whole:
            whole.write(head)
            shutil.copyfileobj(blocks, whole, BLOCK)
    total = sum(len(source.content) for source in sources)
    return Packed(
        str(out),
        tuple(source.name for source in sources),
        total,
        len(head) + sum(row.packed for row in rows) + of_graph,
        total - sum(row.bytes for row in rows),
        len(head) + of_graph,
        tuple(rows),
    )


def _head(model: _Source, index: Mapping[str, object], blocks: int) -> bytes:
    """Header and index."""
    text = json.dumps(index, separators=(",", ":"), ensure_ascii=False).encode()
    if len(text) > INDEX:
        raise ModelError(str(model.path), "has more tensors than a container lists", "pack it in parts")
    packed = xz(text)
    total = HEADER.size + len(packed) + blocks
    fields = (MAGIC, VERSION, 0, len(packed), len(text), zlib.crc32(packed), total)
    return HEADER.pack(*fields, zlib.crc32(HEADER.pack(*fields, 0)[:-4])) + packed


def _file(source: _Source, blocks: IO[bytes]) -> object:
    with source.path.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    stored: list[_StoredBlock] = []
    for part in source.rest():
        coded = coded_bytes(np.frombuffer(part, np.uint8))
        stored.append(_stored(len(part), " ".join(coded.words), coded.content, blocks))
    return (source.name, len(source.content), digest, stored)


def _tensor(content: _Content, span: Span, blocks: IO[bytes]) -> tuple[int, list[_StoredBlock]]:
    bits, crc, at = BITS[span.dtype], 0, span.offset
    stored: list[_StoredBlock] = []
    for elements in _cut(span.dims, span.size * 8 // bits, bits):
        part = content.read(at, at + elements * bits // 8)
        at += len(part)
        crc = zlib.crc32(part, crc)
        coded = coded_block(np.frombuffer(part, np.uint8), span.dtype, bits, block_dims(span.dims, elements))
        stored.append(_stored(elements, " ".join(coded.words), coded.content, blocks))
    return crc, stored


def _cut(dims: Sequence[int], count: int, bits: int) -> Iterator[int]:
    """Sizes of the blocks of a tensor: slices of the first axis that are whole bytes, if these are small enough."""
    inner = prod(dims[1:]) * max(8 // bits, 1)
    most = BLOCK // inner * inner if inner <= BLOCK else BLOCK
    while count > 0:
        yield min(count, most)
        count -= most


def _stored(elements: int, coding: str, content: bytes, blocks: IO[bytes]) -> _StoredBlock:
    blocks.write(content)
    return elements, coding, len(content), zlib.crc32(content)


def _row(name: str, span: Span, stored: Sequence[_StoredBlock]) -> Row:
    codings = Counter(coding for _, coding, _, _ in stored)
    try:
        dtype = ir.DataType(span.dtype).name
    except ValueError:
        dtype = str(span.dtype)
    packed = sum(length for _, _, length, _ in stored)
    return Row(name, dtype, span.dims, span.size, packed, ", ".join(coding for coding, _ in codings.most_common()))


def _unique(sources: Sequence[_Source]) -> dict[tuple[int, Span], str]:
    """A name for each tensor; the second of one name is `name#2`."""
    seen: Counter[str] = Counter()
    found: dict[tuple[int, Span], str] = {}
    for number, source in enumerate(sources):
        for span in sorted((*source.coded, *source.views), key=lambda span: span.offset):
            name = span.name or "tensor"
            seen[name] += 1
            while seen[name] > 1 and f"{name}#{seen[name]}" in seen:
                seen[name] += 1
            unique = name if seen[name] == 1 else f"{name}#{seen[name]}"
            seen[unique] = max(seen[unique], 1)
            found[number, span] = unique
    return found
