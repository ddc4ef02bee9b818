"""What the user asked for, checked and resolved before any work is done."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, cast

from graphopt.calibration import Dataset, Metric
from graphopt.compile.decisions import Decisions
from graphopt.model_io import ShapeBinding
from graphopt.options import non_defaults
from graphopt.pass_base import Pass
from graphopt.pipeline_text import Step, format_pipeline
from graphopt.plugins import Registry
from graphopt.recipe import Limits
from graphopt.targets import Target

__all__ = ["CheckMode", "Request", "cache_key", "command_line", "shape_texts", "versions"]

CheckMode = Literal["auto", "full", "sample", "none"]

_LIBRARIES = ("apache-tvm", "apache-tvm-ffi", "numpy", "onnx", "onnx-graphsurgeon", "onnx-ir", "onnxruntime")


@dataclass(frozen=True)
class Request:
    """A resolved compile command.

    Of its fields these are no options of the command: `target_options` is an instance of the options of the target's
    backend, None where that has none, and `reads` are the files that they name.
    """

    model: Path
    digest: str
    out: Path
    target: Target
    passes: tuple[Pass, ...]
    registry: Registry
    calibration: Dataset | None = None
    evaluation: Dataset | None = None
    metric: Metric | None = None
    binding: ShapeBinding = field(default_factory=ShapeBinding)
    limits: Limits = field(default_factory=Limits)
    check: CheckMode = "auto"
    verify: bool = True
    measure: bool = False
    guard: bool = False
    decisions: Decisions | None = None
    emit: tuple[str, ...] = ()
    seed: int = 0
    threads: int = 1
    cc: str | None = None
    fallback: Literal["ort"] | None = None
    keep_opset: bool = False
    extensions: tuple[str, ...] = ()
    cache: Path = Path()
    force: bool = False
    pack: bool = False
    target_options: Any = None
    reads: tuple[Path, ...] = ()

    @property
    def target_text(self) -> str:
        """The target with its options as text that parses back; files by their names, as all data."""
        if self.target_options is None:
            return str(self.target)
        names = {str(path): path.name for path in self.reads}
        given = non_defaults(self.target_options)
        shown = ((key, tuple(names.get(word, word) for word in words)) for key, words in given.items())
        return str(Step(str(self.target), tuple(shown)))

    @property
    def pipeline(self) -> str:
        """The passes as text that parses back."""
        return format_pipeline(step.step() for step in self.passes)


def versions(request: Request) -> dict[str, str]:
    """Versions of the libraries and plugins that take part, sorted by name."""
    found = {plugin.name: plugin.version for plugin in request.registry.plugins}
    backend = request.registry.backends.get(request.target.backend or "")
    for name in (*_LIBRARIES, *(backend.libraries if backend else ())):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "missing"
    return dict(sorted(found.items()))


def shape_texts(binding: ShapeBinding) -> dict[str, str]:
    """Fixed sizes as text, for the manifest and the report."""
    shapes = {name: "x".join(map(str, shape)) for name, shape in binding.shapes.items()}
    return dict(sorted({**shapes, **{name: str(size) for name, size in binding.dims.items()}}.items()))


def cache_key(request: Request) -> str | None:
    """Digest of everything that the bundle follows from; None if something has no digest and may have changed."""
    parts: dict[str, Any] = {
        "model": request.digest,
        "name": request.model.name,
        "target": [asdict(request.target), request.target_text, [_file_digest(path) for path in request.reads]],
        "pipeline": request.pipeline,
        "shapes": [sorted(request.binding.shapes.items()), sorted(request.binding.dims.items())],
        "limits": repr(request.limits),
        "check": [request.check, request.verify],
        "clock": [request.guard, None if request.decisions is None else asdict(request.decisions)],
        "build": [request.emit, request.cc, request.fallback, request.keep_opset, request.seed, request.threads],
        "pack": request.pack,
        "versions": versions(request),
        "sources": [_source_digest(plugin.module) for plugin in request.registry.plugins],
        "host": _source_digest("graphopt"),
        "extensions": [_file_digest(Path(name)) for name in request.extensions],
    }
    for role, data in (("calibration", request.calibration), ("evaluation", request.evaluation)):
        if data is not None and data.digest is None:
            return None
        parts[role] = None if data is None else [data.origin, data.digest]
    if request.metric is not None:
        if request.metric.digest is None:
            return None
        parts["metric"] = [request.metric.name, request.metric.digest]
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=_plain).encode()).hexdigest()


def command_line(request: Request, data: Mapping[str, str]) -> str:
    """The command that makes the bundle again, without what differs between machines."""
    target = request.target_text if request.target_text == str(request.target) else f"'{request.target_text}'"
    words = ["graphopt", request.model.name, "--passes", f"'{request.pipeline}'", "--target", target]
    for option, value in data.items():
        words += [option, value]
    for name, shape in request.binding.shapes.items():
        words += ["--shape", f"{name}={'x'.join(map(str, shape))}"]
    if request.binding.dims:
        words += ["--dim", ",".join(f"{name}={size}" for name, size in sorted(request.binding.dims.items()))]
    if request.seed:
        words += ["--seed", str(request.seed)]
    words += ["--keep-opset"] if request.keep_opset else []
    words += ["--pack"] if request.pack else []
    words += ["--fallback", request.fallback] if request.fallback else []
    return " ".join(words)


def _plain(value: Any) -> Any:
    """JSON form of what json does not know; sets have no order of their own."""
    return sorted(cast("frozenset[str]", value)) if isinstance(value, frozenset) else str(value)


def _source_digest(module: str) -> str:
    """sha256 over a package's source files, so that an edited plugin is never taken for the old one."""
    spec = find_spec(module.partition(".")[0])
    folders: Sequence[str] = list(spec.submodule_search_locations or []) if spec else []
    files = [path for folder in folders for path in Path(folder).rglob("*") if path.suffix in (".py", ".cc", ".toml")]
    if not files and spec and spec.origin:
        files = [Path(spec.origin)]
    digest = hashlib.sha256()
    for path in sorted(files):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()


def _file_digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""
