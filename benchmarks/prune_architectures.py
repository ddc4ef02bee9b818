"""Pruning of every architecture at hand: [GRAPHOPT_ZOO=...] python benchmarks/prune_architectures.py [--only NAME ...].

Networks of torchvision and transformers with random weights (architectures.py), exported in several ways, and the
models of the zoo, each in a process of its own: `prune` without data, on the model as exported and after `fold`. A
result counts only if it runs in ONNX Runtime with the interface and the output shapes of the original, if `ratio=0.0`
leaves the model alone, and if zero-equivalence holds: a quarter of the units of every free group is set to zero,
wherever the analysis says that they sit, and then removed; the outputs must stay the same (`6e-07 of 3e-01`: what
removing changed, and what setting to zero did). Groups that a norm takes a mean off (exact only where it is zero) are
left out there and counted. Seconds and memory are those of loading, analysis and `prune`.

About 10 minutes of one core for each variant; exporting takes a second or two per network more.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import architectures
import numpy as np
import onnx_ir as ir
import tables
from zoo_quant import load_zoo

from graphopt.analyses import CHANNEL_GROUPS, CONSTANTS, ChannelGroup, ChannelGroups
from graphopt.calibration import open_calibration
from graphopt.errors import GraphoptError
from graphopt.model_io import ShapeBinding, input_specs, load_model, save_model
from graphopt.pass_base import Context, Pass
from graphopt.reference import Feed, Reference, random_feed
from graphopt.runner import run_pass
from graphopt.structure import fingerprint
from graphopt.targets import Target
from graphopt_passes.fold import Fold
from graphopt_passes.prune import Prune
from graphopt_passes.prune.removal import remove

_SIZES = {"batch": 1, "sequence": 16}
_ZEROED = 0.25
_TOLERANCE = 1e-4
_CENTRING = frozenset({"GroupNormalization", "InstanceNormalization", "LayerNormalization", "SkipLayerNormalization"})
_PINS = re.compile(r"pinned by (\w+)|captured by the subgraph .* of (\w+)|reaches graph (input|output)")


def main() -> None:
    """Measure and write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="*", metavar="NAME", help="these models only")
    parser.add_argument("--variants", nargs="*", default=["script"], choices=architectures.VARIANTS)
    parser.add_argument("--ratio", type=float, default=0.5)
    parser.add_argument("--cache", type=Path, default=Path(tempfile.gettempdir()) / "graphopt-architectures")
    parser.add_argument("--fresh", action="store_true", help="measure again what the cache folder has rows of")
    parser.add_argument("--name", default="prune_architectures")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(_measured(**json.loads(options.child))))
        return
    rows, start = list[dict[str, Any]](), time.perf_counter()
    for name, variant in _work(options.only, options.variants):
        rows.append(_row(name, variant, options))
        print(*_cells(rows[-1]), sep=" | ", flush=True)
    took = (time.perf_counter() - start) / 60
    earlier = sum(row.pop("earlier", False) for row in rows)
    told = f"Runtime {took:.0f} minutes; {earlier} of {len(rows)} rows were measured by earlier runs."
    notes = f"{_summary(rows, options.ratio)}\n\n{told}"
    title = f"`prune{{ratio={options.ratio}}}` without data on every architecture"
    tables.write(options.name, title, _HEAD, [_cells(row) for row in rows], notes)


def _work(only: Sequence[str] | None, variants: Sequence[str]) -> list[tuple[str, str]]:
    zoo = sorted(load_zoo().cases()) if os.environ.get("GRAPHOPT_ZOO") else []
    found = [(name, variant) for name in architectures.MODELS for variant in variants] + [(name, "zoo") for name in zoo]
    unknown = set(only or ()) - {name for name, _ in found}
    if unknown:
        sys.exit(f"no such model: {', '.join(sorted(unknown))}")
    return [(name, variant) for name, variant in found if not only or name in only]


def _row(name: str, variant: str, options: argparse.Namespace) -> dict[str, Any]:
    """Export and measure one model, each in a child process; what fails says so in the row."""
    kept = options.cache / "rows" / f"{name}.{variant}.{options.ratio}.json"
    if kept.exists() and not options.fresh:
        return json.loads(kept.read_text("utf8")) | {"earlier": True}
    row: dict[str, Any] = {"model": name, "variant": variant}
    try:
        if variant == "zoo":
            zoo = load_zoo()
            zoo.export(name, options.cache / "zoo" / name, samples=1, limit=1)
            path, samples = options.cache / "zoo" / name / "model.onnx", options.cache / "zoo" / name / "calib.npz"
        else:
            path, samples = options.cache / f"{name}.{variant}.onnx", None
            code = (
                "import sys, architectures as a, pathlib; a.export(sys.argv[1], sys.argv[2], pathlib.Path(sys.argv[3]))"
            )
            _run([sys.executable, "-c", code, name, variant, str(options.cache)], "export")
        job = {"path": str(path), "samples": str(samples) if samples else None, "ratio": options.ratio}
        out = _run([sys.executable, __file__, "--child", json.dumps(job)], "prune")
        row |= json.loads(out.splitlines()[-1])
    except RuntimeError as e:
        row["fault"] = str(e)
    kept.parent.mkdir(parents=True, exist_ok=True)
    kept.write_text(json.dumps(row, indent=1), "utf8")
    return row


def _run(command: list[str], what: str) -> str:
    done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, timeout=1800, check=False)
    if done.returncode:
        last = [line for line in done.stderr.splitlines() if line.strip()][-1:] or [f"exit {done.returncode}"]
        raise RuntimeError(f"{what}: {last[0].strip()[:200]}")
    return done.stdout


# ---- in the child


def _measured(path: str, samples: str | None, ratio: float) -> dict[str, Any]:
    """Everything about one model; what the interpreter and its imports need in memory is not taken off."""
    start = time.process_time()
    model = load_model(path)
    binding = _binding(model, samples)
    ctx = _context(model, binding)
    groups = ctx.fact(CHANNEL_GROUPS)
    pinned = [group for group in groups.groups if group.pin is not None]
    row: dict[str, Any] = {
        "groups": len(groups.groups),
        "pinned": len(pinned),
        "reasons": Counter(_operator(group.pin or "") for group in pinned),
        "examples": {_operator(group.pin or ""): [group.name, group.units, group.pin] for group in reversed(pinned)},
        "inexact": sum(_is_inexact(model, groups, group) for group in groups.free),
    }
    result = run_pass(Prune(ratio=ratio), ctx).result
    row |= {name: result.metrics[name] for name in ("macs_before", "macs_after", "achieved")}
    row["seconds"] = time.process_time() - start
    row["megabytes"] = _peak_bytes() / 2**20
    original = load_model(path)
    feed = _feed(original, samples, binding)
    row["fault"] = _interface_fault(original, model, feed) or _zero_ratio_fault(path, binding)
    row["fold"] = _after_fold(path, ratio, binding)
    row |= _zero_equivalence(path, feed)
    return row


def _peak_bytes() -> int:
    """The most that this process had in memory; what the system counts for a child includes its parent."""
    status = Path("/proc/self/status").read_text("utf8")
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM"))


def _operator(pin: str) -> str:
    match = _PINS.search(pin)
    return next((text for text in match.groups() if text), pin) if match else pin


def _context(model: ir.Model, binding: ShapeBinding) -> Context:
    return Context(model, Target(name="ort"), binding=binding)


def _feed(model: ir.Model, samples: str | None, binding: ShapeBinding) -> Feed:
    specs = input_specs(model)
    if samples is not None:
        return next(open_calibration(samples, specs, ShapeBinding()).feeds())
    return random_feed(specs, binding, np.random.default_rng(1))


def _binding(model: ir.Model, samples: str | None) -> ShapeBinding:
    """Sizes of open dimensions: those of the first sample, where there is one."""
    if samples is None:
        return ShapeBinding(dims=_SIZES)
    return ShapeBinding(shapes={name: array.shape for name, array in _feed(model, samples, ShapeBinding()).items()})


