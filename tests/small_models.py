"""Small models written as ONNX text, and what tests of removal do with them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import onnx
import onnx_ir as ir

from graphopt.analyses import CHANNEL_GROUPS, ChannelGroup, ChannelGroups
from graphopt.analyses.names import Names
from graphopt.model_io import ShapeBinding, input_specs
from graphopt.pass_base import Context
from graphopt.reference import Feed, Reference, random_feed
from graphopt.targets import Target
from graphopt_passes.prune.removal import remove

Shape = tuple[int, ...]
IMAGE = "(float[N,3,8,8] x) => (float[N,5] y)"


def build(signature: str, body: str, weights: Mapping[str, Shape], opset: int = 17, seed: int = 0) -> ir.Model:
    rng = np.random.default_rng(seed)
    arrays = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in weights.items()}
    tensors = [ir.tensor(np.abs(a) if name.startswith("var") else a, name=name) for name, a in arrays.items()]
    declared = ", ".join(f"float[{','.join(map(str, shape))}] {name}" for name, shape in weights.items())
    text = f'<ir_version: 8, opset_import: ["" : {opset}]>\nmain {signature} <{declared}> {{\n{body}\n}}'
    proto = onnx.parser.parse_model(text)
    proto.graph.initializer.extend(ir.to_proto(tensor) for tensor in tensors)
    return ir.from_proto(proto)


def context(model: ir.Model, **fields: object) -> Context:
    return Context(model, **{"target": Target(name="ort"), **fields})  # type: ignore[arg-type]


def channel_groups(model: ir.Model) -> ChannelGroups:
    return context(model).fact(CHANNEL_GROUPS)


def feeds(model: ir.Model, count: int = 4) -> list[Feed]:
    rng = np.random.default_rng(1)
    binding = ShapeBinding(dims={"N": 2})
    return [random_feed(input_specs(model), binding, rng) for _ in range(count)]


def zero(model: ir.Model, group: ChannelGroup, units: Sequence[int]) -> None:
    """Set everything that belongs to some units to zero: a channel that is zero and that nobody reads."""
    names = Names(model)
    for place in group.places:
        value = names.value(place.value)
        if place.constant and value is not None:
            producer = value.producer()
            tensor = value.const_value if producer is None else producer.attributes["value"].as_tensor()
            assert tensor is not None
            array = tensor.numpy().copy()
            np.moveaxis(array, place.axis, 0)[place.positions[list(units)].reshape(-1)] = 0
            value.const_value = ir.tensor(array, name=value.name)
            if producer is not None:
                producer.attributes["value"] = ir.AttrTensor("value", value.const_value)


def assert_removal_is_exact(model: ir.Model, removals: list[tuple[ChannelGroup, list[int]]]) -> None:
    for group, units in removals:
        zero(model, group, units)
    expected = [Reference(model).run(feed) for feed in feeds(model)]
    remove(model, context(model).fact(CHANNEL_GROUPS), removals)
    session = Reference(model)
    for feed, outputs in zip(feeds(model), expected, strict=True):
        for name, wanted in outputs.items():
            scale = max(1.0, float(np.abs(wanted).max()))
            np.testing.assert_allclose(session.run(feed)[name], wanted, atol=1e-5 * scale)
