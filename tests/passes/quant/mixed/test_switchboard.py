"""The switchboard computes what a model with these layers replaced computes."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from passes.quant.mixed.models import WIDTH, bound, branches, samples
from small_models import build

from graphopt.reference import Feed, Reference
from graphopt_passes.quant.mixed.switchboard import Switchboard, Trial
from graphopt_passes.quant.sites import Site, find_sites
from graphopt_passes.quant.switches import worst_noise


def feeds() -> list[Feed]:
    return list(samples(count=4).feeds())


def by_name(model: ir.Model) -> dict[str, Site]:
    return {site.name: site for site in find_sites(model)[0]}


def test_with_everything_off_it_is_the_model() -> None:
    model = branches()
    board = Switchboard(model, find_sites(model)[0], bound(model), dynamic={s.key for s in find_sites(model)[0]})
    for feed in feeds():
        np.testing.assert_allclose(board.run(feed, {})["y"], Reference(model).run(feed)["y"], rtol=1e-4, atol=1e-5)


def test_another_weight_does_what_it_does_in_the_model() -> None:
    model, weight = branches(), np.eye(WIDTH, dtype=np.float32)
    site = by_name(model)["quiet2"]
    board = Switchboard(model, find_sites(model)[0], bound(model))
    changed = model.clone()
    changed.graph.initializers["w4"].const_value = ir.tensor(weight, name="w4")
    for feed in feeds():
        got = board.run(feed, {site.key: Trial({0: weight})})["y"]
        np.testing.assert_allclose(got, Reference(changed).run(feed)["y"], rtol=1e-4, atol=1e-5)
    assert "w4" in model.graph.initializers, "the model itself stays as it was"


def test_dynamic_rounding_is_that_of_the_operator() -> None:
    model = branches()
    site = by_name(model)["loud"]
    board = Switchboard(model, [site], bound(model), dynamic={site.key})
    rounded = build(
        f"(float[N,{WIDTH}] x) => (float[N,{WIDTH}] y)",
        "i, s, z = DynamicQuantizeLinear(x)\ny = DequantizeLinear(i, s, z)",
        {},
    )
    for feed in feeds():
        expected = Reference(rounded).run(feed)["y"] @ model.graph.initializers["w1"].const_value.numpy()  # type: ignore[union-attr]
        rest = Reference(tail(model))
        got = board.run(feed, {site.key: Trial(rounded=True)})["y"]
        np.testing.assert_allclose(got, rest.run({**feed, "a": expected})["y"], rtol=1e-3, atol=1e-4)


def tail(model: ir.Model) -> ir.Model:
    """The model behind its first layer, which it takes as an input."""
    copy = model.clone()
    first = copy.graph[0]
    given = ir.Value(name="a", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(["N", WIDTH]))
    copy.graph.inputs.append(given)
    first.outputs[0].replace_all_uses_with(given)
    copy.graph.remove(first, safe=True)
    copy.graph.initializers.pop("w1")
    return copy


def test_layers_that_share_a_weight_change_together() -> None:
    body = "[one] a = MatMul(x, w)\n[two] y = MatMul(a, w)"
    model = build("(float[N,4] x) => (float[N,4] y)", body, {"w": (4, 4)})
    sites = by_name(model)
    board, weight = Switchboard(model, tuple(sites.values()), bound(model)), np.eye(4, dtype=np.float32) * 2
    feed: Feed = {"x": np.arange(8, dtype=np.float32).reshape(2, 4)}
    np.testing.assert_allclose(board.run(feed, {sites["one"].key: Trial({0: weight})})["y"], feed["x"] * 4)


def test_weights_inside_of_a_branch_are_fed_from_outside() -> None:
    text = """<ir_version: 8, opset_import: ["" : 17]>
    g (float[N,4] x, bool c) => (float[N,4] y) {
      [choice] y = If(c) <
        then_branch = t () => (float[N,4] p) <float[4,4] w> { [inner] p = MatMul(x, w) },
        else_branch = e () => (float[N,4] q) { q = Identity(x) }
      >
    }"""
    text = text.replace("<float[4,4] w>", "<float[4,4] w = {1,0,0,0, 0,1,0,0, 0,0,1,0, 0,0,0,1}>")
    model = ir.from_onnx_text(text)
    sites = by_name(model)
    board = Switchboard(model, tuple(sites.values()), bound(model))
    feed: Feed = {"x": np.ones((2, 4), np.float32), "c": np.array(True)}
    twice = {sites["inner"].key: Trial({0: 2 * np.eye(4, dtype=np.float32)})}
    np.testing.assert_allclose(board.run(feed, {})["y"], 1)
    np.testing.assert_allclose(board.run(feed, twice)["y"], 2)


@pytest.mark.parametrize(("noise", "ratio"), [(0.0, 0.0), (1.0, 0.25)])
def test_noise_is_that_of_the_worst_float_output(noise: float, ratio: float) -> None:
    exact: Feed = {"a": np.full(4, 2.0, np.float32), "b": np.ones(4, np.float32), "ids": np.arange(4)}
    got: Feed = {"a": exact["a"] + np.float32(noise), "b": exact["b"], "ids": np.zeros(4, np.int64)}
    assert worst_noise(exact, got) == pytest.approx(ratio)


def test_an_output_that_is_no_number_any_more_is_as_bad_as_can_be() -> None:
    assert worst_noise({"a": np.ones(2, np.float32)}, {"a": np.array([1, np.nan], np.float32)}) == 1e9
