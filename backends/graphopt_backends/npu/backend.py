"""Arm Ethos-U: integers as TOSA, compiled by Vela, checked on the TOSA reference model; the host runs what is left."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import onnx_ir as ir

from graphopt.analyses import COST
from graphopt.backend_base import Backend, Build, BuildOptions, Estimate, Finding, Obtained, Runnable, Runner
from graphopt.errors import BackendError, UsageError
from graphopt.pass_base import Context
from graphopt.reference import Feed
from graphopt.targets import Target
from graphopt_backends._fold import static_shape
from graphopt_backends._lower import Lowered, lower
from graphopt_backends._parts import GraphPart
from graphopt_backends._plan import ANY, PLAN, Part, Plan, TensorSpec, write_plan
from graphopt_backends._session import run_plan
from graphopt_backends.npu.doctor import findings
from graphopt_backends.npu.header import NpuPart, header_text
from graphopt_backends.npu.host.load import NpuRun, load_bundle
from graphopt_backends.npu.host.parts import HostBuild, divide, family_of, find_tools, write_c
from graphopt_backends.npu.network import emit
from graphopt_backends.npu.operators import RULES
from graphopt_backends.npu.options import NpuOptions, options_of
from graphopt_backends.npu.partition import Partition
from graphopt_backends.npu.ports import ports
from graphopt_backends.npu.tosa import Graph, inputs_of, library, outputs_of, run_reference, serialize
from graphopt_backends.npu.vela import DISTRIBUTION, compile_tosa, configuration, vela_version

__all__ = ["NpuBackend"]

_SHOWN = 3
_TOSA, _RAW, _HEADER = ".tosa", "_vela.npz", "model.npu.h"


class NpuBackend(Backend):
    """Compiles for Ethos-U; no NPU is needed, and none is used, on the machine that does so."""

    name: ClassVar[str] = "npu"
    options: ClassVar[type[Any] | None] = NpuOptions
    libraries: ClassVar[tuple[str, ...]] = (DISTRIBUTION, "tosa-tools")

    def reads(self, options: Any) -> Sequence[Path]:
        """The user's file of configurations, if there is one."""
        return (Path(options.config),) if isinstance(options, NpuOptions) and options.config else ()

    def explain(self, target: Target) -> Sequence[str]:
        """The table of operators."""
        width = max(map(len, RULES))
        words = {name: f"{rule.becomes}{f'; {rule.when}' if rule.when else ''}" for name, rule in RULES.items()}
        lines = [f"{name:{width}}  {becomes}" for name, becomes in words.items()]
        return ("operators on the NPU, with int8 in and out:", *(f"  {line}" for line in lines))

    def ready(self, target: Target, options: BuildOptions) -> None:
        """Find Vela, the serializer, the configuration, and what compiles for the host."""
        vela_version()
        library("tosa_serializer")
        configuration(target.device, options_of(options), str(target))
        find_tools(options)

    def build(self, model: ir.Model, target: Target, folder: Path, options: BuildOptions) -> Build:
        """Write a TOSA file, Vela's output for it, and what the host runs, with the order of all."""
        lowered = _lowered(model, target, options)
        divided = divide(lowered.model, target, options, lambda found: _check(found, target, options_of(options)))
        host, found = HostBuild(folder, target, options), divided.partition.parts
        parts, compiled = list[Part](), dict[int, _OnNpu]()
        for index, part in enumerate(found):
            if part.engine == "npu":
                stem = f"model.part{index}" if sum(p.engine == "npu" for p in found) > 1 else "model"
                compiled[index] = _compile(part, folder / f"{stem}{_TOSA}", target, options_of(options))
                parts.append(Part("npu", f"{stem}{_RAW}", part.inputs, part.outputs))
            else:
                parts.append(host.part(index, part))
        plan = _plan(lowered, target, parts)
        title = f"A model for {target} and its host."
        described = {index: made.described for index, made in compiled.items()}
        facts = _facts(lowered, divided.partition, target, [made.estimate for made in compiled.values()])
        facts |= host.facts(plan) | write_c(host, plan, divided, described, title)
        header = header_text(_HEADER, "model", list(described.values()))
        (folder / _HEADER).write_text(header, "utf8")
        write_plan(plan, folder)
        npu = [part.file for part in parts if part.engine == "npu"]
        files = (*npu, *(name.replace(_RAW, _TOSA) for name in npu), _HEADER, *dict.fromkeys(host.files), PLAN)
        estimates = tuple(made.estimate for made in compiled.values())
        refused, runners = tuple(divided.partition.refused.values()), _runners(divided.partition)
        left = refused if options_of(options).host == "onnxruntime" else divided.left
        return Build(npu[0], files, facts, left, runners, estimates, refused)

    def how(self, target: Target) -> Obtained:
        """Emulated: the TOSA reference model computes what the NPU does, bit for bit."""
        return "emulated"

    def load(self, folder: Path, target: Target, threads: int) -> Runnable:
        """Load a bundle: into the reference model, and the host's parts as they were built where this machine can."""
        plan, steps = load_bundle(folder, threads, lambda part: _reference(part, folder))
        return lambda feed: run_plan(plan, steps, [feed])[0]

    def run_all(self, folder: Path, target: Target, feeds: Sequence[Feed], threads: int) -> Sequence[Feed]:
        """Run many feeds; every part is started once."""
        plan, steps = load_bundle(folder, threads, lambda part: _reference(part, folder))
        return run_plan(plan, steps, feeds)

    def doctor(self, cache: Path) -> Sequence[Finding]:
        """Versions of what is needed, or how to get it."""
        return findings()


