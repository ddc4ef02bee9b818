"""Products of two activations of bytes are exact on every CPU, whatever their signs, zero points and places."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from kernel_case import Case, check
from kernel_program import ISAS, command_of, run_all

from graphopt.targets import Isa
from graphopt_backends.kernels.byte_products import ByteProducts
from graphopt_backends.kernels.epilogue import Epilogue
from graphopt_backends.kernels.expression import operand

_LIMITS = {"uint8": (0, 256), "int8": (-128, 128)}
_KINDS = [
    ("uint8", "uint8", 0, 117), ("uint8", "int8", 100, 0), ("int8", "uint8", -3, 128), ("int8", "int8", 5, -128),
    ("uint8", "uint8", 90, 0),
]  # fmt: skip
_SHAPES = [(9, 19, 13), (1, 40, 130), (17, 33, 66)]


def _cases(isa: Isa) -> list[Case]:
    random, found = np.random.default_rng(4), list[Case]()
    for number, (left, right, a, b) in enumerate(_KINDS):
        rows, columns, depth = _SHAPES[number % len(_SHAPES)]
        turned = number % 2 == 0
        x = random.integers(*_LIMITS[left], (2, rows, depth)).astype(left)
        y = random.integers(*_LIMITS[right], (2, columns, depth) if turned else (2, depth, columns)).astype(right)
        strides = (columns * depth, 1, depth) if turned else (columns * depth, columns, 1)
        kernel = ByteProducts(
            isa, (2,), rows, columns, depth, (rows * depth, depth), strides, (rows * columns, columns),
            Epilogue(operand(0, "int32")), dtypes=(left, right), zeros=(a, b),
        )  # fmt: skip
        wide = [x.astype(np.int64) - a, (y.swapaxes(1, 2) if turned else y).astype(np.int64) - b]
        if kernel.reads(strides):
            found.append(Case(f"{left}-{right}", kernel, [x, y], np.matmul(*wide).astype(np.int32)))
    return found


@pytest.mark.parametrize("device", sorted(ISAS))
def test_sums_are_exact(device: str, tmp_path: Path) -> None:
    isa = ISAS[device]
    if command_of(isa) is None:
        pytest.skip(f"nothing runs {device} here")
    cases = _cases(isa)
    for case, got in zip(cases, run_all(cases, isa, tmp_path), strict=True):
        check(case, got)


def test_rows_of_a_panel_are_read_by_words_only() -> None:
    isa = next(iter(ISAS.values()))
    kernel = ByteProducts(
        isa, (), 2, 3, 4, (4,), (3, 1), (3,), Epilogue(operand(0, "int32")), dtypes=("uint8", "int8"), zeros=(0, 0)
    )  # fmt: skip
    assert kernel.reads((3, 1))
    assert kernel.reads((1, 4)) == (kernel.multiply.group == 4)
    assert not kernel.reads((6, 2))
