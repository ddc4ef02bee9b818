"""ONNX Runtime, the reference for every number that graphopt reports."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx_ir as ir

from graphopt.errors import UsageError
from graphopt.model_io import EMBED_LIMIT, InputSpec, ShapeBinding, model_bytes, save_model, weight_bytes
from graphopt.session import Feed, Session

__all__ = ["Feed", "Reference", "random_feed"]


class Reference(Session):
    """A model ready to run in ONNX Runtime.

    Args:
        model: A model in memory, or the path of one.
        threads: Threads inside one operator.
        optimize: False: every node runs as written, without ONNX Runtime's fusions.
        extensions: Libraries with custom operators (`--ort-extension`).

    Raises:
        ModelError: ONNX Runtime cannot load the model.
    """

    def __init__(
        self,
        model: ir.Model | Path,
        *,
        threads: int = 1,
        optimize: bool = True,
        extensions: Sequence[str] = (),
    ) -> None:
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        source: str | bytes
        if isinstance(model, Path):
            source = str(model)
        elif weight_bytes(model) <= EMBED_LIMIT:
            source = model_bytes(model)
        else:
            self._folder = tempfile.TemporaryDirectory(prefix="graphopt-")
            source = str(save_model(model, Path(self._folder.name) / "model.onnx")[0])
        name = str(model) if isinstance(model, Path) else model.graph.name or "model"
        super().__init__(source, name, threads=threads, optimize=optimize, extensions=extensions)


def random_feed(specs: Sequence[InputSpec], binding: ShapeBinding, rng: np.random.Generator) -> Feed:
    """Make one feed of random values: standard normal floats, and 0 or 1 for everything else."""
    feed: Feed = {}
    for spec in specs:
        shape = spec.concrete(binding)
        if spec.dtype.is_floating_point():
            feed[spec.name] = rng.standard_normal(shape).astype(spec.dtype.numpy())
        elif spec.dtype == ir.DataType.STRING:
            raise UsageError(f"input {spec.name!r}", "holds text, which has no random values", "give --calibration")
        else:
            feed[spec.name] = rng.integers(0, 2, shape).astype(spec.dtype.numpy())
    return feed
