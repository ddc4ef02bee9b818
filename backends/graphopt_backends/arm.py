"""64-bit ARM CPUs: libraries made by TVM and LLVM, run under qemu on other machines."""

from __future__ import annotations

import functools
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import ClassVar, Literal

from graphopt.backend_base import Finding, Obtained
from graphopt.errors import BackendError
from graphopt.targets import IntegerRules, Isa, Target, host_machine
from graphopt_backends._cpu import CpuBackend, isa_of
from graphopt_backends._doctor import cached, linkers, tvm_works
from graphopt_backends._link import links_elsewhere
from graphopt_backends._plan import Part
from graphopt_backends._session import Step, in_process, through_program

__all__ = ["TARGETS", "ArmBackend"]

_MACHINE = "aarch64"
_TRIPLE = "aarch64-linux-gnu"
_EMULATORS = ("qemu-aarch64-static", "qemu-aarch64")
_ROOTS = (Path("/usr/aarch64-linux-gnu"), Path("/usr/aarch64-linux-gnu/sys-root"))
_QEMU_HINT = "apt-get install qemu-user-static g++-aarch64-linux-gnu"

Dot = Literal["none", "sdot", "i8mm"]

_FEATURES: Mapping[Dot, tuple[str, ...]] = {
    "none": ("+neon",),
    "sdot": ("+neon", "+v8.2a", "+dotprod"),
    "i8mm": ("+neon", "+v8.2a", "+dotprod", "+i8mm", "+bf16"),
}
"""LLVM features by the dot products of a CPU."""


def _target(
    device: str, summary: str, *, dot: Dot = "none", cores: int = 4, level1: int = 32, level2: int = 256,
    default: bool = False,
) -> Target:  # fmt: skip
    """A CPU with caches in KiB, of the second level what a core need not share."""
    isa = Isa(
        name=device, triple=_TRIPLE, cpu=device, features=_FEATURES[dot], dot=dot, lane_operands=True,
        level1_bytes=level1 << 10, level2_bytes=level2 << 10, cores=cores,
    )  # fmt: skip
    return _described(isa, summary, default=default)


def _described(isa: Isa, summary: str, *, default: bool = False) -> Target:
    return Target(
        name="arm", device=isa.name, backend="arm", summary=summary, default=default, round_to=8, isa=isa,
        integers=IntegerRules(activation="int8"),
    )  # fmt: skip


_ANDROID = Isa(
    name="android", triple="aarch64-linux-android", cpu="cortex-a76", features=_FEATURES["sdot"], dot="sdot",
    lane_operands=True, level1_bytes=64 << 10, level2_bytes=256 << 10, cores=4,
)  # fmt: skip
_ARMV7 = Isa(
    name="armv7", triple="armv7a-linux-gnueabihf", cpu="cortex-a7", features=("+neon", "+vfp4"), registers=16,
    lane_operands=True, level2_bytes=128 << 10, cores=4,
)  # fmt: skip


TARGETS = (
    _target(
        "cortex-a76", "Armv8.2 with dot products: Raspberry Pi 5, Snapdragon 855", dot="sdot", level1=64, level2=512,
        default=True,
    ),
    _target("cortex-a53", "Armv8.0: Raspberry Pi 3, many cameras", level2=128),
    _target("cortex-a55", "Armv8.2 with dot products: small cores of phones", dot="sdot", level2=128),
    _target("cortex-a72", "Armv8.0: Raspberry Pi 4"),
    _target("cortex-a710", "Armv9 with matrix products: Snapdragon 8 Gen 1", dot="i8mm", cores=3, level1=64),
    _target(
        "cortex-a78", "Armv8.2 with dot products: Jetson Orin, phones", dot="sdot", cores=6, level1=64, level2=256
    ),
    _target(
        "neoverse-n1", "Armv8.2 with dot products: servers", dot="sdot", cores=8, level1=64, level2=1024
    ),
    _target(
        "neoverse-v1", "Armv8.4 with matrix products: Graviton 3", dot="i8mm", cores=8, level1=64, level2=1024
    ),
    _described(_ANDROID, "Android on Armv8.2 with dot products: object code and sources, linked by the NDK"),
    _described(_ARMV7, "32-bit Armv7 with NEON: object code and sources, linked elsewhere"),
)  # fmt: skip


class ArmBackend(CpuBackend):
    """Runs libraries in this process on an ARM machine, elsewhere under qemu."""

    name: ClassVar[str] = "arm"

    def how(self, target: Target) -> Obtained:
        """Executed on ARM, emulated where there is qemu, else compiled only; so is what is linked elsewhere."""
        if links_elsewhere(isa_of(target)):
            return "compiled only"
        if host_machine() == _MACHINE:
            return "executed"
        return "emulated" if _emulator() and _root() else "compiled only"

    def step(self, part: Part, folder: Path, target: Target, threads: int) -> Step:
        """Load a part here, or start it under qemu."""
        if links_elsewhere(isa_of(target)):
            hint = "run the bundle's build/build.sh where there is a compiler for it"
            raise BackendError(f"target {target}", "compiled only: its object code is linked elsewhere", hint)
        if host_machine() == _MACHINE:
            return in_process(part, folder, threads)
        emulator, root = _emulator(), _root()
        if emulator is None:
            raise BackendError(f"target {target}", "compiled only: qemu-aarch64 not found", _QEMU_HINT)
        if root is None:
            raise BackendError(f"target {target}", "compiled only: no aarch64 libraries for qemu", _QEMU_HINT)
        cpu = _emulated_cpu(emulator, isa_of(target).name)
        command = [emulator, "-cpu", cpu, "-L", str(root)]
        return through_program(part, folder, threads, command)

    def doctor(self, cache: Path) -> Sequence[Finding]:
        """Say what links, what emulates, and whether the runtime is in the cache."""
        isa = isa_of(TARGETS[0])
        emulator = _emulator()
        qemu = Finding("qemu-aarch64", emulator or "missing: arm is compiled only", bool(emulator), _QEMU_HINT)
        if host_machine() == _MACHINE:
            qemu = Finding("qemu-aarch64", "not needed: this machine is aarch64")
        elif emulator and _root() is None:
            qemu = Finding(
                "qemu-aarch64", f"{emulator}, but no aarch64 libraries to run with", ok=False, hint=_QEMU_HINT
            )
        return (*tvm_works(), *linkers(isa, "arm"), qemu, cached(isa, "arm", cache))


def _emulator() -> str | None:
    return next((path for name in _EMULATORS if (path := shutil.which(name))), None)


def _root() -> Path | None:
    """Folder with the dynamic linker and C++ library of an aarch64 system."""
    for root in _ROOTS:
        if (root / "lib" / "ld-linux-aarch64.so.1").exists() and (root / "lib" / "libstdc++.so.6").exists():
            return root
    return None


@functools.cache
def _emulated_cpu(emulator: str, name: str) -> str:
    """The CPU by name, so that an instruction it lacks is an error; everything (`max`) where qemu does not know it."""
    done = subprocess.run([emulator, "-cpu", "help"], capture_output=True, text=True, check=False)
    return name if name in done.stdout.split() else "max"
