"""Random networks as a whole equal ONNX Runtime; benchmarks/network_fuzz.py runs many more."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from kernel_runner import runnable
from network_cases import drawn
from network_check import check

ISAS = runnable()


@pytest.mark.skipif(not ISAS, reason="the kernels of this machine cannot be tested on it")
@pytest.mark.parametrize("seed", range(30))
def test_a_random_network_gives_what_onnx_runtime_gives(seed: int, tmp_path: Path) -> None:
    case = drawn(seed, most=16)
    finding = check(case, ISAS[seed % len(ISAS)], tmp_path, again=seed % 10 == 0)
    assert finding is None, f"{finding}\n{case.text()}"


def test_a_network_is_drawn_from_its_seed_alone() -> None:
    first, second = (drawn(5) for _ in range(2))
    assert first.text() == second.text()
    for name, tensor in first.tensors.items():
        np.testing.assert_array_equal(tensor.arrays, second.tensors[name].arrays)


def test_a_part_of_a_network_is_given_what_the_rest_made() -> None:
    case = drawn(1)
    last = len(case.steps) - 1
    part = case.part([last])
    assert part.outputs == tuple(name for name in case.steps[last].outputs if name)
    for name, array in part.feed(1).items():
        np.testing.assert_array_equal(array, case.tensors[name].expected(1))
