"""Cases for kernels: what one is, how it is checked, and operands to draw for it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, get_args

import numpy as np
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from hypothesis.strategies import DrawFn, SearchStrategy

from graphopt.targets import Isa
from graphopt_backends.kernels.multiply import Kind, Multiply

__all__ = [
    "FILL",
    "SEEDS",
    "Case",
    "apart",
    "check",
    "drawn",
    "drawn_pitch",
    "floats",
    "kinds_of",
    "operand_pair",
    "widened",
]

FILL = 171
"""Byte that results are filled with before."""

_LONG = ("isa", "epilogue")
SEEDS = st.integers(0, 2**32 - 1)


@dataclass(frozen=True)
class Case:
    """A kernel, what it is given, and what it must write.

    Attributes:
        dtype: Element types, for tables.
        kernel: What runs.
        arrays: Its operands, packed.
        expected: The result.
        pitch: Elements from row to row of the result as the kernel writes it; 0: its rows follow one another.
        tolerance: Largest error, relative to the greatest element; 0: none.
    """

    dtype: str
    kernel: Any
    arrays: Sequence[np.ndarray]
    expected: np.ndarray
    pitch: int = 0
    tolerance: float = 0.0

    @property
    def name(self) -> str:
        """The kernel in one line."""
        parts = [str(getattr(self.kernel, field.name)) for field in fields(self.kernel) if field.name not in _LONG]
        tail = getattr(self.kernel, "epilogue", None)
        return " ".join(
            [type(self.kernel).__name__, self.kernel.isa.name, *parts, str(tail.expression) if tail else ""]
        )

    @property
    def result(self) -> np.ndarray:
        """Memory for the result, with what lies between its rows."""
        columns = self.expected.shape[-1] if self.expected.ndim else 1
        rows = self.expected.size // columns
        return np.empty((rows, self.pitch or columns), self.expected.dtype)


def check(case: Case, got: np.ndarray) -> None:
    """Compare what a kernel wrote into `case.result` with what it should have.

    Raises:
        AssertionError: It differs, or bytes between rows were written.
    """
    columns = case.expected.shape[-1] if case.expected.ndim else 1
    between = np.ascontiguousarray(got[:-1, columns:]).view(np.uint8)
    assert (between == FILL).all(), f"{case.name}: written between rows"
    found, expected = got[:, :columns], case.expected.reshape(-1, columns)
    if not case.tolerance:
        np.testing.assert_array_equal(found, expected, err_msg=case.name)
        return
    most = float(np.abs(expected).max(initial=0.0))
    np.testing.assert_allclose(
        found, expected, rtol=case.tolerance, atol=case.tolerance * max(1.0, most), err_msg=case.name
    )


def drawn(cases: SearchStrategy[Case], count: int, number: int) -> list[Case]:
    """Some cases, always the same for a number."""
    found: list[Case] = []

    @seed(number)
    @settings(
        max_examples=count, deadline=None, database=None, phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(cases)
    def collect(case: Case) -> None:
        found.append(case)

    collect()
    return found


def floats(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


def whole_bytes(seed: int, dtype: type[np.integer[Any]], *shape: int) -> np.ndarray:
    """All values of a type, its least and greatest often: sums of products must not saturate."""
    rng, limits = np.random.default_rng(seed), np.iinfo(dtype)
    values = rng.integers(limits.min, limits.max + 1, shape)
    extreme = rng.choice([limits.min, limits.max], shape)
    return np.where(rng.random(shape) < rng.choice([0.1, 0.9]), extreme, values).astype(dtype)


def operand_pair(
    seed: int, multiply: Multiply, source: Sequence[int], weight: Sequence[int]
) -> tuple[np.ndarray, np.ndarray]:
    """Activations and weights."""
    if multiply.instruction is None:
        return floats(seed, *source), floats(seed + 1, *weight)
    weights = whole_bytes(seed + 1, np.int8, *weight)
    widest = multiply.instruction.widest
    if widest:
        weights = weights.clip(-widest, widest)
    return whole_bytes(seed, np.uint8 if multiply.activation == "uint8" else np.int8, *source), weights


def apart(array: np.ndarray, pitch: int) -> np.ndarray:
    """Rows with something between them that no kernel may use."""
    rows = array.reshape(-1, array.shape[-1])
    held = np.full((rows.shape[0], pitch), np.nan if array.dtype.kind == "f" else 77, array.dtype)
    held[:, : rows.shape[1]] = rows
    return held


def drawn_pitch(draw: DrawFn, columns: int) -> int:
    """0, or a few elements more than a row has."""
    return draw(st.sampled_from([0, 0, columns, columns + 3, columns + 32]))


def kinds_of(isa: Isa) -> SearchStrategy[Kind]:
    """Element types; narrow weights where they make a difference."""
    made = {kind: Multiply(isa, kind).instruction for kind in get_args(Kind)}
    return st.sampled_from([kind for kind, it in made.items() if "narrow" not in kind or (it and it.widest)])


def widened(array: np.ndarray) -> np.ndarray:
    """Types in which sums are exact."""
    return array.astype(np.float64 if array.dtype.kind == "f" else np.int64)
