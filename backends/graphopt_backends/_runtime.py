"""The runtime that a bundle carries: TVM's libraries for the target's machine, its headers and licences."""

from __future__ import annotations

import importlib.metadata
import platform
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from graphopt.errors import BackendError, WriteError

__all__ = ["LIBRARIES", "RUNTIME", "cached_runtime", "copy_runtime", "fetch_runtime", "runtime_folder", "versions"]

RUNTIME = "runtime"
"""Folder of a bundle."""

LIBRARIES = ("libtvm_ffi.so", "libtvm_runtime.so")
_PACKAGES = ("apache-tvm", "apache-tvm-ffi")
_MEMBERS = {
    "tvm/lib/libtvm_runtime.so": "libtvm_runtime.so",
    "tvm_ffi/lib/libtvm_ffi.so": "libtvm_ffi.so",
    "tvm_ffi/include/tvm/ffi/c_api.h": "include/tvm/ffi/c_api.h",
    "tvm_ffi/include/dlpack/dlpack.h": "include/dlpack/dlpack.h",
    "tvm/LICENSE": "LICENSE.tvm",
    "tvm/NOTICE": "NOTICE.tvm",
}
_LICENCES = {"LICENSE": "LICENSE.tvm-ffi", "NOTICE": "NOTICE.tvm-ffi"}


def versions() -> tuple[str, str]:
    """Installed versions of apache-tvm and apache-tvm-ffi.

    Raises:
        BackendError: One of them is not installed.
    """
    found: list[str] = []
    for package in _PACKAGES:
        try:
            found.append(importlib.metadata.version(package))
        except importlib.metadata.PackageNotFoundError as e:
            raise BackendError(package, "not installed", "pip install graphopt") from e
    return found[0], found[1]


def cached_runtime(machine: str, cache: Path) -> Path:
    """Where the runtime for a machine lies in the user's cache, for the installed versions."""
    tvm, ffi = versions()
    return cache / RUNTIME / machine / f"tvm-{tvm}-ffi-{ffi}"


def runtime_folder(machine: str, family: str, cache: Path) -> Path:
    """The cached runtime for a machine; this machine's own is taken from the installed packages.

    Args:
        machine: Architecture as `uname -m` prints it.
        family: Name of the target, for the command that fetches it.
        cache: The user's cache folder.

    Raises:
        BackendError: It is not there.
    """
    folder = cached_runtime(machine, cache)
    if _complete(folder):
        return folder
    if machine == platform.machine():
        return _from_packages(folder)
    raise BackendError(f"runtime for {machine}", "not in the cache", f"run: graphopt doctor --fetch {family}")


def copy_runtime(folder: Path, bundle: Path) -> tuple[str, ...]:
    """Copy a runtime into a bundle; returns the files relative to it."""
    target = bundle / RUNTIME
    shutil.copytree(folder, target, dirs_exist_ok=True, copy_function=shutil.copyfile)
    return tuple(sorted(p.relative_to(bundle).as_posix() for p in target.rglob("*") if p.is_file()))


def fetch_runtime(machine: str, cache: Path) -> tuple[Path, ...]:
    """Download the runtime for a machine with pip, in the installed versions, and put it into the cache.

    What is there already is not downloaded again.

    Raises:
        BackendError: pip fails; its last line is in the message.
    """
    folder = cached_runtime(machine, cache)
    if _complete(folder):
        return _files(folder)
    pins = [f"{package}=={version}" for package, version in zip(_PACKAGES, versions(), strict=True)]
    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    with tempfile.TemporaryDirectory(prefix="graphopt-") as scratch:
        command = [
            sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps",
            "--only-binary=:all:", "--python-version", python, "--platform", f"manylinux_2_28_{machine}",
            "--dest", scratch, *pins,
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
        if done.returncode:
            lines = [line for line in done.stderr.splitlines() if "ERROR" in line] or done.stderr.splitlines()
            told = lines[-1].strip() if lines else "no message"
            raise BackendError(f"runtime for {machine}", f"pip cannot download it: {told}", "check the network")
        for wheel in sorted(Path(scratch).glob("*.whl")):
            _unpack(wheel, folder)
    return _files(folder)


def _complete(folder: Path) -> bool:
    return all((folder / name).is_file() for name in (*LIBRARIES, *_MEMBERS.values()))


def _files(folder: Path) -> tuple[Path, ...]:
    return tuple(sorted(p for p in folder.rglob("*") if p.is_file()))


def _unpack(wheel: Path, folder: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        for member in archive.namelist():
            name = _MEMBERS.get(member)
            if name is None and wheel.name.startswith("apache_tvm_ffi") and "/licenses/" in member:
                name = _LICENCES.get(member.rpartition("/")[2])
            if name is not None:
                _put(folder / name, archive.read(member))


def _from_packages(folder: Path) -> Path:
    """Copy this machine's runtime from the installed packages into the cache, so that both ways end in one layout."""
    for member, name in _MEMBERS.items():
        package = member.partition("/")[0]
        _put(folder / name, (_package(package) / member.partition("/")[2]).read_bytes())
    for file in importlib.metadata.files("apache-tvm-ffi") or ():
        if "/licenses/" in file.as_posix() and file.name in _LICENCES:
            _put(folder / _LICENCES[file.name], file.read_binary())
    return folder


def _package(name: str) -> Path:
    from importlib.util import find_spec

    spec = find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise BackendError(name, "not installed", "pip install graphopt")
    return Path(next(iter(spec.submodule_search_locations)))


def _put(path: Path, data: bytes) -> None:
    """Write beside, then rename: two processes may fill the cache at once."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as stream:
            stream.write(data)
        Path(stream.name).chmod(0o644)
        Path(stream.name).replace(path)
    except OSError as e:
        raise WriteError(str(path), e.strerror or str(e), "choose another cache folder, or free some space") from e
