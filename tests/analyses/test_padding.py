from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx_ir as ir
from small_models import build, context

from graphopt.analyses import MomentsAnalysis
from graphopt.analyses.padding import PADDING, heeded_rows
from graphopt.calibration import Dataset
from graphopt.reference import Feed

SIGNATURE = "(float[N,T,6] x, float[N,T] keep) => (float[N,5] y)"


def model_of(operator: str) -> ir.Model:
    """Sums what a layer makes over all positions, joined with the mask by an operator."""
    body = f"""
        [a] h = MatMul(x, w)
        last = Constant<value_ints=[2]>() middle = Constant<value_ints=[1]>()
        k = Unsqueeze(keep, last) m = {operator}(h, k) y = ReduceSum<keepdims=0>(m, middle)
    """
    return build(SIGNATURE, body, {"w": (6, 5)})


def samples() -> Dataset:
    def read() -> Iterator[Feed]:
        rng = np.random.default_rng(0)
        for length in (2, 5, 3, 7):
            keep = np.zeros((1, 8), np.float32)
            keep[:, :length] = 1
            yield {"x": rng.standard_normal((1, 8, 6)).astype(np.float32), "keep": keep}

    return Dataset("padded", None, read, stacked=True)


def test_a_mask_is_found_by_what_it_does() -> None:
    model = model_of("Mul")
    assert context(model, calibration=samples()).fact(PADDING) == "keep"


def test_zeros_and_ones_that_hide_nothing_are_no_mask() -> None:
    model = model_of("Add")
    assert context(model, calibration=samples()).fact(PADDING) is None


def test_moments_of_what_is_heeded_leave_padding_out() -> None:
    model = model_of("Mul")
    data = samples()
    kept = np.concatenate([feed["x"][feed["keep"] == 1] for feed in data.feeds()]).astype(np.float64)
    found = MomentsAnalysis(heeded=True).compute(model, context(model, calibration=data)).of("a")
    assert found is not None
    assert found.rows == len(kept) == 17
    np.testing.assert_allclose(found.xx[0], kept.T @ kept, rtol=1e-5)
    plain = MomentsAnalysis().compute(model, context(model, calibration=data)).of("a")
    assert plain is not None
    assert plain.rows == 32


def test_rows_follow_positions_where_axes_lie_between() -> None:
    mask = np.array([[1, 0], [1, 1]])
    assert heeded_rows(12, np.zeros((2, 2, 3, 4)), mask).tolist() == [0, 1, 2, 6, 7, 8, 9, 10, 11]
    assert heeded_rows(8, np.zeros((4, 2, 4)), mask) is None
    assert heeded_rows(4, np.zeros((2, 2, 4)), None) is None
