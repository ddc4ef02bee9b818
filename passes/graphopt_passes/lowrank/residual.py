"""Products of matrices in few bits, each with a thin branch that makes up for what rounding lost.

    y = x W        ->        y = x DequantizeLinear(Q) + (x DequantizeLinear(A)) DequantizeLinear(B)

All of it is standard ONNX; ONNX Runtime computes the first and the second product on the integers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import onnx_ir as ir

from graphopt.model_io import EMBED_LIMIT, weight_bytes
from graphopt.pass_base import Change, Context, PassResult
from graphopt_passes.lowrank._factors import Problem
from graphopt_passes.lowrank._residual import Compensated, affordable_rank, bits_of, compensated
from graphopt_passes.lowrank.judge import Judge, Loss
from graphopt_passes.lowrank.rewrite import Rewriter, drop_constant
from graphopt_passes.lowrank.seen import Scale, problems
from graphopt_passes.lowrank.sites import Site, find_sites
from graphopt_passes.quant.blockwise.fit import Method
from graphopt_passes.quant.blockwise.layout import Layout
from graphopt_passes.quant.blockwise.store import BlockStore, needed_opset
from graphopt_passes.quant.builder import Builder
from graphopt_passes.quant.prepare import grown_file, lift_opset

__all__ = ["Branches", "add_branches"]

_HALF_A_BIT = 0.5
_NODE_BYTES = 160  # a node and an initializer with their names
_NODES = 6


@dataclass(frozen=True)
class Branches:
    """What is asked for.

    Attributes:
        method: How weights are rounded.
        rank: Of each branch; 0: what half a bit a weight pays for.
        scale: How inputs weigh.
    """

    method: Method
    rank: int
    scale: Scale

    def rank_of(self, site: Site) -> int:
        """Rank for a layer; never more than it has."""
        inputs, outputs = site.geometry.inputs, site.geometry.outputs
        wanted = self.rank or affordable_rank(inputs, outputs, _HALF_A_BIT)
        return min(wanted, inputs, outputs)

    def bits(self, site: Site) -> float:
        """Bits for each weight of a layer."""
        return bits_of(site.geometry.inputs, site.geometry.outputs, self.method, self.rank_of(site))


def add_branches(
    model: ir.Model,
    ctx: Context,
    wanted: Branches,
    left_out: Callable[[Site], str],
    too_much: Callable[[Loss, int], str],
) -> PassResult:
    """Store weights of products in few bits, with branches; in place, or not at all where it does not pay.

    Args:
        model: The model.
        ctx: Its context.
        wanted: What is asked for.
        left_out: Why the user wants a layer to stay; empty where it may go.
        too_much: Why a loss of the model's outputs, by so many layers, is too much; empty where it is not.
    """
    work = model.clone()
    refusal = lift_opset(work, needed_opset(wanted.method.bits), ctx)
    inner = replace(ctx, model=work, _facts={})
    found = find_sites(inner, tables=False)
    reasons = {site.name: refusal or left_out(site) or _why_not(site, wanted) for site in found.sites}
    sites = [site for site in found.sites if not reasons[site.name]]
    done = dict[str, Compensated]()
    store, rewriter = BlockStore(Builder(work)), Rewriter(work)
    for site, problem in ctx.progress(problems(work, sites, wanted.scale, inner, centred=False), "rounding weights"):
        if isinstance(problem, Problem):  # layers of many matrices were left out
            done[site.name] = compensated(problem, wanted.rank_of(site), wanted.method)
            _replace(site.node, done[site.name], store, rewriter)
    loss = _loss(model, work, ctx) if done else Loss()
    why = "" if not done else grown_file(model, work) or too_much(loss, len(done))
    if not why and done:
        model.graph, model.ir_version = work.graph, work.ir_version
        model.opset_imports.update(work.opset_imports)
        ctx.drop_facts()
    reasons |= {name: why for name in done if why}
    changes = [_change(site, done.get(site.name), reasons[site.name], wanted) for site in found.sites]
    metrics = {"compensated": 0 if why else len(done), "outputs_lost": round(loss.energy, 6)}
    return PassResult(bool(done) and not why, (*changes, *found.refused), metrics=metrics, notes=(why,) if why else ())


def _why_not(site: Site, wanted: Branches) -> str:
    """Why a layer gets no branch."""
    if site.geometry.kernel:
        return "a convolution has no form in blocks that runtimes compute on"
    if site.left or site.batch or site.node.attributes.get_int("transA", 0):
        return "only a matrix on the right has a form in blocks that runtimes compute on"
    if site.shared:
        return "layers share its weight"
    if site.geometry.itemsize != 4:
        return "its weight is not in float32"
    numbers = site.geometry.inputs * site.geometry.outputs
    stored = numbers * wanted.bits(site) / 8 + _NODES * _NODE_BYTES
    return "integers, scales and a branch take as many bytes as it does" if stored >= 4 * numbers else ""


def _loss(model: ir.Model, work: ir.Model, ctx: Context) -> Loss:
    """What the outputs lose; nothing is known without data, or of a model too large to run twice."""
    if ctx.calibration is None or weight_bytes(model) > EMBED_LIMIT:
        return Loss()
    return Judge(model, ctx.calibration, ctx).loss(work)


def _replace(node: ir.Node, found: Compensated, store: BlockStore, rewriter: Rewriter) -> None:
    """Round a layer's weight and add its branch; the sum keeps the layer's name and output."""
    source, weight = node.inputs[:2]
    assert source is not None
    assert weight is not None
    kept = [value for name, value in node.attributes.items() if name == "beta"]  # alpha is in the matrix
    whole = rewriter.node(node.op_type, node, [source, weight, *node.inputs[2:]], kept)
    made = [whole]
    if found.thin:
        inward = rewriter.node("MatMul", node, [source, weight])
        outward = rewriter.node("MatMul", node, [inward.outputs[0], weight])
        made += [inward, outward, rewriter.node("Add", node, [whole.outputs[0], outward.outputs[0]])]
    rewriter.put(node, made)
    store.linear(whole, 1, found.blocks)
    if found.thin:
        first, last = found.thin
        store.linear(made[1], 1, first)
        shape = last.codes.shape[::-1]
        store.spread(made[2], 1, weight, last, Layout(shape, shape, 1))  # a scale for each term, not for each output
    drop_constant(weight)


def _change(site: Site, found: Compensated | None, reason: str, wanted: Branches) -> Change:
    if found is None or reason:
        return Change.skipped(site.name, reason)
    rank, bits = wanted.rank_of(site) if found.thin else 0, wanted.method.bits
    branch = f", what that loses in a branch of rank {rank}" if rank else ", no branch helps"
    in_all = bits_of(site.geometry.inputs, site.geometry.outputs, wanted.method, rank)
    details = {"bits": bits, "rank": rank, "bits_in_all": round(in_all, 2)}
    action = (
        f"weights in {bits} bits{branch}: its output loses {found.error:.2%} of its energy, {found.plain:.2%} without"
    )
    return Change(
        site.name, action, details={**details, "energy_lost": round(found.error, 8), "plain": round(found.plain, 8)}
    )
