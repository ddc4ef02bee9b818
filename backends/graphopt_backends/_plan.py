"""What a bundle runs, in which order, and how its tensors are called: `model.plan.json`."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from graphopt.errors import BackendError

__all__ = ["ANY", "PLAN", "Engine", "Part", "Plan", "TensorSpec", "read_plan", "write_plan"]

PLAN = "model.plan.json"
ANY = "any"
"""The batch of a plan in which samples stay apart."""

_FORMAT = 2


Engine = Literal["kernels", "tvm", "onnxruntime", "npu", "c"]
"""What runs a part: kernels written by hand, TVM's own lowering, ONNX Runtime, an NPU, or C source."""


@dataclass(frozen=True)
class TensorSpec:
    """An input or output.

    Attributes:
        name: Its name.
        dtype: NumPy's name of its element type.
        shape: Its shape for the compiled batch; None where it depends on the data.
        batch_axis: Axis along which samples lie; None: it is the same for all samples, or the batch is fixed.
    """

    name: str
    dtype: str
    shape: tuple[int, ...] | None
    batch_axis: int | None = None


@dataclass(frozen=True)
class Part:
    """One step: a file, the engine that runs it, and its tensors in the order in which it takes and returns them.

    Attributes:
        engine: `kernels` for a library that runs by itself, `tvm` for one that needs TVM's runtime, `onnxruntime` for a
            model, `npu` for what Vela made, `c` for source.
        file: The library, model or source.
        inputs: Names of the tensors it takes.
        outputs: Names of the tensors it makes.
        weights: File of weights of a library, if it has one.
    """

    engine: Engine
    file: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    weights: str | None = None


@dataclass(frozen=True)
class Plan:
    """All parts of a compiled model, in order.

    Attributes:
        target: What they were compiled for.
        inputs: What the model takes.
        outputs: What it gives.
        parts: The parts.
        batch: `any` where samples stay apart, so that batches are run one compiled batch after the other; else `fixed`,
            and why.
    """

    target: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    parts: tuple[Part, ...]
    batch: str = "fixed"


def write_plan(plan: Plan, folder: Path) -> None:
    """Write the plan into a bundle."""
    text = json.dumps({"format": _FORMAT, **asdict(plan)}, indent=2, ensure_ascii=False)
    (folder / PLAN).write_text(text + "\n", "utf8")


def read_plan(folder: Path) -> Plan:
    """Read the plan of a bundle.

    Raises:
        BackendError: There is none, or a newer graphopt wrote it.
    """
    path = folder / PLAN
    try:
        data: dict[str, Any] = json.loads(path.read_text("utf8"))
    except (OSError, ValueError) as e:
        raise BackendError(str(path), "missing or damaged", "compile the model again") from e
    if data.get("format") != _FORMAT:
        raise BackendError(str(path), f"has format {data.get('format')!r}, not {_FORMAT}", "compile the model again")
    parts = tuple(
        Part(p["engine"], p["file"], tuple(p["inputs"]), tuple(p["outputs"]), p.get("weights")) for p in data["parts"]
    )
    return Plan(data["target"], _specs(data["inputs"]), _specs(data["outputs"]), parts, data.get("batch", "fixed"))


def _specs(data: list[dict[str, Any]]) -> tuple[TensorSpec, ...]:
    return tuple(
        TensorSpec(d["name"], d["dtype"], None if d["shape"] is None else tuple(d["shape"]), d.get("batch_axis"))
        for d in data
    )
