"""A TOSA graph as plain records, and the file that the reference model and Vela read.

TOSA 1.0: https://www.mlplatform.org/tosa/tosa_spec.html. Axes of images are N, H, W, C. What RESHAPE, SLICE and others
take as shapes are constants of the graph, here tensors of type `shape`.
"""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from graphopt.errors import BackendError
from graphopt_backends._native import silent

__all__ = [
    "EXTRA_HINT",
    "DType",
    "Graph",
    "Operator",
    "Tensor",
    "inputs_of",
    "library",
    "outputs_of",
    "run_reference",
    "serialize",
]

DType = Literal["int8", "int16", "int32", "int48", "shape"]
Array = np.ndarray[Any, np.dtype[Any]]

EXTRA_HINT = "pip install 'graphopt[npu]'"
_VERSION = (1, 0, 0)


@dataclass(frozen=True, eq=False)
class Tensor:
    """A tensor of a graph.

    Attributes:
        name: Unique in the graph.
        shape: Its sizes, as they lie in memory.
        dtype: Element type; `int48` are sums of products with 16-bit activations.
        data: What a constant holds.
    """

    name: str
    shape: tuple[int, ...]
    dtype: DType
    data: Array | None = None


@dataclass(frozen=True, eq=False)
class Operator:
    """One operation.

    Attributes:
        kind: TOSA's name of it.
        inputs: In TOSA's order.
        output: What it makes.
        attributes: In TOSA's order, by name.
        site: Name of the node of the model that it stands for.
    """

    kind: str
    inputs: tuple[Tensor, ...]
    output: Tensor
    attributes: Mapping[str, Any] = field(default_factory=dict[str, Any])
    site: str = ""


@dataclass
class Graph:
    """Operations in order, with what they start from and what they make."""

    inputs: list[Tensor] = field(default_factory=list[Tensor])
    outputs: list[Tensor] = field(default_factory=list[Tensor])
    operators: list[Operator] = field(default_factory=list[Operator])


def serialize(graph: Graph) -> bytes:
    """The graph as a TOSA 1.0 flatbuffer; the same bytes each time.

    Raises:
        BackendError: The serializer is not installed.
    """
    tosa = library("tosa_serializer")
    major, minor, patch = _VERSION
    writer = tosa.TosaSerializer("", targetMajor=major, targetMinor=minor, targetPatch=patch, targetDraft=False)
    block = writer.currRegion.currBasicBlock
    for tensor in graph.inputs:
        writer.addInputTensor(tosa.TosaSerializerTensor(tensor.name, list(tensor.shape), _dtype(tosa, tensor.dtype)))
    written = set[str]()
    for operator in graph.operators:
        for tensor in operator.inputs:
            if tensor.data is not None and tensor.name not in written:
                written.add(tensor.name)
                values = tensor.data.reshape(-1) if tensor.dtype == "shape" else tensor.data
                writer.addConst(list(tensor.shape), _dtype(tosa, tensor.dtype), values, tensor.name)
        result = operator.output
        block.addTensor(result.name, list(result.shape), _dtype(tosa, result.dtype))
        inputs = [tensor.name for tensor in operator.inputs]
        location = tosa.TosaOpLocation(operator.site)
        writer.addOperator(
            getattr(tosa.Op, operator.kind), inputs, [result.name], _attributes(tosa, operator), location
        )
    for tensor in graph.outputs:
        block.addOutput(tensor.name)
    return bytes(writer.serialize())


def run_reference(
    blob: bytes, graph_inputs: Sequence[Array], outputs: Sequence[tuple[str, tuple[int, ...]]]
) -> list[Array]:
    """Execute a serialized graph on the TOSA reference model, bit for bit as the specification says.

    Args:
        blob: The flatbuffer.
        graph_inputs: One array for each input, in order.
        outputs: NumPy's element type and the shape of each output.

    Raises:
        BackendError: The reference model is not installed, or finds the graph invalid.
    """
    reference = library("tosa_reference_model")
    with silent():
        arrays, status = reference.run(blob, [np.ascontiguousarray(array) for array in graph_inputs])
    if status != reference.GraphStatus.TOSA_VALID:
        raise BackendError("TOSA reference model", f"says {status.name} of a graph", "report this, with the model")
    pairs = zip(arrays, outputs, strict=True)
    return [np.frombuffer(array.tobytes(), dtype).reshape(shape) for array, (dtype, shape) in pairs]


def inputs_of(blob: bytes) -> list[tuple[str, tuple[int, ...]]]:
    """NumPy's element type and the shape of each input of a serialized graph."""
    block = _block_of(blob)
    return [_kind(block.getTensorByName(name)) for name in block.inputs]


def outputs_of(blob: bytes) -> list[tuple[str, tuple[int, ...]]]:
    """NumPy's element type and the shape of each output of a serialized graph."""
    block = _block_of(blob)
    return [_kind(block.getTensorByName(name)) for name in block.outputs]


def _kind(tensor: Any) -> tuple[str, tuple[int, ...]]:
    return tensor.dtype.name.lower(), tuple(tensor.shape)


def _block_of(blob: bytes) -> Any:
    tosa = library("tosa_serializer")
    major, minor, patch = _VERSION
    reader = tosa.TosaSerializer("", targetMajor=major, targetMinor=minor, targetPatch=patch, targetDraft=False)
    with tempfile.NamedTemporaryFile(suffix=".tosa") as file, silent():
        file.write(blob)
        file.flush()
        reader.loadTosaFlatbuffer(file.name)
    return reader.regions[-1].basicBlocks[-1]


@functools.cache
def library(name: str) -> Any:
    """A library of the extra.

    Raises:
        BackendError: It is not installed.
    """
    import importlib

    try:
        return importlib.import_module(name)
    except ImportError as e:
        raise BackendError("target npu", f"{name} is not installed", EXTRA_HINT) from e


def _dtype(tosa: Any, dtype: DType) -> Any:
    return getattr(tosa.DType, dtype.upper())


def _attributes(tosa: Any, operator: Operator) -> Any:
    made = tosa.TosaSerializerAttribute()
    name = _ATTRIBUTES.get(operator.kind) or f"{operator.kind.title().replace('_', '')}Attribute"
    values = [_attribute(tosa, *item) for item in operator.attributes.items()]
    getattr(made, name)(*values)
    return made


def _attribute(tosa: Any, name: str, value: Any) -> Any:
    """What the serializer takes for an attribute."""
    if name == "acc_type":
        return _dtype(tosa, value)
    if name in _ENUMERATIONS:
        return getattr(getattr(tosa, _ENUMERATIONS[name]), value)
    return value


_ATTRIBUTES: Mapping[str, str] = {
    "ARGMAX": "ArgMaxAttribute",
    "AVG_POOL2D": "AvgPool2dAttribute",
    "CONV2D": "Conv2dAttribute",
    "DEPTHWISE_CONV2D": "DepthwiseConv2dAttribute",
    "MATMUL": "MatMulAttribute",
    "MAX_POOL2D": "MaxPool2dAttribute",
    "TRANSPOSE_CONV2D": "TransposeConv2dAttribute",
}
"""Names that do not follow from those of the operators."""

_ENUMERATIONS = {"mode": "ResizeMode", "nan_mode": "NanPropagationMode", "rounding_mode": "RoundingMode"}
