"""Removal inside and across If, Loop and Scan: channels that are zero leave, and no output changes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from small_models import IMAGE, Shape, assert_removal_is_exact, build, channel_groups, context, feeds

from graphopt.analyses import ChannelGroup
from graphopt.calibration import Dataset, open_calibration
from graphopt.model_io import ShapeBinding, input_specs, load_model
from graphopt.runner import run_pass
from graphopt.structure import interface, verify
from graphopt.testing import check_pass
from graphopt_passes.prune import Prune

CHOICE = "(float[N,3,8,8] x, bool c) => (float[N,5] y)"
HEAD = "g = GlobalAveragePool(%s) f = Flatten(g) [last] y = Gemm<transB=1>(f, head)"
TURNS = "count = Constant<value_int=3>() go = Constant<value = bool {1}>()"


def remove_from_all(model: ir.Model) -> tuple[ChannelGroup, ...]:
    """Take units out of every free group, all at once; returns the groups."""
    expected = interface(model)
    groups = channel_groups(model).free
    removals = [(g, [g.units - 1] if g.units < 4 else [0, g.units - 2]) for g in groups if g.units > 1]
    assert removals
    assert_removal_is_exact(model, removals)
    verify(model, expected)
    return groups


def producers(groups: tuple[ChannelGroup, ...]) -> set[tuple[str, ...]]:
    return {group.producers for group in groups}


def graph_of(model: ir.Model, value: str) -> ir.Graph:
    """The graph that computes a value."""
    return next(graph for graph in model.graphs() for node in graph if node.outputs[0].name == value)


def sink(model: ir.Model, name: str, beside: str) -> ir.Value:
    """Move an initializer into the graph that computes a value."""
    value = model.graph.initializers.pop(name)
    graph_of(model, beside).register_initializer(value)
    return value


def sink_as_node(model: ir.Model, name: str, beside: str) -> None:
    """Turn an initializer into a Constant node of the graph that computes a value."""
    value, graph = model.graph.initializers.pop(name), graph_of(model, beside)
    node = ir.node("Constant", [], {"value": value.const_value})
    node.outputs[0].name = name
    graph.insert_before(graph[0], node)
    value.replace_all_uses_with(node.outputs[0])


BRANCHES: dict[str, tuple[str, dict[str, Shape], set[tuple[str, ...]]]] = {
    "both branches make channels": (
        """
        [stem] a = Conv<pads=[1,1,1,1]>(x, w1, b1)
        [choice] b = If(c) <
            then_branch = then () => (float[N,6,8,8] t) { [left] p = Conv(a, w2) q = Relu(p) [two] t = Conv(q, w3) },
            else_branch = other () => (float[N,6,8,8] e) { [right] e = Conv(a, w4) }>
        """,
        {"w2": (5, 8, 1, 1), "w3": (6, 5, 1, 1), "w4": (6, 8, 1, 1)},
        {("stem",), ("left",), ("two", "right")},
    ),
    "one branch passes on what it captures": (
        """
        [stem] a = Conv<pads=[1,1,1,1]>(x, w1, b1)
        [choice] b = If(c) <
            then_branch = then () => (t) { t = Identity(a) },
            else_branch = other () => (e) { [branch] r = Conv(a, w2) e = Add(r, a) }>
        """,
        {"w2": (8, 8, 1, 1), "head": (5, 8)},
        {("stem", "branch")},
    ),
    "an If inside an If": (
        """
        d = Not(c)
        [stem] a = Conv<pads=[1,1,1,1]>(x, w1, b1)
        [choice] b = If(c) <
            then_branch = then () => (t) { [in] p = Conv(a, w2)
                [inner] q = If(d) <
                    then_branch = one () => (u) { [deep] u = Conv(p, w3) },
                    else_branch = two () => (v) { v = Relu(p) }> t = Add(p, q) },
            else_branch = other () => (e) { [right] e = Conv(a, w4) }>
        """,
        {"w2": (6, 8, 1, 1), "w3": (6, 6, 1, 1), "w4": (6, 8, 1, 1)},
        {("stem",), ("in", "deep", "right")},
    ),
    "branches that use the same names": (
        """
        [stem] a = Conv<pads=[1,1,1,1]>(x, w1, b1)
        [choice] b = If(c) <
            then_branch = then () => (t) { [in] p = Conv(a, w2) q = Relu(p) [out] t = Conv(q, w3) },
            else_branch = other () => (t) { [in] p = Conv(a, w4) q = Sigmoid(p) [out] t = Conv(q, w5) }>
        """,
        {"w2": (4, 8, 1, 1), "w3": (6, 4, 1, 1), "w4": (7, 8, 1, 1), "w5": (6, 7, 1, 1)},
        {
            ("stem",), ("choice/then_branch/in",), ("choice/else_branch/in",),
            ("choice/then_branch/out", "choice/else_branch/out"),
        },
    ),
    "a weight that both branches and the main graph read": (
        """
        [stem] a = Conv<pads=[1,1,1,1]>(x, w1, b1) [again] s = Conv(a, w2)
        [choice] b = If(c) <
            then_branch = then () => (t) { [left] t = Conv(s, w2) },
            else_branch = other () => (e) { [right] e = Conv(a, w2) }>
        """,
        {"w2": (8, 8, 1, 1), "head": (5, 8)},
        {("stem", "again", "left", "right")},
    ),
    "sizes stated and sizes read inside a branch": (
        """
        [stem] a = Conv<pads=[1,1,1,1]>(x, w1, b1)
        [choice] b = If(c) <
            then_branch = then () => (t) {
                parts = Constant<value_ints=[4,4]>() l, r = Split<axis=1>(a, parts) k = Sigmoid(r) m = Mul(l, k)
                flat = Constant<value_ints=[-1,4,64]>() n = Reshape(m, flat) s = Shape(m) t = Reshape(n, s) },
            else_branch = other () => (e) {
                from = Constant<value_ints=[0]>() to = Constant<value_ints=[4]>() at = Constant<value_ints=[1]>()
                e = Slice(a, from, to, at) }>
        """,
        {"head": (5, 4)},
        {("stem",)},
    ),
    "a shape that comes out of either branch": (
        """
        [stem] a = Conv<pads=[1,1,1,1]>(x, w1, b1) [two] d = Conv<pads=[1,1,1,1]>(x, w2)
        [choice] s = If(c) <
            then_branch = then () => (int64[4] t) { t = Shape(a) },
            else_branch = other () => (int64[4] e) { e = Shape(d) }>
        flat = Constant<value_ints=[0,0,-1]>() m = Reshape(a, flat) n = Reshape(m, s) b = Add(n, d)
        """,
        {"w2": (8, 3, 3, 3), "head": (5, 8)},
        {("stem", "two")},
    ),
    "depthwise convolutions and norms inside": (
        """
        [stem] a = Conv<pads=[1,1,1,1]>(x, w1, b1)
        [choice] b = If(c) <
            then_branch = then () => (t) {
                [deep] p = Conv<group=8,pads=[1,1,1,1]>(a, w2) t = BatchNormalization(p, n1, n2, n3, var) },
            else_branch = other () => (e) { [wide] e = Conv<group=2>(a, w3) }>
        """,
        {"w2": (8, 1, 3, 3), "n1": (8,), "n2": (8,), "n3": (8,), "var": (8,), "w3": (8, 4, 1, 1), "head": (5, 8)},
        {("stem", "deep", "wide")},
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BRANCHES)
def test_removal_in_and_around_an_if_is_exact(case: str) -> None:
    body, weights, expected = BRANCHES[case]
    shared: dict[str, Shape] = {"w1": (8, 3, 3, 3), "b1": (8,), "head": (5, 6)}
    model = build(CHOICE, body + HEAD % "b", {**shared, **weights})
    assert {bool(feed["c"]) for feed in feeds(model)} == {True, False}, "both branches are taken"
    assert producers(remove_from_all(model)) == expected


LOOPS: dict[str, tuple[str, dict[str, Shape], set[tuple[str, ...]]]] = {
    "a state of channels": (
        """
        [stem] a = Conv<pads=[1,1,1,1]>(x, w1)
        [loop] b = Loop(count, go, a) <
            body = body (int64 i, bool in, float[N,8,8,8] h) => (bool out, float[N,8,8,8] n) {
            out = Identity(in) [conv] k = Conv(h, w2) r = Relu(k) n = Add(h, r) }>
        """,
        {"w2": (8, 8, 1, 1), "head": (5, 8)},
        {("stem", "conv")},
    ),
    "a state whose shape nobody wrote down": (
        """
        [stem] a = Conv<pads=[1,1,1,1]>(x, w1)
        [loop] b = Loop(count, go, a) <body = body (int64 i, bool in, float[] h) => (bool out, float[] n) {
            out = Identity(in) [down] k = Conv(h, w2) r = Relu(k) [up] u = Conv(r, w3) n = Add(h, u) }>
        """,
        {"w2": (4, 8, 1, 1), "w3": (8, 4, 1, 1), "head": (5, 8)},
        {("stem", "up"), ("down",)},
    ),
    "what each turn gives out": (
        """
        zero = Constant<value_ints=[0]>()
        [stem] a = Conv<pads=[1,1,1,1]>(x, w1)
        [loop] l, s = Loop(count, go, a) <
            body = body (int64 i, bool in, float[] h) => (bool out, float[] n, float[] o) {
            out = Identity(in) [conv] k = Conv(h, w2) n = Add(h, k) [given] o = Conv(n, w3) }>
        m = ReduceSum<keepdims=0>(s, zero) [join] q = Conv(l, w4) b = Add(m, q)
        """,
        {"w2": (8, 8, 1, 1), "w3": (6, 8, 1, 1), "w4": (6, 8, 1, 1)},
        {("stem", "conv"), ("given", "join")},
    ),
    "a value from outside": (
        """
        [stem] a = Conv<pads=[1,1,1,1]>(x, w1) [more] d = Conv(a, w2)
        [loop] b = Loop(count, go, start) <body = body (int64 i, bool in, float[] h) => (bool out, float[] n) {
            out = Identity(in) t = Add(h, d) [conv] k = Conv(t, w3) n = Add(k, h) }>
        """,
        {"w2": (6, 8, 1, 1), "w3": (6, 6, 1, 1), "start": (1, 6, 1, 1)},
        {("stem",), ("more", "conv")},
    ),
    "a start that is a constant": (
        """
        [stem] a = Conv<pads=[1,1,1,1]>(x, w1) p = GlobalAveragePool(a)
        [loop] v = Loop(count, go, start) <body = body (int64 i, bool in, float[] h) => (bool out, float[] n) {
            out = Identity(in) [conv] k = Conv(h, w2) n = Tanh(k) }>
        b = Mul(a, v)
        """,
        {"w2": (8, 8, 1, 1), "start": (1, 8, 1, 1), "head": (5, 8)},
        {("stem", "conv")},
    ),
    "a loop inside a loop": (
        """
        [stem] a = Conv<pads=[1,1,1,1]>(x, w1)
        [outer] b = Loop(count, go, a) <body = body (int64 i, bool in, float[] h) => (bool out, float[] n) {
            out = Identity(in)
            [inner] u = Loop(count, go, h) <body = deep (int64 j, bool yes, float[] g) => (bool no, float[] m) {
                no = Identity(yes) [conv] k = Conv(g, w2) m = Add(g, k) }>
            [last_in] k = Conv(u, w3) n = Add(k, h) }>
        """,
        {"w2": (8, 8, 1, 1), "w3": (8, 8, 1, 1), "head": (5, 8)},
        {("stem", "conv", "last_in")},
    ),
    "as many turns as there are channels": (
        """
        one = Constant<value_int=1>()
        [stem] a = Conv<pads=[1,1,1,1]>(x, w1) s = Shape(a) turns = Gather(s, one)
        [loop] b = Loop(turns, go, a) <body = body (int64 i, bool in, float[] h) => (bool out, float[] n) {
            out = Identity(in) [conv] k = Conv(h, w2) n = Tanh(k) }>
        """,
        {"w2": (8, 8, 1, 1), "head": (5, 8)},
        {("stem", "conv")},
    ),
    "a loop inside a branch": (
        """
        [stem] a = Conv<pads=[1,1,1,1]>(x, w1)
        mean = ReduceMean<keepdims=0>(x) zero = Constant<value=float {0}>() c = Less(mean, zero)
        [choice] b = If(c) <
            then_branch = then () => (t) {
                t = Loop(count, go, a) <body = deep (int64 j, bool yes, float[] q) => (bool no, float[] m) {
                    no = Identity(yes) [conv] k = Conv(q, w2) m = Add(q, k) }> },
            else_branch = other () => (e) { [right] e = Conv(a, w3) }>
        """,
        {"w2": (8, 8, 1, 1), "w3": (8, 8, 1, 1), "head": (5, 8)},
        {("stem", "conv", "right")},
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", LOOPS)
def test_removal_in_and_around_a_loop_is_exact(case: str) -> None:
    body, weights, expected = LOOPS[case]
    model = build(IMAGE, TURNS + body + HEAD % "b", {"w1": (8, 3, 3, 3), "head": (5, 6), **weights})
    assert producers(remove_from_all(model)) == expected


SCANS: dict[str, tuple[str, str, dict[str, Shape], set[tuple[str, ...]]]] = {
    "a recurrent cell": (
        """
        [embed] e = MatMul(x, w1)
        [scan] last, all = Scan<num_scan_inputs=1,
            body = cell (float[7,6] h, float[7,6] s) => (float[7,6] n, float[7,4] o) {
            [recur] k = MatMul(h, w2) m = Add(k, s) n = Tanh(m) [give] o = MatMul(n, w3) }>(start, e)
        [head] y = MatMul(all, w4)
        """,
        "(float[5,7,3] x) => (float[5,7,2] y)",
        {"w1": (3, 6), "w2": (6, 6), "w3": (6, 4), "w4": (4, 2), "start": (7, 6)},
        {("embed", "recur"), ("give",)},
    ),
    "elements along other axes, backwards": (
        """
        [embed] e = MatMul(x, w1)
        [scan] last, all = Scan<num_scan_inputs=1, scan_input_axes=[1], scan_output_axes=[-1],
            scan_input_directions=[1], scan_output_directions=[1],
            body = cell (float[5,6] h, float[5,6] s) => (float[5,6] n, float[5,4] o) {
            [recur] k = MatMul(h, w2) m = Add(k, s) n = Tanh(m) [give] o = MatMul(n, w3) }>(start, e)
        turned = Transpose<perm=[0,2,1]>(all) [head] p = MatMul(turned, w4) [tail] t = MatMul(last, w5)
        one = Constant<value_ints=[1]>() u = Unsqueeze(t, one) y = Add(p, u)
        """,
        "(float[5,7,3] x) => (float[5,7,2] y)",
        {"w1": (3, 6), "w2": (6, 6), "w3": (6, 4), "w4": (4, 2), "w5": (6, 2), "start": (5, 6)},
        {("embed", "recur"), ("give",)},
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", SCANS)
def test_removal_in_and_around_a_scan_is_exact(case: str) -> None:
    body, signature, weights, expected = SCANS[case]
    model = build(signature, body, weights)
    assert producers(remove_from_all(model)) == expected


@pytest.mark.parametrize("move", [sink, sink_as_node])
def test_weights_of_a_subgraph_are_sliced_where_they_are(move: Callable[[ir.Model, str, str], object]) -> None:
    body, weights, expected = BRANCHES["both branches make channels"]
    model = build(CHOICE, body + HEAD % "b", {"w1": (8, 3, 3, 3), "b1": (8,), "head": (5, 6), **weights})
    for name in ("w2", "w3"):
        move(model, name, "t")
    move(model, "w4", "e")
    assert producers(remove_from_all(model)) == expected
    assert set(model.graph.initializers) == {"w1", "b1", "head"}


def test_constants_of_branches_that_share_a_name_are_told_apart() -> None:
    body, weights, expected = BRANCHES["branches that use the same names"]
    model = build(CHOICE, body + HEAD % "b", {"w1": (8, 3, 3, 3), "b1": (8,), "head": (5, 6), **weights})
    then, other = (graph for graph in model.graphs() if graph is not model.graph)
    for graph, names in ((then, ("w2", "w3")), (other, ("w4", "w5"))):
        for new, name in zip(("first", "second"), names, strict=True):
            value = model.graph.initializers.pop(name)
            value.name = new
            graph.register_initializer(value)
    assert producers(remove_from_all(model)) == expected


def test_a_size_stated_inside_a_branch_is_restated_there() -> None:
    body, weights, _ = BRANCHES["sizes stated and sizes read inside a branch"]
    model = build(CHOICE, body + HEAD % "b", {"w1": (8, 3, 3, 3), "b1": (8,), **weights})
    remove_from_all(model)
    split = next(node for node in model.graph.all_nodes() if node.op_type == "Split")
    parts = split.inputs[1]
    assert parts is not None and parts.const_value is not None
    np.testing.assert_array_equal(parts.const_value.numpy(), [2, 2])
    assert parts.graph is split.graph, "the new constant stands where it is read"


def test_recorded_shapes_of_subgraphs_follow() -> None:
    body, weights, _ = LOOPS["a state of channels"]
    model = build(IMAGE, TURNS + body + HEAD % "b", {"w1": (8, 3, 3, 3), **weights})
    remove_from_all(model)
    inner = graph_of(model, "n")
    assert [str(value.shape) for value in (inner.inputs[2], inner.outputs[1])] == ["[N,6,8,8]"] * 2


def calibration(model: ir.Model, count: int = 40) -> Dataset:
    rng = np.random.default_rng(3)
    arrays = {"x": rng.standard_normal((count, 3, 8, 8)).astype(np.float32)}
    if any(value.name == "c" for value in model.graph.inputs):
        arrays["c"] = np.arange(count) % 2 == 0
    return open_calibration(arrays, input_specs(model), ShapeBinding(dims={"N": 1}))


PASSES = {
    "an If": (CHOICE, *BRANCHES["both branches make channels"][:2]),
    "equal names": (CHOICE, *BRANCHES["branches that use the same names"][:2]),
    "a Loop": (IMAGE, TURNS + LOOPS["what each turn gives out"][0], LOOPS["what each turn gives out"][1]),
}


@pytest.mark.parametrize("data", [False, True])
@pytest.mark.parametrize("case", PASSES)
def test_prune_keeps_its_contract_on_models_with_subgraphs(case: str, data: bool) -> None:
    signature, body, weights = PASSES[case]
    shared: dict[str, Shape] = {"w1": (8, 3, 3, 3), "b1": (8,), "head": (5, 6)}
    model = build(signature, body + HEAD % "b", {**shared, **weights})
    samples = calibration(model) if data else None
    result = check_pass(Prune(ratio=0.3), model, calibration=samples, binding=ShapeBinding(dims={"N": 1}))
    assert 0.15 < float(result.metrics["achieved"]) < 0.45
    refits = [change for change in result.changes if "refitted" in change.action]
    assert bool(refits) == data
    assert any("not refitted: inside the subgraph of" in change.action for change in refits) == data


def test_layers_behind_a_subgraph_are_refitted() -> None:
    body, weights, _ = BRANCHES["both branches make channels"]
    after = "[after] z = Conv(b, w5)" + HEAD % "z"
    shared: dict[str, Shape] = {"w1": (8, 3, 3, 3), "b1": (8,), "w5": (7, 6, 1, 1), "head": (5, 7)}
    model = build(CHOICE, body + after, {**shared, **weights})
    ctx = context(model, calibration=calibration(model), binding=ShapeBinding(dims={"N": 1}))
    changes = run_pass(Prune(ratio=0.4, only=("stem", "left", "two")), ctx).result.changes
    sites = {change.site: change.action for change in changes if "refitted" in change.action}
    assert "not refitted: inside the subgraph of If 'choice'" in sites["left"]
    assert "inside the subgraph" not in sites["after"]


def test_a_branch_that_no_sample_takes_is_not_emptied() -> None:
    body, weights, _ = BRANCHES["both branches make channels"]
    shared: dict[str, Shape] = {"w1": (8, 3, 3, 3), "b1": (8,), "head": (5, 6)}
    wider: dict[str, Shape] = {"w2": (40, 8, 1, 1), "w3": (6, 40, 1, 1)}
    model = build(CHOICE, body + HEAD % "b", {**shared, **weights, **wider})
    arrays = {"x": np.random.default_rng(3).standard_normal((40, 3, 8, 8)).astype(np.float32), "c": np.zeros(40, bool)}
    binding = ShapeBinding(dims={"N": 1})
    ctx = context(model, calibration=open_calibration(arrays, input_specs(model), binding), binding=binding)
    changes = run_pass(Prune(ratio=0.3, scope="sensitivity"), ctx).result.changes
    left = next(change for change in changes if change.site == "left")
    assert int(left.details.get("channels_after", 40)) > 5


@pytest.mark.parametrize("case", ["silero_vad_op15", "silero_vad_op18"])
def test_a_real_model_with_subgraphs_is_pruned(case: str, zoo: Callable[[str], Path]) -> None:
    model = load_model(zoo(case) / "model.onnx")
    binding = ShapeBinding(shapes={"input": (1, 576), "state": (2, 1, 128)})
    result = check_pass(Prune(ratio=0.3), model, binding=binding, feeds=1)
    assert result.metrics["achieved"] == pytest.approx(0.3, abs=0.02)
    reasons = [change.action for change in result.changes if not change.done]
    assert any(word in reason for reason in reasons for word in ("pinned by", "reaches graph"))
