"""Where a model holds weights that integers can carry, and why the others stay as they are."""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from graphopt.analyses.names import Names
from graphopt.analyses.quantized import find_quantized
from graphopt.errors import OptionError
from graphopt.pass_base import Change
from graphopt.targets import WEIGHT_AXES

__all__ = [
    "KEPT",
    "QUANTIZED_OPERATORS",
    "RECURRENT",
    "Site",
    "Weight",
    "bias_place",
    "choose",
    "find_sites",
    "graph_of",
    "keep_named",
    "key_of",
    "keyed_nodes",
    "tell_apart",
    "tensor_of",
    "usable",
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
    """Name of the first named output of a node; unlike node names these are unique within a graph.

    In a model whose values are told apart it is the node's key.
    """
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
    """All nodes by key: what `Names` calls their first named output, in a model of `tell_apart` its name.

    A node comes before those in its subgraphs, and these before the nodes behind it.
    """
    names = Names(model)
    return {_called(node, names): node for node in model.graph.all_nodes()}


def tell_apart(model: ir.Model) -> None:
    """Rename values inside subgraphs, in place, so that no two values that nodes make or read share a name."""
    for value, name in Names(model).renamed.items():
        if not value.is_initializer():
            value.name = name


def _called(node: ir.Node, names: Names) -> str:
    return next((names.key(output) for output in node.outputs if output.name), "")


def tensor_of(value: ir.Value | None) -> ir.TensorProtocol | None:
    """The tensor of an initializer that no caller can replace, or of a Constant node; None for all other values."""
    if value is None or value.is_graph_input():
        return None
    producer = value.producer()
    if producer is None:
        return value.const_value if value.is_initializer() else None
    attribute = producer.attributes.get("value") if producer.op_type == "Constant" and not producer.domain else None
    return attribute.as_tensor() if attribute is not None and not attribute.is_ref() else None


def bias_place(node: ir.Node) -> tuple[ir.Node, int] | None:
    """The node and input that hold the bias of a MatMul; None for other layers, and where there is none."""
    if node.op_type != "MatMul" or node.outputs[0].is_graph_output():
        return None
    uses = tuple(node.outputs[0].uses())
    if len(uses) != 1 or uses[0].node.op_type != "Add" or uses[0].node.graph is not node.graph:
        return None
    index = 1 - uses[0].idx
    return (uses[0].node, index) if tensor_of(uses[0].node.inputs[index]) is not None else None


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


def usable(model: ir.Model, sites: Sequence[Site]) -> tuple[tuple[Site, ...], tuple[Change, ...]]:
    """Leave out sites whose weight something else reads as well, which keeps it float, or that holds infinities."""
    nodes = keyed_nodes(model)
    known = {nodes[site.key] for site in sites}
    kept: list[Site] = []
    skipped: list[Change] = []
    for site in sites:
        values = [value for w in site.weights if (value := nodes[site.key].inputs[w.index]) is not None]
        others = [user for value in values for user in value.consumers() if user not in known]
        if others:
            reason = f"its weight is shared with {others[0].name or others[0].op_type!r}, which stays in float"
            skipped.append(Change.skipped(site.name, reason))
        elif not all(_is_finite(tensor_of(value)) for value in values):
            skipped.append(Change.skipped(site.name, "its weight holds infinities"))
        else:
            kept.append(site)
    return tuple(kept), tuple(skipped)


def _is_finite(tensor: ir.TensorProtocol | None) -> bool:
    array = np.zeros(1, np.float32) if tensor is None else np.asarray(tensor.numpy())
    return bool(np.isfinite(array.min()) and np.isfinite(array.max()))  # one pass each, and no copy


def keep_named(model: ir.Model, patterns: Sequence[str]) -> None:
    """Mark all nodes whose names match one of the shell patterns of the option `skip` as nodes that stay float."""
    for node in model.graph.all_nodes():
        if any(fnmatch.fnmatchcase(node.name or "", pattern) for pattern in patterns):
            node.meta[KEPT] = "named by skip"


def choose(
    sites: Sequence[Site], only: Sequence[str], skip: Sequence[str], others: Sequence[str] = ()
) -> tuple[tuple[Site, ...], tuple[Change, ...]]:
    """Keep the sites that the options `only` and `skip` leave; both hold shell patterns of node names.

    Args:
        sites: The sites.
        only: Patterns of those to keep; none: all.
        skip: Patterns of those to leave out.
        others: Names that patterns may mean as well.

    Raises:
        OptionError: A pattern matches no site, and none of the others.
    """
    known = (*(site.name for site in sites), *others)
    for option, patterns in (("only", only), ("skip", skip)):
        for pattern in patterns:
            if not any(fnmatch.fnmatchcase(name, pattern) for name in known):
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
        worth = kind not in _MOVERS and _holds_weights(node) and not _is_bias(node)
        return f"{kind} stays in float" if worth else None
    if kind == "Gather" and not _is_table(node):
        return None
    weights = tuple(_weight(node, index, axis) for index, axis in ports)
    return _join(key, node, weights, main=main)


def _matmul(key: str, node: ir.Node, *, main: bool) -> Site | str:
    """A MatMul holds its weight on the right, or on the left with the roles exchanged."""
    if tensor_of(node.inputs[1]) is None and tensor_of(node.inputs[0]) is None:
        reasons = filter(None, map(_why_not_constant, (node.inputs[1], node.inputs[0])))
        return next(reasons, "both operands are computed")
    side = next(side for side in WEIGHT_AXES["MatMul"] if tensor_of(node.inputs[side.input]) is not None)
    return _join(key, node, (_weight(node, side.input, side.axis),), main=main)


def _join(key: str, node: ir.Node, weights: tuple[Weight | str, ...], *, main: bool) -> Site | str:
    for weight in weights:
        if isinstance(weight, str):
            return weight
    kept = tuple(weight for weight in weights if isinstance(weight, Weight))
    return Site(key, node.name or key, node.op_type, kept, main)


def _ports(node: ir.Node) -> tuple[tuple[int, int], ...]:
    """(input, axis of its output channels) for every weight of an operator."""
    ports = WEIGHT_AXES.get(node.op_type, ())
    flipped = (bool(port.flipped_by) and node.attributes.get_int(port.flipped_by, 0) for port in ports)
    return tuple((port.input, 1 - port.axis if flip else port.axis) for port, flip in zip(ports, flipped, strict=True))


def _weight(node: ir.Node, index: int, axis: int) -> Weight | str:
    value = node.inputs[index]
    tensor = tensor_of(value)
    if value is None or tensor is None:
        return _why_not_constant(value) or "its weight is computed; fold constants first"
    if tensor.dtype != ir.DataType.FLOAT:
        return f"its weight is {tensor.dtype.name.lower()}, only float32 is quantized"
    shape = tuple(int(size) for size in tensor.shape.numpy())
    if len(shape) < 2:
        return "its weight is a vector"
    if 0 in shape:
        return "its weight is empty"
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


def _why_not_constant(value: ir.Value | None) -> str:
    """What keeps a value that looks like a weight from being one; empty if it is just computed."""
    if value is not None and value.is_initializer() and value.is_graph_input():
        return "its weight is also an input, which a caller may replace"
    producer = value.producer() if value is not None else None
    while producer is not None and producer.op_type in _MOVERS and producer.inputs and producer.inputs[0] is not None:
        stored = tensor_of(producer.inputs[0])
        if stored is not None and stored.dtype.is_floating_point() and stored.dtype != ir.DataType.FLOAT:
            return f"its weight is stored in {stored.dtype.name.lower()} already"
        producer = producer.inputs[0].producer()
    return "already quantized" if producer is not None and producer.op_type in QUANTIZED_OPERATORS else ""


def _is_bias(node: ir.Node) -> bool:
    """Whether a node is the Add whose vector belongs to the layer before it."""
    makers = (value.producer() for value in node.inputs if value is not None and node.op_type == "Add")
    for maker in makers:
        place = bias_place(maker) if maker is not None else None
        if maker is not None and place is not None and place[0] is node:
            vector = tensor_of(node.inputs[place[1]])
            weighed = any(tensor_of(factor) is not None for factor in maker.inputs)
            return weighed and vector is not None and len(vector.shape) == 1
    return False


def _holds_weights(node: ir.Node) -> bool:
    tensors = (tensor_of(value) for value in node.inputs)
    return any(t is not None and t.dtype.is_floating_point() and t.size >= _REPORTED_SIZE for t in tensors)
