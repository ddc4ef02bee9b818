"""Lines of `graphopt doctor` that the CPU backends share."""

from __future__ import annotations

import functools
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from graphopt.backend_base import Finding
from graphopt.errors import BackendError
from graphopt.targets import Isa
from graphopt_backends._link import known_linkers
from graphopt_backends._runtime import LIBRARIES, cached_runtime, versions

__all__ = ["cached", "linkers", "tvm_works"]

_PROBE = """
import tvm
tvm.ir.save_json(tvm.tirx.const(1.0, "float32"))
llvm = tvm.target.codegen
print(llvm.llvm_version_major(), *llvm.llvm_get_targets())
"""
_ARCHITECTURES = ("x86_64", "aarch64")
_SECONDS = 120


@functools.cache
def tvm_works() -> Sequence[Finding]:
    """Versions of TVM, and whether saving an expression crashes, as it does with some versions of its ffi."""
    try:
        tvm, ffi = versions()
    except BackendError as e:
        return (Finding(e.subject, e.fact, ok=False, hint=e.hint or ""),)
    try:
        done = subprocess.run(
            [sys.executable, "-c", _PROBE], capture_output=True, text=True, timeout=_SECONDS, check=False
        )
    except subprocess.TimeoutExpired:
        return (Finding("TVM", f"{tvm} (ffi {ffi}): no answer in {_SECONDS} s", ok=False),)
    if done.returncode:
        hint = "pip install 'apache-tvm-ffi>=0.1.14.post0,<0.1.15'"
        return (Finding("TVM", f"{tvm} (ffi {ffi}) crashes", ok=False, hint=hint),)
    llvm, *known = done.stdout.split()
    lacking = [name for name in _ARCHITECTURES if name not in known]
    makes = f"lacks {', '.join(lacking)}" if lacking else f"makes code for {', '.join(_ARCHITECTURES)}"
    return (
        Finding("TVM", f"{tvm} (ffi {ffi})"),
        Finding("LLVM", f"{llvm}: {makes}", not lacking, "pip install --force-reinstall apache-tvm" if lacking else ""),
    )


def linkers(isa: Isa, family: str) -> Sequence[Finding]:
    """C++ compilers that link for a CPU, the one that is taken first."""
    found = known_linkers(isa)
    subject = f"{family} linker"
    if not found:
        package = f"g++-{isa.machine.replace('_', '-')}-linux-gnu"
        hint = f"apt-get install {package}, or pip install 'graphopt[cross]', or give --cc"
        return (Finding(subject, "missing", ok=False, hint=hint),)
    return (Finding(subject, ", ".join(linker.name for linker in found)),)


def cached(isa: Isa, family: str, cache: Path) -> Finding:
    """Whether the runtime for a CPU's machine is in the cache."""
    folder = cached_runtime(isa.machine, cache)
    if all((folder / name).is_file() for name in LIBRARIES):
        return Finding(f"{family} runtime", str(folder))
    return Finding(f"{family} runtime", "not in the cache", ok=False, hint=f"graphopt doctor --fetch {family}")
