"""The folder that ships: written beside its place and renamed, digested, and loaded again.

model.onnx  [model.onnx.data]    runs in ONNX Runtime
model.so ...                     what the target runs, where something was compiled
report.json  report.html         what follows from the input alone
manifest.json                    where the bundle comes from, and the sha256 of every file but `measured/`
measured/                        timings
"""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import tempfile
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from graphopt.backend_base import Obtained, Runnable
from graphopt.errors import BackendError, ModelError, UsageError, WriteError
from graphopt.plugins import Registry, load_plugins
from graphopt.records import from_text, to_text
from graphopt.reference import Feed, Reference
from graphopt.targets import Target

__all__ = [
    "MANIFEST",
    "MEASURED",
    "Bundle",
    "Manifest",
    "cannot_write",
    "check_out",
    "file_digests",
    "new_folder",
    "read_manifest",
    "up_to_date",
    "write_manifest",
    "write_text",
]

MANIFEST = "manifest.json"
MEASURED = "measured"
_FORMAT = 1
_NO_ROOM = frozenset({errno.ENOSPC, errno.EDQUOT})


@dataclass(frozen=True)
class Manifest:
    """Where a bundle comes from.

    Attributes:
        graphopt: Version that wrote it.
        model: Name of the input model's file.
        digest: sha256 of the input model with its weights.
        target: Name and device, as resolved, with its options.
        pipeline: The pipeline as resolved.
        shapes: Sizes fixed with `--shape` and `--dim`.
        seed: Seed of all random streams.
        key: Digest of everything that the bundle follows from; None: something had no digest.
        exit_code: What the command that wrote it returned: 0, or 4 where a limit was missed.
        versions: Versions of everything that took part.
        files: sha256 by file, without `measured/` and the manifest itself.
        kernel: What the target runs, relative to the bundle; None where the ONNX model itself ships.
        fallback: ONNX Runtime runs a part of the model.
        format: Version of this file's format.
    """

    graphopt: str
    model: str
    digest: str
    target: str
    pipeline: str
    seed: int
    key: str | None
    exit_code: int = 0
    shapes: Mapping[str, str] = field(default_factory=dict[str, str])
    versions: Mapping[str, str] = field(default_factory=dict[str, str])
    files: Mapping[str, str] = field(default_factory=dict[str, str])
    kernel: str | None = None
    fallback: bool = False
    format: int = _FORMAT


class Bundle:
    """A finished bundle, ready to run: `Bundle.open(path)(inputs)` returns the outputs by name.

    Attributes:
        path: The folder.
        manifest: Where it comes from.
        target: What it was made for.
        how: How its outputs are obtained on this machine.
    """

    def __init__(self, path: Path, manifest: Manifest, target: Target, how: Obtained, run: Runnable) -> None:
        self.path = path
        self.manifest = manifest
        self.target = target
        self.how = how
        self._run = run

    def __call__(self, inputs: Feed) -> Feed:
        """Run once: arrays by input name in, arrays by output name out."""
        return self._run(inputs)

    @classmethod
    def open(
        cls, path: str | Path, *, engine: str = "target", threads: int = 1, registry: Registry | None = None
    ) -> Bundle:
        """Open a bundle.

        Args:
            path: The folder.
            engine: `target`: what was compiled, where something was; `ort`: model.onnx in ONNX Runtime.
            threads: Threads to run with.
            registry: The loaded plugins; None: load them.

        Raises:
            ModelError: The folder is no bundle, or a file of it is damaged.
            UsageError: There is no such engine.
            BackendError: This machine cannot run it.
        """
        if engine not in ("target", "ort"):
            raise UsageError(f"engine {engine!r}", "is not one of target, ort")
        folder = Path(path)
        manifest = read_manifest(folder)
        if manifest is None:
            raise ModelError(str(folder), "is not a bundle: it has no manifest.json", "make one with graphopt MODEL")
        damaged = [name for name, digest in manifest.files.items() if _digest(folder / name) != digest]
        if damaged:
            raise ModelError(str(folder / damaged[0]), "is missing or not what was written", "build the bundle again")
        registry = registry or load_plugins()
        target = registry.targets.resolve(manifest.target)
        backend = registry.backend_of(target)
        if engine == "ort" or backend is None or manifest.kernel is None:
            return cls(folder, manifest, target, "executed", Reference(folder / "model.onnx", threads=threads).run)
        how = backend.how(target)
        if how not in ("executed", "emulated"):
            hint = "load it with engine='ort', or run it on the target; see: graphopt doctor"
            raise BackendError(str(folder), f"made for {target}: {how} on this machine", hint)
        return cls(folder, manifest, target, how, backend.load(folder, target, threads))


