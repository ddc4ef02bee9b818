"""How fast a core multiplies and adds at best: on registers alone, the measure that kernels are held against."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tvm.script.ir_builder import IRBuilder

from graphopt.targets import Isa
from graphopt_backends.kernels.emit import T, constant, load, local, store
from graphopt_backends.kernels.multiply import Kind, Multiply
from graphopt_backends.kernels.tiles import ACROSS, MOST_LENGTH, MOST_ROWS, WIDTH, Block, configured

__all__ = ["Peak", "peaks_of"]

_ACCUMULATORS = 12
"""Enough to hide the latency of an instruction, and with their operands in 16 registers."""


@dataclass(frozen=True)
class Peak:
    """A loop of multiplications that do not wait for each other.

    Attributes:
        isa: The CPU.
        kind: Element types.
    """

    isa: Isa
    kind: Kind

    @property
    def operations(self) -> int:
        """Multiplications and additions of a turn."""
        multiply = Multiply(self.isa, self.kind)
        return 2 * _ACCUMULATORS * multiply.lanes * multiply.group

    def primitive(self, name: str) -> Any:
        """A public function void(memory, int32 turns); memory holds operands, and takes the sums."""
        multiply = Multiply(self.isa, self.kind)
        builder = IRBuilder()
        with builder, T.prim_func():
            T.func_name(name)
            T.func_attr({"global_symbol": name, "tirx.noalias": True, "tirx.is_scheduled": True})
            sides = [T.arg(side, T.handle(dtype)) for side, dtype in self._pointers(multiply)]
            turns = T.arg("turns", T.int32())
            buffers = [
                T.decl_buffer((4096,), dtype, data=side)
                for side, (_, dtype) in zip(sides, self._pointers(multiply), strict=True)
            ]
            self._loop(multiply, buffers, turns)
        return builder.get()

    def _loop(self, multiply: Multiply, buffers: Sequence[Any], turns: Any) -> None:
        lanes = multiply.lanes
        totals = [local(lanes, multiply.sum) for _ in range(_ACCUMULATORS)]
        for total in totals:
            store(total, constant(0, multiply.sum, lanes), 0, lanes)
        places = [i * multiply.group for i in range(multiply.rows)]
        activation = multiply.ready(multiply.load_activation(buffers[0], places, 1)[0])
        weight = multiply.load_weight(buffers[1], 0)
        with T.serial(0, turns):
            for total in totals:
                store(total, multiply.add(load(total, 0, lanes), activation, weight), 0, lanes)
        for i, total in enumerate(totals):
            store(buffers[2], load(total, 0, lanes), i * lanes, lanes)

    def _pointers(self, multiply: Multiply) -> tuple[tuple[str, str], ...]:
        return ("activations", multiply.activation), ("weights", multiply.weight), ("sums", multiply.sum)


@dataclass(frozen=True)
class TilePeak(Peak):
    """A loop of products of tiles, as many as their registers hold the sums of."""

    @property
    def operations(self) -> int:
        """Multiplications and additions of a turn."""
        return 2 * ACROSS * MOST_ROWS * WIDTH * MOST_LENGTH

    def _loop(self, multiply: Multiply, buffers: Sequence[Any], turns: Any) -> None:
        left, right, sums = buffers
        block = Block(self.kind, ACROSS, MOST_ROWS, MOST_LENGTH)
        with configured(block, sums, 0):
            block.begin(None, 0)
            block.add(left, [0] * block.high, MOST_LENGTH, right, [0] * block.wide)
            with T.serial(0, turns):
                for column in range(block.wide):
                    block.multiply(column)
            block.put(sums, 0)

    def _pointers(self, multiply: Multiply) -> tuple[tuple[str, str], ...]:
        return ("activations", multiply.activation), ("weights", multiply.weight), ("sums", "uint8")


def peaks_of(isa: Isa) -> dict[str, Peak]:
    """What a CPU's peaks are measured by: `float`, and `integer` where one instruction sums products of bytes."""
    found = {"float": Peak(isa, "f32")}
    if isa.tiles:
        found["integer"] = TilePeak(isa, "u8s8")
    elif isa.dot != "none":
        found["integer"] = Peak(isa, "s8s8" if isa.lane_operands else "u8s8")
    return found
