"""Removal from random networks whose blocks stand inside If and Loop, as deep as two."""

from __future__ import annotations

import onnx_ir as ir
from drawn_networks import BLOCKS, Drawing
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from small_models import assert_removal_is_exact, channel_groups

from graphopt.structure import interface, verify

START = """
    mean = ReduceMean<keepdims=0>(x) zero = Constant<value = float {0}>() c = Less(mean, zero)
    count = Constant<value_int=2>() go = Constant<value = bool {1}>()
"""
KEEPING = ("norm", "activation", "residual", "excite")
DEEPEST = 2


class Nested(Drawing):
    """Writes networks in which blocks stand inside other nodes."""

    made = 0
    depth = 0

    def value(self, text: str) -> str:
        self.made += 1
        self.lines.append(f"v{self.made} = {text}")
        return f"v{self.made}"

    def split(self) -> None:
        if self.channels % 2 == 0:
            self.made += 1
            left, right = f"l{self.made}", f"r{self.made}"
            self.lines.append(f"{left}, {right} = Split<axis=1>({self.current})")
            self.current, self.channels = self.value(f"Mul({left}, {right})"), self.channels // 2

    def inside(self, blocks: tuple[str, ...], channels: int) -> tuple[str, str]:
        """Up to two blocks and a convolution, taken off the page; returns the last value and the lines."""
        before, mark = (self.current, self.channels), len(self.lines)
        self.depth += 1
        for _ in range(self.pick([0, 1, 2])):
            getattr(self, self.pick(blocks))()
        last = self.value(f"Tanh({self.conv(self.current, self.channels, channels)})")
        self.depth -= 1
        text = " ".join(self.lines[mark:])
        del self.lines[mark:]
        self.current, self.channels = before
        return last, text

    def choice(self) -> None:
        if self.depth < DEEPEST:
            channels = self.pick([2, 4, 6])
            (t, then), (e, other) = (self.inside((*BLOCKS, "choice", "loop"), channels) for _ in range(2))
            branches = f"then_branch = then () => ({t}) {{ {then} }}, else_branch = other () => ({e}) {{ {other} }}"
            self.current, self.channels = self.value(f"If(c) <{branches}>"), channels

    def loop(self) -> None:
        if self.depth < DEEPEST:
            self.made += 1
            number, start, kind = self.made, self.current, self.pick(["float[]", f"float[N,{self.channels},8,8]"])
            self.current = f"h{number}"
            made, text = self.inside((*KEEPING, "concat", "turned", "choice"), self.channels)
            inputs = f"int64 i{number}, bool in{number}, {kind} h{number}"
            outputs = f"bool out{number}, {kind} n{number}, float[] {made}"
            text += f" n{number} = Add({made}, h{number}) out{number} = Identity(in{number})"
            body = f"body{number} ({inputs}) => ({outputs}) {{ {text} }}"
            self.lines.append(f"z{number}, s{number} = Loop(count, go, {start}) <body = {body}>")
            given_out = self.value(f"ReduceMean<axes=[0],keepdims=0>(s{number})")
            self.current = self.value(f"Add(z{number}, {given_out})")

    def finish(self) -> ir.Model:
        self.lines.insert(0, START)
        return super().finish()


@st.composite
def networks(draw: st.DrawFn) -> ir.Model:
    drawing = Nested(lambda options: draw(st.sampled_from(options)))
    for name in draw(st.lists(st.sampled_from(("choice", "loop", *BLOCKS)), max_size=2)):
        getattr(drawing, name)()
    getattr(drawing, draw(st.sampled_from(("choice", "loop"))))()
    return drawing.finish()


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(networks(), st.data())
def test_removing_channels_that_are_zero_from_nested_networks_changes_no_output(
    model: ir.Model, data: st.DataObject
) -> None:
    expected = interface(model)
    free = [group for group in channel_groups(model).free if group.units > 1]
    removals = [
        (group, sorted(data.draw(st.sets(st.integers(0, group.units - 1), max_size=group.units - 1)))) for group in free
    ]
    assert_removal_is_exact(model, removals)
    verify(model, expected)
