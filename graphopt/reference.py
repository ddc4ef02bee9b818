"""ONNX Runtime, the reference for every number that graphopt reports.

Sessions run on the CPU with a fixed number of threads, so that results repeat on one machine.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from graphopt.errors import ModelError, UsageError
from graphopt.model_io import EMBED_LIMIT, InputSpec, ShapeBinding, model_bytes, save_model, weight_bytes

__all__ = ["Feed", "Reference", "random_feed"]

Feed = dict[str, np.ndarray[Any, np.dtype[Any]]]
"""One run's inputs or outputs by name."""


class Reference:
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
        import onnxruntime as ort

        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 4
        if not optimize:
            options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        for library in extensions:
            try:
                options.register_custom_ops_library(library)
            except Exception as e:  # ONNX Runtime raises its own untyped errors
                raise UsageError(f"--ort-extension {library}", f"cannot be loaded: {_reason(e)}") from e
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        source: str | bytes
        if isinstance(model, Path):
            source = str(model)
        elif weight_bytes(model) <= EMBED_LIMIT:
            source = model_bytes(model)
        else:
            self._folder = tempfile.TemporaryDirectory(prefix="graphopt-")
            source = str(save_model(model, Path(self._folder.name) / "model.onnx")[0])
        try:
            self.session = ort.InferenceSession(source, options, providers=["CPUExecutionProvider"])
        except Exception as e:
            name = str(model) if isinstance(model, Path) else model.graph.name or "model"
            raise ModelError(name, f"ONNX Runtime cannot load it: {_reason(e)}") from e
        self.inputs: tuple[str, ...] = tuple(i.name for i in self.session.get_inputs())
        self.outputs: tuple[str, ...] = tuple(o.name for o in self.session.get_outputs())

    def run(self, feed: Mapping[str, np.ndarray[Any, Any]], outputs: Sequence[str] | None = None) -> Feed:
        """Run once; returns the outputs by name.

        Raises:
            ModelError: ONNX Runtime fails on this feed.
        """
        names = list(outputs or self.outputs)
        try:
            values = self.session.run(names, {name: feed[name] for name in self.inputs})
        except Exception as e:
            raise ModelError("model", f"ONNX Runtime cannot run it: {_reason(e)}") from e
        return dict(zip(names, values, strict=True))


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


def _reason(e: Exception) -> str:
    lines = [line.strip() for line in str(e).splitlines() if line.strip()]
    return lines[0].rpartition(" : ")[2][:240] if lines else type(e).__name__