def _interface_fault(original: ir.Model, pruned: ir.Model, feed: Feed) -> str | None:
    """What is wrong with the result, None if nothing is."""
    for side in ("inputs", "outputs"):
        before, after = ([(v.name, v.dtype, str(v.shape)) for v in getattr(m.graph, side)] for m in (original, pruned))
        if before != after:
            return f"{side} changed: {before} -> {after}"
    with tempfile.TemporaryDirectory() as folder:
        save_model(pruned, Path(folder) / "model.onnx")
        got = Reference(Path(folder) / "model.onnx").run(feed)
    for name, value in Reference(original).run(feed).items():
        same_rank = got[name].ndim == value.ndim and got[name].dtype == value.dtype
        if not same_rank or (got[name].shape != value.shape and not _depends_on_values(original)):
            return f"output {name!r} changed from {value.dtype}{value.shape} to {got[name].dtype}{got[name].shape}"
    return None


def _depends_on_values(model: ir.Model) -> bool:
    """Whether the number of results depends on what is detected."""
    return any(node.op_type in ("NonMaxSuppression", "NonZero") for node in model.graph)


def _zero_ratio_fault(path: str, binding: ShapeBinding) -> str | None:
    model = load_model(path)
    before = fingerprint(model)
    result = run_pass(Prune(ratio=0.0), _context(model, binding)).result
    return "ratio=0.0 changes the model" if result.modified or fingerprint(model) != before else None


def _after_fold(path: str, ratio: float, binding: ShapeBinding) -> float:
    """The ratio reached after `fold`."""
    ctx = _context(load_model(path), binding)
    steps: list[Pass] = [Fold(), Prune(ratio=ratio)]
    return float(str([run_pass(step, ctx, check=False).result.metrics for step in steps][-1]["achieved"]))


# ---- zero-equivalence


def _zero_equivalence(path: str, feed: Feed) -> dict[str, Any]:
    """Set units to zero, remove them, compare; `signal` is what setting them to zero did, so that silence shows."""
    model = load_model(path)
    groups = _context(model, ShapeBinding()).fact(CHANNEL_GROUPS)
    exact = [group for group in groups.free if group.units > 1 and not _is_inexact(model, groups, group)]
    if _depends_on_values(model):
        return {"zeroed": len(exact), "difference": None, "signal": None}
    before = Reference(model, optimize=False).run(feed)
    difference, signal = _difference(path, [group.name for group in exact], feed, before)
    row: dict[str, Any] = {"zeroed": len(exact), "difference": difference, "signal": signal}
    if not difference <= _TOLERANCE:
        row["broken"] = _broken(path, exact, feed, before)
    return row


def _is_inexact(model: ir.Model, groups: ChannelGroups, group: ChannelGroup) -> bool:
    """Whether a mean over these channels is taken off them, which changes unless it is zero."""
    axes = {(place.value, place.axis) for place in group.places}
    outputs = {mean.output for mean in groups.means if (mean.value, mean.axis) in axes}
    nodes = (node for graph in model.graphs() for node in graph if node.outputs and node.outputs[0].name in outputs)
    return any(
        node.op_type in _CENTRING or any(user.op_type == "Sub" for user, _ in node.outputs[0].uses()) for node in nodes
    )


def _broken(path: str, groups: Sequence[ChannelGroup], feed: Feed, before: Feed) -> dict[str, float]:
    """Groups that are not exact by themselves."""
    found: dict[str, float] = {}
    for group in groups:
        alone, _ = _difference(path, [group.name], feed, before)
        if not alone <= _TOLERANCE:
            found[group.name] = alone
    return found


def _difference(path: str, names: Sequence[str], feed: Feed, before: Feed) -> tuple[float, float]:
    """Largest difference of the outputs, as a fraction of their scale: zeroed to removed, original to zeroed."""
    model = load_model(path)
    ctx = _context(model, ShapeBinding())
    groups = ctx.fact(CHANNEL_GROUPS)
    chosen = [g for g in groups.free if g.name in names and g.units > 1 and not _is_inexact(model, groups, g)]
    rng = np.random.default_rng(0)
    removals = [(g, sorted(rng.permutation(g.units)[: max(1, int(g.units * _ZEROED))].tolist())) for g in chosen]
    for group, units in removals:
        _zero(model, ctx, group, units)
    zeroed = Reference(model, optimize=False).run(feed)
    remove(model, groups, removals)
    removed = Reference(model, optimize=False).run(feed)
    return _distance(zeroed, removed), _distance(before, zeroed)


