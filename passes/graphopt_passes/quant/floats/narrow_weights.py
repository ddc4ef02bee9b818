"""bf16 and fp8: weights are stored in them, arithmetic stays float32.

ONNX Runtime has next to no bf16 arithmetic on CPUs and inserts no casts for it, and it takes activations rounded to
E4M3 for 8-bit integers and then refuses to load the model. Weights alone run everywhere.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from graphopt.pass_base import Change, Context
from graphopt.reference import Feed, Reference
from graphopt_passes._own_constants import constant_tensor
from graphopt_passes.fold.rewiring import LARGE
from graphopt_passes.quant._maths import decibel
from graphopt_passes.quant.builder import Builder
from graphopt_passes.quant.floats._rounding import float8_scales, scaled
from graphopt_passes.quant.floats.levels import output_levels, worst_level
from graphopt_passes.quant.floats.outcome import Converted
from graphopt_passes.quant.floats.plan import Choice
from graphopt_passes.quant.floats.rewrite import insert_behind
from graphopt_passes.quant.floats.storage import cast_weights, constants_of, find_weights, store
from graphopt_passes.quant.sites import Site, find_sites, keyed_nodes, usable
from graphopt_passes.quant.weight import saved_bytes

__all__ = ["bfloat16_noise", "float8_noise", "to_bfloat16", "to_float8"]

_FLOAT8 = ir.DataType.FLOAT8E4M3FN
_GROUPS = 32  # sets of weights whose noise is measured, each alone
_NOISE_FEEDS = 2
_ROUNDS = 3


@dataclass(frozen=True)
class _Unit:
    """A weight that is stored in fewer bits or not.

    Attributes:
        sites: Names of the nodes that read it, for reports.
        write: Rewrites it in a copy of the model.
        size: Number of elements.
        sqnr: Signal to noise of the rounding in dB.
    """

    sites: tuple[str, ...]
    write: Callable[[ir.Model], None]
    size: int
    sqnr: float


def to_bfloat16(work: ir.Model, ctx: Context, choice: Choice, feeds: Sequence[Feed], limit: float) -> Converted:
    """Store weights in bf16, behind Casts.

    Args:
        work: The model; it does not change.
        ctx: Says how ONNX Runtime runs.
        choice: What the user leaves to the pass.
        feeds: Samples to judge outputs on; none without calibration data.
        limit: Least signal to noise of every output in dB.
    """
    units, skipped = _bfloat16_units(work, choice)
    return _settled(work, ctx, units, skipped, feeds, limit, "bf16")


def to_float8(work: ir.Model, ctx: Context, choice: Choice, feeds: Sequence[Feed], limit: float) -> Converted:
    """Store weights in E4M3 with a scale for each output channel, behind DequantizeLinear.

    Args:
        work: The model; it does not change.
        ctx: Says how ONNX Runtime runs.
        choice: What the user leaves to the pass.
        feeds: Samples to judge outputs on; none without calibration data.
        limit: Least signal to noise of every output in dB.
    """
    units, skipped = _float8_units(work, choice)
    return _settled(work, ctx, units, skipped, feeds, limit, "fp8")


def bfloat16_noise(work: ir.Model, ctx: Context, choice: Choice, feeds: Sequence[Feed]) -> dict[str, float]:
    """Noise over signal at the worst output with the weights of each site in bf16; arguments as of `to_bfloat16`."""
    return _noise_by_site(work, ctx, _bfloat16_units(work, choice)[0], feeds)


def float8_noise(work: ir.Model, ctx: Context, choice: Choice, feeds: Sequence[Feed]) -> dict[str, float]:
    """Noise over signal at the worst output with the weights of each site in E4M3; arguments as of `to_float8`."""
    return _noise_by_site(work, ctx, _float8_units(work, choice)[0], feeds)


def _noise_by_site(work: ir.Model, ctx: Context, units: Sequence[_Unit], feeds: Sequence[Feed]) -> dict[str, float]:
    noise = _noise(work, units, _session(work, ctx), feeds[:_NOISE_FEEDS], ctx)
    found: dict[str, float] = {}
    for index, unit in enumerate(units):
        for site in unit.sites:
            found[site] = found.get(site, 0.0) + noise[index]
    return found


def _bfloat16_units(work: ir.Model, choice: Choice) -> tuple[list[_Unit], list[Change]]:
    """One unit for every constant that is worth it, and why the others are left."""
    dtype, nodes = ir.DataType.BFLOAT16, keyed_nodes(work)
    units, skipped = list[_Unit](), list[Change]()
    for weight in find_weights(work, dtype, lambda _, node: choice.refusal(node)):
        if weight.refusal:
            skipped.append(Change.skipped(weight.site, weight.refusal))
            continue
        sites = tuple(nodes[key].name or key for key in weight.readers)
        write = lambda model, weight=weight: cast_weights(model, [weight], dtype)  # noqa: E731
        units.append(_Unit(sites, write, weight.size, weight.sqnr))
    told = {site for unit in units for site in unit.sites} | {change.site for change in skipped}
    layers, others = find_sites(work)
    small = (Change.skipped(s.name, "so few weights that a Cast would cost more than bf16 saves") for s in layers)
    return units, [*skipped, *(change for change in (*others, *small) if change.site not in told)]


def _float8_units(work: ir.Model, choice: Choice) -> tuple[list[_Unit], list[Change]]:
    """One unit for every weight of a layer, and why the others are left."""
    found, skipped = find_sites(work)
    nodes, changes, chosen = keyed_nodes(work), list(skipped), list[Site]()
    for site in found:
        refusal = choice.refusal(nodes[site.key])
        if refusal:
            changes.append(Change.skipped(site.name, refusal))
        else:
            chosen.append(site)
    kept, shared = usable(work, chosen)
    units, small = _units_of(work, kept)
    return units, [*changes, *shared, *small]


def _units_of(work: ir.Model, sites: Sequence[Site]) -> tuple[list[_Unit], list[Change]]:
    """One unit for every weight, which several sites may read along different axes."""
    nodes, keys = keyed_nodes(work), {value: key for key, value in constants_of(work).items()}
    readers: dict[ir.Value, list[tuple[Site, int]]] = {}
    done, small = set[str](), list[Change]()
    for site in sites:
        for weight in site.weights:
            value = nodes[site.key].inputs[weight.index]
            if value is not None and saved_bytes(weight, per_channel=True) > 0:
                readers.setdefault(value, []).append((site, weight.axis))
                done.add(site.key)
    for site in sites:
        if site.key not in done:
            size = sum(weight.size for weight in site.weights)
            small.append(
                Change.skipped(site.name, f"{size} weights, so few that scales would cost more than fp8 saves")
            )
    units: list[_Unit] = []
    for value, found in readers.items():
        tensor, axes = constant_tensor(value), {axis for _, axis in found}
        if tensor is None:
            raise TypeError(f"weight {value.name!r} is no constant")
        axis = axes.pop() if len(axes) == 1 else None
        table = all(site.operator == "Gather" for site, _ in found)
        names = tuple(dict.fromkeys(site.name for site, _ in found))
        write = _float8_writer(keys[value], axis, table=table)
        units.append(_Unit(names, write, int(tensor.size), _float8_quality(tensor, axis)))
    return units, small


def _float8_quality(tensor: ir.TensorProtocol, axis: int | None) -> float:
    weight = tensor.numpy()
    scales = float8_scales(weight, axis)
    back = scaled(weight, scales, axis).astype(np.float32) * _along(scales, axis, weight.ndim)
    signal, noise = (float(np.square(a, dtype=np.float64).sum()) for a in (weight, back - weight))
    return decibel(signal, noise)


def _float8_writer(key: str, axis: int | None, *, table: bool) -> Callable[[ir.Model], None]:
    """Make what replaces a weight in a model.

    A table that is looked up stands behind a Cast and a Mul instead of DequantizeLinear: runtimes fold these when
    they load, and would dequantize the whole table on every run.
    """

    def write(model: ir.Model) -> None:
        builder, value = Builder(model), constants_of(model)[key]
        tensor = constant_tensor(value)
        if tensor is None:
            raise TypeError(f"{key!r} is no constant")
        scales = float8_scales(tensor.numpy(), axis)
        numbers = store(builder, value, _float8_tensor(tensor, scales, axis), "fp8")
        factors = _along(scales, axis, len(tensor.shape)) if table else scales
        scale = store(builder, value, ir.tensor(factors), "scale")
        if table:
            cast = builder.node("Cast", [numbers], f"{value.name}_cast", {"to": int(ir.DataType.FLOAT)})
            nodes = [cast, builder.node("Mul", [cast.outputs[0], scale], f"{value.name}_fp32")]
        else:
            attributes = {} if axis is None else {"axis": axis}
            nodes = [builder.node("DequantizeLinear", [numbers, scale], f"{value.name}_fp32", attributes)]
        insert_behind(numbers, nodes)
        value.replace_all_uses_with(nodes[-1].outputs[0])
        builder.discard(value)

    return write


def _float8_tensor(tensor: ir.TensorProtocol, scales: np.ndarray, axis: int | None) -> ir.TensorProtocol:
    def make() -> ir.Tensor:
        return ir.Tensor(scaled(tensor.numpy(), scales, axis))

    if tensor.nbytes > LARGE or isinstance(tensor, ir.ExternalTensor):
        return ir.LazyTensor(make, dtype=_FLOAT8, shape=ir.Shape(tensor.shape.numpy()))
    return make()


def _along(scales: np.ndarray, axis: int | None, rank: int) -> np.ndarray:
    return scales if axis is None else scales.reshape([-1 if i == axis else 1 for i in range(rank)])


def _settled(
    work: ir.Model,
    ctx: Context,
    units: Sequence[_Unit],
    skipped: Sequence[Change],
    feeds: Sequence[Feed],
    limit: float,
    name: str,
) -> Converted:
    """Write all weights, and take back those that make most of the noise until every output is good enough."""
    left: dict[int, str] = {}
    levels: dict[str, float] = {}
    original = _session(work, ctx) if feeds else None
    known: dict[int, float] = {}
    for round_ in range(_ROUNDS + 1):
        result = _built(work, [unit for i, unit in enumerate(units) if i not in left])
        if original is None or len(left) == len(units):
            break
        levels = output_levels(original, _session(result, ctx), feeds, ctx)
        worst = worst_level(levels)
        if worst >= limit:
            break
        ctx.log.info("quant: %.1f dB at an output in %s, stepping back", worst, name)
        why = f"with it and others in {name} an output would keep {worst:.1f} dB of signal to noise"
        known = known or _noise(work, units, original, feeds[:_NOISE_FEEDS], ctx)
        room = 10 ** (-limit / 10) / 2 ** (round_ + 1)
        for index in _loudest(known, left, room) if round_ < _ROUNDS - 1 else range(len(units)):
            left.setdefault(index, why)
    done = [i for i in range(len(units)) if i not in left]
    made = (
        Change.skipped(site, left[index]) if index in left else _done(site, unit, name)
        for index, unit in enumerate(units)
        for site in unit.sites
    )
    changes = [*skipped, *made]
    if not done:
        return Converted(None, tuple(changes))
    metrics: dict[str, int | float | str | bool] = {f"weights_{name}": len(done), "weights_float32": len(left)}
    if levels:
        metrics["output_sqnr_db"] = round(worst_level(levels), 1)
    return Converted(_built(work, [units[i] for i in done]), tuple(changes), metrics)


def _done(site: str, unit: _Unit, name: str) -> Change:
    details = {"bits": 8 if name == "fp8" else 16, "weights": unit.size}
    quality = {"weight_sqnr_db": round(min(unit.sqnr, 999.0), 1)}
    return Change(site, f"weights in {name}, arithmetic in float32", details={**details, **quality})


def _built(work: ir.Model, units: Sequence[_Unit]) -> ir.Model:
    model = work.clone()
    for unit in units:
        unit.write(model)
    return model


def _loudest(noise: Mapping[int, float], left: Mapping[int, str], room: float) -> list[int]:
    """The fewest weights without which the noise of the rest, added up, fits the room; one at least."""
    found: list[int] = []
    rest = {index: share for index, share in noise.items() if index not in left}
    total = sum(rest.values())
    for index in sorted(rest, key=lambda i: (-rest[i], i)):
        if total <= room and found:
            break
        found.append(index)
        total -= rest[index]
    return found


def _noise(
    work: ir.Model, units: Sequence[_Unit], original: Reference, feeds: Sequence[Feed], ctx: Context
) -> dict[int, float]:
    """Noise over signal at the worst output for each weight.

    Many weights are measured in groups, as they come; what a group makes is shared out by the noise of its weights.
    """
    groups = [list(group) for group in np.array_split(np.arange(len(units)), min(_GROUPS, len(units)))]
    found: dict[int, float] = {}
    for group in ctx.progress(groups, "finding sensitive layers"):
        session = _session(_built(work, [units[i] for i in group]), ctx)
        level = worst_level(output_levels(original, session, feeds, ctx))
        own = np.array([10 ** (-units[i].sqnr / 10) for i in group])
        shares = own / own.sum() if own.any() else np.full(len(group), 1 / len(group))
        found |= dict(zip(map(int, group), map(float, shares * 10 ** (-max(level, -300.0) / 10)), strict=True))
    return found


def _session(model: ir.Model, ctx: Context) -> Reference:
    return Reference(model, threads=ctx.threads, extensions=ctx.extensions)
