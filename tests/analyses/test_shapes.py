from __future__ import annotations

import logging

import numpy as np
import pytest
from small_models import context
from text_models import build

from graphopt.analyses import SHAPES
from graphopt.analyses.shapes import CONCRETE_SHAPES
from graphopt.model_io import ShapeBinding


def test_a_node_that_makes_no_sense_leaves_all_others_their_shapes(caplog: pytest.LogCaptureFixture) -> None:
    model = build(
        "m (float[N,4] x, float[3] p, float[5] q) => (float[N,4] z, float[M] b){ y = Relu(x) z = Neg(y) b = Add(p, q) }"
    )
    shapes = context(model).fact(SHAPES)
    assert shapes.shapes["y"] == ("N", 4)
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def test_shapes_that_the_graph_computes_are_seen_while_it_runs() -> None:
    model = build(
        """m (float[N,4] x) => (float[a,b] y) {
        shape = Shape(x)
        sizes = Cast<to=1>(shape)
        wide = Ceil(sizes)
        back = Cast<to=7>(wide)
        turned = Gather(back, order)
        y = Reshape(x, turned)
    }""",
        order=np.array([1, 0]),
    )
    shapes = context(model, binding=ShapeBinding(dims={"N": 6})).fact(CONCRETE_SHAPES)
    assert (shapes.shapes["y"], shapes.shapes["turned"]) == ((4, 6), (2,))
    assert shapes.types["turned"].name == "INT64"
