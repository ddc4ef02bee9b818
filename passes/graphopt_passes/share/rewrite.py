"""Share the weights of a model: the steps from a model to the one that takes its place."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnx_ir as ir

from graphopt.analyses import LINEAR_LAYERS, LayerMoments, MomentsAnalysis
from graphopt.analyses.names import Names
from graphopt.model_io import EMBED_LIMIT, weight_bytes
from graphopt.opset import opset_version, raise_opset
from graphopt.pass_base import Change, Context, PassResult
from graphopt_passes._own_constants import own_constant
from graphopt_passes.quant.adjust._bias import mean_shift
from graphopt_passes.quant.adjust.bias import why_no_bias
from graphopt_passes.quant.adjust.layout import layout_of as rows_of
from graphopt_passes.quant.blockwise.layout import layout_of
from graphopt_passes.quant.builder import Builder
from graphopt_passes.quant.prepare import drop_unread, grown_file, lift_opset
from graphopt_passes.quant.sites import Site, bias_place, graph_of, keyed_nodes, tensor_of
from graphopt_passes.share.cut import Cut, cut_of
from graphopt_passes.share.fit import Method, Shared, fits, share_weight
from graphopt_passes.share.judge import Judge
from graphopt_passes.share.store import UINT4_SINCE, CodeStore, code_bits, needed_opset, stored_bytes
from graphopt_passes.share.tensors import WeightTensor, choose, find_tensors

__all__ = ["Plan", "share_weights"]

Array = np.ndarray[Any, np.dtype[Any]]
Details = dict[str, int | float | str | bool]

_LEAST_MEMBERS = 2
_JUDGED_SAMPLES, _JUDGED_TOGETHER, _MOST_JUDGED = 32, 8, 512 << 20  # the last is bytes of weights
_BEST = 999.0  # dB
_NOTE = (
    "{stored:.1f} kB in the file stand for {resident:.1f} kB of weights; ONNX Runtime computes the lookups when it "
    "loads the model, so that there memory and speed are those of float weights"
)
_IN_PLACE = "weights stay weights, of few values each; the compiler of the target codes them by how often each occurs"


@dataclass(frozen=True)
class Plan:
    """What is asked for.

    Attributes:
        method: How codebooks are found.
        channels: Output channels that share one; 0: all.
        width: Weights that a code stands for.
        only: Patterns of the layers to take, all if empty.
        skip: Patterns of layers to leave alone.
        bias_correction: Take changed means out of biases.
        in_place: Weights stay weights, of few values: the target's own compiler codes them.
    """

    method: Method
    channels: int = 0
    width: int = 1
    only: Sequence[str] = ()
    skip: Sequence[str] = ()
    bias_correction: bool = True
    in_place: bool = False


@dataclass(frozen=True, eq=False)
class _Bench:
    """A copy of the model that is being rewritten.

    Attributes:
        plan: What is asked for.
        context: Facts about the model before; its `model` stays as it is.
        builder: Edits the copy.
        store: Puts codebooks into it.
        nodes: Nodes of the copy by site.
        labels: What facts call each site.
        judge: Tells which of two codebooks is better; None: it would take too long, or there is no data.
    """

    plan: Plan
    context: Context
    builder: Builder
    store: CodeStore
    nodes: Mapping[str, ir.Node]
    labels: Mapping[str, str]
    judge: Judge | None = None

    @property
    def opset(self) -> int:
        """Of the copy."""
        return opset_version(self.builder.model)

    def label(self, site: Site) -> str:
        """What facts call the layer of a site, as far as they tell of this weight."""
        recurrent_state = site.weights[0].index > 1  # the second weight of such a layer reads its own state
        return "" if recurrent_state else self.labels[site.key]

    def cut(self, tensor: WeightTensor) -> Cut:
        """Which weights of a tensor share a codebook."""
        weight = tensor.weight
        return cut_of(weight.shape, weight.axis, self.plan.channels, self.plan.width)


def share_weights(model: ir.Model, ctx: Context, plan: Plan) -> PassResult:
    """Give the weights of a model codebooks, in place; a model where nothing can be done is left as it was.

    Weights are read and fitted one at a time; data is run for as many layers together as their moments fit 512 MB.

    Raises:
        OptionError: A pattern of the plan matches no layer.
    """
    found, skipped = find_tensors(model)
    chosen, left = choose(found, plan.only, plan.skip)
    if not chosen:
        return PassResult(False, (*skipped, *left))
    work = model.clone()
    refusal = "" if plan.in_place else _lift(work, plan, ctx)
    bench = _bench(work, replace(ctx, model=work.clone(), _facts={}), plan)
    found, skipped = find_tensors(work)
    chosen, left = choose(found, plan.only, plan.skip)
    changes = [*skipped, *left]
    for tensor in chosen:
        tensor.kept = refusal or _why_not(bench, tensor)
        changes += [Change.skipped(site.name, tensor.kept) for site in tensor.sites if tensor.kept]
    figures, taken = _Figures(), [tensor for tensor in chosen if not tensor.kept]
    bench = replace(bench, judge=_judge(bench, taken))
    for part in _portions(bench, taken):
        for tensor in ctx.progress(part.tensors, "sharing weights"):
            changes += _share(bench, tensor, part.moments, figures)
    if not figures.weights:
        return PassResult(False, tuple(changes))
    drop_unread(work)
    grown = "" if plan.in_place else grown_file(model, work)
    if grown:
        return PassResult(False, tuple(Change.skipped(c.site, grown) if c.done else c for c in changes))
    model.graph, model.ir_version = work.graph, work.ir_version
    note = _IN_PLACE if plan.in_place else figures.note()
    return PassResult(True, tuple(changes), metrics=figures.metrics(), notes=(note,))


@dataclass
class _Figures:
    """Sums over all tensors: weights, their bytes as floats, which a runtime holds, and as codes and codebooks."""

    tensors: int = 0
    weights: int = 0
    resident: int = 0
    stored: int = 0

    def metrics(self) -> Details:
        """For the report."""
        return {
            "tensors_shared": self.tensors,
            "weights_shared": self.weights,
            "stored_bytes": self.stored,
            "resident_bytes_onnxruntime": self.resident,
        }

    def note(self) -> str:
        """For people."""
        return _NOTE.format(stored=self.stored / 1e3, resident=self.resident / 1e3)


def _bench(work: ir.Model, inner: Context, plan: Plan) -> _Bench:
    builder, nodes, names = Builder(work), keyed_nodes(work), Names(work)
    labels = {key: names.label(node) for key, node in nodes.items()}
    return _Bench(plan, inner, builder, CodeStore(builder), nodes, labels)


def _lift(work: ir.Model, plan: Plan, ctx: Context) -> str:
    """Raise the opset as far as codes want it, or else as they need it; returns why not even that could be done."""
    grouped, int8 = plan.channels > 0, plan.method.int8
    wanted = needed_opset(plan.method.entries, grouped=grouped, int8=int8)
    least = needed_opset(256, grouped=grouped, int8=int8)
    reason = ""
    for version in dict.fromkeys((wanted, min(wanted, UINT4_SINCE), least)):
        reason = _lifted(work, version, ctx)
        if not reason:
            break
        ctx.log.warning("share: %s", reason)
    return reason


def _lifted(work: ir.Model, version: int, ctx: Context) -> str:
    """Raise the opset; a model too large to run beside itself is not compared before and after."""
    if weight_bytes(work) <= EMBED_LIMIT or ctx.keep_opset or opset_version(work) >= version:
        return lift_opset(work, version, ctx)
    raise_opset(work, version)
    ctx.log.info("the opset was raised to %d; the model is too large to compare before and after", version)
    return ""


def _why_not(bench: _Bench, tensor: WeightTensor) -> str:
    """Why a tensor is not worth codebooks, or cannot have them; empty if it is and can."""
    plan, size = bench.plan, tensor.weight.size
    if size % plan.width:
        return f"{size} weights are no whole number of vectors of {plan.width}"
    cut, entries = bench.cut(tensor), plan.method.entries
    if cut.codes // cut.groups < _LEAST_MEMBERS * entries:
        return (
            f"{cut.codes // cut.groups} codes would share a codebook of {entries} entries, which takes as much itself"
        )
    if (
        stored_bytes(cut, entries, bench.opset, item=tensor.tensor.dtype.itemsize, int8=plan.method.int8)
        >= tensor.tensor.nbytes
    ):
        return f"{size} weights, so few that a codebook would cost more than it saves"
    finite = _is_finite(tensor.tensor)
    _release(tensor)
    return "" if finite else "its weight holds infinities"


def _is_finite(tensor: ir.TensorProtocol) -> bool:
    array = tensor.numpy()
    return bool(np.isfinite(array.min()) and np.isfinite(array.max()))  # one pass each, and no copy


def _release(tensor: WeightTensor) -> None:
    """Let go of what was read from disk; no array of it may be left."""
    stored = tensor.tensor
    if isinstance(stored, ir.ExternalTensor):
        stored.release()


def _judge(bench: _Bench, tensors: Sequence[WeightTensor]) -> Judge | None:
    """Where data leaves a choice that a few runs of the model can make; each tensor takes some."""
    ctx, by_data = bench.context, bench.plan.method.algorithm not in ("nearest", "relative")
    if ctx.calibration is None or not by_data or weight_bytes(ctx.model) > _MOST_JUDGED:
        return None
    open_ = [tensor for tensor in tensors if bench.cut(tensor).groups < tensor.weight.shape[tensor.weight.axis]]
    feeds = ctx.calibration.batches(_JUDGED_TOGETHER, _JUDGED_SAMPLES)
    return Judge(ctx.model, open_, ctx, list(feeds)) if open_ else None


@dataclass(frozen=True, eq=False)
class _Portion:
    """Tensors with the moments of what layers read, by label."""

    tensors: Sequence[WeightTensor]
    moments: Mapping[str, LayerMoments]


def _portions(bench: _Bench, tensors: Sequence[WeightTensor]) -> Iterator[_Portion]:
    """Measure moments for some layers at a time; tensors without any come last, all together.

    A tensor comes with the first layer of its own that data reaches.
    """
    rest, ctx = list(tensors), bench.context
    if ctx.calibration is not None and bench.plan.method.algorithm not in ("nearest", "relative") and rest:
        reads = ctx.fact(LINEAR_LAYERS).reads
        firsts = {label: tensor for tensor in reversed(rest) if (label := _first_label(bench, tensor, reads))}
        names = tuple(name for name in reads if name in firsts)
        for part in MomentsAnalysis(layers=names, heeded=True).portions(ctx) if names else ():
            moments = dict(part.compute(ctx.model, ctx).layers)
            chosen = [firsts[name] for name in moments]
            rest = [tensor for tensor in rest if tensor not in chosen]
            yield _Portion(chosen, moments)
    yield _Portion(rest, {})


def _first_label(bench: _Bench, tensor: WeightTensor, reads: Mapping[str, object]) -> str:
    labels = (bench.label(site) for site in tensor.sites)
    return next((label for label in labels if label in reads), "")


def _share(bench: _Bench, tensor: WeightTensor, moments: Mapping[str, LayerMoments], figures: _Figures) -> list[Change]:
    """Replace one weight, and say so for each layer that reads it."""
    sites = sorted(tensor.sites, key=lambda site: bench.label(site) not in moments)
    first, cut, method = sites[0], bench.cut(tensor), bench.plan.method
    if tensor.tensor.dtype != ir.DataType.FLOAT:
        method = replace(method, int8=False)  # half the bytes already
    shared, shifts = _fitted(bench, tensor, first, method, moments)
    stored = _counted(bench, tensor, cut, method, figures)
    _release(tensor)
    if bench.plan.in_place:
        bench.store.put_values(tensor.value, shared, cut)
    else:
        bench.store.put(tensor.value, shared, cut, int8=method.int8)
    for site, shift in shifts.items():
        _shift_bias(bench.nodes[site.key], shift)
    changes: list[Change] = []
    for site in sites:
        where = "" if site is first else f", shared with {first.name!r}"
        action = f"weights in codebooks of {method.entries} ({shared.how}){where}"
        action += ", bias corrected" if site in shifts else ""
        changes.append(Change(site.name, action, details=_details(bench, cut, shared, stored, site is first)))
    return changes


def _fitted(
    bench: _Bench, tensor: WeightTensor, first: Site, method: Method, moments: Mapping[str, LayerMoments]
) -> tuple[Shared, dict[Site, Array]]:
    """Codebooks for one weight as the first layer reads it, and what biases of layers take up."""
    cut, layout = bench.cut(tensor), layout_of(first, first.weights[0], bench.nodes[first.key])
    array, one = np.asarray(tensor.tensor.numpy()), moments.get(bench.label(first))
    weight, judge = array.astype(np.float32, copy=False), bench.judge
    shared = share_weight(weight, cut, layout, method, one)
    if judge is not None and judge.knows(tensor) and fits(one, layout):
        both = shared, share_weight(weight, cut, layout, replace(method, scaled=True), one)
        shared = both[judge.settle(tensor, [each.real(cut).astype(array.dtype) for each in both])]
    if not bench.plan.bias_correction:
        return shared, {}
    return shared, _bias_shifts(bench, tensor, array, shared.real(cut), moments)


def _details(bench: _Bench, cut: Cut, shared: Shared, stored: int, counts: bool) -> Details:
    entries = len(shared.tables) if cut.width > 1 else shared.tables.shape[1]
    found: Details = {"entries": entries, "code_bits": code_bits(entries, bench.opset), "codebooks": cut.groups}
    if cut.width > 1:
        found["weights_per_code"] = cut.width
    if counts:
        found |= {"weights": cut.size, "stored_bytes": stored}
    found["weight_sqnr_db"] = round(min(_BEST, shared.weight_sqnr), 1)
    if shared.layer_sqnr is not None:
        found["layer_sqnr_db"] = round(min(_BEST, shared.layer_sqnr), 1)
    return found


def _counted(bench: _Bench, tensor: WeightTensor, cut: Cut, method: Method, figures: _Figures) -> int:
    item = tensor.tensor.dtype.itemsize
    stored = stored_bytes(cut, method.entries, bench.opset, item=item, int8=method.int8)
    figures.tensors += 1
    figures.weights += cut.size
    figures.resident += tensor.tensor.nbytes
    figures.stored += stored
    return stored


def _bias_shifts(
    bench: _Bench, tensor: WeightTensor, before: Array, after: Array, moments: Mapping[str, LayerMoments]
) -> dict[Site, Array]:
    """What to add to the bias of each layer that has one, so that the mean of its result stays where it was."""
    found: dict[Site, Array] = {}
    for site in tensor.sites:
        node, one = bench.nodes[site.key], moments.get(bench.label(site))
        rows = rows_of(node, before.shape)
        if one is None or rows is None or site.operator == "ConvTranspose" or not _has_bias(node):
            continue
        layout = layout_of(site, site.weights[0], node)
        if why_no_bias(node, site) or not fits(one, layout) or site.weights[0].index != 1:
            continue
        split = rows.split(before)
        mean = one.mean.reshape(len(split), split.shape[2], -1)
        shift = mean_shift(split, rows.split(after), mean, np.zeros(mean.shape[:2]))
        if np.isfinite(shift).all() and shift.any():
            found[site] = shift
    return found


def _shift_bias(node: ir.Node, shift: Array) -> None:
    """Add to the bias of a layer, which keeps its name if nothing else reads it."""
    holder, index = bias_place(node) or (node, 2)
    tensor = tensor_of(holder.inputs[index])
    if tensor is None:
        raise TypeError(f"the bias of {node.name!r} is not constant")
    bias = tensor.numpy() + shift.reshape(tensor.shape.numpy())
    own_constant(graph_of(holder), holder, index, bias.astype(np.float32))


def _has_bias(node: ir.Node) -> bool:
    return bias_place(node) is not None or (
        node.op_type != "MatMul" and len(node.inputs) > 2 and node.inputs[2] is not None
    )
