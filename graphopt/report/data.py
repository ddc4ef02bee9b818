"""What a run found out, as plain values: the content of `report.json`.

Everything here follows from the input alone: no times, dates or memory figures, so that the same input gives the same
bytes. Every figure says how it was obtained: `executed`, `emulated`, `compiled only` or `estimated`; sizes, operators,
parameters and multiply-accumulates are counted.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from graphopt.backend_base import Estimate, Obtained, Runner, Unsupported
from graphopt.fidelity import OutputFidelity
from graphopt.pass_base import Change, Scalar

__all__ = [
    "SCHEMA",
    "Accuracy",
    "Agreement",
    "BackendReport",
    "Data",
    "Fidelity",
    "FileEntry",
    "Inputs",
    "LayerCost",
    "LayerNote",
    "LayerRow",
    "Limit",
    "ModelSummary",
    "OutputFidelity",
    "Port",
    "Report",
    "StepReport",
    "Totals",
]

SCHEMA = 1
"""Version of `report.json`; raised when a field changes its meaning or goes away."""

Inputs = Literal["evaluation data", "calibration data", "random inputs"]
"""What a model was run on when it was compared."""


@dataclass(frozen=True)
class Port:
    """An input or output of the model; `shape` as text, such as `batch x 3 x 32 x 32`."""

    name: str
    dtype: str
    shape: str


@dataclass(frozen=True)
class Totals:
    """The model in four numbers, counted.

    Attributes:
        weight_bytes: Bytes of all constants; one used twice counts once.
        params: Elements of all constants.
        macs: Multiply-accumulates of one run as far as shapes are known; None if none is.
        nodes: Nodes, subgraphs included.
    """

    weight_bytes: int
    params: int
    macs: int | None
    nodes: int


@dataclass(frozen=True)
class ModelSummary:
    """A model file, counted.

    Attributes:
        file_bytes: Bytes of the ONNX file and of the weight files beside it.
        totals: Weights, parameters, MACs, nodes.
        macs_unknown: Linear nodes whose MACs are unknown because a shape is.
        operators: How often each operator occurs.
        opsets: Opset version by domain; the standard domain is `ai.onnx`.
        inputs: What a caller feeds.
        outputs: What the model returns.
    """

    file_bytes: int
    totals: Totals
    macs_unknown: tuple[str, ...] = ()
    operators: Mapping[str, int] = field(default_factory=dict[str, int])
    opsets: Mapping[str, int] = field(default_factory=dict[str, int])
    inputs: tuple[Port, ...] = ()
    outputs: tuple[Port, ...] = ()


@dataclass(frozen=True)
class StepReport:
    """One step of the pipeline.

    Attributes:
        step: The step as resolved, such as `prune{ratio=0.3}`.
        name: Name of the pass.
        modified: The model changed.
        lossy: The pass may change the outputs.
        changes: One entry for every site the pass looked at.
        metrics: Figures of the pass.
        after: The model after the step.
    """

    step: str
    name: str
    modified: bool
    lossy: bool
    changes: tuple[Change, ...] = ()
    metrics: Mapping[str, Scalar] = field(default_factory=dict[str, Scalar])
    after: Totals | None = None

    @property
    def done(self) -> tuple[Change, ...]:
        """Sites that were changed."""
        return tuple(change for change in self.changes if change.done)

    @property
    def skipped(self) -> tuple[Change, ...]:
        """What was not done, each with its reason; a site may have been changed in another way."""
        return tuple(change for change in self.changes if not change.done)

    @property
    def left_alone(self) -> tuple[Change, ...]:
        """What was not done at sites to which nothing else was done."""
        changed = {change.site for change in self.done}
        return tuple(change for change in self.skipped if change.site not in changed)


@dataclass(frozen=True)
class Fidelity:
    """The result against the original, both in ONNX Runtime.

    Attributes:
        inputs: What both were run on.
        samples: Number of samples.
        outputs: Distance by output.
        how: How the figures were obtained.
        not_run: Why nothing was compared, such as `not checked: needs 12 GB`; None if it was.
    """

    inputs: Inputs
    samples: int
    outputs: tuple[OutputFidelity, ...] = ()
    how: Obtained = "executed"
    not_run: str | None = None


@dataclass(frozen=True)
class Accuracy:
    """A metric on the user's labelled data; `drop` in points where higher is better, else relative percent."""

    metric: str
    before: float
    after: float
    drop: float
    samples: int
    higher_is_better: bool = True
    how: Obtained = "executed"


@dataclass(frozen=True)
class Limit:
    """A limit the user set.

    Attributes:
        name: The option, such as `--max-drop`.
        wanted: The limit.
        got: What was reached; None where it is not a figure of the model (a time).
        met: Whether the limit holds.
        unit: Unit of both: `points`, `%`, `dB`, `x`.
        bound: Which side of the limit is good.
    """

    name: str
    wanted: float
    got: float | None
    met: bool
    unit: str = ""
    bound: Literal["at most", "at least"] = "at most"


