"""Vela, Arm's compiler for Ethos-U NPUs: from a TOSA file to the commands and weights that the NPU reads.

Vela runs in a process of its own and in a folder of its own, so that nothing of a failure stays and no name of a place
gets into its output; what it says of the network comes back as an `Estimate`.
"""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import logging
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from graphopt.backend_base import Estimate
from graphopt.errors import BackendError
from graphopt_backends.npu.configurations import Configuration, Sections, choose, read_sections
from graphopt_backends.npu.figures import estimate
from graphopt_backends.npu.options import NpuOptions

__all__ = ["DISTRIBUTION", "Compiled", "compile_tosa", "configuration", "vela_version"]

DISTRIBUTION = "ethos-u-vela"
RAW = "_vela.npz"
"""What the name of a raw output ends in."""

_HINT = "pip install 'graphopt[npu]'"
_PACKAGED = Path("config_files", "Arm", "vela.ini")
_SECONDS = 1800.0
_SHOWN = 3
_RAISED = re.compile(r"^(?:\w+\.)*\w*(?:Error|Exception|Exit|Interrupt): (.*)$")
_PREAMBLES = ("Compilation failed: ", "Validation error:", "Error: ")
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Compiled:
    """What Vela made of a TOSA file.

    Attributes:
        raw: Its output, a NumPy archive with commands, weights, sizes and places of inputs and outputs.
        estimate: What the network takes, by Vela's model of the hardware.
    """

    raw: Path
    estimate: Estimate


def vela_version() -> str:
    """Version of Vela.

    Raises:
        BackendError: It is not installed.
    """
    _package()
    try:
        return importlib.metadata.version(DISTRIBUTION)
    except importlib.metadata.PackageNotFoundError:
        return "of unknown version"


def configuration(accelerator: str, options: NpuOptions, subject: str = "npu") -> Configuration:
    """Read what system and memory mode the options name.

    Args:
        accelerator: Vela's name of the NPU, such as `ethos-u55-128`.
        options: Options of the target.
        subject: What errors call the target.

    Raises:
        OptionError: A name is unknown or does not fit, or the user's file cannot be read.
        BackendError: Vela is not installed.
    """
    sections: Sections = read_sections(_package() / _PACKAGED, "Vela's own configurations")
    if options.config is not None:
        sections = {**sections, **read_sections(Path(options.config), f"{subject}.config")}
    return choose(accelerator, options.system_config, options.memory_mode, sections, subject)


def compile_tosa(
    tosa: Path,
    accelerator: str,
    options: NpuOptions | None = None,
    sites: Mapping[str, tuple[str, ...]] | None = None,
    *,
    subject: str = "npu",
    seconds: float = _SECONDS,
) -> Compiled:
    """Compile a TOSA file; what Vela makes of `NAME.tosa` lies beside it as `NAME_vela.npz`.

    Args:
        tosa: The file.
        accelerator: Vela's name of the NPU, such as `ethos-u55-128`.
        options: Options of the target; None: all as by default.
        sites: Nodes of the model by the name of the tensor that an operation makes, for the estimate.
        subject: What errors call the target.
        seconds: How long to wait for Vela.

    Raises:
        OptionError: The system or memory mode is unknown or does not fit.
        BackendError: Vela is missing, refuses the network, or does not end in time; nothing was written.
    """
    options = options or NpuOptions()
    chosen = configuration(accelerator, options, subject)
    raw = tosa.with_name(f"{tosa.stem}{RAW}")
    with tempfile.TemporaryDirectory(prefix="graphopt-vela-") as scratch:
        folder = Path(scratch)
        (folder / "network.tosa").symlink_to(tosa.resolve())
        (folder / "vela.ini").write_text(chosen.text, "utf8")
        _run(_command(accelerator, options, chosen), folder, seconds, f"{tosa.name} for {accelerator}")
        made, summary, layers = (_made(folder / "out", ending) for ending in (RAW, "_summary_*.csv", "_per-layer.csv"))
        by = f"Vela {vela_version()}"
        texts = summary.read_text("utf8"), layers.read_text("utf8")
        found = estimate(raw.name, by, accelerator, *texts, sites or {})
        _copy(made, raw)
    return Compiled(raw, found)


