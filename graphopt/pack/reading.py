"""Unpacking, with graphopt's errors."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from graphopt.errors import ModelError, WriteError, nearest
from graphopt.pack.decoder import MAGIC, Container, ContainerError

__all__ = ["array", "is_container", "unpack"]


def is_container(path: Path) -> bool:
    """Whether a file begins like a container."""
    try:
        with path.open("rb") as stream:
            return stream.read(len(MAGIC)) == MAGIC
    except OSError:
        return False


def unpack(container: str | Path, out: str | Path) -> list[Path]:
    """Write the model of a container into a folder; returns its files, the model first.

    Raises:
        ModelError: The container is damaged; nothing was written.
        WriteError: The folder cannot be written.
    """
    with _opened(Path(container)) as opened:
        try:
            return opened.unpack(out)
        except OSError as e:
            raise WriteError(
                str(out), (e.strerror or str(e)).lower(), "free some space or choose another with -o"
            ) from e


def array(container: str | Path, name: str) -> NDArray[Any]:
    """Read one tensor of a container.

    Raises:
        ModelError: The container is damaged, or has no such tensor.
    """
    with _opened(Path(container)) as opened:
        if name not in opened.tensors:
            raise ModelError(str(container), f"has no tensor {name!r}", nearest(name, opened.tensors))
        return opened.array(name)


@contextmanager
def _opened(path: Path) -> Generator[Container]:
    try:
        with Container(path) as container:
            yield container
    except ContainerError as e:
        raise ModelError(str(path), str(e), "pack the model again, or copy the file again") from e
    except FileNotFoundError as e:
        raise ModelError(str(path), "no such file") from e
    except OSError as e:
        raise ModelError(str(path), f"cannot be read: {(e.strerror or str(e)).lower()}") from e
