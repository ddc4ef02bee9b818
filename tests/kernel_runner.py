"""Builds one kernel and runs it on arrays: what the tests of kernels share."""

from __future__ import annotations

import ctypes
import functools
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tvm

from graphopt.targets import Isa, host_features, host_machine
from graphopt_backends._compile import llvm_target
from graphopt_backends._link import Linker, known_linkers
from graphopt_backends.kernels.build import build
from graphopt_backends.network.program import module
from graphopt_backends.network.steps import BEHIND, DONE, ENTRY, TAKE, Place, Step

_AVX2 = ("+avx2", "+fma", "+f16c", "+bmi", "+bmi2", "+lzcnt", "+movbe")
_AVX512 = (*_AVX2, "+avx512f", "+avx512bw", "+avx512cd", "+avx512dq", "+avx512vl")
_TRIPLE = "x86_64-linux-gnu"
AVX2 = Isa(name="avx2", triple=_TRIPLE, cpu="x86-64", features=_AVX2, vector_bits=256, registers=16)
AVX512 = Isa(
    name="avx512-vnni", triple=_TRIPLE, cpu="x86-64", features=(*_AVX512, "+avx512vnni"), vector_bits=512,
    registers=32, dot="vnni",
)  # fmt: skip


def runnable() -> list[Isa]:
    """Those of the CPUs above that this machine can run."""
    if host_machine() != "x86_64":
        return []
    have = host_features()
    found = [AVX2] if {"avx2", "fma"} <= have else []
    return [*found, AVX512] if {"avx512f", "avx512bw", "avx512vl", "avx512_vnni"} <= have else found


def run(kernel: Any, arrays: Sequence[np.ndarray], result: np.ndarray, tasks: int = 2) -> np.ndarray:
    """Run a kernel with arrays as its pointers, one task after the other; what lies behind the result must not change.

    Args:
        kernel: What to run.
        arrays: Its operands, packed as it wants them.
        result: Shape and type of what it writes.
        tasks: Tasks that share the work.
    """
    guarded = np.full(result.nbytes + 256, 171, np.uint8)
    memory = [np.ascontiguousarray(array).reshape(-1).view(np.uint8) for array in arrays]
    memory += [guarded, np.zeros(kernel.scratch * tasks + 4096, np.uint8)]
    with tempfile.TemporaryDirectory(prefix="graphopt-") as scratch:
        entry = loaded(kernel, len(arrays), Path(scratch))
        entry(*(ctypes.c_void_p(array.ctypes.data) for array in memory), None, 0, tasks)
    assert (guarded[result.nbytes :] == 171).all(), "written behind the result"
    return guarded[: result.nbytes].view(result.dtype).reshape(result.shape)


def loaded(kernel: Any, count: int, folder: Path) -> Any:
    """A kernel as a C function, (operands..., result, workspace, team, 0, tasks), that computes all parts.

    Args:
        kernel: What to build.
        count: Its operands.
        folder: For what is built.
    """
    names = (*(f"operand {i}" for i in range(count)), "result")
    step = Step("kernel", tuple(map(Place, names)), shared=True, scratch=kernel.scratch)
    made = module({"kernel": kernel.primitive("kernel")}, (*names, "workspace"), [step])
    build(made, tvm.target.Target(llvm_target(kernel.isa, 1))).write_to_file(str(folder / "kernel.o"))
    (folder / "exports").write_text(f"{{ global: {ENTRY}; local: *; }};\n")
    linker = _linker(kernel.isa)
    linker.link(folder / "kernel.so", folder, ["kernel.o", str(_team(kernel.isa))], "exports")
    entry = getattr(ctypes.CDLL(str(folder / "kernel.so")), ENTRY)
    entry.restype = None
    return entry


@functools.cache
def _linker(isa: Isa) -> Linker:
    return known_linkers(isa)[0]


@functools.cache
def _team(isa: Isa) -> Path:
    """A runtime whose one thread takes all parts."""
    folder = Path(_folder().name) / isa.machine
    folder.mkdir(exist_ok=True)
    (folder / "team.c").write_text(
        f"int {TAKE}(void* team, int step, int part) {{ return 1; }}\n"
        f"void {DONE}(void* team, int step) {{}}\n"
        f"void {BEHIND}(void* team, int step, int parts) {{}}\n"
    )
    _linker(isa).objects(folder, ["team.c"])
    return folder / "team.o"


@functools.cache
def _folder() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="graphopt-")
