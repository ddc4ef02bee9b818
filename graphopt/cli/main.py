"""Entry point: which verb is meant, and how every failure becomes one line and an exit code."""

from __future__ import annotations

import errno
import os
import signal
import sys
import traceback
from collections.abc import Sequence
from types import FrameType
from typing import Any, NoReturn

import click
from click.shell_completion import CompletionItem

from graphopt.cli.compile import compile_command
from graphopt.cli.verbs import VERBS
from graphopt.errors import ExitCode, GraphoptError

__all__ = ["main"]


class _Graphopt(click.Group):
    """A group whose missing verb means compile."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if args and args[0] not in self.commands and args[0] not in ("--help", "-h", "--version"):
            args = ["compile", *args]
        return super().parse_args(ctx, args)

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        """Offer verbs, and what compile takes: options and model files."""
        # files come first: bash turns to them where no verb fits
        files = [] if incomplete.startswith("-") else [CompletionItem(incomplete, type="file")]
        own = super().shell_complete(ctx, incomplete)
        known = {item.value for item in own}
        options = [item for item in compile_command.shell_complete(ctx, incomplete) if item.value not in known]
        return [*files, *own, *options]

    def format_usage(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        formatter.write_usage("graphopt", "MODEL [OPTIONS]")
        formatter.write_usage("graphopt", "VERB ...", prefix="       ")

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        compile_command.format_options(ctx, formatter)
        self.format_commands(ctx, formatter)

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Exit codes"):
            formatter.write_dl(
                [
                    ("0", "done"),
                    ("1", "a pass failed"),
                    ("2", "the command, the model, the data or the output folder cannot be used"),
                    ("3", "a plugin is broken or clashes with another"),
                    ("4", "a limit was missed; the best result was written all the same"),
                    ("5", "the backend cannot compile the model, or lacks a tool"),
                    ("6", "the output could not be written"),
                    ("70", "a bug in graphopt"),
                    ("130", "interrupted"),
                ]
            )


@click.group(
    cls=_Graphopt,
    commands={"compile": compile_command, **VERBS},
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
    no_args_is_help=True,
)
@click.version_option(package_name="graphopt", message="graphopt %(version)s")
def _command() -> None:
    """Prune, quantize, compile and check any ONNX model.

    MODEL is an ONNX file; a folder comes out that holds the optimized model, what was compiled for the target, and a
    report. A file that is called like a verb is written ./NAME.
    """


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Run the command and exit with its code."""
    signal.signal(signal.SIGTERM, _terminated)
    sys.exit(int(_run(list(sys.argv[1:] if argv is None else argv))))


def _run(argv: list[str]) -> int:
    try:
        result: Any = _command.main(argv, prog_name="graphopt", standalone_mode=False)
    except GraphoptError as e:
        if _was_interrupted(e):
            return _interrupted()
        if any(word in argv for word in ("-v", "-vv", "--verbose")) and e.__cause__ is not None:
            traceback.print_exception(e.__cause__)
        return _say(str(e), e.exit_code)
    except click.exceptions.NoArgsIsHelpError as e:
        click.echo(e.ctx.get_help() if e.ctx else "")
        return ExitCode.USAGE
    except click.ClickException as e:
        return _say(" ".join(e.format_message().split()).removesuffix("."), ExitCode.USAGE)
    except (KeyboardInterrupt, click.Abort):
        return _interrupted()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return ExitCode.OK
    except OSError as e:
        if e.errno in (errno.ENOSPC, errno.EDQUOT):
            place = e.filename or "a temporary folder"
            return _say(f"{place}: {(e.strerror or '').lower()}; free some space or set TMPDIR", ExitCode.CANNOT_WRITE)
        return _bug(e)
    except Exception as e:
        return _interrupted() if _was_interrupted(e) else _bug(e)
    return result if isinstance(result, int) else ExitCode.OK


def _was_interrupted(e: BaseException | None) -> bool:
    """True where Ctrl-C came while a library was being imported, which some of them report as an ImportError."""
    return e is not None and (isinstance(e, KeyboardInterrupt) or _was_interrupted(e.__cause__ or e.__context__))


def _interrupted() -> int:
    return _say("interrupted; nothing was written", ExitCode.INTERRUPTED)


def _say(text: str, code: ExitCode) -> int:
    click.echo(f"graphopt: {text}", err=True)
    return code


def _bug(e: BaseException) -> int:
    from importlib.metadata import version

    traceback.print_exception(e)
    return _say(f"internal error: this is a bug in graphopt {version('graphopt')}; please report it", ExitCode.INTERNAL)


def _terminated(number: int, frame: FrameType | None) -> None:  # noqa: ARG001
    raise KeyboardInterrupt
