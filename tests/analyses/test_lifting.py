"""Values inside subgraphs, seen from outside."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx_ir as ir
import pytest
from small_models import build, context

from graphopt.analyses import SHAPES, RangesAnalysis
from graphopt.analyses.lifting import steady_dimensions, why_hidden
from graphopt.analyses.names import Names
from graphopt.analyses.streaming import expose
from graphopt.calibration import Dataset
from graphopt.reference import Feed, Reference

BRANCHES = """[choose] y = If(c) <
  then_branch = yes () => (float[N,8] a) { h = MatMul(x, w)  a = Relu(h) },
  else_branch = no () => (float[N,8] a) { h = Neg(x)  a = Exp(h) }
>"""
LOOP = """yes = Constant<value = bool {1}>()
[turn] y = Loop(n, yes, x) <body = b (int64 i, bool t, float[N,8] s) => (bool u, float[N,8] o) {
  u = Identity(t)  h = MatMul(s, w)  o = Tanh(h)
}>"""
NESTED = """[choose] y = If(c) <
  then_branch = yes () => (float[N,8] a) {
    go = Constant<value = bool {1}>()
    a = Loop(n, go, x) <body = b (int64 i, bool t, float[N,8] s) => (bool u, float[N,8] o) {
      u = Identity(t)  h = MatMul(s, w)  o = Tanh(h)
    }>
  },
  else_branch = no () => (float[N,8] d) { d = Neg(x) }
>"""
SCAN = """[turn] last, y = Scan<num_scan_inputs = 1, scan_output_directions = [1], body = b (float[8] s, float[8] r)
  => (float[8] p, float[8] q) { h = MatMul(r, w)  p = Add(s, h)  q = Tanh(p) }>(z, x)"""


def branches(body: str = BRANCHES) -> ir.Model:
    return build("(float[N,8] x, bool c) => (float[N,8] y)", body, {"w": (8, 8)})


def loop(body: str = LOOP, signature: str = "(float[N,8] x, int64 n) => (float[N,8] y)") -> ir.Model:
    return build(signature, body, {"w": (8, 8)})


def weight(model: ir.Model) -> np.ndarray:
    tensor = model.graph.initializers["w"].const_value
    assert tensor is not None
    return tensor.numpy()


def seen(model: ir.Model, name: str, feed: Feed) -> np.ndarray:
    """A value as the last output of a model that shows it."""
    copy = expose(model, [name])
    return Reference(copy).run(feed)[copy.graph.outputs[-1].name or ""]


def feed(**more: object) -> Feed:
    x = np.random.default_rng(0).standard_normal((3, 8)).astype(np.float32)
    return {"x": x, **{name: np.array(value) for name, value in more.items()}}


def hidden(model: ir.Model, name: str) -> str:
    shapes = context(model).fact(SHAPES)
    value = shapes.names.value(name)
    assert value is not None
    return why_hidden(value, shapes, steady_dimensions(model))


def test_a_value_of_a_branch_is_seen_where_the_branch_is_taken() -> None:
    model, one, other = branches(), feed(c=True), feed(c=False)
    names = [key for key in (Names(model).key(value) for value in Names(model).values()) if key.endswith("/h")]
    assert names == ["choose/then_branch/h", "choose/else_branch/h"]
    np.testing.assert_allclose(seen(model, names[0], one), one["x"] @ weight(model), rtol=1e-4, atol=1e-5)
    assert seen(model, names[0], other).size == 0
    np.testing.assert_array_equal(seen(model, names[1], other), -other["x"])
    assert not hidden(model, names[0])


def test_the_turns_of_a_loop_are_stacked() -> None:
    model, given = loop(), feed(n=np.int64(4))
    states, expected = given["x"], list[np.ndarray]()
    for _ in range(4):
        expected.append(states @ weight(model))
        states = np.tanh(expected[-1])
    np.testing.assert_allclose(seen(model, "h", given), np.stack(expected), rtol=1e-3, atol=1e-4)
    assert seen(model, "s", given).shape == (4, 3, 8)
    assert seen(model, "h", feed(n=np.int64(0))).size == 0
    assert not hidden(model, "h")


def test_a_loop_in_a_branch_is_seen_through_both() -> None:
    model = loop(NESTED, "(float[N,8] x, int64 n, bool c) => (float[N,8] y)")
    assert seen(model, "h", feed(n=np.int64(2), c=True)).shape == (2, 3, 8)
    assert seen(model, "h", feed(n=np.int64(2), c=False)).size == 0
    assert not hidden(model, "h")


def test_the_turns_of_a_scan_are_stacked_in_order() -> None:
    model = build("(float[N,8] x, float[8] z) => (float[N,8] y)", SCAN, {"w": (8, 8)})
    given = feed(z=np.zeros(8, np.float32))
    np.testing.assert_allclose(seen(model, "h", given), given["x"] @ weight(model), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (
            """yes = Constant<value = bool {1}>()
            y = Loop(n, yes, x) <body = b (int64 i, bool t, float[M,8] s) => (bool u, float[K,8] o) {
              u = Identity(t)  h = Tanh(s)  o = Concat<axis = 0>(s, h)
            }>""",
            "inside a Loop, where the shapes of its values may differ from turn to turn",
        ),
        (
            """yes = Constant<value = bool {1}>()
            y = Loop(n, yes, x) <body = b (int64 i, bool t, float[N,8] s) => (bool u, float[N,8] o) {
              u = Identity(t)
              o = If(t) <then_branch = p () => (float[N,8] k) { h = Tanh(s)  k = Neg(h) },
                         else_branch = q () => (float[N,8] l) { l = Exp(s) }>
            }>""",
            "inside another subgraph in a Loop, whose values cannot be seen",
        ),
    ],
    ids=["growing", "branch in a loop"],
)
def test_what_differs_from_turn_to_turn_is_hidden(body: str, reason: str) -> None:
    assert hidden(loop(body, "(float[N,8] x, int64 n) => (float[L,8] y)"), "h") == reason


def test_ranges_are_those_of_all_turns_and_of_the_branches_taken() -> None:
    model = loop(NESTED, "(float[3,8] x, int64 n, bool c) => (float[3,8] y)")

    def read() -> Iterator[Feed]:
        for turns in (1, 2, 3):
            yield feed(n=np.int64(turns), c=turns != 2)

    ranges = context(model, calibration=Dataset("turns", None, read)).fact(RangesAnalysis(values=("h", "x")))
    assert ranges.histograms["h"].count == (1 + 3) * 24
    assert ranges.histograms["x"].count == 3 * 24
    assert ranges.histograms["h"].low == pytest.approx(float(seen(model, "h", feed(n=np.int64(3), c=True)).min()))
