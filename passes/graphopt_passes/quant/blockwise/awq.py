"""Scale what layers read and their weights against each other before rounding, by data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import onnx_ir as ir

from graphopt.analyses import LayerMoments, LinearInput
from graphopt_passes.quant.blockwise._scaling import search_scales
from graphopt_passes.quant.blockwise.fit import Method
from graphopt_passes.quant.blockwise.layout import layout_of
from graphopt_passes.quant.blockwise.scaling import divide_input
from graphopt_passes.quant.blockwise.store import is_fusable
from graphopt_passes.quant.builder import Builder
from graphopt_passes.quant.sites import Site, tensor_of

__all__ = ["scale_inputs"]


def scale_inputs(
    builder: Builder,
    nodes: Mapping[str, ir.Node],
    labels: Mapping[str, str],
    sites: Sequence[Site],
    methods: Mapping[str, Method | None],
    moments: dict[str, LayerMoments],
    reads: Mapping[str, LinearInput],
) -> dict[str, str]:
    """Find scales for layers that read the same, multiply their weights and divide what they read.

    MatMul and Gemm with a matrix on the right are scaled, others are left alone. The weights become new initializers,
    which the rounding replaces; `moments` become those of the divided inputs.

    Args:
        builder: Edits the model.
        nodes: Its nodes by site.
        labels: What facts call each site.
        sites: Sites with moments.
        methods: How each site is rounded, by key.
        moments: By label; changed.
        reads: What layers read, by label.

    Returns:
        Where scales went, by label, for reports.
    """
    together: dict[LinearInput, list[Site]] = {}
    for site in sites:
        if _can_scale(nodes[site.key], site, methods[site.key], moments[labels[site.key]]):
            together.setdefault(reads[labels[site.key]], []).append(site)
    done: dict[str, str] = {}
    for group in together.values():
        layer, method, value = moments[labels[group[0].key]], methods[group[0].key], nodes[group[0].key].inputs[0]
        if layer.xx is None or method is None or value is None:
            raise TypeError("checked above")
        h = layer.xx[0] / max(1, layer.rows)
        weights = [_matrix(nodes[site.key], site) for site in group]
        found = search_scales(weights, h.astype(np.float32), method.rule(len(h), data=True))
        if found is None:
            continue
        scales, left = found
        readers = [nodes[site.key] for site in group]
        place = divide_input(builder, value, readers, scales)
        for site in group:
            _multiply(builder, nodes[site.key], site, scales)
            moments[labels[site.key]] = _divided(layer, scales)
            done[labels[site.key]] = f"awq: {left:.2f} of the error, {place}"
    return done


def _can_scale(node: ir.Node, site: Site, method: Method | None, moments: LayerMoments) -> bool:
    if method is None or method.algorithm != "awq" or len(site.weights) != 1 or len(site.weights[0].shape) != 2:
        return False
    value = node.inputs[site.weights[0].index]
    alone = value is not None and len(value.uses()) == 1
    return is_fusable(node, site.weights[0].index) and alone and moments.xx is not None and moments.finite


def _matrix(node: ir.Node, site: Site) -> np.ndarray:
    weight = site.weights[0]
    tensor = tensor_of(node.inputs[weight.index])
    if tensor is None:
        raise TypeError(f"the weight of {node.name!r} is not constant")
    return layout_of(site, weight, node).matrix(tensor.numpy())


def _multiply(builder: Builder, node: ir.Node, site: Site, scales: np.ndarray) -> None:
    """Read the weight times the scales; the product is made when it is asked for, one tensor at a time."""
    weight = site.weights[0]
    old, layout = node.inputs[weight.index], layout_of(site, weight, node)
    tensor = tensor_of(old)
    if old is None or tensor is None or not isinstance(node.graph, ir.Graph):
        raise TypeError(f"the weight of {node.name!r} is not constant")
    factors, name = scales if layout.axis else scales[:, None], builder.name(f"{old.name}_scaled")
    product = ir.LazyTensor(
        lambda: ir.Tensor((tensor.numpy() * factors).astype(np.float32), name=name),
        ir.DataType.FLOAT,
        ir.Shape(weight.shape),
        name=name,
    )
    value = ir.Value(name=name, type=ir.TensorType(product.dtype), shape=product.shape, const_value=product)
    node.graph.register_initializer(value)
    node.replace_input_with(weight.index, value)
    builder.discard(old)


def _divided(moments: LayerMoments, scales: np.ndarray) -> LayerMoments:
    xx = None if moments.xx is None else moments.xx / np.outer(scales, scales)
    return LayerMoments(moments.rows, moments.mean / scales, moments.squares / np.square(scales), xx)
