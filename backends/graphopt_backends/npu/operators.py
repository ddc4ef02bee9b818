"""The one table of what the NPU computes: which TOSA operations an ONNX operator becomes, and on what conditions."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from graphopt_backends.npu.emitter import Emitter, Placed, Refusal
from graphopt_backends.npu.lower import convolutions, curves, elementwise, moves, pooling, products, resize, softmax
from graphopt_backends.npu.units import CURVE, Operand, Unit
from graphopt_backends.npu.work import Work, plain

__all__ = ["RULES", "Rule", "lower", "refusal", "take"]


@dataclass(frozen=True)
class Rule:
    """How an operator is computed.

    Attributes:
        becomes: TOSA operations, for people.
        add: Adds them to a graph.
        when: What it must be like, beyond int8 (or int16) in and out and fixed sizes.
    """

    becomes: str
    add: Callable[[Unit, Work], None]
    when: str = ""


_WINDOW = "windows up to 64 rows and 4096 elements"

RULES: Mapping[str, Rule] = {
    "Add": Rule("RESCALE, ADD, RESCALE", elementwise.add),
    "ArgMax": Rule("ARGMAX", pooling.arg_max, "the first of equals; U55 and U65: int8, at most 127 elements"),
    "AveragePool": Rule(
        "DEPTHWISE_CONV2D, RESCALE", pooling.average_pool, f"{_WINDOW}; int16: none that reach over the border"
    ),
    "BatchNormalization": Rule("RESCALE, ADD, RESCALE", elementwise.normalize),
    "Clip": Rule("CLAMP", moves.identity),
    "Concat": Rule("RESCALE, CONCAT", moves.concat),
    "Conv": Rule("CONV2D or DEPTHWISE_CONV2D, RESCALE", convolutions.conv, f"constant int8 weights; {_WINDOW}"),
    "ConvTranspose": Rule(
        "CONV2D or DEPTHWISE_CONV2D, RESCALE, CONCAT", convolutions.conv_transpose, "constant int8 weights"
    ),
    "DepthToSpace": Rule("RESHAPE, TRANSPOSE", moves.depth_to_space),
    "Div": Rule("RESCALE, MUL, RESCALE, or DEPTHWISE_CONV2D, RESCALE", elementwise.divide, "by constants"),
    "Flatten": Rule("RESHAPE", moves.reshape),
    "Gemm": Rule("CONV2D, RESCALE", products.dense, "constant int8 weights"),
    "GlobalAveragePool": Rule("RESCALE, REDUCE_SUM, RESCALE", pooling.global_average_pool),
    "GlobalMaxPool": Rule("REDUCE_MAX", pooling.global_max_pool),
    "Identity": Rule("nothing", moves.identity),
    "MatMul": Rule("CONV2D or MATMUL, RESCALE", products.matmul, "two activations: int8"),
    "Max": Rule("RESCALE, MAXIMUM", elementwise.largest, "two operands"),
    "MaxPool": Rule("MAX_POOL2D", pooling.max_pool, "windows up to 256 rows, no dilation"),
    "Min": Rule("RESCALE, MINIMUM", elementwise.largest, "two operands"),
    "Mul": Rule("RESCALE, MUL, RESCALE, or DEPTHWISE_CONV2D, RESCALE", elementwise.multiply),
    "PRelu": Rule(
        "DEPTHWISE_CONV2D, RESCALE, MAXIMUM", elementwise.prelu, "a slope for each channel, all up to 1 or all from 1"
    ),
    "Pad": Rule("PAD", moves.pad, "with a constant"),
    "ReduceMax": Rule("REDUCE_MAX", pooling.reduce),
    "ReduceMean": Rule("RESCALE, REDUCE_SUM, RESCALE", pooling.reduce),
    "ReduceMin": Rule("REDUCE_MIN", pooling.reduce),
    "ReduceSum": Rule("RESCALE, REDUCE_SUM, RESCALE", pooling.reduce),
    "Relu": Rule("CLAMP", moves.identity),
    "Reshape": Rule("RESHAPE", moves.reshape),
    "Resize": Rule(
        "RESIZE or TILE; linear: RESIZE, DEPTHWISE_CONV2D, RESCALE",
        resize.resize,
        "height and width; linear: by whole numbers on U55 and U65",
    ),
    "Slice": Rule("SLICE, REVERSE", moves.slices),
    "Softmax": Rule("TABLE, REDUCE_SUM, MUL, ...", softmax.softmax, "int8"),
    "SpaceToDepth": Rule("RESHAPE, TRANSPOSE", moves.space_to_depth),
    "Split": Rule("SLICE", moves.split),
    "Squeeze": Rule("RESHAPE", moves.reshape),
    "Sub": Rule("RESCALE, SUB, RESCALE", elementwise.subtract),
    "Transpose": Rule("TRANSPOSE", moves.transpose),
    "Unsqueeze": Rule("RESHAPE", moves.reshape),
    CURVE: Rule("TABLE", curves.curve, "int8; chains of functions of one element, between one rounding and the next"),
}


def lower(unit: Unit, work: Work) -> None:
    """Add a unit to a graph that holds what it reads.

    Raises:
        Refusal: The NPU cannot compute it.
    """
    rule = RULES.get(unit.kind) if unit.node.domain in ("", "ai.onnx") else None
    if rule is None:
        wide = any(operand is not None and operand.grid and operand.grid.dtype == "int16" for operand in unit.inputs)
        raise Refusal("tables have entries for int8 alone" if wide else "there is no form of it on integers")
    work.emitter.site = unit.name
    rule.add(unit, work)


def refusal(unit: Unit, family: str) -> str:
    """Why the NPU cannot compute a unit, found by trying; empty if it can."""
    work = Work(Emitter(family))
    try:
        for operand in unit.inputs:
            if operand is not None and operand.array is None:
                take(operand, work)
        lower(unit, work)
        for value in unit.results:  # as a part of the model would give it away
            placed = work.values[value]
            work.emitter.arrange(placed, plain(len(placed.order)))
    except Refusal as e:
        return str(e)
    return ""


def take(operand: Operand, work: Work) -> None:
    """Make an input of the graph of what a unit reads.

    Raises:
        Refusal: It is nothing that a graph can take.
    """
    if operand.grid is None:
        raise Refusal("it reads a computed value that is no int8")
    if not operand.shape:
        raise Refusal("it reads a scalar")
    tensor = work.emitter.input(operand.value.name or "", operand.shape, operand.grid.dtype)
    work.values[operand.value] = Placed(tensor, plain(len(operand.shape)))
