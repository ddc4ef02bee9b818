from __future__ import annotations

import logging
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from passes.sparse_attention.attention_models import (
    FORMS,
    attention,
    banded_twin,
    distance,
    feeds,
    is_causal,
    rewrite,
)

from graphopt.analyses import SHAPES
from graphopt.analyses.attention import ATTENTION
from graphopt.analyses.shapes import CONCRETE_SHAPES
from graphopt.pass_base import Context
from graphopt.targets import Target
from graphopt.testing import check_pass
from graphopt_passes.sparse_attention import SparseAttention
from graphopt_passes.sparse_attention._patterns import band_of

CAUSAL = tuple(form for form in FORMS if form.startswith("causal"))


@pytest.mark.parametrize("form", FORMS)
def test_a_window_as_wide_as_the_sequence_is_dense_attention(form: str) -> None:
    dense, sparse = attention(form), attention(form)
    result = rewrite(sparse, width=64)
    assert [change.done for change in result.changes] == [True]
    for batch, length in ((1, 64), (3, 37), (2, 5), (1, 1)):
        assert distance(dense, sparse, feeds(dense, batch, length, 4)) < 1e-5


@pytest.mark.parametrize(
    "options", [{"width": 5}, {"width": 20, "global_tokens": 3}, {"width": 4, "pattern": "strided"}]
)
@pytest.mark.parametrize("form", FORMS)
def test_any_pattern_is_dense_attention_with_a_mask_of_its_band(form: str, options: dict[str, Any]) -> None:
    dense, sparse = attention(form), attention(form)
    rewrite(sparse, **options)
    band = band_of(
        options.get("pattern", "window"),
        options["width"],
        causal=is_causal(dense),
        leading=options.get("global_tokens", 0),
    )
    for batch, length in ((1, 64), (3, 71)):
        assert distance(banded_twin(dense, band, length), sparse, feeds(dense, batch, length, 2)) < 1e-5


@pytest.mark.parametrize("form", FORMS)
def test_blocks_one_after_another_compute_the_same(form: str) -> None:
    sparse, looped = attention(form), attention(form)
    rewrite(sparse, width=6, global_tokens=2)
    rewrite(looped, width=6, global_tokens=2, loop=True)
    assert "Loop" in [node.op_type for node in looped.graph]
    for batch, length in ((1, 50), (3, 33)):
        assert distance(sparse, looped, feeds(sparse, batch, length, 2)) < 1e-5


@settings(max_examples=12, deadline=None)
@given(
    form=st.sampled_from(sorted(FORMS)),
    width=st.integers(1, 40),
    leading=st.integers(0, 9),
    length=st.integers(1, 90),
    batch=st.sampled_from((1, 3)),
)
def test_widths_lengths_and_batches_of_any_size_fit(
    form: str, width: int, leading: int, length: int, batch: int
) -> None:
    dense, sparse = attention(form), attention(form)
    rewrite(sparse, width=width, global_tokens=leading)
    band = band_of("window", width, causal=is_causal(dense), leading=leading)
    assert distance(banded_twin(dense, band, length), sparse, feeds(dense, batch, length)) < 1e-5


@pytest.mark.parametrize(
    "form", ["scaled after, padding added", "causal by a triangle", "scaled before, padding hidden"]
)
def test_half_precision_stays_finite_and_close(form: str) -> None:
    dense, sparse = attention(form, kind=np.float16), attention(form, kind=np.float16)
    rewrite(sparse, width=6)
    band = band_of("window", 6, causal=is_causal(dense))
    assert distance(banded_twin(dense, band, 50), sparse, feeds(dense, 3, 50, 4)) < 2e-2


@pytest.mark.parametrize("form", FORMS)
def test_nothing_is_logged_and_no_rank_is_lost(form: str, caplog: pytest.LogCaptureFixture) -> None:
    cases: list[tuple[int | None, dict[str, Any]]] = [(None, {"width": 5}), (512, {"width": 16, "pattern": "strided"})]
    for length, options in cases:
        model = attention(form)
        if length is not None:
            for value in (*model.graph.inputs, *model.graph.outputs):
                value.shape = ir.Shape([2, length, *list(value.shape or ())[2:]])
        assert rewrite(model, **options).modified
        ctx = Context(model, Target(name="ort"))
        ctx.fact(ATTENTION)
        shapes = [ctx.fact(SHAPES), ctx.fact(CONCRETE_SHAPES)]
        values = [value for node in model.graph for value in node.outputs]
        assert [value.name for value in values for each in shapes if each.rank(value) is None] == []
        for value in values:
            dims, dtype = shapes[1].static(value), shapes[1].dtype(value)
            assert dims is not None
            assert dtype is not None
            value.shape, value.dtype = ir.Shape(dims), dtype
        onnx.shape_inference.infer_shapes(ir.to_proto(model), check_type=True, strict_mode=True, data_prop=True)
    assert [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING] == []


def test_causality_is_found_where_it_stands() -> None:
    assert {form: is_causal(attention(form)) for form in FORMS} == {form: form in CAUSAL for form in FORMS}


@pytest.mark.parametrize("form", ["scaled after, padding added", "two heads of keys", "relative bias"])
def test_the_contract_of_a_pass_is_kept(form: str) -> None:
    result = check_pass(SparseAttention(width=8), attention(form))
    assert result.modified
    assert result.metrics == {"attentions": 1, "rewritten": 1}


def test_an_old_operator_set_is_raised() -> None:
    model = attention("no mask", opset=12)
    assert rewrite(model, width=7).modified
    assert model.opset_imports[""] == 13
    band = band_of("window", 7, causal=False)
    assert distance(banded_twin(attention("no mask"), band, 40), model, feeds(model, 2, 40, 4)) < 1e-5
