"""Store weights in blocks of 8, 4 or 2 bits: the steps from a model to the one that takes its place."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import onnx_ir as ir

from graphopt.analyses import LINEAR_LAYERS, SHAPES, LayerMoments, MomentsAnalysis
from graphopt.analyses.names import Names
from graphopt.model_io import EMBED_LIMIT, weight_bytes
from graphopt.opset import opset_version, raise_opset
from graphopt.pass_base import Change, Context, PassResult
from graphopt.reference import Reference
from graphopt_passes.fold.affine import fold_affine
from graphopt_passes.fold.rewiring import FreshNames
from graphopt_passes.quant.audit import output_quality, sample_feeds
from graphopt_passes.quant.blockwise.awq import scale_inputs
from graphopt_passes.quant.blockwise.fit import Method, Rounded, round_weight
from graphopt_passes.quant.blockwise.layout import Layout, layout_of
from graphopt_passes.quant.blockwise.lend import turn_constants
from graphopt_passes.quant.blockwise.store import FUSED_GROUPS, BlockStore, is_fusable, needed_opset
from graphopt_passes.quant.builder import Builder
from graphopt_passes.quant.prepare import drop_unread, grown_file, lift_opset
from graphopt_passes.quant.sites import Site, Weight, choose, find_sites, keyed_nodes, tensor_of, unshared

__all__ = ["quantize_blocks"]

_FEEDS = 4
_NODE_BYTES = 160  # a node and an initializer with their names
_NODES = {"Gather": 9}
_FLOAT_BYTES = 4
_JUDGED_BYTES = 256 << 20  # below, algorithms that do without data are judged by it all the same


@dataclass(frozen=True, eq=False)
class _Bench:
    """A model being rewritten.

    Attributes:
        context: Facts about the model as it was when its sites were found; its `model` stays float.
        store: Edits the copy that is rewritten.
        builder: The same, one level below.
        nodes: Nodes of the copy by site.
        labels: What facts call each site.
        readers: How many nodes read each weight, before anything was replaced.
    """

    context: Context
    store: BlockStore
    builder: Builder
    nodes: Mapping[str, ir.Node]
    labels: Mapping[str, str]
    readers: Mapping[ir.Value, int]


def quantize_blocks(
    model: ir.Model,
    ctx: Context,
    method: Method,
    *,
    only: Sequence[str] = (),
    skip: Sequence[str] = (),
    bits: Mapping[str, int] | None = None,
) -> PassResult:
    """Store the weights of a model in blocks of integers, with arithmetic in float; in place.

    Weights are read and rounded one at a time; data is run for as many layers together as their moments fit 512 MB.

    Args:
        model: The model; it is left as it was where nothing can be done.
        ctx: Its context.
        method: How weights are rounded.
        only: Patterns of the layers to take, all if empty.
        skip: Patterns of layers to leave alone.
        bits: Bits of single sites by their key; what is not named keeps those of the method, 0 stays float.

    Raises:
        OptionError: A pattern matches no layer.
    """
    work = model.clone()
    refusal = _lift(work, needed_opset(method.bits), ctx)
    if refusal:
        sites, skipped = find_sites(model)
        return PassResult(False, (*skipped, *(Change.skipped(site.name, refusal) for site in sites)))
    builder = Builder(work)
    inner = replace(ctx, model=work, _facts={})
    if any(node.op_type == "BatchNormalization" for graph in work.graphs() for node in graph):
        fold_affine(work, inner.fact(SHAPES), FreshNames(work), 0)
        drop_unread(work)
        inner.drop_facts()
        builder = Builder(work)
    turn_constants(builder, lambda node: _is_named(node, only, skip))
    sites, skipped = _sites(work, only, skip)
    bench, methods = _bench(work, inner, builder, sites), _methods(sites, method, bits or {})
    by_key = _quantize_all(bench, sites, methods)
    drop_unread(work)
    changes = (*skipped, *(by_key[site.key] for site in sites))
    done = sum(change.done for change in changes)
    grown = grown_file(model, work) if done else ""
    if grown:
        return PassResult(False, tuple(Change.skipped(c.site, grown) if c.done else c for c in changes))
    if not done:
        return PassResult(False, changes)
    metrics = {f"layers_int{method.bits}": done, "layers_float": len(changes) - done} | _quality(bench, work)
    model.graph, model.ir_version = work.graph, work.ir_version
    return PassResult(True, changes, metrics=metrics, notes=_notes(method))


def _lift(work: ir.Model, version: int, ctx: Context) -> str:
    """Raise the opset; a model too large to run beside itself is not compared before and after."""
    if weight_bytes(work) <= EMBED_LIMIT or ctx.keep_opset or opset_version(work) >= version:
        return lift_opset(work, version, ctx)
    raise_opset(work, version)
    ctx.log.info("the opset was raised to %d; the model is too large to compare before and after", version)
    return ""


def _is_named(node: ir.Node, only: Sequence[str], skip: Sequence[str]) -> bool:
    """Whether the options take a layer; what `choose` says of sites."""
    named, left = ([fnmatch.fnmatchcase(node.name or "", p) for p in patterns] for patterns in (only, skip))
    return (not only or any(named)) and not any(left)


def _sites(work: ir.Model, only: Sequence[str], skip: Sequence[str]) -> tuple[tuple[Site, ...], tuple[Change, ...]]:
    sites, skipped = find_sites(work)
    found, names = {site.name for site in sites}, [n.name or "" for graph in work.graphs() for n in graph]
    # a layer behind a Transpose that stays where it is can be named, but is no site
    skip = [p for p in skip if fnmatch.filter(found, p) or not fnmatch.filter(names, p)]
    chosen, left = choose(sites, only, skip)
    kept, shared = unshared(work, chosen)
    return kept, (*skipped, *left, *shared)


def _bench(work: ir.Model, inner: Context, builder: Builder, sites: Sequence[Site]) -> _Bench:
    nodes, names = keyed_nodes(work), Names(work)
    values = [nodes[site.key].inputs[weight.index] for site in sites for weight in site.weights]
    float_context = replace(inner, model=work.clone(), _facts={})
    return _Bench(
        float_context,
        BlockStore(builder),
        builder,
        nodes,
        {site.key: names.label(nodes[site.key]) for site in sites},
        {value: len(value.uses()) for value in values if value is not None},
    )


def _methods(sites: Sequence[Site], method: Method, bits: Mapping[str, int]) -> dict[str, Method | None]:
    found: dict[str, Method | None] = {}
    for site in sites:
        number = bits.get(site.key, method.bits)
        if number == 0:
            found[site.key] = None
        elif number in (8, 4, 2):
            found[site.key] = replace(method, bits=number)
        else:
            raise ValueError(f"{number} bits")
    return found


def _quantize_all(bench: _Bench, sites: Sequence[Site], methods: Mapping[str, Method | None]) -> dict[str, Change]:
    """Quantize all sites, those that data says something about in portions."""
    found: dict[str, Change] = {}
    for part in _portions(bench, sites, methods):
        for site in bench.context.progress(part.sites, "rounding weights"):
            method = methods[site.key]
            if method is None:
                found[site.key] = Change.skipped(site.name, "stays in float by choice of bits")
            else:
                label = bench.labels[site.key]
                found[site.key] = _quantize(bench, site, method, part.moments.get(label), part.scaled.get(label, ""))
    return found


@dataclass(frozen=True, eq=False)
class _Portion:
    """Sites with the moments of what they read, and what was done to it, both by label."""

    sites: Sequence[Site]
    moments: Mapping[str, LayerMoments]
    scaled: Mapping[str, str]


def _portions(bench: _Bench, sites: Sequence[Site], methods: Mapping[str, Method | None]) -> Iterator[_Portion]:
    """Measure moments for some sites at a time; sites without any come last, all together."""
    rest, ctx = list(sites), bench.context
    free = () if weight_bytes(ctx.model) <= _JUDGED_BYTES else ("rtn", "hqq")
    wanted = [s for s in sites if s.main and (m := methods[s.key]) is not None and m.algorithm not in free]
    if ctx.calibration is not None and wanted:
        reads = ctx.fact(LINEAR_LAYERS).reads
        names = tuple(bench.labels[site.key] for site in wanted if bench.labels[site.key] in reads)
        for part in MomentsAnalysis(layers=names).portions(ctx) if names else ():
            moments = dict(part.compute(ctx.model, ctx).layers)
            chosen = [site for site in rest if bench.labels[site.key] in moments]
            rest = [site for site in rest if bench.labels[site.key] not in moments]
            scaled = dict[str, str]()
            if any(method is not None and method.algorithm == "awq" for method in methods.values()):
                scaled = scale_inputs(bench.builder, bench.nodes, bench.labels, chosen, methods, moments, reads)
            yield _Portion(chosen, moments, scaled)
    yield _Portion(rest, {}, {})


def _quantize(bench: _Bench, site: Site, method: Method, moments: LayerMoments | None, scaled: str) -> Change:
    """Quantize the weights of one site that are worth it."""
    node, rounded, done = bench.nodes[site.key], list[Rounded](), 0
    for weight in site.weights:
        value, layout = node.inputs[weight.index], layout_of(site, weight, node)
        if value is None or not _is_worth(layout, site, method):
            continue
        known = moments if weight.index < 2 else None  # a recurrent layer's second weight reads its own state
        result = _replace(bench, node, weight, layout, method, known)
        if result is not None:
            rounded.append(result)
        bench.builder.discard(value)
        done += weight.size
    if not done:
        size = sum(weight.size for weight in site.weights)
        return Change.skipped(site.name, f"{size} weights, so few that scales would cost more than they save")
    details: dict[str, int | float | str | bool] = {"bits": method.bits, "weights": done}
    details["scales"] = f"groups of {method.group_size}" if method.group_size else "channel"
    if not rounded:
        return Change(site.name, f"weights in {method.bits} bits, shared with a layer before", details=details)
    details["weight_sqnr_db"] = round(min(999.0, *(result.weight_sqnr for result in rounded)), 1)
    if (layer := rounded[0].layer_sqnr) is not None:
        details["layer_sqnr_db"] = round(min(layer, 999.0), 1)
    how = ", ".join(filter(None, (rounded[0].how, scaled)))
    return Change(site.name, f"weights in {method.bits} bits ({how}), arithmetic in float", details=details)


def _replace(
    bench: _Bench, node: ir.Node, weight: Weight, layout: Layout, method: Method, moments: LayerMoments | None
) -> Rounded | None:
    """Replace one weight; None where another layer's integers serve."""
    value = node.inputs[weight.index]
    tensor = tensor_of(value)
    if value is None or tensor is None:
        raise TypeError(f"the weight of {node.name!r} is not constant")
    store, own = bench.store, is_fusable(node, weight.index) and len(layout.stored) == 2
    own = own and _copies_pay(bench.readers.get(value, 1), layout, method)
    table = node.op_type == "Gather"
    if table and store.has_table(value):
        store.table(node, value, None)
        return None
    if not own and not table and store.has_spread(value, layout):
        store.spread(node, weight.index, value, None, layout)
        return None
    rounded = round_weight(tensor.numpy(), layout, method, moments)
    if isinstance(tensor, ir.ExternalTensor):
        tensor.release()
    if table:
        store.table(node, value, rounded.blocks)
    elif own:
        store.linear(node, weight.index, rounded.blocks)
    else:
        store.spread(node, weight.index, value, rounded.blocks, layout)
    return rounded


