"""What 8 bits cost, measured in ONNX Runtime on calibration data: layer by layer, and at the outputs.

Each layer is judged alone: a copy of the float model computes every layer twice, once as it is and once with input
and weights rounded, and returns two sums of squares for each. No activation leaves the runtime.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence

import numpy as np
import onnx_ir as ir

from graphopt.analyses import Ranges
from graphopt.analyses.lifting import lift
from graphopt.pass_base import Context
from graphopt.reference import Feed, Reference
from graphopt_passes.quant._maths import Grid, decibel
from graphopt_passes.quant.builder import Builder
from graphopt_passes.quant.plan import Plan, result_of
from graphopt_passes.quant.sites import Site, graph_of, key_of, keyed_nodes
from graphopt_passes.quant.static import integer_inputs

__all__ = ["layer_quality", "output_quality", "powers", "sample_feeds"]

_BEST = 80.0  # dB; what is better is as good as equal


def sample_feeds(ctx: Context, count: int) -> list[Feed]:
    """Take `count` calibration feeds, spread evenly."""
    if ctx.calibration is None:
        return []
    total = sum(1 for _ in ctx.calibration.feeds())
    wanted = set(np.linspace(0, total - 1, min(count, total)).astype(int).tolist())
    return [feed for i, feed in enumerate(ctx.calibration.feeds()) if i in wanted]


def layer_quality(
    model: ir.Model,
    plan: Plan,
    grids: Mapping[str, Grid],
    sites: Collection[Site],
    ranges: Ranges,
    feeds: Sequence[Feed],
    ctx: Context,
    *,
    bits: int,
    per_channel: bool,
    power_of_two: bool = False,
    products: Collection[str] = (),
) -> dict[str, float]:
    """Signal to noise in dB of every linear layer computed on integers while all others stay float, by key.

    The mean over feeds of decibels, so that quiet samples count like loud ones. `products` are keys of products of two
    activations, judged in the same way.
    """
    wanted: dict[str, Site | None] = {**dict.fromkeys(products), **{site.key: site for site in sites}}
    if not wanted:
        return {}
    shadowed, probes = _shadow(
        model, plan, grids, wanted, bits=bits, per_channel=per_channel, power_of_two=power_of_two
    )
    session = Reference(shadowed, threads=ctx.threads, extensions=ctx.extensions)
    found: dict[str, list[float]] = {key: [] for key in probes}
    outputs = [name for pair in probes.values() for name in pair]
    for feed in ctx.progress(feeds, "judging layers"):
        sums = session.run(feed, outputs)
        for key, (signal, noise) in probes.items():
            power = float(sums[signal].sum())  # one number, in a loop one for each turn, none in a branch not taken
            if power > 0 and math.isfinite(power):
                found[key].append(min(_BEST, decibel(power, float(sums[noise].sum()))))
    by_key = keyed_nodes(model)
    quality: dict[str, float] = {}
    for key, levels in found.items():
        level = float(np.mean(levels)) if levels else _BEST
        result = result_of(by_key[key]).name or ""
        if result in plan.results:  # the rounding of the result adds its noise
            histogram, (low, high) = ranges.histograms[plan.grid_of(result)], grids[plan.grid_of(result)].bounds
            level = _add(level, min(_BEST, decibel(histogram.power(), histogram.noise(low, high))))
        quality[key] = level
    return quality


def _shadow(
    model: ir.Model,
    plan: Plan,
    grids: Mapping[str, Grid],
    wanted: Mapping[str, Site | None],
    *,
    bits: int,
    per_channel: bool,
    power_of_two: bool = False,
) -> tuple[ir.Model, dict[str, tuple[str, str]]]:
    """Build the copy; returns it and the names of (signal, noise) by key."""
    copy = model.clone()
    builder = Builder(copy, bits, power_of_two=power_of_two)
    probes: dict[str, tuple[ir.Value, ir.Value]] = {}
    copy.graph.outputs.clear()
    for node in list(copy.graph.all_nodes()):
        key = key_of(node)
        if key not in wanted:
            continue
        graph, site = graph_of(node), wanted[key]
        output = ir.Value(name=builder.name(f"{key}_shadow"), type=ir.TensorType(ir.DataType.FLOAT))
        shadow = ir.node(node.op_type, list(node.inputs), dict(node.attributes), outputs=[output])
        shadow.name = output.name
        graph.insert_after(node, shadow)
        if site is not None:
            integer_inputs(builder, plan, grids, site, shadow, per_channel=per_channel)
        for index in plan.inputs[key]:
            value = node.inputs[index]
            if value is not None:
                shadow.replace_input_with(index, builder.pair(value, grids[plan.grid_of(value.name or "")], graph))
        error = builder.node("Sub", [node.outputs[0], output], f"{key}_error")
        sums = [
            builder.node("ReduceSumSquare", [value], f"{key}_{word}", {"keepdims": 0})
            for value, word in ((node.outputs[0], "signal"), (error.outputs[0], "noise"))
        ]
        graph.insert_after(shadow, [error, *sums])
        probes[key] = (sums[0].outputs[0], sums[1].outputs[0])
    seen = lift(copy, [value for pair in probes.values() for value in pair])
    copy.graph.outputs.extend(seen)
    names = iter([value.name or "" for value in seen])
    return copy, {key: (next(names), next(names)) for key in probes}


def output_quality(original: Reference, result: Reference, feeds: Sequence[Feed], ctx: Context) -> dict[str, float]:
    """Signal to noise in dB of every float output, the mean over feeds."""
    levels: dict[str, list[float]] = {}
    for feed in ctx.progress(feeds, "comparing outputs"):
        expected, got = original.run(feed), result.run(feed)
        for name, reference in expected.items():
            if not np.issubdtype(reference.dtype, np.floating) or not reference.size:
                continue
            levels.setdefault(name, []).append(_level(reference, got[name]))
    return {name: float(np.mean(found)) for name, found in levels.items()}


def _level(reference: np.ndarray, got: np.ndarray) -> float:
    signal, noise = powers(reference, got)
    return max(-_BEST, min(_BEST, decibel(signal, noise)))


def powers(reference: np.ndarray, got: np.ndarray) -> tuple[float, float]:
    """Sum of squares of an output where it is finite, and of what it is off there, infinite if that is not finite."""
    finite = np.isfinite(reference)
    if not finite.all():
        reference, got = reference[finite], got[finite]
    signal = np.square(reference, dtype=np.float64).sum()
    noise = np.square(got - reference, dtype=np.float64).sum()
    return float(signal), float(noise) if np.isfinite(noise) else math.inf


def _add(first: float, second: float) -> float:
    """Decibels of two independent noises together."""
    return -10 * math.log10(10 ** (-first / 10) + 10 ** (-second / 10))
