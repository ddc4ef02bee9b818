"""Multipliers, and that no operation is emitted that nothing needs."""

from __future__ import annotations

from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from npu_cases import model
from quantized_graphs import Drawing

from graphopt_backends.npu.emitter import Emitter, Refusal, multiplier
from graphopt_backends.npu.network import emit
from graphopt_backends.npu.operators import refusal
from graphopt_backends.npu.tosa import run_reference, serialize
from graphopt_backends.npu.units import find_units


def _kinds(built, family: str = "u55") -> Counter[str]:
    return Counter(operator.kind for operator in emit(built, family).operators)


@given(st.integers(1, 2**40), st.integers(1, 2**40), st.sampled_from([15, 31]))
def test_multipliers_are_the_nearest_of_their_bits(above: int, below: int, bits: int) -> None:
    ratio = Fraction(above, below)
    if not Fraction(1, 1 << 30) < ratio < 1 << 12:
        return
    factor, shift = multiplier(ratio, bits)
    assert 2 ** (bits - 1) <= factor < 2**bits
    assert 2 <= shift <= 62
    assert abs(Fraction(factor, 2**shift) - ratio) <= Fraction(1, 2 ** (shift + 1))


def test_a_ratio_just_below_a_power_of_two_rounds_up_to_it() -> None:
    assert multiplier(1 - Fraction(1, 1 << 40)) == (1 << 30, 30)


def test_ratios_out_of_reach_are_refused() -> None:
    with pytest.raises(Refusal, match="more than RESCALE can multiply by"):
        multiplier(Fraction(1 << 40))
    with pytest.raises(Refusal, match="negative"):
        multiplier(Fraction(-1))


def test_reshapes_in_a_row_are_one_and_back_none() -> None:
    emitter = Emitter("u55")
    tensor = emitter.input("x", (2, 3, 4), "int8")
    again = emitter.reshape(emitter.reshape(tensor, (6, 4)), (24,))
    assert emitter.graph.operators[-1].inputs[0] is tensor
    assert emitter.reshape(again, (2, 3, 4)) is tensor


def test_axes_that_stay_neighbours_are_transposed_as_one_but_on_u85() -> None:
    found = dict[str, list[int]]()
    for family in ("u55", "u85"):
        emitter = Emitter(family)
        emitter.transpose(emitter.input("x", (2, 3, 4, 5), "int8"), (0, 2, 3, 1))
        found[family] = next(o.attributes["perms"] for o in emitter.graph.operators if o.kind == "TRANSPOSE")
    assert found == {"u55": [0, 2, 1], "u85": [0, 2, 3, 1]}


def test_transposes_larger_than_the_npu_are_refused() -> None:
    emitter = Emitter("u55")
    with pytest.raises(Refusal, match="it would transpose 3x102400, more than the NPU does"):
        emitter.transpose(emitter.input("x", (3, 102400), "int8"), (1, 0))


def test_equal_constants_are_one() -> None:
    emitter = Emitter("u55")
    assert emitter.constant([1, 2], "int8") is emitter.constant(np.array([1, 2]), "int8")
    assert emitter.constant([1, 2], "int8") is not emitter.constant([1, 2], "int32")


def test_a_sum_is_one_operation_and_three_rescales_with_whole_factors() -> None:
    graph = emit(model("sum"), "u55")
    assert Counter(o.kind for o in graph.operators) == {"RESCALE": 3, "ADD": 1}
    for operator in graph.operators[:2]:
        factor, shift = (int(tensor.data[0]) for tensor in operator.inputs[1:3])
        assert factor % (1 << shift) == 0
        assert factor >> shift <= 32767


def test_concat_of_equal_grids_only_moves() -> None:
    assert set(_kinds(model("concat of equal grids"))) == {"CONCAT"}


def test_a_relu_on_a_grid_without_negative_numbers_is_no_operation() -> None:
    d = Drawing(3)
    x, w = d.input(1, 3, 5, 5), d.weight(4, 3, 1, 1)
    kinds = _kinds(d.output(d.op("Conv", x, w, act=("Relu", {}), grid=(0.1, -128))))
    assert "CLAMP" not in kinds


def test_transposes_between_convolutions_cancel() -> None:
    d = Drawing(4)
    x = d.op("Conv", d.input(1, 3, 6, 5), d.weight(4, 3, 3, 3))
    turned = d.op("Transpose", x, perm=[0, 2, 3, 1], grid=x)
    back = d.op("Transpose", d.op("Sigmoid", turned), perm=[0, 3, 1, 2])
    kinds = _kinds(d.output(d.op("Conv", back, d.weight(2, 4, 1, 1))))
    assert kinds["TRANSPOSE"] == 2  # of the input and of the output of the graph


