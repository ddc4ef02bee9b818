"""Where a model holds weights that integers can carry, and why the others stay as they are."""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from graphopt.analyses.quantized import find_quantized
from graphopt.errors import OptionError
from graphopt.pass_base import Change

__all__ = [
    "KEPT",
    "QUANTIZED_OPERATORS",
    "RECURRENT",
    "Site",
    "Weight",
    "choose",
    "find_sites",
    "graph_of",
    "key_of",
    "keyed_nodes",
    "tensor_of",
    "unshared",
]

KEPT = "graphopt.quant.kept"
"""Key in the `meta` of a node that stays float; holds the reason."""
RECURRENT = frozenset({"GRU", "LSTM", "RNN"})
QUANTIZED_OPERATORS = frozenset(
    {
        "ConvInteger", "DequantizeLinear", "DynamicQuantizeLinear", "MatMulInteger", "QLinearConv", "QLinearMatMul",
        "QuantizeLinear", "MatMulNBits", "QGemm", "QLinearAdd", "QAttention", "DynamicQuantizeMatMul",
    }
)  # fmt: skip

_LINEAR = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul"})
_REPORTED_SIZE = 64
_MOVERS = frozenset({"Reshape", "Transpose", "Identity", "Cast", "Unsqueeze", "Squeeze", "Constant", "Slice", "Concat"})


