"""Machine code for ARM: what inner loops consist of, and how fast LLVM thinks that they are on CPUs of others."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tvm
from arm_listing import Loop, cycles, innermost_loops, mca
from kernel_case import Case, check
from kernel_cases import convolved
from kernel_epilogues import requantized
from kernel_program import ISAS, command_of, run_all

from graphopt.targets import Isa
from graphopt_backends._compile import llvm_target
from graphopt_backends.kernels.batched import Batched
from graphopt_backends.kernels.blockwise import Blockwise
from graphopt_backends.kernels.build import build
from graphopt_backends.kernels.conv import Conv, Window
from graphopt_backends.kernels.depthwise import Depthwise
from graphopt_backends.kernels.epilogue import Epilogue
from graphopt_backends.kernels.expression import call, number, operand
from graphopt_backends.kernels.gemm import Gemm

_RELU = Epilogue(call("max", operand(0), number(0)), (), bias=True)
_BYTES = requantized(np.ones(1, np.float32), 0.1, 3, "int8", np.zeros(1)).epilogue
_SAME = Window((3, 3), pads=(1, 1, 1, 1))


def _gemm(kind: Any, rows: int, columns: int, depth: int) -> Callable[[Isa], Gemm]:
    return lambda isa: Gemm(isa, kind, rows, columns, depth, _RELU if kind == "f32" else _BYTES)


def _conv(kind: Any, size: int, channels: int, filters: int, window: Window, groups: int = 1) -> Callable[[Isa], Conv]:
    tail = _RELU if kind == "f32" else _BYTES
    return lambda isa: Conv(isa, kind, 1, size, size, channels, filters, window, groups, tail)


def _products(kind: Any) -> dict[str, Callable[[Isa], Any]]:
    return {
        "gemm": _gemm(kind, 128, 768, 768),
        "gemm of a long sum": _gemm(kind, 49, 512, 2048),
        "gemm of 5 rows": _gemm(kind, 5, 384, 1536),
    }


def _images(kind: Any) -> dict[str, Callable[[Isa], Any]]:
    return {
        "conv": _conv(kind, 28, 128, 128, _SAME),
        "strided conv": _conv(kind, 56, 128, 128, Window((3, 3), (2, 2), pads=(1, 1, 1, 1))),
        "strided conv of one tap": _conv(kind, 56, 256, 512, Window((1, 1), (2, 2))),
    }


def _small(kind: Any) -> dict[str, Callable[[Isa], Any]]:
    """Few rows or pixels, or sums that are interrupted after a few elements."""
    return {
        "gemm of 4 rows": _gemm(kind, 4, 1024, 1024),
        "conv of few pixels": _conv(kind, 7, 512, 512, _SAME),
        "grouped conv": _conv(kind, 14, 512, 512, _SAME, 32),
    }


def _first(kind: Any) -> dict[str, Callable[[Isa], Any]]:
    return {"first conv": _conv(kind, 224, 3, 64, Window((7, 7), (2, 2), pads=(3, 3, 3, 3)))}


def _four_bits(rows: int, block: int) -> dict[str, Callable[[Isa], Any]]:
    return {f"4 bits, {rows} rows, blocks of {block}": lambda isa: Blockwise(isa, "int8", rows, 768, 768, block)}


_BATCHED: Mapping[str, Callable[[Isa], Any]] = {
    "scores": lambda isa: Batched(isa, (12,), 128, 128, 64, (64, 768), (64, 1, 768), (128 * 128, 128)),
    "weighed values": lambda isa: Batched(isa, (12,), 128, 64, 128, (128 * 128, 128), (64, 768, 1), (64, 768)),
}
_DEPTHWISE: Mapping[str, Callable[[Isa], Any]] = {
    "depthwise": lambda isa: Depthwise(isa, 1, 14, 14, 384, _SAME, _RELU),
    "depthwise of 25 taps": lambda isa: Depthwise(isa, 1, 14, 14, 384, Window((5, 5), pads=(2, 2, 2, 2)), _RELU),
}

_CASES: Sequence[tuple[str, str, Mapping[str, Callable[[Isa], Any]], float, float]] = [
    # CPU, instruction, kernels, least share of it among the instructions, least part of the peak
    ("cortex-a76", "fmla", _products("f32") | _images("f32") | _small("f32") | _first("f32"), 0.75, 0.8),
    ("cortex-a76", "sdot", _products("s8s8") | _images("s8s8") | _small("s8s8") | _first("s8s8"), 0.75, 0.8),
    ("neoverse-v1", "fmla", _products("f32"), 0.75, 0.8),
    ("neoverse-v1", "smmla", _products("s8s8") | _images("s8s8"), 0.75, 0.98),
    # an instruction takes two columns: with few rows a vector of weights is read for every two multiplications
    ("neoverse-v1", "smmla", _small("s8s8"), 0.7, 0.98),
    # rows that are read as they lie have addresses of their own
    ("cortex-a76", "fmla", _BATCHED, 0.72, 0.8),
    # every input is read for one multiplication, most of them from the first cache
    ("cortex-a76", "fmla", _DEPTHWISE, 0.5, 0.8),
    # a mask for every two multiplications; each sum of a block is begun, made a float, scaled and added
    ("cortex-a76", "sdot", _four_bits(1, 32), 0.4, 0.39),
    ("cortex-a76", "sdot", _four_bits(1, 128), 0.5, 0.54),
    ("cortex-a76", "sdot", _four_bits(4, 32) | _four_bits(16, 32), 0.49, 0.49),
    ("cortex-a76", "sdot", _four_bits(4, 64) | _four_bits(16, 64) | _four_bits(16, 128), 0.7, 0.85),
    ("neoverse-v1", "sdot", _four_bits(16, 64), 0.7, 0.8),
    # it computes in order: what LLVM's model loses waits for loads
    ("cortex-a53", "fmla", {"gemm": _gemm("f32", 128, 768, 768), "conv": _conv("f32", 28, 128, 128, _SAME)}, 0.75, 0.5),
]


def _named() -> list[Any]:
    return [
        pytest.param(device, instruction, make, share, peak, id=f"{device} {instruction} {name}")
        for device, instruction, kernels, share, peak in _CASES
        for name, make in kernels.items()
    ]


def _listing(kernel: Any) -> str:
    function = kernel.primitive("kernel").with_attr("global_symbol", "kernel")
    module = tvm.IRModule({tvm.ir.GlobalVar("kernel"): function})
    return build(module, tvm.target.Target(llvm_target(kernel.isa, 1))).inspect_source("s")


def _main_loops(kernel: Any) -> list[Loop]:
    """Loops that multiply, but for those over what is left of a sum or of rows, which are small."""
    found = [loop for loop in innermost_loops(_listing(kernel)) if loop.multiplications]
    most = max(len(loop.multiplications) for loop in found)
    return [loop for loop in found if 2 * len(loop.multiplications) >= most]


def _features(isa: Isa) -> str:
    return ",".join(isa.features)


@functools.cache
def _peak(isa: Isa, instruction: str) -> float:
    """Cycles of one multiplication where nothing else is done and none waits for another."""
    operands = {"fmla": "v30.4s, v31.s[0]", "sdot": "v30.16b, v31.4b[0]", "smmla": "v30.16b, v31.16b"}[instruction]
    count = 24
    lines = [f"{instruction} v{i}.4s, {operands}" for i in range(count)]
    return cycles(lines, isa.cpu or "generic", _features(isa)) / count


@pytest.mark.skipif(mca() is None, reason="llvm-mca is not installed")
@pytest.mark.parametrize(("device", "instruction", "make", "share", "peak"), _named())
def test_inner_loops_multiply_most_of_the_time_and_keep_everything_in_registers(
    device: str, instruction: str, make: Callable[[Isa], Any], share: float, peak: float
) -> None:
    isa = ISAS[device]
    kernel = make(isa)
    for loop in _main_loops(kernel):
        told = "\n".join(loop.lines)
        mine = [line for line in loop.multiplications if line.startswith(instruction)]
        assert len(mine) / len(loop.lines) >= share, told
        assert not loop.spills, told
        estimated = _peak(isa, instruction) * len(mine) / cycles(loop.lines, device, _features(isa))
        assert estimated >= peak, told


_I8MM = ISAS["neoverse-v1"]


@pytest.mark.skipif(command_of(_I8MM) is None, reason="nothing here runs code for ARM")
def test_pixels_that_are_brought_together_are_right_however_far_apart_they_lie(tmp_path: Path) -> None:
    drawn = np.random.default_rng(0)
    cases: list[Case] = []
    for size, channels, groups, window in (
        (7, 512, 1, Window((1, 3), pads=(0, 1, 0, 1))),
        (9, 256, 1, Window((1, 1), (2, 2))),
        (6, 384, 2, Window((2, 1), (1, 2), pads=(1, 0, 0, 0))),
    ):
        x = drawn.integers(-128, 128, (1, size, size, channels), np.int8)
        w = drawn.integers(-128, 128, (24, channels // groups, *window.size), np.int8)
        kernel = Conv(_I8MM, "s8s8", 1, size, size, channels, 24, window, groups, border=5)
        sums = convolved(x, w, window, groups, 5).astype(np.float32).reshape(-1, 24)
        cases.append(Case("s8s8", kernel, [x, kernel.pack(w)], sums))
    for case, result in zip(cases, run_all(cases, _I8MM, tmp_path), strict=True):
        check(case, result)


def test_a_tile_with_too_many_accumulators_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = Gemm(ISAS["cortex-a76"], "f32", 128, 768, 768, _RELU)
    monkeypatch.setitem(kernel.__dict__, "tile", (8, 4))
    assert any(loop.spills for loop in _main_loops(kernel))


def test_loops_are_found_through_branches_out_of_them() -> None:
    listing = """
f:
    mov x0, #0
.LBB0_1:
    mov x1, #0
.LBB0_2:
    ldr q0, [x2], #16
    cbz x3, .LBB0_4
    fmla v1.4s, v0.4s, v2.s[0]
    str q1, [sp, #16]
.LBB0_3:
    b.ne .LBB0_2
    b.ne .LBB0_1
    ret
.LBB0_4:
    add x1, x1, #1
    b .LBB0_3
"""
    (loop,) = innermost_loops(listing)
    assert len(loop.lines) == 7
    assert loop.spills == ("str q1, [sp, #16]",)
    assert loop.share == pytest.approx(1 / 7)
