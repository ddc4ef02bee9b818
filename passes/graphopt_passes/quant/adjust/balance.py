"""Move ranges between layers: channels of activations get factors that the layers beside them take back.

The float model computes the same. What changes is how well 8 bits fit: one wide channel no longer takes the resolution
of all others in its tensor, or one wide column that of its row.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx_ir as ir

from graphopt.analyses import SHAPES, Shapes
from graphopt.pass_base import Change, Context
from graphopt_passes.fold.rewiring import FreshNames, site
from graphopt_passes.quant.adjust._balance import STRENGTHS, Activation, Problem, Reader, best_factors
from graphopt_passes.quant.adjust.components import Component, components, find_scales, fixed_layers
from graphopt_passes.quant.adjust.constants import scale_constant
from graphopt_passes.quant.adjust.layout import channel_axis, layout_of
from graphopt_passes.quant.adjust.migrate import migrate_outliers
from graphopt_passes.quant.adjust.scales import ScaleMap, Term
from graphopt_passes.quant.adjust.statistics import ChannelStatistics, ChannelStatisticsAnalysis
from graphopt_passes.quant.sites import RECURRENT, key_of, tensor_of

__all__ = ["Aims", "balance_channels"]

Array = np.ndarray[Any, np.dtype[Any]]

_GAIN = 1.25  # one decibel: what ranges of some samples promise beyond that others keep
_ROWS = 1024
_NORMAL_REACH = 3.0  # an activation without data reaches three standard deviations
_SWEEPS = 2
_QUIET = 0.01
_RELAYED = frozenset({"Add", "AveragePool", "Concat", "GlobalAveragePool", "Mul", "Sub"})
_RECTIFIERS = frozenset({"Clip", "Relu"})
_INTEGER_INPUT = {"static": frozenset({"Conv", "Gemm", "MatMul"}), "dynamic": frozenset({"Gemm", "MatMul"})}


@dataclass(frozen=True)
class Aims:
    """What the layers will be.

    Attributes:
        form: The strongest form that layers can take: static, dynamic or weight.
        keys: Keys of the nodes to be quantized.
        bits: Bits of weights that kernels add in pairs.
        per_channel: A weight has one scale for each output channel.
        equalize: Balance channels between linear layers.
        smooth: Balance channels by data, and those that normalizations make.
    """

    form: str
    keys: Collection[str]
    bits: int
    per_channel: bool
    equalize: bool
    smooth: bool


def balance_channels(model: ir.Model, ctx: Context, aims: Aims) -> list[Change]:
    """Scale channels in place wherever the noise of the layers that read them falls.

    Args:
        model: A float model; it computes the same afterwards.
        ctx: Facts about it, and data if there is any.
        aims: How its layers will be quantized.

    Returns:
        One change for each set of channels, and one for each layer whose channels are fixed.
    """
    shapes = ctx.fact(SHAPES)
    scales = find_scales(model, shapes)
    found = components(scales)
    work = _Work(model, scales, shapes, aims)
    if ctx.calibration is not None and (names := work.wanted(found)):
        work.seen.update(ChannelStatisticsAnalysis(values=names).compute(model, ctx))
        work.measured = True
    changes: dict[int, Change] = {}
    for _ in range(1 if work.measured else _SWEEPS):
        for i, component in enumerate(found):
            change = work.balance(component)
            if change is not None and (change.done or i not in changes):
                changes[i] = change
    migrated = work.migrate() if aims.smooth and work.measured else []
    fixed = [
        Change.skipped(site(node), f"its channels keep their scale: {reason}")
        for node, reason in fixed_layers(scales).items()
        if key_of(node) in aims.keys
    ]
    return [*(changes[i] for i in sorted(changes)), *migrated, *fixed]


@dataclass(eq=False)
class _Work:
    model: ir.Model
    scales: ScaleMap
    shapes: Shapes
    aims: Aims
    seen: dict[str, ChannelStatistics] = field(default_factory=dict[str, ChannelStatistics])
    measured: bool = False

    def __post_init__(self) -> None:
        self.names = FreshNames(self.model)

    def wanted(self, found: Sequence[Component]) -> tuple[tuple[str, int], ...]:
        """Activations to look at, with the axis of their channels."""
        names: dict[str, int] = {}
        for component in found:
            for term in self._layers(component):
                axis = channel_axis(term.node)
                for value in (term.node.inputs[0], term.node.outputs[0]):
                    if value is not None and value.name and self.shapes.dtype(value) == ir.DataType.FLOAT:
                        names[value.name] = axis
            for value, axis in self._relays(component):
                names.setdefault(value.name or "", axis)
        for terms in self._fixed_inputs().values():
            for value in (terms[0].node.inputs[0], *(term.node.outputs[0] for term in terms)):
                if value is not None and value.name:
                    names[value.name] = channel_axis(terms[0].node)
        return tuple(names.items())

    def balance(self, component: Component) -> Change | None:
        """Find and apply the factors of one component; None where nothing in it is to be quantized."""
        layers = self._layers(component)
        if not layers:
            return None
        makers = [term for term in component.makers if term.layer]
        place = site((makers or component.makers or component.readers)[0].node)
        readers = ", ".join(repr(site(term.node)) for term in layers)
        if not self.aims.smooth and not makers:
            return Change.skipped(place, "its channels keep their scale: smoothing is off")
        problem = self._problem(component, layers)
        if isinstance(problem, str):
            return Change.skipped(place, f"its channels keep their scale: {problem}")
        strengths = STRENGTHS if self.aims.smooth and self.measured else (0.5,)
        factors, strength, gain = best_factors(problem, strengths)
        if gain < _GAIN:
            reason = f"another would gain {10 * math.log10(gain):.1f} dB only"
            return Change.skipped(place, f"its channels keep their scale: {reason}")
        self._apply(component, factors)
        details: dict[str, int | float | str | bool] = {
            "channels": len(factors),
            "strength": strength,
            "expected_gain_db": round(10 * math.log10(gain), 1),
        }
        return Change(place, f"channels scaled for {readers}", details=details)

    def migrate(self) -> list[Change]:
        """Give outliers that nothing before a layer can scale a Mul of their own."""

        def problem(count: int, readers: Sequence[Reader]) -> Problem:
            return Problem(count, readers, (), self.aims.per_channel)

        return migrate_outliers(self.model, self._fixed_inputs(), self.seen, self._reader, problem, self.names)

    def _fixed_inputs(self) -> dict[ir.Value, list[Term]]:
        """Products on integers by what they read, where its channels are fixed and so keep their ranges."""
        found: dict[ir.Value, list[Term]] = {}
        if not self.aims.smooth or self.aims.form == "weight":
            return found
        for term in self.scales.terms:
            node, value = term.node, term.node.inputs[0]
            product = term.layer and node.op_type in ("Gemm", "MatMul") and key_of(node) in self.aims.keys
            if product and value in self.scales.values and not self.scales.free(self.scales.values[value]).any():
                found.setdefault(value, []).append(term)
        return found

    def _layers(self, component: Component) -> list[Term]:
        """Layers that read the channels and will be rounded."""
        return [term for term in component.readers if term.layer and key_of(term.node) in self.aims.keys]

    def _relays(self, component: Component) -> list[tuple[ir.Value, int]]:
        """Results that are rounded only to be added, joined or pooled, each with the axis of its channels."""
        if self.aims.form != "static":
            return []
        found: list[tuple[ir.Value, int]] = []
        for value in component.values:
            axes = [axis for axis, size in enumerate(self.scales.values[value].shape) if size != 1]
            if len(axes) == 1 and value.name and any(use.node.op_type in _RELAYED for use in value.uses()):
                found.append((value, axes[0]))
        return found

    # ------------------------------------------------------------ noise

    def _problem(self, component: Component, layers: Sequence[Term]) -> Problem | str:
        """State what depends on the factors, or why that is not known."""
        expected = None if self.measured else self._expected(component)
        activations: dict[ir.Value, Activation] = {}
        readers: list[Reader] = []
        for term in layers:
            value = term.node.inputs[0]
            if value is None:
                return "an input is left out"
            rounded = term.node.op_type in _INTEGER_INPUT.get(self.aims.form, ())
            activation = activations.get(value) or self._activation(component, value, expected, rounded=rounded)
            if isinstance(activation, str):
                return activation
            activations[value] = activation
            readers.append(self._reader(term, activation))
        relays: list[Activation] = []
        for value, _ in self._relays(component) if self.measured else ():
            relay = self._activation(component, value, expected, rounded=True)
            if value not in activations and not isinstance(relay, str):
                relays.append(relay)
        return Problem(len(component.roots), readers, relays, self.aims.per_channel)

    def _activation(
        self, component: Component, value: ir.Value, expected: Array | None, *, rounded: bool
    ) -> Activation | str:
        atoms = self.scales.values[value]
        slots = component.slots(self.scales, atoms).reshape(-1)
        if expected is not None:
            if (slots == len(expected)).any() or not np.isfinite(expected[slots]).all():
                return f"nothing is known of the range of {value.name!r} without data"
            reach, producer = expected[slots], value.producer()
            low = 0.0 if producer is not None and producer.op_type in _RECTIFIERS else -1.0
            return Activation(slots, low * reach, reach, np.square(reach / _NORMAL_REACH), rounded)
        seen = self.seen.get(value.name or "")
        if seen is None or not seen.finite:
            return f"no finite range of {value.name!r} was seen"
        if slots.size not in (1, seen.low.size):
            return f"the channels of {value.name!r} are unclear"
        return Activation(np.broadcast_to(slots, seen.low.shape), seen.low, seen.high, seen.square, rounded)

    def _expected(self, component: Component) -> Array:
        """Ranges without data: of random rows, by the norm of what makes a channel."""
        found = np.full(len(component.roots), np.inf)
        for term in component.makers:
            tensor = tensor_of(term.node.inputs[term.index])
            if not term.layer or tensor is None or term.made is None:
                continue
            slots = component.slots(self.scales, term.made)
            channels = np.broadcast_to(slots, np.broadcast_shapes(slots.shape, tuple(tensor.shape.numpy())))
            squares = np.zeros(len(component.roots) + 1)
            np.add.at(squares, channels, np.square(tensor.numpy(), dtype=np.float64))
            norms = np.sqrt(squares[:-1])
            reach = np.where(norms > 0, _NORMAL_REACH * norms, np.inf)
            found = np.where(np.isinf(found), reach, np.maximum(found, np.where(np.isinf(reach), 0.0, reach)))
        return found

    def _reader(self, term: Term, activation: Activation) -> Reader:
        tensor = tensor_of(term.node.inputs[term.index])
        if tensor is None:
            raise TypeError(f"{site(term.node)!r} has lost its weight")
        weight = tensor.numpy()
        if term.node.op_type in RECURRENT:
            rows = weight.reshape(1, -1, weight.shape[-1], 1)
        else:
            layout = layout_of(term.node, weight.shape)
            if layout is None:
                raise TypeError(f"{site(term.node)!r} is no layer")
            rows = layout.split(weight)
        groups, count, inputs, taps = rows.shape
        flat = rows.reshape(groups * count, inputs, taps)
        kept = np.unique(np.linspace(0, len(flat) - 1, min(len(flat), _ROWS)).astype(int))
        flat = flat[kept]
        if groups == 1:
            columns = np.arange(inputs)[None]
        else:
            columns = np.arange(groups * inputs).reshape(groups, inputs).repeat(count, axis=0)[kept]
        made = self.seen.get(term.node.outputs[0].name or "")
        if made is not None and made.finite and made.square.size == groups * count:
            power = made.square[kept]
        else:
            power = (np.square(flat, dtype=np.float64).sum(axis=2) * activation.square[columns]).sum(axis=1)
        least = _QUIET * float(np.median(power)) or 1.0  # a row that is almost silent is not the most important one
        importance = groups * count / len(kept) / np.maximum(power, least)
        return Reader(activation, columns, flat, importance, 8 if inputs == 1 < groups else self.aims.bits)

    # ------------------------------------------------------------ change

    def _apply(self, component: Component, factors: Array) -> None:
        s = np.append(factors, 1.0)

        def of(atoms: Array | None) -> Array | float:
            return 1.0 if atoms is None else s[component.slots(self.scales, atoms)]

        for term in dict.fromkeys((*component.makers, *component.readers)):
            scale_constant(term.node, term.index, np.asarray(of(term.made) / of(term.read)), self.names)
        for value in component.values:
            seen = self.seen.get(value.name or "")
            if seen is not None:
                slots = component.slots(self.scales, self.scales.values[value]).reshape(-1)
                self.seen[value.name or ""] = seen.scaled(np.broadcast_to(s[slots], seen.low.shape))
