"""Evaluate what does not depend on the inputs: shapes of values, chains of constants, branches never taken.

Weights stay as they are: nothing that would make a constant larger than what it is made of is evaluated, and the
DequantizeLinear of a linear operator keeps its integers. `look_up` is for codes that no kernel looks up.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common as ir_passes

from graphopt.errors import ModelError
from graphopt.reference import Reference
from graphopt_backends._shapes import is_known, put_shapes

__all__ = ["add_constant", "fold", "infer_shapes", "inlined", "is_constant", "look_up", "static_shape"]

_ROUNDS = 32
_FREE_BYTES, _BYTE = 1 << 16, 8
_NEVER = frozenset(
    {
        "QuantizeLinear", "DynamicQuantizeLinear", "Dropout", "RandomNormal", "RandomNormalLike",
        "RandomUniform", "RandomUniformLike", "Multinomial", "Bernoulli", "If", "Loop", "Scan", "SequenceEmpty",
        "Optional", "SequenceConstruct",
    }
)  # fmt: skip
_LINEAR = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul"})
_LOOKUPS = frozenset({"Gather", "GatherElements"})
_log = logging.getLogger(__name__)


def fold(model: ir.Model) -> None:
    """Fold constants in place until nothing changes; shapes of all values are inferred as far as they are known."""
    for _ in range(_ROUNDS):
        infer_shapes(model)
        changed = _fold_shapes(model)
        changed = _fold_empty(model.graph) or changed
        changed = _fold_constants(model, _foldable) or changed
        changed = _take_branches(model) or changed
        if not changed:
            break
        ir_passes.RemoveUnusedNodesPass()(model)


def infer_shapes(model: ir.Model) -> None:
    """Infer types and shapes in place; what cannot be inferred stays unknown.

    ONNX knows nothing of other domains; operators of com.microsoft are helped along, and a Gather of as many columns
    stands in for MatMulNBits.
    """
    with _stand_ins(model):
        _infer_shapes(model)


def _infer_shapes(model: ir.Model) -> None:
    infer = ir_passes.ShapeInferencePass(check_type=False, strict_mode=False, data_prop=True)
    infer(model)
    nodes = [node for graph in model.graphs() for node in graph]
    others = [node for node in nodes if is_known(node)]
    while sum(put_shapes(node, [static_shape(value) for value in node.inputs]) for node in others):
        infer(model)


@contextmanager
def _stand_ins(model: ir.Model) -> Iterator[None]:
    """Let MatMulNBits be a Gather for a while: one pass then infers what lies behind all of them."""
    found = [
        (node, tuple(node.inputs), node.attributes.get_int("N", 1))
        for graph in model.graphs()
        for node in graph
        if (node.domain, node.op_type) == ("com.microsoft", "MatMulNBits")
    ]
    columns = {
        size: add_constant(model.graph, f"columns_{size}", np.zeros(size, np.int64)) for size in {n for *_, n in found}
    }
    for node, _, size in found:
        node.domain, node.op_type = "", "Gather"
        node.attributes["axis"] = ir.AttrInt64("axis", -1)
        node.resize_inputs(2)
        node.replace_input_with(1, columns[size])
    try:
        yield
    finally:
        for node, inputs, _ in found:
            node.domain, node.op_type = "com.microsoft", "MatMulNBits"
            del node.attributes["axis"]
            node.resize_inputs(len(inputs))
            for i, value in enumerate(inputs):
                node.replace_input_with(i, value)
        for value in columns.values():
            model.graph.initializers.pop(str(value.name))


def static_shape(value: ir.Value | None) -> tuple[int, ...] | None:
    """Shape of a value if every dimension is known."""
    if value is None:
        return None
    shape = value.shape if value.const_value is None else value.const_value.shape
    sizes = [] if shape is None else [d for d in shape if isinstance(d, int)]
    return tuple(sizes) if shape is not None and len(sizes) == len(list(shape)) else None


def is_constant(value: ir.Value | None) -> bool:
    """True for an initializer that no caller can replace."""
    return value is not None and value.const_value is not None and value.is_initializer()


def add_constant(graph: ir.Graph, name: str, array: np.ndarray, dtype: ir.DataType | None = None) -> ir.Value:
    """Add an initializer under a free name."""
    free, i = name, 0
    while free in graph.initializers:
        i += 1
        free = f"{name}_{i}"
    tensor = ir.Tensor(np.ascontiguousarray(array) if array.ndim else array, dtype=dtype, name=free)
    value = ir.Value(name=free, const_value=tensor, type=ir.TensorType(tensor.dtype), shape=tensor.shape)
    graph.register_initializer(value)
    return value


def _replace(graph: ir.Graph, node: ir.Node, arrays: list[np.ndarray]) -> None:
    """Put constants in the place of a node's outputs; graph outputs keep their names."""
    for output, array in zip(node.outputs, arrays, strict=False):
        if output.is_graph_output():
            constant = add_constant(graph, f"{output.name}_folded", array)
            node_outputs = list(node.outputs)
            identity = ir.Node("", "Identity", [constant], name=f"{node.name}_folded_{node_outputs.index(output)}")
            graph.insert_before(node, identity)
            new = identity.outputs[0]
            new.type, new.shape = constant.type, constant.shape
            ir.convenience.replace_all_uses_with(output, new, replace_graph_outputs=True)
            name, output.name = output.name, f"{output.name}_unfolded"
            new.name = name
        else:
            constant = add_constant(graph, f"{output.name}_folded", array)
            ir.convenience.replace_all_uses_with(output, constant)
    graph.remove(node, safe=True)


