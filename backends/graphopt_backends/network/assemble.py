"""From a network to what is compiled: functions, offsets in memory, and the file of weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from graphopt_backends.network.memory import lay_out, lifetimes
from graphopt_backends.network.network import Network
from graphopt_backends.network.program import Place, Step, module
from graphopt_backends.network.views import Buffer

__all__ = ["Assembled", "assemble"]

_ALIGNMENT = 64
_SLACK = 1024  # bytes behind the last tensor, where a vector may reach
_ALONE = 40_000  # operations that are not worth a second task


@dataclass(frozen=True)
class Assembled:
    """A network in TVM's form.

    Attributes:
        module: Kernels and their entry function.
        parameters: Parameters of `main` in order, with the bytes behind each.
        weights: Constants with their offsets.
        steps: Calls in order.
        kernels: Distinct kernels.
    """

    module: Any
    parameters: Mapping[str, int]
    weights: tuple[tuple[int, np.ndarray], ...]
    steps: tuple[Step, ...]
    kernels: int

    def weight_bytes(self) -> Iterator[bytes]:
        """The weights one after the other, as they lie behind the parameter `weights`."""
        at = 0
        for offset, array in self.weights:
            yield b"\0" * (offset - at) + array.tobytes()
            at = offset + array.nbytes
        yield b"\0" * (self.parameters["weights"] - at)


def assemble(network: Network, tasks: int) -> Assembled:
    """Lay a network out for a number of tasks.

    Args:
        network: What is computed.
        tasks: Tasks that share the work: threads, mostly.
    """
    lives = lifetimes([[view.buffer for view in call.views] for call in network.calls])
    offsets, temporary = lay_out(lives)
    weights, weight_bytes = _weights(network)
    scratch_at = _aligned(temporary + _SLACK)
    scratch = 0
    names: dict[Any, str] = {}
    steps: list[Step] = []
    outside: dict[str, int] = {}
    for call in network.calls:
        name = names.setdefault(call.kernel, f"{type(call.kernel).__name__.lower()}_{len(names)}")
        places: list[Place] = []
        for view in call.views:
            buffer, item = view.buffer, np.dtype(view.dtype).itemsize
            if buffer.origin == "temporary":
                places.append(Place("workspace", offsets[buffer] + view.offset * item))
            elif buffer.origin == "weight":
                places.append(Place("weights", weights[buffer] + view.offset * item))
            else:
                outside[f"{buffer.origin}_{buffer.name}"] = buffer.nbytes
                places.append(Place(f"{buffer.origin}_{buffer.name}", view.offset * item))
        shared = tasks if call.kernel.operations >= _ALONE else 1
        own = _aligned(call.kernel.scratch)
        scratch = max(scratch, own * shared)
        steps.append(Step(name, tuple(places), shared, own, scratch_at))
    parameters = {**outside, "weights": max(_ALIGNMENT, weight_bytes), "workspace": scratch_at + scratch + _SLACK}
    kernels = {name: kernel.primitive(name) for kernel, name in names.items()}
    held = tuple((weights[buffer], buffer.data) for buffer in network.weights if buffer.data is not None)
    return Assembled(module(kernels, parameters, steps), parameters, held, tuple(steps), len(kernels))


def _weights(network: Network) -> tuple[dict[Buffer, int], int]:
    found: dict[Buffer, int] = {}
    at = 0
    for buffer in network.weights:
        found[buffer] = at
        at = _aligned(at + buffer.nbytes)
    return found, at + _SLACK


def _aligned(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT
