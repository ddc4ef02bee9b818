"""Reads packed models with numpy and the standard library alone: one file, to be copied to wherever it is needed.

    python decoder.py model.gopt -o folder          write the model
    Container("model.gopt").array("conv1.weight")   read one tensor

docs/container.md describes the format. Where the package constriction is installed, it reads entropy-coded symbols,
with the same result and many times faster.
"""

from __future__ import annotations

import argparse
import errno
import hashlib
import json
import lzma
import os
import re
import shutil
import struct
import sys
import tempfile
import zlib
from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import accumulate
from math import prod
from pathlib import Path, PurePosixPath
from threading import Lock
from types import TracebackType
from typing import Any, BinaryIO, Protocol, Self, cast

import numpy as np
from numpy.typing import NDArray

try:
    from constriction import stream as native_coding
except ImportError:
    native_coding = None

# fmt: off
__all__ = [
    "AXES", "BITS", "BLOCK", "ESCAPE", "FINEST", "FIRST", "HEADER", "INDEX", "LEVELS", "MAGIC", "PRECISION", "VERSION",
    "WAVES", "Block", "Container", "ContainerError", "File", "Neighbourhood", "Numbers", "Place", "Symbols", "Tensor",
    "block_dims", "decode_block", "frequencies", "has_native", "is_inside", "step_table", "unpacked", "weighed",
    "xz_filter",
]
# fmt: on

MAGIC = b"\x89GOPT\r\n\x1a"
VERSION = 1
HEADER = struct.Struct("<8sHHIIIQI")
"""Magic, version, 0, bytes of the index packed and not, its CRC-32, bytes of the container, CRC-32 of all before."""
BLOCK = 1 << 20
"""Most elements of a tensor, or bytes of what is in no tensor, that are coded together."""
AXES = 64
"""Most axes of a tensor: numpy has no more."""
INDEX = 1 << 26
"""Most bytes of an index."""
# fmt: off
BITS: Mapping[int, int] = {
    1: 32, 2: 8, 3: 8, 4: 16, 5: 16, 6: 32, 7: 64, 9: 8, 10: 16, 11: 64, 12: 32, 13: 64, 14: 64, 15: 128, 16: 16,
    17: 8, 18: 8, 19: 8, 20: 8, 21: 4, 22: 4, 23: 4, 24: 8, 25: 2, 26: 2,
}
"""Bits of an element, by the number of its type in ONNX."""
# fmt: on
PRECISION = 24
"""Frequencies of symbols add up to 2 to this power."""
WAVES = (((1, 1),), ((0, 1), (1, 0)), ((0, 0),))
"""In which order the places of a kernel or matrix are coded, by whether their row and column are odd."""

FINEST = 3
"""Contexts of a wave are 1, 2, 4 or 8 classes of each of two means."""
LEVELS = 80
"""Highest level in a table of frequencies."""
FIRST = 48
"""Where the levels of the first symbol begin."""
ESCAPE = 15
"""A step that is stored by itself."""

# fmt: off
_NUMPY = {
    1: "<f4", 2: "u1", 3: "i1", 4: "<u2", 5: "<i2", 6: "<i4", 7: "<i8", 9: "?", 10: "<f2", 11: "<f8", 12: "<u4",
    13: "<u8", 14: "<c8", 15: "<c16",
}
# fmt: on

Symbols = NDArray[np.uint8]
Numbers = NDArray[np.int64]
Lattice = NDArray[np.int16]
Place = tuple[int, int]


class ContainerError(ValueError):
    """The file is no container, is damaged, or newer than this program."""


@dataclass(frozen=True)
class Block:
    """Elements coded together: how many, how, and where: position and length in the container, CRC-32 of the bytes."""

    elements: int
    coding: str
    position: int
    length: int
    crc: int


@dataclass(frozen=True)
class Tensor:
    """A tensor: name, type by ONNX's numbers, shape, place in its file, CRC-32 of its bytes, how it is coded.

    Without blocks its bytes are read from the file: they are in no coded tensor, or in that of another name.
    """

    name: str
    dtype: int
    dims: tuple[int, ...]
    file: int
    offset: int
    size: int
    crc: int
    blocks: tuple[Block, ...]


@dataclass(frozen=True)
class File:
    """A file of the model: name, bytes, sha256, and the blocks of what is in no coded tensor."""

    name: str
    size: int
    sha256: str
    rest: tuple[Block, ...]


def has_native() -> bool:
    """Whether constriction reads entropy-coded symbols."""
    return native_coding is not None


