"""The compile command: options in, one call of `graphopt.compile.optimize`, a table or JSON out."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import click

from graphopt.errors import ExitCode, OptionError

if TYPE_CHECKING:
    from graphopt.compile import Result

__all__ = ["cache_folder", "compile_command", "dims_option", "parse_dims", "parse_shapes", "shape_option"]

shape_option = click.option(
    "--shape", "shape", multiple=True, metavar="INPUT=1x3x224x224", help="Fix the shape of an input."
)
dims_option = click.option(
    "--dim", "dim", multiple=True, metavar="NAME=SIZE,...", help="Fix dynamic dimensions by name."
)


@click.command("compile", hidden=True)
@click.argument("model", type=click.Path(path_type=Path))
@click.option("--passes", metavar="TEXT", help="Pipeline, such as 'fold,prune{ratio=0.3},quant'.")
@click.option("--recipe", metavar="FILE|NAME", help="Pipeline, target and limits from a TOML recipe.")
@click.option(
    "--target", metavar="NAME[:DEVICE]", help="What to make it for, 'NAME{option=value}' with options.  [default: ort]"
)
@click.option("--require-npu", is_flag=True, help="Fail if an operator cannot run on the target's NPU.")
@click.option("-o", "--out", type=click.Path(path_type=Path), help="Output folder.  [default: <model>.<target>]")
@click.option("--overwrite", is_flag=True, help="Replace an output folder that graphopt did not write.")
@click.option("--calibration", metavar="DATA", help="Samples: .npz, folder, module:function or synthetic:SEED.")
@click.option("--eval", "evaluation", metavar="DATA", help="Labelled samples: as above, with labels.")
@click.option("--metric", metavar="NAME", help="top1, top5, perplexity, mse or module:function.")
@click.option("--max-drop", type=float, metavar="POINTS", help="Largest loss of the metric.")
@click.option("--max-size", type=float, metavar="FRACTION", help="Largest size, as a fraction of the input's.")
@click.option("--min-sqnr", type=float, metavar="DB", help="Smallest signal-to-noise ratio of any output.")
@click.option("--time-limit", metavar="DURATION", help="Begin no further step or search after 90s, 10m, 2h.")
@shape_option
@dims_option
@click.option(
    "--check",
    type=click.Choice(["auto", "full", "sample", "none"]),
    default="auto",
    show_default=True,
    help="How many samples the result is compared with the original on.",
)
@click.option("--verify/--no-verify", default=True, help="Run what was compiled and compare it.  [default: verify]")
@click.option("--measure", is_flag=True, help="Time original and result; written to measured/.")
@click.option("--guard", is_flag=True, help="Leave parts that a step makes slower as they were, and record it.")
@click.option("--decisions", type=click.Path(path_type=Path), help="Replay a decisions.json instead of the clock.")
@click.option("--emit", metavar="KIND,...", default="", help="Further outputs of the backend: source, asm.")
@click.option("--fallback", type=click.Choice(["ort"]), help="Let ONNX Runtime run what the backend cannot.")
@click.option("--keep-opset", is_flag=True, help="Refuse rather than raise the opset.")
@click.option("--ort-extension", multiple=True, metavar="LIB", help="Library with custom operators.")
@click.option("--cc", metavar="COMMAND", help="C++ compiler that links for the target.  [env: GRAPHOPT_CC]")
@click.option("--pack", is_flag=True, help="Also write model.gopt, the model as one small file; see: graphopt unpack.")
@click.option("--seed", type=click.IntRange(min=0), help="Seed of all random streams.  [default: 0]")
@click.option("--threads", type=click.IntRange(min=0), default=0, help="Threads; 0: all cores, 8 at most.")
@click.option("--no-plugin", multiple=True, metavar="NAME", help="Leave an installed plugin out.")
@click.option("--depfile", type=click.Path(path_type=Path), help="Write the inputs as a make dependency file.")
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")
@click.option("--dry-run", is_flag=True, help="Print what would be done.")
@click.option("--force", is_flag=True, help="Build although the bundle is up to date.")
@click.option("-v", "--verbose", count=True, help="Say more; twice: debug.")
@click.option("-q", "--quiet", is_flag=True, help="Print nothing but errors.")
def compile_command(model: Path, **given: Any) -> int:
    """Optimize MODEL and write a bundle."""
    from graphopt.cli.console import log_to_stderr, out_console, progress_on_stderr
    from graphopt.compile import plan
    from graphopt.compile.optimize import run
    from graphopt.compile.resolve import resolve
    from graphopt.recipe import Limits, seconds

    log_to_stderr(given["verbose"], quiet=given["quiet"])
    limit_values = {name: given[name] for name in ("max_drop", "max_size", "min_sqnr", "time_limit")}
    for name, value in limit_values.items():
        if isinstance(value, float) and (value < 0 or value != value):
            raise OptionError(f"--{name.replace('_', '-')}", f"{value!r} is not at least 0")
    if given["time_limit"]:
        seconds(given["time_limit"], "--time-limit")
    request, loaded = resolve(
        model,
        given["passes"],
        given["target"],
        recipe=given["recipe"],
        out=given["out"],
        overwrite=given["overwrite"],
        calibration=given["calibration"],
        evaluation=given["evaluation"],
        metric_name=given["metric"],
        limits=Limits(**limit_values) if any(v is not None for v in limit_values.values()) else None,
        shapes=parse_shapes(given["shape"]),
        dims=parse_dims(given["dim"]),
        check=given["check"],
        verify=given["verify"],
        measure=given["measure"],
        guard=given["guard"],
        decisions=given["decisions"],
        emit=[kind for kind in given["emit"].split(",") if kind],
        seed=given["seed"],
        threads=given["threads"],
        cc=given["cc"] or os.environ.get("GRAPHOPT_CC") or None,
        fallback=given["fallback"],
        keep_opset=given["keep_opset"],
        extensions=given["ort_extension"],
        cache=cache_folder(),
        force=given["force"],
        disable=given["no_plugin"],
        pack=given["pack"],
        require_npu=given["require_npu"],
    )
    if given["dry_run"]:
        _show_plan(plan(request), as_json=given["as_json"])
        return ExitCode.OK
    with progress_on_stderr(quiet=given["quiet"]) as progress:
        result = run(request, loaded, progress)
    if given["depfile"]:
        _write_depfile(given["depfile"], result, [model, *_files(request)])
    if given["as_json"]:
        click.echo((result.path / "report.json").read_text("utf8"), nl=False)
    elif not given["quiet"]:
        from graphopt.report.terminal import render

        if result.up_to_date:
            click.echo(f"{result.path} is up to date")
        render(result.report, result.measured, out_console(), verbose=bool(given["verbose"]))
        click.echo(f"report   {result.path / 'report.html'}")
    return result.exit_code


def cache_folder() -> Path:
    """The user's cache folder, by the XDG base directory specification."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "graphopt"


