"""Compiles a whole model with the kernels and runs it: what the tests of networks share."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx_ir as ir

from graphopt.model_io import ShapeBinding
from graphopt.targets import Isa
from graphopt_backends._engine import Engine
from graphopt_backends._library import Made, compile_network
from graphopt_backends._link import known_linkers
from graphopt_backends._lower import lower
from graphopt_backends.network.blockwise import keeps
from graphopt_backends.network.convert import unsupported


def run_network(
    model: ir.Model, isa: Isa, feed: Mapping[str, np.ndarray], tasks: int = 2
) -> tuple[dict[str, np.ndarray], list[str]]:
    """Compile and run; also returns the names of the kernels that ran, in order."""
    made, library, inputs, outputs = _built(model, isa)
    engine = Engine(library, library.with_suffix(".weights") if made.separate else None, tasks)
    found = dict(zip(outputs, engine.run([feed[name] for name in inputs]), strict=True))
    return found, [step.kernel.rpartition("_")[0] for step in made.steps]


@functools.lru_cache(maxsize=1)
def _built(model: ir.Model, isa: Isa) -> tuple[Made, Path, list[str], list[str]]:
    """The library of a model, which mostly runs several times, and the names of its inputs and outputs."""
    lowered = lower(model, ShapeBinding(), "x86", keeps).model
    assert not unsupported(lowered)
    names = [[str(value.name) for value in values] for values in (lowered.graph.inputs, lowered.graph.outputs)]
    library = Path(tempfile.mkdtemp(dir=_cache().name)) / "model.so"
    made = compile_network(lowered, isa, "x86", library, known_linkers(isa)[0], Path(_cache().name))
    return made, library, *names


@functools.cache
def _cache() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="graphopt-")
