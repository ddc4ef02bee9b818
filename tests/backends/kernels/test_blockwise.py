"""Products with 4-bit weights equal those with the weights that the codes stand for, and code for ARM is dense."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

import numpy as np
import pytest
import tvm
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from kernel_runner import run, runnable

from graphopt.targets import Isa
from graphopt_backends._compile import llvm_target
from graphopt_backends.arm import TARGETS
from graphopt_backends.kernels.blockwise import MIDDLE, Activations, Blockwise
from graphopt_backends.kernels.build import build
from graphopt_backends.kernels.epilogue import Epilogue
from graphopt_backends.kernels.expression import call, number, operand

_WITHOUT_DOT = [
    replace(isa, dot="none", features=tuple(f for f in isa.features if f != "+avx512vnni"))
    for isa in runnable() if isa.vector_bits == 512
]  # fmt: skip
ISAS = [*runnable(), *_WITHOUT_DOT]
on_this_cpu = pytest.mark.skipif(not ISAS, reason="this CPU runs none of the kernels")
few = settings(
    max_examples=9, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck), phases=[Phase.generate]
)
isas = st.sampled_from(ISAS or [None])
blocks = st.sampled_from([16, 32, 64, 128])
row_counts = st.sampled_from([1, 2, 3, 4, 7, 16, 29])


@dataclass(frozen=True)
class _Weight:
    """A weight in blocks.

    Attributes:
        codes: 0 to 15, [depth, columns].
        scales: [blocks, columns].
        shifts: The same, or None.
        block: Rows that share a scale.
    """

    codes: np.ndarray
    scales: np.ndarray
    shifts: np.ndarray | None
    block: int

    def dense(self) -> np.ndarray:
        """The numbers that it stands for."""
        found = (self.codes.astype(np.float64) - MIDDLE) * self._spread(self.scales)
        return found if self.shifts is None else found + self._spread(self.shifts)

    def _spread(self, values: np.ndarray) -> np.ndarray:
        return np.repeat(values.astype(np.float64), self.block, 0)[: len(self.codes)]


def _drawn(seed: int, depth: int, columns: int, block: int, *, shifted: bool) -> _Weight:
    rng = np.random.default_rng(seed)
    shape = (-(-depth // block), columns)
    scales = rng.uniform(0.5, 1.5, shape).astype(np.float32)
    shifts = rng.standard_normal(shape).astype(np.float32) if shifted else None
    return _Weight(rng.integers(0, 16, (depth, columns), np.uint8), scales, shifts, block)


def _result(kernel: Blockwise, a: np.ndarray, weight: _Weight) -> np.ndarray:
    packed = kernel.pack(weight.codes, weight.scales, weight.shifts)
    return run(kernel, [a, packed], np.empty((kernel.rows, kernel.columns), np.float32))


@on_this_cpu
@few
@given(isas, row_counts, st.integers(1, 150), st.integers(1, 300), blocks, st.booleans(), st.integers(0, 99))
def test_products_of_floats_equal_numpy(
    isa: Isa, rows: int, columns: int, depth: int, block: int, shifted: bool, seed: int
) -> None:
    weight = _drawn(seed, depth, columns, block, shifted=shifted)
    a = np.random.default_rng(seed).standard_normal((rows, depth)).astype(np.float32)
    kernel = Blockwise(isa, "float32", rows, columns, depth, block, shifted)
    np.testing.assert_allclose(_result(kernel, a, weight), a @ weight.dense(), rtol=1e-4, atol=2e-3)


@on_this_cpu
@few
@given(isas, row_counts, st.integers(1, 150), st.integers(1, 300), blocks, st.booleans(), st.integers(0, 99))
def test_sums_of_products_of_bytes_are_exact(
    isa: Isa, rows: int, columns: int, depth: int, block: int, shifted: bool, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    drawn = _drawn(seed, depth, columns, block, shifted=shifted)
    shifts = None if drawn.shifts is None else np.round(drawn.shifts)
    weight = replace(drawn, scales=np.ones_like(drawn.scales), shifts=shifts)
    a = rng.integers(-127, 128, (rows, depth)).astype(np.float32)
    a[:, ::block] = 127  # so that a step is 1
    kernel = Blockwise(isa, "int8", rows, columns, depth, block, shifted)
    np.testing.assert_array_equal(_result(kernel, a, weight), (a @ weight.dense()).astype(np.float32))


@on_this_cpu
@pytest.mark.parametrize("code", [0, 15])
@pytest.mark.parametrize("isa", ISAS, ids=lambda isa: f"{isa.name}-{isa.dot}")
def test_the_largest_sums_of_products_of_bytes_are_exact(isa: Isa, code: int) -> None:
    depth, columns, block = 256, 40, 128
    signs = np.repeat([[1], [-1]], depth, 1).astype(np.float32)
    scales = np.ones((depth // block, columns), np.float32)
    weight = _Weight(np.full((depth, columns), code, np.uint8), scales, None, block)
    kernel = Blockwise(isa, "int8", 2, columns, depth, block)
    np.testing.assert_array_equal(_result(kernel, 127 * signs, weight), 127 * signs @ weight.dense())


@pytest.mark.parametrize("isa", ISAS, ids=lambda isa: f"{isa.name}-{isa.dot}")
def test_sums_of_longer_blocks_are_not_made_in_bytes(isa: Isa) -> None:
    assert Blockwise(isa, "int8", 1, 16, 512, 128).is_known
    assert not Blockwise(isa, "int8", 1, 16, 512, 256).is_known


@on_this_cpu
@few
@given(isas, row_counts, st.integers(1, 100), st.integers(1, 200), blocks, st.integers(0, 99))
def test_activations_are_rounded_block_by_block(
    isa: Isa, rows: int, columns: int, depth: int, block: int, seed: int
) -> None:
    weight = _drawn(seed, depth, columns, block, shifted=True)
    a = np.random.default_rng(seed).standard_normal((rows, depth)).astype(np.float32)
    a[:, :block] *= 1000  # which must not take the steps of other blocks away
    a[0] = 0
    padded = np.zeros((rows, -(-depth // block) * block))
    padded[:, :depth] = a
    parts = padded.reshape(rows, -1, block)
    steps = np.maximum(np.abs(parts).max(-1, keepdims=True), 1e-30) / 127
    rounded = (np.rint(parts / steps) * steps).reshape(rows, -1)[:, :depth]
    expected = rounded @ weight.dense()
    kernel = Blockwise(isa, "int8", rows, columns, depth, block, shifted=True)
    size = np.abs(rounded) @ np.abs(weight.dense())  # a number right between two steps may go to the other
    assert (np.abs(_result(kernel, a, weight) - expected) <= 1e-3 * size + 1e-6).all()


@on_this_cpu
@pytest.mark.parametrize("activations", ["float32", "int8"])
@pytest.mark.parametrize("rows", [1, 9])
@pytest.mark.parametrize("isa", ISAS, ids=lambda isa: f"{isa.name}-{isa.dot}")
def test_bias_and_arithmetic_follow_in_registers(isa: Isa, rows: int, activations: Activations) -> None:
    weight = _drawn(rows, 64, 40, 32, shifted=False)
    rng = np.random.default_rng(rows)
    a, bias = rng.standard_normal((rows, 64)).astype(np.float32), rng.standard_normal(40).astype(np.float32)
    tensor = rng.standard_normal((rows, 40)).astype(np.float32)
    expression = call("max", call("add", operand(0), operand(1)), number(0))
    epilogue = Epilogue(expression, ((40, 1),), bias=True)
    kernel = Blockwise(isa, activations, rows, 40, 64, 32, epilogue=epilogue)
    operands = [a, kernel.pack(weight.codes, weight.scales), kernel.pack_column(bias), tensor]
    got = run(kernel, operands, np.empty((rows, 40), np.float32))
    tolerance = 1e-3 if activations == "float32" else 1.0
    np.testing.assert_allclose(got, np.maximum(a @ weight.dense() + bias + tensor, 0), atol=tolerance)


@on_this_cpu
@pytest.mark.parametrize("isa", ISAS, ids=lambda isa: f"{isa.name}-{isa.dot}")
def test_rows_that_lie_apart_and_fight_for_places_in_the_cache_are_right(isa: Isa) -> None:
    weight = _drawn(1, 96, 33, 32, shifted=False)
    a = np.random.default_rng(1).standard_normal((12, 512)).astype(np.float32)
    kernel = Blockwise(isa, "float32", 12, 33, 96, 32, source_pitch=512)
    assert kernel.scratch > 0
    np.testing.assert_allclose(_result(kernel, a, weight), a[:, :96] @ weight.dense(), rtol=1e-4, atol=2e-3)


def _loops(kernel: Blockwise) -> list[list[str]]:
    """Instructions of the loops of a kernel that have no loops inside."""
    module = tvm.IRModule({"kernel": kernel.primitive("kernel").with_attr("global_symbol", "kernel")})
    text = build(module, tvm.target.Target(llvm_target(kernel.isa, 1))).inspect_source("s")
    found: list[list[str]] = []
    label, body = "", list[str]()
    for line in text.splitlines():
        begins = re.match(r"(\.LBB\w+):", line)
        if begins:
            label, body = begins[1], []
        elif re.match(r"\t\w", line):
            body.append(line.strip())
            if label and line.endswith(label):
                found.append(body)
                label, body = "", []
    return found


_ARM = {target.device: target.isa for target in TARGETS if target.isa is not None}


@pytest.mark.parametrize(
    ("device", "activations", "rows", "instruction", "least"),
    [
        ("cortex-a53", "float32", 12, "fmla", 0.6),
        ("cortex-a76", "float32", 12, "fmla", 0.6),
        ("cortex-a76", "int8", 1, "sdot", 0.4),
        ("cortex-a76", "int8", 12, "sdot", 0.49),
        ("neoverse-v1", "int8", 12, "sdot", 0.49),
        ("cortex-a53", "int8", 1, "smlal", 0.1),
    ],
)
def test_inner_loops_for_arm_multiply(
    device: str, activations: Activations, rows: int, instruction: str, least: float
) -> None:
    kernel = Blockwise(_ARM[device], activations, rows, 96, 768, 32)
    shares = [sum(line.startswith(instruction) for line in loop) / len(loop) for loop in _loops(kernel)]
    assert max(shares) >= least
