from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from graphopt.analyses import CHANNEL_GROUPS, ChannelGroup, ChannelGroups
from graphopt.analyses.channels.partition import Partition
from graphopt.analyses.channels.rules.reshape import match_blocks
from graphopt.model_io import load_model
from graphopt.pass_base import Context
from graphopt.targets import Target

Shape = tuple[int, ...]


def build(signature: str, body: str, weights: dict[str, Shape], opset: int = 17) -> ir.Model:
    rng = np.random.default_rng(0)
    tensors = [ir.tensor(rng.standard_normal(shape).astype(np.float32), name=name) for name, shape in weights.items()]
    declared = ", ".join(f"float[{','.join(map(str, shape))}] {name}" for name, shape in weights.items())
    text = f'<ir_version: 8, opset_import: ["" : {opset}, "acme" : 1]>\nmain {signature} <{declared}> {{\n{body}\n}}'
    return ir.from_onnx_text(text, initializers=tensors)


def analyse(model: ir.Model) -> ChannelGroups:
    return Context(model, Target(name="ort")).fact(CHANNEL_GROUPS)


def axes(group: ChannelGroup) -> dict[tuple[str, int], int]:
    return {(place.value, place.axis): place.positions.shape[1] for place in group.places}


def pins(groups: ChannelGroups) -> dict[str, str | None]:
    return {group.name: group.pin for group in groups.groups}


IMAGE = "(float[N,3,8,8] x) => (float[N,5] y)"
HEAD = "g = GlobalAveragePool(%s) f = Flatten(g) [last] y = Gemm<transB=1>(f, head)"


def test_a_chain_of_convolutions_ties_weight_bias_norm_and_reader() -> None:
    body = (
        """
        [first] a = Conv<pads=[1,1,1,1]>(x, w1, b1)
        n = BatchNormalization(a, scale, bias, mean, var)
        r = Relu(n)
        [second] c = Conv(r, w2)
    """
        + HEAD % "c"
    )
    vectors = dict.fromkeys(("b1", "scale", "bias", "mean", "var"), (4,))
    model = build(IMAGE, body, {"w1": (4, 3, 3, 3), **vectors, "w2": (6, 4, 1, 1), "head": (5, 6)})
    first, second, last = analyse(model).groups
    assert (first.name, first.units, first.pin) == ("first", 4, None)
    assert set(axes(first)) == {
        ("w1", 0), ("b1", 0), ("a", 1), ("scale", 0), ("bias", 0), ("mean", 0), ("var", 0), ("n", 1),
        ("r", 1), ("w2", 1),
    }  # fmt: skip
    assert set(axes(second)) == {("w2", 0), ("c", 1), ("g", 1), ("f", 1), ("head", 1)}
    assert last.pin == "reaches graph output 'y'"
    roles = {(place.value, place.axis): place.role for place in first.places if place.constant}
    assert roles["w1", 0] == "output"
    assert roles["w2", 1] == "input"
    assert roles["scale", 0] == "scale"
    assert roles["var", 0] == "variance"


def test_a_residual_joins_both_branches_into_one_group() -> None:
    body = "[stem] a = Conv(x, w1) r = Relu(a) [branch] c = Conv(r, w2) s = Add(c, r)" + HEAD % "s"
    groups = analyse(build(IMAGE, body, {"w1": (4, 3, 1, 1), "w2": (4, 4, 1, 1), "head": (5, 4)}))
    stem = groups.free[0]
    assert stem.producers == ("stem", "branch")
    assert {("w1", 0), ("w2", 0), ("w2", 1), ("head", 1)} <= set(axes(stem))


def test_a_depthwise_filter_follows_its_channel_and_states_its_group_count() -> None:
    body = "[point] a = Conv(x, w1) [depth] d = Conv<group=4>(a, w2)" + HEAD % "d"
    groups = analyse(build(IMAGE, body, {"w1": (4, 3, 1, 1), "w2": (8, 1, 3, 3), "head": (5, 8)}))
    (free,) = groups.free
    assert free.units == 4
    assert axes(free)["w2", 0] == 2, "two filters read each channel"
    (table,) = groups.tables
    assert (table.output, table.slot, table.numbers, table.scalar) == ("d", "group", (4,), True)