@dataclass(frozen=True)
class Agreement:
    """What the target runs against `model.onnx` in ONNX Runtime.

    Attributes:
        inputs: What both were run on.
        samples: Number of samples.
        max_abs: Largest absolute difference over all outputs.
        tolerance: The difference allowed.
        ok: `max_abs` is within `tolerance`.
        top1_agreement: Percent of rows with the same greatest element; None where outputs hold no classes.
    """

    inputs: Inputs
    samples: int
    max_abs: float
    tolerance: float
    ok: bool
    top1_agreement: float | None = None


@dataclass(frozen=True)
class BackendReport:
    """What a backend made for the target and how it was checked.

    Attributes:
        backend: Name of the backend.
        target: Name and device.
        how: How its results were obtained.
        kernel: The file the target runs, relative to the bundle; None where the ONNX model itself ships.
        kernel_bytes: Its size.
        files: Everything the backend wrote, relative to the bundle.
        facts: Statements of the backend, the same on every run.
        fallbacks: Operators that ONNX Runtime runs.
        agreement: Distance from the bundle's `model.onnx`; None if it was not run.
        not_run: Why it was not run, such as `compiled only: qemu-aarch64 not found`.
        runners: What runs each operator.
        estimates: What parts would take on the target, where their compiler says so.
        declined: Operators that an accelerator leaves to what runs beside it.
    """

    backend: str
    target: str
    how: Obtained
    kernel: str | None = None
    kernel_bytes: int | None = None
    files: tuple[str, ...] = ()
    facts: Mapping[str, Scalar] = field(default_factory=dict[str, Scalar])
    fallbacks: tuple[Unsupported, ...] = ()
    agreement: Agreement | None = None
    not_run: str | None = None
    runners: tuple[Runner, ...] = ()
    estimates: tuple[Estimate, ...] = ()
    declined: tuple[Unsupported, ...] = ()


@dataclass(frozen=True)
class LayerCost:
    """Cost of one layer, counted; `macs` is None where a shape is unknown."""

    macs: int | None
    params: int
    weight_bytes: int


@dataclass(frozen=True)
class LayerNote:
    """What one step did to a layer, or why it left it alone.

    Attributes:
        step: The step as resolved.
        action: What it says.
        done: The step changed something.
        replaced: The step put something else in the layer's place.
    """

    step: str
    action: str
    done: bool
    replaced: bool = False


@dataclass(frozen=True)
class LayerRow:
    """A layer with weights: what it cost, what it costs, and what happened to it.

    Attributes:
        name: Name of its node in the original.
        operator: Operator type in the original.
        before: Cost in the original.
        after: Cost in the result; None if the layer is gone (merged into another, or removed).
        notes: What every step that looked at it says.
    """

    name: str
    operator: str
    before: LayerCost
    after: LayerCost | None
    notes: tuple[LayerNote, ...] = ()

    @property
    def changed(self) -> bool:
        """Some step changed it."""
        return any(note.done for note in self.notes)


@dataclass(frozen=True)
class FileEntry:
    """A file of the bundle."""

    name: str
    bytes: int


@dataclass(frozen=True)
class Data:
    """Data a run used.

    Attributes:
        role: `calibration` or `evaluation`.
        origin: What the user wrote.
        digest: sha256; None if unknown.
        samples: Number of samples.
    """

    role: str
    origin: str
    digest: str | None
    samples: int | None = None


@dataclass(frozen=True)
class Report:
    """Everything a run found out that follows from its input alone.

    Attributes:
        version: Version of graphopt.
        model: Name of the input model's file.
        digest: sha256 of the input model with its weights.
        target: Name and device, as resolved, with its options; parses back.
        pipeline: The pipeline as resolved; parses back.
        seed: Seed of all random streams.
        before: The input model.
        after: The result.
        steps: The pipeline's steps in order.
        fidelity: The result against the original.
        accuracy: The user's metric; None without labelled data.
        limits: Limits the user set.
        verdict: `ok`, or what is wrong in one line.
        backend: What was made for the target; None where nothing was compiled.
        layers: Layers with weights, in the order of the original.
        files: Files of the bundle, without the reports and the manifest.
        notes: Warnings, each one sentence without a full stop.
        command: Command that makes this bundle again; free of what differs between runs.
        data: Data that was used.
        versions: Versions of what took part: onnxruntime, plugins.
        shapes: Sizes fixed with `--shape` and `--dim`, as text.
        schema: Version of this format.
    """

    version: str
    model: str
    digest: str
    target: str
    pipeline: str
    seed: int
    before: ModelSummary
    after: ModelSummary
    steps: tuple[StepReport, ...]
    fidelity: Fidelity
    accuracy: Accuracy | None = None
    limits: tuple[Limit, ...] = ()
    verdict: str = "ok"
    backend: BackendReport | None = None
    layers: tuple[LayerRow, ...] = ()
    files: tuple[FileEntry, ...] = ()
    notes: tuple[str, ...] = ()
    command: str = ""
    data: tuple[Data, ...] = ()
    versions: Mapping[str, str] = field(default_factory=dict[str, str])
    shapes: Mapping[str, str] = field(default_factory=dict[str, str])
    schema: int = SCHEMA

    @property
    def ok(self) -> bool:
        """Every limit is met and every check that ran was passed."""
        return self.verdict == "ok"
