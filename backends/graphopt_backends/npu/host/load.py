"""Run a bundle for an NPU and its host on this machine: each part as it was built, as far as this machine can."""

from __future__ import annotations

import ctypes
import subprocess
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from graphopt.model_io import load_model
from graphopt.reference import Feed
from graphopt.targets import Target
from graphopt_backends._fold import static_shape
from graphopt_backends._plan import Part, Plan, TensorSpec, read_plan
from graphopt_backends._session import Step, in_process
from graphopt_backends.arm import TARGETS, ArmBackend
from graphopt_backends.npu.host.c_run import SOURCE, Compiled, c_compiler
from graphopt_backends.npu.host.c_source import RUN, function_of

__all__ = ["NpuRun", "host_runner", "host_stem", "load_bundle", "reference_file"]

Array = np.ndarray[Any, np.dtype[Any]]
Kind = tuple[str, tuple[int, ...]]
NpuRun = tuple[Sequence[Kind], Callable[[Sequence[Array]], Sequence[Array]]]
"""What stands for the NPU: element type and shape of each input of a part, and what computes the part."""


def host_stem(index: int) -> str:
    """What names begin with that belong to a part of the host."""
    return f"host{index}"


def reference_file(index: int) -> str:
    """The model of what a part of the host computes."""
    return f"model.{host_stem(index)}.onnx"


def host_runner(plan: Plan) -> str:
    """What runs the host's parts on this machine, in words; empty if there are none."""
    return "; ".join(dict.fromkeys(_part_runner(part) for part in plan.parts if part.engine != "npu"))


def _part_runner(part: Part) -> str:
    if part.engine == "c":
        compiler = c_compiler()
        return f"{SOURCE}, compiled by {_version(compiler)}" if compiler else "ONNX Runtime, for want of a C compiler"
    if part.engine == "kernels":
        how = ArmBackend().how(_arm_target(part))
        return "ONNX Runtime, for want of an emulator" if how == "compiled only" else f"libraries, {how}"
    return "ONNX Runtime"


def _version(compiler: str) -> str:
    done = subprocess.run([compiler, "--version"], capture_output=True, text=True, errors="replace", check=False)
    return (done.stdout.strip().splitlines() or [Path(compiler).name])[0]


def load_bundle(folder: Path, threads: int, npu: Callable[[Part], NpuRun]) -> tuple[Plan, list[Step]]:
    """Make the parts of a bundle ready.

    A model that is C and NPU alone runs as it ships: by its `model_run`. Without a C compiler on this machine, or an
    emulator of the host's CPU, ONNX Runtime computes what they would.

    Args:
        folder: The bundle.
        threads: For what can use them.
        npu: Makes a part ready that the NPU runs.

    Raises:
        BackendError: Something cannot be loaded.
    """
    plan = read_plan(folder)
    runs = [npu(part) for part in plan.parts if part.engine == "npu"]
    engines = {part.engine for part in plan.parts}
    compiler = c_compiler() if "c" in engines else None
    compiled = Compiled(folder, compiler, *_in_place(plan, runs)) if compiler else None
    if compiled and engines <= {"c", "npu"}:
        return plan, [_step(compiled, RUN, tuple(spec.name for spec in plan.inputs), plan.outputs)]
    numbers = iter(runs)
    steps: list[Step] = []
    for index, part in enumerate(plan.parts):
        if part.engine == "npu":
            steps.append(_npu_step(part, next(numbers)))
        elif part.engine == "c" and compiled:
            steps.append(_step(compiled, function_of(index), part.inputs, _outputs(folder, index)))
        else:
            steps.append(_host_step(part, index, folder, threads))
    return plan, steps


def _host_step(part: Part, index: int, folder: Path, threads: int) -> Step:
    if part.engine == "kernels" and ArmBackend().how(target := _arm_target(part)) != "compiled only":
        return ArmBackend().step(part, folder, target, threads)
    return in_process(Part("onnxruntime", reference_file(index), part.inputs, part.outputs), folder, threads)


def _arm_target(part: Part) -> Target:
    """The CPU that a library is for: its file is called `model.host0.CPU.so`, or is still to be linked elsewhere."""
    name = part.file.removesuffix(".so").rpartition(".")[2]
    elsewhere = next(target for target in TARGETS if target.device == "armv7")
    return next((target for target in TARGETS if target.device == name), elsewhere)


def _step(compiled: Compiled, function: str, inputs: Sequence[str], outputs: Sequence[TensorSpec]) -> Step:
    def step(feeds: Sequence[Mapping[str, Array]]) -> Sequence[Feed]:
        made = (compiled.run(function, [feed[name] for name in inputs], outputs) for feed in feeds)
        return [dict(zip((spec.name for spec in outputs), arrays, strict=True)) for arrays in made]

    return step


def _npu_step(part: Part, run: NpuRun) -> Step:
    def step(feeds: Sequence[Mapping[str, Array]]) -> Sequence[Feed]:
        made = (run[1]([feed[name] for name in part.inputs]) for feed in feeds)
        return [dict(zip(part.outputs, map(_as_onnx, arrays), strict=True)) for arrays in made]

    return step


def _as_onnx(array: Array) -> Array:
    """ONNX counts indices in 64 bits, the NPU in 32."""
    return array.astype(np.int64) if array.dtype == np.int32 else array


def _in_place(plan: Plan, runs: Sequence[NpuRun]) -> tuple[Callable[..., None], list[tuple[int, int]]]:
    """What C calls for the NPU, and how many inputs and outputs each part has."""

    def npu(part: int, sources: Sequence[int], results: Sequence[int]) -> None:
        kinds, run = runs[part]
        pairs = zip(sources, kinds, strict=True)
        arrays = [np.frombuffer(_memory(at, kind), kind[0]).reshape(kind[1]).copy() for at, kind in pairs]
        for at, array in zip(results, run(arrays), strict=True):
            ctypes.memmove(at, np.ascontiguousarray(array).ctypes.data, array.nbytes)

    parts = [part for part in plan.parts if part.engine == "npu"]
    return npu, [(len(part.inputs), len(part.outputs)) for part in parts]


def _memory(address: int, kind: Kind) -> Any:
    size = int(np.prod(kind[1], dtype=np.int64)) * np.dtype(kind[0]).itemsize
    return (ctypes.c_char * size).from_address(address)


def _outputs(folder: Path, index: int) -> tuple[TensorSpec, ...]:
    """What a part of the host makes."""
    values = load_model(folder / reference_file(index)).graph.outputs
    return tuple(
        TensorSpec(str(value.name), str(value.dtype.numpy()), static_shape(value))
        for value in values
        if value.dtype is not None
    )
