"""Files of tensors: weights beside a library, inputs and outputs of the C++ runner.

graphopt tensors 1 ALIGNMENT            padded with blanks to a multiple of the alignment
tensor DTYPE DIMS BYTES NAME            padded alike; DIMS is 1,3,224,224, or - for a scalar
values                                  row-major, padded with zeros
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from graphopt.errors import BackendError, WriteError

__all__ = ["PAGE", "read_tensors", "write_tensors"]

Array = np.ndarray[Any, np.dtype[Any]]

PAGE = 4096
"""Alignment of weights, which are memory-mapped."""

_LINE = 64


def write_tensors(path: Path, tensors: Iterable[tuple[str, Array]], align: int = _LINE) -> None:
    """Write named arrays one after the other; one at a time is held in memory.

    Raises:
        WriteError: The disk is full or the folder cannot be written.
    """
    try:
        with path.open("wb") as stream:
            stream.write(_padded(f"graphopt tensors 1 {align}", align))
            for name, array in tensors:
                dims = ",".join(map(str, array.shape)) or "-"
                stream.write(_padded(f"tensor {array.dtype} {dims} {array.nbytes} {name}", align))
                stream.write(np.ascontiguousarray(array).tobytes())
                stream.write(b"\0" * (-array.nbytes % align))
    except OSError as e:
        raise WriteError(str(path), e.strerror or str(e), "free some space or choose another folder with -o") from e


def read_tensors(path: Path) -> Iterator[tuple[str, Array]]:
    """Read named arrays, memory-mapped; writing to one does not change the file.

    Raises:
        BackendError: The file is damaged.
    """
    if not path.is_file() or path.stat().st_size < _LINE:
        raise BackendError(str(path), "no such file of tensors, or cut short")
    data = np.memmap(path, np.uint8, mode="c")
    head = bytes(data[:_LINE]).split(b"\n")[0].split()
    if head[:3] != [b"graphopt", b"tensors", b"1"]:
        raise BackendError(str(path), "not a file of tensors")
    align = int(head[3])
    at = align
    while at < data.size:
        width = align
        while at + width <= data.size and data[at + width - 1] != ord("\n"):
            width += align
        words = bytes(data[at : at + width]).decode("utf8").split(None, 4)
        if len(words) < 4 or words[0] != "tensor":
            raise BackendError(str(path), "damaged file of tensors")
        shape = () if words[2] == "-" else tuple(map(int, words[2].split(",")))
        start, size = at + width, int(words[3])
        name = words[4].rstrip() if len(words) > 4 else ""
        yield name, data[start : start + size].view(_dtype(words[1])).reshape(shape)
        at = start + -(-size // align) * align


def _dtype(name: str) -> np.dtype[Any]:
    return np.dtype(ml_dtypes.bfloat16) if name == "bfloat16" else np.dtype(name)


def _padded(line: str, align: int) -> bytes:
    text = line.encode("utf8")
    return text + b" " * (-(len(text) + 1) % align) + b"\n"
