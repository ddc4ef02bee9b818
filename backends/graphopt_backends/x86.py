"""x86-64 CPUs: libraries made by TVM and LLVM, run in this process where the CPU has the instructions."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

from graphopt.backend_base import Finding, Obtained
from graphopt.errors import BackendError
from graphopt.targets import IntegerRules, Isa, Target, host_cache_bytes, host_features, host_machine
from graphopt_backends._cpu import CpuBackend, isa_of
from graphopt_backends._doctor import linkers, tvm_works
from graphopt_backends._plan import Part
from graphopt_backends._session import Step, in_process

__all__ = ["TARGETS", "X86Backend"]

_MACHINE = "x86_64"
_TRIPLE = "x86_64-linux-gnu"
_AVX2 = ("+avx2", "+fma", "+f16c", "+bmi", "+bmi2", "+lzcnt", "+movbe")
_AVX512 = (*_AVX2, "+avx512f", "+avx512bw", "+avx512cd", "+avx512dq", "+avx512vl")
_AS_LINUX_SAYS = {
    "lzcnt": "abm", "bmi": "bmi1", "avx512vnni": "avx512_vnni", "avxvnni": "avx_vnni", "amx-tile": "amx_tile",
    "amx-int8": "amx_int8",
}  # fmt: skip
"""LLVM features that /proc/cpuinfo spells in another way."""

_CPUS = {
    "avx2": Isa(
        name="avx2", triple=_TRIPLE, cpu="x86-64", features=_AVX2, vector_bits=256, registers=16,
        level2_bytes=256 << 10, cores=4,
    ),
    "avx-vnni": Isa(
        name="avx-vnni", triple=_TRIPLE, cpu="x86-64", features=(*_AVX2, "+avxvnni"), vector_bits=256, registers=16,
        dot="avx-vnni", level2_bytes=512 << 10, cores=8,
    ),
    "avx512": Isa(
        name="avx512", triple=_TRIPLE, cpu="x86-64", features=_AVX512, vector_bits=512, registers=32,
        level2_bytes=1 << 20, cores=8,
    ),
    "avx512-vnni": Isa(
        name="avx512-vnni", triple=_TRIPLE, cpu="x86-64", features=(*_AVX512, "+avx512vnni"), vector_bits=512,
        registers=32, dot="vnni", level1_bytes=48 << 10, level2_bytes=1 << 20, cores=8,
    ),
    "amx": Isa(
        name="amx", triple=_TRIPLE, cpu="x86-64", features=(*_AVX512, "+avx512vnni", "+amx-tile", "+amx-int8"),
        vector_bits=512, registers=32, dot="vnni", tiles=True, level1_bytes=48 << 10, level2_bytes=2 << 20, cores=8,
    ),
}  # fmt: skip
"""Classes of CPUs, poorer ones first; caches are the smallest among those of a class (efficient cores included)."""

_BASELINE = Isa(name="x86-64", triple=_TRIPLE, cpu="x86-64", vector_bits=128, registers=16)


def _native() -> Isa:
    """The richest description that this machine can run, with the caches that it has."""
    fits = [isa for isa in _CPUS.values() if not _lacks(isa)]
    isa = fits[-1] if fits else _BASELINE
    level1, level2 = host_cache_bytes(1) or isa.level1_bytes, host_cache_bytes(2) or isa.level2_bytes
    return replace(isa, level1_bytes=level1, level2_bytes=level2, cores=os.cpu_count() or 1)


def _lacks(isa: Isa) -> tuple[str, ...]:
    """Features of a CPU that this machine has not."""
    if host_machine() != isa.machine:
        return (isa.machine,)
    have = host_features()
    wanted = (feature.lstrip("+") for feature in isa.features if feature.startswith("+"))
    lacking = tuple(name for name in wanted if _AS_LINUX_SAYS.get(name, name) not in have)
    return lacking if lacking or not isa.tiles or _hands_out_tiles() else ("amx-tile",)


def _hands_out_tiles() -> bool:
    """True if the system lets programs use the registers of tiles: an older Linux (5.15) only says that they exist."""
    arch_prctl, supported, tiles = 158, 0x1021, 1 << 18
    found = ctypes.c_uint64()
    libc = ctypes.CDLL(None)
    return libc.syscall(arch_prctl, supported, ctypes.byref(found)) == 0 and bool(found.value & tiles)


def _target(device: str, isa: Isa, summary: str, *, default: bool = False) -> Target:
    # see ort.py: ONNX Runtime, which runs model.onnx on the same CPU, saturates without a dot-product instruction
    integers = IntegerRules(weight_bits=8 if isa.dot != "none" else 7)
    return Target(
        name="x86", device=device, backend="x86", summary=summary, default=default, round_to=isa.vector_bits // 32,
        isa=isa, integers=integers,
    )  # fmt: skip


def _targets() -> tuple[Target, ...]:
    native = _native()
    return (
        _target("native", native, f"this machine's CPU ({native.name})", default=True),
        _target("avx2", _CPUS["avx2"], "x86-64 with AVX2 and FMA (2013 on)"),
        _target("avx-vnni", _CPUS["avx-vnni"], "x86-64 with AVX2 and integer dot products (client CPUs, 2021 on)"),
        _target("avx512", _CPUS["avx512"], "x86-64 with AVX-512"),
        _target("avx512-vnni", _CPUS["avx512-vnni"], "x86-64 with AVX-512 and integer dot products"),
        _target("amx", _CPUS["amx"], "x86-64 with AVX-512 and products of tiles of integers (servers, 2023 on)"),
    )


TARGETS = _targets()


class X86Backend(CpuBackend):
    """Runs libraries in this process."""

    name: ClassVar[str] = "x86"

    def how(self, target: Target) -> Obtained:
        """Executed where this machine has the instructions."""
        return "compiled only" if _lacks(isa_of(target)) else "executed"

    def step(self, part: Part, folder: Path, target: Target, threads: int) -> Step:
        """Load a part into this process."""
        lacking = _lacks(isa_of(target))
        if lacking:
            fact = f"this machine lacks {', '.join(lacking)}"
            raise BackendError(f"target {target}", fact, "run the bundle on a machine that has it")
        return in_process(part, folder, threads)

    def doctor(self, cache: Path) -> Sequence[Finding]:
        """Say whether TVM works, what links, and what this CPU can run."""
        native = _native()
        cpu = native.name if host_machine() == _MACHINE else f"{host_machine()}: x86 is compiled only"
        return (*tvm_works(), *linkers(_CPUS["avx2"], "x86"), Finding("x86 CPU", cpu))
