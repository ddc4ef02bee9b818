"""What the CPU backends share: the way from a model to the libraries, weights and programs of a bundle."""

from __future__ import annotations

import abc
import logging
import tempfile
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir

from graphopt.backend_base import Backend, Build, BuildOptions, Profile, Runnable, Runner, Unsupported
from graphopt.errors import BackendError
from graphopt.model_io import save_model, weight_bytes
from graphopt.reference import Feed
from graphopt.targets import Isa, Target
from graphopt_backends._compile import compile_library
from graphopt_backends._deploy import (
    EXAMPLE,
    add_example,
    add_header,
    add_runner,
    add_tvm_runner,
    example_command,
)
from graphopt_backends._engines import EMBED_BYTES, Division, divide, lift_weights
from graphopt_backends._fold import static_shape
from graphopt_backends._import import import_model
from graphopt_backends._library import BUILD, BUILD_SCRIPT, Made, compile_network, signatures
from graphopt_backends._link import Linker, find_linker, links_elsewhere
from graphopt_backends._lower import Lowered, lower
from graphopt_backends._native import quiet
from graphopt_backends._parts import GraphPart
from graphopt_backends._plan import ANY, PLAN, Part, Plan, TensorSpec, read_plan, write_plan
from graphopt_backends._runtime import fetch_runtime, runtime_folder, versions
from graphopt_backends._session import Step, load_steps, profile_plan, run_plan
from graphopt_backends._tensors import PAGE, write_tensors

__all__ = ["CpuBackend", "isa_of"]

_log = logging.getLogger(__name__)


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
        """Find the compiler."""
        _linker(target, options)
        versions()

    def build(self, model: ir.Model, target: Target, folder: Path, options: BuildOptions) -> Build:
        """Compile `model` into `model.so`, or with a fallback into numbered parts, beside a runner and an example."""
        linker = _linker(target, options)
        with tempfile.TemporaryDirectory(prefix="graphopt-") as scratch:
            cache = options.cache if options.cache != Path() else Path(scratch)
            lowered = _lowered(model, target, options)
            division = divide(lowered.model)
            if division.refused and options.fallback is None:
                raise _refusal(target, division.refused.values())
            if linker is None and len(division.parts) > 1:
                raise _not_alone(target, division)
            if "tvm" in division.engines.values():
                runtime_folder(isa_of(target).machine, target.name, cache)
            runners = _runners(lowered.model, division)
            work = _Work(target, folder, options, linker, cache)
            plan, made = work.parts(lowered, division)
            write_plan(plan, folder)
            beside = work.companions(plan, lowered.model)
        files = [name for part in plan.parts for name in (part.file, part.weights) if name]
        files += [p.name for p in sorted(folder.glob("model*.ll")) + sorted(folder.glob("model*.s"))]
        if linker is None:
            files = [f"{BUILD}/{path.name}" for path in sorted((folder / BUILD).iterdir())]
            files += [part.weights for part in plan.parts if part.weights]
        compiled = [name for name in files if name.endswith((".so", ".o"))]
        facts = _facts(lowered, division, plan, made, work)
        if EXAMPLE in beside:
            facts["example"] = example_command(work.isa)
        _log.info("batch of %s: %s", plan.target, facts["batch"])
        refused, files = tuple(division.refused.values()), [*files, PLAN, *beside]
        return Build(compiled[0] if compiled else None, tuple(files), facts, refused, runners)

    def run_all(self, folder: Path, target: Target, feeds: Sequence[Feed], threads: int) -> Sequence[Feed]:
        """Run many feeds; every part is started once."""
        plan, steps = load_steps(folder, lambda part: self.step(part, folder, target, threads))
        return run_plan(plan, steps, feeds)

    def load(self, folder: Path, target: Target, threads: int) -> Runnable:
        """Load a bundle."""
        plan, steps = load_steps(folder, lambda part: self.step(part, folder, target, threads))
        return lambda feed: run_plan(plan, steps, [feed])[0]

    def profile(self, folder: Path, target: Target, feed: Feed, threads: int, runs: int) -> Profile:
        """Time every step, where this machine executes the code."""
        if self.how(target) != "executed":
            return Profile()
        return profile_plan(read_plan(folder), folder, feed, threads, runs)

    @abc.abstractmethod
    def step(self, part: Part, folder: Path, target: Target, threads: int) -> Step:
        """Make one part ready to run on this machine.

        Raises:
            BackendError: This machine cannot run it.
        """

    def fetch(self, target: Target, cache: Path) -> Sequence[Path]:
        """Download TVM's runtime for the target's machine into the cache; only parts without kernels need it."""
        return fetch_runtime(isa_of(target).machine, cache)


