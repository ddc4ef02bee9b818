from __future__ import annotations

import io
from dataclasses import replace

import pytest
from rich.console import Console

from graphopt.measured import Measured, Times
from graphopt.pass_base import Change
from graphopt.report.data import Report
from graphopt.report.terminal import render, render_bench


def printed(report: Report, measured: Measured | None = None, *, width: int = 80, **options: bool) -> str:
    stream = io.StringIO()
    render(report, measured, Console(file=stream, width=width), **options)
    return stream.getvalue()


@pytest.mark.parametrize("name", ["report", "hostile", "nothing_run"])
def test_nothing_but_plain_text_goes_into_a_pipe(name: str, request: pytest.FixtureRequest, measured: Measured) -> None:
    text = printed(request.getfixturevalue(name), measured)
    assert "\x1b" not in text
    assert text.replace("\n", "").isprintable()
    assert not any(line != line.rstrip() for line in text.splitlines())


def test_everything_fits_into_80_columns(report: Report, measured: Measured) -> None:
    assert max(map(len, printed(report, measured).splitlines())) <= 80


def test_the_table_shows_size_cost_accuracy_latency_and_kernel(report: Report, measured: Measured) -> None:
    text = printed(report, measured)
    for line in (
        "file size             1.09 MB   262 kB         0.24x  counted",
        "MACs                   40.8 M   28.7 M         0.70x  counted",
        "top1 (1,000 samples)  92.40 %  91.70 %  -0.70 points  executed",
        "latency (1 thread)    4.00 ms  2.00 ms  2.00x faster  executed",
        "kernel      model.so, 412 kB, for arm:cortex-a76 (emulated)",
        "agreement   agrees: top-1 agreement 100.00 %, max diff 0.0117 (tolerance 0.02)",
        "verdict     ok",
    ):
        assert line in text.splitlines()


def test_emulated_rows_add_no_latency(report: Report, measured: Measured) -> None:
    emulated = replace(measured, rows=measured.rows[2:])
    assert "latency" not in printed(report, emulated)
    assert "latency" not in printed(report)


def test_a_kernel_that_was_executed_has_its_latency_beside_the_models(report: Report, measured: Measured) -> None:
    kernel = replace(measured.rows[1], engine="x86", times=Times(8.0, 7.0, 7.5, 9.0, 10.0))
    text = printed(report, replace(measured, rows=(*measured.rows[:2], kernel)))
    assert "latency (1 thread)     4.00 ms  2.00 ms  2.00x faster  executed" in text
    assert "x86 kernel (1 thread)  4.00 ms  8.00 ms  2.00x slower  executed" in text
    assert "note        the result is 2.00x slower than the original in ONNX Runtime (x86, 1" in text


def test_a_kernel_that_did_not_run_is_compiled_only(report: Report) -> None:
    why = "compiled only: qemu-aarch64 not found"
    backend = replace(report.backend, how="compiled only", agreement=None, not_run=why)
    text = printed(replace(report, backend=backend))
    assert "kernel      model.so, 412 kB, for arm:cortex-a76 (compiled only)" in text
    assert f"agreement   {why}" in text


def test_reasons_are_counted_and_verbose_names_every_site(report: Report) -> None:
    many = tuple(Change.skipped(f"layer{i}", "weight is not constant") for i in range(9))
    report = replace(report, steps=(replace(report.steps[2], changes=many),))
    short, long = printed(report), printed(report, verbose=True)
    assert "left alone  9 x quant: weight is not constant (layer0, layer1, layer2, ...)" in short
    assert "layer8" not in short
    assert all(f"layer{i}" in long for i in range(9))


def test_too_many_reasons_are_summed_up_without_verbose(report: Report) -> None:
    many = tuple(Change.skipped(f"layer{i}", f"reason {name}") for i, name in enumerate("abcdefghijkl"))
    report = replace(report, steps=(replace(report.steps[2], changes=many),))
    assert "4 more reasons; -v and report.html name all" in printed(report)
    assert "more reasons" not in printed(report, verbose=True)


def test_reasons_that_differ_in_a_figure_are_one(report: Report) -> None:
    many = tuple(Change.skipped(f"layer{i}", f"noise of 0.{i} %") for i in range(3))
    same = tuple(Change.skipped(f"other{i}", "noise of 5 % at the output") for i in range(2))
    report = replace(report, steps=(replace(report.steps[2], changes=(*many, *same)),))
    assert "3 x quant: noise of … % (layer0, layer1, layer2)" in printed(report)
    assert "2 x quant: noise of 5 % at the output (other0, other1)" in printed(report)


def test_markup_in_names_is_printed_and_not_obeyed(hostile: Report) -> None:
    stream = io.StringIO()
    render(hostile, None, Console(file=stream, width=200, force_terminal=True, color_system="truecolor"))
    assert "[bold red]" in stream.getvalue()
    assert "\x1b[31m\\" not in stream.getvalue()
    assert "\u202e" not in stream.getvalue()


def test_a_missed_limit_and_its_verdict_are_said(report: Report) -> None:
    limit = replace(report.limits[0], got=2.5, met=False)
    text = printed(replace(report, limits=(limit,), verdict="--max-drop missed: the best seen is written"))
    assert "limit       --max-drop at most 1.00 points, got 2.50 points: MISSED" in text
    assert "verdict     --max-drop missed: the best seen is written" in text


def test_notes_are_said(report: Report) -> None:
    assert "note        the result is larger than its input" in printed(
        replace(report, notes=("the result is larger than its input",))
    )


def test_a_terminal_gets_colour(report: Report) -> None:
    stream = io.StringIO()
    render(report, None, Console(file=stream, width=80, force_terminal=True, color_system="standard"))
    assert "\x1b[" in stream.getvalue()


def test_the_benchmark_compares_with_the_original_and_keeps_emulated_rows_apart(measured: Measured) -> None:
    stream = io.StringIO()
    render_bench(measured, Console(file=stream, width=80))
    lines = stream.getvalue().splitlines()
    assert lines[0] == "executed, 1 thread"
    assert lines[3] == "resnet20.arm   onnxruntime  2.00 ms     8 %    2.00x   68 MB    262 kB  0.24x"
    emulated = [line for line in lines if line.startswith("emulated")]
    assert len(emulated) == 1
    assert " ms" not in emulated[0]
    assert "(no time)" in stream.getvalue()
    assert max(map(len, lines)) <= 80


def test_a_benchmark_of_nothing_but_failures_still_prints(measured: Measured) -> None:
    failed = replace(measured.rows[2], how="compiled only", agrees=None, not_run="compiled only: no emulator")
    stream = io.StringIO()
    render_bench(replace(measured, rows=(failed,)), Console(file=stream, width=80))
    assert "compiled only: no emulator" in " ".join(stream.getvalue().split())
