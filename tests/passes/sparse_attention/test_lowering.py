"""How bands are computed: keys in runs, heads a few at a time, and one kernel for each group where it is compiled."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from kernel_runner import runnable
from network_runner import run_network
from passes.sparse_attention.attention_models import FORMS, HEADS, attention, banded_twin, distance, feeds, rewrite

from graphopt.reference import Reference
from graphopt_passes.sparse_attention._patterns import Kind, band_of, visible
from graphopt_passes.sparse_attention._runs import in_runs


def _kinds(model: ir.Model) -> list[str]:
    return [node.op_type for node in model.graph]


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("width", [5, 20, 64, 100, 200, 256])
def test_a_band_in_runs_shows_the_same_keys(width: int, causal: bool) -> None:
    band = band_of("window", width, causal=causal)
    aligned, size = in_runs(band)
    assert (visible(aligned, 700) == visible(band, 700)).all()
    assert aligned.columns % size == band.rows % size == aligned.offsets[0] % size == 0
    assert aligned.columns <= 1.04 * band.columns


@pytest.mark.parametrize("kind, leading", [("strided", 0), ("window", 3)])
def test_keys_that_are_no_neighbours_are_met_one_by_one(kind: Kind, leading: int) -> None:
    band = band_of(kind, 64, causal=False, leading=leading)
    assert in_runs(band) == (band, 1)


@pytest.mark.parametrize("form", FORMS)
def test_runs_meet_the_keys_of_the_band(form: str) -> None:
    dense, sparse = attention(form), attention(form)
    rewrite(sparse, width=20)
    band = band_of("window", 20, causal=form.startswith("causal"))
    assert in_runs(band)[1] == 4
    for batch, length in ((1, 130), (3, 67)):
        assert distance(banded_twin(dense, band, length), sparse, feeds(dense, batch, length, 2)) < 1e-5


@pytest.mark.parametrize("width, pieces", [(5, 1), (12, HEADS // 2), (200, HEADS)])
def test_wide_bands_are_computed_for_fewer_heads_at_once(width: int, pieces: int) -> None:
    model = attention("scaled after, padding added")
    rewrite(model, width=width)
    assert _kinds(model).count("Softmax") == pieces
    assert _kinds(model).count("Where") == 1  # what a query sees is computed once


@pytest.mark.parametrize("form", ["scaled after, padding added", "relative bias"])
def test_the_band_compiles_into_attention_that_stores_no_scores(form: str) -> None:
    model = attention(form)
    rewrite(model, width=8)
    given = feeds(model, 2, 70, 4)
    expected = [Reference(model).run(feed)["y"] for feed in given]
    for value in model.graph.inputs:
        value.shape = ir.Shape(given[0][str(value.name)].shape)
    for feed, y in zip(given, expected, strict=True):
        found, kernels = run_network(model, runnable()[-1], feed)
        np.testing.assert_allclose(found["y"], y, rtol=1e-4, atol=1e-4)
        assert kernels.count("Attention") == _kinds(model).count("Softmax")
