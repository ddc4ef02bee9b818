from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from small_models import IMAGE, build, channel_groups, context

from graphopt.analyses import CONSTANTS, COST, SHAPES, ChannelGroups
from graphopt.analyses.names import Names
from graphopt.analyses.shapes import CONCRETE_SHAPES
from graphopt.model_io import ShapeBinding, model_bytes

CHOICE = "(float[N,3,8,8] x, bool c) => (float[N,5] y)"
HEAD = "g = GlobalAveragePool(%s) f = Flatten(g) [last] y = Gemm<transB=1>(f, head)"
TURNS = "count = Constant<value_int=3>() go = Constant<value = bool {1}>()"
TWINS = """
    [stem] a = Conv(x, w1)
    [choice] b = If(c) <
        then_branch = then () => (t) { k = Constant<value_floats=[1.0, 2.0]>() [in] p = Conv(a, w2) t = Relu(p) },
        else_branch = other () => (t) { k = Constant<value_floats=[5.0]>() [in] p = Conv(a, w3) t = Tanh(p) }>
"""
TWIN_WEIGHTS = {"w1": (4, 3, 1, 1), "w2": (6, 4, 1, 1), "w3": (6, 4, 3, 3), "head": (5, 6)}


def twins() -> ir.Model:
    body = TWINS.replace("Conv(a, w3)", "Conv<pads=[1,1,1,1]>(a, w3)")
    return build(CHOICE, body + HEAD % "b", TWIN_WEIGHTS)


def loop(inside: str, outputs: str = "float[] n", start: str = "a") -> str:
    return (
        f"[loop] b = Loop(count, go, {start}) "
        f"<body = body (int64 i, bool in, float[] h) => (bool out, {outputs}) {{ out = Identity(in) {inside} }}>"
    )


def pins(groups: ChannelGroups) -> dict[str, str | None]:
    return {group.name: group.pin for group in groups.groups}


def test_names_are_plain_where_they_are_unambiguous_and_say_where_they_stand_elsewhere() -> None:
    model = twins()
    names = Names(model)
    keys = [names.key(value) for value in names.values()]
    assert len(set(keys)) == len(keys)
    assert {"x", "c", "w1", "a", "b", "y", "choice/then_branch/p", "choice/else_branch/p"} <= set(keys)
    assert all(names.value(names.key(value)) is value for value in names.values())
    assert list(names.order())[:3] == ["stem", "choice", "choice/then_branch/Constant_0"]
    again = Names(model.clone())
    assert [again.key(value) for value in again.values()] == keys, "a clone has the same names"


def test_nodes_of_the_main_graph_that_share_a_name_are_told_apart() -> None:
    body = "[one] a = Conv(x, w1) [one] d = Conv(a, w2)" + HEAD % "d"
    model = build(IMAGE, body, {"w1": (4, 3, 1, 1), "w2": (6, 4, 1, 1), "head": (5, 6)})
    assert [group.producers for group in channel_groups(model).groups] == [("one",), ("one_2",), ("last",)]
    assert context(model).fact(COST).macs == 64 * (4 * 3 + 6 * 4) + 6 * 5


def test_facts_about_values_of_equal_name_are_kept_apart() -> None:
    model = twins()
    ctx = context(model)
    then, other = (graph for graph in model.graphs() if graph is not model.graph)
    tensors = [ctx.fact(CONSTANTS).of(graph[0].outputs[0]) for graph in (then, other)]
    assert [tensor.numpy().tolist() for tensor in tensors if tensor is not None] == [[1.0, 2.0], [5.0]]
    assert [ctx.fact(SHAPES).of(graph[1].outputs[0]) for graph in (then, other)] == [("N", 6, 8, 8)] * 2
    assert ctx.fact(COST).nodes["choice/then_branch/in"].macs == 64 * 6 * 4
    assert ctx.fact(COST).nodes["choice/else_branch/in"].macs == 64 * 6 * 4 * 9
    assert [value.name for value in then[1].outputs] == ["p"], "the model keeps its names"


