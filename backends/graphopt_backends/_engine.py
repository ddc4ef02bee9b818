"""A compiled model in this process: its library, called through the C functions of runtime/graphopt.h."""

from __future__ import annotations

import ctypes
import errno
import os
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from graphopt.errors import BackendError

__all__ = ["Engine", "EngineStep", "fresh_name"]

Array = np.ndarray[Any, np.dtype[Any]]

_FORMAT = 1
_MESSAGE_BYTES = 512


class _Tensor(ctypes.Structure):
    _fields_ = (
        ("name", ctypes.c_char_p),
        ("dtype", ctypes.c_char_p),
        ("rank", ctypes.c_int32),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("bytes", ctypes.c_uint64),
    )


class _Step(ctypes.Structure):
    _fields_ = (
        ("kernel", ctypes.c_char_p),
        ("sites", ctypes.c_char_p),
        ("arithmetic", ctypes.c_char_p),
        ("operations", ctypes.c_uint64),
    )


class _Description(ctypes.Structure):
    _fields_ = (
        ("format", ctypes.c_int32),
        ("target", ctypes.c_char_p),
        ("features", ctypes.c_char_p),
        ("input_count", ctypes.c_int32),
        ("output_count", ctypes.c_int32),
        ("step_count", ctypes.c_int32),
        ("inputs", ctypes.POINTER(_Tensor)),
        ("outputs", ctypes.POINTER(_Tensor)),
        ("steps", ctypes.POINTER(_Step)),
        ("weight_bytes", ctypes.c_uint64),
        ("weight_digest", ctypes.c_char_p),
        ("workspace_bytes", ctypes.c_uint64),
        ("thread_bytes", ctypes.c_uint64),
    )


@dataclass(frozen=True)
class EngineStep:
    """A step of a run.

    Attributes:
        kernel: Name of the kernel that is called.
        sites: Names of the nodes that it computes.
        arithmetic: `float` or `integer` where it multiplies and adds most of the time; else empty.
        operations: How many it takes.
    """

    kernel: str
    sites: str
    arithmetic: str
    operations: int