def read_manifest(folder: Path) -> Manifest | None:
    """Read a bundle's manifest; None if the folder holds none that graphopt wrote."""
    try:
        return from_text(Manifest, (folder / MANIFEST).read_text("utf8"))
    except (OSError, ValueError, TypeError):
        return None


def up_to_date(folder: Path, key: str | None) -> Manifest | None:
    """The manifest of a bundle that was made from the same inputs and is whole; None if there is none."""
    manifest = read_manifest(folder) if key else None
    if manifest is None or manifest.key != key:
        return None
    return manifest if file_digests(folder) == manifest.files else None


def file_digests(folder: Path) -> dict[str, str]:
    """sha256 of every file of a bundle, without the manifest and `measured/`, sorted by name."""
    files = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    kept = [name for name in files if name != MANIFEST and not name.startswith(f"{MEASURED}{os.sep}")]
    return {name: _digest(folder / name) for name in kept}


def check_out(out: Path, inputs: Sequence[Path], *, overwrite: bool) -> None:
    """Refuse an output folder that cannot be used, before any work is done.

    Raises:
        UsageError: It is a file, holds something that graphopt did not write, or holds an input.
        WriteError: It cannot be written.
    """
    if out.exists() and not out.is_dir():
        raise UsageError(f"-o {out}", "is a file, not a folder")
    for path in inputs:
        if out.resolve() in path.resolve().parents and out.exists():
            raise UsageError(f"-o {out}", f"holds the input {path.name!r} and would be replaced", "choose another")
    if out.is_dir() and any(out.iterdir()) and read_manifest(out) is None and not overwrite:
        fact = "exists and was not written by graphopt"
        raise UsageError(f"-o {out}", fact, "choose another folder, or replace it with --overwrite")
    parent = _existing_parent(out)
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        fact = f"{parent} is {'not writable' if parent.is_dir() else 'a file, not a folder'}"
        raise UsageError(f"-o {out}", fact, "choose another folder with -o")


@contextmanager
def new_folder(out: Path) -> Generator[Path]:
    """Give a folder beside `out` to fill; at the end it takes the place of `out`, and of nothing if filling failed.

    Raises:
        WriteError: The disk is full or the folder cannot be written.
    """
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".partial", dir=out.parent))
    except OSError as e:
        if e.errno in _NO_ROOM:
            raise cannot_write(out, e) from e
        raise UsageError(f"-o {out}", (e.strerror or str(e)).lower(), "choose another folder with -o") from e
    try:
        yield partial
        partial.chmod(0o755)
        _swap(partial, out)
    except OSError as e:
        raise cannot_write(out, e) from e
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def cannot_write(path: Path, e: OSError) -> WriteError:
    """Build the error for an operating system error while writing."""
    hint = "free some space, or choose another place with -o" if e.errno in _NO_ROOM else "choose another with -o"
    return WriteError(str(path), (e.strerror or str(e)).lower(), hint)


def write_text(path: Path, text: str) -> None:
    """Write a text file with the same bytes everywhere."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.encode())


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write the manifest of a bundle."""
    write_text(folder / MANIFEST, to_text(manifest))


def _swap(partial: Path, out: Path) -> None:
    old = partial.with_suffix(".old")
    if out.exists():
        out.rename(old)
    try:
        partial.rename(out)
    except OSError:
        if old.exists():
            old.rename(out)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _existing_parent(path: Path) -> Path:
    return next(parent for parent in path.resolve().parents if parent.exists())


def _digest(path: Path) -> str:
    try:
        with path.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError:
        return ""
