"""Run a model in C on this machine: compiled by its C compiler, with a function in Python in the NPU's place."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from graphopt.errors import BackendError
from graphopt_backends._plan import TensorSpec

__all__ = ["HEADER", "SOURCE", "Compiled", "Npu", "c_compiler"]

Array = np.ndarray[Any, np.dtype[Any]]
Npu = Callable[[int, Sequence[int], Sequence[int]], None]
"""What does the NPU's work: number of the part, addresses of its inputs, addresses of its outputs."""

SOURCE, HEADER = "model.c", "model.h"
"""Files of a bundle."""

_COMPILERS = ("cc", "gcc", "clang")
_OPTIONS = ("-std=c99", "-O2", "-ffp-contract=off", "-fPIC", "-shared")
_BRIDGE = """\
int (*graphopt_npu_function)(int, const void *const *, void *const *);
int graphopt_npu(int part, const void *const *inputs, void *const *outputs) {
  return graphopt_npu_function(part, inputs, outputs);
}
"""
_Callback = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.c_int, ctypes.POINTER(ctypes.c_void_p), ctypes.POINTER(ctypes.c_void_p)
)
_FAILED = 1


def c_compiler() -> str | None:
    """A C compiler for this machine."""
    return next((path for name in _COMPILERS if (path := shutil.which(name))), None)


class Compiled:
    """The C of a bundle in this process; threads that run it at the same time wait for one another.

    Args:
        folder: Where `model.c` and `model.h` are.
        compiler: A C compiler.
        npu: Does what the NPU would do.
        inputs: How many inputs each part has that the NPU runs, and how many outputs.

    Raises:
        BackendError: It cannot be compiled.
    """

    def __init__(self, folder: Path, compiler: str, npu: Npu, inputs: Sequence[tuple[int, int]] = ()) -> None:
        self._library = _built(folder, compiler)
        self._lock = threading.Lock()
        self._failure: Exception | None = None

        def call(part: int, sources: Any, results: Any) -> int:
            count, made = inputs[part]
            try:
                npu(part, [sources[i] or 0 for i in range(count)], [results[i] or 0 for i in range(made)])
            except Exception as e:  # it cannot pass through C, so it is raised behind it
                self._failure = e
                return _FAILED
            return 0

        self._callback = _Callback(call)  # which must live as long as C may call it
        pointer = ctypes.c_void_p.in_dll(self._library, "graphopt_npu_function")
        pointer.value = ctypes.cast(self._callback, ctypes.c_void_p).value

    def run(self, function: str, arrays: Sequence[Array], outputs: Sequence[TensorSpec]) -> list[Array]:
        """Call a function of the model; returns what it makes.

        Raises:
            BackendError: It says that it failed.
        """
        held = [np.ascontiguousarray(array) for array in arrays]
        made = [np.empty(spec.shape or (), spec.dtype) for spec in outputs]
        pointers = [ctypes.c_void_p(array.ctypes.data) for array in (*held, *made)]
        with self._lock:
            self._failure = None
            status = self._library[function](*pointers)
            if self._failure is not None:
                raise self._failure
        if status:
            raise BackendError(function, f"returned {status}")
        return made


def _built(folder: Path, compiler: str) -> ctypes.CDLL:
    with tempfile.TemporaryDirectory(prefix="graphopt-") as scratch:
        bridge, library = Path(scratch) / "bridge.c", Path(scratch) / "model.so"
        bridge.write_text(_BRIDGE, "utf8")
        words = [compiler, *_OPTIONS, "-o", str(library), str((folder / SOURCE).resolve()), str(bridge), "-lm"]
        done = subprocess.run(words, capture_output=True, text=True, errors="replace", check=False)
        if done.returncode:
            lines = done.stderr.strip().splitlines()
            told = next((line for line in lines if "error" in line), lines[-1] if lines else "no message")
            raise BackendError(str(folder / SOURCE), f"cannot be compiled: {told.strip()[:200]}")
        return ctypes.CDLL(str(library))
