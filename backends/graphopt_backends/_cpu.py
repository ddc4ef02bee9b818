"""What the CPU backends share: the way from a model to the libraries, runner and runtime of a bundle."""

from __future__ import annotations

import abc
import hashlib
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx_ir as ir

from graphopt.backend_base import Backend, Build, BuildOptions, Runnable, Unsupported
from graphopt.errors import BackendError
from graphopt.model_io import save_model, weight_bytes
from graphopt.reference import Feed
from graphopt.targets import Isa, Target, host_machine
from graphopt_backends._compile import compile_library
from graphopt_backends._fold import is_constant, static_shape
from graphopt_backends._import import import_model, unsupported_nodes
from graphopt_backends._link import Linker, find_linker
from graphopt_backends._lower import Lowered, lower
from graphopt_backends._native import quiet
from graphopt_backends._parts import GraphPart, cut, data_dependent
from graphopt_backends._plan import PLAN, Part, Plan, TensorSpec, write_plan
from graphopt_backends._runtime import RUNTIME, copy_runtime, fetch_runtime, runtime_folder, versions
from graphopt_backends._session import Step, load_steps, run_plan
from graphopt_backends._tensors import PAGE, write_tensors

__all__ = ["CpuBackend", "isa_of"]

EMBED_BYTES = 64 << 20
_LIFT_BYTES = 1 << 16
_SOURCES = Path(__file__).parent / "runtime"


def isa_of(target: Target) -> Isa:
    """The CPU of a target.

    Raises:
        BackendError: The target names none.
    """
    if target.isa is None:
        raise BackendError(f"target {target}", "names no CPU", "its Target record needs an Isa")
    return target.isa


class CpuBackend(Backend):
    """Compiles through TVM and LLVM; a subclass says how the result is run on this machine."""

    def ready(self, target: Target, options: BuildOptions) -> None:
        """Find the compiler and, for another machine than this, its runtime in the cache."""
        isa = isa_of(target)
        find_linker(isa, options.cc)
        versions()
        if isa.machine != host_machine():
            runtime_folder(isa.machine, target.name, options.cache)

    def unsupported(self, model: ir.Model, target: Target, options: BuildOptions) -> Sequence[Unsupported]:
        """Name the operators that TVM's importer cannot take, and those whose shapes depend on the data."""
        lowered = lower(model, options.binding, str(target))
        return tuple(_unsupported(lowered.model).values())

    def build(self, model: ir.Model, target: Target, folder: Path, options: BuildOptions) -> Build:
        """Compile `model` into `model.so`, or with a fallback into numbered parts, beside the runtime and a runner."""
        isa = isa_of(target)
        linker = find_linker(isa, options.cc)
        with tempfile.TemporaryDirectory(prefix="graphopt-") as scratch:
            cache = options.cache if options.cache != Path() else Path(scratch)
            runtime = runtime_folder(isa.machine, target.name, cache)
            lowered = lower(model, options.binding, str(target))
            refused = _unsupported(lowered.model)
            if refused and options.fallback is None:
                raise _refusal(target, refused)
            parts = cut(lowered.model, refused)
            plan = _build_parts(lowered.model, parts, target, folder, options, linker)
            write_plan(plan, folder)
            extra = copy_runtime(runtime, folder, _SOURCES / "model.h")
            sources = _write_sources(plan, folder, isa)
            _build_runner(folder, runtime, linker, isa, cache)
        made = [name for part in plan.parts for name in (part.file, part.weights) if name]
        made += [p.name for p in sorted(folder.glob("model*.ll")) + sorted(folder.glob("model*.s"))]
        compiled = [part.file for part in plan.parts if part.engine == "tvm"]
        files = (*made, PLAN, "run", *sources, *extra)
        facts = _facts(lowered, plan, isa, linker, folder, options)
        return Build(compiled[0] if compiled else None, files, facts, tuple(refused.values()))

    def run_all(self, folder: Path, target: Target, feeds: Sequence[Feed], threads: int) -> Sequence[Feed]:
        """Run many feeds; every part is started once."""
        plan, steps = load_steps(folder, lambda part: self.step(part, folder, target, threads))
        return run_plan(plan, steps, feeds)

    def load(self, folder: Path, target: Target, threads: int) -> Runnable:
        """Load a bundle."""
        plan, steps = load_steps(folder, lambda part: self.step(part, folder, target, threads))
        return lambda feed: run_plan(plan, steps, [feed])[0]

    @abc.abstractmethod
    def step(self, part: Part, folder: Path, target: Target, threads: int) -> Step:
        """Make one part ready to run on this machine.

        Raises:
            BackendError: This machine cannot run it.
        """

    def fetch(self, target: Target, cache: Path) -> Sequence[Path]:
        """Download the runtime for the target's machine into the cache."""
        return fetch_runtime(isa_of(target).machine, cache)


def _unsupported(model: ir.Model) -> dict[str, Unsupported]:
    imported = model
    if weight_bytes(model) > EMBED_BYTES:
        imported = model.clone()
        _lift_weights(imported)
    with quiet():
        found = dict(unsupported_nodes(imported))
    for name, node in data_dependent(model).items():
        reason = "the shape of its input or output depends on the data"
        found.setdefault(name, Unsupported(name, node.op_type, reason))
    return found


def _refusal(target: Target, refused: dict[str, Unsupported]) -> BackendError:
    items = list(refused.values())
    named = "; ".join(f"{u.operator} at {u.site!r}: {u.reason}" for u in items[:3])
    more = f" and {len(items) - 3} more" if len(items) > 3 else ""
    fact = f"cannot take {len(items)} operator{'s' if len(items) > 1 else ''}: {named}{more}"
    return BackendError(f"target {target}", fact, "give --fallback ort to let ONNX Runtime run them")


def _build_parts(
    model: ir.Model, parts: list[GraphPart], target: Target, folder: Path, options: BuildOptions, linker: Linker
) -> Plan:
    steps: list[Part] = []
    for i, part in enumerate(parts):
        stem = "model" if len(parts) == 1 and part.compiled else f"model.part{i}"
        if part.compiled:
            steps.append(_build_library(part, f"{stem}.so", target, folder, options, linker))
        else:
            save_model(part.model, folder / f"{stem}.onnx")
            steps.append(Part("onnxruntime", f"{stem}.onnx", part.inputs, part.outputs))
    fed = [value for value in model.graph.inputs if value.name not in model.graph.initializers]
    return Plan(str(target), _specs(fed), _specs(model.graph.outputs), tuple(steps))


def _build_library(
    part: GraphPart, name: str, target: Target, folder: Path, options: BuildOptions, linker: Linker
) -> Part:
    inputs, outputs = part.inputs, part.outputs
    weights: str | None = None
    if weight_bytes(part.model) > EMBED_BYTES:
        weights = f"{name.removesuffix('.so')}.weights"
        lifted = _lift_weights(part.model)
        write_tensors(folder / weights, ((v_name, tensor.numpy()) for v_name, tensor in lifted), PAGE)
    with quiet():
        module = import_model(part.model)
        compile_library(module, isa_of(target), folder / name, linker, options.threads, options.emit)
    return Part("tvm", name, inputs, outputs, weights)


def _lift_weights(model: ir.Model) -> list[tuple[str, ir.TensorProtocol]]:
    """Turn large constants into inputs after the real ones; returns them in that order."""
    lifted: list[tuple[str, ir.TensorProtocol]] = []
    for name, value in list(model.graph.initializers.items()):
        tensor = value.const_value
        shape = static_shape(value)
        if tensor is None or tensor.nbytes < _LIFT_BYTES or shape is None or not is_constant(value):
            continue
        model.graph.initializers.pop(name)
        value.const_value = None
        value.type, value.shape = ir.TensorType(tensor.dtype), ir.Shape(shape)
        model.graph.inputs.append(value)
        lifted.append((name, tensor))
    return lifted


def _specs(values: Sequence[ir.Value]) -> tuple[TensorSpec, ...]:
    return tuple(
        TensorSpec(str(v.name), str(v.dtype.numpy()) if v.dtype is not None else "unknown", static_shape(v))
        for v in values
    )


def _write_sources(plan: Plan, folder: Path, isa: Isa) -> tuple[str, ...]:
    """Put the runner's source and, for a model in one library, an example into the bundle."""
    compiler = f"{isa.machine}-linux-gnu-g++"
    run = (_SOURCES / "run.cc").read_text("utf8").replace("@COMPILER@", compiler)
    (folder / "run.cc").write_text(run, "utf8")
    if len(plan.parts) != 1 or plan.parts[0].engine != "tvm":
        return ("run.cc",)
    part, known = plan.parts[0], {spec.name: spec for spec in plan.inputs}
    library = f'"{part.file}", 1, "{part.weights}"' if part.weights else f'"{part.file}"'
    inputs = "\n".join(_example_input(known[name]) for name in part.inputs)
    text = (_SOURCES / "example.cc").read_text("utf8").replace("@COMPILER@", compiler)
    (folder / "example.cc").write_text(text.replace("@LIBRARY@", library).replace("@INPUTS@", inputs), "utf8")
    return ("run.cc", "example.cc")


def _example_input(spec: TensorSpec) -> str:
    dtype = np.dtype(spec.dtype)
    codes = {"f": "kDLFloat", "i": "kDLInt", "u": "kDLUInt", "b": "kDLBool"}
    shape = ", ".join(map(str, spec.shape or ()))
    code = codes.get(dtype.kind, "kDLFloat")
    name = spec.name.replace("\\", "\\\\").replace('"', '\\"')
    return f'      graphopt::make_tensor({{{code}, {dtype.itemsize * 8}, 1}}, {{{shape}}}, "{name}"),'


def _build_runner(folder: Path, runtime: Path, linker: Linker, isa: Isa, cache: Path) -> None:
    """Compile the runner, or take the one that the same compiler made from the same sources before."""
    digest = hashlib.sha256(" ".join((linker.name, *linker.command, linker.version())).encode())
    for source in (
        folder / "run.cc",
        _SOURCES / "model.h",
        *sorted(runtime.rglob("*.so")),
        *sorted(runtime.rglob("*.h")),
    ):
        digest.update(source.read_bytes())
    known = cache / "runner" / isa.machine / digest.hexdigest()[:32]
    if not known.is_file():
        known.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="graphopt-", dir=known.parent) as scratch:
            made = Path(scratch) / "run"
            shutil.copyfile(folder / "run.cc", Path(scratch) / "run.cc")
            linker.program(Path(scratch) / "run.cc", made, folder / RUNTIME, [folder / RUNTIME / "include"])
            made.replace(known)
    shutil.copyfile(known, folder / "run")
    (folder / "run").chmod(0o755)


def _facts(
    lowered: Lowered, plan: Plan, isa: Isa, linker: Linker, folder: Path, options: BuildOptions
) -> dict[str, str | int | float | bool]:
    tvm, ffi = versions()
    libraries = [part for part in plan.parts if part.engine == "tvm"]
    facts: dict[str, str | int | float | bool] = {
        "engine": f"TVM {tvm} (ffi {ffi})",
        "isa": isa.name,
        "triple": isa.triple,
        "cpu": isa.cpu or "baseline",
        "linker": linker.version(),
        "kernel_bytes": sum((folder / part.file).stat().st_size for part in libraries),
        "parts": len(plan.parts),
    }
    if isa.features:
        facts["features"] = " ".join(isa.features)
    weights = [folder / part.weights for part in libraries if part.weights]
    if weights:
        facts["weights_bytes"] = sum(path.stat().st_size for path in weights)
    if lowered.fixed:
        facts["fixed"] = ", ".join(lowered.fixed)
    if options.threads:
        facts["threads"] = options.threads
    return facts
