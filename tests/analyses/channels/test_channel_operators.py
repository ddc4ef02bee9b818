"""What the remaining operators tie, state and pin."""

from __future__ import annotations

import numpy as np
import pytest
from operator_cases import Case, build
from small_models import channel_groups, context

from graphopt.analyses import COST, SHAPES, ChannelGroup, ChannelGroups
from graphopt.analyses.channels.rules.einsum import einsum_labels
from graphopt.analyses.constants import CONSTANTS
from graphopt.analyses.real_weights import real_weight
from graphopt.analyses.shapes import CONCRETE_SHAPES
from graphopt.reference import Reference

IMAGE = "(float[N,3,8,8] x) => (float[N,3] y)"
STEM = """
    zero = Constant<value_ints=[0]>() one = Constant<value_ints=[1]>() minus = Constant<value_ints=[-1]>()
    start = Constant<value_ints=[-1]>() end = Constant<value_ints=[-100]>() first = Constant<value_int=1>()
    [conv] a = Conv<pads=[1,1,1,1]>(x, w1)
"""


def groups_behind(line: str, opset: int = 17, **weights: object) -> ChannelGroups:
    body = f"{STEM} {line} r = Relu(c) k = GlobalAveragePool(x) y = Flatten(k)"
    return channel_groups(build(IMAGE, body, {"w1": (8, 3, 3, 3), **weights}, opset))  # type: ignore[dict-item]


@pytest.mark.parametrize(
    ("line", "operator"),
    [
        ("[it] c = com.microsoft.Inverse(a)", "Inverse"),
        ("[it] c = LRN<size=3>(a)", "LRN"),
        ("[it] c = CumSum(a, first)", "CumSum"),
        ("[it] c, i = TopK<axis=1>(a, one)", "TopK"),
        ("[it] c = GatherElements<axis=1>(a, i)", "GatherElements"),
        ("[it] c = ScatterElements<axis=1>(a, i, u)", "ScatterElements"),
        ("[it] c = GatherND(a, i)", "GatherND"),
        ("[it] c = Compress<axis=1>(a, b)", "Compress"),
        ("[it] c = MeanVarianceNormalization<axes=[1]>(a)", "MeanVarianceNormalization"),
        ("[it] c = NonZero(a)", "NonZero"),
        ('[it] c = Einsum<equation="niii->ni">(a)', "Einsum"),
        ("[it] c = Slice(a, start, end, one, minus)", "Slice"),
        ("[it] c = ReverseSequence<time_axis=1,batch_axis=0>(a, n)", "ReverseSequence"),
        ("[it] c = Unique<axis=1>(a)", "Unique"),
    ],
)
def test_axes_that_an_operator_works_along_stay(line: str, operator: str) -> None:
    weights = {"i": np.zeros((2, 8, 8, 2), np.int64), "u": (2, 8, 8, 2), "b": np.ones(8, bool),
               "n": np.ones(2, np.int64)}  # fmt: skip
    used = {name: value for name, value in weights.items() if f" {name}," in line or f" {name})" in line}
    (group, *_) = groups_behind(line, **used).groups
    assert group.pin == f"pinned by {operator} 'it'"


def test_a_weight_that_is_dequantized_in_blocks_keeps_them() -> None:
    line = "[it] q = DequantizeLinear<axis=1,block_size=4>(wq, scale) c = Conv<pads=[1,1,1,1]>(a, q)"
    weights = {"wq": np.ones((6, 8, 3, 3), np.int8), "scale": (6, 2, 3, 3)}
    conv, second = groups_behind(line, 21, **weights).groups
    assert conv.pin == "pinned by DequantizeLinear 'it'"
    assert second.pin is None
    assert {("wq", 0), ("scale", 0)} <= places(second).keys()


def places(group: ChannelGroup) -> dict[tuple[str, int], int]:
    return {(place.value, place.axis): place.positions.shape[1] for place in group.places}


