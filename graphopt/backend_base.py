"""The contract between the host and a backend, which turns a model into what a target runs."""

from __future__ import annotations

import abc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import onnx_ir as ir

from graphopt.model_io import ShapeBinding
from graphopt.reference import Feed
from graphopt.targets import Target

__all__ = [
    "Backend", "Build", "BuildOptions", "Estimate", "EstimatedStep", "Finding", "Obtained", "Profile", "Runnable",
    "Runner", "StepTime", "Unsupported",
]  # fmt: skip

Obtained = Literal["executed", "emulated", "compiled only", "estimated"]
"""How a figure was obtained. Emulated time is never a speed."""

Runnable = Callable[[Feed], Feed]
"""A compiled model: inputs by name in, outputs by name out."""


@dataclass(frozen=True)
class Unsupported:
    """An operator that a backend cannot take."""

    site: str
    operator: str
    reason: str


@dataclass(frozen=True)
class Finding:
    """One line of `graphopt doctor`.

    Attributes:
        subject: What was looked for: a compiler, an emulator, a runtime.
        state: What was found: a version, a path, or that it is missing.
        ok: False if something cannot be done without it.
        hint: How to get it.
    """

    subject: str
    state: str
    ok: bool = True
    hint: str = ""


@dataclass(frozen=True)
class StepTime:
    """What one step of a compiled model took.

    Attributes:
        runner: What ran it: `kernels`, `tvm` for TVM's own lowering, or `onnxruntime`.
        kernel: Name of the kernel, or of the file of a part that has no steps of its own.
        sites: Names of the nodes that it computes.
        seconds: Of one run.
        operations: Multiplications and additions, or elements where it does none; 0 if unknown.
        arithmetic: `float` or `integer` where it multiplies and adds most of the time; else empty.
    """

    runner: str
    kernel: str
    sites: str
    seconds: float
    operations: int = 0
    arithmetic: str = ""


@dataclass(frozen=True)
class Profile:
    """Where the time of a compiled model goes.

    Attributes:
        steps: In order.
        peaks: Operations a second that one core can do in its registers, measured, by arithmetic.
    """

    steps: tuple[StepTime, ...] = ()
    peaks: Mapping[str, float] = field(default_factory=dict[str, float])


@dataclass(frozen=True)
class BuildOptions:
    """What the user asked of a build.

    Attributes:
        binding: Sizes for dynamic dimensions.
        cc: C++ compiler that links for the target (`--cc`, `$GRAPHOPT_CC`); None: the first that is found.
        fallback: `ort`: ONNX Runtime runs what the backend cannot; None: that is an error.
        emit: Further outputs: `source`, `asm`.
        cache: The user's cache folder, where fetched runtimes lie.
        threads: Threads that kernels are made for; 0: as many as the target has cores.
        target: Options of the target, an instance of `Backend.options`; None: all as by default.
    """

    binding: ShapeBinding = field(default_factory=ShapeBinding)
    cc: str | None = None
    fallback: Literal["ort"] | None = None
    emit: tuple[str, ...] = ()
    cache: Path = Path()
    threads: int = 0
    target: Any = None


@dataclass(frozen=True)
class Runner:
    """What runs an operator of a compiled model.

    Attributes:
        operator: Its type, as it stands in the graph that was compiled: constants folded, others rewritten.
        runner: `kernels`, `tvm` for TVM's own lowering, `onnxruntime`, `npu`, or `c` for C source.
        nodes: How many of them.
    """

    operator: str
    runner: str
    nodes: int


@dataclass(frozen=True)
class EstimatedStep:
    """What one step of a compiled model would take, by a model of the hardware.

    Attributes:
        name: What the compiler calls it.
        operator: Its kind, as the compiler calls it.
        sites: Names of the nodes that it computes, as far as they are known.
        cycles: Until it is done.
        busy: Cycles for which it keeps arithmetic and memories busy, by name; they overlap, and the longest decides.
        macs: Multiply-accumulates.
        utilisation: Share of the multipliers that work in these cycles, from 0 to 1.
        memory_bytes: Fast memory in use while it runs.
    """

    name: str
    operator: str
    sites: tuple[str, ...] = ()
    cycles: int = 0
    busy: Mapping[str, int] = field(default_factory=dict[str, int])
    macs: int = 0
    utilisation: float = 0.0
    memory_bytes: int = 0


