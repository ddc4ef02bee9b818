"""Which inputs and outputs of a node may become narrow floats, by the operator's own type constraints.

A type variable that ONNX allows to be float16 becomes float16 in all places at once; a place of fixed type, such as
the scales of Resize, and a variable without float16 keep float32. So the table follows the opset of the model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import onnx
import onnx_ir as ir

from graphopt.analyses.names import subgraphs
from graphopt_passes.fold.rewiring import RANDOM
from graphopt_passes.quant.sites import QUANTIZED_OPERATORS

__all__ = ["BLIND", "Ports", "is_widening", "ports_of"]

_FLOAT, _HALF = "tensor(float)", "tensor(float16)"
_KEPT_VARIABLES = {"Resize": ("T2",)}
BLIND = frozenset({"Shape", "Size"})
"""Operators that read any type and make none of it."""

_OWN_TYPE = frozenset({"BitCast", "BlackmanWindow", "EyeLike", "HammingWindow", "HannWindow", "MelWeightMatrix"})
_NO_KERNEL = frozenset({"MeanVarianceNormalization"})  # ONNX Runtime expands it with float32 constants
_CONTRIBUTED: Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]] = {
    # operators of ONNX Runtime whose floats share one type, with the inputs and outputs that keep float32
    "Attention": ((), ()),
    "BiasGelu": ((), ()),
    "EmbedLayerNormalization": ((), ()),
    "FastGelu": ((), ()),
    "FusedConv": ((), ()),
    "FusedGemm": ((), ()),
    "FusedMatMul": ((), ()),
    "Gelu": ((), ()),
    "GroupQueryAttention": ((12, 13), ()),
    "MultiHeadAttention": ((), ()),
    "QuickGelu": ((), ()),
    "RotaryEmbedding": ((), ()),
    "SimplifiedLayerNormalization": ((), (1,)),
    "SkipLayerNormalization": ((), (1, 2)),
    "SkipSimplifiedLayerNormalization": ((), (1, 2)),
    "TransposeMatMul": ((), ()),
}
_BOXES = ("Sequence", "Optional")
TypeOf = Callable[[ir.Value | None], ir.DataType | None]


@dataclass(frozen=True)
class Ports:
    """Indices of the inputs and outputs of a node that become narrow."""

    inputs: tuple[int, ...] = ()
    outputs: tuple[int, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.inputs or self.outputs)


def ports_of(node: ir.Node, opset: int, type_of: TypeOf) -> Ports | str:
    """What may become narrow at a node, or the reason why nothing may.

    Args:
        node: The node.
        opset: Version of the standard operator set.
        type_of: Element type of a value, None if unknown.

    Returns:
        Ports, empty if no float32 passes through the node; or a reason.
    """
    if node.op_type in BLIND or is_widening(node, type_of):
        return Ports()
    inputs = [i for i, value in enumerate(node.inputs) if value is not None and type_of(value) == ir.DataType.FLOAT]
    outputs = [i for i, value in enumerate(node.outputs) if value.name and type_of(value) == ir.DataType.FLOAT]
    unknown = next((v for v in (*node.inputs, *node.outputs) if v is not None and v.name and type_of(v) is None), None)
    if not (inputs or outputs or unknown is not None):
        return Ports()
    if node.op_type in QUANTIZED_OPERATORS:
        return "already quantized"
    if any(True for _ in subgraphs(node)):
        return "what it exchanges with its subgraphs stays float32"
    if unknown is not None:
        return f"the type of {unknown.name!r} is unknown"
    if node.op_type in RANDOM or node.op_type in _OWN_TYPE:
        return "it states the type that it makes"
    if node.op_type in _CONTRIBUTED and (node.domain == "com.microsoft" or node.op_type.startswith("Simplified")):
        kept_inputs, kept_outputs = _CONTRIBUTED[node.op_type]
        found = [i for i in inputs if i not in kept_inputs], [i for i in outputs if i not in kept_outputs]
        return Ports(*map(tuple, found))
    refused = _refused(node)
    if refused:
        return refused
    return _by_schema(node, opset, inputs, outputs)


def is_widening(node: ir.Node, type_of: TypeOf) -> bool:
    """Whether a node makes float32 of fp16; who wants fp16 reads what it reads."""
    return node.op_type == "Cast" and type_of(node.inputs[0]) == ir.DataType.FLOAT16


def _refused(node: ir.Node) -> str:
    """Why ONNX Runtime's CPU kernels do not take what ONNX allows; empty if they do."""
    adds_up = node.op_type.startswith("Scatter") and node.attributes.get_string("reduction", "none") != "none"
    return "ONNX Runtime does not run it in fp16" if node.op_type in _NO_KERNEL or adds_up else ""


def _by_schema(node: ir.Node, opset: int, inputs: Sequence[int], outputs: Sequence[int]) -> Ports | str:
    kind = f"{node.domain}::{node.op_type}" if node.domain not in ("", "ai.onnx") else node.op_type
    if node.domain not in ("", "ai.onnx"):
        return f"{kind} is not a standard operator"
    try:
        schema = onnx.defs.get_schema(node.op_type, opset, "")
    except onnx.defs.SchemaError:
        return f"{kind} is not defined in opset {opset}"
    allowed = {c.type_param_str: frozenset(c.allowed_type_strs) for c in schema.type_constraints}
    if _from_sequence(node):
        return f"{kind} handles sequences"
    kept = _KEPT_VARIABLES.get(node.op_type, ())
    found: list[tuple[int, ...]] = []
    for formals, indices in ((schema.inputs, inputs), (schema.outputs, outputs)):
        texts = [formals[min(i, len(formals) - 1)].type_str for i in indices]
        if any(not _is_tensor(text, allowed) for text in texts):
            return f"{kind} handles sequences"
        narrow = (
            i for i, text in zip(indices, texts, strict=True) if text not in kept and _HALF in allowed.get(text, ())
        )
        found.append(tuple(narrow))
    ports = Ports(*found)
    return ports or f"{kind} takes no fp16 in opset {opset}"


def _is_tensor(text: str, allowed: Mapping[str, frozenset[str]]) -> bool:
    return any(kind.startswith("tensor(") for kind in allowed.get(text, frozenset({text})))


def _from_sequence(node: ir.Node) -> bool:
    """An Identity takes sequences as well as tensors, and element types do not tell them apart."""
    producer = node.inputs[0].producer() if node.inputs and node.inputs[0] is not None else None
    return node.op_type == "Identity" and producer is not None and any(w in producer.op_type for w in _BOXES)
