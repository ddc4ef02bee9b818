"""Float, 8 bits or 4 bits for every layer, by measurement, within a budget."""

from __future__ import annotations

import glob
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import onnx_ir as ir

from graphopt.pass_base import Change
from graphopt.reference import Reference
from graphopt_passes.quant._maths import decibel
from graphopt_passes.quant.audit import output_quality
from graphopt_passes.quant.blockwise import Method, quantize_blocks
from graphopt_passes.quant.decide import Decision, Workbench, assemble
from graphopt_passes.quant.guards import floors_of, guard_outputs
from graphopt_passes.quant.mixed.budget import INTEGERS, STORED, Choice, within_noise, within_size
from graphopt_passes.quant.mixed.forms import eight_bits, float_bytes, in_blocks, switchboard
from graphopt_passes.quant.mixed.table import Option, Setting, Table, measure, units_of
from graphopt_passes.quant.sites import Site, find_sites, keyed_nodes

__all__ = ["Aim", "Mixed", "mix"]

Figures = dict[str, int | float | str | bool]
_WIDER = (2, 4)  # groups of these multiples are offered besides: fewer scales pay for 8 bits elsewhere
_WIDEST = 256
_ROUNDS = 4
_LOOSE = 12.0  # dB: 8-bit layers that spoil the outputs by themselves take a weaker form before anything is chosen
_CLOSE = 0.3  # dB above the limit that are not worth another model


@dataclass(frozen=True)
class Aim:
    """What the user asks for.

    Attributes:
        size: Bytes of the weights, as a fraction of those in float; None: as small as `sqnr` allows.
        sqnr: Least signal to noise of every output in dB.
        method: How weights are stored in 4 bits.
        few: Weights may be stored in 4 bits at all; empty, or why not.
    """

    size: float | None
    sqnr: float
    method: Method
    few: str = ""


@dataclass(frozen=True)
class Mixed:
    """The model with a form for every layer."""

    model: ir.Model
    changes: tuple[Change, ...]
    metrics: Figures
    notes: tuple[str, ...]


def mix(bench: Workbench, decisions: Sequence[Decision], aim: Aim) -> Mixed:
    """Measure all forms of all layers, choose within the budget, build, and check the whole.

    Args:
        bench: The model.
        decisions: The 8-bit form of each site.
        aim: What is asked for.
    """
    loose = replace(bench.settings, min_output_sqnr=min(aim.sqnr, _LOOSE))
    decisions = guard_outputs(replace(bench, settings=loose), decisions)[2]
    by_key = {decision.site.key: decision for decision in decisions}
    units = units_of([decision.site for decision in decisions], bench.model)
    forms = [(unit, _forms(bench, unit, by_key, aim)) for unit in units]
    table = measure(bench.model, forms, bench.feeds, bench.context, switchboard(bench, decisions))
    whole = float_bytes(units)
    wanted = None if aim.size is None else (1 - aim.size) * whole
    choice = within_noise(table, 10 ** (-aim.sqnr / 10)) if wanted is None else within_size(table, wanted)
    best = _build(bench, decisions, table, choice, aim)
    if wanted is None or best.margin < 0:
        best = _by_noise(bench, decisions, table, best, aim)
    size = (whole - best.choice.saved) / max(1, whole)
    missed = aim.size is not None and size > aim.size
    notes = (_why_missed(aim, best, size),) if missed else ()
    return Mixed(best.model, best.changes, _metrics(table, best, size), notes)


def _why_missed(aim: Aim, built: _Built, size: float) -> str:
    text = f"size {aim.size:g} is out of reach, it is {size:.3g}"
    if built.choice.reached:
        return f"{text}: smaller, the outputs would fall below min_output_sqnr={aim.sqnr:g}"
    return f"{text}: {aim.few}" if aim.few else text


@dataclass(frozen=True)
class _Built:
    """A model made of a choice.

    Attributes:
        choice: The options.
        model: The model.
        changes: What happened at each site.
        margin: By how many dB the outputs are better than they must be; infinite where nothing was measured.
        sqnr: Signal to noise in dB at the worst output.
    """

    choice: Choice
    model: ir.Model
    changes: tuple[Change, ...]
    margin: float
    sqnr: float


def _forms(bench: Workbench, unit: Sequence[Site], decisions: Mapping[str, Decision], aim: Aim) -> tuple[Setting, ...]:
    """What a unit may become besides float, in the order in which it is measured."""
    if any(decisions[site.key].kind == "float" for site in unit):
        return ()
    settings, nodes = bench.settings, keyed_nodes(bench.model)
    eight = eight_bits(unit, decisions, settings, INTEGERS)
    found = [eight] if eight.saved > 0 else []
    base = None if aim.few else in_blocks(unit, nodes, aim.method)
    stored: list[Setting] = []
    if eight.saved > 0 and eight.rounded and settings.weight_only:
        weights = {site.key: _weights_only(decisions[site.key]) for site in unit}
        stored.append(eight_bits(unit, weights, settings, STORED, base.label if base is not None else ""))
    if base is None:
        return (*found, *stored)
    group, inputs = aim.method.group_size, min(min(w.shape) for site in unit for w in site.weights)
    wider = [group * times for times in _WIDER if 0 < group * times <= min(_WIDEST, inputs)]
    more = [in_blocks(unit, nodes, replace(aim.method, group_size=size), like=base.label) for size in wider]
    return (*found, base, *stored, *(setting for setting in more if setting is not None))