def test_a_hidden_unit_sits_on_every_gate_in_both_directions() -> None:
    body = """
        r, h, c = LSTM<hidden_size=6,direction="bidirectional">(x, w, r0, b, , h0, c0, p)
        t = Transpose<perm=[0,2,1,3]>(r) to = Constant<value_ints=[0,0,12]>() f = Reshape(t, to) y = MatMul(f, head)
    """
    weights = {"w": (2, 24, 8), "r0": (2, 24, 6), "b": (2, 48), "h0": (2, 3, 6), "c0": (2, 3, 6), "p": (2, 18),
               "head": (12, 5)}  # fmt: skip
    groups = channel_groups(build("(float[7,3,8] x) => (float[7,3,5] y)", body, weights))
    (free,) = groups.free
    assert (free.units, free.kind) == (6, "hidden units")
    expected = {("w", 1): 4, ("r0", 1): 4, ("r0", 2): 1, ("b", 1): 8, ("p", 1): 3, ("h0", 2): 1, ("c0", 2): 1,
                ("head", 0): 2}  # fmt: skip
    assert expected.items() <= places(free).items()
    roles = {(place.value, place.axis): place.role for place in free.places}
    assert (roles["w", 1], roles["r0", 1], roles["r0", 2]) == ("output", "output", "input")
    assert [(table.slot, table.numbers) for table in groups.tables if table.slot == "hidden_size"] == [
        ("hidden_size", (6,))
    ]


def test_a_recurrent_layer_with_batches_first_is_understood() -> None:
    body = """
        r = GRU<hidden_size=6,layout=1>(x, w, r0) to = Constant<value_ints=[0,0,6]>() f = Reshape(r, to)
        y = MatMul(f, head)
    """
    weights = {"w": (1, 18, 8), "r0": (1, 18, 6), "head": (6, 5)}
    (free,) = channel_groups(build("(float[N,7,8] x) => (float[N,7,5] y)", body, weights)).free
    assert places(free)["w", 1] == 3
    assert places(free)["head", 0] == 1


def test_features_that_a_recurrent_layer_reads_can_leave() -> None:
    body = "[one] h = MatMul(x, w1) s = Relu(h) r, y = RNN<hidden_size=6>(s, w, r0)"
    weights = {"w1": (8, 4), "w": (1, 6, 4), "r0": (1, 6, 6)}
    one, cells = channel_groups(build("(float[7,N,8] x) => (float[1,N,6] y)", body, weights)).groups
    assert one.pin is None
    assert places(one)["w", 2] == 1
    assert cells.pin == "reaches graph output 'y'"


def test_a_mixture_keeps_as_many_experts_as_it_uses() -> None:
    body = "[router] g = MatMul(x, w0) [moe] y = com.microsoft.MoE<k=3>(x, g, w1, , w2)"
    weights = {"w0": (16, 8), "w1": (8, 12, 16), "w2": (8, 16, 12)}
    groups = channel_groups(build("(float[N,16] x) => (float[N,16] y)", body, weights))
    experts = next(group for group in groups.free if group.kind == "experts")
    assert (experts.units, experts.least) == (8, 3)


def test_a_dequantized_weight_of_a_residual_layer_keeps_its_roles_apart() -> None:
    line = "[two] q = DequantizeLinear<axis=0>(wq, scale) d = Conv(a, q) c = Add(a, d)"
    weights = {"wq": np.ones((8, 8, 1, 1), np.int8), "scale": (8,)}
    (free,) = groups_behind(line, **weights).free
    roles = {(place.value, place.axis): place.role for place in free.places if place.constant}
    assert (roles["wq", 0], roles["wq", 1], roles["scale", 0]) == ("output", "input", "other")


@pytest.mark.parametrize(
    ("equation", "ranks", "expected"),
    [
        ("ij,jk->ik", (2, 2), ((("i", "j"), ("j", "k")), ("i", "k"))),
        ("ij, jk", (2, 2), ((("i", "j"), ("j", "k")), ("i", "k"))),
        ("...j,jk->...k", (3, 2), (((".2", ".1", "j"), ("j", "k")), (".2", ".1", "k"))),
        ("b...,...b", (2, 2), ((("b", ".1"), (".1", "b")), (".1",))),
        ("ij->i", (3,), None),
        ("i,j->ij", (1,), None),
    ],
)
def test_equations_name_axes(equation: str, ranks: tuple[int, ...], expected: object) -> None:
    assert einsum_labels(equation, ranks) == expected


