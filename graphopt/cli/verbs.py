"""The verbs beside compile. Each imports what it needs when it runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from graphopt.cli.compile import cache_folder, dims_option, parse_dims, parse_shapes, shape_option
from graphopt.cli.packing import pack_command, unpack_command
from graphopt.errors import ExitCode, OptionError, UsageError, nearest

__all__ = ["VERBS"]

_json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON.")
_plugin_option = click.option("--no-plugin", multiple=True, metavar="NAME", help="Leave an installed plugin out.")
_model_argument = click.argument("model", type=click.Path(path_type=Path))


@click.command("inspect")
@_model_argument
@shape_option
@dims_option
@_plugin_option
@_json_option
def inspect_command(model: Path, shape: Any, dim: Any, no_plugin: Any, as_json: bool) -> int:
    """Show what is in a model, and what each pass could do with it."""
    from graphopt.cli.console import log_to_stderr
    from graphopt.cli.inspection import inspect_model, show_inspection

    log_to_stderr(0, quiet=False)
    found = inspect_model(model, parse_shapes(shape), parse_dims(dim), no_plugin)
    _print_json(found) if as_json else show_inspection(found)
    return ExitCode.OK


@click.command("list")
@_plugin_option
@_json_option
def list_command(no_plugin: Any, as_json: bool) -> int:
    """List passes, pruning criteria, targets, backends, recipes and plugins."""
    from graphopt.plugins import load_plugins
    from graphopt.recipe import recipe_summaries

    registry = load_plugins(disable=no_plugin)
    found: dict[str, Any] = {
        "passes": {name: _first_line(cls) for name, cls in registry.passes.items()},
        "criteria": {name: _first_line(type(criterion)) for name, criterion in registry.criteria.items()},
        "targets": {str(target): target.summary for target in registry.targets},
        "backends": {name: _first_line(type(backend)) for name, backend in registry.backends.items()},
        "recipes": recipe_summaries(registry),
        "plugins": {f"{p.name} {p.version}": ", ".join(p.hooks) for p in registry.plugins if not p.builtin},
    }
    if as_json:
        found["plugins"] = [{"name": p.name, "version": p.version, "hooks": p.hooks} for p in registry.plugins]
        _print_json(found)
        return ExitCode.OK
    for kind, entries in found.items():
        click.echo(f"{kind}:" if entries else f"{kind}: none")
        width = max((len(name) for name in entries), default=0)
        for name, text in entries.items():
            click.echo(f"  {name:{width}}  {text}".rstrip())
    return ExitCode.OK


@click.command("explain")
@click.argument("name", required=False)
@click.option("--target", metavar="NAME[:DEVICE]", help="Explain a target, as its name alone does.")
@_plugin_option
def explain_command(name: str | None, target: str | None, no_plugin: Any) -> int:
    """Explain a pass or a target, with its options."""
    from graphopt.cli.explanation import explain_pass, explain_target
    from graphopt.plugins import load_plugins

    registry = load_plugins(disable=no_plugin)
    if (name is None) == (target is None):
        raise UsageError("explain", "needs the name of one pass or one target", "see: graphopt list")
    if name is not None and name in registry.passes:
        click.echo(explain_pass(registry.passes[name]))
        return ExitCode.OK
    try:
        found = registry.targets.resolve(name or target or "")
    except UsageError as e:
        if name is None:
            raise
        known = [*registry.passes, *map(str, registry.targets)]
        raise UsageError(name, "neither a pass nor a target", nearest(name, known)) from e
    click.echo(explain_target(found, registry.backend_of(found)))
    return ExitCode.OK


@click.command("extract")
@_model_argument
@click.option("--inputs", required=True, metavar="NAME,...", help="Values where the part begins.")
@click.option("--outputs", required=True, metavar="NAME,...", help="Values where it ends.")
@click.option("-o", "--out", required=True, type=click.Path(path_type=Path), help="File to write.")
def extract_command(model: Path, inputs: str, outputs: str, out: Path) -> int:
    """Cut a part out of a model: to debug it, or to hand over one block."""
    from graphopt.model_io import load_model, save_model
    from graphopt.surgeon import extract

    if out.exists() and out.samefile(model):
        raise UsageError(f"-o {out}", "is the input", "choose another file")
    part = extract(load_model(model), inputs.split(","), outputs.split(","))
    partial = out.with_name(f".{out.name}.partial")
    try:
        save_model(part, partial)
        partial.rename(out)
    finally:
        partial.unlink(missing_ok=True)
    click.echo(out)
    return ExitCode.OK


@click.command("doctor")
@click.option("--fetch", metavar="TARGET", help="Download a target's runtime into the user cache.")
@_plugin_option
@_json_option
def doctor_command(fetch: str | None, no_plugin: Any, as_json: bool) -> int:
    """Say what this machine can build and run, and how to get what is missing."""
    from graphopt.plugins import load_plugins

    registry, cache = load_plugins(disable=no_plugin), cache_folder()
    if fetch is not None:
        target = registry.targets.resolve(fetch)
        backend = registry.backend_of(target)
        files = backend.fetch(target, cache) if backend else ()
        for file in files:
            click.echo(file)
        if not files:
            click.echo(f"{target} needs nothing to be fetched", err=True)
        return ExitCode.OK
    findings = {name: backend.doctor(cache) for name, backend in registry.backends.items()}
    if as_json:
        _print_json({name: [vars(f) for f in found] for name, found in findings.items()})
        return ExitCode.OK
    for name, found in findings.items():
        for finding in found:
            hint = f"  ->  {finding.hint}" if finding.hint and not finding.ok else ""
            mark = "ok     " if finding.ok else "missing"
            click.echo(f"{name:5} {mark} {finding.subject}: {finding.state}{hint}")
    return ExitCode.OK


@click.command("bench")
@click.argument("subjects", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="BUNDLE|MODEL...")
@click.option("--calibration", "data", metavar="DATA", help="Samples to run on.  [default: random values]")
@click.option("--threads", default="1", show_default=True, metavar="N,...", help="Threads, several side by side.")
@click.option("--warmup", type=click.IntRange(min=0), default=3, show_default=True, help="Runs before the clock.")
@click.option("--repeats", type=click.IntRange(min=1), default=20, show_default=True, help="Timed runs a round.")
@click.option("--rounds", type=click.IntRange(min=1), default=5, show_default=True, help="Interleaved rounds.")
@shape_option
@dims_option
@_plugin_option
@_json_option
def bench_command(subjects: tuple[Path, ...], as_json: bool, **given: Any) -> int:
    """Time models and bundles side by side: median, spread, size, peak memory, original against result."""
    from graphopt.bench import Plan
    from graphopt.cli.benching import bench_subjects
    from graphopt.cli.console import log_to_stderr, out_console
    from graphopt.report.benchmark import render_bench

    log_to_stderr(0, quiet=False)
    threads = [int(part) for part in given["threads"].split(",") if part.isdigit() and int(part)]
    if len(threads) != len(given["threads"].split(",")):
        raise OptionError("--threads", f"{given['threads']!r} is not a list of whole numbers", "write 1,2")
    measured = bench_subjects(
        subjects,
        data=given["data"],
        plan=Plan(tuple(threads), given["warmup"], given["repeats"], given["rounds"]),
        shapes=parse_shapes(given["shape"]),
        dims=parse_dims(given["dim"]),
        disable=given["no_plugin"],
    )
    if as_json:
        click.echo(measured.to_json(), nl=False)
    else:
        render_bench(measured, out_console())
    return ExitCode.OK


@click.command("completion")
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion_command(shell: str) -> int:
    """Print the completion script for a shell: eval "$(graphopt completion bash)"."""
    from click.shell_completion import get_completion_class

    root = click.get_current_context().find_root().command
    found = get_completion_class(shell)
    if found is None:
        raise OptionError("completion", f"no script for {shell!r}")
    click.echo(found(root, {}, "graphopt", "_GRAPHOPT_COMPLETE").source())
    return ExitCode.OK


def _first_line(cls: type) -> str:
    return (cls.__doc__ or "").strip().partition("\n")[0]


def _print_json(value: Any) -> None:
    import json

    click.echo(json.dumps(value, indent=1, default=str))


VERBS = {
    command.name or "": command
    for command in (
        bench_command,
        completion_command,
        doctor_command,
        explain_command,
        extract_command,
        inspect_command,
        list_command,
        pack_command,
        unpack_command,
    )
}
