"""Rounding to a grid that is made for the tensor at hand: its range first, in parts, then the grid and its integers.

The grid is that of ONNX's DynamicQuantizeLinear: 256 steps from the least element to the greatest, zero among them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from graphopt.targets import Isa
from graphopt_backends.kernels.emit import (
    Frame,
    Pointer,
    bind,
    cast,
    constant,
    each_vector,
    either,
    intrinsic,
    load,
    primitive,
    share,
    spread,
    store,
    tirx,
    when,
)  # fmt: skip
from graphopt_backends.kernels.kernel import Kernel
from graphopt_backends.kernels.reduce import horizontal

__all__ = ["Range", "Round"]

_CHUNK = 4096  # elements: both passes over them find them in the nearest cache
_MOST = 255.0


@dataclass(frozen=True)
class Range(Kernel):
    """The least element of every chunk of a tensor, and behind those the greatest of every chunk.

    Attributes:
        isa: The CPU.
        size: Elements, in float32.
    """

    isa: Isa
    size: int

    @property
    def chunks(self) -> int:
        """Parts that tasks share."""
        return -(-self.size // _CHUNK)

    @property
    def operations(self) -> int:
        """Comparisons."""
        return 2 * self.size

    def primitive(self, name: str) -> Any:
        """The function: (source, result, task, tasks)."""
        pointers = [Pointer("source", "float32", self.size), Pointer("result", "float32", 2 * self.chunks)]
        return primitive(name, pointers, self._body)

    def _body(self, frame: Frame) -> None:
        whole, rest = divmod(self.size, _CHUNK)
        with share(frame, self.chunks) as (chunk, _):
            if not rest or not whole:
                self._chunk(frame, chunk, rest or _CHUNK)
            else:
                either(
                    chunk < whole,
                    lambda: self._chunk(frame, chunk, _CHUNK),
                    lambda: self._chunk(frame, chunk, rest),
                )

    def _chunk(self, frame: Frame, chunk: Any, count: int) -> None:
        for i, operator in enumerate(("min", "max")):
            found = horizontal(self.isa, operator, frame["source"], bind(chunk * _CHUNK), count)
            store(frame["result"], found, i * self.chunks + chunk, 1)


@dataclass(frozen=True)
class Round(Kernel):
    """uint8 integers of a tensor on the grid of its range, and the grid.

    Attributes:
        isa: The CPU.
        size: Elements.
    """

    isa: Isa
    size: int

    @property
    def operations(self) -> int:
        """Multiplications, limits and conversions."""
        return 4 * self.size

    def primitive(self, name: str) -> Any:
        """The function: (source, ranges as `Range` writes them, result, scale, zero, task, tasks)."""
        pointers = [
            Pointer("source", "float32", self.size),
            Pointer("ranges", "float32", 2 * Range(self.isa, self.size).chunks),
            Pointer("result", "uint8", self.size),
            Pointer("scale", "float32", 1),
            Pointer("zero", "uint8", 1),
        ]
        return primitive(name, pointers, self._body)

    def _body(self, frame: Frame) -> None:
        scale, zero = self._grid(frame)

        def write_grid() -> None:
            store(frame["scale"], scale, 0, 1)
            store(frame["zero"], cast(cast(zero, "int32", 1), "uint8", 1), 0, 1)

        when(frame.task == 0, write_grid)
        steps, least, most = bind(constant(1, "float32") / scale), bind(-zero), bind(constant(_MOST, "float32") - zero)
        whole = bind(cast(zero, "int32", 1))
        chunks = -(-self.size // _CHUNK)

        def vector(first: Any, index: Any, lanes: int) -> None:
            x = load(frame["source"], first + index, lanes) * spread(steps, lanes)
            x = bind(tirx.min(tirx.max(x, spread(least, lanes)), spread(most, lanes)))
            suffix = f"v{lanes}i32.v{lanes}f32" if lanes > 1 else "i32.f32"
            found = intrinsic(f"llvm.lrint.{suffix}", "int32", lanes, x) + spread(whole, lanes)
            store(frame["result"], cast(found, "uint8", lanes), first + index, lanes)

        lanes, rest = self.isa.vector_bits // 32, self.size % _CHUNK
        with share(frame, chunks) as (chunk, _):
            first = bind(chunk * _CHUNK)
            if rest and chunks > 1:
                either(
                    chunk < chunks - 1,
                    lambda: each_vector(_CHUNK, lanes, lambda i, n: vector(first, i, n)),
                    lambda: each_vector(rest, lanes, lambda i, n: vector(first, i, n)),
                )
            else:
                each_vector(rest or _CHUNK, lanes, lambda i, n: vector(first, i, n))

    def _grid(self, frame: Frame) -> tuple[Any, Any]:
        """Scale and zero point, both float32, which every task computes for itself."""
        nothing, chunks = constant(0, "float32"), -(-self.size // _CHUNK)
        least = horizontal(self.isa, "min", frame["ranges"], 0, chunks)
        greatest = horizontal(self.isa, "max", frame["ranges"], chunks, chunks)
        least, greatest = bind(tirx.min(least, nothing)), bind(tirx.max(greatest, nothing))
        span = bind((greatest - least) / constant(_MOST, "float32"))
        scale = bind(tirx.Select(span > nothing, span, constant(1, "float32")))
        zero = tirx.min(tirx.max(-least / scale, nothing), constant(_MOST, "float32"))
        return scale, bind(tirx.nearbyint(zero))