@dataclass(frozen=True)
class _Work:
    """A build that is going on."""

    target: Target
    folder: Path
    options: BuildOptions
    linker: Linker | None
    cache: Path

    @property
    def isa(self) -> Isa:
        return isa_of(self.target)

    def parts(self, lowered: Lowered, division: Division) -> tuple[Plan, list[Made]]:
        """Build all parts."""
        graph, batch = lowered.model.graph, lowered.batch
        fed = [value for value in graph.inputs if value.name not in graph.initializers]
        inputs, outputs = _specs(fed, batch.inputs), _specs(graph.outputs, batch.outputs)
        steps: list[Part] = []
        networks: list[Made] = []
        for i, part in enumerate(division.parts):
            alone = len(division.parts) == 1 and part.engine != "onnxruntime"
            stem = "model" if alone else f"model.part{i}"
            if part.engine == "kernels":
                steps.append(self._kernels(part, f"{stem}.so", networks, samples_apart=alone and batch.leads))
            elif part.engine == "tvm":
                steps.append(self._tvm(part, f"{stem}.so"))
            else:
                save_model(part.model, self.folder / f"{stem}.onnx")
                steps.append(Part("onnxruntime", f"{stem}.onnx", part.inputs, part.outputs))
        served = ANY if batch.size else f"fixed: {batch.reason}"
        return Plan(str(self.target), inputs, outputs, tuple(steps), served), networks

    def _kernels(self, part: GraphPart, name: str, networks: list[Made], *, samples_apart: bool) -> Part:
        inputs, outputs, path = part.inputs, part.outputs, self.folder / name
        with quiet():
            made = compile_network(
                part.model, self.isa, str(self.target), path, self.linker, self.cache, self.options.emit,
                samples_apart=samples_apart,
            )  # fmt: skip
        networks.append(made)
        return Part("kernels", name, inputs, outputs, path.with_suffix(".weights").name if made.separate else None)

    def _tvm(self, part: GraphPart, name: str) -> Part:
        inputs, outputs, weights = part.inputs, part.outputs, None
        if weight_bytes(part.model) > EMBED_BYTES:
            weights = f"{name.removesuffix('.so')}.weights"
            lifted = lift_weights(part.model)
            write_tensors(self.folder / weights, ((v_name, tensor.numpy()) for v_name, tensor in lifted), PAGE)
        assert self.linker is not None
        with quiet():
            module = import_model(part.model)
            threads, emit = self.options.threads, self.options.emit
            compile_library(module, self.isa, self.folder / name, self.linker, threads, emit)
        return Part("tvm", name, inputs, outputs, weights)

    def companions(self, plan: Plan, model: ir.Model) -> list[str]:
        """Write what lies beside the libraries."""
        engines = {part.engine for part in plan.parts}
        files: list[str] = []
        if self.linker is None:
            ends = signatures(model.graph.inputs), signatures(model.graph.outputs)
            return [*add_header(self.folder), *add_example(self.folder, plan.parts[0].weights, *ends, self.isa)]
        if "kernels" in engines:
            files += add_runner(self.folder, self.linker, self.isa, self.cache)
        if "tvm" in engines:
            runtime = runtime_folder(self.isa.machine, self.target.name, self.cache)
            files += add_tvm_runner(self.folder, runtime, self.linker, self.isa, self.cache)
        if engines == {"kernels"} and len(plan.parts) == 1:
            ends = signatures(model.graph.inputs), signatures(model.graph.outputs)
            files += add_example(self.folder, plan.parts[0].weights, *ends, self.isa)
        return files


