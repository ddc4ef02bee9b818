"""ONNX Runtime, the reference for every number that graphopt reports."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx_ir as ir

from graphopt.errors import ModelError, UsageError
from graphopt.model_io import EMBED_LIMIT, InputSpec, ShapeBinding, model_bytes, save_model, weight_bytes
from graphopt.session import Feed, Session

__all__ = ["Feed", "Reference", "check_runnable", "random_feed"]

_BIAS = 2


class Reference(Session):
    """A model ready to run in ONNX Runtime.

    Args:
        model: A model in memory, or the path of one.
        threads: Threads inside one operator.
        optimize: False: every node runs as written, without ONNX Runtime's fusions.
        extensions: Libraries with custom operators (`--ort-extension`).

    Raises:
        ModelError: ONNX Runtime cannot load the model, or would crash when it runs it.
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
        if isinstance(model, ir.Model):
            check_runnable(model)
        if isinstance(model, Path):
            source = str(model)
        elif weight_bytes(model) <= EMBED_LIMIT:
            source = model_bytes(model)
        else:
            self._folder = tempfile.TemporaryDirectory(prefix="graphopt-")
            source = str(save_model(model, Path(self._folder.name) / "model.onnx")[0])
        name = str(model) if isinstance(model, Path) else model.graph.name or "model"
        super().__init__(source, name, threads=threads, optimize=optimize, extensions=extensions)


def check_runnable(model: ir.Model) -> None:
    """Refuse a model that would end the process that runs it.

    The bias of ONNX Runtime's own Attention is optional, so that a model without loads; when it runs, its kernel for
    CPUs reads the bias all the same (seen in 1.20.1 and 1.31.1, whatever its other inputs and attributes are).

    Raises:
        ModelError: It has such an Attention.
    """
    for node in (node for owner in (model.graph, *model.functions.values()) for node in owner.all_nodes()):
        if (node.domain, node.op_type) == ("com.microsoft", "Attention") and not any(node.inputs[_BIAS : _BIAS + 1]):
            fact = f"its Attention {node.name!r} has no bias, on which ONNX Runtime crashes"
            raise ModelError(model.graph.name or "model", fact, "give it a bias of zeros")


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