@dataclass(frozen=True)
class Weight:
    """One weight of a site.

    Attributes:
        index: Input of the node that it is.
        value: Name of the value.
        axis: Axis with a scale for each index.
        shape: Its shape.
    """

    index: int
    value: str
    axis: int
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Number of elements."""
        return int(np.prod(self.shape))

    @property
    def channels(self) -> int:
        """Number of scales."""
        return self.shape[self.axis]


@dataclass(frozen=True)
class Site:
    """A node with constant float weights.

    Attributes:
        key: Finds its node in any copy of the model, see `keyed_nodes`.
        name: Name of the node, for reports.
        operator: Operator type.
        weights: Its weights; more than one in recurrent layers.
        main: It stands in the main graph, where activations can be seen.
    """

    key: str
    name: str
    operator: str
    weights: tuple[Weight, ...]
    main: bool = True


def key_of(node: ir.Node) -> str:
    """Name of the first named output of a node; unlike node names these are unique within a graph."""
    return next((output.name for output in node.outputs if output.name), "")


def graph_of(node: ir.Node) -> ir.Graph:
    """The graph that a node stands in.

    Raises:
        TypeError: It stands in none, or in a function.
    """
    if not isinstance(node.graph, ir.Graph):
        raise TypeError(f"node {node.name!r} is in no graph")
    return node.graph


def keyed_nodes(model: ir.Model) -> dict[str, ir.Node]:
    """All nodes by key: in the main graph `key_of`, in subgraphs, which may use a name twice, after their number."""
    graphs = enumerate(model.graphs())
    return {f"{i}/{key_of(node)}" if i else key_of(node): node for i, graph in graphs for node in graph}


def tensor_of(value: ir.Value | None) -> ir.TensorProtocol | None:
    """The tensor of an initializer that no caller can replace, or of a Constant node; None for all other values."""
    if value is None or value.is_graph_input():
        return None
    producer = value.producer()
    if producer is None:
        return value.const_value if value.is_initializer() else None
    attribute = producer.attributes.get("value") if producer.op_type == "Constant" and not producer.domain else None
    return attribute.as_tensor() if attribute is not None and not attribute.is_ref() else None


def find_sites(model: ir.Model) -> tuple[tuple[Site, ...], tuple[Change, ...]]:
    """Find all sites, subgraphs included, and say of the other nodes with weights why they are none."""
    sites: list[Site] = []
    skipped: list[Change] = []
    main, quantized = set(model.graph), find_quantized(model)
    for key, node in keyed_nodes(model).items():
        layer = quantized.get(node)
        found = f"already quantized ({layer})" if layer else _site(key, node, main=node in main)
        if isinstance(found, Site):
            sites.append(found)
        elif found:
            skipped.append(Change.skipped(node.name or key, found))
    for function in model.functions.values():
        skipped += [
            Change.skipped(f"{function.name}/{node.name}", "inside a function; inline it first")
            for node in function
            if node.op_type in _LINEAR | RECURRENT
        ]
    return tuple(sites), tuple(skipped)


def unshared(model: ir.Model, sites: Sequence[Site]) -> tuple[tuple[Site, ...], tuple[Change, ...]]:
    """Leave out sites whose weight something else reads as well: the float weight would have to stay."""
    nodes = keyed_nodes(model)
    known = {nodes[site.key] for site in sites}
    kept: list[Site] = []
    skipped: list[Change] = []
    for site in sites:
        values = [nodes[site.key].inputs[weight.index] for weight in site.weights]
        others = [user for value in values if value is not None for user in value.consumers() if user not in known]
        if others:
            reason = f"its weight is shared with {others[0].name or others[0].op_type!r}, which stays in float"
            skipped.append(Change.skipped(site.name, reason))
        else:
            kept.append(site)
    return tuple(kept), tuple(skipped)


def choose(
    sites: Sequence[Site], only: Sequence[str], skip: Sequence[str]
) -> tuple[tuple[Site, ...], tuple[Change, ...]]:
    """Keep the sites that the options `only` and `skip` leave; both hold shell patterns of node names.

    Raises:
        OptionError: A pattern matches no site.
    """
    for option, patterns in (("only", only), ("skip", skip)):
        for pattern in patterns:
            if not any(fnmatch.fnmatchcase(site.name, pattern) for site in sites):
                names = ", ".join(site.name for site in sites[:4])
                hint = f"there are {len(sites)}, such as {names}" if sites else "the model has none"
                raise OptionError(f"quant.{option}", f"{pattern!r} matches no layer that can be quantized", hint)
    kept: list[Site] = []
    skipped: list[Change] = []
    for site in sites:
        if only and not any(fnmatch.fnmatchcase(site.name, pattern) for pattern in only):
            skipped.append(Change.skipped(site.name, "not named by only"))
        elif any(fnmatch.fnmatchcase(site.name, pattern) for pattern in skip):
            skipped.append(Change.skipped(site.name, "named by skip"))
        else:
            kept.append(site)
    return tuple(kept), tuple(skipped)


def _site(key: str, node: ir.Node, *, main: bool) -> Site | str | None:
    """The site at a node, the reason why it is none, or None if it holds no weights worth a line."""
    kind = node.op_type
    if KEPT in node.meta:
        return str(node.meta[KEPT])
    if node.domain not in ("", "ai.onnx"):
        return f"{node.domain}::{kind} is not a standard operator" if _holds_weights(node) else None
    if kind in QUANTIZED_OPERATORS:
        return "already quantized" if kind not in ("QuantizeLinear", "DequantizeLinear") else None
    if kind == "MatMul":
        return _matmul(key, node, main=main)
    ports = _ports(node)
    if not ports:
        worth = kind not in _MOVERS and _holds_weights(node)
        return f"{kind} stays in float" if worth else None
    if kind == "Gather" and not _is_table(node):
        return None
    weights = tuple(_weight(node, index, axis) for index, axis in ports)
    return _join(key, node, weights, main=main)


def _matmul(key: str, node: ir.Node, *, main: bool) -> Site | str:
    """A MatMul holds its weight on the right, or on the left with the roles exchanged."""
    if tensor_of(node.inputs[1]) is None and tensor_of(node.inputs[0]) is None:
        if _is_quantized(node.inputs[1]) or _is_quantized(node.inputs[0]):
            return "already quantized"
        if any(_is_replaceable(value) for value in node.inputs):
            return "its weight is also an input, which a caller may replace"
        return "both operands are computed"
    index = 1 if tensor_of(node.inputs[1]) is not None else 0
    return _join(key, node, (_weight(node, index, -1 if index else -2),), main=main)


def _join(key: str, node: ir.Node, weights: tuple[Weight | str, ...], *, main: bool) -> Site | str:
    for weight in weights:
        if isinstance(weight, str):
            return weight
    kept = tuple(weight for weight in weights if isinstance(weight, Weight))
    return Site(key, node.name or key, node.op_type, kept, main)


def _ports(node: ir.Node) -> tuple[tuple[int, int], ...]:
    """(input, axis of its output channels) for every weight of an operator."""
    if node.op_type == "Gemm":
        return ((1, 0 if node.attributes.get_int("transB", 0) else 1),)
    if node.op_type in RECURRENT:
        return ((1, 1), (2, 1))
    return {"Conv": ((1, 0),), "ConvTranspose": ((1, 1),), "Gather": ((0, -1),)}.get(node.op_type, ())


def _weight(node: ir.Node, index: int, axis: int) -> Weight | str:
    value = node.inputs[index]
    tensor = tensor_of(value)
    if value is None or tensor is None:
        if _is_quantized(value):
            return "already quantized"
        if _is_replaceable(value):
            return "its weight is also an input, which a caller may replace"
        return "its weight is computed; fold constants first"
    if tensor.dtype != ir.DataType.FLOAT:
        return f"its weight is {tensor.dtype.name.lower()}, only float32 is quantized"
    shape = tuple(int(size) for size in tensor.shape.numpy())
    if len(shape) < 2:
        return "its weight is a vector"
    if value.is_graph_output():
        return "its weight is also an output of the model"
    return Weight(index, value.name or "", axis % len(shape), shape)


def _is_table(node: ir.Node) -> bool:
    """An embedding: rows of a constant float matrix, looked up by number."""
    tensor = tensor_of(node.inputs[0])
    axis = node.attributes.get_int("axis", 0)
    if any(use.node.op_type == "DequantizeLinear" and use.idx == 1 for use in node.outputs[0].uses()):
        return False  # scales of rows that are looked up beside them
    return tensor is not None and tensor.dtype == ir.DataType.FLOAT and len(tensor.shape) == 2 and axis == 0


def _is_quantized(value: ir.Value | None) -> bool:
    producer = value.producer() if value is not None else None
    while producer is not None and producer.op_type in _MOVERS and producer.inputs and producer.inputs[0] is not None:
        producer = producer.inputs[0].producer()
    return producer is not None and producer.op_type in QUANTIZED_OPERATORS


def _is_replaceable(value: ir.Value | None) -> bool:
    return value is not None and value.is_initializer() and value.is_graph_input()


def _holds_weights(node: ir.Node) -> bool:
    tensors = (tensor_of(value) for value in node.inputs)
    return any(t is not None and t.dtype.is_floating_point() and t.size >= _REPORTED_SIZE for t in tensors)
