"""Arrays of samples in files: what is large stays on disk until it is read, however it is packed.

.npz, stored        mapped where it lies
.npz, compressed    unpacked to a temporary file without a name, and mapped there
.npy                mapped
folder of .npy      `Stack`: one file is read at a time
"""

from __future__ import annotations

import hashlib
import mmap
import struct
import tempfile
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from graphopt.errors import DataError

__all__ = ["Rows", "Stack", "let_go", "read_folder", "read_npz"]

Array = np.ndarray[Any, np.dtype[Any]]
_MAPPED = 1 << 24  # bytes from which an array stays on disk
_PIECE = 1 << 20
_NAME_LENGTHS = 26  # where a zip entry's header says how long its name and its extra field are
_DAMAGED = (ValueError, TypeError, OSError, EOFError, zipfile.BadZipFile, zlib.error, NotImplementedError, RuntimeError)


@dataclass(frozen=True, eq=False)
class Stack:
    """Files of arrays that are alike, seen as one array with an axis more, the first; read one by one.

    Attributes:
        files: One file for each entry of the first axis.
        shape: As of one array.
        dtype: Of all of them.
    """

    files: Sequence[Path]
    shape: tuple[int, ...]
    dtype: np.dtype[Any]

    @property
    def ndim(self) -> int:
        """Number of axes."""
        return len(self.shape)

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int | slice) -> Array:
        """One entry, or some of them stacked.

        Raises:
            DataError: A file changed since the stack was made.
        """
        if isinstance(index, slice):
            return np.stack([self._load(file) for file in self.files[index]])
        return self._load(self.files[index])

    def _load(self, file: Path) -> Array:
        try:
            array = np.load(file, allow_pickle=False)
        except _DAMAGED as e:
            raise DataError(str(file), f"cannot be read: {e}") from e
        if array.shape != self.shape[1:] or array.dtype != self.dtype:
            raise DataError(str(file), "changed while it was in use", "run again")
        return array


Rows = Array | Stack
"""What has a first axis to go along."""


def read_npz(path: Path) -> tuple[dict[str, Rows], str]:
    """Open the arrays of an .npz file; returns them with the sha256 of the file.

    Raises:
        DataError: The file is missing, damaged, or holds anything but plain arrays; or there is no room to unpack it.
    """
    if not path.is_file():
        raise DataError(str(path), "no such file")
    try:
        arrays = dict[str, Rows]()
        with np.load(path, allow_pickle=False) as npz, zipfile.ZipFile(path) as archive:
            for info in archive.infolist():
                name = info.filename.removesuffix(".npy")
                arrays[name] = npz[name] if info.file_size < _MAPPED else _on_disk(path, archive, info)
    except _DAMAGED as e:
        raise DataError(str(path), "not an .npz file of plain arrays, or damaged", "write it with numpy.savez") from e
    with path.open("rb") as stream:
        return arrays, hashlib.file_digest(stream, "sha256").hexdigest()


def read_folder(path: Path) -> tuple[dict[str, Rows], str]:
    """Open the .npy files of a folder and of the folders in it; returns them by name with a sha256 over all.

    Raises:
        DataError: A file is damaged, holds anything but a plain array, or is not like the others of its folder.
    """
    digest, arrays = hashlib.sha256(), dict[str, Rows]()
    for file in sorted(path.rglob("*.npy")):
        digest.update(str(file.relative_to(path)).encode())
        with file.open("rb") as stream:
            for piece in _pieces(stream):
                digest.update(piece)
    try:
        for entry in sorted(path.iterdir()):
            if entry.suffix == ".npy":
                large = entry.stat().st_size >= _MAPPED
                arrays[entry.stem] = np.load(entry, mmap_mode="r" if large else None, allow_pickle=False)
            elif entry.is_dir() and (files := sorted(entry.glob("*.npy"))):
                arrays[entry.name] = _stack(files)
    except _DAMAGED as e:
        raise DataError(str(path), f"an .npy file cannot be read: {e}") from e
    return arrays, digest.hexdigest()


def let_go(rows: Rows) -> None:
    """Tell the system that what was read of a mapped array is not needed in memory."""
    mapped = getattr(rows, "_mmap", None)
    if isinstance(mapped, mmap.mmap) and hasattr(mmap, "MADV_DONTNEED"):
        mapped.madvise(mmap.MADV_DONTNEED)


def _on_disk(path: Path, archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> Array:
    """An array of an archive that stays on disk until it is read; its checksum is verified."""
    stored = info.compress_type == zipfile.ZIP_STORED
    with archive.open(info) as member:
        shape, fortran, dtype = _header(member)
        header, order = member.tell(), "F" if fortran else "C"
        if not stored:
            with _unpacked(path, member) as stream:
                return np.memmap(stream, dtype, "r", 0, shape, order)
        for _ in _pieces(member):
            pass  # to the end, where the checksum is compared
    with path.open("rb") as stream:
        stream.seek(info.header_offset + _NAME_LENGTHS)
        names = sum(struct.unpack("<HH", stream.read(4)))
    return np.memmap(path, dtype, "r", info.header_offset + _NAME_LENGTHS + 4 + names + header, shape, order)


def _unpacked(path: Path, member: IO[bytes]) -> IO[bytes]:
    """What is left to read, in a file of its own that goes away with its last reader."""
    stream = tempfile.TemporaryFile(prefix="graphopt-")  # noqa: SIM115 -- the caller closes it
    for piece in _pieces(member):
        try:
            stream.write(piece)
            stream.flush()
        except OSError as e:
            stream.close()
            hint = "set TMPDIR to where there is room, or write it with numpy.savez"
            raise DataError(str(path), f"cannot be unpacked to {tempfile.gettempdir()}: {e.strerror}", hint) from e
    return stream


def _stack(files: Sequence[Path]) -> Stack:
    kinds = dict.fromkeys(_checked_header(file) for file in files)
    if len({shape for shape, _ in kinds}) > 1:
        raise ValueError("all input arrays must have the same shape")
    if len(kinds) > 1:
        raise ValueError(f"types differ: {', '.join(dict.fromkeys(str(dtype) for _, dtype in kinds))}")
    ((shape, dtype),) = kinds
    return Stack(files, (len(files), *shape), dtype)


def _checked_header(file: Path) -> tuple[tuple[int, ...], np.dtype[Any]]:
    """Shape and type of an array in a file that holds all of it."""
    with file.open("rb") as stream:
        shape, _, dtype = _header(stream)
        if file.stat().st_size < stream.tell() + dtype.itemsize * int(np.prod(shape, dtype=np.int64)):
            raise ValueError(f"{file.name} ends too early")
    return shape, dtype


def _header(stream: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    """Shape, whether columns come first, and type of an array in numpy's own format."""
    version = np.lib.format.read_magic(stream)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, fortran, dtype = read(stream)
    if dtype.hasobject:
        raise ValueError("pickled objects")
    return shape, fortran, dtype


def _pieces(stream: IO[bytes]) -> Iterator[bytes]:
    while piece := stream.read(_PIECE):
        yield piece
