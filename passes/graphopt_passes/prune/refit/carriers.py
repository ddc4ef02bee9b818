"""Weights that a layer does not read as they are stored, but turned round or in another shape."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from graphopt.analyses import Constants
from graphopt_passes._own_constants import put_tensor

__all__ = ["Carried", "constant_behind", "set_constant"]

_ONNX = ("", "ai.onnx")
_CARRIERS = ("Identity", "Reshape", "Transpose")


@dataclass(frozen=True, eq=False)
class Carried:
    """A constant and what its numbers are put through on the way to a layer.

    Attributes:
        root: The constant; only this way leads from it.
        array: Its numbers as the layer reads them, float64.
        steps: From the constant to the layer, the shape before a step and the permutation that it applies; None where
            it only states another shape.
    """

    root: ir.Value
    array: np.ndarray
    steps: tuple[tuple[tuple[int, ...], tuple[int, ...] | None], ...] = ()

    @classmethod
    def of(cls, value: ir.Value | None, constants: Constants) -> Carried | str:
        """What a layer's weight is made of, or why that cannot be changed.

        Args:
            value: The weight, as the layer reads it.
            constants: The model's constants.
        """
        nodes = list[ir.Node]()
        tensor = constants.of(value)
        while value is not None and tensor is None:
            maker = value.producer()
            if maker is None or maker.domain not in _ONNX or maker.op_type not in _CARRIERS:
                return "its weight is computed"
            if _shared(value):
                return "others read its weight"
            nodes.append(maker)
            value = maker.inputs[0]
            tensor = constants.of(value)
        if value is None or tensor is None:
            return "its weight is computed"
        if tensor.dtype not in (ir.DataType.FLOAT, ir.DataType.DOUBLE, ir.DataType.FLOAT16):
            return f"its weight is {tensor.dtype.name.lower()}"
        if _shared(value):
            return "others read its weight"
        array, steps = tensor.numpy().astype(np.float64), list[tuple[tuple[int, ...], tuple[int, ...] | None]]()
        for node in reversed(nodes):
            steps.append((array.shape, None))
            if node.op_type == "Transpose":
                order = tuple(node.attributes.get_ints("perm", range(array.ndim)[::-1]))
                steps[-1] = array.shape, order
                array = array.transpose(order)
            elif node.op_type == "Reshape":
                shape = constants.of(node.inputs[1])
                if shape is None or node.attributes.get_int("allowzero", 0):
                    return "its weight is given a shape that is computed"
                sizes = shape.numpy().tolist()
                array = array.reshape([size or array.shape[i] for i, size in enumerate(sizes)])
        return cls(value, array, tuple(steps))

    def stored(self, array: np.ndarray) -> np.ndarray:
        """The layer's weight, as it is to be stored."""
        for shape, order in reversed(self.steps):
            array = array.reshape(shape) if order is None else array.transpose(np.argsort(order))
        return array


def _shared(value: ir.Value) -> bool:
    return len(value.uses()) != 1 or value.is_graph_output()


def constant_behind(value: ir.Value) -> ir.TensorProtocol:
    """The constant behind a value: an initializer, or made by a Constant node."""
    producer = value.producer()
    if producer is None:
        assert value.const_value is not None
        return value.const_value
    (attribute,) = producer.attributes.values()
    return attribute.as_tensor() if attribute.name == "value" else ir.tensor(attribute.value, dtype=ir.DataType.FLOAT)


def set_constant(value: ir.Value, array: np.ndarray) -> None:
    """Give a constant other numbers, in its own type."""
    old = constant_behind(value)
    tensor = ir.Tensor(
        np.ascontiguousarray(array.astype(old.dtype.numpy())),
        dtype=old.dtype,
        name=old.name,
        doc_string=old.doc_string,
        metadata_props=dict(old.metadata_props),
    )
    put_tensor(value, tensor)