def parse_shapes(texts: Sequence[str]) -> dict[str, tuple[int, ...]]:
    """Read `input=1x3x224x224`, also several separated by commas."""
    found: dict[str, tuple[int, ...]] = {}
    for name, value in _pairs("--shape", texts):
        sizes = [_size(f"--shape {name}", part) for part in value.split("x")] if value else []
        found[name] = tuple(sizes)
    return found


def parse_dims(texts: Sequence[str]) -> dict[str, int]:
    """Read `batch=1,seq=128`."""
    return {name: _size(f"--dim {name}", value) for name, value in _pairs("--dim", texts)}


def _pairs(option: str, texts: Sequence[str]) -> list[tuple[str, str]]:
    pairs: list[tuple[str, str]] = []
    for item in (part for text in texts for part in text.split(",")):
        name, equals, value = item.rpartition("=")
        if not equals or not name:
            raise OptionError(f"{option} {item!r}", "is not NAME=VALUE", f"write {option} name=1")
        pairs.append((name, value))
    return pairs


def _size(subject: str, text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise OptionError(subject, f"{text!r} is not a size", "sizes are whole numbers from 1")
    return int(text)


def _show_plan(plan: Mapping[str, Any], *, as_json: bool) -> None:
    import json

    if as_json:
        click.echo(json.dumps(plan, indent=1))
        return
    for name, value in plan.items():
        text = ", ".join(map(str, cast("list[str]", value))) if isinstance(value, list) else value
        click.echo(f"{name.replace('_', ' '):12} {text}")


def _files(request: Any) -> list[Path]:
    origins = [data.origin for data in (request.calibration, request.evaluation) if data is not None]
    return [*request.reads, *(Path(origin) for origin in origins if Path(origin).exists())]


def _write_depfile(path: Path, result: Result, inputs: Sequence[Path]) -> None:
    """Write `output: inputs` in make's format, which ninja and CMake read too."""
    target, *words = (str(item).replace(" ", "\\ ") for item in (result.path / "manifest.json", *inputs))
    path.write_text(f"{target}: {' '.join(words)}\n", "utf8")