def _lowered(model: ir.Model, target: Target, options: BuildOptions) -> Lowered:
    try:
        return lower(model, options.binding, str(target))
    except UsageError as e:  # a size that is left open is nothing that an NPU can take
        raise BackendError(e.subject, e.fact, e.hint) from e


def _check(divided: Partition, target: Target, options: NpuOptions) -> None:
    """Fail where the NPU would do nothing, or not everything that it must."""
    refused = list(divided.refused.values())
    named = "; ".join(f"{u.operator} at {u.site!r}: {u.reason}" for u in refused[:_SHOWN])
    if len(refused) > _SHOWN:
        named += f"; and {len(refused) - _SHOWN} more"
    if not divided.taken:
        fact = f"finds nothing in the model that the NPU computes{f' ({named})' if named else ''}"
        raise BackendError(f"target {target}", fact, "add quant to --passes, with --calibration")
    if refused and options.require:
        fact = f"cannot take {len(refused)} operator{'s' if len(refused) > 1 else ''}: {named}"
        raise BackendError(f"target {target}", fact, "leave --require-npu out to let the host run them")


@dataclass(frozen=True)
class _OnNpu:
    estimate: Estimate
    described: NpuPart


def _compile(part: GraphPart, path: Path, target: Target, options: NpuOptions) -> _OnNpu:
    """Write a part as TOSA and let Vela compile it."""
    graph = emit(part.model, family_of(target))
    path.write_bytes(serialize(graph))
    made = compile_tosa(path, target.device, options, _sites(graph), subject=f"target {target}")
    inputs, outputs = part.model.graph.inputs, part.model.graph.outputs
    ends = ports(inputs, graph.inputs), ports(outputs, graph.outputs)
    return _OnNpu(made.estimate, NpuPart(made.raw, *ends, made.estimate.settings))


def _sites(graph: Graph) -> dict[str, tuple[str, ...]]:
    return {operator.output.name: (operator.site,) for operator in graph.operators if operator.site}


def _plan(lowered: Lowered, target: Target, parts: Sequence[Part]) -> Plan:
    graph, batch = lowered.model.graph, lowered.batch
    fed = [value for value in graph.inputs if value.name not in graph.initializers]
    ends = _specs(fed, batch.inputs), _specs(graph.outputs, batch.outputs)
    return Plan(str(target), *ends, tuple(parts), ANY if batch.size else f"fixed: {batch.reason}")


def _specs(values: Sequence[ir.Value], axes: Sequence[int | None]) -> tuple[TensorSpec, ...]:
    return tuple(
        TensorSpec(str(v.name), str(v.dtype.numpy()) if v.dtype is not None else "unknown", static_shape(v), axis)
        for v, axis in zip(values, axes or [None] * len(values), strict=True)
    )


def _reference(part: Part, folder: Path) -> NpuRun:
    """The TOSA reference model in the place of the NPU."""
    blob = (folder / part.file.replace(_RAW, _TOSA)).read_bytes()
    kinds = outputs_of(blob)
    return inputs_of(blob), lambda arrays: run_reference(blob, arrays, kinds)


def _runners(divided: Partition) -> tuple[Runner, ...]:
    found = Counter((node.op_type, part.engine) for part in divided.parts for node in part.model.graph)
    return tuple(Runner(operator, engine, nodes) for (operator, engine), nodes in sorted(found.items()))


def _facts(
    lowered: Lowered, divided: Partition, target: Target, estimates: Sequence[Estimate]
) -> dict[str, str | int | float | bool]:
    cost = Context(lowered.model, target).fact(COST)
    by_name = {name: node.macs or 0 for name, node in cost.nodes.items()}
    inside = sum(by_name.get(unit.name, 0) for unit in divided.taken)
    whole = sum(by_name.values())
    facts: dict[str, str | int | float | bool] = {
        "compiler": f"Vela {vela_version()}",
        "device": target.device,
        "parts on the NPU": sum(part.engine == "npu" for part in divided.parts),
        "operators on the NPU": sum(len(unit.nodes) for unit in divided.taken),
        "operators on the host": len(divided.refused),
        "macs on the NPU": f"{inside / whole:.1%}" if whole else "none anywhere",
        "cycles, estimated": sum(estimate.cycles for estimate in estimates),
    }
    if lowered.fixed:
        facts["fixed"] = ", ".join(lowered.fixed)
    return facts
