"""The machine that times are taken on."""

from __future__ import annotations

import os
import platform
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from graphopt.measured import Machine

__all__ = ["this_machine"]

_ENGINES = ("onnxruntime", "apache-tvm", "numpy")
_CPU_KEYS = ("model name", "Model", "Hardware", "CPU part")


def this_machine() -> Machine:
    """Describe this machine and this moment; stands in `measured/` only."""
    return Machine(
        cpu=_cpu(),
        cores=len(os.sched_getaffinity(0)),
        system=f"{platform.system()} {platform.release()} {platform.machine()}",
        memory_mb=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 1_000_000,
        versions={"python": platform.python_version(), **_versions()},
        date=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
    )


def _versions() -> dict[str, str]:
    found: dict[str, str] = {}
    for name in _ENGINES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue  # an engine that is not installed ran nothing
    return found


def _cpu() -> str:
    """Name of the processor; Linux on Arm gives only some of these lines."""
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8", errors="replace").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    facts = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    return next((facts[key] for key in _CPU_KEYS if facts.get(key)), platform.processor() or platform.machine())
