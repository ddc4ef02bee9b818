"""Store weights in blocks of 8, 4 or 2 bits: the steps from a model to the one that takes its place."""

from __future__ import annotations

import fnmatch
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import onnx_ir as ir

from graphopt.analyses import LINEAR_LAYERS, SHAPES, LayerMoments, MomentsAnalysis
from graphopt.analyses.names import Names
from graphopt.model_io import EMBED_LIMIT, weight_bytes
from graphopt.opset import opset_version, raise_opset
from graphopt.pass_base import Change, Context, PassResult
from graphopt_passes.fold.affine import fold_affine
from graphopt_passes.fold.rewiring import FreshNames
from graphopt_passes.quant.blockwise.awq import scale_inputs
from graphopt_passes.quant.blockwise.fit import Method, Rounded, round_weight
from graphopt_passes.quant.blockwise.guard import first_bits, open_guard
from graphopt_passes.quant.blockwise.layout import Layout, layout_of
from graphopt_passes.quant.blockwise.lend import turn_constants
from graphopt_passes.quant.blockwise.store import FUSED_GROUPS, BlockStore, is_fusable, needed_opset
from graphopt_passes.quant.builder import Builder
from graphopt_passes.quant.prepare import drop_unread, grown_file, lift_opset
from graphopt_passes.quant.sites import Site, Weight, choose, find_sites, keyed_nodes, tensor_of, usable

__all__ = ["quantize_blocks"]

Array = np.ndarray[Any, np.dtype[Any]]

_BEST = 80.0  # dB
_NODE_BYTES = 160  # a node and an initializer with their names
_NODES = {"Gather": 9}
_FLOAT_BYTES = 4
_JUDGED_BYTES = 256 << 20  # below, algorithms that do without data are judged by it all the same


@dataclass(frozen=True, eq=False)
class _Source:
    """The float model.

    Attributes:
        context: Facts about it; its `model` stays as it is.
        sites: What is to be stored.
        method: How.
        only: Patterns of names that were asked for.
        known: Rounded weights by site, input and bits, to be used again; None where memory would not hold them all, or
            rounding follows scales that depend on other layers.
    """

    context: Context
    sites: Sequence[Site]
    method: Method
    known: dict[tuple[str, int, int], Rounded] | None

    def rounded(self, site: Site, place: int, bits: int) -> Array:
        """A weight as it is stored, in float; one that was not kept is rounded without data."""
        node, weight = keyed_nodes(self.context.model)[site.key], site.weights[place]
        tensor, layout = tensor_of(node.inputs[weight.index]), layout_of(site, weight, node)
        if tensor is None:
            raise TypeError(f"the weight of {site.name!r} is not constant")
        known = (self.known or {}).get((site.key, weight.index, bits))
        if known is None:
            quick = replace(self.method, bits=bits, algorithm="rtn")
            known = round_weight(tensor.numpy(), layout, quick, None)
        return layout.tensor(known.blocks.real()).reshape(weight.shape)


@dataclass(frozen=True, eq=False)
class _Bench:
    """A copy of the model that is being rewritten.

    Attributes:
        source: What it is a copy of.
        store: Edits the copy.
        builder: The same, one level below.
        nodes: Nodes of the copy by site.
        labels: What facts call each site.
        readers: How many nodes read each weight, before anything was replaced.
        why: Reasons for other bits than those asked for, by site.
    """

    source: _Source
    store: BlockStore
    builder: Builder
    nodes: Mapping[str, ir.Node]
    labels: Mapping[str, str]
    readers: Mapping[ir.Value, int]
    why: Mapping[str, str]


