from __future__ import annotations

import onnx_ir as ir
import pytest
from drawn_networks import BLOCKS, Drawing, networks
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from small_models import IMAGE, Shape, assert_removal_is_exact, build, context

from graphopt.analyses import CHANNEL_GROUPS
from graphopt.errors import PassError
from graphopt_passes.prune.removal import remove


def parameters(model: ir.Model) -> int:
    return sum(value.const_value.size for name, value in model.graph.initializers.items() if name[0] == "w")


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(networks(), st.data())
def test_removing_channels_that_are_zero_changes_no_output(model: ir.Model, data: st.DataObject) -> None:
    free = [group for group in context(model).fact(CHANNEL_GROUPS).free if group.units > 1]
    removals = [
        (group, sorted(data.draw(st.sets(st.integers(0, group.units - 1), max_size=group.units - 1)))) for group in free
    ]
    before = parameters(model)
    assert_removal_is_exact(model, removals)
    assert (parameters(model) < before) == any(units for _, units in removals)


@pytest.mark.parametrize("block", BLOCKS)
def test_each_coupling_is_exact_by_itself(block: str) -> None:
    drawing = Drawing(lambda options: options[-1])
    drawing.current, drawing.channels = drawing.conv(drawing.current, drawing.channels, 4), 4
    getattr(drawing, block)()
    model = drawing.finish()
    groups = context(model).fact(CHANNEL_GROUPS).free
    assert groups
    assert_removal_is_exact(model, [(group, [group.units - 1]) for group in groups if group.units > 1])


GOLDEN = """
    [first] a = Conv<pads=[1,1,1,1]>(x, w1, b1) r = Relu(a)
    [branch] c = Conv(r, w2) s = Add(c, r)
    [depth] d = Conv<group=8>(s, w3) p = GlobalAveragePool(d) f = Flatten(p)
    [last] y = Gemm<transB=1>(f, head)
"""
GOLDEN_WEIGHTS: dict[str, Shape] = {
    "w1": (8, 3, 3, 3), "b1": (8,), "w2": (8, 8, 1, 1), "w3": (8, 1, 3, 3), "head": (5, 8)
}  # fmt: skip


def golden() -> ir.Model:
    return build(IMAGE, GOLDEN, GOLDEN_WEIGHTS)


def test_a_pinned_group_cannot_be_removed_from() -> None:
    model = golden()
    groups = context(model).fact(CHANNEL_GROUPS)
    with pytest.raises(PassError, match="prune: last: reaches graph output 'y'"):
        remove(model, groups, [(groups.groups[-1], [0])])


def test_an_axis_is_never_emptied() -> None:
    model = golden()
    groups = context(model).fact(CHANNEL_GROUPS)
    with pytest.raises(PassError, match="axis 1 of 'a' would be left empty"):
        remove(model, groups, [(groups.groups[0], range(8))])


def test_a_stated_size_that_others_use_is_not_changed_for_them() -> None:
    body = """
        to = Constant<value_ints=[-1,8]>()
        [conv] a = Conv(x, w1) f = Reshape(a, to) z = Gemm<transB=1>(f, head)
        b = Conv(x, w2) g = Reshape(b, to) k = ReduceMax<keepdims=1,axes=[1]>(g) y = Add(z, k)
    """
    weights = {"w1": (2, 3, 7, 7), "w2": (2, 3, 7, 7), "head": (5, 8)}
    model = build(IMAGE, body, weights)
    groups = context(model).fact(CHANNEL_GROUPS)
    assert [group.name for group in groups.free] == ["conv"]
    assert_removal_is_exact(model, [(groups.free[0], [1])])
