"""Compilers on this machine that link for a CPU, called so that the same input gives the same bytes."""

from __future__ import annotations

import errno
import importlib.util
import os
import platform
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from graphopt.errors import BackendError, WriteError
from graphopt.targets import Isa

__all__ = ["Linker", "c_compiler", "find_linker", "known_linkers", "links_elsewhere"]

_REPEATABLE = ("-Wl,--build-id=none", "-s")


@dataclass(frozen=True)
class Linker:
    """A C++ compiler that makes code for one CPU.

    Attributes:
        command: How it is called.
        name: What reports and messages call it.
    """

    command: tuple[str, ...]
    name: str

    def shared(self, output: str, objects: Sequence[str], options: Sequence[str] | None = None) -> None:
        """Link objects into a shared library, under a fixed soname.

        Raises:
            BackendError: The linker fails.
            WriteError: The disk is full.
        """
        soname = f"-Wl,-soname,{Path(output).name}"
        given = [str(Path(o).resolve()) for o in objects]
        self._run(
            ["-shared", "-fPIC", soname, *_REPEATABLE, "-o", str(Path(output).resolve()), *given, *(options or ())]
        )

    def objects(self, folder: Path, sources: Sequence[str]) -> None:
        """Compile C sources of a folder, each into an object beside it.

        Raises:
            BackendError: The compiler fails.
            WriteError: The disk is full.
        """
        for source in sources:
            arguments = ["-fPIC", "-O2", "-pthread", "-fvisibility=hidden", "-x", "c", "-std=c11", "-c", source]
            self._run([*arguments, "-o", str(Path(source).with_suffix(".o"))], folder)

    def link(self, output: Path, folder: Path, objects: Sequence[str], exports: str) -> None:
        """Link objects of a folder into a shared library.

        Args:
            output: Its path.
            folder: Where objects are.
            objects: Their names.
            exports: Name of a version script.

        Raises:
            BackendError: The linker fails.
            WriteError: The disk is full.
        """
        script = f"-Wl,--version-script={exports}"
        options = ("-shared", "-fPIC", "-pthread", f"-Wl,-soname,{output.name}", "-Wl,-Bsymbolic", script)
        self._run([*options, *_REPEATABLE, "-o", str(output.resolve()), *objects], folder)

    def program(self, source: Path, output: Path, options: Sequence[str]) -> None:
        """Compile a C++ program.

        Raises:
            BackendError: The compiler fails.
            WriteError: The disk is full.
        """
        arguments = ["-std=c++17", "-O2", source.name, "-o", str(output.resolve()), *options, *_REPEATABLE]
        self._run(arguments, source.parent)

    def version(self) -> str:
        """First line that it says about itself."""
        done = subprocess.run([*self.command, "--version"], capture_output=True, text=True, check=False)
        return (done.stdout.strip().splitlines() or ["version unknown"])[0]

    def _run(self, arguments: Sequence[str], folder: Path | None = None) -> None:
        try:
            done = subprocess.run(
                [*self.command, *arguments], cwd=folder, capture_output=True, text=True, errors="replace", check=False
            )
        except OSError as e:
            raise BackendError(self.name, f"cannot be started: {e.strerror}", "choose another with --cc") from e
        if done.returncode:
            lines = [line for line in (done.stderr or done.stdout).splitlines() if line.strip()]
            full = os.strerror(errno.ENOSPC)
            if any(full in line for line in lines):
                raise WriteError(self.name, full.lower(), "free some space or choose another folder with -o")
            told = next((line for line in lines if "error" in line), lines[-1] if lines else "no message")
            raise BackendError(self.name, f"cannot link: {told.strip()[:200]}", "choose another with --cc")


def known_linkers(isa: Isa) -> tuple[Linker, ...]:
    """Linkers found on this machine for a CPU, the preferred one first."""
    found: list[Linker] = []
    names = ["g++", "clang++", "c++"] if isa.machine == platform.machine() else []
    for name in [f"{isa.machine}-linux-gnu-g++", *names]:
        path = shutil.which(name)
        if path:
            found.append(Linker((path,), name))
    if importlib.util.find_spec("ziglang"):
        target = f"{isa.machine}-linux-gnu.2.28"
        found.append(Linker((sys.executable, "-m", "ziglang", "c++", "-target", target), "zig c++"))
    return tuple(found)


def c_compiler(isa: Isa) -> str:
    """What a C compiler for a CPU is mostly called: gcc on x86, elsewhere as Debian or the Android NDK call it."""
    if isa.machine == "x86_64":
        return "gcc"
    if isa.triple.endswith("android"):
        return f"{isa.triple}24-clang"
    return f"{'arm' if isa.machine.startswith('armv7') else isa.machine}-{isa.triple.partition('-')[2]}-gcc"


def links_elsewhere(isa: Isa) -> bool:
    """True for systems whose C library only their own compilers have: bundles bring object code and sources."""
    return isa.triple.endswith("android") or isa.machine.startswith("armv7")


def find_linker(isa: Isa, given: str | None) -> Linker:
    """The user's compiler, or the first one found.

    Args:
        isa: What is compiled for.
        given: `--cc` or `$GRAPHOPT_CC`: a command, arguments allowed.

    Raises:
        BackendError: There is none.
    """
    if given:
        command = shlex.split(given)
        path = shutil.which(command[0]) if command else None
        if not path:
            raise BackendError(f"--cc {given}", "no such command")
        return Linker((path, *command[1:]), Path(command[0]).name)
    found = known_linkers(isa)
    if not found:
        package = f"g++-{isa.machine.replace('_', '-')}-linux-gnu"
        hint = f"apt-get install {package}, or pip install 'graphopt[cross]', or give --cc"
        raise BackendError(f"compiler for {isa.machine}", "not found", hint)
    return found[0]
