"""Where a model holds weights that codebooks can carry, and why the others stay as they are.

What is shared is a tensor, and whatever reads it reads the same numbers afterwards. So layers that share a weight go on
sharing it, and one that something else reads as well can be shared too.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx_ir as ir

from graphopt.analyses.quantized import find_quantized
from graphopt.errors import OptionError
from graphopt.pass_base import Change
from graphopt.targets import WEIGHT_AXES
from graphopt_passes.quant.sites import Site, Weight, keyed_nodes, tensor_of

__all__ = ["WeightTensor", "choose", "find_tensors"]

Array = np.ndarray[Any, np.dtype[Any]]

_KINDS = (ir.DataType.FLOAT, ir.DataType.FLOAT16)


@dataclass(eq=False)
class WeightTensor:
    """A constant that layers have as a weight.

    Attributes:
        value: Where it stands.
        sites: The layers, each with this weight alone; the first says how it is a matrix.
        kept: Why it stays as it is; empty if it need not.
    """

    value: ir.Value
    sites: list[Site] = field(default_factory=list[Site])
    kept: str = ""

    @property
    def tensor(self) -> ir.TensorProtocol:
        """Its numbers, which stay on disk until they are read."""
        tensor = tensor_of(self.value)
        if tensor is None:
            raise TypeError(f"{self.value.name!r} is not constant")
        return tensor

    @property
    def weight(self) -> Weight:
        """How the first layer reads it."""
        return self.sites[0].weights[0]


def find_tensors(model: ir.Model) -> tuple[tuple[WeightTensor, ...], tuple[Change, ...]]:
    """Find all weights, subgraphs included, and say of layers without a usable one why they have none."""
    found, skipped = dict[ir.Value, WeightTensor](), list[Change]()
    main, quantized = set(model.graph), find_quantized(model)
    for key, node in keyed_nodes(model).items():
        if node.op_type not in WEIGHT_AXES or node.domain not in ("", "ai.onnx"):
            continue
        name, layer = node.name or key, quantized.get(node)
        if layer:
            skipped.append(Change.skipped(name, f"already quantized ({layer})"))
            continue
        for index, axis in () if _is_plain_gather(node) else _ports(node):
            value = node.inputs[index] if index < len(node.inputs) else None
            reason = _why_not(value)
            if value is None or reason:
                skipped.append(Change.skipped(name, reason))
                continue
            shape = tuple(int(size) for size in _shape(value))
            weight = Weight(index, value.name or "", axis % len(shape), shape)
            tensor = found.setdefault(value, WeightTensor(value))
            tensor.sites.append(Site(key, name, node.op_type, (weight,), node in main))
    for function in model.functions.values():
        skipped += [
            Change.skipped(f"{function.name}/{node.name}", "inside a function; inline it first")
            for node in function
            if node.op_type in WEIGHT_AXES and node.op_type != "Gather"
        ]
    return tuple(found.values()), tuple(skipped)


def choose(
    tensors: Iterable[WeightTensor], only: Sequence[str], skip: Sequence[str]
) -> tuple[tuple[WeightTensor, ...], tuple[Change, ...]]:
    """Keep the weights that the options `only` and `skip` leave; both hold shell patterns of node names.

    A weight that several layers read is taken if all of them are.

    Raises:
        OptionError: A pattern matches no layer with a weight.
    """
    tensors = tuple(tensors)
    names = [site.name for tensor in tensors for site in tensor.sites]
    for option, patterns in (("only", only), ("skip", skip)):
        for pattern in patterns:
            if not any(fnmatch.fnmatchcase(name, pattern) for name in names):
                hint = f"there are {len(names)}, such as {', '.join(names[:4])}" if names else "the model has none"
                raise OptionError(f"share.{option}", f"{pattern!r} matches no layer with a weight", hint)
    kept, skipped = list[WeightTensor](), list[Change]()
    for tensor in tensors:
        reasons = {site.name: _left_out(site.name, only, skip) for site in tensor.sites}
        first = next(((name, reason) for name, reason in reasons.items() if reason), None)
        if first is None:
            kept.append(tensor)
            continue
        shared = f"its weight is shared with {first[0]!r}, which is left alone"
        skipped += [Change.skipped(name, reason or shared) for name, reason in reasons.items()]
    return tuple(kept), tuple(skipped)


def _left_out(name: str, only: Sequence[str], skip: Sequence[str]) -> str:
    if only and not any(fnmatch.fnmatchcase(name, pattern) for pattern in only):
        return "not named by only"
    return "named by skip" if any(fnmatch.fnmatchcase(name, pattern) for pattern in skip) else ""


def _ports(node: ir.Node) -> Iterator[tuple[int, int]]:
    """(input, axis of its output channels) for every weight of a node; of a MatMul one factor is the weight."""
    ports = WEIGHT_AXES[node.op_type]
    if node.op_type == "MatMul":
        held = [port for port in ports if tensor_of(node.inputs[port.input]) is not None]
        ports = tuple(held[:1] or ports[:1])
    for port in ports:
        flip = bool(port.flipped_by) and bool(node.attributes.get_int(port.flipped_by, 0))
        yield port.input, 1 - port.axis if flip else port.axis


def _is_plain_gather(node: ir.Node) -> bool:
    """A Gather that looks up no rows of a table: sizes, single numbers, or what is computed."""
    return node.op_type == "Gather" and len(_shape(node.inputs[0])) < 2


def _shape(value: ir.Value | None) -> Sequence[int]:
    """Shape of a constant; empty for other values."""
    tensor = tensor_of(value)
    return () if tensor is None else tensor.shape.numpy()


def _why_not(value: ir.Value | None) -> str:
    """Why a value carries no codebook; empty if it can."""
    tensor = tensor_of(value)
    if value is None or tensor is None:
        if value is not None and value.is_initializer() and value.is_graph_input():
            return "its weight is also an input, which a caller may replace"
        return "its weight is computed; fold constants first"
    if tensor.dtype not in _KINDS:
        return f"its weight is {tensor.dtype.name.lower()}, only floats of 32 or 16 bits get codebooks"
    if len(tensor.shape) < 2:
        return "its weight is a vector"
    if value.is_graph_output():
        return "its weight is also an output of the model"
    return "its weight is empty" if tensor.size == 0 else ""
