"""Integers that several dynamic layers share: rounded activations, and weights in the layouts these layers want."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir

from graphopt_passes.quant._maths import decibel, quantize_weight, weight_scales
from graphopt_passes.quant.builder import Builder, Integers, insert_behind

__all__ = ["Rounding"]

Array = np.ndarray[Any, np.dtype[Any]]
_MIDDLE = 128


class Rounding:
    """Rounds activations and weights of one model, each once.

    Args:
        builder: Edits the model.
    """

    def __init__(self, builder: Builder) -> None:
        self.builder = builder
        self._activations: dict[tuple[ir.Value, ir.Graph], tuple[ir.Value, ir.Value, ir.Value]] = {}
        self._weights: dict[tuple[ir.Value, str, bool], Integers] = {}

    def activation(self, source: ir.Value, graph: ir.Graph) -> tuple[ir.Value, ir.Value, ir.Value]:
        """Integers, scale and zero point of a value, found anew on every run, for the readers in one graph.

        What a subgraph reads from outside is rounded inside: outside it would be rounded on runs that skip the branch.
        """
        key = (source, graph)
        if key not in self._activations:
            words = ("u8", "u8_scale", "u8_zero")
            outputs = [ir.Value(name=self.builder.name(f"{source.name}_{word}")) for word in words]
            node = ir.node("DynamicQuantizeLinear", [source], outputs=outputs, name=outputs[0].name)
            insert_behind(source, graph, [node])
            self._activations[key] = (outputs[0], outputs[1], outputs[2])
        return self._activations[key]

    def batch(self, value: ir.Value, tensor: ir.TensorProtocol, *, per_channel: bool) -> Integers:
        """Weights `[..., rows, columns]` with scales `[..., 1, columns]`, a set of its own for each batch entry."""
        key = (value, "batch", per_channel)
        if key not in self._weights:
            weight = tensor.numpy()
            if per_channel:
                flat = np.moveaxis(weight, -2, 0)  # [rows, ..., columns]
                table = flat.reshape(flat.shape[0], -1)
                scales = weight_scales(table, 1, self.builder.bits)
                rounded = np.moveaxis(quantize_weight(table, scales, 1, self.builder.bits).reshape(flat.shape), 0, -2)
                scales = np.expand_dims(scales.reshape(flat.shape[1:]), -2)
            else:
                scales = weight_scales(weight, None, self.builder.bits)
                rounded = quantize_weight(weight, scales, None, self.builder.bits)
            self._weights[key] = self._stored(value, weight, np.ascontiguousarray(rounded), scales)
        return self._weights[key]

    def kernel(self, value: ir.Value, tensor: ir.TensorProtocol, *, per_channel: bool) -> Integers:
        """Kernels `[out, in, ...]` as uint8 around 128 with scales `[out, 1, ...]`.

        ONNX Runtime computes ConvInteger on int8 kernels ten times slower than on uint8.
        """
        key = (value, "kernel", per_channel)
        if key not in self._weights:
            weight, axis = tensor.numpy(), 0 if per_channel else None
            scales = weight_scales(weight, axis, 8)  # two unsigned factors cannot saturate, so no bit is spared
            rounded = quantize_weight(weight, scales, axis, 8)
            if per_channel:
                scales = scales.reshape(-1, *(1,) * (weight.ndim - 2))
            unsigned = (rounded.astype(np.int16) + _MIDDLE).astype(np.uint8)
            self._weights[key] = self._stored(value, weight, unsigned, scales, middle=_MIDDLE)
        return self._weights[key]

    def middle(self) -> ir.Value:
        """Zero point of `kernel`."""
        return self.builder.scalar("kernel_zero", np.array(_MIDDLE, np.uint8))

    def _stored(self, value: ir.Value, weight: Array, integers: Array, scales: Array, middle: int = 0) -> Integers:
        spread = scales if not middle or not scales.ndim else scales[:, None]  # kernels lack the axis of the inputs
        error = weight - (integers.astype(np.float32) - middle) * spread
        sqnr = decibel(float(np.vdot(weight, weight)), float(np.vdot(error, error)))
        graph, name = self.builder.place(value), value.name or "weight"
        return Integers(
            self.builder.constant(f"{name}_q", integers, graph),
            self.builder.constant(f"{name}_scale", scales, graph),
            sqnr,
        )