def _command(accelerator: str, options: NpuOptions, chosen: Configuration) -> list[str]:
    command = [sys.executable, "-m", "ethosu.vela", "network.tosa", "--output-dir", "out", "--output-format", "raw"]
    command += ["--accelerator-config", accelerator, "--config", "./vela.ini"]
    command += ["--system-config", chosen.system, "--memory-mode", chosen.mode]
    command += ["--optimise", options.optimise, "--verbose-performance"]
    if options.arena_cache_size is not None:
        command += ["--arena-cache-size", str(options.arena_cache_size)]
    return command


def _run(command: Sequence[str], folder: Path, seconds: float, what: str) -> None:
    try:
        done = subprocess.run(
            command, cwd=folder, capture_output=True, text=True, errors="replace", timeout=seconds, check=False
        )
    except subprocess.TimeoutExpired as e:
        fact = f"did not end within {seconds:g} s on {what}"
        raise BackendError("Vela", fact, "try optimise=Size, or another device") from e
    _log.debug("%s\n%s%s", " ".join(command), done.stdout, done.stderr)
    if done.returncode:
        hint = "another device may take it, see graphopt list; -vv shows all that Vela said"
        raise BackendError("Vela", f"refuses {what}: {_said(done)}", hint)


def _said(done: subprocess.CompletedProcess[str]) -> str:
    """What Vela has against a network, in one line: what stands behind the name of the exception it ended with."""
    lines = [line.rstrip() for line in done.stderr.splitlines() if line.strip()]
    raised = [i for i, line in enumerate(lines) if _RAISED.match(line)]
    if raised:
        match = _RAISED.match(lines[raised[-1]])
        lines = [match[1] if match else "", *lines[raised[-1] + 1 :]]
    elif done.returncode < 0:
        return f"ended by signal {-done.returncode}"
    else:
        lines = (lines or done.stdout.splitlines())[-1:]
    for preamble in _PREAMBLES:
        lines[:1] = [line.strip("'\" ").removeprefix(preamble) for line in lines[:1]]
    return "; ".join(_reasons(lines)[:_SHOWN]) or f"ended with code {done.returncode}"


def _reasons(lines: Sequence[str]) -> list[str]:
    """Lines as sentences, each once; `NAME:` and the ` - reason` lines behind it make one."""
    found: list[str] = []
    for line in filter(None, lines):
        text = line.strip()
        if not line.startswith(" - ") or not found:
            found.append(text)
        else:
            joint = " " if found[-1].endswith(":") else ", "
            found[-1] += joint + text.removeprefix("- ")
    return list(dict.fromkeys(found))


def _made(folder: Path, ending: str) -> Path:
    files = sorted(folder.glob(f"*{ending}"))
    if len(files) != 1:
        fact = f"wrote {len(files)} files *{ending} where one was expected"
        raise BackendError("Vela", fact, f"install the version that graphopt[npu] asks for: {_HINT}")
    return files[0]


def _copy(made: Path, to: Path) -> None:
    """Copy a file so that it is there whole or not at all."""
    partial = to.with_name(f".{to.name}.partial")
    try:
        shutil.copyfile(made, partial)
        partial.replace(to)
    finally:
        partial.unlink(missing_ok=True)


@functools.cache
def _package() -> Path:
    """Folder of the package that Vela lies in.

    Raises:
        BackendError: It is not installed.
    """
    spec = importlib.util.find_spec("ethosu")
    folders = [Path(folder) for folder in spec.submodule_search_locations or ()] if spec else []
    found = next((folder for folder in folders if (folder / "vela").is_dir() and (folder / _PACKAGED).is_file()), None)
    if found is None:
        raise BackendError("Vela", "is not installed", _HINT)
    return found
