"""Images are read where a grid says, as ONNX Runtime does."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from kernel_runner import runnable
from network_runner import run_network
from onnx import TensorProto, helper

from graphopt.reference import Reference
from graphopt.targets import Isa

ISAS = runnable()
pytestmark = pytest.mark.skipif(not ISAS, reason="this CPU runs none of the kernels")


@pytest.mark.parametrize("isa", ISAS, ids=lambda isa: isa.name)
@pytest.mark.parametrize(("mode", "channels"), [("linear", 19), ("linear", 1), ("nearest", 5)])
@pytest.mark.parametrize("padding", ["zeros", "border"])
def test_places_inside_and_outside_of_an_image(isa: Isa, mode: str, channels: int, padding: str) -> None:
    shapes = {"x": (2, channels, 5, 7), "g": (2, 4, 6, 2)}
    inputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in shapes.items()]
    nodes = [
        helper.make_node("GridSample", ["x", "g"], [f"y{i}"], mode=mode, padding_mode=padding, align_corners=i)
        for i in (0, 1)
    ]
    outputs = [helper.make_tensor_value_info(f"y{i}", TensorProto.FLOAT, None) for i in (0, 1)]
    graph = helper.make_graph(nodes, "g", inputs, outputs)
    model = ir.from_proto(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9))
    random = np.random.default_rng(channels)
    feed = {"x": random.standard_normal(shapes["x"]), "g": random.uniform(-1.4, 1.4, shapes["g"])}
    feed = {name: array.astype(np.float32) for name, array in feed.items()}
    feed["g"][0, 0, 0] = 50, -70
    expected = Reference(model.clone(), threads=1).run(feed)
    got, _ = run_network(model, isa, feed)
    for name, value in expected.items():
        np.testing.assert_allclose(got[name], value, rtol=1e-5, atol=1e-5, err_msg=name)