def quantize_blocks(
    model: ir.Model,
    ctx: Context,
    method: Method,
    *,
    only: Sequence[str] = (),
    skip: Sequence[str] = (),
    bits: Mapping[str, int] | None = None,
    floor: float | None = None,
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
        floor: Least signal to noise in dB of every output, all samples taken together, 4 dB more for class scores:
            where it is missed, the layers that make most of the noise for their size take more bits, or stay float.
            Layers with few weights to an output take 8 at once. None: all sites take the bits that they were given.

    Raises:
        OptionError: A pattern matches no layer.
    """
    work = model.clone()
    refusal = _lift(work, needed_opset(method.bits), ctx)
    if refusal:
        sites, skipped = find_sites(model)
        return PassResult(False, (*skipped, *(Change.skipped(site.name, refusal) for site in sites)))
    inner = replace(ctx, model=work, _facts={})
    if any(node.op_type == "BatchNormalization" for graph in work.graphs() for node in graph):
        fold_affine(work, inner.fact(SHAPES), FreshNames(work), 0)
        drop_unread(work)
        inner.drop_facts()
    turn_constants(Builder(work), lambda node: _is_named(node, only, skip))
    sites, skipped = _sites(work, only, skip)
    keeps = floor is not None and method.algorithm != "awq" and weight_bytes(work) <= EMBED_LIMIT
    source = _Source(inner, sites, method, {} if keeps else None)
    made = _guarded(source, floor) if floor is not None else _make(source, _given(source, bits or {}), {})
    changes = (*skipped, *(made.changes[site.key] for site in sites))
    done = sum(change.done for change in changes)
    grown = grown_file(model, made.model) if done else ""
    if grown:
        return PassResult(False, tuple(Change.skipped(c.site, grown) if c.done else c for c in changes))
    if not done:
        return PassResult(False, changes)
    model.graph, model.ir_version = made.model.graph, made.model.ir_version
    return PassResult(True, changes, metrics=_metrics(changes, made), notes=(*_notes(method), *made.notes))


@dataclass(frozen=True)
class _Made:
    """A model with weights in blocks, what happened at each site by key, and the signal to noise of its outputs."""

    model: ir.Model
    changes: Mapping[str, Change]
    levels: Mapping[str, float] = field(default_factory=dict[str, float])
    notes: tuple[str, ...] = ()


def _guarded(source: _Source, floor: float) -> _Made:
    """Store all sites, look at the outputs, and widen the noisiest sites until they are good enough."""
    nodes, bits, why = keyed_nodes(source.context.model), dict[str, int](), dict[str, str]()
    for site in source.sites:
        layouts = [layout_of(site, weight, nodes[site.key]) for weight in site.weights]
        bits[site.key], reason = first_bits(site, layouts, source.method.bits)
        why |= {site.key: reason} if reason else {}
    guard, round_ = open_guard(source.context, floor) if source.sites else "", 0
    while True:
        made = _make(source, _given(source, bits, quick=frozenset(why) if round_ else frozenset()), why)
        if isinstance(guard, str) or not any(change.done for change in made.changes.values()):
            return replace(made, notes=(guard,) if isinstance(guard, str) and guard else ())
        made = replace(made, levels=guard.levels(made.model))
        stepped = guard.step_back(source.sites, bits, made.levels, round_, source.rounded)
        if not stepped:
            return replace(made, notes=guard.notes)
        why, round_ = why | stepped, round_ + 1


def _make(source: _Source, methods: Mapping[str, Method | None], why: Mapping[str, str]) -> _Made:
    """Store the sites in a copy of the model."""
    work = source.context.model.clone()
    builder, nodes, names = Builder(work), keyed_nodes(work), Names(work)
    values = [nodes[site.key].inputs[weight.index] for site in source.sites for weight in site.weights]
    bench = _Bench(
        source,
        BlockStore(builder),
        builder,
        nodes,
        {site.key: names.label(nodes[site.key]) for site in source.sites},
        {value: len(value.uses()) for value in values if value is not None},
        why,
    )
    changes = _quantize_all(bench, methods)
    drop_unread(work)
    return _Made(work, changes)


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
    kept, shared = usable(work, chosen)
    return kept, (*skipped, *left, *shared)


def _given(
    source: _Source, bits: Mapping[str, int], *, quick: frozenset[str] = frozenset()
) -> dict[str, Method | None]:
    """The method of each site; what is not named has its own bits, and 8 bits of `quick` sites need no data."""
    found: dict[str, Method | None] = {}
    for site in source.sites:
        number = bits.get(site.key, source.method.bits)
        if number == 0:
            found[site.key] = None
        elif number in (8, 4, 2):
            algorithm = "rtn" if number == 8 and site.key in quick else source.method.algorithm
            found[site.key] = replace(source.method, bits=number, algorithm=algorithm)
        else:
            raise ValueError(f"{number} bits")
    return found


def _quantize_all(bench: _Bench, methods: Mapping[str, Method | None]) -> dict[str, Change]:
    """Quantize all sites, those that data says something about in portions."""
    found: dict[str, Change] = {}
    for part in _portions(bench, methods):
        for site in bench.source.context.progress(part.sites, "rounding weights"):
            method = methods[site.key]
            if method is None:
                why = bench.why.get(site.key, "stays in float by choice of bits")
                found[site.key] = Change.skipped(site.name, why)
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


def _portions(bench: _Bench, methods: Mapping[str, Method | None]) -> Iterator[_Portion]:
    """Measure moments for some sites at a time; sites without any come last, all together."""
    rest, ctx = list(bench.source.sites), bench.source.context
    wanted = [site for site in rest if ctx.calibration is not None and _asks_data(bench, site, methods[site.key])]
    if wanted:
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


def _asks_data(bench: _Bench, site: Site, method: Method | None) -> bool:
    """Whether a site is rounded by data, or at least judged by it."""
    known, source = bench.source.known or {}, bench.source
    if not site.main or method is None or (site.key, site.weights[0].index, method.bits) in known:
        return False
    if method.algorithm != source.method.algorithm:
        return False  # a later choice, which does without
    return method.algorithm not in ("rtn", "hqq") or weight_bytes(source.context.model) <= _JUDGED_BYTES


def _quantize(bench: _Bench, site: Site, method: Method, moments: LayerMoments | None, scaled: str) -> Change:
    """Quantize the weights of one site that are worth it."""
    node, rounded, done = bench.nodes[site.key], list[Rounded](), 0
    for weight in site.weights:
        value, layout = node.inputs[weight.index], layout_of(site, weight, node)
        if value is None or not _is_worth(layout, site, method):
            continue
        known = moments if weight.index < 2 else None  # a recurrent layer's second weight reads its own state
        result = _replace(bench, site, weight, layout, method, known)
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
    how, why = ", ".join(filter(None, (rounded[0].how, scaled))), bench.why.get(site.key, "")
    action = f"weights in {method.bits} bits ({how}), arithmetic in float" + (f": {why}" if why else "")
    return Change(site.name, action, details=details)


def _replace(
    bench: _Bench, site: Site, weight: Weight, layout: Layout, method: Method, moments: LayerMoments | None
) -> Rounded | None:
    """Replace one weight; None where another layer's integers serve."""
    node = bench.nodes[site.key]
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
    known, key = bench.source.known, (site.key, weight.index, method.bits)
    rounded = (known or {}).get(key) or round_weight(tensor.numpy(), layout, method, moments)
    if known is not None:
        known[key] = rounded
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


def _metrics(changes: Sequence[Change], made: _Made) -> dict[str, int | float | str | bool]:
    """How many layers have how many bits, and the signal to noise at the worst output if it was measured."""
    counts = Counter(f"layers_int{change.details['bits']}" if change.done else "layers_float" for change in changes)
    found: dict[str, int | float | str | bool] = {"layers_float": 0, **dict(sorted(counts.items()))}
    if made.levels:
        found["output_sqnr_db"] = round(min(_BEST, *made.levels.values()), 1)
    return found


def _notes(method: Method) -> tuple[str, ...]:
    group = method.group_size
    if group in (0, *FUSED_GROUPS):
        return ()
    sizes = ", ".join(map(str, FUSED_GROUPS))
    return (f"ONNX Runtime computes on groups of {sizes}; groups of {group} become float weights on every run",)
