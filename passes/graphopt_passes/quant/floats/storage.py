"""Weights stored in fewer bits behind a Cast; arithmetic stays float32. Runtimes fold the Cast when they load."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import onnx_ir as ir

from graphopt_passes._own_constants import constant_tensor
from graphopt_passes.quant.builder import Builder
from graphopt_passes.quant.floats._rounding import LEAST_WEIGHT_SQNR, rounding_of
from graphopt_passes.quant.floats.rewrite import insert_behind, narrow_tensor
from graphopt_passes.quant.sites import QUANTIZED_OPERATORS, keyed_nodes

__all__ = ["StoredWeight", "cast_weights", "constants_of", "find_weights", "store"]

_LEAST_SIZE = 128  # elements that pay for a Cast and its names
_MOVES_BITS = {ir.DataType.FLOAT16: LEAST_WEIGHT_SQNR, ir.DataType.BFLOAT16: 0.0}


@dataclass(frozen=True)
class StoredWeight:
    """A float32 constant that may be stored in fewer bits.

    Attributes:
        key: The node that makes it, or `graph number/name` of an initializer; the same in any copy of the model.
        site: Name of the first node that reads it, for reports.
        readers: Keys of all that do.
        size: Number of elements.
        sqnr: Signal to noise of the rounding in dB.
        refusal: Why it stays as it is; empty if it may change.
    """

    key: str
    site: str
    readers: tuple[str, ...]
    size: int
    sqnr: float = 0.0
    refusal: str = ""


def find_weights(model: ir.Model, dtype: ir.DataType, left: Callable[[str, ir.Node], str]) -> list[StoredWeight]:
    """Constants that are large enough to be worth a Cast, subgraphs included.

    Args:
        model: The model.
        dtype: What they would be stored in.
        left: Says why the weights of a node are not to be touched; empty if they may be.
    """
    keys = {node: key for key, node in keyed_nodes(model).items()}
    found: list[StoredWeight] = []
    for key, value in constants_of(model).items():
        tensor = constant_tensor(value)
        users = [user for user in value.consumers() if user in keys]
        if tensor is None or tensor.dtype != ir.DataType.FLOAT or tensor.size < _LEAST_SIZE or not users:
            continue
        if any(user.op_type in QUANTIZED_OPERATORS | {"Cast"} for user in users):
            continue  # the scales of what is quantized already, or a weight that is stored this way
        refusal = next((why for user in users if (why := left(keys[user], user))), "")
        if value.is_graph_output():
            refusal = "its weight is also an output of the model"
        site = users[0].name or keys[users[0]]
        readers = tuple(keys[user] for user in users)
        sqnr = 0.0
        if not refusal:
            rounding = rounding_of(tensor, dtype)
            sqnr = rounding.sqnr
            if rounding.overflows:
                refusal = f"{rounding.overflows} of {rounding.count} weights overflow {_name(dtype)}"
            elif rounding.sqnr < _MOVES_BITS[dtype]:
                refusal = f"its weights keep {rounding.sqnr:.1f} dB of signal to noise in {_name(dtype)}"
        found.append(StoredWeight(key, site, readers, int(tensor.size), sqnr, refusal))
    return found


def cast_weights(model: ir.Model, weights: list[StoredWeight], dtype: ir.DataType) -> None:
    """Store weights in another type, each behind a Cast to float32; in place."""
    builder, constants = Builder(model), constants_of(model)
    for weight in weights:
        value = constants[weight.key]
        tensor = constant_tensor(value)
        if tensor is None:
            raise TypeError(f"{weight.key!r} is no constant")
        stored = store(builder, value, narrow_tensor(tensor, dtype), _name(dtype))
        cast = builder.node("Cast", [stored], f"{value.name}_fp32", {"to": int(ir.DataType.FLOAT)})
        insert_behind(stored, [cast])
        value.replace_all_uses_with(cast.outputs[0])
        builder.discard(value)


def store(builder: Builder, value: ir.Value, tensor: ir.TensorProtocol, ending: str) -> ir.Value:
    """Add an initializer beside a constant that it will replace, with its documentation."""
    graph = value.graph
    if not isinstance(graph, ir.Graph):
        raise TypeError(f"constant {value.name!r} is in no graph")
    tensor.name = name = builder.name(f"{value.name}_{ending}")
    shape = ir.Shape(tensor.shape.numpy())
    stored = ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=shape, const_value=tensor)
    stored.doc_string = value.doc_string
    stored.metadata_props.update(value.metadata_props)
    graph.register_initializer(stored)
    return stored


def constants_of(model: ir.Model) -> dict[str, ir.Value]:
    """Initializers and the outputs of Constant nodes of all graphs, by a key that copies of the model share."""
    found: dict[str, ir.Value] = {}
    for number, graph in enumerate(model.graphs()):
        values = [*graph.initializers.values(), *(n.outputs[0] for n in graph if n.op_type == "Constant")]
        found |= {f"{number}/{value.name}": value for value in values}
    return found


def _name(dtype: ir.DataType) -> str:
    return {ir.DataType.FLOAT16: "fp16", ir.DataType.BFLOAT16: "bf16"}[dtype]
