"""Patterns met in exported networks that no operator's own tests show."""

from __future__ import annotations

import onnx_ir as ir
from small_models import assert_removal_is_exact, build, channel_groups


def test_a_recurrent_layer_that_gives_out_its_last_state_only_is_found_by_that() -> None:
    body = """
        [layer] all, last = GRU<hidden_size=6>(x, w, r, b) one = Constant<value_ints=[0]>()
        state = Squeeze(last, one) y = MatMul(state, head)
    """
    weights = {"w": (1, 18, 3), "r": (1, 18, 6), "b": (1, 36), "head": (6, 5)}
    model = build("(float[T,N,3] x) => (float[N,5] y)", body, weights)
    next(node for node in model.graph if node.op_type == "GRU").outputs[0].name = ""
    (group,) = channel_groups(model).free
    assert group.kind == "hidden units"
    assert_removal_is_exact(model, [(group, [1, 4])])
    layer = next(node for node in model.graph if node.op_type == "GRU")
    assert layer.attributes["hidden_size"] == ir.AttrInt64("hidden_size", 4)


def test_sizes_written_anew_take_names_that_no_node_bears() -> None:
    body = """
        sizes = Shape(x) zero = Constant<value_int=0>() batch = Gather(sizes, zero) first = Constant<value_ints=[0]>()
        n = Unsqueeze(batch, first) eight = Constant<value_ints=[8]>() rest = Constant<value_ints=[-1]>()
        to = Concat<axis=0>(n, eight, rest) back = Concat<axis=0>(n, eight, rest)
        [a] a0 = Conv(x, w1) a1 = Reshape(a0, to) a2 = Relu(a1)
        [b] b0 = Conv(x, w2) b1 = Reshape(b0, back) b2 = Relu(b1)
        s = ReduceMean<keepdims=0,axes=[2]>(a2) t = ReduceMean<keepdims=0,axes=[2]>(b2)
        u = Gemm<transB=1>(s, h1) v = Gemm<transB=1>(t, h2) y = Add(u, v)
    """
    weights = {"w1": (8, 3, 3, 3), "w2": (8, 3, 3, 3), "h1": (5, 8), "h2": (5, 8)}
    model = build("(float[N,3,8,8] x) => (float[N,5] y)", body, weights)
    first, second = [node for node in model.graph if node.op_type == "Reshape"]
    first.name, second.name = "to", "to_input1"
    groups = channel_groups(model).free
    assert [group.name for group in groups] == ["a", "b"]
    assert_removal_is_exact(model, [(groups[0], [0]), (groups[1], [2, 5, 6])])
    stated = [node.inputs[1] for node in model.graph if node.op_type == "Reshape"]
    assert [value.name for value in stated if value is not None] == ["to_input1_1", "to_input1_input1"]
