"""What tests of a host's parts share: a part written as C, and the compiler that judges it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import onnx_ir as ir
import pytest

from graphopt.backend_base import Backend, BuildOptions
from graphopt.model_io import ShapeBinding
from graphopt.targets import Target
from graphopt_backends._library import signatures
from graphopt_backends._lower import lower
from graphopt_backends._parts import cut
from graphopt_backends._plan import Plan, TensorSpec
from graphopt_backends.npu.host.c_lower import lower_part
from graphopt_backends.npu.host.c_run import c_compiler
from graphopt_backends.npu.host.parts import Divided, HostBuild, write_c
from graphopt_backends.npu.partition import Partition

__all__ = ["CC", "STRICT", "Find", "needs_compiler", "no_npu", "strict_compiler", "written"]

Find = Callable[[str], tuple[Backend, Target]]
STRICT = "-Wall -Wextra -pedantic -Wcast-align -Wvla -Werror"
CC = c_compiler()
needs_compiler = pytest.mark.skipif(CC is None, reason="there is no C compiler")


def strict_compiler(folder: Path) -> str:
    """A compiler that takes every warning for an error."""
    script = folder / "cc"
    script.write_text(f'#!/bin/sh\nexec {CC} {STRICT} "$@"\n')
    script.chmod(0o755)
    return str(script)


def written(model: ir.Model, target: Target, folder: Path) -> Plan:
    """Write a model that is the host's alone, in C."""
    lowered = lower(model, ShapeBinding(), "npu").model
    build = HostBuild(folder, target, BuildOptions())
    (part,) = cut(lowered, {node.name or "": "c" for node in lowered.graph})
    divided = Divided(Partition((part,), (), {}), {0: lower_part(part.model, "host0")}, ())
    inputs, outputs = _specs(lowered.graph.inputs), _specs(lowered.graph.outputs)
    plan = Plan(str(target), inputs, outputs, (build.part(0, part),))
    write_c(build, plan, divided, {}, "A test.")
    return plan


def _specs(values: Sequence[ir.Value]) -> tuple[TensorSpec, ...]:
    return tuple(TensorSpec(known.name, known.dtype, known.shape) for known in signatures(values))


def no_npu(part: int, sources: Sequence[int], results: Sequence[int]) -> None:
    """Stands for the NPU where there is nothing for one."""
    raise AssertionError(f"part {part} was asked for")
