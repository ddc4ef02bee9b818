"""From a part of a model to functions in C and the order in which they are called, through TVM's lowering."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx_ir as ir

from graphopt.backend_base import Unsupported
from graphopt.errors import BackendError
from graphopt.model_io import weight_bytes
from graphopt_backends._fold import static_shape
from graphopt_backends._import import alone, import_model, unsupported_nodes
from graphopt_backends._library import signatures
from graphopt_backends._native import quiet
from graphopt_backends._parts import data_dependent
from graphopt_backends.network.views import Buffer
from graphopt_backends.npu.host.c_names import identifier

__all__ = ["Call", "Constant", "Functions", "lower_part", "refused_nodes"]

MOST_BYTES = 64 << 20
"""Constants above this make no source that compilers like to read."""

Array = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True)
class Constant:
    """A tensor that is known.

    Attributes:
        name: In C.
        array: Its values.
    """

    name: str
    array: Array


@dataclass(frozen=True)
class Call:
    """A call of a function.

    Attributes:
        function: Its name; none: the first tensor is copied to the second.
        tensors: What it is given, in order.
        stages: Stages that its temporaries live in.
        lives: Which of these each tensor is needed in; None: all.
    """

    function: str | None
    tensors: tuple[Buffer | Constant, ...]
    stages: int = 1
    lives: tuple[tuple[int, int] | None, ...] = ()


@dataclass
class Functions:
    """A part in C.

    Attributes:
        inputs: What it takes.
        outputs: What it makes.
        calls: In order.
        texts: Definitions of functions, by name.
        helpers: Names of functions that these call.
        constants: In the order of their first use.
    """

    inputs: list[Buffer] = field(default_factory=list[Buffer])
    outputs: list[Buffer] = field(default_factory=list[Buffer])
    calls: list[Call] = field(default_factory=list[Call])
    texts: dict[str, str] = field(default_factory=dict[str, str])
    helpers: set[str] = field(default_factory=set[str])
    constants: dict[bytes, Constant] = field(default_factory=dict[bytes, Constant])


def lower_part(model: ir.Model, prefix: str) -> Functions:
    """Lower a model all of whose operators have a form in C.

    Args:
        model: Fixed sizes, constants folded.
        prefix: What the names of its functions and constants begin with.

    Raises:
        BackendError: An operator has none; `refused_nodes` says which.
    """
    from graphopt_backends.npu.host.c_print import CannotPrint

    if weight_bytes(model) > MOST_BYTES:
        raise BackendError(prefix, f"has more than {MOST_BYTES >> 20} MiB of constants")
    if misread := _misread(model):
        raise BackendError(prefix, next(iter(misread.values())).reason)
    with quiet():
        try:
            return _Part(*_lowered(import_model(model)), prefix).functions(model)
        except CannotPrint as e:
            raise BackendError(prefix, f"it becomes {e}, which has no C") from e


def refused_nodes(model: ir.Model) -> dict[str, Unsupported]:
    """Name the nodes that have no form in C, by node name; the model is lowered to find out."""
    found = {name: _unsupported(node, "its result has no fixed shape") for name, node in data_dependent(model).items()}
    if not found and weight_bytes(model) > MOST_BYTES:
        return _largest(model)
    found |= _misread(model)
    with quiet():
        found = found or unsupported_nodes(model)
    if found or not (why := _refusal(model)):
        return found
    for node in model.graph:
        if reason := _refusal(alone(model, node)):
            found[node.name or ""] = _unsupported(node, reason)
    return found or {node.name or "": _unsupported(node, f"together with others: {why}") for node in model.graph}


def _misread(model: ir.Model) -> dict[str, Unsupported]:
    """Nodes that TVM imports as something else: it resizes by the quotient of sizes, whatever scale is given."""
    found: dict[str, Unsupported] = {}
    for node in model.graph:
        scales = node.inputs[2] if node.op_type == "Resize" and len(node.inputs) > 2 else None
        tensor, before, after = None if scales is None else scales.const_value, *map(static_shape, _ends(node))
        if tensor is None or not tensor.size or before is None or after is None:
            continue
        axes = node.attributes.get_ints("axes") or range(len(before))
        exact = list(map(float, before))
        for axis, scale in zip(axes, tensor.numpy().tolist(), strict=True):
            exact[axis] *= scale
        corners = node.attributes.get_string("coordinate_transformation_mode", "half_pixel") == "align_corners"
        if not corners and not np.allclose(exact, after, rtol=1e-6, atol=0):
            found[node.name or ""] = _unsupported(node, "its scale makes no whole number of elements")
    return found


def _ends(node: ir.Node) -> tuple[ir.Value | None, ir.Value]:
    return node.inputs[0], node.outputs[0]


def _largest(model: ir.Model) -> dict[str, Unsupported]:
    """Nodes with the largest constants, as many as must go until the rest can be source."""
    fact = f"constants of the host are more than the {MOST_BYTES >> 20} MiB that C source can hold"
    sizes = [(weight_bytes(alone(model, node)), node) for node in model.graph]
    total, found = sum(size for size, _ in sizes), dict[str, Unsupported]()
    for size, node in sorted(sizes, key=lambda pair: -pair[0]):
        if total <= MOST_BYTES:
            break
        found[node.name or ""] = _unsupported(node, fact)
        total -= size
    return found


def _refusal(model: ir.Model) -> str:
    """Why a model has no form in C; empty if it has one."""
    try:
        lower_part(model, "host")
    except BackendError as e:
        return e.fact
    return ""


def _unsupported(node: ir.Node, why: str) -> Unsupported:
    operator = node.op_type if node.domain in ("", "ai.onnx") else f"{node.domain}.{node.op_type}"
    return Unsupported(node.name or "", operator, why)


def _lowered(module: Any) -> tuple[Any, dict[str, Any]]:
    """Relax calls of PrimFuncs, and these by name, flat.

    Raises:
        BackendError: TVM fails.
    """
    try:
        module = _loops(module)
        return module, {variable.name_hint: function for variable, function in _flat(module).functions_items()}
    except Exception as e:  # TVM's passes raise their own untyped errors
        lines = [line.strip() for line in str(e).splitlines() if line.strip()]
        raise BackendError("TVM", f"cannot lower it: {(lines or [type(e).__name__])[-1][:160]}") from e


def _loops(module: Any) -> Any:
    """Operators as plain loops: Relax calls of PrimFuncs."""
    import tvm

    from graphopt_backends._compile import as_loops
    from graphopt_backends.npu.host.c_sort import sort_in_loops

    with tvm.target.Target("c"):
        return _inlined(as_loops(sort_in_loops(module)))


def _inlined(module: Any) -> Any:
    """Compute what one later loop alone reads where it is read, if that computes no element twice."""
    import tvm
    from tvm import tirx

    functions = {
        variable: _without_small_steps(function) if isinstance(function, tirx.PrimFunc) else function
        for variable, function in module.functions_items()
    }
    return tvm.IRModule(functions, attrs=module.attrs)


def _without_small_steps(function: Any) -> Any:
    import tvm
    from tvm import s_tir
    from tvm.s_tir.dlight.analysis import normalize_prim_func

    schedule: Any = s_tir.Schedule(tvm.IRModule({"main": function}), error_render_level="none")
    blocks = normalize_prim_func(schedule)
    infos = {schedule.get(block.block_rv).name_hint: block for block in blocks or ()}
    for block in blocks or ():
        readers = [infos.get(schedule.get(reader).name_hint) for reader in schedule.get_consumers(block.block_rv)]
        reader = readers[0] if len(readers) == 1 else None
        if reader is None or not block.is_injective() or reader.is_reduction() or _size(reader) > _size(block):
            continue
        try:
            schedule.compute_inline(block.block_rv)
        except s_tir.ScheduleError:  # it says by itself what cannot be inlined, and leaves it as it was
            continue
    return schedule.mod["main"].with_attrs(function.attrs)


def _size(block: Any) -> int:
    return int(np.prod([int(axis.dom) for axis in block.iters], dtype=np.int64))


def _flat(module: Any) -> Any:
    """PrimFuncs without blocks, on tensors of one axis, with indices as narrow as they can be."""
    import tvm
    from tvm import s_tir, tirx

    target, blocks, flat = tvm.target.Target("c"), s_tir.transform, tirx.transform
    functions = {
        variable: function.with_attr("global_symbol", variable.name_hint)
        for variable, function in module.functions_items()
        if isinstance(function, tirx.PrimFunc)
    }
    passes = [
        flat.BindTarget(target.with_host(target)), blocks.LowerInitBlock(),
        blocks.PlanAndUpdateBufferAllocationLocation(), blocks.ConvertBlocksToOpaque(),
        blocks.CompactBufferAllocation(), blocks.LowerMatchBuffer(), flat.StmtSimplify(), blocks.LowerOpaqueBlock(),
        flat.FlattenBuffer(), flat.BF16ComputeLegalize(), flat.NarrowDataType(32), flat.StmtSimplify(),
        flat.RemoveNoOp(), flat.LowerIntrin(),
    ]  # fmt: skip
    return tvm.transform.Sequential(passes)(tvm.IRModule(functions))


class _Part:
    """The calls of a Relax function, as they are found."""

    def __init__(self, module: Any, lowered: Mapping[str, Any], prefix: str) -> None:
        self._module, self._lowered, self._prefix = module, lowered, prefix
        self._made = Functions()
        self._values: dict[Any, Any] = {}
        self._printed: dict[str, Any] = {}
        self._taken: set[str] = set()

    def functions(self, model: ir.Model) -> Functions:
        main, made = self._module["main"], self._made
        for parameter, known in zip(main.params, signatures(model.graph.inputs), strict=True):
            self._values[parameter] = Buffer(known.dtype, known.elements, "input", known.name)
            made.inputs.append(self._values[parameter])
        for block in main.body.blocks:
            for binding in block.bindings:
                self._values[binding.var] = self._value(binding.value, binding.var.ty)
        found = self._operand(main.body.body)
        results = found if isinstance(found, list) else [found]
        for result, known in zip(results, signatures(model.graph.outputs), strict=True):
            output = self._output(result, known.name)
            if (output.dtype, output.size) != (known.dtype, known.elements):
                fact = f"TVM makes {output.size} elements of {output.dtype} where ONNX makes {known.elements}"
                raise BackendError(known.name, fact)
            made.outputs.append(output)
        return made

    def _output(self, result: Any, name: str) -> Buffer:
        """Let a tensor lie with the caller; one that does so already is copied."""
        if isinstance(result, Buffer) and result.origin == "temporary":
            result.origin, result.name = "output", name
            return result
        source = result.array if isinstance(result, Constant) else result
        output = Buffer(str(source.dtype), int(source.size), "output", name)
        self._made.calls.append(Call(None, (result, output)))
        return output

    def _value(self, expression: Any, ty: Any) -> Any:
        kind, name = type(expression).__name__, str(getattr(getattr(expression, "op", None), "name", ""))
        if kind == "Call" and name == "relax.call_tir":
            results = self._results(ty)
            flat = results if isinstance(results, list) else [results]
            self._call(expression.args[0].name_hint, [self._operand(a) for a in expression.args[1].fields], flat)
            return results
        if kind == "Call":
            raise _cannot(f"a call of {name or _packed(expression)}")
        return self._operand(expression)

    def _operand(self, expression: Any) -> Any:
        kind = type(expression).__name__
        if expression in self._values:
            return self._values[expression]
        if kind == "Tuple":
            return [self._operand(field) for field in expression.fields]
        if kind == "TupleGetItem":
            return self._operand(expression.tuple_value)[int(expression.index)]
        if hasattr(expression, "value") and hasattr(expression.value, "numpy"):
            return self._constant(expression.value.numpy())
        raise _cannot(f"an expression {kind}")

    def _results(self, ty: Any) -> Any:
        if hasattr(ty, "fields"):
            return [self._results(field) for field in ty.fields]
        return self._buffer(ty)

    def _buffer(self, ty: Any) -> Buffer:
        sizes = [getattr(size, "value", None) for size in getattr(ty, "shape", None) or [None]]
        if None in sizes and list(getattr(ty, "shape", None) or ()):
            raise _cannot("a tensor whose size is open")
        known = [int(size) for size in sizes if size is not None]
        return Buffer(str(ty.dtype), int(np.prod(known, dtype=np.int64)))

    def _constant(self, array: Array) -> Constant:
        key = hashlib.sha256(f"{array.dtype} {array.size}".encode() + array.tobytes()).digest()
        held = self._made.constants
        if key not in held:
            held[key] = Constant(f"{self._prefix}_constant{len(held)}", array)
        return held[key]

    def _call(self, name: str, operands: Sequence[Any], results: Sequence[Buffer]) -> None:
        from graphopt_backends.npu.host.c_print import print_function

        if name not in self._printed:
            called = f"{self._prefix}_{identifier(name, self._taken)}"
            printed = print_function(self._lowered[name], called)
            self._printed[name] = printed
            self._made.texts[called] = printed.text
            self._made.helpers |= printed.helpers
        printed = self._printed[name]
        rooms = [Buffer(room.dtype, room.size) for room in printed.rooms]
        given = (*_leaves(operands), *results)
        lives = (*[None] * len(given), *((room.first, room.last) for room in printed.rooms))
        self._made.calls.append(Call(printed.name, (*given, *rooms), printed.stages, lives))


def _leaves(values: Sequence[Any]) -> Iterator[Any]:
    for value in values:
        if isinstance(value, list):
            yield from _leaves(value)
        else:
            yield value


def _packed(expression: Any) -> str:
    return str(getattr(expression.op, "global_symbol", type(expression.op).__name__))


def _cannot(what: str) -> Exception:
    from graphopt_backends.npu.host.c_print import CannotPrint

    return CannotPrint(what)
