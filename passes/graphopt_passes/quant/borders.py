"""Where new integers meet old ones: a value that is rounded already keeps the grid it has."""

from __future__ import annotations

from typing import Literal

import numpy as np
import onnx_ir as ir

from graphopt_passes.quant._maths import Grid
from graphopt_passes.quant.sites import tensor_of

__all__ = ["existing_grid", "existing_pair", "leads_to_other_integers"]


def existing_pair(value: ir.Value) -> tuple[ir.Value, Grid] | None:
    """The rounded form of an activation that the model came with, and its grid; None if there is none of 8 bits.

    Either the value is what a DequantizeLinear made of computed integers, or a QuantizeLinear reads it whose result a
    DequantizeLinear turns back.
    """
    producer = value.producer()
    if producer is not None and producer.op_type == "DequantizeLinear":
        integers = producer.inputs[0]
        grid = _grid(producer)
        return (value, grid) if grid is not None and tensor_of(integers) is None else None
    for reader in value.consumers():
        if reader.op_type != "QuantizeLinear" or reader.inputs[0] is not value or reader.graph is not value.graph:
            continue
        grid = _grid(reader)
        for later in reader.outputs[0].consumers():
            if grid is not None and later.op_type == "DequantizeLinear" and _grid(later) == grid:
                return later.outputs[0], grid
    return None


def existing_grid(value: ir.Value | None, dtype: Literal["uint8", "int8"]) -> Grid | None:
    """The grid that an activation of the model is on, or is rounded to, in integers of a type.

    Between int8 and uint8 the zero point moves by 128 and the numbers stay the same, so a second rounding is exact.
    """
    found = existing_pair(value) if value is not None else None
    grid = found[1] if found is not None else _rounded_to(value)
    if grid is None or grid.dtype == dtype:
        return grid
    return Grid(grid.scale, grid.zero_point + (128 if dtype == "uint8" else -128), dtype)


def leads_to_other_integers(value: ir.Value, dtype: Literal["uint8", "int8"]) -> bool:
    """Whether the model rounds a value to 8-bit integers of another type.

    Runtimes have no kernel whose input and result differ in that, so the result is rounded to both.
    """
    grid = _rounded_to(value)
    return grid is not None and grid.dtype != dtype


def _rounded_to(value: ir.Value | None) -> Grid | None:
    """The grid of the first QuantizeLinear beside a value's maker that reads it."""
    if value is None:
        return None
    near = (reader for reader in value.consumers() if reader.graph is value.graph)
    grids = (_grid(reader) for reader in near if reader.op_type == "QuantizeLinear" and reader.inputs[0] is value)
    return next((grid for grid in grids if grid is not None), None)


def _grid(node: ir.Node) -> Grid | None:
    """The grid of a QuantizeLinear or DequantizeLinear with one constant scale and 8-bit integers."""
    scale = tensor_of(node.inputs[1])
    zero = node.inputs[2] if len(node.inputs) > 2 else None
    offset = tensor_of(zero)
    if scale is None or scale.size != 1 or scale.dtype != ir.DataType.FLOAT or (zero is not None and offset is None):
        return None
    step = float(scale.numpy().reshape(()))
    if offset is None:
        output = node.attributes.get_int("output_dtype", 0)
        return Grid(step, 0, "uint8") if node.op_type == "QuantizeLinear" and not output else None
    if offset.dtype not in (ir.DataType.INT8, ir.DataType.UINT8):
        return None
    kind = "int8" if offset.dtype == ir.DataType.INT8 else "uint8"
    return Grid(step, int(np.asarray(offset.numpy()).reshape(())), kind)