def _zero(model: ir.Model, ctx: Context, group: ChannelGroup, units: Sequence[int]) -> None:
    """Set everything that belongs to some units to zero: channels that are zero and that nobody reads."""
    constants = ctx.fact(CONSTANTS).tensors
    for place in group.places:
        if not place.constant or not constants[place.value].dtype.is_floating_point():
            continue
        value = model.graph.initializers.get(place.value)
        tensor = value.const_value if value is not None else constants[place.value]
        array = np.array(tensor.numpy())  # pyright: ignore[reportOptionalMemberAccess]
        np.moveaxis(array, place.axis, 0)[place.positions[list(units)].reshape(-1)] = 0
        if value is not None:
            value.const_value = ir.tensor(array, name=place.value)
        else:
            _rewrite(model, place.value, array)


def _rewrite(model: ir.Model, name: str, array: np.ndarray) -> None:
    """Replace what a Constant node holds."""
    for graph in model.graphs():
        for node in graph:
            if node.op_type == "Constant" and node.outputs[0].name == name:
                node.attributes.clear()
                node.attributes["value"] = ir.AttrTensor("value", ir.tensor(array))
                node.outputs[0].const_value = None


def _distance(before: Feed, after: Feed) -> float:
    worst = 0.0
    for name, value in before.items():
        if value.shape != after[name].shape:
            return float("inf")
        if value.dtype.kind == "f" and value.size:
            a, b = value.astype(np.float64), after[name].astype(np.float64)
            scale = float(np.abs(a).max()) or 1.0
            worst = max(worst, float(np.abs(a - b).max()) / scale)
    return worst


# ---- the table

_HEAD = (
    "model", "export", "groups", "pinned", "pinned by", "MACs before", "after", "removed", "after fold", "CPU seconds",
    "MB", "zero-equivalence", "result",
)  # fmt: skip


def _cells(row: dict[str, Any]) -> tuple[object, ...]:
    fault = row.get("fault")
    if "groups" not in row:
        return (row["model"], row["variant"], *[""] * (len(_HEAD) - 3), fault)
    reasons = ", ".join(f"{name} {count}" for name, count in Counter(row["reasons"]).most_common(3))
    inexact = row["inexact"]
    equal = "not compared: rounding decides which boxes stay"
    if row["difference"] is not None:
        equal = f"{row['difference']:.0e} of {row['signal']:.0e}" + (f" ({inexact} inexact)" if inexact else "")
    if row.get("broken") is not None:
        fault = fault or f"not equal: {', '.join(row['broken']) or 'together only'}"
    return (
        row["model"],
        row["variant"],
        row["groups"],
        row["pinned"],
        reasons,
        f"{row['macs_before'] / 1e6:.1f} M",
        f"{row['macs_after'] / 1e6:.1f} M",
        f"{row['achieved']:.3f}",
        f"{row['fold']:.3f}" if abs(row["fold"] - row["achieved"]) > 0.002 else "same",
        f"{row['seconds']:.1f}",
        f"{row['megabytes']:.0f}",
        equal,
        fault or "ok",
    )


def _summary(rows: Sequence[dict[str, Any]], ratio: float) -> str:
    ran = [row for row in rows if "achieved" in row and not row.get("fault")]
    reached = [row for row in ran if abs(row["achieved"] - ratio) <= 0.02]
    missed = [
        f"- {row['model']} ({row['variant']}) {row['achieved']:.3f}: "
        + "; ".join(f"{name!r} ({units}) {pin}" for name, units, pin in row["examples"].values())
        for row in ran
        if row not in reached
    ]
    first = f"{len(ran)} of {len(rows)} run as they should, {len(reached)} of them within 0.02 of the ratio."
    return "\n".join([first, *(["", "What holds the others:", "", *missed] if missed else [])])


if __name__ == "__main__":
    try:
        main()
    except GraphoptError as e:
        sys.exit(str(e))
