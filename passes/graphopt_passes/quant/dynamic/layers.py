"""Put one layer on integers whose input grid is found on every run.

    y = cast(MatMulInteger(x_q, w_q, x_zero)) * (x_scale * w_scale) [+ bias]

ONNX Runtime merges these nodes into DynamicQuantizeMatMul, or into MatMulIntegerToFloat where several layers share
the rounded input, bias included.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir

from graphopt.pass_base import Change
from graphopt_passes.quant.builder import Integers
from graphopt_passes.quant.dynamic.rounding import Rounding
from graphopt_passes.quant.sites import Site, graph_of, tensor_of

__all__ = ["quantize_dynamic"]


def quantize_dynamic(rounding: Rounding, node: ir.Node, site: Site, *, per_channel: bool, why: str = "") -> Change:
    """Replace a MatMul, Gemm or Conv by integer arithmetic.

    Args:
        rounding: What the dynamic layers of the model share.
        node: The node; it may stand in a subgraph.
        site: Its site, for which `why_not_dynamic` has no reason.
        per_channel: One scale for each output channel.
        why: Why static ranges were not used.
    """
    value, output = node.inputs[site.weights[0].index], node.outputs[0]
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    if value is None:
        raise TypeError(f"{site.name!r} has lost its weight")
    edit = _Edit(rounding, node, site)
    if site.operator == "Conv":
        integers = edit.conv(value, per_channel=per_channel)
    else:
        integers = edit.product(value, per_channel=per_channel)
    output.replace_all_uses_with(edit.result, replace_graph_outputs=True)
    edit.graph.remove(node, safe=True)
    edit.result.name = output.name
    for left in (value, bias):
        if left is not None:
            rounding.builder.discard(left)
    details = {"bits": rounding.builder.bits, "weights": site.weights[0].size}
    action = "int8, input ranges found on every run" + (f": {why}" if why else "")
    scales = {"scales": "channel" if per_channel else "tensor", "weight_sqnr_db": round(integers.sqnr_db, 1)}
    return Change(site.name, action, details={**details, **scales})


class _Edit:
    """The nodes that replace one layer, in the order in which they run; the last one makes `result`."""

    def __init__(self, rounding: Rounding, node: ir.Node, site: Site) -> None:
        self.rounding, self.builder = rounding, rounding.builder
        self.node, self.site, self.graph = node, site, graph_of(node)
        self.name = node.outputs[0].name or ""
        self.result = node.outputs[0]

    def product(self, value: ir.Value, *, per_channel: bool) -> Integers:
        """Build a MatMul or Gemm."""
        left = self.site.weights[0].index == 0
        integers = self._matrix(value, per_channel=per_channel)
        rounded, scale, zero = self._activation(self.node.inputs[1 if left else 0])
        flip = self._flip(self.node.inputs[1]) if left else [1, 0] if self._flag("transA") else []
        if flip:
            rounded = self._add("Transpose", [rounded], "turned", {"perm": flip})
        summed = self._layer("MatMulInteger", [rounded, integers.value, zero])
        bias = self._gemm_bias()
        scaled = self._scale(summed, scale, integers.scale, last=bias is None and not left)
        if bias is not None:
            self._last("Add", [scaled, bias])
        elif left:
            self._last("Transpose", [scaled], {"perm": flip})
        return integers

    def conv(self, value: ir.Value, *, per_channel: bool) -> Integers:
        """Build a Conv; its padding is the zero point."""
        tensor = tensor_of(value)
        if tensor is None:
            raise TypeError(f"{self.site.name!r} has lost its weight")
        integers = self.rounding.kernel(value, tensor, per_channel=per_channel)
        rounded, scale, zero = self._activation(self.node.inputs[0])
        summed = self._layer(
            "ConvInteger", [rounded, integers.value, zero, self.rounding.middle()], self.node.attributes
        )
        bias = self._conv_bias(len(tensor.shape) - 2)
        scaled = self._scale(summed, scale, integers.scale, last=bias is None)
        if bias is not None:
            self._last("Add", [scaled, bias])
        return integers

    def _matrix(self, value: ir.Value, *, per_channel: bool) -> Integers:
        weight, tensor = self.site.weights[0], tensor_of(value)
        if tensor is None:
            raise TypeError(f"{self.site.name!r} has lost its weight")
        if len(weight.shape) > 2:
            return self.rounding.batch(value, tensor, per_channel=per_channel)
        factor = self.node.attributes.get_float("alpha", 1.0) if self.site.operator == "Gemm" else 1.0
        transposed = weight.index == 0 or weight.axis == 0
        axis = weight.axis if per_channel else None
        return self.builder.integers(value, tensor, axis, transposed=transposed, factor=factor)

    def _activation(self, source: ir.Value | None) -> tuple[ir.Value, ir.Value, ir.Value]:
        if source is None:
            raise TypeError(f"{self.site.name!r} has lost its input")
        return self.rounding.activation(source, self.graph)

    def _flip(self, source: ir.Value | None) -> list[int]:
        """Permutation that exchanges the last two axes."""
        if source is None or source.shape is None:
            raise TypeError(f"the rank of the input of {self.site.name!r} is unknown")
        rank = source.shape.rank()
        return [*range(rank - 2), rank - 1, rank - 2]

    def _flag(self, attribute: str) -> bool:
        return self.site.operator == "Gemm" and bool(self.node.attributes.get_int(attribute, 0))

    def _gemm_bias(self) -> ir.Value | None:
        """What a Gemm adds, times beta."""
        bias = self.node.inputs[2] if len(self.node.inputs) > 2 else None
        beta = self.node.attributes.get_float("beta", 1.0)
        if bias is None or beta in (0.0, 1.0):
            return bias if beta else None
        tensor = tensor_of(bias)
        if tensor is None:
            return self._add("Mul", [bias, self.builder.scalar("beta", np.array(beta, np.float32))], "bias")
        return self.builder.constant(f"{bias.name}_beta", (tensor.numpy() * np.float32(beta)).astype(np.float32))

    def _conv_bias(self, spatial: int) -> ir.Value | None:
        """The bias `[C]` of a Conv as `[C, 1, ...]`."""
        bias = self.node.inputs[2] if len(self.node.inputs) > 2 else None
        if bias is None:
            return None
        tensor = tensor_of(bias)
        if tensor is None:
            shape = self.builder.scalar("bias_shape", np.array([-1, *(1,) * spatial], np.int64))
            return self._add("Reshape", [bias, shape], "bias")
        return self.builder.constant(f"{bias.name}_{spatial}d", tensor.numpy().reshape(-1, *(1,) * spatial))

    def _scale(self, summed: ir.Value, scale: ir.Value, weight_scale: ir.Value, *, last: bool) -> ir.Value:
        cast = self._add("Cast", [summed], "cast", {"to": int(ir.DataType.FLOAT)})
        scales = self._add("Mul", [scale, weight_scale], "scale")
        return self._last("Mul", [cast, scales]) if last else self._add("Mul", [cast, scales], "scaled")

    def _add(
        self, kind: str, inputs: list[ir.Value], word: str, attributes: dict[str, int | list[int]] | None = None
    ) -> ir.Value:
        name = self.builder.name(f"{self.name}_{word}")
        node = ir.node(kind, inputs, attributes or {}, outputs=[ir.Value(name=name)], name=name)
        self.graph.insert_before(self.node, node)
        return node.outputs[0]

    def _layer(self, kind: str, inputs: list[ir.Value], attributes: Mapping[str, ir.Attr] | None = None) -> ir.Value:
        """The integer product; it takes over name, documentation and metadata of the layer."""
        old, output = self.node, ir.Value(name=self.builder.name(f"{self.name}_int32"))
        node = ir.node(kind, inputs, attributes or {}, outputs=[output], name=old.name, doc_string=old.doc_string)
        node.metadata_props.update(old.metadata_props)
        self.graph.insert_before(old, node)
        return output

    def _last(self, kind: str, inputs: list[ir.Value], attributes: dict[str, list[int]] | None = None) -> ir.Value:
        """The node whose result takes the place of the layer's."""
        output, name = self.node.outputs[0], self.builder.name(f"{self.name}_float")
        self.result = ir.Value(name=output.name, type=output.type, shape=output.shape, doc_string=output.doc_string)
        self.result.metadata_props.update(output.metadata_props)
        self.graph.insert_before(self.node, ir.node(kind, inputs, attributes or {}, outputs=[self.result], name=name))
        return self.result