def test_channels_of_a_grouped_convolution_leave_every_group_alike() -> None:
    body = "[point] a = Conv(x, w1) [grouped] d = Conv<group=2>(a, w2)" + HEAD % "d"
    groups = analyse(build(IMAGE, body, {"w1": (6, 3, 1, 1), "w2": (8, 3, 3, 3), "head": (5, 8)}))
    point, grouped = groups.free
    assert (point.units, axes(point)["w1", 0], axes(point)["w2", 1]) == (3, 2, 1)
    np.testing.assert_array_equal(next(p for p in point.places if p.value == "a").positions, [[0, 3], [1, 4], [2, 5]])
    assert (grouped.units, axes(grouped)["w2", 0]) == (4, 2)


def test_transposed_convolutions_read_on_their_first_weight_axis() -> None:
    body = "[point] a = Conv(x, w1) [up] d = ConvTranspose(a, w2, b)" + HEAD % "d"
    groups = analyse(build(IMAGE, body, {"w1": (6, 3, 1, 1), "w2": (6, 4, 2, 2), "b": (4,), "head": (5, 4)}))
    point, up = groups.free
    assert ("w2", 0) in axes(point)
    assert {("w2", 1), ("b", 0), ("head", 1)} <= set(axes(up))


def test_concatenated_branches_stay_groups_of_their_own() -> None:
    body = "[left] a = Conv(x, w1) [right] b = Conv(x, w2) c = Concat<axis=1>(a, b)" + HEAD % "c"
    groups = analyse(build(IMAGE, body, {"w1": (2, 3, 1, 1), "w2": (3, 3, 1, 1), "head": (5, 5)}))
    left, right = groups.free
    assert (left.name, left.units, right.name, right.units) == ("left", 2, "right", 3)
    at = next(place for place in right.places if place.value == "head")
    np.testing.assert_array_equal(at.positions, [[2], [3], [4]])


def test_flattening_gives_a_channel_one_column_per_pixel() -> None:
    body = "[conv] a = Conv(x, w1) f = Flatten(a) [last] y = Gemm<transB=1>(f, head)"
    groups = analyse(build(IMAGE, body, {"w1": (2, 3, 7, 7), "head": (5, 8)}))
    at = next(place for place in groups.free[0].places if place.value == "head")
    np.testing.assert_array_equal(at.positions, [[0, 1, 2, 3], [4, 5, 6, 7]])


@pytest.mark.parametrize(("shape", "stated"), [("0, -1", False), ("-1, 8", True), ("0, 8", True)])
def test_a_reshape_to_rows_follows_and_states_what_it_must(shape: str, stated: bool) -> None:
    body = (
        f"to = Constant<value_ints=[{shape}]>() [conv] a = Conv(x, w1) f = Reshape(a, to)"
        "[last] y = Gemm<transB=1>(f, head)"
    )
    groups = analyse(build(IMAGE, body, {"w1": (2, 3, 7, 7), "head": (5, 8)}))
    assert groups.free[0].name == "conv"
    assert bool(groups.tables) == stated


def test_shape_arithmetic_that_reads_only_the_batch_pins_nothing() -> None:
    body = """
        zero = Constant<value_ints=[0]>() size = Constant<value_ints=[8]>()
        [conv] a = Conv(x, w1)
        s = Shape(a) n = Gather(s, zero) to = Concat<axis=0>(n, size) f = Reshape(a, to)
        [last] y = Gemm<transB=1>(f, head)
    """
    groups = analyse(build(IMAGE, body, {"w1": (2, 3, 7, 7), "head": (5, 8)}))
    assert [group.name for group in groups.free] == ["conv"]
    assert groups.tables[0].numbers == (0, 8), "the batch is copied, the columns are stated"


