"""Networks of one operator each, written as ONNX text, and what tests of removal do with them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
import pytest
from small_models import Shape, channel_groups, context, feeds

from graphopt.analyses import CONSTANTS, COST, ChannelGroup
from graphopt.reference import Feed, Reference
from graphopt_passes.prune.allocation.budget import Budget, Facts
from graphopt_passes.prune.removal import remove

TYPES = {"float32": "float", "int8": "int8", "uint8": "uint8", "int32": "int32", "int64": "int64", "bool": "bool"}


def build(signature: str, body: str, weights: Mapping[str, Shape | np.ndarray], opset: int = 17) -> ir.Model:
    """Weights are given as shapes, for random floats, or as arrays."""
    rng = np.random.default_rng(0)
    arrays = {
        name: given if isinstance(given, np.ndarray) else rng.standard_normal(given).astype(np.float32)
        for name, given in weights.items()
    }
    tensors = [ir.tensor(array, name=name) for name, array in arrays.items()]
    declared = ", ".join(f"{TYPES[a.dtype.name]}[{','.join(map(str, a.shape))}] {name}" for name, a in arrays.items())
    imports = f'["" : {opset}, "com.microsoft" : 1]'
    text = f"<ir_version: 10, opset_import: {imports}>\nmain {signature} <{declared}> {{\n{body}\n}}"
    return ir.from_onnx_text(text, initializers=tensors)


def wipe(model: ir.Model, group: ChannelGroup, units: Sequence[int]) -> None:
    """Set weights of units to zero, or to their zero point; scales, zero points and tables stay."""
    for place in group.places:
        value = model.graph.initializers.get(place.value)
        if not place.constant or place.value[0] not in "wb" or "scale" in place.value or "zero" in place.value:
            continue
        if value is not None and value.const_value is not None:
            array = value.const_value.numpy().copy()
            stem, quantized, _ = place.value.partition("_quantized")
            zero = model.graph.initializers[f"{stem}_zero_point"].const_value if quantized and stem[0] == "w" else None
            fill = 0 if zero is None else zero.numpy().reshape(-1)[0]
            np.moveaxis(array, place.axis, 0)[place.positions[list(units)].reshape(-1)] = fill
            value.const_value = ir.tensor(array, name=place.value)


def run(model: ir.Model, given: Sequence[Feed]) -> list[Mapping[str, np.ndarray]]:
    session = Reference(model)
    return [session.run(feed) for feed in given]


def assert_exact(model: ir.Model, removals: Sequence[tuple[ChannelGroup, list[int]]]) -> None:
    for group, units in removals:
        wipe(model, group, units)
    given = feeds(model)
    expected = run(model, given)
    remove(model, channel_groups(model), removals)
    for outputs, wanted in zip(run(model, given), expected, strict=True):
        for name, array in wanted.items():
            np.testing.assert_allclose(outputs[name], array, atol=1e-5 * max(1.0, float(np.abs(array).max())))


def assert_budget_is_exact(model: ir.Model) -> None:
    """What the budget foresees for one unit fewer in every group is what the model then costs."""
    groups = [group for group in channel_groups(model).free if group.units > 1]
    facts = context(model)
    budget = Budget(Facts(facts.fact(COST), facts.fact(CONSTANTS)), groups, "macs")
    assert budget.whole == facts.fact(COST).macs
    foreseen = budget.after([1] * len(groups))
    remove(model, channel_groups(model), [(group, [0]) for group in groups])
    assert foreseen == pytest.approx(context(model).fact(COST).macs)


def units_of(model: ir.Model) -> dict[str, int]:
    found: dict[str, int] = {}
    for group in channel_groups(model).free:
        found[group.name] = found.get(group.name, 0) + group.units
    return found


@dataclass(frozen=True)
class Case:
    """A network, and the units that can leave, by the node that makes them."""

    signature: str
    body: str
    weights: Mapping[str, Shape | np.ndarray]
    free: Mapping[str, int]
    opset: int = 17

    def model(self) -> ir.Model:
        return build(self.signature, self.body, self.weights, self.opset)
