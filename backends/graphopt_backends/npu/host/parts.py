"""Build what the host of an NPU runs: C source, libraries for an Arm CPU, or models for ONNX Runtime."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import onnx_ir as ir

from graphopt.backend_base import BuildOptions, Unsupported
from graphopt.errors import BackendError
from graphopt.model_io import save_model
from graphopt.targets import Isa, Target
from graphopt_backends._deploy import add_runner
from graphopt_backends._engines import divide as divide_among_engines
from graphopt_backends._library import compile_network, signatures
from graphopt_backends._link import Linker, find_linker, links_elsewhere
from graphopt_backends._native import quiet
from graphopt_backends._parts import GraphPart
from graphopt_backends._plan import Engine, Part, Plan, TensorSpec
from graphopt_backends.arm import TARGETS
from graphopt_backends.npu.header import NpuPart
from graphopt_backends.npu.host.c_lower import Functions, lower_part, refused_nodes
from graphopt_backends.npu.host.c_run import HEADER, SOURCE
from graphopt_backends.npu.host.c_source import HostPart, NpuCall, write_source
from graphopt_backends.npu.host.driver import DRIVER, driver_text
from graphopt_backends.npu.host.load import host_runner, host_stem, reference_file
from graphopt_backends.npu.options import NpuOptions, options_of
from graphopt_backends.npu.partition import Partition, partition

__all__ = ["Divided", "HostBuild", "cpu_of", "divide", "family_of", "find_tools", "write_c"]

_SHOWN = 3
Facts = dict[str, "str | int | float | bool"]


@dataclass(frozen=True)
class Divided:
    """A model in parts, those of the host ready to be written.

    Attributes:
        partition: The parts.
        functions: Those in C, by their place.
        left: Operators that ONNX Runtime runs because the host's compiler cannot take them.
    """

    partition: Partition
    functions: Mapping[int, Functions]
    left: tuple[Unsupported, ...]


def cpu_of(host: str) -> Isa | None:
    """The Arm CPU that a host is; None if it is none."""
    return next((target.isa for target in TARGETS if target.device == host), None)


def find_tools(options: BuildOptions) -> None:
    """Look for what links libraries for the host, where it is a CPU.

    Raises:
        BackendError: There is nothing.
    """
    _linker(options)


def _linker(options: BuildOptions) -> Linker | None:
    """What links libraries for the host here; None where that is done elsewhere, or there are none."""
    isa = cpu_of(options_of(options).host)
    return None if isa is None or (links_elsewhere(isa) and not options.cc) else find_linker(isa, options.cc)


def family_of(target: Target) -> str:
    """`u55` of `ethos-u55-128`."""
    return target.device.split("-")[1]


def divide(
    model: ir.Model, target: Target, options: BuildOptions, check: Callable[[Partition], None] = lambda _: None
) -> Divided:
    """Divide a lowered model between NPU and host, and lower what becomes C.

    Args:
        model: Fixed sizes, constants folded.
        target: Of the build.
        options: Of the build.
        check: Raises where the division will not do.

    Raises:
        BackendError: The host's compiler cannot take operators, and ONNX Runtime is not asked to.
    """
    chosen = options_of(options)
    engine: Engine = "kernels" if cpu_of(chosen.host) else "c" if chosen.host == "c" else "onnxruntime"
    left: dict[str, Unsupported] = {}
    while True:
        divided = partition(model, family_of(target), engine, left)
        check(divided)
        functions, refused = _compiled(divided.parts)
        if not refused:
            return Divided(divided, functions, tuple(left.values()))
        if options.fallback is None:
            raise _refusal(refused, target, chosen)
        left |= refused


def _compiled(parts: Sequence[GraphPart]) -> tuple[dict[int, Functions], dict[str, Unsupported]]:
    """Functions in C of the parts that want them, and nodes that the host's compiler cannot take."""
    functions: dict[int, Functions] = {}
    refused: dict[str, Unsupported] = {}
    for index, part in enumerate(parts):
        if part.engine == "c":
            try:
                functions[index] = lower_part(part.model, host_stem(index))
            except BackendError:
                refused |= refused_nodes(part.model)
        elif part.engine == "kernels":
            refused |= _without_kernel(part.model)
    return functions, refused


def _without_kernel(model: ir.Model) -> dict[str, Unsupported]:
    found = divide_among_engines(model.clone())
    operators = {node.name or "": node.op_type for node in model.graph}
    missing = {name: Unsupported(name, operators.get(name, "?"), "no kernel computes it") for name in found.engines}
    return missing | dict(found.refused)


