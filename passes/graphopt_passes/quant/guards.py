"""Measure what the chosen forms cost, on each layer and at the outputs, and take back what costs too much."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property

import onnx_ir as ir

from graphopt.analyses import COST
from graphopt.analyses.ranges import Method
from graphopt.model_io import weight_bytes
from graphopt.pass_base import Change
from graphopt.reference import Feed, Reference
from graphopt_passes.quant.audit import layer_quality, output_quality
from graphopt_passes.quant.decide import Decision, Workbench, assemble, fall_back
from graphopt_passes.quant.layer_noise import LayerNoise, Weights
from graphopt_passes.quant.plan import Plan
from graphopt_passes.quant.sites import Site, key_of, keyed_nodes

__all__ = ["fit_ranges", "floors_of", "guard_layers", "guard_outputs", "makes_scores", "step_noisiest"]

_METHODS: tuple[Method, ...] = ("minmax", "mse", "percentile", "entropy")
_WORTH = 0.1  # dB that another way must gain
_ROUNDS = 4
_COMFORT = 14.0  # dB above the limit, where single layers need no care any more
_OUTLIER = 0.2  # share of all noise that one layer may make below that,
_EVEN = 3.0  # or so many times the share of each if all made as much
_SCORES = 8.0  # dB that class scores may be noisier than other outputs
_LARGE = 1 << 30  # bytes of weights above which only a missed limit is worth the many runs
_CARRIERS = frozenset({"Cast", "Flatten", "Identity", "Reshape", "Squeeze"})
_NOISE_FEEDS = 4
_NOISE_RUNS = 64  # of the model to find out which layers are to blame,
_NOISE_MACS = 20_000_000_000  # or as many as take a second


def fit_ranges(bench: Workbench, decisions: Sequence[Decision]) -> Workbench:
    """With `calibrator=auto`, cut the range of each value in the way that leaves its readers the least noise.

    All layers that read it are judged, each alone, with the range cut in each way; the mean of their decibels decides,
    and a value that only other operators read keeps its least and greatest element.
    """
    static, settings = [d.site for d in decisions if d.kind == "static"], bench.settings
    if settings.calibrator != "auto" or not static or bench.ranges is None:
        return bench
    best: dict[str, tuple[float, Method]] = {}
    for method in _METHODS:
        trial = replace(bench, settings=replace(settings, calibrator=method))
        plan, grids = trial.plan(decisions)
        alone = replace(plan, results=set())  # the rounding of results is another value's affair
        quality = layer_quality(
            bench.model, alone, grids, static, bench.ranges, bench.feeds, bench.context,
            bits=settings.bits, per_channel=settings.per_channel, power_of_two=settings.rules.power_of_two,
        )  # fmt: skip
        for name, level in _levels_of_inputs(bench.model, plan, quality).items():
            if name not in best or level > best[name][0] + _WORTH:
                best[name] = level, method
    return replace(bench, methods={name: method for name, (_, method) in best.items()})


def _levels_of_inputs(model: ir.Model, plan: Plan, quality: Mapping[str, float]) -> dict[str, float]:
    """Mean decibels of the layers that read a value, by the value whose grid it has."""
    found: dict[str, list[float]] = {}
    for node in model.graph.all_nodes():
        key = key_of(node)
        if key in quality:
            for index in plan.inputs[key]:
                value = node.inputs[index]
                found.setdefault(plan.grid_of(value.name or "" if value is not None else ""), []).append(quality[key])
    return {name: sum(levels) / len(levels) for name, levels in found.items()}


def guard_layers(bench: Workbench, decisions: Sequence[Decision]) -> list[Decision]:
    """Take layers off static integers whose own result would be too noisy."""
    static, settings = [d.site for d in decisions if d.kind == "static"], bench.settings
    if not static or bench.ranges is None:
        return list(decisions)
    plan, grids = bench.plan(decisions)
    quality = layer_quality(
        bench.model, plan, grids, static, bench.ranges, bench.feeds, bench.context,
        bits=settings.bits, per_channel=settings.per_channel, power_of_two=settings.rules.power_of_two,
    )  # fmt: skip
    judged, nodes = list[Decision](), keyed_nodes(bench.model)
    for decision in decisions:
        level = quality.get(decision.site.key)
        if level is None:
            judged.append(decision)
        elif level < settings.min_sqnr:
            why = f"8-bit activations would leave {level:.1f} dB of signal to noise"
            judged.append(fall_back(decision, nodes[decision.site.key], settings, why, level))
        else:
            judged.append(replace(decision, sqnr=level))
    return judged


def guard_outputs(
    bench: Workbench, decisions: Sequence[Decision]
) -> tuple[ir.Model, list[Change], list[Decision], dict[str, float]]:
    """Build the model; where an output is too noisy, step back with the layers that make most of the noise.

    A few layers that make nearly all of it step back as well where the outputs are good enough but not very good:
    that costs little and gains much.

    Returns:
        The model, what happened at each site, the decisions, and the signal to noise of each output in dB.
    """
    current, round_ = _stored_once(decisions), 0
    shares, floors = _Shares(bench, current), floors_of(bench)
    comfort = _COMFORT if weight_bytes(bench.model) <= _LARGE else 0.0
    original = Reference(bench.model, threads=bench.context.threads, extensions=bench.context.extensions)
    while True:
        model, changes = assemble(bench, current)
        result = Reference(model, threads=bench.context.threads, extensions=bench.context.extensions)
        quality = output_quality(original, result, bench.feeds, bench.context)
        margin = min((level - floors[name] for name, level in quality.items()), default=comfort)
        if margin < 0 and bench.allowed_products:
            why = "with it and others in int8 an output would be too noisy"
            bench = replace(bench, products={key: old or why for key, old in bench.products.items()})
            continue
        if margin >= comfort or all(d.kind == "float" for d in current):
            return model, changes, current, quality
        stepped = _step_back(bench, current, round_, margin, shares)
        if stepped == current:
            return model, changes, current, quality
        bench.context.log.info("quant: %.1f dB at an output, stepping back", min(quality.values()))
        current, round_ = stepped, round_ + 1


def floors_of(bench: Workbench) -> dict[str, float]:
    """Least signal to noise of each output in dB; of class scores only the greatest matters."""
    floors: dict[str, float] = {}
    for output in bench.model.graph.outputs:
        floors[output.name or ""] = bench.settings.min_output_sqnr - (_SCORES if makes_scores(output) else 0.0)
    return floors


def makes_scores(output: ir.Value) -> bool:
    """Whether an output holds the scores of classes."""
    value: ir.Value | None = output
    while value is not None and (node := value.producer()) is not None and node.op_type in _CARRIERS:
        value = node.inputs[0]
    maker = value.producer() if value is not None else None
    return maker is not None and maker.op_type in ("LogSoftmax", "Softmax")


class _Shares:
    """Noise over signal at the worst output that each site makes alone.

    Args:
        bench: The model.
        decisions: The strongest form that each site can take from now on.
    """

    def __init__(self, bench: Workbench, decisions: Sequence[Decision]) -> None:
        self._bench, self._decisions = bench, tuple(decisions)

    @cached_property
    def _static(self) -> LayerNoise:
        """With input, weights and result rounded."""
        return self._measured([d.site for d in self._decisions if d.kind == "static"], activations=True)

    @cached_property
    def _weights(self) -> LayerNoise:
        """With weights rounded only."""
        return self._measured([d.site for d in self._decisions if d.kind != "float"], activations=False)

    def of(self, decision: Decision) -> float:
        """The share of a site in the form that was chosen.

        Ranges found on every run fit better than calibrated ones; how much is not measured, half of the noise of the
        activations is what counts.
        """
        key, kind = decision.site.key, decision.kind
        if kind == "float":
            return 0.0
        if kind == "weight" or key not in self._static.flags:
            return self._weights.of(key)
        whole = self._static.of(key)
        return whole if kind == "static" else (whole + self._weights.of(key)) / 2

    def _measured(self, sites: Sequence[Site], *, activations: bool) -> LayerNoise:
        bench, settings = self._bench, self._bench.settings
        plan, grids = bench.plan(self._decisions)
        weights = Weights(settings.bits, settings.per_channel, settings.rules.power_of_two)
        feeds = self._feeds(len(sites))
        return LayerNoise.prepare(
            bench.model, plan, grids, sites, feeds, bench.context, weights, activations=activations
        )  # fmt: skip

    def _feeds(self, count: int) -> Sequence[Feed]:
        """A few samples from all over the data, one where layers are many or large."""
        bench = self._bench
        macs = max(1, bench.context.fact(COST).macs) * max(1, count)
        few = max(1, min(_NOISE_FEEDS, max(_NOISE_RUNS // max(1, count), _NOISE_MACS // macs), len(bench.feeds)))
        return bench.feeds[:: max(1, len(bench.feeds) // few)][:few]


def _step_back(
    bench: Workbench, decisions: Sequence[Decision], round_: int, margin: float, shares: _Shares
) -> list[Decision]:
    """Step back with the noisiest layers until what remains fits the limit, which each round makes tighter.

    Noises of layers do not quite add up; what the outputs show now over the sum of all shares says how far off.
    After `_ROUNDS` rounds all that compute on integers store them only, so that the number of rounds is bounded.

    Args:
        bench: The model.
        decisions: How each site is computed now.
        round_: Number of rounds before.
        margin: What the worst output has above the signal to noise that it needs, in dB.
        shares: What each site contributes.
    """
    settings, nodes = bench.settings, keyed_nodes(bench.model)
    current = {d.site.key: d for d in decisions}
    noise = {key: shares.of(d) for key, d in current.items()}
    before = sum(noise.values())
    limit = before * 10 ** (margin / 10) / 2 ** (round_ + 1)

    def step(key: str) -> None:
        share = 100 * noise[key]
        why = f"its int8 noise would be {share:.2g} % of the signal at an output"
        if noise[key] < limit:  # it went with the others
            why = "with it and others in int8 an output would be too noisy"
        old = current[key].why
        why = old if why in old else "; ".join(filter(None, (old, why)))
        current[key] = fall_back(current[key], nodes[key], settings, why, current[key].sqnr)
        noise[key] = shares.of(current[key])

    if round_ >= _ROUNDS:
        for key in [key for key, d in current.items() if margin < 0 and d.kind in ("static", "dynamic")]:
            step(key)
    else:
        while (left := sum(noise.values())) > before * 10 ** ((margin - _COMFORT) / 10):
            if noise[_noisiest(noise)] < max(_OUTLIER, _EVEN / len(noise)) * left:
                break
            step(_noisiest(noise))
    if margin < 0:
        step_noisiest(noise, limit, step)
    return _stored_once([current[d.site.key] for d in decisions])


def _stored_once(decisions: Sequence[Decision]) -> list[Decision]:
    """A weight that one layer needs in float is not stored in integers too for others that compute in float."""
    kept = {(d.site.main, w.value) for d in decisions if d.kind == "float" for w in d.site.weights}
    why = "another layer reads its weight in float"
    return [
        replace(d, kind="float", why="; ".join(filter(None, (d.why, why))))
        if d.kind == "weight" and all((d.site.main, w.value) in kept for w in d.site.weights)
        else d
        for d in decisions
    ]


def step_noisiest(
    noise: Mapping[str, float], limit: float, step: Callable[[str], None], cost: Mapping[str, float] | None = None
) -> None:
    """Step back with the noisiest layers until all together are within the limit.

    Args:
        noise: Noise over signal at the worst output that each layer makes alone; `step` lowers that of a layer.
        limit: What their sum may be.
        step: Gives a layer its next weaker form.
        cost: What that takes; the layer with the most noise for what it costs goes first then.
    """
    while any(noise.values()) and sum(noise.values()) > limit:
        step(_noisiest(noise, cost))


def _noisiest(noise: Mapping[str, float], cost: Mapping[str, float] | None = None) -> str:
    return min(noise, key=lambda key: (-noise[key] / (1.0 if cost is None else cost[key]), key))
