"""Values known before the model runs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import onnx_ir as ir

from graphopt.analyses.names import Names
from graphopt.pass_base import Analysis, Context

__all__ = ["CONSTANTS", "Constants", "ConstantsAnalysis"]


@dataclass(frozen=True)
class Constants:
    """Constant tensors by value name: initializers that no caller can replace, and outputs of Constant nodes.

    Attributes:
        tensors: The tensors, subgraphs included.
        names: What a value is called where two graphs use one name.
    """

    tensors: Mapping[str, ir.TensorProtocol]
    names: Names = field(default_factory=Names)

    def of(self, value: ir.Value | None) -> ir.TensorProtocol | None:
        """The tensor behind a value, None if it is computed or fed."""
        return None if value is None else self.tensors.get(self.names.key(value))


@dataclass(frozen=True)
class ConstantsAnalysis(Analysis[Constants]):
    """Collect initializers and Constant nodes of all graphs, without reading their data."""

    name: ClassVar[str] = "constants"

    def compute(self, model: ir.Model, ctx: Context) -> Constants:
        """Collect the constants."""
        found: dict[str, ir.TensorProtocol] = {}
        names = Names(model)
        for scope in names.scopes:
            fed = {value.name for value in scope.graph.inputs}
            for name, value in scope.graph.initializers.items():
                if value.const_value is not None and name not in fed:
                    found[names.key(value)] = value.const_value
            for node in scope.graph:
                if node.op_type == "Constant" and node.domain == "" and node.outputs[0].name:
                    tensor = _constant(node)
                    if tensor is not None:
                        found[names.key(node.outputs[0])] = tensor
        return Constants(found, names)


def _constant(node: ir.Node) -> ir.TensorProtocol | None:
    attribute = next(iter(node.attributes.values()), None)
    if attribute is None or attribute.is_ref():
        return None
    if attribute.name == "value":
        tensor: ir.TensorProtocol = attribute.value  # as_tensor() would compare it with the whole protocol
        return tensor
    if attribute.name in ("value_float", "value_floats"):
        return ir.tensor(attribute.value, dtype=ir.DataType.FLOAT)
    if attribute.name in ("value_int", "value_ints"):
        return ir.tensor(attribute.value, dtype=ir.DataType.INT64)
    return None


CONSTANTS = ConstantsAnalysis()
