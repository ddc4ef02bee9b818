"""Compiles a whole model with the kernels and runs it: what the tests of networks share."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir
import tvm

from graphopt.model_io import ShapeBinding
from graphopt.targets import Isa
from graphopt_backends._compile import llvm_target
from graphopt_backends._lower import lower
from graphopt_backends.kernels.build import build
from graphopt_backends.network.assemble import assemble
from graphopt_backends.network.convert import convert, unsupported


def run_network(
    model: ir.Model, isa: Isa, feed: Mapping[str, np.ndarray], tasks: int = 2
) -> tuple[dict[str, np.ndarray], list[str]]:
    """Compile and run; also returns the names of the kernels that ran, in order."""
    lowered = lower(model, ShapeBinding(), "x86").model
    assert not unsupported(lowered)
    network = convert(lowered, isa)
    made = assemble(network, tasks)
    main = build(made.module, tvm.target.Target(llvm_target(isa, tasks)))["main"]
    memory = {"weights": np.frombuffer(b"".join(made.weight_bytes()), np.uint8)}
    for name, size in made.parameters.items():
        if name.startswith("input_"):
            memory[name] = np.ascontiguousarray(feed[name.removeprefix("input_")]).reshape(-1).view(np.uint8)
        elif name != "weights":
            memory[name] = np.zeros(size, np.uint8)
    tensors = {name: tvm.runtime.tensor(memory[name]) for name in made.parameters}
    main(*tensors.values())
    found: dict[str, np.ndarray] = {}
    for value in lowered.graph.outputs:
        shape = tuple(int(size) for size in value.shape or ())
        data = tensors[f"output_{value.name}"].numpy()
        assert value.dtype is not None
        found[str(value.name)] = data.view(value.dtype.numpy()).reshape(shape)
    return found, [type(call.kernel).__name__ for call in network.calls]