def _stored_bytes(layout: Layout, method: Method) -> float:
    """Bytes of a weight's codes, scales and zero points."""
    groups = -(-layout.inputs // method.group_size) if method.group_size else 1
    zeros = 0.0 if method.symmetric else method.bits / 8
    return layout.outputs * (layout.inputs * method.bits / 8 + groups * (_FLOAT_BYTES + zeros))


def _is_worth(layout: Layout, site: Site, method: Method) -> bool:
    added = _NODE_BYTES * _NODES.get(site.operator, 3 if layout.reshaped else 2)
    return _FLOAT_BYTES * layout.inputs * layout.outputs > _stored_bytes(layout, method) + added


def _copies_pay(readers: int, layout: Layout, method: Method) -> bool:
    """Whether a copy for every layer that reads a weight takes less than the float weight."""
    return readers == 1 or readers * _stored_bytes(layout, method) < _FLOAT_BYTES * layout.inputs * layout.outputs


def _quality(bench: _Bench, result: ir.Model) -> dict[str, float]:
    """Signal to noise at the worst output, where there is data and the model is small enough to run beside itself."""
    ctx = bench.context
    if ctx.calibration is None or weight_bytes(ctx.model) > EMBED_LIMIT:
        return {}
    before, after = (Reference(m, threads=ctx.threads, extensions=ctx.extensions) for m in (ctx.model, result))
    levels = output_quality(before, after, sample_feeds(ctx, _FEEDS), ctx)
    return {"output_sqnr_db": round(min(levels.values()), 1)} if levels else {}


def _notes(method: Method) -> tuple[str, ...]:
    group = method.group_size
    if group in (0, *FUSED_GROUPS):
        return ()
    sizes = ", ".join(map(str, FUSED_GROUPS))
    return (f"ONNX Runtime computes on groups of {sizes}; groups of {group} become float weights on every run",)