@dataclass(frozen=True)
class Estimate:
    """What a compiled part would take, by a model of the hardware: nothing was run.

    Attributes:
        part: File of the part, relative to the bundle.
        by: Who says so, with the version.
        settings: What it holds for: device, clock, memories.
        cycles: Of one run.
        seconds: Of one run.
        busy: Cycles for which it keeps arithmetic and memories busy, by name; they overlap.
        macs: Multiply-accumulates of one run.
        utilisation: Share of the multipliers that work, from 0 to 1.
        memory: Bytes in use by memory.
        traffic: Bytes that one run reads and writes by memory.
        weight_bytes: Weights as the model holds them.
        encoded_bytes: Weights as the device reads them.
        steps: In order.
    """

    part: str
    by: str
    settings: str
    cycles: int
    seconds: float
    busy: Mapping[str, int] = field(default_factory=dict[str, int])
    macs: int = 0
    utilisation: float = 0.0
    memory: Mapping[str, int] = field(default_factory=dict[str, int])
    traffic: Mapping[str, int] = field(default_factory=dict[str, int])
    weight_bytes: int = 0
    encoded_bytes: int = 0
    steps: tuple[EstimatedStep, ...] = ()


@dataclass(frozen=True)
class Build:
    """What a backend made.

    Attributes:
        kernel: The main file, relative to the bundle; None where the ONNX model itself ships.
        files: Everything written, relative to the bundle.
        facts: Figures and statements for the report, the same on every run: engine, ISA, compiler, sizes, parts.
        fallbacks: Operators that ONNX Runtime runs.
        runners: What runs each operator, sorted.
        estimates: What parts would take on the target, where their compiler says so.
        declined: Operators that an accelerator leaves to what runs beside it.
    """

    kernel: str | None = None
    files: tuple[str, ...] = ()
    facts: Mapping[str, str | int | float | bool] = field(default_factory=dict[str, "str | int | float | bool"])
    fallbacks: tuple[Unsupported, ...] = ()
    runners: tuple[Runner, ...] = ()
    estimates: tuple[Estimate, ...] = ()
    declined: tuple[Unsupported, ...] = ()


class Backend(abc.ABC):
    """Base of all backends; stateless, one instance serves every call.

    Attributes:
        name: How targets name it.
        options: What can be asked of a build for its targets, as in `NAME:DEVICE{option=value}`: a frozen dataclass
            whose fields are declared with `graphopt.options.opt`; None: nothing.
        libraries: Distributions whose versions a build hangs on, beside those that graphopt itself requires.
    """

    name: ClassVar[str]
    options: ClassVar[type[Any] | None] = None
    libraries: ClassVar[tuple[str, ...]] = ()

    def reads(self, options: Any) -> Sequence[Path]:
        """Name the files that options of a target tell a build to read; the result then hangs on what they hold."""
        return ()

    def explain(self, target: Target) -> Sequence[str]:
        """Lines that `graphopt explain` adds for a target, such as a table of operators."""
        return ()

    def ready(self, target: Target, options: BuildOptions) -> None:  # noqa: B027
        """Check that this machine can build for the target, before any other work is done.

        Raises:
            BackendError: A tool or runtime is missing; the hint says how to get it.
        """

    def unsupported(self, model: ir.Model, target: Target, options: BuildOptions) -> Sequence[Unsupported]:
        """Name the operators that this backend cannot take, as far as it can tell without the work of a build."""
        return ()

    @abc.abstractmethod
    def build(self, model: ir.Model, target: Target, folder: Path, options: BuildOptions) -> Build:
        """Compile `model` into `folder`, which exists and already holds `model.onnx`. Never touches the network.

        Raises:
            BackendError: It cannot take some operators, all of them named before anything is written, and
                `options.fallback` is None; or a tool or runtime is missing on this machine.
            UsageError: A dynamic dimension must be fixed first; the message names it and the flag.
        """

    @abc.abstractmethod
    def how(self, target: Target) -> Obtained:
        """How results for this target are obtained on this machine; `compiled only` if they cannot be run."""

    @abc.abstractmethod
    def load(self, folder: Path, target: Target, threads: int) -> Runnable:
        """Load what `build` made, from a finished bundle.

        Raises:
            BackendError: This machine cannot run it.
        """

    def run_all(self, folder: Path, target: Target, feeds: Sequence[Feed], threads: int) -> Sequence[Feed]:
        """Run many feeds; a backend whose start is dear (an emulator) overrides it to start once."""
        run = self.load(folder, target, threads)
        return [run(feed) for feed in feeds]

    def profile(self, folder: Path, target: Target, feed: Feed, threads: int, runs: int) -> Profile:
        """Time the steps of a bundle that this machine can execute; nothing where a backend cannot tell."""
        return Profile()

    def doctor(self, cache: Path) -> Sequence[Finding]:
        """Say what this machine can build and run, and how to get what is missing."""
        return ()

    def fetch(self, target: Target, cache: Path) -> Sequence[Path]:
        """Download the target's runtime into the cache; the only call that may use the network."""
        return ()