def _refusal(refused: Mapping[str, Unsupported], target: Target, options: NpuOptions) -> BackendError:
    named = "; ".join(f"{u.operator} at {u.site!r}: {u.reason}" for u in list(refused.values())[:_SHOWN])
    more = f"; and {len(refused) - _SHOWN} more" if len(refused) > _SHOWN else ""
    many = "s" if len(refused) > 1 else ""
    fact = f"neither the NPU nor its host ({options.host}) can take {len(refused)} operator{many}: {named}{more}"
    hint = "give --fallback ort to let ONNX Runtime run them, or the target's option host=onnxruntime"
    return BackendError(f"target {target}", fact, hint)


@dataclass
class HostBuild:
    """Parts of the host, as they are written.

    Attributes:
        folder: Of the bundle.
        target: What is built for.
        options: What was asked for.
        files: What was written.
    """

    folder: Path
    target: Target
    options: BuildOptions
    files: list[str] = field(default_factory=list[str])

    def part(self, index: int, part: GraphPart) -> Part:
        """Write one part, and beside it what it computes as a model."""
        name = reference_file(index)
        save_model(part.model, self.folder / name)
        self.files.append(name)
        if part.engine == "c":
            return Part("c", SOURCE, part.inputs, part.outputs)
        if part.engine == "kernels":
            return self._library(index, part)
        return Part("onnxruntime", name, part.inputs, part.outputs)

    def _library(self, index: int, part: GraphPart) -> Part:
        isa = cpu_of(options_of(self.options).host)
        assert isa is not None
        linker = _linker(self.options)
        alone = f"{host_stem(index)}/model.so"  # sources of several libraries, each in a folder
        name = f"model.{host_stem(index)}.{isa.name}.so" if linker else alone
        path = self.folder / name
        path.parent.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="graphopt-") as scratch, quiet():
            cache = self.options.cache if self.options.cache != Path() else Path(scratch)
            target = f"arm:{isa.name}"
            made = compile_network(part.model, isa, target, path, linker, cache, self.options.emit)
            if linker and "run" not in self.files:
                self.files += add_runner(self.folder, linker, isa, cache)
        weights = path.with_suffix(".weights") if made.separate else None
        listings = [path.with_suffix(suffix) for suffix in (".s", ".ll")]
        written = [path, *listings, *([weights] if weights else []), *sorted((path.parent / "build").glob("*"))]
        self.files += [str(file.relative_to(self.folder)) for file in written if file.exists()]
        beside = str(weights.relative_to(self.folder)) if weights else None
        return Part("kernels", name, part.inputs, part.outputs, beside)

    def facts(self, plan: Plan) -> Facts:
        """What is known of the host's parts."""
        host = options_of(self.options).host
        engines = [part.engine for part in plan.parts if part.engine != "npu"]
        facts: Facts = {"host": host, "parts on the host": len(engines)}
        if runner := host_runner(plan):
            facts["host parts run here by"] = runner
        return facts


def write_c(build: HostBuild, plan: Plan, divided: Divided, made: Mapping[int, NpuPart], title: str) -> Facts:
    """Write `model.c`, `model.h` and `model.npu.c`, where there are parts in C.

    Args:
        build: The build.
        plan: Its parts.
        divided: Their functions.
        made: The NPU's parts, by their place.
        title: What is compiled, in one sentence.
    """
    if not divided.functions:
        return {}
    parts: list[HostPart | NpuCall] = []
    for index, part in enumerate(divided.partition.parts):
        ends = _specs(part.model.graph.inputs), _specs(part.model.graph.outputs)
        if index in divided.functions:
            parts.append(HostPart(index, divided.functions[index], *ends))
        elif part.engine == "npu":
            number = sum(isinstance(known, NpuCall) for known in parts)
            parts.append(NpuCall(number, *ends, tuple(port.dtype for port in made[index].outputs)))
    whole = len(parts) == len(divided.partition.parts)
    source = write_source(title, plan.inputs, plan.outputs, parts, whole=whole)
    (build.folder / HEADER).write_text(source.header, "utf8")
    (build.folder / SOURCE).write_text(source.source, "utf8")
    build.files += [SOURCE, HEADER]
    if whole and made:
        (build.folder / DRIVER).write_text(driver_text([made[index] for index in sorted(made)]), "utf8")
        build.files.append(DRIVER)
    return {"host workspace bytes": source.workspace, "host constant bytes": source.constants}


def _specs(values: Sequence[ir.Value]) -> tuple[TensorSpec, ...]:
    return tuple(TensorSpec(known.name, known.dtype, known.shape) for known in signatures(values))
