"""Runs many kernels in one program, which an emulator can run too, every array right before a page that is not there.

A kernel that reads or writes behind an array ends the program, which says in what case.
"""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tvm
from kernel_case import Case

from graphopt.targets import Isa, host_features, host_machine
from graphopt_backends._compile import llvm_target
from graphopt_backends._link import known_linkers
from graphopt_backends.arm import TARGETS as ARM
from graphopt_backends.arm import _emulated_cpu, _emulator
from graphopt_backends.kernels.build import build
from graphopt_backends.x86 import TARGETS as X86

__all__ = ["ISAS", "ProgramError", "command_of", "run_all"]

_DEVICES = ("avx2", "avx-vnni", "avx512", "avx512-vnni", "cortex-a53", "cortex-a76", "neoverse-v1")

ISAS = {
    target.device: target.isa for target in (*X86, *ARM) if target.isa is not None and target.device in _DEVICES
}  # fmt: skip
"""One CPU of every kind of instructions that kernels are written for."""

_TASKS = 3

_PROGRAM = r"""
#define _DEFAULT_SOURCE
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

static volatile int number;
static FILE *given, *made;

static void fell(int signal) {
  char text[64];
  int length = snprintf(text, sizeof text, "case %d: signal %d\n", number, signal);
  if (write(2, text, length) < 0) _exit(98);
  _exit(99);
}

/* Memory that ends where a page begins that must not be touched. */
static uint8_t* fenced(size_t bytes) {
  size_t page = sysconf(_SC_PAGESIZE), room = (bytes + page - 1) / page * page;
  uint8_t* pages = mmap(0, room + page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (pages == MAP_FAILED || mprotect(pages + room, page, PROT_NONE)) exit(97);
  return pages + room - bytes;
}

static uint8_t* operand(size_t bytes) {
  uint8_t* memory = fenced(bytes);
  if (fread(memory, 1, bytes, given) != bytes) exit(96);
  return memory;
}

static uint8_t* filled(size_t bytes, int fill) { return memset(fenced(bytes), fill, bytes); }

static void keep(const uint8_t* memory, size_t bytes) {
  if (fwrite(memory, 1, bytes, made) != bytes) exit(95);
}
"""


class ProgramError(Exception):
    """The program ended before it was through."""


def command_of(isa: Isa) -> list[str] | None:
    """What starts a program for a CPU here: nothing, an emulator, or None where there is none or no compiler."""
    if not known_linkers(isa):
        return None
    if isa.machine == host_machine():
        return [] if set(isa.required) <= host_features() else None
    emulator = _emulator() if isa.machine == "aarch64" else None
    return [emulator, "-cpu", _emulated_cpu(emulator, isa.name)] if emulator else None


def run_all(cases: Sequence[Case], isa: Isa, folder: Path) -> list[np.ndarray]:
    """Results of cases, as their kernels wrote them.

    Args:
        cases: All for one CPU.
        isa: That CPU.
        folder: For what is built, and what it reads and writes.

    Raises:
        ProgramError: A kernel touched memory that is not its own.
    """
    functions = {tvm.ir.GlobalVar(f"case_{i}"): _exported(case.kernel, f"case_{i}") for i, case in enumerate(cases)}
    made = build(tvm.IRModule(functions), tvm.target.Target(llvm_target(isa, 1)))
    made.write_to_file(str(folder / "kernels.o"))
    lines = [_PROGRAM, *(_function(i, case) for i, case in enumerate(cases)), _main(len(cases))]
    (folder / "cases.c").write_text("\n".join(lines))
    with (folder / "given").open("wb") as file:
        for case in cases:
            for array in case.arrays:
                file.write(np.ascontiguousarray(array).tobytes())
    linker = known_linkers(isa)[0]
    linker.objects(folder, ["cases.c"])
    program = [*linker.command, "-static", "-o", "cases", "cases.o", "kernels.o"]
    subprocess.run(program, cwd=folder, check=True, capture_output=True)
    command = command_of(isa)
    assert command is not None
    done = subprocess.run([*command, "./cases"], cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        told = done.stderr.strip().splitlines()[-1:] or [f"exit status {done.returncode}"]
        number = told[0].removeprefix("case ").partition(":")[0]
        raise ProgramError(f"{told[0]}: {cases[int(number)].name}" if number.isdigit() else told[0])
    written, at = (folder / "made").read_bytes(), 0
    results: list[np.ndarray] = []
    for case in cases:
        result = case.result
        results.append(np.frombuffer(written, result.dtype, result.size, at).reshape(result.shape))
        at += result.nbytes
    return results


def _exported(kernel: Any, name: str) -> Any:
    return kernel.primitive(name).with_attr("global_symbol", name)


def _function(number: int, case: Case) -> str:
    """C code that runs one case: its tasks one after the other, each with scratch memory of its own."""
    pointers = [f"operand({np.ascontiguousarray(array).nbytes})" for array in case.arrays]
    names = [f"p{i}" for i in range(len(pointers))]
    scratch = case.kernel.scratch
    held = [*names, "result", *(["scratch"] if scratch else [])]
    lines = [
        f"extern void case_{number}({'void*, ' * len(held)}int32_t, int32_t);",
        f"static void run_{number}(void) {{",
        *(f"  void* {name} = {pointer};" for name, pointer in zip(names, pointers, strict=True)),
        f"  uint8_t* result = filled({case.result.nbytes}, 171);",
        f"  for (int task = 0; task < {_TASKS}; ++task) {{",
        *([f"    void* scratch = filled({scratch}, 85);"] if scratch else []),
        f"    case_{number}({', '.join(held)}, task, {_TASKS});",
        "  }",
        f"  keep(result, {case.result.nbytes});",
        "}",
    ]
    return "\n".join(lines)


def _main(count: int) -> str:
    calls = "".join(f"  number = {i}; run_{i}();\n" for i in range(count))
    return (
        "int main(void) {\n  signal(SIGSEGV, fell); signal(SIGBUS, fell); signal(SIGILL, fell);\n"
        f'  given = fopen("given", "rb"); made = fopen("made", "wb");\n{calls}  return fclose(made);\n}}\n'
    )