def _lowered(model: ir.Model, target: Target, options: BuildOptions) -> Lowered:
    from graphopt_backends.network.blockwise import keeps

    return lower(model, options.binding, str(target), keeps)


def _linker(target: Target, options: BuildOptions) -> Linker | None:
    """What links here; None where a bundle is linked elsewhere."""
    isa = isa_of(target)
    return None if links_elsewhere(isa) and not options.cc else find_linker(isa, options.cc)


def _not_alone(target: Target, division: Division) -> BackendError:
    first = next(iter(division.engines))
    fact = f"brings one library, and no kernel computes {first!r}" + (
        f" and {len(division.engines) - 1} more nodes" if len(division.engines) > 1 else ""
    )
    return BackendError(f"target {target}", fact, "compile for another target")


def _refusal(target: Target, refused: Iterable[Unsupported]) -> BackendError:
    items = list(refused)
    named = "; ".join(f"{u.operator} at {u.site!r}: {u.reason}" for u in items[:3])
    more = f" and {len(items) - 3} more" if len(items) > 3 else ""
    fact = f"cannot take {len(items)} operator{'s' if len(items) > 1 else ''}: {named}{more}"
    return BackendError(f"target {target}", fact, "give --fallback ort to let ONNX Runtime run them")


def _specs(values: Sequence[ir.Value], axes: Sequence[int | None]) -> tuple[TensorSpec, ...]:
    """Inputs or outputs, with the axes of samples where the batch is not fixed."""
    return tuple(
        TensorSpec(str(v.name), str(v.dtype.numpy()) if v.dtype is not None else "unknown", static_shape(v), axis)
        for v, axis in zip(values, axes or [None] * len(values), strict=True)
    )


def _runners(model: ir.Model, division: Division) -> tuple[Runner, ...]:
    found = Counter((node.op_type, division.engines.get(node.name or "", "kernels")) for node in model.graph)
    return tuple(Runner(*key, nodes) for key, nodes in sorted(found.items()))


def _facts(
    lowered: Lowered, division: Division, plan: Plan, made: Sequence[Made], work: _Work
) -> dict[str, str | int | float | bool]:
    isa, folder = work.isa, work.folder
    libraries = [part for part in plan.parts if part.engine != "onnxruntime"]
    facts: dict[str, str | int | float | bool] = {
        "compiler": f"TVM {versions()[0]}",
        "isa": isa.name,
        "triple": isa.triple,
        "cpu": isa.cpu or "baseline",
        "linker": work.linker.version() if work.linker else f"none: {BUILD}/{BUILD_SCRIPT} links it",
        "kernel_bytes": sum((folder / part.file).stat().st_size for part in libraries if (folder / part.file).exists()),
        "parts": len(plan.parts),
    }
    if made:
        facts["kernels"] = sum(m.kernels for m in made)
        facts["steps"] = sum(len(m.steps) for m in made)
        facts["workspace_bytes"] = max(m.workspace for m in made)
    others = Counter(division.engines.values())
    for engine in ("tvm", "onnxruntime"):
        if others[engine]:
            facts[f"nodes run by {engine}"] = others[engine]
    if isa.features:
        facts["features"] = " ".join(isa.features)
    weights = [folder / part.weights for part in libraries if part.weights]
    if weights:
        facts["weights_bytes"] = sum(path.stat().st_size for path in weights)
    if lowered.fixed:
        facts["fixed"] = ", ".join(lowered.fixed)
    facts["batch"] = _batch_fact(plan, lowered.batch.size)
    return facts


def _batch_fact(plan: Plan, size: int) -> str:
    if not size:
        return plan.batch
    ends = (*plan.inputs, *plan.outputs)
    axes = ", ".join(f"axis {spec.batch_axis} of {spec.name}" for spec in ends if spec.batch_axis is not None)
    return f"{ANY}{f' multiple of {size}' if size > 1 else ''}: {axes}"