def _weights_only(decision: Decision) -> Decision:
    return replace(decision, kind="weight", why="activations in 8 bits would take more noise than is left")


def _by_noise(bench: Workbench, decisions: Sequence[Decision], table: Table, first: _Built, aim: Aim) -> _Built:
    """The smallest model whose outputs keep the limit.

    Noises of layers do not quite add up, so what their sum may be is corrected by what the outputs lose, a few times.
    """
    best, current = first, first
    for _ in range(_ROUNDS):
        if current is best and 0 <= best.margin <= _CLOSE:
            break
        limit = max(current.choice.cost, 1e-12) * 10 ** (current.margin / 10)
        choice = within_noise(table, limit)
        if choice.options == current.choice.options or choice.options == best.choice.options:
            break
        current = _build(bench, decisions, table, choice, aim)
        keeps, kept = current.margin >= 0, best.margin >= 0
        if (keeps and (not kept or choice.saved > best.choice.saved)) or (not keeps and not kept):
            best = current
    return best


def _build(bench: Workbench, decisions: Sequence[Decision], table: Table, choice: Choice, aim: Aim) -> _Built:
    """Make the model: 8 bits as everywhere, then blocks, one group size after the other."""
    chosen = {
        site.key: option for unit, option in zip(table.units, choice.options, strict=True) for site in unit.sites
    }  # fmt: skip
    model, made = assemble(bench, [_decided(d, chosen.get(d.site.key)) for d in decisions])
    by_site = {change.site: change for change in made}
    for group in sorted({_group(option) for option in chosen.values() if option is not None} - {-1}):
        sites = [d.site for d in decisions if _group(chosen.get(d.site.key)) == group]
        by_site |= _store_blocks(bench, model, sites, replace(aim.method, group_size=group))
    rows = {site.key: unit.options for unit in table.units for site in unit.sites}
    names = {d.site.name: _figures(rows.get(d.site.key, ())) for d in decisions}
    kept = {d.site.name: d for d in decisions if chosen.get(d.site.key) is None and d.kind != "float"}
    changes = tuple(_told(change, names.get(change.site), change.site in kept) for change in by_site.values())
    quality, floors = _quality(bench, model), floors_of(bench)
    margin = min((level - floors[name] for name, level in quality.items()), default=math.inf)
    return _Built(choice, model, changes, margin, min(quality.values(), default=math.inf))


def _store_blocks(bench: Workbench, model: ir.Model, sites: Sequence[Site], method: Method) -> dict[str, Change]:
    """Store some sites in blocks, in place; returns what happened to each, by name."""
    keys = {site.key for site in sites}
    others = {site.key: 0 for site in find_sites(model)[0] if site.key not in keys}
    context = replace(bench.context, model=model, _facts={})
    only = [glob.escape(site.name) for site in sites]
    result = quantize_blocks(model, context, method, only=only, bits=others)
    names = {site.name for site in sites}
    return {change.site: change for change in result.changes if change.site in names}


def _decided(decision: Decision, option: Option | None) -> Decision:
    """What the 8-bit code is to do with a site."""
    if option is None or option.label not in (INTEGERS, STORED):
        return replace(decision, kind="float")
    return decision if option.label == INTEGERS else _weights_only(decision)


def _group(option: Option | None) -> int:
    """Group size of an option in blocks; -1 for all others."""
    return -1 if option is None or "_g" not in option.label else int(option.label.rpartition("_g")[2])


def _figures(options: Sequence[Option]) -> Figures:
    return {name: level for option in options for name, level in option.figures()}


def _told(change: Change, figures: Figures | None, kept: bool) -> Change:
    """A change with the site's row of the table."""
    if not figures:
        return change
    if kept:
        return Change(change.site, "skipped: float is worth its bytes here", done=False, details=figures)
    return replace(change, details={**change.details, **figures})


def _quality(bench: Workbench, model: ir.Model) -> dict[str, float]:
    """Signal to noise in dB of the outputs; empty where there is nothing to measure on."""
    if not bench.feeds:
        return {}
    ctx = bench.context
    before, after = (Reference(m, threads=ctx.threads, extensions=ctx.extensions) for m in (bench.model, model))
    return output_quality(before, after, bench.feeds, ctx)


def _metrics(table: Table, built: _Built, size: float) -> Figures:
    labels = Counter("float" if option is None else option.label.partition("_")[0] for option in built.choice.options)
    found: Figures = {f"layers_{label}": labels[label] for label in ("int8", "int4", "float")}
    found["size"] = round(size, 4)
    found["judged_by"] = "outputs" if table.by_outputs else "layers"
    if table.by_outputs:
        found["predicted_sqnr_db"] = round(min(999.0, decibel(1.0, built.choice.cost)), 1)
    if built.sqnr < math.inf:
        found["output_sqnr_db"] = round(built.sqnr, 1)
    return found