def test_numbers_that_are_computed_from_the_channels_stay_as_they_are() -> None:
    body = (
        """
        one = Constant<value_int=1>()
        [conv] a = Conv(x, w1)
        s = Shape(a) n = Gather(s, one) h = Cast<to=1>(n) q = Sqrt(h) d = Div(a, q)
    """
        + HEAD % "d"
    )
    groups = analyse(build(IMAGE, body, {"w1": (2, 3, 1, 1), "head": (5, 2)}))
    assert pins(groups)["conv"] is None
    (table,) = groups.tables
    assert (table.output, table.slot, table.shape, table.reads) == ("d", 1, (), (("a", 1),))
    assert table.numbers == (pytest.approx(2**0.5),)


def test_padding_channels_are_channels() -> None:
    body = (
        """
        pads = Constant<value_ints=[0,1,0,0,0,1,0,0]>()
        [small] a = Conv(x, w1) p = Pad(a, pads) [large] b = Conv(x, w2) s = Add(p, b)
    """
        + HEAD % "s"
    )
    groups = analyse(build(IMAGE, body, {"w1": (2, 3, 1, 1), "w2": (4, 3, 1, 1), "head": (5, 4)}))
    both, padded = groups.free
    assert (both.name, both.units, padded.name, padded.units) == ("small", 2, "large", 2)
    assert groups.tables[0].spans[0][1].stop == 1


def test_squeeze_and_excite_multiplies_channel_by_channel() -> None:
    body = (
        """
        [conv] a = Conv(x, w1) p = GlobalAveragePool(a) [down] d = Conv(p, w2) e = Relu(d)
        [up] u = Conv(e, w3) s = HardSigmoid(u) m = Mul(a, s)
    """
        + HEAD % "m"
    )
    groups = analyse(build(IMAGE, body, {"w1": (8, 3, 1, 1), "w2": (2, 8, 1, 1), "w3": (8, 2, 1, 1), "head": (5, 8)}))
    conv, down = groups.free
    assert conv.producers == ("conv", "up")
    assert down.units == 2


def test_split_halves_are_tied_where_they_meet() -> None:
    body = "[conv] a = Conv(x, w1) l, r = Split<axis=1>(a) s = Sigmoid(r) m = Mul(l, s)" + HEAD % "m"
    groups = analyse(build(IMAGE, body, {"w1": (8, 3, 1, 1), "head": (5, 4)}))
    (free,) = groups.free
    assert (free.units, axes(free)["w1", 0]) == (4, 2)
    assert groups.tables[0].numbers == (4, 4)


def test_slices_along_channels_state_their_bounds() -> None:
    body = (
        """
        from = Constant<value_ints=[2]>() to = Constant<value_ints=[100]>() at = Constant<value_ints=[1]>()
        [conv] a = Conv(x, w1) c = Slice(a, from, to, at)
    """
        + HEAD % "c"
    )
    groups = analyse(build(IMAGE, body, {"w1": (6, 3, 1, 1), "head": (5, 4)}))
    dropped, read = groups.free
    assert (dropped.units, read.units) == (2, 4)
    assert {table.slot: table.spans[0][1].stop for table in groups.tables} == {1: 2, 2: 6}


def test_a_shared_weight_ties_both_of_its_readers() -> None:
    body = "[stem] a = Conv(x, w1) [one] b = Conv(a, w2) [two] c = Conv(b, w2)" + HEAD % "c"
    groups = analyse(build(IMAGE, body, {"w1": (4, 3, 1, 1), "w2": (4, 4, 1, 1), "head": (5, 4)}))
    (free,) = groups.free
    assert free.producers == ("stem", "one", "two")


