"""Make a model ready for a compiler: fixed sizes, no functions, constants folded, float32, awkward operators rewritten.

Works on a copy; the model that ships keeps its dynamic interface.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import onnx_ir as ir
from onnx_ir.passes import common as ir_passes

from graphopt.errors import UsageError
from graphopt.model_io import InputSpec, ShapeBinding, input_specs
from graphopt.opset import raise_opset
from graphopt_backends._fold import fold, infer_shapes, look_up, static_shape
from graphopt_backends._rewrite import Keeps, rewrite
from graphopt_backends.batch.follow import Batch, batch_axes, follow_batch
from graphopt_backends.network.half import widen

__all__ = ["Lowered", "lower"]

_OLDEST_OPSET = 13
"""The importer reads older models as if they were of this operator set: Slice and Squeeze with inputs, for one."""


@dataclass(frozen=True)
class Lowered:
    """A model with fixed sizes.

    Attributes:
        model: The lowered copy.
        fixed: What was fixed without being asked for, for the report: `batch = 1`.
        batch: What other batches it serves, sample by sample.
    """

    model: ir.Model
    fixed: tuple[str, ...] = ()
    batch: Batch = field(default_factory=Batch)


def lower(model: ir.Model, binding: ShapeBinding, target: str, keeps: Keeps = lambda _: False) -> Lowered:
    """Lower a copy of `model`.

    A dynamic first dimension (the batch) that nothing fixes becomes 1; every other one must be given.

    Args:
        model: The model; not changed.
        binding: Sizes that the user gave.
        target: What is compiled for, for messages.
        keeps: True for nodes that make weights of small integers which the compiler takes as they are.

    Raises:
        UsageError: A dynamic dimension must be fixed; the message names it and the flag.
    """
    copy = model.clone()
    ir_passes.InlinePass()(copy)
    ir_passes.RemoveInitializersFromInputsPass()(copy)
    axes = batch_axes(input_specs(copy))
    fixed = _fix_sizes(copy, binding, target)
    raise_opset(copy, _OLDEST_OPSET)
    ir_passes.NameFixPass()(copy)
    ir_passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(copy)
    if axes:
        infer_shapes(copy)
    unfolded = copy.clone() if axes else None
    fold(copy)
    shapes = {str(o.name): shape for node in copy.graph for o in node.outputs if (shape := static_shape(o)) is not None}
    if widen(copy) | look_up(copy, keeps):
        fold(copy)
    while rewrite(copy, keeps):
        fold(copy)
    ir_passes.IdentityEliminationPass()(copy)
    ir_passes.RemoveUnusedNodesPass()(copy)
    ir_passes.TopologicalSortPass()(copy)
    if unfolded is None:
        return Lowered(copy, fixed, Batch(reason="no input has an open batch axis"))
    ir_passes.TopologicalSortPass()(unfolded)
    return Lowered(copy, fixed, follow_batch(unfolded, shapes, axes))


def _fix_sizes(model: ir.Model, binding: ShapeBinding, target: str) -> tuple[str, ...]:
    specs = input_specs(model)
    dims = {**_dims_from_shapes(specs, binding), **binding.dims}
    batches = sorted({d for s in specs for d in (s.shape or ())[:1] if isinstance(d, str) and d not in dims})
    known = ShapeBinding(binding.shapes, {**dict.fromkeys(batches, 1), **dims})
    values = {value.name: value for value in model.graph.inputs}
    fixed = [f"{name} = 1" for name in batches]
    for spec in specs:
        shape = spec.bound(known)
        if shape is None:
            hint = f"give --shape {spec.name}=1x3x224x224"
            raise UsageError(f"input {spec.name!r}", f"has no rank, and {target} needs fixed sizes", hint)
        sizes: list[int] = []
        for axis, dim in enumerate(shape):
            if isinstance(dim, int):
                sizes.append(dim)
            elif axis == 0 and dim is None:
                sizes.append(1)
                fixed.append(f"first dimension of {spec.name} = 1")
            else:
                raise _open_dimension(spec, axis, dim, target)
        values[spec.name].shape = ir.Shape(sizes)
    _forget_shapes(model)
    return tuple(fixed)


def _dims_from_shapes(specs: tuple[InputSpec, ...], binding: ShapeBinding) -> dict[str, int]:
    """Sizes of named dimensions that follow from `--shape` of another input."""
    found: dict[str, int] = {}
    for spec in specs:
        given = binding.shapes.get(spec.name)
        if given is not None and spec.shape is not None and len(given) == len(spec.shape):
            found.update({dim: size for dim, size in zip(spec.shape, given, strict=True) if isinstance(dim, str)})
    return found


def _open_dimension(spec: InputSpec, axis: int, dim: int | str | None, target: str) -> UsageError:
    example = "x".join(str(d) if isinstance(d, int) else "1" if i == 0 else "N" for i, d in enumerate(spec.shape or ()))
    named = f"dimension {dim!r}" if dim else f"dimension {axis}"
    flag = f"--dim {dim}=N or --shape {spec.name}={example}" if dim else f"--shape {spec.name}={example}"
    return UsageError(f"input {spec.name!r}", f"{named} is dynamic, and {target} needs fixed sizes", f"give {flag}")


def _forget_shapes(model: ir.Model) -> None:
    """Drop shapes of computed values: they may name dimensions that now have sizes."""
    for graph in model.graphs():
        for node in graph:
            for output in node.outputs:
                output.shape = None
