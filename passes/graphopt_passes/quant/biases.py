"""Constant biases of linear layers, in the node itself or in the Add behind it."""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from graphopt_passes.quant.sites import Site, bias_place, tensor_of

__all__ = ["Bias", "bias_of"]


@dataclass(frozen=True)
class Bias:
    """A constant bias, [channels], and the input of a node that it is."""

    node: ir.Node
    index: int
    tensor: ir.TensorProtocol


def bias_of(node: ir.Node, site: Site) -> Bias | None:
    """Constant bias of a convolution, of a Gemm (see `plain_gemms`), or in an Add behind a MatMul.

    ONNX Runtime makes a Gemm of MatMul and Add, and computes a Gemm on integers only if its bias is integer too.
    """
    holder, index = node, 2
    if site.operator == "MatMul":
        place = bias_place(node) if site.weights[0].index == 1 and len(site.weights[0].shape) == 2 else None
        if place is None:
            return None
        holder, index = place
    tensor = tensor_of(holder.inputs[index]) if index < len(holder.inputs) else None
    if tensor is None or tensor.dtype != ir.DataType.FLOAT or len(tensor.shape) != 1:
        return None
    if site.operator in ("Gemm", "MatMul") and tensor.size != site.weights[0].channels:
        return None
    return Bias(holder, index, tensor)