def test_no_fact_changes_the_model() -> None:
    body = TURNS + "[stem] a = Conv(x, w1)" + loop("b0 = Identity(h) k = Add(b0, two) n = Relu(k)") + HEAD % "b"
    body = "two = Constant<value = float {2.0}>() " + body
    model = build(IMAGE, body, {"w1": (4, 3, 1, 1), "head": (5, 4)})
    before = model_bytes(model)
    for fact in (SHAPES, CONCRETE_SHAPES, CONSTANTS, COST):
        context(model).fact(fact)
        assert model_bytes(model) == before
    channel_groups(model)
    assert model_bytes(model) == before


def test_shapes_that_go_round_a_loop_are_found_by_induction() -> None:
    body = TURNS + "[stem] a = Conv(x, w1)" + loop("k = Conv<pads=[1,1,1,1]>(h, w2) n = Add(h, k)") + HEAD % "b"
    model = build(IMAGE, body, {"w1": (4, 3, 1, 1), "w2": (4, 4, 3, 3), "head": (5, 4)})
    inner = next(graph for graph in model.graphs() if graph is not model.graph)
    ctx = context(model)
    for value in (inner.inputs[2], inner.outputs[1], model.graph[3].outputs[0]):
        assert ctx.fact(SHAPES).of(value) == ("N", 4, 8, 8)
        assert ctx.fact(CONCRETE_SHAPES).of(value) == (1, 4, 8, 8)


def test_an_axis_that_grows_from_turn_to_turn_is_open() -> None:
    body = TURNS + "[stem] a = Conv(x, w1)" + loop("n = Concat<axis=3>(h, a)") + HEAD % "b"
    model = build(IMAGE, body, {"w1": (4, 3, 1, 1), "head": (5, 4)})
    inner = next(graph for graph in model.graphs() if graph is not model.graph)
    shape = context(model).fact(SHAPES).of(inner.inputs[2])
    assert shape is not None and shape[:3] == ("N", 4, 8) and not isinstance(shape[3], int)
    assert [group.name for group in channel_groups(model).free] == ["stem"]


def test_channels_that_grow_from_turn_to_turn_are_pinned_by_the_loop() -> None:
    body = TURNS + "[stem] a = Conv(x, w1)" + loop("n = Concat<axis=1>(h, a)") + "r = ReduceSum(b, axes) y = Flatten(r)"
    body = "axes = Constant<value_ints=[1]>()" + body
    model = build("(float[N,3,8,8] x) => (float[N,M] y)", body, {"w1": (4, 3, 1, 1)})
    assert pins(channel_groups(model))["stem"] == "pinned by Loop 'loop'"


def test_a_rank_that_changes_from_turn_to_turn_stays_unknown() -> None:
    body = (
        TURNS
        + "[stem] a = Conv(x, w1) zero = Constant<value_ints=[0]>()"
        + loop("n = Unsqueeze(h, zero)")
        + "s = Shape(b) t = Size(s) y = Cast<to=1>(t)"
    )
    model = build("(float[N,3,8,8] x) => (float y)", body, {"w1": (4, 3, 1, 1)})
    inner = next(graph for graph in model.graphs() if graph is not model.graph)
    assert context(model).fact(SHAPES).of(inner.inputs[2]) is None
    assert pins(channel_groups(model))["stem"] == "pinned by Loop 'loop'"


def test_layers_inside_an_operator_without_a_rule_are_found_and_what_meets_it_is_pinned() -> None:
    body = """
        [stem] a = Conv(x, w1)
        [strange] b = acme.Each(a) <body = body (float[N,4,8,8] h) => (float[N,4,8,8] n)
            <float[N,7,8,8] k, float[N,7,8,8] r> {
            [in] k = Conv(h, w2) r = Relu(k) [out] n = Conv(r, w3) }>
    """
    weights = {"w1": (4, 3, 1, 1), "w2": (7, 4, 1, 1), "w3": (4, 7, 1, 1), "head": (5, 4)}
    model = build(IMAGE, body + HEAD % "b", weights)
    model.opset_imports["acme"] = 1
    found = pins(channel_groups(model))
    assert found == {
        "stem": "pinned by Each 'strange'", "in": None, "out": "pinned by Each 'strange'",
        "last": "reaches graph output 'y'",
    }  # fmt: skip


