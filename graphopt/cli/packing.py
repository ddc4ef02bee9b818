"""`graphopt pack` and `graphopt unpack`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from graphopt.errors import ExitCode, UsageError

if TYPE_CHECKING:
    from graphopt.pack import Packed, Row

__all__ = ["pack_command", "unpack_command"]

_ENDING = ".gopt"
_SHOWN = 20


@click.command("pack")
@click.argument("model", type=click.Path(path_type=Path), metavar="MODEL|BUNDLE")
@click.option("-o", "--out", type=click.Path(path_type=Path), help="File to write.  [default: <model>.gopt]")
@click.option("--overwrite", is_flag=True, help="Replace a file that graphopt did not write.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.option("-v", "--verbose", is_flag=True, help="Show every tensor.")
def pack_command(model: Path, out: Path | None, *, overwrite: bool, as_json: bool, verbose: bool) -> int:
    """Pack a model into one small file, tensors entropy-coded; unpack gives it back byte for byte."""
    from graphopt.cli.console import out_console
    from graphopt.pack import pack
    from graphopt.records import to_text
    from graphopt.report.layout import print_lines

    # a bundle is named after its target as well, `model.ort`: its whole name stays
    out = out or Path(f"{model.resolve().name if model.is_dir() else model.stem}{_ENDING}")
    _check_file(out, model, overwrite=overwrite)
    packed = pack(model, out)
    if as_json:
        click.echo(to_text(packed), nl=False)
    else:
        from graphopt.report.layout import columns

        head = ("tensor", "type", "shape", "bytes", "packed", "of it", "coding")
        print_lines(columns(head, list(_rows(packed, verbose=verbose)), left=(0, 1, 2, 6)), out_console())
        click.echo(out)
    return ExitCode.OK


@click.command("unpack")
@click.argument("container", type=click.Path(path_type=Path), metavar="FILE")
@click.option("-o", "--out", type=click.Path(path_type=Path), help="Folder to write.  [default: FILE without .gopt]")
@click.option("--overwrite", is_flag=True, help="Write into a folder that holds something.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def unpack_command(container: Path, out: Path | None, *, overwrite: bool, as_json: bool) -> int:
    """Write the model of a packed file, as it was to the byte."""
    import json

    from graphopt.pack import unpack
    from graphopt.pack.decoder import has_native

    out = out or Path(container.stem if container.suffix == _ENDING else f"{container.name}.unpacked")
    if out.exists() and not out.is_dir():
        raise UsageError(f"-o {out}", "is a file, not a folder", "choose another with -o")
    if out.is_dir() and any(out.iterdir()) and not overwrite:
        raise UsageError(f"-o {out}", "exists and is not empty", "choose another, or write into it with --overwrite")
    if not has_native():
        click.echo("without the package constriction this takes longer; pip install 'graphopt[pack]'", err=True)
    files = unpack(container, out)
    if as_json:
        click.echo(
            json.dumps({"files": [{"path": str(path), "bytes": path.stat().st_size} for path in files]}, indent=1)
        )
    else:
        for path in files:
            click.echo(path)
    return ExitCode.OK


def _check_file(out: Path, model: Path, *, overwrite: bool) -> None:
    from graphopt.pack import is_container

    if out.is_dir():
        raise UsageError(f"-o {out}", "is a folder, not a file", "name a file")
    if out.exists() and model.exists() and out.samefile(model):
        raise UsageError(f"-o {out}", "is the input", "choose another file")
    if out.exists() and not overwrite and not is_container(out):
        raise UsageError(f"-o {out}", "exists and is no packed model", "choose another, or replace it with --overwrite")


def _rows(packed: Packed, *, verbose: bool) -> Iterator[Sequence[str]]:
    """The largest tensors, what is left of them, what is no tensor, and all together."""
    from graphopt.report.layout import cut

    tensors = sorted(packed.tensors, key=lambda row: -row.packed)
    shown = tensors if verbose else tensors[:_SHOWN]
    for row in shown:
        shape = "x".join(map(str, row.dims))
        yield cut(row.name, 40), row.dtype, shape, *_sizes(row.bytes, row.packed), row.coding.partition(",")[0]
    others: Sequence[Row] = tensors[len(shown) :]
    if others:
        of_others = sum(row.bytes for row in others), sum(row.packed for row in others)
        yield f"and {len(others)} more (-v shows them)", "", "", *_sizes(*of_others), ""
    yield "graph and small tensors", "", "", *_sizes(packed.graph, packed.graph_packed), "xz"
    yield "all", "", "", *_sizes(packed.bytes, packed.packed), ""


def _sizes(before: int, after: int) -> tuple[str, str, str]:
    from graphopt.report.figures import size

    return size(before), size(after), f"{100 * after / before:.1f} %" if before else ""
