"""Layers to refit: what they read, and what they should make of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from graphopt.analyses import Constants
from graphopt_passes.prune.refit.linear_layers import LinearLayer
from graphopt_passes.prune.refit.outlook import Outlook, outlook
from graphopt_passes.prune.refit.stepwise import Stepwise

__all__ = ["AxisName", "Site", "name_of", "site_of"]

AxisName = tuple[str, int]


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

    def samples(self, whole: Stepwise, pruned: Stepwise) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray | None]]:
        """The layer's input, the total that it should lead to, and what is added to its output, batch after batch.

        What is added is None where it has not the output's shape; then the total is the output alone.
        """
        node, axis, shortcut = self.layer.node, self.layer.channel_axis, self.outlook.shortcut
        more = [shortcut] if shortcut else []
        old = whole.run(self.positions[0] + 1, [name_of(node.outputs[0]), *more])
        new = pruned.run(self.positions[1], [name_of(node.inputs[0]), *more])
        for (output, *was), (x, *now) in zip(old, new, strict=True):
            wanted = np.take(output, self.kept, axis=axis)
            if any(a.shape != output.shape or b.shape != wanted.shape for a, b in zip(was, now, strict=True)):
                yield x, wanted, None
                continue
            before = self.outlook.bypass(np.take(was[0], self.kept, axis=axis) if was else None, wanted, axis)
            yield x, wanted + before, self.outlook.bypass(now[0] if now else None, wanted, axis)


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
