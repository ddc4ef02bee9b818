"""The pass `fold`: everything about a model that is known before it runs, computed before it runs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir
from onnx_ir.passes import common

from graphopt.options import opt
from graphopt.pass_base import Change, Context, Pass, PassResult
from graphopt_passes.fold._branches import inline_branches
from graphopt_passes.fold._constants import fold_constants
from graphopt_passes.fold._duplicates import merge_duplicates
from graphopt_passes.fold._large import fold_large_weights
from graphopt_passes.fold._no_operations import merge_transposes, remove_no_operations
from graphopt_passes.fold._shape_values import fold_shapes
from graphopt_passes.fold._sure_shapes import sure_shapes
from graphopt_passes.fold.affine import fold_affine
from graphopt_passes.fold.rewiring import FreshNames, site, snapshot

__all__ = ["Fold"]

_ROUNDS = 24


@dataclass(frozen=True, kw_only=True)
class Fold(Pass):
    """Compute ahead what does not depend on the input, and merge batch norms into the layers before them.

    Removes what nobody reads or what changes nothing, computes constants and static shapes, takes the branch of an
    If whose condition is constant, and folds BatchNormalization and per-channel arithmetic into Conv, ConvTranspose,
    Gemm and MatMul. Inputs and outputs keep their names, order and types.

    Refuses, with the reason: constants that would make the model grow by more than `limit`, random operators,
    quantization nodes, 4-bit, 8-bit float and bfloat16 arithmetic, batch norms in training mode, layers whose weight
    is computed or whose output somebody else reads. Functions are left as they are.
    """

    name: ClassVar[str] = "fold"
    lossy: ClassVar[bool] = False

    constants: bool = opt(True, help="compute nodes with constant inputs and values that follow from static shapes")
    batchnorm: bool = opt(True, help="fold BatchNormalization and per-channel arithmetic into linear layers")
    limit: int = opt(1 << 20, help="bytes by which a computed constant may exceed what it replaces", ge=0)

    def run(self, model: ir.Model, ctx: Context) -> PassResult:
        """Repeat all steps until none finds anything more."""
        before, nodes_before = snapshot(model), _count(model)
        changes: list[Change] = []
        refused: dict[str, str] = {}
        for _ in range(_ROUNDS):
            found = [change for step in self._round(model, ctx, refused) for change in step]
            changes = [*(c for c in changes if c.done), *found]
            if not any(change.done for change in found):
                break
        else:
            ctx.log.warning("fold still found something to do after %d rounds", _ROUNDS)
        modified = snapshot(model) != before
        metrics = {"nodes_before": nodes_before, "nodes_after": _count(model)}
        return PassResult(modified=modified, changes=_distinct(changes), metrics=metrics)

    def _round(self, model: ir.Model, ctx: Context, refused: dict[str, str]) -> Iterator[list[Change]]:
        yield _clean(model)
        shapes, names = sure_shapes(model, ctx), FreshNames(model)
        yield remove_no_operations(model, shapes)
        yield merge_transposes(model)
        if self.constants:
            yield inline_branches(model, names)
            yield fold_large_weights(model, shapes, names)
            yield fold_constants(model, shapes, names, self.limit, refused)
            yield fold_shapes(model, shapes, names)
        if self.batchnorm:
            yield fold_affine(model, shapes, names, self.limit)
        yield merge_duplicates(model)
        yield _clean(model)


def _clean(model: ir.Model) -> list[Change]:
    """Hold constants as initializers and drop what nobody reads."""
    changes = _lift_constants(model)
    before, held = list(_nodes(model)), _held(model)
    common.RemoveUnusedNodesPass()(model)
    after = set(_nodes(model))
    dead = [node for node in before if node not in after]
    changes += [Change(site(node), f"removed: nobody reads this {node.op_type}") for node in dead]
    for graph in model.graphs():
        for value in list(graph.initializers.values()):
            if not value.uses() and not value.is_graph_output() and not value.is_graph_input():
                graph.initializers.pop(value.name or "")
    if _held(model) < held:
        changes.append(Change(model.graph.name or "model", "dropped constants that nobody reads"))
    common.RemoveUnusedFunctionsPass()(model)
    common.RemoveUnusedOpsetsPass()(model)
    return changes


def _lift_constants(model: ir.Model) -> list[Change]:
    held = [node for node in _nodes(model) if node.op_type == "Constant" and node.domain == ""]
    common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    left = set(_nodes(model))
    lifted = [node for node in held if node not in left]
    if not lifted:
        return []
    return [Change(model.graph.name or "model", f"held {len(lifted)} constants as initializers")]


def _nodes(model: ir.Model) -> Iterator[ir.Node]:
    return iter(ir.traversal.RecursiveGraphIterator(model.graph))


def _held(model: ir.Model) -> int:
    return sum(len(graph.initializers) for graph in model.graphs())


def _count(model: ir.Model) -> int:
    return sum(1 for _ in _nodes(model))


def _distinct(changes: list[Change]) -> tuple[Change, ...]:
    return tuple({(change.site, change.action): change for change in changes}.values())
