"""Kernels of any shape on every kind of CPU equal NumPy; `benchmarks/kernel_fuzz.py` draws thousands of the same."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from kernel_case import Case, check, drawn
from kernel_cases import FAMILIES
from kernel_program import ISAS, ProgramError, command_of, run_all

from graphopt_backends.kernels.reduce import Reduce

_CASES = 2
"""Of each family on each CPU."""


@pytest.mark.parametrize("device", ISAS)
def test_kernels_of_any_shape_equal_numpy(device: str, tmp_path: Path) -> None:
    isa = ISAS[device]
    if command_of(isa) is None:
        pytest.skip(f"nothing here compiles for {device} and runs it")
    number = list(ISAS).index(device)
    cases = [case for family in FAMILIES.values() for case in drawn(family(isa), _CASES + 1, number)[1:]]
    for case, got in zip(cases, run_all(cases, isa, tmp_path), strict=True):
        check(case, got)


def test_a_kernel_that_reads_behind_its_operand_is_found_out(tmp_path: Path) -> None:
    isa = next((isa for isa in ISAS.values() if command_of(isa) is not None), None)
    if isa is None:
        pytest.skip("nothing here runs any of the CPUs")
    short = Case("f32", Reduce(isa, "sum", 1, 5000, 1), [np.ones(5, np.float32)], np.zeros((1, 1), np.float32))
    with pytest.raises(ProgramError, match="case 0: signal 11: Reduce"):
        run_all([short], isa, tmp_path)