def test_a_weight_behind_a_transpose_keeps_its_role() -> None:
    body = "t = Transpose<perm=[1,0]>(w1) [one] h = MatMul(x, t) r = Gelu(h) [two] y = MatMul(r, w2)"
    groups = analyse(build("(float[N,7,3] x) => (float[N,7,5] y)", body, {"w1": (6, 3), "w2": (6, 5)}, opset=20))
    (free,) = groups.free
    assert {(p.value, p.axis): p.role for p in free.places if p.constant} == {("w1", 0): "output", ("w2", 0): "input"}


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("c = acme.Strange(a)", "pinned by Strange 'it'"),
        ("c = LRN<size=3>(a)", "pinned by LRN 'it'"),
        ("c = Softmax<axis=1>(a)", "pinned by Softmax 'it'"),
        ("c = CumSum(a, one)", "pinned by CumSum 'it'"),
        ("c = ReduceMax<keepdims=1,axes=[1]>(a)", "pinned by ReduceMax 'it'"),
        ('c = Pad<mode="reflect">(a, pads)', "pinned by Pad 'it'"),
    ],
)
def test_what_no_rule_vouches_for_pins_and_is_named(line: str, reason: str) -> None:
    body = f"""
        one = Constant<value_int=1>() axis = Constant<value_ints=[1]>()
        pads = Constant<value_ints=[0,1,0,0,0,1,0,0]>()
        [conv] a = Conv(x, w1) [it] {line} r = Relu(c)
        y = Flatten(r)
    """
    groups = analyse(build("(float[N,3,8,8] x) => (float[M,K] y)", body, {"w1": (4, 3, 1, 1)}))
    assert pins(groups) == {"conv": reason}


def test_a_weight_that_callers_may_replace_is_pinned() -> None:
    body = "[conv] a = Conv(x, w)" + HEAD % "a"
    model = build("(float[N,3,8,8] x, float[4,3,1,1] w) => (float[N,5] y)", body, {"head": (5, 4)})
    assert pins(analyse(model))["conv"] == "reaches graph input 'w'"


def test_indices_of_a_max_pool_count_through_the_channels_and_pin_them() -> None:
    body = "[conv] a = Conv(x, w1) [pool] p, i = MaxPool<kernel_shape=[2,2],strides=[2,2]>(a)" + HEAD % "p"
    model = build("(float[N,3,8,8] x) => (float[N,5] y, int64[N,4,4,4] i)", body, {"w1": (4, 3, 1, 1), "head": (5, 4)})
    assert pins(analyse(model))["conv"] == "pinned by MaxPool 'pool'"


@pytest.mark.parametrize(
    ("old", "new", "blocks"),
    [
        (["N", 64, 7, 7], ["N", 3136], [((0,), (0,)), ((1, 2, 3), (1,))]),
        (["N", 64, 7, 7], [None, 3136], [((0,), (0,)), ((1, 2, 3), (1,))]),
        (["N", 64, 1, 1], ["N", 64], [((0,), (0,)), ((1,), (1,)), ((2,), ()), ((3,), ())]),
        (["N", 6], ["N", 2, 3], [((0,), (0,)), ((1,), (1, 2))]),
        (["N", "T", 8], [None, 8], [((2,), (1,))]),
        ([2, 3, 4], [6, 4], [((0, 1), (0,)), ((2,), (1,))]),
    ],
)
def test_shapes_are_matched_in_the_finest_blocks_that_are_certain(old: list, new: list, blocks: list) -> None:
    assert match_blocks(old, new) == blocks


def test_a_mark_survives_unions_in_any_order() -> None:
    partition = Partition()
    atoms = partition.new(5000)
    partition.mark(atoms[4999:])
    partition.unite(atoms[:-1], atoms[1:])
    assert (partition.find(atoms) == 0).all()
    assert partition.marked(atoms).all()


ZOO = {
    "cifar10_resnet20": (12, {"/linear/Gemm": "reaches graph output 'logits'"}),
    "mobilenet_v2": (25, {"conv_275": "pinned by Softmax 'softmax_278'"}),
    "mnist_cntk": (2, {"Times212": "reaches graph output 'Plus214_Output_0'"}),
}


@pytest.mark.parametrize("case", ZOO)
def test_groups_of_real_models(case: str, zoo: Callable[[str], Path]) -> None:
    groups = analyse(load_model(zoo(case) / "model.onnx"))
    free, pinned = ZOO[case]
    assert len(groups.free) == free
    assert {name: pin for name, pin in pins(groups).items() if pin} == pinned
