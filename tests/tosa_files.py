"""Small TOSA files for tests of what compiles them; the extra `graphopt[npu]` has to be there."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

EXTRA = "pip install 'graphopt[npu]'"


def chain(names: Sequence[str], size: int = 8, channels: int = 16) -> bytes:
    """3x3 convolutions in a row, each brought back to 8 bits in the tensor of the given name."""
    import tosa_serializer as tosa

    graph, rng = _graph(), np.random.default_rng(0)
    int8, int32, shape = tosa.DType.INT8, tosa.DType.INT32, [1, size, size, channels]
    graph.addInputTensor(tosa.TosaSerializerTensor("x", shape, int8))
    block, current = graph.currRegion.currBasicBlock, "x"
    zero8, zero32 = _constant(graph, np.zeros(1, np.int8), int8), _constant(graph, np.zeros(1, np.int32), int32)
    for index, name in enumerate(names):
        weight = rng.integers(-127, 127, (channels, 3, 3, channels)).astype(np.int8)
        bias = rng.integers(-500, 500, channels).astype(np.int32)
        block.addTensor(f"sum{index}", shape, int32)
        block.addTensor(name, shape, int8)
        conv, rescale = tosa.TosaSerializerAttribute(), tosa.TosaSerializerAttribute()
        conv.Conv2dAttribute([1, 1, 1, 1], [1, 1], [1, 1], False, int32)
        rescale.RescaleAttribute(True, tosa.RoundingMode.SINGLE_ROUND, True, False, False)
        inputs = [current, _constant(graph, weight, int8), _constant(graph, bias, int32), zero8, zero8]
        graph.addOperator(tosa.Op.CONV2D, inputs, [f"sum{index}"], conv)
        multiplier = _constant(graph, np.full(channels, 1 << 30, np.int32), int32)
        shift = _constant(graph, np.full(channels, 40, np.int8), int8)
        graph.addOperator(tosa.Op.RESCALE, [f"sum{index}", multiplier, shift, zero32, zero8], [name], rescale)
        current = name
    block.addOutput(current)
    return bytes(graph.serialize())


def refused_by_vela() -> bytes:
    """A product over an axis, which no Ethos-U55 computes."""
    import tosa_serializer as tosa

    graph, attribute = _graph(), tosa.TosaSerializerAttribute()
    graph.addInputTensor(tosa.TosaSerializerTensor("x", [1, 8, 8, 16], tosa.DType.INT32))
    attribute.ReduceProductAttribute(1)
    output = graph.addOutput([1, 1, 8, 16], tosa.DType.INT32)
    graph.addOperator(tosa.Op.REDUCE_PRODUCT, ["x"], [output.name], attribute)
    return bytes(graph.serialize())


def crossed() -> bytes:
    """Three inputs and outputs of different sizes, in orders of their own."""
    import tosa_serializer as tosa

    graph = _graph()
    for name, size in (("small", 2), ("large", 8), ("middle", 4)):
        graph.addInputTensor(tosa.TosaSerializerTensor(name, [1, size, size, 16], tosa.DType.INT32))
    outputs = {size: graph.addOutput([1, size, size, 16], tosa.DType.INT32).name for size in (8, 2, 4)}
    for name, size in (("middle", 4), ("small", 2), ("large", 8)):
        attribute = tosa.TosaSerializerAttribute()
        attribute.AbsAttribute()
        graph.addOperator(tosa.Op.ABS, [name], [outputs[size]], attribute)
    return bytes(graph.serialize())


def _graph() -> Any:
    import tosa_serializer as tosa

    return tosa.TosaSerializer("", targetMajor=1, targetMinor=0, targetPatch=0, targetDraft=False)


def _constant(graph: Any, array: np.ndarray, dtype: Any) -> str:
    made = graph.addConst(list(array.shape), dtype, array)
    return made if isinstance(made, str) else made.name
