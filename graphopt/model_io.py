# onnx and onnx_ir annotate paths as bare os.PathLike, which strict mode calls partially unknown
# pyright: reportUnknownMemberType=false
"""Models on disk and in memory: reading, writing, and the only place where protobuf appears.

Weights stay memory-mapped: nothing here reads more than one tensor at a time, except where a caller asks for a
protobuf with the weights inside.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

import numpy as np
import onnx
import onnx_ir as ir
from google.protobuf.message import DecodeError

from graphopt.errors import ModelError, UsageError, WriteError, nearest

__all__ = [
    "EMBED_LIMIT",
    "InputSpec",
    "ShapeBinding",
    "check_binding",
    "external_files",
    "input_specs",
    "load_model",
    "model_bytes",
    "model_digest",
    "model_files",
    "save_model",
    "to_proto",
    "weight_bytes",
]

EMBED_LIMIT = 1 << 30
"""Weights above this many bytes in all are written beside the model, in `model.onnx.data`."""

_IR_WITH_HIDDEN_INITIALIZERS = 4
_NAN_CHUNK = 1 << 22
_PACKED = b"\x89GOPT"
"""What files of `graphopt pack` begin with; graphopt.pack stands above this module."""
_FLOATS = frozenset({ir.DataType.FLOAT, ir.DataType.DOUBLE, ir.DataType.FLOAT16, ir.DataType.BFLOAT16})


@dataclass(frozen=True)
class ShapeBinding:
    """Concrete sizes for dynamic dimensions: by input (`--shape`) or by dimension name (`--dim`)."""

    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict[str, tuple[int, ...]])
    dims: Mapping[str, int] = field(default_factory=dict[str, int])

    def __bool__(self) -> bool:
        return bool(self.shapes or self.dims)


@dataclass(frozen=True)
class InputSpec:
    """An input of a model; `shape` holds sizes, names of dynamic dimensions, or None; it is None without a rank."""

    name: str
    dtype: ir.DataType
    shape: tuple[int | str | None, ...] | None

    @property
    def rank(self) -> int | None:
        """Number of dimensions, None if unknown."""
        return None if self.shape is None else len(self.shape)

    def bound(self, binding: ShapeBinding) -> tuple[int | str | None, ...] | None:
        """The shape with what the binding fixes put in."""
        if self.name in binding.shapes:
            return binding.shapes[self.name]
        if self.shape is None:
            return None
        return tuple(binding.dims.get(d, d) if isinstance(d, str) else d for d in self.shape)

    def concrete(self, binding: ShapeBinding, default: int = 1) -> tuple[int, ...]:
        """The shape with every dimension a number; what nothing fixes becomes `default`."""
        return tuple(d if isinstance(d, int) else default for d in self.bound(binding) or ())


def load_model(path: str | Path) -> ir.Model:
    """Read a model, weights memory-mapped, and refuse what graphopt would damage.

    Raises:
        ModelError: The file is missing, unreadable, incomplete, or holds NaN weights, sparse initializers or
            training information.
    """
    path = Path(path)
    proto = _read_proto(path)
    if not proto.graph.node and not proto.graph.output:
        raise ModelError(str(path), "not an ONNX model, or an empty one", "export it again")
    _refuse_lossy(proto, path)
    try:
        model = ir.from_proto(proto)
    except (ValueError, TypeError, KeyError, AttributeError, RuntimeError) as e:  # SerdeError is a RuntimeError
        raise ModelError(str(path), f"not a valid ONNX model: {_first_line(e)}", "check it with onnx.checker") from e
    del proto
    for graph in model.graphs():
        ir.external_data.set_base_dir(graph, path.parent)
    if (model.ir_version or 0) < _IR_WITH_HIDDEN_INITIALIZERS or _lists_every_weight(model.graph):
        _hide_initializers(model)
    _name_nodes(model)
    _check_opset(model, path)
    _check_values(model, path)
    return model


def save_model(model: ir.Model, path: Path, *, embed_limit: int = EMBED_LIMIT) -> tuple[Path, ...]:
    """Write a model, weights inside or, above `embed_limit` bytes in all, in `<name>.data` beside it.

    The bytes depend on the model alone. Returns the files written.

    Raises:
        WriteError: The disk is full or the folder cannot be written.
    """
    _name_tensors(model)
    try:
        if weight_bytes(model) > embed_limit:
            data = Path(f"{path.name}.data")
            ir.save(model, path, external_data=data, size_threshold_bytes=1024)
            return path, path.parent / data
        path.write_bytes(to_proto(model).SerializeToString(deterministic=True))
        return (path,)
    except OSError as e:
        raise WriteError(str(path), e.strerror or str(e), "free some space or choose another folder with -o") from e


def to_proto(model: ir.Model) -> onnx.ModelProto:
    """Convert to protobuf with all weights inside; for models below 2 GB."""
    external = [(value, value.const_value) for value in _initializers(model)]
    try:
        for value, tensor in external:
            if isinstance(tensor, ir.ExternalTensor):
                value.const_value = _embedded(tensor)
        proto = ir.to_proto(model)
    finally:
        for value, tensor in external:
            value.const_value = tensor
    for graph in _all_graphs(proto.graph):
        stored = {tensor.name for tensor in graph.initializer}
        for i in reversed(range(len(graph.value_info))):
            if graph.value_info[i].name in stored:  # a tensor states its own type and shape
                del graph.value_info[i]
    return proto


def model_bytes(model: ir.Model) -> bytes:
    """Serialise a model below 2 GB with all weights inside."""
    return to_proto(model).SerializeToString(deterministic=True)


def weight_bytes(model: ir.Model) -> int:
    """Bytes of all initializers, subgraphs included."""
    return sum(v.const_value.nbytes for v in _initializers(model) if v.const_value is not None)


def external_files(model: ir.Model) -> tuple[Path, ...]:
    """Files beside the model that hold its weights."""
    tensors = (value.const_value for value in _initializers(model))
    return tuple(sorted({Path(t.path) for t in tensors if isinstance(t, ir.ExternalTensor)}))


def model_files(path: Path) -> tuple[Path, ...]:
    """The model file and the weight files it names, without reading them."""
    names = {e.value for t in _all_tensors(_read_proto(path).graph) for e in t.external_data if e.key == "location"}
    return (path, *(path.parent / name for name in sorted(names)))


def model_digest(path: Path) -> str:
    """sha256 over the model file and the weight files it names."""
    digest = hashlib.sha256()
    for part in model_files(path):
        with part.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()


def input_specs(model: ir.Model) -> tuple[InputSpec, ...]:
    """Inputs that a caller must feed: graph inputs that are not initializers."""
    found: list[InputSpec] = []
    for value in model.graph.inputs:
        if value.name in model.graph.initializers:
            continue
        shape = None if value.shape is None else tuple(_dim(d) for d in value.shape)
        found.append(InputSpec(value.name or "", value.dtype or ir.DataType.UNDEFINED, shape))
    return tuple(found)


def check_binding(specs: Sequence[InputSpec], binding: ShapeBinding) -> None:
    """Refuse a `--shape` or `--dim` that does not fit the model's inputs.

    Raises:
        UsageError: An input or dimension is unknown, or a size contradicts the model.
    """
    by_name = {spec.name: spec for spec in specs}
    for name, shape in binding.shapes.items():
        spec = by_name.get(name)
        if spec is None:
            raise UsageError(f"--shape {name}", "the model has no such input", nearest(name, by_name))
        if spec.shape is not None:
            fits = len(spec.shape) == len(shape)
            fits = fits and all(not isinstance(d, int) or d == s for d, s in zip(spec.shape, shape, strict=True))
            if not fits:
                sizes, wanted = ("x".join("?" if d is None else str(d) for d in s) for s in (shape, spec.shape))
                raise UsageError(f"--shape {name}", f"{sizes} does not fit {wanted}")
    known = {d for spec in specs for d in spec.shape or () if isinstance(d, str)}
    for name in binding.dims:
        if name not in known:
            raise UsageError(f"--dim {name}", "no input has a dimension of that name", nearest(name, known))


def _read_proto(path: Path) -> onnx.ModelProto:
    try:
        content = path.read_bytes()
    except FileNotFoundError as e:
        raise ModelError(str(path), "no such file") from e
    except IsADirectoryError as e:
        raise ModelError(str(path), "is a folder, not a model") from e
    except OSError as e:
        raise ModelError(str(path), f"cannot be read: {e.strerror}") from e
    if content.startswith(_PACKED):
        raise ModelError(str(path), "is a packed model", f"unpack it first: graphopt unpack {path}")
    try:
        return onnx.ModelProto.FromString(content)
    except DecodeError as e:
        raise ModelError(str(path), "not an ONNX model, or cut short", "export it again") from e


def _check_opset(model: ir.Model, path: Path) -> None:
    if "" not in model.opset_imports and any(node.domain == "" for node in model.graph.all_nodes()):
        raise ModelError(str(path), "does not say which opset it uses", "check it with onnx.checker")


def _refuse_lossy(proto: onnx.ModelProto, path: Path) -> None:
    if proto.training_info:
        raise ModelError(str(path), "holds training_info, which would be lost", "export it for inference")
    if any(graph.sparse_initializer for graph in _all_graphs(proto.graph)):
        raise ModelError(str(path), "holds sparse_initializer tensors, which would be lost", "export dense weights")


def _lists_every_weight(graph: ir.Graph) -> bool:
    """Whether the exporter listed all weights as inputs out of habit, as PyTorch 1.0 to 1.2 did in IR version 4.

    A model that means some inputs to have defaults keeps its weight matrices out of the list.
    """
    weights = graph.initializers.values()
    return all(value.is_graph_input() for value in weights) and any(
        value.const_value is not None and len(value.const_value.shape) > 1 for value in weights
    )


def _hide_initializers(model: ir.Model) -> None:
    """Take weights out of the graph inputs, where IR versions before 4 had to list them.

    There no caller means to replace a weight, and a weight that could be replaced is not a constant.
    """
    fed = [value for value in model.graph.inputs if value.name not in model.graph.initializers]
    if len(fed) < len(model.graph.inputs):
        model.graph.inputs.clear()
        model.graph.inputs.extend(fed)
        model.ir_version = max(model.ir_version or 0, _IR_WITH_HIDDEN_INITIALIZERS)


def _name_nodes(model: ir.Model) -> None:
    """Name unnamed nodes after what they compute, so that reports and options can speak of them."""
    for graph in model.graphs():
        for node in graph:
            if not node.name:
                node.name = next((output.name for output in node.outputs if output.name), None)


def _check_values(model: ir.Model, path: Path) -> None:
    """Every weight must be readable, complete and free of NaN; infinities are masks and pass."""
    for value in _initializers(model):
        if value.const_value is not None:
            _check_tensor(value.const_value, f"{path}: tensor {value.name!r}")
    for node in model.graph.all_nodes():
        for attribute in node.attributes.values():
            if attribute.type == ir.AttributeType.TENSOR and not attribute.is_ref():
                tensor = attribute.as_tensor()
                # a lone NaN in a Constant node is something to compare with, not a weight
                _check_tensor(tensor, f"{path}: tensor of node {node.name!r}", allow_nan=tensor.size == 1)
                if isinstance(tensor, ir.ExternalTensor):  # nobody expects them here, so none stay here
                    node.attributes[attribute.name] = ir.AttrTensor(attribute.name, _embedded(tensor))


def _check_tensor(tensor: ir.TensorProtocol, where: str, *, allow_nan: bool = False) -> None:
    if isinstance(tensor, ir.ExternalTensor):
        _check_data_file(tensor, where)
    try:
        nan = tensor.dtype in _FLOATS and _has_nan(tensor)
        if not isinstance(tensor, ir.ExternalTensor):
            tensor.numpy()  # raises where the data is shorter than the shape
    except (ValueError, TypeError, OSError) as e:
        raise ModelError(where, f"unreadable: {_first_line(e)}", "export the model again") from e
    finally:
        if isinstance(tensor, ir.ExternalTensor):
            tensor.release()
    if nan and not allow_nan:
        raise ModelError(where, "holds NaN", "the training diverged; export a sound checkpoint")


def _check_data_file(tensor: ir.ExternalTensor, where: str) -> None:
    file, base = Path(tensor.path), Path(cast("str", tensor.base_dir))
    if not file.resolve().is_relative_to(base.resolve()):
        raise ModelError(
            where, f"its data file {file.name!r} lies outside the model's folder", "copy it beside the model"
        )
    if not file.is_file():
        raise ModelError(where, f"its data file {file.name!r} is missing", "copy it beside the model")
    if file.stat().st_size < (tensor.offset or 0) + max(tensor.length or 0, tensor.nbytes):
        raise ModelError(where, f"its data file {file.name!r} is cut short", "copy it again")


def _embedded(tensor: ir.ExternalTensor) -> ir.TensorProtocol:
    return ir.Tensor(tensor.numpy(), dtype=tensor.dtype, name=tensor.name)


def _has_nan(tensor: ir.TensorProtocol) -> bool:
    flat = tensor.numpy().reshape(-1)
    return any(bool(np.isnan(flat[i : i + _NAN_CHUNK]).any()) for i in range(0, flat.size, _NAN_CHUNK))


def _name_tensors(model: ir.Model) -> None:
    """Give every initializer its own name; a tensor renamed with its value keeps the file valid."""
    for value in _initializers(model):
        if value.const_value is not None and value.const_value.name != value.name:
            value.const_value.name = value.name


def _initializers(model: ir.Model) -> Iterator[ir.Value]:
    for graph in model.graphs():
        yield from graph.initializers.values()


def _all_graphs(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            for inner in (attribute.g, *attribute.graphs) if attribute.HasField("g") else attribute.graphs:
                yield from _all_graphs(inner)


def _all_tensors(graph: onnx.GraphProto) -> Iterator[onnx.TensorProto]:
    for inner in _all_graphs(graph):
        yield from inner.initializer
        yield from (attribute.t for node in inner.node for attribute in node.attribute if attribute.HasField("t"))


def _dim(dim: int | ir.SymbolicDim) -> int | str | None:
    return dim if isinstance(dim, int) else dim.value


def _first_line(e: BaseException) -> str:
    return (str(e).strip().splitlines() or [type(e).__name__])[0][:200]