def _fold_shapes(model: ir.Model) -> bool:
    """Replace Shape and Size of values whose shape is known."""
    changed = False
    for graph in model.graphs():
        for node in list(graph):
            if node.domain not in ("", "ai.onnx") or node.op_type not in ("Shape", "Size"):
                continue
            shape = static_shape(node.inputs[0])
            if shape is None:
                continue
            start, end = node.attributes.get_int("start", 0), node.attributes.get_int("end", len(shape))
            part = np.asarray(shape[slice(start, end)], np.int64)
            _replace(graph, node, [part if node.op_type == "Shape" else np.asarray(math.prod(shape), np.int64)])
            changed = True
    return changed


def _fold_empty(graph: ir.Graph) -> bool:
    """Values without elements are known, whatever they are made of."""
    changed = False
    for node in list(graph):
        outputs = [value for value in node.outputs if value.name]
        if outputs and all(_is_empty(value) for value in outputs) and not _passes_on_a_constant(node):
            _replace(graph, node, [np.empty(static_shape(value) or (), _numpy_type(value)) for value in node.outputs])
            changed = True
    for value in graph.inputs:
        users = list(value.uses()) if _is_empty(value) else []
        if users:
            array = np.empty(static_shape(value) or (), _numpy_type(value))
            constant = add_constant(graph, f"{value.name}_empty", array)
            for user, index in users:
                user.replace_input_with(index, constant)
            changed = True
    return changed


def _is_empty(value: ir.Value) -> bool:
    shape = static_shape(value)
    return shape is not None and 0 in shape and value.dtype is not None and value.dtype.bitwidth >= _BYTE


def _numpy_type(value: ir.Value) -> np.dtype:
    return np.dtype(value.dtype.numpy() if value.dtype is not None else np.float32)


def _passes_on_a_constant(node: ir.Node) -> bool:
    """What a constant became that is a result of the graph."""
    return node.op_type == "Identity" and is_constant(node.inputs[0])


def look_up(model: ir.Model, keeps: Callable[[ir.Node], bool]) -> bool:
    """Evaluate lookups of constant codes in constant tables, however large their results are.

    Args:
        model: Changed in place; shapes are known.
        keeps: True for nodes whose form is wanted as it is.

    Raises:
        ModelError: A code is no place in its table.
    """
    for node in model.graph:
        _check_places(node)
    return _fold_constants(model, lambda node, known: _looks_up(node) and not keeps(node) and _is_known(node, known))


