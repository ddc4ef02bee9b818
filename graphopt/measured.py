"""What a clock said: timings of models on this machine, kept in `measured/`, outside the digests.

Only what was executed here may carry a time. An emulator's time says nothing about the device, so a row that was
emulated, or only compiled, has none.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from graphopt.backend_base import Obtained
from graphopt.errors import UsageError
from graphopt.records import from_text, to_text

__all__ = ["Breakdown", "KernelTime", "Machine", "Measured", "Measurement", "Region", "Side", "Times"]

Side = Literal["original", "result"]
"""Which model a row is about; what stands alone is `original`."""


@dataclass(frozen=True)
class Times:
    """Latency of one run, in milliseconds, over all rounds.

    Attributes:
        median: Median of the rounds' medians.
        minimum: Fastest run.
        low: First quartile of all runs.
        high: Third quartile of all runs.
        maximum: Slowest run.
    """

    median: float
    minimum: float
    low: float
    high: float
    maximum: float


@dataclass(frozen=True)
class Measurement:
    """One subject on one engine.

    Attributes:
        engine: `onnxruntime`, or the name of a backend.
        subject: Name of the file or bundle.
        side: Original or result.
        how: How the row was obtained.
        threads: Threads the engine was given.
        samples: Different feeds that were run.
        warmup: Runs before the clock started, each round.
        repeats: Timed runs of a round; fewer than asked for where a round would have taken too long.
        rounds: Rounds, interleaved with those of the other rows.
        times: Latency; None unless executed.
        peak_memory_mb: Largest resident memory of its process, libraries included; None unless executed.
        base_memory_mb: What that process held before it loaded the model.
        file_bytes: Bytes of what is deployed.
        agrees: Largest absolute difference from the bundle's `model.onnx` in ONNX Runtime; None where not compared.
        not_run: Why there is no result.

    Raises:
        ValueError: A row that was not executed carries a time or a memory figure.
    """

    engine: str
    subject: str
    side: Side
    how: Obtained
    threads: int
    file_bytes: int
    samples: int = 1
    warmup: int = 0
    repeats: int = 0
    rounds: int = 0
    times: Times | None = None
    peak_memory_mb: float | None = None
    base_memory_mb: float | None = None
    agrees: float | None = None
    not_run: str | None = None

    def __post_init__(self) -> None:
        clocked = (self.times, self.peak_memory_mb, self.base_memory_mb)
        if self.how != "executed" and any(figure is not None for figure in clocked):
            raise ValueError(f"{self.engine} on {self.subject}: {self.how}, and such a row carries no time or memory")


@dataclass(frozen=True)
class Machine:
    """Where the times were taken.

    Attributes:
        cpu: Name of the processor.
        cores: Cores this process may use.
        system: Operating system and architecture.
        memory_mb: Memory of the machine.
        versions: Versions of Python and of the engines.
        date: When, as `2026-01-31 12:00 UTC`.
    """

    cpu: str
    cores: int
    system: str
    memory_mb: int
    versions: Mapping[str, str] = field(default_factory=dict[str, str])
    date: str = ""


@dataclass(frozen=True)
class Region:
    """A part of the graph that begins and ends at the same values in both models, timed in ONNX Runtime.

    Attributes:
        layers: Nodes of the original in it, in the order of the graph; those that hold weights, if any do.
        before: Milliseconds in the original.
        after: Milliseconds in the result.
    """

    layers: tuple[str, ...]
    before: float
    after: float


@dataclass(frozen=True)
class KernelTime:
    """A kernel of a compiled model, over all of a run's calls of it.

    Attributes:
        runner: `kernels`, `tvm` for TVM's own lowering, or `onnxruntime`.
        kernel: Its name, or that of the file of a part.
        sites: Names of the nodes that the first call computes.
        calls: Calls in a run.
        time: Milliseconds of a run.
        share: Of the time of all kernels.
        rate: Billions of operations a second; None where it does not multiply and add most of the time.
        of_peak: That rate as a share of what the threads' cores can do in their registers, measured in the same run.
    """

    runner: str
    kernel: str
    sites: str
    calls: int
    time: float
    share: float
    rate: float | None = None
    of_peak: float | None = None


@dataclass(frozen=True)
class Breakdown:
    """Where the time of a compiled model goes.

    Attributes:
        subject: Name of the bundle.
        engine: Name of the backend.
        threads: Threads that it had.
        kernels: The dearest first.
    """

    subject: str
    engine: str
    threads: int
    kernels: tuple[KernelTime, ...]


@dataclass(frozen=True)
class Measured:
    """All rows of one benchmark, the regions that became slower, and the machine they were taken on.

    Attributes:
        rows: What was measured.
        machine: Where.
        slower_regions: Parts of the result that are slower than in the original.
        breakdowns: Kernels of what was compiled, with the first number of threads.
    """

    rows: tuple[Measurement, ...]
    machine: Machine
    slower_regions: tuple[Region, ...] = ()
    breakdowns: tuple[Breakdown, ...] = ()
    schema: int = 1

    def find(self, side: Side, engine: str = "onnxruntime", threads: int | None = None) -> Measurement | None:
        """The first timed row of an engine, None if there is none."""
        for row in self.rows:
            if row.side == side and row.engine == engine and row.times and threads in (None, row.threads):
                return row
        return None

    def advice(self) -> str | None:
        """Which engine to ship the result with, on this machine; None unless two engines ran it alike."""
        said: list[str] = []
        for threads in sorted({row.threads for row in self.rows}):
            rows = [r for r in self.rows if r.threads == threads and r.side == "result" and r.times]
            plain = next((r for r in rows if r.engine == "onnxruntime"), None)
            own = next((r for r in rows if r.engine != "onnxruntime"), None)
            if plain is None or own is None or plain.times is None or own.times is None:
                continue
            ratio = plain.times.median / own.times.median
            best = "the compiled library" if ratio >= 1 else "model.onnx in ONNX Runtime"
            other = "ONNX Runtime" if ratio >= 1 else "the compiled library"
            with_threads = f"with {threads} thread{'s' if threads > 1 else ''}"
            said.append(f"{with_threads} ship {best}: {max(ratio, 1 / ratio):.2f}x as fast as {other}")
        return "; ".join(said) or None

    def to_json(self) -> str:
        """Write as JSON."""
        return to_text(self)

    @classmethod
    def from_json(cls, text: str) -> Measured:
        """Read what `to_json` wrote.

        Raises:
            UsageError: The text is no benchmark.
        """
        try:
            return from_text(cls, text)
        except ValueError as e:
            raise UsageError("bench.json", f"not a benchmark: {e}", "measure again with graphopt bench") from e