def test_a_chain_of_functions_is_one_table() -> None:
    assert _kinds(model("hard swish in pieces")) == {"TABLE": 1}
    assert _kinds(model("gelu in pieces")) == {"TABLE": 1}


def test_a_depthwise_deconvolution_needs_an_operation_for_each_place_not_for_each_channel() -> None:
    assert _kinds(model("deconv, depthwise"))["DEPTHWISE_CONV2D"] == 4


@pytest.mark.parametrize(
    ("kind", "shape", "attributes", "reason"),
    [
        ("InstanceNormalization", (1, 3, 4, 4), {}, "there is no form of it on integers"),
        ("LpPool", (1, 3, 4, 4), {"kernel_shape": [2, 2]}, "there is no form of it on integers"),
        ("Conv", (1, 3, 80, 4), {"weight": (2, 3, 70, 1)},
         "its window of 70x1 is larger than the NPU's (4096 elements, 64 rows)"),
        ("Conv", (1, 3, 4, 4, 4), {"weight": (2, 3, 1, 1, 1)}, "it slides over 3 dimensions"),
        ("ArgMax", (1, 200), {"axis": 1}, "it compares 200 elements at 1 places, and the NPU at most 127 at 65536"),
        ("Pad", (1, 2, 4, 4), {"mode": "reflect", "pads": True}, "it pads with reflect"),
        ("CumSum", (3, 4), {"number": 1}, "there is no form of it on integers"),
    ],
)  # fmt: skip
def test_what_the_npu_lacks_is_refused(kind: str, shape, attributes, reason: str) -> None:
    d = Drawing(1)
    x, others = d.input(*shape), list[str]()
    given = dict(attributes)
    if (weight := given.pop("weight", None)) is not None:
        others = [d.weight(*weight)]
    if given.pop("pads", False):
        others = [d.constant([0, 0, 1, 1, 0, 0, 1, 1], "int64")]
    if kind == "InstanceNormalization":
        others = [d.constant(np.ones(3)), d.constant(np.zeros(3))]
    if given.pop("number", None):
        others = [d.constant(1, "int64")]
    units, _ = find_units(d.output(d.op(kind, x, *others, **given)).graph)
    assert refusal(next(iter(units.values())), "u55") == reason


def _tiny_scale(weight: int) -> Drawing:
    d = Drawing(1)
    x = d.input(1, 3, 4, 4)
    w = d.dequantized(np.full((2, 3, 1, 1), [[[[3]]], [[[weight]]]]), "int8", [0.01, 1e-20], 0)
    d.op("Conv", x, w, d.constant([0.5, 0.25]), grid=(0.01, -3))
    return d


def test_a_bias_too_wide_for_its_sums_is_kept_where_the_output_has_no_weights() -> None:
    pytest.importorskip("tosa_serializer")
    d = _tiny_scale(0)
    built = d.output(d.nodes[-1].output[0])
    graph = emit(built, "u55")
    blob = serialize(graph)
    (found,) = run_reference(blob, [d.samples[d.inputs[0]]], [("int8", graph.outputs[0].shape)])
    assert (found[:, 1] == 25 - 3).all()


def test_a_bias_too_wide_for_its_sums_is_refused() -> None:
    d = _tiny_scale(5)
    units, _ = find_units(d.output(d.nodes[-1].output[0]).graph)
    assert refusal(next(iter(units.values())), "u55") == "its bias is wider than the sums that it is added to"


def test_what_leaves_the_graph_as_floats_is_no_unit() -> None:
    d = Drawing(1)
    y = d.op("Conv", d.input(1, 3, 4, 4), d.weight(2, 3, 1, 1))
    made = next(node.input[0] for node in d.nodes if node.output[0] == y)
    units, reasons = find_units(d.output(made).graph)
    assert not units
    assert list(reasons.values()) == ["its result leaves the graph as floats"]


def test_sixteen_bits_with_a_zero_point_are_no_unit() -> None:
    d = Drawing(1, "int16")
    x = d.input(1, 3, 4, 4)
    y = d.op("Relu", x, grid=(0.01, 5))
    _, reasons = find_units(d.output(y).graph)
    assert list(reasons.values()) == ["its result has 16 bits and a zero point"]