def _fold_constants(model: ir.Model, foldable: Callable[[ir.Node, set[str]], bool]) -> bool:
    """Evaluate, in one run of ONNX Runtime, every node of the main graph that can be, by those before it."""
    graph = model.graph
    ready: list[ir.Node] = []
    known: set[str] = set()
    for node in graph:
        if foldable(node, known):
            ready.append(node)
            known.update(o.name for o in node.outputs if o.name)
    if not ready:
        return False
    inside = set(ready)
    wanted = [o for n in ready for o in n.outputs if o.is_graph_output() or any(u not in inside for u, _ in o.uses())]
    arrays = _evaluate(model, ready, wanted) if wanted else {}
    if arrays is None:
        return _fold_one_by_one(model, ready)
    for node in reversed(ready):
        outputs = [o for o in node.outputs if o.name in arrays]
        if len(outputs) == len(node.outputs):
            _replace(graph, node, [arrays[str(o.name)] for o in outputs])
        elif not any(o.uses() or o.is_graph_output() for o in node.outputs):
            graph.remove(node, safe=True)
    return True


def _fold_one_by_one(model: ir.Model, nodes: list[ir.Node]) -> bool:
    """Fold what can be folded where ONNX Runtime refuses one of the nodes; that one is left to the compiler."""
    changed = False
    for node in nodes:
        if all(v is None or is_constant(v) for v in node.inputs):
            arrays = _evaluate(model, [node], list(node.outputs))
            if arrays is not None:
                _replace(model.graph, node, [arrays[str(o.name)] for o in node.outputs])
                changed = True
    return changed


def _is_known(node: ir.Node, known: set[str]) -> bool:
    """All inputs are constants, or have one of these names."""
    return all(value is None or is_constant(value) or (value.name or "") in known for value in node.inputs)


def _foldable(node: ir.Node, known: set[str]) -> bool:
    if node.domain not in ("", "ai.onnx") or node.op_type in _NEVER:
        return False
    if node.op_type == "DequantizeLinear" and not _small_parameter(node):
        return False
    if any(a.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS) for a in node.attributes.values()):
        return False
    if not _is_known(node, known):
        return False
    inputs = [value for value in node.inputs if value is not None]
    if any(value.const_value is not None and value.const_value.dtype.bitwidth < 8 for value in inputs):
        return False
    read = sum(value.const_value.nbytes for value in inputs if value.const_value is not None)
    written = 0
    for output in node.outputs:
        shape = static_shape(output)
        if shape is None or output.dtype is None:
            written += _FREE_BYTES if read <= _FREE_BYTES else read + 1
        else:
            written += math.ceil(math.prod(shape) * output.dtype.itemsize)
    return written <= max(read, _FREE_BYTES)


def _looks_up(node: ir.Node) -> bool:
    """True for a lookup, and for codes and dequantized tables on their way to one."""
    if node.domain not in ("", "ai.onnx"):
        return False
    uses = [use for output in node.outputs for use in output.uses()]
    if node.op_type == "Cast":
        return bool(uses) and all(place == 1 and user.op_type in _LOOKUPS for user, place in uses)
    if node.op_type == "DequantizeLinear":
        return bool(uses) and all(place == 0 and _codes_of(user) is not None for user, place in uses)
    return node.op_type in _LOOKUPS


def _codes_of(node: ir.Node) -> ir.TensorProtocol | None:
    """Codes of a lookup by constants, and not by what the graph is given."""
    codes = node.inputs[1] if node.op_type in _LOOKUPS else None
    maker = codes.producer() if codes is not None else None
    if maker is not None and maker.op_type == "Cast":
        codes = maker.inputs[0]
    return codes.const_value if codes is not None and is_constant(codes) else None


