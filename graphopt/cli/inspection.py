"""`graphopt inspect`: what is in a model, and what each pass with its defaults would do with it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from graphopt.analyses import ATTENTION, COST, QUANTIZED
from graphopt.analyses.attention import as_record, summaries
from graphopt.analyses.quantized import summary
from graphopt.errors import GraphoptError
from graphopt.model_io import ShapeBinding, check_binding, external_files, input_specs, load_model
from graphopt.pass_base import Context
from graphopt.plugins import load_plugins
from graphopt.runner import run_pass

__all__ = ["inspect_model", "show_inspection"]

_LAYERS_SHOWN = 12


def inspect_model(
    path: Path, shapes: Mapping[str, tuple[int, ...]], dims: Mapping[str, int], disable: Sequence[str]
) -> dict[str, Any]:
    """Collect everything that `show_inspection` prints; every pass runs on a copy."""
    registry = load_plugins(disable=disable)
    model = load_model(path)
    binding = ShapeBinding(shapes, dims)
    check_binding(input_specs(model), binding)
    target = registry.targets.resolve("ort")
    ctx = Context(model=model, target=target, binding=binding)
    cost = ctx.fact(COST)
    operators = Counter(node.op_type for graph in model.graphs() for node in graph)
    passes: dict[str, Any] = {}
    for name, cls in registry.passes.items():
        copy = model.clone()
        try:
            inner = Context(model=copy, target=target, binding=binding, criteria=registry.criteria)
            result = run_pass(cls(), inner, check=False).result
        except GraphoptError as e:
            passes[name] = {"error": str(e)}
            continue
        skipped = Counter(c.action.removeprefix("skipped: ") for c in result.changes if not c.done)
        passes[name] = {
            "sites": len(result.changes),
            "would_change": sum(change.done for change in result.changes),
            "left_alone": dict(skipped.most_common(5)),
        }
    files = [path, *external_files(model)]
    return {
        "model": str(path),
        "bytes": sum(file.stat().st_size for file in files),
        "opsets": {domain or "ai.onnx": number for domain, number in sorted(model.opset_imports.items())},
        "inputs": {spec.name: f"{spec.dtype.name} {spec.shape}" for spec in input_specs(model)},
        "outputs": {value.name: f"{value.dtype} {value.shape}" for value in model.graph.outputs},
        "params": cost.params,
        "macs": cost.macs,
        "macs_unknown": list(cost.unknown),
        "operators": dict(operators.most_common()),
        "attention": [as_record(block) for block in ctx.fact(ATTENTION)],
        "quantized": summary(list(ctx.fact(QUANTIZED).values())),
        "layers": [
            {"name": c.node, "operator": c.operator, "macs": c.macs, "params": c.params}
            for c in sorted(cost.nodes.values(), key=lambda c: (-(c.macs or 0), -c.params, c.node))
            if c.params and (c.macs or c.macs is None)
        ],
        "passes": passes,
    }


def show_inspection(found: Mapping[str, Any]) -> None:
    """Print an inspection."""
    click.echo(f"{found['model']}: {found['bytes']:,} bytes, {found['params']:,} parameters, {found['macs']:,} MACs")
    if found["macs_unknown"]:
        click.echo(f"MACs of {len(found['macs_unknown'])} layers unknown: fix sizes with --shape or --dim")
    click.echo("opsets     " + ", ".join(f"{k} {v}" for k, v in found["opsets"].items()))
    for kind in ("inputs", "outputs"):
        for name, text in found[kind].items():
            click.echo(f"{kind[:-1]:10} {name}: {text}")
    click.echo("operators  " + ", ".join(f"{count} {name}" for name, count in found["operators"].items()))
    if found["quantized"]:
        click.echo("quantized  " + ", ".join(found["quantized"]))
    for line in summaries(found["attention"]):
        click.echo(f"attention  {line}")
    layers = found["layers"]
    click.echo(f"\nlayers by MACs ({min(len(layers), _LAYERS_SHOWN)} of {len(layers)}):")
    for layer in layers[:_LAYERS_SHOWN]:
        macs = "unknown" if layer["macs"] is None else f"{layer['macs']:,}"
        click.echo(f"  {layer['operator']:14} {macs:>15} MACs {layer['params']:>12,} params  {layer['name']}")
    click.echo("\npasses, with their defaults and without data:")
    for name, entry in found["passes"].items():
        if "error" in entry:
            click.echo(f"  {name}: {entry['error']}")
            continue
        click.echo(f"  {name}: would change {entry['would_change']} of {entry['sites']} sites")
        for reason, count in entry["left_alone"].items():
            click.echo(f"      leaves {count} alone: {reason}")
