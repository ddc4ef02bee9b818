"""BatchNormalization, and arithmetic with a constant per channel, folded into the linear layer beside it."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir

from graphopt.analyses import Shapes
from graphopt.pass_base import Change
from graphopt_passes.fold import _batchnorm as maths
from graphopt_passes.fold._linear import Linear, Refusal, find_linear, input_channels_of, store, weight_of
from graphopt_passes.fold.rewiring import (
    DETERMINISTIC_DOMAINS,
    FreshNames,
    bypass,
    constant,
    only_reader,
    replace_node,
    site,
)

__all__ = ["fold_affine"]

Array = np.ndarray[Any, np.dtype[Any]]
_ARITHMETIC = frozenset({"Add", "Div", "Mul", "Sub"})
_INFERENCE_SINCE = 7
_TRAINING_ATTRIBUTE_SINCE = 14


def fold_affine(model: ir.Model, shapes: Shapes, names: FreshNames, limit: int) -> list[Change]:
    """Fold every BatchNormalization and per-channel Add, Sub, Mul, Div that stands beside a linear layer."""
    opset = model.opset_imports.get("", 0)
    changes: list[Change] = []
    for graph in list(model.graphs()):
        for node in graph:
            if node.domain not in DETERMINISTIC_DOMAINS or node.op_type not in _ARITHMETIC | {"BatchNormalization"}:
                continue
            if opset < _INFERENCE_SINCE:
                if node.op_type == "BatchNormalization":
                    changes.append(Change.skipped(site(node), f"opset {opset} does not say that it is inference"))
                continue
            change = _visit(node, shapes, names, limit, opset)
            if change is not None:
                changes.append(change)
    return changes


def _visit(node: ir.Node, shapes: Shapes, names: FreshNames, limit: int, opset: int) -> Change | None:
    place = site(node)
    try:
        if node.op_type == "BatchNormalization":
            return Change(place, _fold_batchnorm(node, shapes, names, limit, opset))
        action = _fold_arithmetic(node, shapes, names, limit)
        return None if action is None else Change(place, action)
    except Refusal as e:
        return Change.skipped(place, str(e))


def _fold_batchnorm(node: ir.Node, shapes: Shapes, names: FreshNames, limit: int, opset: int) -> str:
    scale, shift = _statistics(node, opset)
    try:
        linear = find_linear(node.inputs[0], node, shapes)
    except Refusal as backward:
        linear, reason = None, str(backward)
    else:
        reason = "no linear layer computes its input"
    if linear is None:
        try:
            return _fold_forward(node, scale, shift, names, limit)
        except Refusal as forward:
            raise Refusal(f"{reason}, and {forward}") from forward
    if linear.axis == -1 and linear.rank != 2:
        raise Refusal(f"its channels are not the last axis of {site(linear.node)!r}")
    if scale.shape != (linear.channels,):
        raise Refusal(f"it has {scale.size} channels, {site(linear.node)!r} has {linear.channels}")
    return _fold_into(linear, node, scale, shift, names, limit)


def _statistics(node: ir.Node, opset: int) -> tuple[Array, Array]:
    """Scale and shift of a BatchNormalization in inference."""
    if node.attributes.get_int("training_mode", 0):
        raise Refusal("it is in training mode")
    if not node.attributes.get_int("spatial", 1):
        raise Refusal("it normalizes every position on its own (spatial=0)")
    extra = [value for value in node.outputs[1:] if value.name]
    if extra and (opset < _TRAINING_ATTRIBUTE_SINCE or any(v.uses() or v.is_graph_output() for v in extra)):
        raise Refusal("its running statistics are read, so it is in training mode")
    tensors = [constant(value) for value in node.inputs[1:5]]
    parts = [tensor.numpy() for tensor in tensors if tensor is not None]
    if len(parts) != 4:
        raise Refusal("its scale or statistics are not constant")
    scale, bias, mean, variance = parts
    return maths.affine_of_batchnorm(scale, bias, mean, variance, node.attributes.get_float("epsilon", 1e-5))


def _fold_arithmetic(node: ir.Node, shapes: Shapes, names: FreshNames, limit: int) -> str | None:
    """Fold `x op c` or `c op x`; None if this is no such thing."""
    tensors = [constant(value) for value in node.inputs]
    if len(tensors) != 2 or (tensors[0] is None) == (tensors[1] is None):
        return None
    index = 0 if tensors[0] is None else 1
    number = tensors[1 - index]
    if number is None or number.dtype not in (ir.DataType.FLOAT, ir.DataType.DOUBLE, ir.DataType.FLOAT16):
        return None
    linear = find_linear(node.inputs[index], node, shapes)
    if linear is None or (node.op_type == "Add" and linear.node.op_type == "MatMul" and linear.adder is None):
        return None  # an Add behind a MatMul is its bias
    values = _per_channel(number.numpy().astype(np.float64), linear)
    ones, zeros = np.ones_like(values), np.zeros_like(values)
    if node.op_type == "Div" and index == 1:
        raise Refusal("it divides by the output of a linear layer")
    if node.op_type == "Div" and not values.all():
        raise Refusal("it divides by zero")
    sign = 1.0 if index == 0 else -1.0
    scale, shift = {
        "Add": lambda: (ones, values),
        "Sub": lambda: (ones * sign, -values * sign),
        "Mul": lambda: (values, zeros),
        "Div": lambda: (1.0 / values, zeros),
    }[node.op_type]()
    return _fold_into(linear, node, scale, shift, names, limit)


def _per_channel(values: Array, linear: Linear) -> Array:
    """Bring a constant to one number per output channel, [C]."""
    rank = linear.rank if linear.rank is not None else 1
    if values.ndim > rank:
        raise Refusal("its constant has more axes than the layer before it")
    shape = (1,) * (rank - values.ndim) + values.shape
    axis = linear.axis % rank if rank else 0
    if any(size != 1 for i, size in enumerate(shape) if i != axis) or (
        shape and shape[axis] not in (1, linear.channels)
    ):
        raise Refusal("its constant is not one number per channel")
    return np.broadcast_to(values.reshape(-1), (linear.channels,)).copy()


def _fold_into(linear: Linear, node: ir.Node, scale: Array, shift: Array, names: FreshNames, limit: int) -> str:
    """Fold what `node` does to the output of `linear` into its weight and bias, and remove `node`."""
    bias, place = linear.bias_values(), linear.bias()
    steps = []
    if (scale != 1).any():
        steps.append(store(linear.node, 1, linear.scaled_weight(scale), names, limit))
    moved = shift if bias is None else bias * scale + shift
    kept = bias is None and not shift.any()
    if place is not None and not kept:
        steps.append(store(*place, lambda: moved, names, limit))
    done = f"folded into {site(linear.node)!r}"
    if place is None and shift.any():
        kind = linear.weight.dtype or ir.DataType.FLOAT
        held = _constant(moved.astype(kind.numpy()), names.make(f"{site(node)}_shift"), node)
        replace_node(node, "Add", [linear.output, held], names)
        done += "; its shift became an Add"
    elif reason := bypass(node, linear.output):
        raise Refusal(reason)
    for step in steps:
        step()
    if linear.node.op_type == "Gemm" and not kept:
        linear.node.attributes.pop("beta", None)
    return done


def _constant(array: Array, name: str, node: ir.Node) -> ir.Value:
    tensor = ir.Tensor(array, name=name)
    value = ir.Value(name=name, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype), const_value=tensor)
    assert node.graph is not None
    node.graph.register_initializer(value)
    return value


def _fold_forward(node: ir.Node, scale: Array, shift: Array, names: FreshNames, limit: int) -> str:
    """Fold a BatchNormalization into the Conv or Gemm that alone reads it."""
    reader, source = only_reader(node.outputs[0]), node.inputs[0]
    if (
        reader is None
        or source is None
        or reader.op_type not in ("Conv", "Gemm")
        or reader.inputs[0] is not node.outputs[0]
    ):
        raise Refusal("no Conv or Gemm alone reads its output")
    if reader.graph is not node.graph or reader.domain not in DETERMINISTIC_DOMAINS:
        raise Refusal("its reader is in another graph")
    weight = weight_of(reader).const_value
    if weight is None or input_channels_of(reader) != scale.size:
        raise Refusal(f"{site(reader)!r} reads another number of channels")
    if reader.op_type == "Conv" and shift.any() and _pads(reader):
        raise Refusal(f"{site(reader)!r} after it pads with zeros, which its shift would move")
    if reader.op_type == "Gemm" and reader.attributes.get_int("transA", 0):
        raise Refusal(f"{site(reader)!r} after it transposes its input")
    bias = Linear(reader, None, weight_of(reader), 0, None, 1).bias_values()
    array = weight.numpy()
    if reader.op_type == "Conv":
        scaled, added = maths.shift_through_conv(array, scale, shift, reader.attributes.get_int("group", 1))
    else:
        transposed = bool(reader.attributes.get_int("transB", 0))
        scaled = maths.scale_columns(array, scale, transposed=False) if transposed else maths.scale_conv(array, scale)
        added = (
            shift @ (array.T if transposed else array).astype(np.float64) * reader.attributes.get_float("alpha", 1.0)
        )
    steps = [
        store(reader, 1, lambda: scaled, names, limit),
        store(reader, 2, lambda: added if bias is None else bias + added, names, limit),
    ]
    if reason := bypass(node, source):
        raise Refusal(reason)
    for step in steps:
        step()
    if reader.op_type == "Gemm":
        reader.attributes.pop("beta", None)
    return f"folded into {site(reader)!r} after it"


def _pads(node: ir.Node) -> bool:
    if node.attributes.get_string("auto_pad", "NOTSET") not in ("NOTSET", "VALID"):
        return True
    return any(node.attributes.get_ints("pads", ()))
