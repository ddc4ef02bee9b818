"""Elements named by coordinates, constant or computed, are found and written as ONNX Runtime does."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from kernel_runner import runnable
from network_runner import run_network
from onnx import TensorProto, helper, numpy_helper

from graphopt.reference import Reference
from graphopt.targets import Isa
from graphopt_backends.network.scatter import even_steps

ISAS = runnable()
pytestmark = pytest.mark.skipif(not ISAS, reason="this CPU runs none of the kernels")

_RANDOM = np.random.default_rng(3)
_SHAPE = (5, 4, 6)


def _model(operator: str, indices: np.ndarray, updates: tuple[int, ...] | None, fixed: bool, **attributes: object):
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, _SHAPE)]
    held = [numpy_helper.from_array(indices, "i")] if fixed else []
    if not fixed:
        inputs.append(helper.make_tensor_value_info("i", TensorProto.INT64, indices.shape))
    if updates is not None:
        inputs.append(helper.make_tensor_value_info("u", TensorProto.FLOAT, updates))
    node = helper.make_node(operator, ["x", "i", *(["u"] if updates is not None else [])], ["y"], **attributes)
    output = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    graph = helper.make_graph([node], "g", inputs, [output], held)
    return ir.from_proto(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9))


def _compare(
    isa: Isa, operator: str, indices: np.ndarray, updates: tuple[int, ...] | None, **attributes: object
) -> None:
    for fixed in (True, False):
        model = _model(operator, indices, updates, fixed, **attributes)
        feed = {"x": _RANDOM.standard_normal(_SHAPE).astype(np.float32)}
        if not fixed:
            feed["i"] = indices
        if updates is not None:
            feed["u"] = _RANDOM.standard_normal(updates).astype(np.float32)
        expected = Reference(model.clone(), threads=1).run(feed)["y"]
        got, _ = run_network(model, isa, feed)
        np.testing.assert_allclose(got["y"], expected, rtol=1e-6, atol=1e-6, err_msg=f"{operator} {fixed}")


def _coordinates(count: int, depth: int) -> np.ndarray:
    """Different rows, some of their coordinates counted from the end."""
    every = np.stack(np.meshgrid(*(np.arange(n) for n in _SHAPE[:depth]), indexing="ij"), -1).reshape(-1, depth)
    chosen = every[_RANDOM.permutation(len(every))[:count]]
    return np.where(_RANDOM.random(chosen.shape) < 0.5, chosen, chosen - np.array(_SHAPE[:depth])).astype(np.int64)


@pytest.mark.parametrize("isa", ISAS, ids=lambda isa: isa.name)
@pytest.mark.parametrize("depth", [1, 2, 3])
def test_runs_are_gathered_and_scattered(isa: Isa, depth: int) -> None:
    indices = _coordinates(4, depth)
    _compare(isa, "GatherND", indices, None)
    _compare(isa, "ScatterND", indices, (4, *_SHAPE[depth:]))
    _compare(isa, "ScatterND", np.concatenate([indices, indices]), (8, *_SHAPE[depth:]), reduction="add")


@pytest.mark.parametrize("isa", ISAS, ids=lambda isa: isa.name)
def test_runs_of_a_batch_are_gathered(isa: Isa) -> None:
    _compare(isa, "GatherND", _RANDOM.integers(-4, 4, (5, 3, 1)), None, batch_dims=1)


@pytest.mark.parametrize("isa", ISAS, ids=lambda isa: isa.name)
@pytest.mark.parametrize("axis", [0, 1, -1])
def test_elements_are_gathered_and_scattered(isa: Isa, axis: int) -> None:
    size = _SHAPE[axis]
    indices = _RANDOM.permuted(np.broadcast_to(np.arange(size), (*_SHAPE[:2], size)), axis=-1)[:3, :3]
    indices = np.moveaxis(indices, -1, axis)[tuple(slice(0, n) for n in _SHAPE)] - size
    _compare(isa, "GatherElements", indices, None, axis=axis)
    _compare(isa, "ScatterElements", indices, indices.shape, axis=axis)
    for reduction in ("add", "max"):
        _compare(isa, "ScatterElements", indices, indices.shape, axis=axis, reduction=reduction)


@pytest.mark.parametrize("isa", ISAS, ids=lambda isa: isa.name)
def test_a_box_of_constant_coordinates_needs_no_numbers(isa: Isa) -> None:
    box = np.stack(np.meshgrid(np.arange(1, 4), np.arange(0, 4, 2), np.arange(5), indexing="ij"), -1).astype(np.int64)
    model = _model("ScatterND", box, box.shape[:-1], True)
    feed = {
        "x": _RANDOM.standard_normal(_SHAPE).astype(np.float32),
        "u": _RANDOM.standard_normal(box.shape[:-1]).astype(np.float32),
    }
    got, ran = run_network(model, isa, feed)
    assert ran == ["Loops", "Loops"]
    np.testing.assert_array_equal(got["y"], Reference(model, threads=1).run(feed)["y"])


def test_numbers_that_are_no_sum_of_steps_are_no_view() -> None:
    assert even_steps(np.array([[3, 5], [10, 12]])) == (3, (7, 2))
    assert even_steps(np.array([[3, 5], [10, 13]])) is None
    assert even_steps(np.array([4])) == (4, (0,))