def is_inside(name: str) -> bool:
    """Whether a name is that of a file inside the folder that a container is unpacked into, on any system."""
    parts = name.split("/")
    fits = not re.search(r"[\\:\x00-\x1f\ud800-\udfff]", name) and not {"", ".", ".."} & set(parts)
    return fits and all(len(part.encode()) <= 255 for part in parts)


class Container:
    """An open container. Header and index are checked at once, each block when it is read.

    Threads may share it.

    Attributes:
        files: The model file, then the files with its weights.
        tensors: What can be read by name; of several with one name the later ones are called `name#2`, `name#3`.

    Raises:
        ContainerError: The file is no container, cut short, damaged, or of a newer version.
    """

    def __init__(self, path: str | os.PathLike[str], *, native: bool = True) -> None:
        self._stream: BinaryIO = Path(path).open("rb")  # noqa: SIM115  close() closes it
        self._native, self._reading = native and has_native(), Lock()
        self._kept: tuple[Block, bytes] | None = None
        try:
            self.files, coded, views = _Index(self._stream).read()
        except BaseException:
            self.close()
            raise
        self.tensors: Mapping[str, Tensor] = {tensor.name: tensor for tensor in (*coded, *views)}
        self._coded: list[list[Tensor]] = [[] for _ in self.files]
        for tensor in coded:
            self._coded[tensor.file].append(tensor)
        self._ends = [list(accumulate(block.elements for block in file.rest)) for file in self.files]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, e: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Close the file."""
        self._stream.close()

    def array(self, name: str) -> NDArray[Any]:
        """Read one tensor. Types that numpy lacks come as their bits; elements below a byte as one byte each.

        Raises:
            KeyError: There is no such tensor.
            ContainerError: It is damaged.
        """
        tensor = self.tensors[name]
        payload, bits, count = self._payload(tensor), BITS[tensor.dtype], prod(tensor.dims)
        if bits < 8:
            return unpacked(np.frombuffer(payload, np.uint8), bits)[:count].reshape(tensor.dims)
        return np.frombuffer(payload, _NUMPY.get(tensor.dtype, f"<u{bits // 8}")).reshape(tensor.dims)

    def payload(self, name: str) -> bytes:
        """Read the bytes of one tensor as they stand in the file."""
        return bytes(self._payload(self.tensors[name]))

    def _payload(self, tensor: Tensor) -> bytearray:
        if tensor.blocks:
            return self._content(tensor)
        found, at = bytearray(), 0
        for piece, size in self._layout(tensor.file):
            low, high = max(tensor.offset - at, 0), min(tensor.offset + tensor.size - at, size)
            if low < high and isinstance(piece, Tensor):
                found += self._content(piece)[low:high]
            elif low < high:
                found += b"".join(self._rest(tensor.file, cast("int", piece) + low, cast("int", piece) + high))
            at += size
        return found

    def pieces(self, number: int) -> Iterator[bytes]:
        """Read a file from its beginning to its end, a block at a time; its sha256 is not compared."""
        for piece, size in self._layout(number):
            yield from self._blocks(piece) if isinstance(piece, Tensor) else self._rest(number, piece, piece + size)

    def unpack(self, folder: str | os.PathLike[str]) -> list[Path]:
        """Write all files into a folder. They appear when all are whole and their sha256 is right.

        Raises:
            ContainerError: Something is damaged; no file was written.
            OSError: A file cannot be written.
        """
        folder = Path(folder)
        made = not folder.exists()
        folder.mkdir(parents=True, exist_ok=True)
        try:
            return self._unpack(folder)
        except BaseException:
            if made:
                with suppress(OSError):  # the first error is the one to tell
                    folder.rmdir()
            raise

    def _unpack(self, folder: Path) -> list[Path]:
        if sum(file.size for file in self.files) > shutil.disk_usage(folder).free:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder))
        paths = [folder / file.name for file in self.files]
        for path in paths:
            if path.is_dir():
                raise OSError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
        with tempfile.TemporaryDirectory(prefix=".unpack-", dir=folder) as partial:
            for number, file in enumerate(self.files):
                (Path(partial) / file.name).parent.mkdir(parents=True, exist_ok=True)
                with (Path(partial) / file.name).open("wb") as stream:
                    self.copy(number, stream)
            for path in paths:
                path.parent.mkdir(parents=True, exist_ok=True)
            for file, path in zip(self.files, paths, strict=True):
                (Path(partial) / file.name).replace(path)
        return paths

    def copy(self, number: int, stream: BinaryIO) -> None:
        """Write a file to a stream, and compare its sha256 at the end."""
        digest = hashlib.sha256()
        for piece in self.pieces(number):
            digest.update(piece)
            stream.write(piece)
        if digest.hexdigest() != self.files[number].sha256:
            raise ContainerError(f"file {self.files[number].name!r} does not come out as it was packed")

    def _layout(self, number: int) -> Iterator[tuple[Tensor | int, int]]:
        """What a file consists of, with sizes: coded tensors and, by where it begins, the rest between them."""
        at = rest = 0
        for tensor in self._coded[number]:
            if tensor.offset > at:
                yield rest, tensor.offset - at
                rest += tensor.offset - at
            yield tensor, tensor.size
            at = tensor.offset + tensor.size
        if self.files[number].size > at:
            yield rest, self.files[number].size - at

    def _content(self, tensor: Tensor) -> bytearray:
        try:
            content, at = bytearray(tensor.size), 0  # all at once: few bytes may claim to be more than fit
        except MemoryError as e:
            raise ContainerError(f"{tensor.name!r} has {tensor.size} bytes, more than memory holds") from e
        for block in self._blocks(tensor):
            content[at : at + len(block)] = block
            at += len(block)
        if zlib.crc32(content) != tensor.crc:
            raise ContainerError(f"{tensor.name!r} does not come out as it was packed")
        return content

    def _blocks(self, tensor: Tensor) -> Iterator[bytes]:
        for block in tensor.blocks:
            yield self._block(block, BITS[tensor.dtype], block_dims(tensor.dims, block.elements), tensor.name)

    def _rest(self, number: int, begin: int, end: int) -> Iterator[bytes]:
        """Decode bytes of what is in no tensor; tensors divide them, so the block read last is kept."""
        file, ends = self.files[number], self._ends[number]
        for i in range(bisect_right(ends, begin), bisect_left(ends, end) + 1):
            block, low, kept = file.rest[i], ends[i] - file.rest[i].elements, self._kept
            if kept is None or kept[0] is not block:
                self._kept = kept = block, self._block(block, 8, (1, 1, 1, block.elements), file.name)
            yield kept[1][max(begin - low, 0) : end - low]

    def _block(self, block: Block, bits: int, dims: Sequence[int], name: str) -> bytes:
        with self._reading:
            self._stream.seek(block.position)
            frame = self._stream.read(block.length)
        if zlib.crc32(frame) != block.crc:
            raise ContainerError(f"{name!r} is damaged: the checksum of a block differs")
        try:
            return decode_block(frame, block.coding, bits, dims, native=self._native)
        except (ValueError, lzma.LZMAError) as e:
            raise ContainerError(f"{name!r} is damaged: {e}") from e


class _Index:
    """Reads header and index; everything in them is checked before anything is allocated."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self._end = stream.seek(0, os.SEEK_END)
        self._at = 0

    def read(self) -> tuple[list[File], list[Tensor], list[Tensor]]:
        try:
            index: Any = json.loads(self._text())
            files = [self._file(*fields) for fields in index["files"]]
            coded: list[Tensor] = []
            for fields in index["tensors"]:
                coded.append(self._coded(files, coded[-1] if coded else None, *fields))
            views = [self._view(files, *fields) for fields in index["views"]]
        except ContainerError:
            raise
        except (ValueError, TypeError, LookupError, RecursionError, lzma.LZMAError) as e:
            raise ContainerError(f"its index is damaged: {str(e)[:100]}") from e
        inside = Counter[int]()
        for tensor in coded:
            inside[tensor.file] += tensor.size
        for number, file in enumerate(files):
            filled = sum(block.elements for block in file.rest) + inside[number]
            _require(filled == file.size, "blocks do not fill a file")
        names = [tensor.name for tensor in (*coded, *views)]
        _require(len(set(names)) == len(names), "a name stands there twice")
        paths = {PurePosixPath(file.name) for file in files}
        _require(len(paths) == len(files) > 0, "a file stands there twice")
        _require(paths.isdisjoint(folder for path in paths for folder in path.parents), "a file is a folder as well")
        _require(self._at == self._end, "blocks do not fill the container")
        return files, coded, views

    def _text(self) -> bytes:
        self._stream.seek(0)
        header = self._stream.read(HEADER.size)
        if header[: len(MAGIC)] != MAGIC:
            raise ContainerError("is not a packed model")
        if len(header) < HEADER.size:
            raise ContainerError("is cut short")
        _, version, zero, packed, size, crc, length, own = HEADER.unpack(header)
        if version != VERSION:
            raise ContainerError(f"has version {version} of the format, and this program reads version {VERSION}")
        if zlib.crc32(header[:-4]) != own or zero:
            raise ContainerError("its header is damaged")
        if length != self._end:
            raise ContainerError(f"is {'cut short' if length > self._end else 'longer than it was'}: {self._end} bytes")
        self._at = HEADER.size + packed
        if self._at > self._end or size > INDEX:
            raise ContainerError("its header is damaged")
        content = self._stream.read(packed)
        if zlib.crc32(content) != crc:
            raise ContainerError("its index is damaged: the checksum differs")
        return _from_xz(content, size).tobytes()

    def _file(self, name: Any, size: Any, sha256: Any, blocks: Any) -> File:
        _require(type(name) is str and type(sha256) is str, "a file has no name")
        if not is_inside(name):
            raise ContainerError(f"its file {name[:100]!r} would lie outside the folder")
        return File(name, _whole(size), sha256, tuple(self._block(*fields) for fields in blocks))

    def _coded(
        self, files: Sequence[File], before: Tensor | None, name: Any, dtype: Any, dims: Any, *fields: Any
    ) -> Tensor:
        file, gap, size, crc, blocks = fields
        follows = before is not None and before.file == file
        _require(before is None or before.file <= _whole(file), "tensors are not in order")
        offset = _whole(gap) + (before.offset + before.size if before is not None and follows else 0)
        tensor = self._tensor(files, name, dtype, dims, file, offset, size)
        found = tuple(self._block(*block) for block in blocks)
        sizes = [block.elements * BITS[dtype] for block in found]
        _require(sum(sizes) == size * 8 > 0 and all(bits % 8 == 0 for bits in sizes), f"blocks do not fill {name!r}")
        return Tensor(name, dtype, tensor.dims, file, offset, size, _whole(crc), found)

    def _view(self, files: Sequence[File], name: Any, dtype: Any, dims: Any, *place: Any) -> Tensor:
        return self._tensor(files, name, dtype, dims, *place)

    def _tensor(
        self, files: Sequence[File], name: Any, dtype: Any, dims: Any, file: Any, offset: Any, size: Any
    ) -> Tensor:
        _require(type(name) is str and type(dtype) is int and dtype in BITS, "a tensor has no name or type")
        _require(len(dims) <= AXES, f"{name!r} has too many axes")
        sizes = tuple(_whole(dim) for dim in dims)
        _require(_whole(offset) + _whole(size) <= files[_whole(file)].size, f"{name!r} does not lie in its file")
        _require(-(-prod(sizes) * BITS[dtype] // 8) == size, f"the shape of {name!r} does not fit its size")
        return Tensor(name, dtype, sizes, file, offset, size, 0, ())

    def _block(self, elements: Any, coding: Any, length: Any, crc: Any) -> Block:
        _require(0 < _whole(elements) <= BLOCK and type(coding) is str, "a block is too large")
        block = Block(elements, coding, self._at, _whole(length), _whole(crc))
        self._at += block.length
        _require(self._at <= self._end, "a block ends behind the container")
        return block


def _whole(value: Any) -> int:
    if type(value) is not int or not 0 <= value < 1 << 62:
        raise ValueError("a number is out of range")
    return value


def _require(fits: bool, fact: str) -> None:
    if not fits:
        raise ContainerError(f"its index is damaged: {fact}")


def block_dims(dims: Sequence[int], elements: int) -> tuple[int, int, int, int]:
    """See a block of a tensor as rows, columns, outputs and inputs of kernels, in that order.

    Three axes and more are outputs, inputs and the kernels' rows and columns. All else is one matrix. What is no
    whole number of slices of the first axis is one row.
    """
    inner = prod(dims[1:])
    if len(dims) < 2 or not inner or elements % inner:
        return 1, elements, 1, 1
    kernel = prod(dims[2:])
    if kernel == 1:
        return elements // inner, inner, 1, 1
    return kernel // dims[-1], dims[-1], elements // inner, dims[1]


def decode_block(frame: bytes, coding: str, bits: int, dims: Sequence[int], *, native: bool = True) -> bytes:
    """Decode one block.

    Args:
        frame: Its bytes.
        coding: How it is coded: words of docs/container.md, in the order of the parts of the frame.
        bits: Bits of an element.
        dims: Its shape, as `block_dims` sees it.
        native: Use constriction.

    Raises:
        ValueError, lzma.LZMAError: It is damaged.
    """
    parts, words = _Parts(frame, native), iter(coding.split(" "))
    content = _elements(words, parts, bits, dims).tobytes()
    if next(words, None) is not None or parts.left():
        raise ValueError("something is left over")
    return content


class _Parts:
    """The parts of a frame, one behind the other; each begins with its length, seven bits to a byte, lowest first."""

    def __init__(self, frame: bytes, native: bool = False) -> None:
        self.native = native
        self._frame, self._at = frame, 0

    def left(self) -> bool:
        return self._at < len(self._frame)

    def byte(self) -> int:
        if not self.left():
            raise ValueError("a part is cut short")
        self._at += 1
        return self._frame[self._at - 1]

    def number(self) -> int:
        value = 0
        for shift in range(0, 56, 7):
            byte = self.byte()
            value |= (byte & 127) << shift
            if byte < 128:
                return value
        raise ValueError("a length is damaged")

    def remains(self) -> bytes:
        at, self._at = self._at, len(self._frame)
        return self._frame[at:]

    def take(self) -> bytes:
        size = self.number()
        part = self._frame[self._at : self._at + size]
        if len(part) != size:
            raise ValueError("a part is cut short")
        self._at += size
        return part


def _elements(words: Iterator[str], parts: _Parts, bits: int, dims: Sequence[int]) -> NDArray[np.uint8]:
    """Decode elements to their bytes."""
    word, count = next(words, ""), prod(dims)
    if word in ("raw", "xz"):
        return _symbols(word, parts, (1, count * bits // 8, 1, 1))
    if bits <= 8 and word in ("ans", "waves", "signed"):
        symbols = _symbols(word, parts, dims) if word != "signed" else _symbols(next(words, ""), parts, dims)
        symbols = symbols ^ np.uint8(1 << bits - 1) if word == "signed" else symbols
        return symbols if bits == 8 else _packed(symbols, bits)
    if word == "gaps":
        return _with_gaps(words, parts, bits, count)
    if bits % 8 == 0 and word == "codebook":
        table = np.frombuffer(parts.take(), np.uint8).reshape(-1, bits // 8)
        symbols = _symbols(next(words, ""), parts, dims)
        if symbols.max() >= len(table):
            raise ValueError("a symbol is not in the codebook")
        return table.view(f"V{bits // 8}").reshape(-1)[symbols].view(np.uint8)
    if bits % 8 == 0 and word in ("planes", "rotated"):
        planes = np.empty((count, bits // 8), np.uint8)
        for i in reversed(range(bits // 8)):
            planes[:, i] = _symbols(next(words, ""), parts, dims)
        return planes if word == "planes" else _rotated_back(planes)
    raise ValueError(f"the coding {word!r} is unknown")


def _with_gaps(words: Iterator[str], parts: _Parts, bits: int, count: int) -> NDArray[np.uint8]:
    """Decode elements most of which are zero: gaps between the others, then these."""
    steps = parts.number()
    if not 0 < steps <= count or bits % 8:
        raise ValueError("a number of gaps is damaged")
    gaps = _symbols(next(words, ""), parts, (1, steps, 1, 1))
    ends = gaps < 255
    places = (np.cumsum(gaps + ends.astype(np.int64)) - 1)[ends]
    if not len(places) or places[-1] >= count:
        raise ValueError("a gap ends behind the tensor")
    elements = np.zeros((count, bits // 8), np.uint8)
    elements[places] = _elements(words, parts, bits, (1, len(places), 1, 1)).reshape(-1, bits // 8)
    return elements


def _symbols(word: str, parts: _Parts, dims: Sequence[int]) -> Symbols:
    """Decode bytes, in the order in which they stand in the tensor."""
    count, part = prod(dims), parts.take()
    if word == "raw":
        if len(part) != count:
            raise ValueError("a part has another length")
        return np.frombuffer(part, np.uint8)
    if word == "xz":
        return _from_xz(part, count)
    if word in ("ans", "waves"):
        return _entropy_coded(_Parts(part, parts.native), dims, in_waves=word == "waves")
    raise ValueError(f"the coding {word!r} is unknown")


def _entropy_coded(head: _Parts, dims: Sequence[int], *, in_waves: bool) -> Symbols:
    """Decode symbols by their frequencies, with one table or with one for each context."""
    low, top, middle = head.byte(), head.byte(), head.byte()
    classes = [divmod(head.byte(), 16) for _ in WAVES] if in_waves else [(0, 0)]
    shares = [head.byte() for _ in range(8)]
    words = head.remains()
    if max(map(max, classes)) > FINEST or low + top > 255 or len(words) % 4 or words.endswith(bytes(4)):
        raise ValueError("entropy-coded symbols are damaged")
    coder = (_Native if head.native else _Portable)(np.frombuffer(words, "<u4"))
    tables = _tables(coder, shares, sum(1 << sum(pair) for pair in classes), top + 1)
    symbols = _waves(coder, tables, classes, dims, middle) if in_waves else coder.take(tables, [prod(dims)])
    coder.finish()
    return symbols + np.uint8(low)


def _waves(
    coder: _Coder, tables: Numbers, classes: Sequence[tuple[int, int]], dims: Sequence[int], middle: int
) -> Symbols:
    """Decode symbols in three waves; the contexts of each follow from what came before."""
    around, first = Neighbourhood(dims, middle), 0
    for wave, (neighbours, distances) in zip(WAVES, classes, strict=True):
        of_wave = tables[first : first + (1 << neighbours + distances)]
        contexts = around.contexts(wave, neighbours, distances)
        around.learn(wave, _by_context(coder, of_wave, contexts))
        first += len(of_wave)
    return around.symbols()


def _by_context(coder: _Coder, tables: Numbers, contexts: Symbols) -> Symbols:
    """Symbols of one context stand together, in the order of the places."""
    found = coder.take(tables, np.bincount(contexts, minlength=len(tables)).tolist())
    if len(tables) == 1:
        return found
    symbols = np.empty(len(contexts), np.uint8)
    symbols[np.argsort(contexts, kind="stable")] = found
    return symbols


class Neighbourhood:
    """What is known of a tensor while it is coded wave by wave, and the contexts that follow from it.

    Symbols are ordered by value, so that their distance from the middle says how large a weight is. The next one is
    judged by the mean of its neighbours that are known, and by their mean distance from the middle together with that
    of its kernel, output and input, or of its row and column. All means are in twelfths, rounded down.
    """

    def __init__(self, dims: Sequence[int], middle: int) -> None:
        self._dims, self._middle = dims, middle
        self._known: dict[Place, Lattice] = {}
        self._in_kernels: tuple[int, Numbers] = 0, np.zeros(dims[2:], np.int64)

    def shape(self, place: Place) -> tuple[int, int, int, int]:
        """Shape of all places with an odd or even row and column."""
        rows, columns, outputs, inputs = self._dims
        return (rows + 1 - place[0]) // 2, (columns + 1 - place[1]) // 2, outputs, inputs

    def learn(self, wave: Sequence[Place], symbols: Symbols) -> None:
        """Take note of the symbols of a wave, and of their distances from the middle."""
        at = 0
        for place in wave:
            shape = self.shape(place)
            known = np.empty((2, *shape), np.int16)
            known[0] = symbols[at : at + prod(shape)].reshape(shape)
            np.abs(known[0] - np.int16(self._middle), out=known[1])
            at += prod(shape)
            self._known[place] = known
            count, distances = self._in_kernels
            self._in_kernels = count + prod(shape[:2]), distances + known[1].sum((0, 1), dtype=np.int64)

    def symbols(self) -> Symbols:
        """All symbols, in the order of the tensor: outputs, inputs, rows, columns."""
        whole = np.empty(self._dims, np.uint8)
        for (odd_row, odd_column), known in self._known.items():
            whole[odd_row::2, odd_column::2] = known[0]
        return whole.transpose(2, 3, 0, 1).reshape(-1)

    def contexts(self, wave: Sequence[Place], neighbours: int, distances: int) -> Symbols:
        """Number the contexts of a wave: 2 ** `neighbours` classes of these times 2 ** `distances` of those."""
        count = sum(prod(self.shape(place)) for place in wave)
        if not neighbours + distances or not self._known or not count:
            return np.zeros(count, np.uint8)
        beside, away = np.concatenate([self._means(place).reshape(2, -1) for place in wave], axis=1)
        return buckets(beside, neighbours) << np.uint8(distances) | buckets(away, distances)

    def _means(self, place: Place) -> Lattice:
        """Mean of the known neighbours, and how far from the middle these and all around are."""
        rows, columns, *kernels = self.shape(place)
        means, count = np.zeros((2, rows, columns, *kernels), np.int16), np.zeros((rows, columns, 1, 1), np.int16)
        for axis in (0, 1):
            other = self._known.get((place[0] ^ (axis == 0), place[1] ^ (axis == 1)))
            if other is not None:
                for here, there in _facing(count.shape[axis], other.shape[axis + 1], bool(place[axis])):
                    before = (slice(None),) * axis
                    means[:, *before, here] += other[:, *before, there]
                    count[*before, here] += 1
        means *= 12 // np.maximum(count, 1)
        means[1] += self._around_kernels() if prod(kernels) > 1 else self._along_matrix(place)
        return means

    def _around_kernels(self) -> Lattice:
        """Mean distances from the middle in the same kernel, output and input."""
        count, distances = self._in_kernels
        if not count:
            return np.zeros((1, 1), np.int16)
        of_output = distances.sum(1, keepdims=True) * 12 // (count * distances.shape[1])
        of_input = distances.sum(0, keepdims=True) * 12 // (count * distances.shape[0])
        return (distances * 12 // count + of_output + of_input).astype(np.int16)

    def _along_matrix(self, place: Place) -> Lattice:
        """Mean distances from the middle in the same row and column, each among those of the place's parity."""
        means = np.zeros((1, 1, 1, 1), np.int16)
        for axis in (0, 1):
            along = [known[1] for other, known in self._known.items() if other[axis] == place[axis] and known.size]
            if along:
                total = sum((away.sum(1 - axis, dtype=np.int64, keepdims=True) for away in along), np.int64(0))
                means = means + (total * 12 // sum(away.shape[1 - axis] for away in along)).astype(np.int16)
        return means


def _facing(size: int, other: int, odd: bool) -> Iterator[tuple[slice, slice]]:
    """Which places of one parity lie right before and right behind those of the other, along one axis."""
    for shift in (0, 1) if odd else (-1, 0):
        low, high = max(0, -shift), min(size, other - shift)
        yield slice(low, high), slice(low + shift, high + shift)


def buckets(numbers: NDArray[Any], scale: int) -> Symbols:
    """Sort numbers from 0 into 2 ** `scale` classes of about the same size; equal ones share a class."""
    numbers = numbers.astype(np.intp)  # what indexing and counting would both do
    counts = np.bincount(numbers)
    table = ((2 * np.cumsum(counts) - counts) << scale) // (2 * len(numbers))
    return table.astype(np.uint8)[numbers]


def weighed(levels: NDArray[np.uint8]) -> Numbers:
    """What levels of a table stand for: 0, then 4, 5, 6, 7, 8, 10, 12, 14, 16, 20 and so on."""
    steps = levels.astype(np.int64) - 1
    return np.where(levels > 0, (4 + steps % 4) << np.maximum(steps // 4, 0), 0)


def frequencies(weights: Numbers) -> Numbers:
    """Frequencies of symbols in each table, each at least 1; those of a table add up to 2 ** PRECISION."""
    totals = weights.sum(1, keepdims=True)
    if not totals.all():
        raise ValueError("a table of frequencies is empty")
    found = 1 + weights * ((1 << PRECISION) - weights.shape[1]) // totals
    found[np.arange(len(weights)), weights.argmax(1)] += (1 << PRECISION) - found.sum(1)
    return found


def _tables(coder: _Coder, shares: Sequence[int], count: int, symbols: int) -> Numbers:
    """Read tables of frequencies.

    Levels of a table are steps from those of the table before, and in the first from the symbol before. 0, -1, 1, -2
    and so on are stored as 0, 1, 2, 3; what is 15 or more as 15, and behind all steps itself, all values being equally
    likely. `shares` are two to a byte, and stand for powers of two.
    """
    stored = coder.take(step_table(shares), [count * symbols])
    large = stored == ESCAPE
    stored[large] = coder.take(np.full((1, 256), 1 << PRECISION - 8), [int(large.sum())])
    steps = (stored >> 1 ^ -(stored & 1)).reshape(count, symbols)
    steps[0] = np.cumsum(steps[0], dtype=np.uint8) + np.uint8(FIRST)
    levels = np.cumsum(steps, axis=0, dtype=np.uint8)
    if levels.max() > LEVELS:
        raise ValueError("a table of frequencies is damaged")
    return frequencies(weighed(levels))


def step_table(shares: Sequence[int]) -> Numbers:
    """Frequencies of steps: 16 shares, two to a byte, each a power of two, or 0."""
    logs = np.array([nibble for byte in shares for nibble in (byte & 15, byte >> 4)], np.int64)[None]
    return frequencies(np.where(logs > 0, 1 << logs, 0))


def unpacked(content: NDArray[np.uint8], bits: int) -> Symbols:
    """Elements of 2 or 4 bits, the lowest first, as one byte each."""
    shifts = np.arange(0, 8, bits, dtype=np.uint8)
    return (content[:, None] >> shifts & np.uint8((1 << bits) - 1)).reshape(-1)


def _packed(symbols: Symbols, bits: int) -> NDArray[np.uint8]:
    if symbols.max() >> bits:
        raise ValueError("a symbol has too many bits")
    shifts = np.arange(0, 8, bits, dtype=np.uint8)
    return np.bitwise_or.reduce(symbols.reshape(-1, 8 // bits) << shifts, axis=1)


def _rotated_back(planes: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Put the sign, which was made the lowest bit, back in its place as the highest."""
    size = planes.shape[1]
    numbers = planes.view(f"<u{size}")
    return (numbers >> 1 | numbers << (8 * size - 1)).view(np.uint8)


def xz_filter(size: int) -> dict[str, int]:
    """Settings of the LZMA2 streams in containers, without a header, for so many bytes."""
    window, context = 1 << max(12, size.bit_length()), 3 if size >= 1 << 16 else 0
    return {"id": lzma.FILTER_LZMA2, "dict_size": window, "lc": context, "lp": 0, "pb": 0}


def _from_xz(part: bytes, size: int) -> NDArray[np.uint8]:
    """Decompress a raw LZMA2 stream, and never more than a byte above `size`."""
    reader = lzma.LZMADecompressor(lzma.FORMAT_RAW, filters=[xz_filter(size)])
    content = reader.decompress(part, size + 1)
    if len(content) != size or not reader.eof or reader.unused_data:
        raise ValueError("compressed bytes have another length")
    return np.frombuffer(content, np.uint8)


class _Coder(Protocol):
    """Asymmetric numeral systems (Duda, 2009): 64 bits of state, 32 at a time read from the end."""

    def take(self, tables: Numbers, counts: Sequence[int]) -> Symbols:
        """Read so many symbols with each table of frequencies, one table after the other."""
        ...

    def finish(self) -> None:
        """Make sure that nothing is left."""
        ...


class _Portable:
    """One symbol after another, in Python."""

    def __init__(self, words: NDArray[np.uint32]) -> None:
        self._words: list[int] = words.tolist()
        self._state = self._words.pop() if self._words else 0
        if self._words:
            self._state = self._state << 32 | self._words.pop()

    def take(self, tables: Numbers, counts: Sequence[int]) -> Symbols:
        state, words, mask, symbols = self._state, self._words, (1 << PRECISION) - 1, bytearray()
        for shares, count in zip(cast("list[list[int]]", tables.tolist()), counts, strict=True):
            starts = [0, *accumulate(shares[:-1])]
            for _ in range(count):
                place = state & mask
                symbol = bisect_right(starts, place) - 1
                symbols.append(symbol)
                state = shares[symbol] * (state >> PRECISION) + place - starts[symbol]
                if state < 1 << 32 and words:
                    state = state << 32 | words.pop()
        self._state = state
        return np.frombuffer(symbols, np.uint8)

    def finish(self) -> None:
        if self._state or self._words:
            raise ValueError("entropy-coded symbols are left over")


class _Native:
    """The same by constriction. It adds 1 to each weight: these add up to what keeps that exact."""

    def __init__(self, words: NDArray[np.uint32]) -> None:
        if native_coding is None:
            raise ContainerError("constriction is not installed")
        self._coder = native_coding.stack.AnsCoder(words.astype(np.uint32))
        self._family = native_coding.model.Categorical

    def take(self, tables: Numbers, counts: Sequence[int]) -> Symbols:
        if tables.shape[1] == 1 or not sum(counts):
            return np.zeros(sum(counts), np.uint8)
        weights, symbols, at = (tables - 1).astype(np.float32), np.empty(sum(counts), np.uint8), 0
        for row, count in zip(weights, counts, strict=True):
            if count:
                symbols[at : at + count] = self._coder.decode(self._family(row, perfect=False), count)
                at += count
        return symbols

    def finish(self) -> None:
        if not self._coder.is_empty():
            raise ValueError("entropy-coded symbols are left over")


def main() -> None:
    """Write the model of a container into a folder."""
    parser = argparse.ArgumentParser(description="Unpack a model.")
    parser.add_argument("container", type=Path)
    parser.add_argument("-o", "--out", type=Path, help="folder  [default: the container's name without its ending]")
    options = parser.parse_args()
    try:
        with Container(options.container) as container:
            for path in container.unpack(options.out or options.container.with_suffix("")):
                sys.stdout.write(f"{path}\n")
    except (ContainerError, OSError) as e:
        sys.exit(f"{options.container}: {e}")


if __name__ == "__main__":
    main()