def _check_places(node: ir.Node) -> None:
    """Refuse what ONNX Runtime would refuse when it runs: kernels read what is nearest."""
    codes = _codes_of(node) if node.domain in ("", "ai.onnx") else None
    sizes = static_shape(node.inputs[0]) if codes is not None else None
    if codes is None or not sizes or not codes.size or not codes.dtype.is_integer():
        return
    entries, numbers = sizes[node.attributes.get_int("axis", 0)], codes.numpy()
    least, most = int(numbers.min()), int(numbers.max())
    if least < -entries or most >= entries:
        fact = f"looks up entry {most if most >= entries else least} of a table of {entries}"
        raise ModelError(f"node {node.name!r}", fact, "check the model")


def _small_parameter(node: ir.Node) -> bool:
    """True for dequantized constants that no linear operator reads: those of a normalisation, for one."""
    output = node.outputs[0]
    shape = static_shape(node.inputs[0])
    if shape is None or 4 * math.prod(shape) > _FREE_BYTES:
        return False
    return not any(user.op_type in _LINEAR for user, _ in output.uses())


def _evaluate(model: ir.Model, nodes: list[ir.Node], wanted: list[ir.Value]) -> dict[str, np.ndarray] | None:
    view = ir.GraphView(
        [],
        wanted,
        nodes=nodes,
        initializers=tuple({str(v.name): v for n in nodes for v in n.inputs if is_constant(v) and v}.values()),
        opset_imports=model.graph.opset_imports,
        name="constants",
    )
    part = ir.Model(view.clone(), ir_version=model.ir_version)
    try:
        return dict(Reference(part, optimize=False).run({}))
    except ModelError as e:
        _log.debug("constants not folded: %s", e)
        return None


def _take_branches(model: ir.Model) -> bool:
    """Put the branch of an If in its place where the condition is a constant."""
    changed = False
    for graph in list(model.graphs()):
        for node in list(graph):
            if node.op_type != "If" or node.domain not in ("", "ai.onnx") or not is_constant(node.inputs[0]):
                continue
            condition = node.inputs[0].const_value if node.inputs[0] else None
            if condition is None:
                continue
            taken = bool(condition.numpy().reshape(-1)[0])
            branch = node.attributes["then_branch" if taken else "else_branch"].as_graph()
            _inline(graph, node, branch)
            changed = True
    return changed


def _inline(graph: ir.Graph, node: ir.Node, branch: ir.Graph) -> None:
    prefix = f"{node.name}/"
    results = inlined(graph, node, branch, prefix)
    for output, result in zip(node.outputs, results, strict=True):
        if output.is_graph_output():
            identity = ir.Node("", "Identity", [result], name=f"{prefix}{output.name}")
            graph.insert_before(node, identity)
            result = identity.outputs[0]
            result.type, result.shape = output.type, output.shape
            name, output.name = output.name, f"{prefix}{output.name}_untaken"
            ir.convenience.replace_all_uses_with(output, result, replace_graph_outputs=True)
            result.name = name
        else:
            ir.convenience.replace_all_uses_with(output, result)
    graph.remove(node, safe=True)


def inlined(graph: ir.Graph, node: ir.Node, branch: ir.Graph, prefix: str) -> list[ir.Value]:
    """Move the nodes of a branch before the node that it belongs to; returns what the branch gives.

    Args:
        graph: Where the node stands.
        node: An If.
        branch: One of its graphs; it is empty afterwards.
        prefix: Put before the names of its nodes and values.
    """
    for value in list(branch.initializers.values()):
        branch.initializers.pop(str(value.name))
        value.name = f"{prefix}{value.name}"
        graph.register_initializer(value)
    results = list(branch.outputs)
    branch.outputs.clear()
    inner = list(branch)
    branch.remove(inner)
    for part in inner:
        part.name = f"{prefix}{part.name}"
        for output in part.outputs:
            output.name = f"{prefix}{output.name}"
    graph.insert_before(node, inner)
    return results
