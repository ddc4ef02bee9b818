"""Models written as ONNX text, with weights given beside them."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir

__all__ = ["build"]

Array = np.ndarray[Any, np.dtype[Any]]


def build(text: str, opset: int = 17, **weights: Array | tuple[int, ...]) -> ir.Model:
    """A model from text; names it reads and nobody makes become initializers, normal where only a shape is given."""
    declared = "".join(f", {_type(array)} {name}" for name, array in weights.items())
    head, _, tail = text.strip().partition(") =>")
    model = ir.from_onnx_text(f'<ir_version: 8, opset_import: ["" : {opset}]>{head}{declared}) =>{tail}')
    rng = np.random.default_rng(7)
    for value in list(model.graph.inputs):
        if value.name in weights:
            given = weights[value.name]
            array = rng.standard_normal(given).astype(np.float32) / 4 if isinstance(given, tuple) else given
            model.graph.inputs.remove(value)
            value.const_value, value.shape = ir.tensor(array, name=value.name), ir.Shape(array.shape)
            model.graph.register_initializer(value)
    return model


def _type(given: Array | tuple[int, ...]) -> str:
    shape = given if isinstance(given, tuple) else given.shape
    plain = isinstance(given, tuple) or given.dtype.kind == "f"
    kind = "float" if plain else str(given.dtype)
    return f"{kind}[{','.join(map(str, shape))}]" if shape else kind
