"""Layers to refit: what they read, and what they should make of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from graphopt.analyses import Constants
from graphopt.analyses.windows import position_rows
from graphopt_passes.prune.refit.linear_layers import LinearLayer
from graphopt_passes.prune.refit.outlook import Outlook, outlook
from graphopt_passes.prune.refit.stepwise import Stepwise

__all__ = ["AxisName", "Sample", "Site", "name_of", "site_of"]

AxisName = tuple[str, int]


@dataclass(frozen=True, eq=False)
class Sample:
    """What a batch shows of a layer.

    Attributes:
        x: What goes in, in the pruned model.
        output: What comes out in the whole model, all channels.
        was: What a shortcut adds there, if there is one.
        now: What it adds in the pruned model.
        alike: The shortcut has the output's shape.
    """

    x: np.ndarray
    output: np.ndarray
    was: tuple[np.ndarray, ...]
    now: tuple[np.ndarray, ...]
    alike: bool


@dataclass(frozen=True, eq=False)
class Site:
    """A layer to refit.

    Attributes:
        layer: The layer of the pruned model.
        positions: Its place in the order of nodes, in the whole and in the pruned model.
        outlook: What becomes of its output.
        kept: `[outputs]` positions of its outputs in the whole model.
    """

    layer: LinearLayer
    positions: tuple[int, int]
    outlook: Outlook
    kept: np.ndarray

    def samples(self, whole: Stepwise, pruned: Stepwise, first: Site | None = None) -> Iterator[Sample]:
        """What goes into the layer, or into an earlier one, and what the layer should make of it, batch after batch."""
        node, shortcut, reader = self.layer.node, self.outlook.shortcut, first or self
        more = [shortcut] if shortcut else []
        old = whole.run(self.positions[0] + 1, [name_of(node.outputs[0]), *more])
        new = pruned.run(reader.positions[1], [name_of(reader.layer.node.inputs[0]), *more])
        for (output, *was), (x, *now) in zip(old, new, strict=True):
            made = list(output.shape)
            made[self.layer.channel_axis] = len(self.kept)
            alike = all(a.shape == output.shape and list(b.shape) == made for a, b in zip(was, now, strict=True))
            yield Sample(x, output, tuple(was), tuple(now), alike=alike)

    def totals(self, sample: Sample, chosen: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
        """Chosen rows of the total that a sample should lead to, and of what is added to the layer's output.

        What is added is None where it has not the output's shape; then the total is the output alone.
        """
        axis, bypass = self.layer.channel_axis, self.outlook.bypass
        wanted = position_rows(sample.output, axis, chosen)[:, self.kept]
        if not sample.alike:
            return wanted, None
        was, now = ([position_rows(a, axis, chosen) for a in arrays] for arrays in (sample.was, sample.now))
        before = bypass(was[0][:, self.kept] if was else None, wanted, -1)
        return wanted + before, bypass(now[0] if now else None, wanted, -1)


def site_of(
    layer: LinearLayer, old: Stepwise, new: Stepwise, lost: Mapping[AxisName, np.ndarray], constants: Constants
) -> Site:
    """What a layer's output should be, and what becomes of it."""
    output = layer.node.outputs[0]
    name = name_of(output)
    positions = old.born[name], new.born[name]
    gone = lost.get((name_of(layer.node.inputs[1]), layer.axis), np.empty(0, dtype=np.int64))
    kept = np.delete(np.arange(layer.outputs + len(gone)), gone)
    known = {
        value
        for value in new.born
        if all(run.born.get(value, at) < at for run, at in zip((old, new), positions, strict=True))
    }
    seen = outlook(output, layer.outputs, layer.channel_axis, constants, known)
    return Site(layer, positions, seen, kept)


def name_of(value: ir.Value | None) -> str:
    """Name of a value; empty where there is none."""
    return "" if value is None else value.name or ""