class Engine:
    """A model that is ready to run; threads that run it at the same time wait for one another.

    Args:
        library: The compiled model.
        weights: Its file of weights, where it has one.
        threads: Threads of a run, the caller's own among them.

    Raises:
        BackendError: The library cannot be loaded, or this machine cannot run it.
    """

    def __init__(self, library: Path, weights: Path | None = None, threads: int = 1) -> None:
        self._handle: int | None = None
        self._library = _loaded(library)
        self._library.graphopt_describe.restype = ctypes.POINTER(_Description)
        self._library.graphopt_open.restype = ctypes.c_void_p
        self._run = self._library.graphopt_run
        self._run.restype = None
        made = self._library.graphopt_describe().contents
        if made.format != _FORMAT:
            raise BackendError(str(library), f"has format {made.format}, not {_FORMAT}", "compile the model again")
        self.inputs = [_spec(made.inputs[i]) for i in range(made.input_count)]
        self.outputs = [_spec(made.outputs[i]) for i in range(made.output_count)]
        self.steps = [_step(made.steps[i]) for i in range(made.step_count)]
        message = ctypes.create_string_buffer(_MESSAGE_BYTES)
        path = None if weights is None else os.fsencode(weights)
        self._handle = self._library.graphopt_open(path, max(threads, 1), message, _MESSAGE_BYTES)
        if not self._handle:
            raise BackendError(str(library), message.value.decode("utf8", "replace"))

    def run(self, inputs: Sequence[Array]) -> list[Array]:
        """Run once on arrays in the order of the inputs; returns the outputs in theirs."""
        outputs, again = self.bound(inputs)
        again()
        return outputs

    def run_batch(self, inputs: Sequence[Array], count: int) -> list[Array]:
        """Run on `count` batches, which lie one after the other along the first axes.

        Raises:
            BackendError: Samples of this model do not stay apart.
        """
        held = [np.ascontiguousarray(array) for array in inputs]
        outputs = [np.empty((count * shape[0], *shape[1:]), dtype) for shape, dtype in self.outputs]
        run, batches = self._library.graphopt_run_batch, ctypes.c_uint64(count)
        if not run(ctypes.c_void_p(self._handle), _pointers(held), _pointers(outputs), batches):
            raise BackendError("batch", "samples of this model do not stay apart in its library")
        return outputs

    def bound(self, inputs: Sequence[Array]) -> tuple[list[Array], Callable[[], None]]:
        """Outputs, and a function that fills them from these inputs whenever it is called."""
        held, outputs = [np.ascontiguousarray(array) for array in inputs], self._empty()
        handle, run, sources, results = ctypes.c_void_p(self._handle), self._run, _pointers(held), _pointers(outputs)

        def again() -> None:
            _ = self, held, outputs  # which live as long as their addresses
            run(handle, sources, results)

        return outputs, again

    def profile(self, inputs: Sequence[Array], runs: int = 1) -> list[float]:
        """Seconds that each step takes, the median of some runs."""
        held, outputs = [np.ascontiguousarray(array) for array in inputs], self._empty()
        found: list[list[int]] = []
        for _ in range(runs):
            times = (ctypes.c_uint64 * max(len(self.steps), 1))()
            self._library.graphopt_profile(ctypes.c_void_p(self._handle), _pointers(held), _pointers(outputs), times)
            found.append(list(times)[: len(self.steps)])
        return [statistics.median(step) / 1e9 for step in zip(*found, strict=True)]

    def peak(self, arithmetic: str) -> float:
        """Operations a second that one core can do in its registers, measured; 0 where there is no such arithmetic."""
        self._library.graphopt_peak.restype = ctypes.c_double
        return float(self._library.graphopt_peak(arithmetic.encode()))

    def _empty(self) -> list[Array]:
        return [np.empty(shape, dtype) for shape, dtype in self.outputs]

    def __del__(self) -> None:
        if self._handle:
            self._library.graphopt_close(ctypes.c_void_p(self._handle))
            self._handle = None


_files: dict[Path, list[tuple[int, int]]] = {}  # that were loaded under a path, one after the other


def fresh_name(path: Path) -> str:
    """A spelling of a library's path under which the system has loaded this very file or nothing yet.

    It never looks at a file again whose name it knows, although another model may lie there by now.
    """
    place, status = path.resolve(), path.stat()
    known, file = _files.setdefault(place, []), (status.st_dev, status.st_ino)
    if file not in known:
        known.append(file)
    return f"{place.parent}/{'./' * known.index(file)}{place.name}"


def _loaded(library: Path) -> ctypes.CDLL:
    try:
        found = ctypes.CDLL(fresh_name(library))
    except OSError as e:
        told = e.strerror or str(e).rpartition(": ")[2]
        if library.exists() and told == os.strerror(errno.ENOENT):  # so the system says it
            told = "it is for another CPU, or needs a library that is not there"
        raise BackendError(str(library), f"cannot be loaded: {told}", "compile the model again") from e
    if not hasattr(found, "graphopt_describe"):
        raise BackendError(str(library), "is not a compiled model", "compile the model again")
    return found


def _pointers(arrays: Sequence[Array]) -> Any:
    return (ctypes.c_void_p * max(len(arrays), 1))(*[array.ctypes.data for array in arrays])


def _spec(tensor: Any) -> tuple[tuple[int, ...], np.dtype[Any]]:
    name = tensor.dtype.decode()
    dtype = np.dtype(ml_dtypes.bfloat16) if name == "bfloat16" else np.dtype(name)
    return tuple(tensor.shape[i] for i in range(tensor.rank)), dtype


def _step(step: Any) -> EngineStep:
    texts = step.kernel.decode(), step.sites.decode(), step.arithmetic.decode()
    return EngineStep(*texts, int(step.operations))