FOREIGN = {
    "Gelu": ("com.microsoft.Gelu(x)", {}),
    "BiasGelu": ("com.microsoft.BiasGelu(x, b)", {"b": (8,)}),
    "FusedMatMul": ("com.microsoft.FusedMatMul<transB=1>(x, w)", {"w": (6, 8)}),
    "MatMulNBits": (
        "com.microsoft.MatMulNBits<K=8,N=6,bits=4,block_size=16>(x, w, s)",
        {"w": np.zeros((6, 1, 8), np.uint8), "s": (6,)},
    ),
    "DynamicQuantizeMatMul": (
        "com.microsoft.DynamicQuantizeMatMul(x, w, s)", {"w": np.zeros((8, 6), np.int8), "s": np.ones(1, np.float32)}
    ),
    "Attention": ("com.microsoft.Attention<num_heads=2>(x, w, b)", {"w": (8, 12), "b": (12,)}),
    "MultiHeadAttention": ("com.microsoft.MultiHeadAttention<num_heads=2>(x, x, x)", {}),
    "RotaryEmbedding": (
        "com.microsoft.RotaryEmbedding(x, p, c, c)", {"p": np.zeros(1, np.int64), "c": (9, 2)}
    ),
    "SkipLayerNormalization": ("com.microsoft.SkipLayerNormalization(x, x, b)", {"b": (8,)}),
    "SimplifiedLayerNormalization": ("SimplifiedLayerNormalization(x, b)", {"b": (8,)}),
}  # fmt: skip


@pytest.mark.parametrize("name", FOREIGN)
def test_shapes_behind_operators_of_onnx_runtime_are_those_that_it_makes(name: str) -> None:
    call, weights = FOREIGN[name]
    case = Case("(float[2,7,8] x) => (float[a,b,c] y)", f"h = {call} y = Relu(h)", weights, {})
    model = case.model()
    made = Reference(model).run({"x": np.ones((2, 7, 8), np.float32)})["y"]
    assert context(model).fact(SHAPES).shapes["h"] == made.shape


def test_shapes_that_data_decides_are_still_observed_behind_them() -> None:
    case = Case("(float[2,7,8] x) => (int64[3,n] y)", "h = com.microsoft.Gelu(x) y = NonZero(h)", {}, {})
    assert context(case.model()).fact(CONCRETE_SHAPES).shapes["y"] == (3, 2 * 7 * 8)


def test_packed_weights_are_read_as_the_numbers_they_stand_for() -> None:
    rng = np.random.default_rng(0)
    body = "y = com.microsoft.MatMulNBits<K=32,N=6,bits=4,block_size=16>(x, w, s, z)"
    weights = {
        "w": rng.integers(0, 256, (6, 2, 8)).astype(np.uint8), "s": (12,),
        "z": rng.integers(0, 256, 6).astype(np.uint8),
    }  # fmt: skip
    model = build("(float[N,32] x) => (float[N,6] y)", body, weights)
    found = real_weight("w", context(model).fact(CONSTANTS)).reshape(6, 32)
    made = Reference(model).run({"x": np.eye(32, dtype=np.float32)})["y"]
    np.testing.assert_allclose(found, made.T, rtol=1e-5, atol=1e-5)


def test_multiply_accumulates_of_attention_and_recurrence_are_counted() -> None:
    body = "o = com.microsoft.MultiHeadAttention<num_heads=2>(x, x, x) y = Relu(o)"
    attention = build("(float[2,7,8] x) => (float[2,7,8] y)", body, {})
    assert context(attention).fact(COST).macs == 2 * (2 * 7 * 7 * 8)
    body = "r, y = GRU<hidden_size=6>(x, w, r0)"
    recurrent = build("(float[7,3,8] x) => (float[1,3,6] y)", body, {"w": (1, 18, 8), "r0": (1, 18, 6)})
    assert context(recurrent).fact(COST).macs == 7 * 3 * (18 * 8 + 18 * 6)