def test_a_branch_that_gives_other_channels_than_the_other_pins_both() -> None:
    body = """
        [stem] a = Conv(x, w1)
        [choice] b = If(c) <
            then_branch = then () => (t) { [left] t = Conv(a, w2) },
            else_branch = other () => (e) { [right] e = Conv(a, w3) }>
        r = GlobalAveragePool(b) axes = Constant<value_ints=[1,2,3]>() s = ReduceSum<keepdims=0>(r, axes) y = Sqrt(s)
    """
    weights = {"w1": (4, 3, 1, 1), "w2": (6, 4, 1, 1), "w3": (7, 4, 1, 1)}
    model = build("(float[N,3,8,8] x, bool c) => (float[N] y)", body, weights)
    reason = "pinned by If 'choice'"
    assert pins(channel_groups(model)) == {"stem": None, "left": reason, "right": reason}


def test_sequences_that_leave_a_branch_are_pinned() -> None:
    body = """
        [stem] a = Conv(x, w1)
        [choice] q = If(c) <
            then_branch = then () => (seq(float[N,4,8,8]) t) { t = SequenceConstruct(a) },
            else_branch = other () => (seq(float[N,4,8,8]) e) { k = Relu(a) e = SequenceConstruct(k) }>
        zero = Constant<value_int=0>() b = SequenceAt(q, zero)
    """
    model = build(CHOICE, body + HEAD % "b", {"w1": (4, 3, 1, 1), "head": (5, 4)})
    assert pins(channel_groups(model))["stem"] == "pinned by SequenceConstruct 'SequenceConstruct_0'"


def test_what_goes_into_a_function_is_pinned_and_its_layers_are_named() -> None:
    text = """
        <ir_version: 8, opset_import: ["" : 17, "local" : 1]>
        main (float[N,3,8,8] x) => (float[N,5] y) <float[4,3,1,1] w1, float[6,4,1,1] w2, float[5,6] head> {
            [stem] a = Conv(x, w1)
            [call] b = local.Block(a, w2)
            g = GlobalAveragePool(b) f = Flatten(g) y = Gemm<transB=1>(f, head)
        }
        <domain: "local", opset_import: ["" : 17]>
        Block (h, w) => (r) { [inside] k = Conv(h, w) r = Relu(k) }
    """
    proto = onnx.parser.parse_model(text)
    for name, shape in (("w1", (4, 3, 1, 1)), ("w2", (6, 4, 1, 1)), ("head", (5, 6))):
        proto.graph.initializer.append(onnx.numpy_helper.from_array(np.ones(shape, np.float32), name))
    groups = channel_groups(ir.from_proto(proto))
    assert pins(groups)["stem"] == "goes into the function 'Block' that 'call' calls"
    assert groups.elsewhere == {"Block/inside": "inside the function 'Block'"}


@pytest.mark.parametrize("declared", ["float[N,4,8,8] h", "float[M,4,8,8] h"])
def test_costs_inside_a_loop_take_the_sizes_of_the_inputs(declared: str) -> None:
    body = (TURNS + "[stem] a = Conv(x, w1)" + loop("[in] k = Conv(h, w2) n = Add(h, k)") + HEAD % "b").replace(
        "float[] h", declared
    )
    model = build(IMAGE, body, {"w1": (4, 3, 1, 1), "w2": (4, 4, 1, 1), "head": (5, 4)})
    ctx = context(model, binding=ShapeBinding(dims={"N": 2}))
    assert ctx.fact(COST).nodes["in"].macs == 2 * 64 * 16


def test_what_was_written_down_inside_a_subgraph_serves_where_inference_gives_up() -> None:
    body = """
        [stem] a = Conv(x, w1) b = acme.Strange(a)
        [choice] d = If(c) <
            then_branch = then () => (float[N,4,8,8] t) <float[N,4,8,8] s> { s = acme.Odd(b) [in] t = Conv(s, w2) },
            else_branch = other () => (float[N,4,8,8] e) { e = Relu(a) }>
    """
    model = build(CHOICE, body + HEAD % "d", {"w1": (4, 3, 1, 1), "w2": (4, 4, 1, 1), "head": (5, 4)})
    ctx = context(model, binding=ShapeBinding(dims={"N": 2}))
    assert ctx.fact(COST).nodes["in"].macs == 2 * 64 * 16
