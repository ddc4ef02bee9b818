"""A target and a reader: the Acme Cam 1, and the frames it recorded.

A recording is raw: channels, height and width as little-endian uint16, then frames of uint8. It is named
`acme:PATH#INPUT`, where INPUT is the model's input that takes frames with values from 0 to 1.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from graphopt.calibration import Dataset
from graphopt.errors import DataError
from graphopt.markers import hookimpl
from graphopt.reference import Feed
from graphopt.targets import IntegerRules, Target

CAM1 = Target(
    name="acme",
    device="cam1",
    summary="Acme Cam 1: ONNX Runtime on a DSP with symmetric INT8",
    default=True,
    round_to=8,
    integers=IntegerRules(activation="int8", symmetric_activations=True),
)
_HEADER = 6


@hookimpl
def graphopt_targets() -> list[Target]:
    """Tell graphopt about the camera."""
    return [CAM1]


@hookimpl
def graphopt_default_pipeline(target: Target) -> str | None:
    """The camera runs INT8 only."""
    return "fold,acme-clip-weights,quant" if target == CAM1 else None


@hookimpl
def graphopt_calibration(uri: str) -> Dataset | None:
    """Open a recording."""
    if not uri.startswith("acme:"):
        return None
    path, _, name = uri.removeprefix("acme:").partition("#")
    try:
        content = Path(path).read_bytes()
    except OSError as e:
        raise DataError(uri, f"cannot be read: {e.strerror}") from e
    shape = tuple(int(size) for size in np.frombuffer(content[:_HEADER], "<u2"))
    if len(content) < _HEADER or not all(shape) or (len(content) - _HEADER) % int(np.prod(shape)):
        raise DataError(uri, "not a recording, or cut short", "record it again")
    frames = np.frombuffer(content, np.uint8, offset=_HEADER).reshape(-1, *shape)

    def read() -> Iterator[Feed]:
        return ({name: frame[None].astype(np.float32) / 255} for frame in frames)

    return Dataset(uri, hashlib.sha256(content).hexdigest(), read, stacked=True)
