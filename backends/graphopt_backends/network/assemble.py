"""From a network to what is compiled: functions, and offsets in memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from graphopt_backends.kernels.peak import peaks_of
from graphopt_backends.network.memory import lay_out, lifetimes
from graphopt_backends.network.network import Network
from graphopt_backends.network.program import module
from graphopt_backends.network.steps import PEAK, Place, Step

__all__ = ["Assembled", "assemble"]

_ALIGNMENT = 64
_SLACK = 1024  # bytes behind the last tensor, where a vector may reach
_ALONE = 40_000  # operations that are not worth a second task


@dataclass(frozen=True)
class Assembled:
    """A network in TVM's form.

    Attributes:
        module: Kernels and their entry function, which takes the inputs and outputs of the model in their order, the
            weights and the workspace.
        steps: Calls in order.
        workspace: Bytes of memory for temporary tensors.
        scratch: Bytes besides for each task.
    """

    module: Any
    steps: tuple[Step, ...]
    workspace: int
    scratch: int


def assemble(network: Network) -> Assembled:
    """Lay a network out.

    Args:
        network: What is computed; all its constants are written.
    """
    lives = lifetimes([[view.buffer for view in call.views] for call in network.calls])
    offsets, temporary = lay_out(lives)
    scratch_at = _aligned(temporary + _SLACK)
    names: dict[Any, str] = {}
    steps: list[Step] = []
    for call in network.calls:
        name = names.setdefault(call.kernel, f"{type(call.kernel).__name__}_{len(names)}")
        places: list[Place] = []
        for view in call.views:
            buffer, item = view.buffer, np.dtype(view.dtype).itemsize
            start = offsets[buffer] if buffer.origin == "temporary" else buffer.offset
            parameter = {"temporary": "workspace", "weight": "weights"}.get(buffer.origin)
            places.append(Place(parameter or f"{buffer.origin} {buffer.name}", start + view.offset * item))
        shared = call.kernel.operations >= _ALONE
        own = _aligned(call.kernel.scratch)
        operations, arithmetic = call.kernel.operations, _arithmetic(call.kernel)
        steps.append(Step(name, tuple(places), shared, own, scratch_at, operations, call.sites, arithmetic))
    parameters = (*(f"input {n}" for n in network.inputs), *(f"output {n}" for n in network.outputs))
    kernels = {name: kernel.primitive(name) for kernel, name in names.items()}
    peaks = {f"{PEAK}{kind}": peak.primitive(f"{PEAK}{kind}") for kind, peak in peaks_of(network.isa).items()}
    made = module(kernels, (*parameters, "weights", "workspace"), steps, peaks)
    scratch = max((step.scratch for step in steps), default=0)
    return Assembled(made, tuple(steps), scratch_at + _SLACK, scratch)


def _arithmetic(kernel: Any) -> str:
    multiply = getattr(kernel, "multiply", None)
    return "" if multiply is None else "float" if multiply.kind == "f32" else "integer"


def _aligned(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT
