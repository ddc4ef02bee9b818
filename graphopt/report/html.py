"""`report.html` and `measured/report.html`: one file each, no scripts, nothing fetched, the same bytes every time."""

from __future__ import annotations

from collections.abc import Iterator

from graphopt.measured import Breakdown, Measured, Measurement
from graphopt.report.data import Report
from graphopt.report.estimates import estimated_ms, estimates
from graphopt.report.figures import (
    accuracy_change,
    fidelity_text,
    limit_text,
    macs_text,
    milliseconds,
    number,
    packed_bytes,
    plural,
    quantity,
    rate_texts,
    ratio,
    runs_text,
    score,
    size,
    slower,
    speedup,
    untimed,
    worst,
)
from graphopt.report.markup import EMPTY, Markup, join, page, tag
from graphopt.report.plots import bar, pair, time_bar
from graphopt.report.sections import (
    backend,
    fidelity,
    heads,
    how_badge,
    layers,
    model,
    reproduce,
    section,
    steps,
    table,
)

__all__ = ["render_html", "render_measured_html"]

_BEYOND_QUARTILE = 1.2  # one slow run must not squeeze all bars


def render_html(report: Report) -> str:
    """Make the page of a run."""
    body = (
        _header(report),
        tag("div", *_cards(report), cls="cards"),
        _remarks(report),
        heads(report),
        layers(report),
        estimates(report),
        steps(report),
        fidelity(report),
        backend(report),
        model(report),
        reproduce(report),
        _footer(report.version, "Everything here follows from the input: the same input gives the same page."),
    )
    return page(f"{report.model} for {report.target}", *body)


def render_measured_html(report: Report | None, measured: Measured) -> str:
    """Make the page of a benchmark; `report` is the bundle's, None where plain models were measured."""
    subjects = list(dict.fromkeys(row.subject for row in measured.rows))
    title = f"{report.model} for {report.target}" if report else ", ".join(subjects)
    body = (
        tag("header", tag("div", "graphopt benchmark", cls="eyebrow"), tag("h1", title)),
        *(_latency(measured, threads) for threads in sorted({row.threads for row in measured.rows})),
        _slow(measured),
        *(_kernels(part) for part in measured.breakdowns),
        _unmeasured(measured),
        _machine(measured),
        _footer(report.version if report else None, "Times hold for this machine and this moment only."),
    )
    return page(f"Benchmark: {title}", *body)


def _header(report: Report) -> Markup:
    chips = [tag("span", step.step, cls="chip") for step in report.steps] or [tag("span", "no passes", cls="chip")]
    word, mood = ("ok", "good") if report.ok else ("attention", "bad")
    told = "every limit is met" if report.limits else "finished; no limit was set"
    verdict = tag("div", tag("span", word), tag("span", told if report.ok else report.verdict), cls=f"verdict {mood}")
    title = tag("h1", report.model, " ", tag("span", "\u2192", cls="to"), " ", report.target)
    return tag("header", tag("div", "graphopt report", cls="eyebrow"), title, tag("div", *chips, cls="chips"), verdict)


def _cards(report: Report) -> Iterator[Markup]:
    old, new = report.before, report.after
    files = (size(old.file_bytes), size(new.file_bytes))
    bars = [pair(*_sizes(report), *files)]
    if (packed := packed_bytes(report)) is not None:
        bars.append(tag("div", f"packed {size(packed)}, {ratio(old.file_bytes, packed)}", cls="small soft"))
    yield _card("File size", ratio(*_sizes(report)), "of the original", "counted", *bars)
    macs = (old.totals.macs, new.totals.macs)
    yield _card("MACs", ratio(*macs) or "unknown", "", "counted", pair(*macs, macs_text(old), macs_text(new)))
    params = (old.totals.params, new.totals.params)
    texts = (quantity(params[0]), quantity(params[1]))
    yield _card("Parameters", ratio(*params) or "none", "", "counted", pair(*params, *texts))
    if (got := report.accuracy) is not None:
        bars = pair(got.before, got.after, score(got.metric, got.before), score(got.metric, got.after))
        yield _card(f"Accuracy, {got.metric}", score(got.metric, got.after), accuracy_change(got), got.how, bars)
    else:
        yield _distance_card(report)
    if report.backend is not None and (found := report.backend.estimates):
        cycles = tag("div", f"{quantity(sum(part.cycles for part in found))} cycles of one run", cls="small soft")
        yield _card("Device time", milliseconds(estimated_ms(found)), "", "estimated", cycles)


def _sizes(report: Report) -> tuple[int, int]:
    return report.before.file_bytes, report.after.file_bytes


def _distance_card(report: Report) -> Markup:
    """Without labels the distance from the original stands where accuracy would."""
    output = worst(report.fidelity)
    text = tag("div", fidelity_text(report.fidelity), cls="small soft")
    if report.fidelity.not_run is not None or output is None:
        return _card("Fidelity", "not checked", "", "", text)
    return _card("Fidelity", f"{number(output.sqnr_db)} dB", "SQNR", report.fidelity.how, text)


def _card(label: str, big: str, small: str, how: str, *body: str) -> Markup:
    head = tag("div", tag("span", label), how_badge(how) if how else EMPTY, cls="label")
    figure = tag("div", big, tag("small", small) if small else EMPTY, cls="big")
    return tag("div", head, figure, *body, cls="card")


def _remarks(report: Report) -> Markup:
    """Limits and notes: what a reader must not miss."""
    items = [tag("li", _met(limit.met), " ", limit_text(limit, verdict=False)) for limit in report.limits]
    items += [tag("li", tag("span", "note", cls="badge warn"), " ", note) for note in report.notes]
    return section("Limits and notes", "", tag("ul", *items, cls="notes")) if items else EMPTY


def _met(met: bool) -> Markup:
    return tag("span", "met" if met else "missed", cls=f"badge {'good' if met else 'bad'}")


def _footer(version: str | None, text: str) -> Markup:
    return tag("footer", f"Made by graphopt{f' {version}' if version else ''}. {text}")


def _latency(measured: Measured, threads: int) -> Markup:
    """Latency of all timed rows with one number of threads, as bars and as a table."""
    rows = [row for row in measured.rows if row.threads == threads and row.times is not None]
    if not rows:
        return EMPTY
    largest = _BEYOND_QUARTILE * max(row.times.high for row in rows if row.times)
    first = measured.find("original", threads=threads)
    head = ("", "latency", "median", "quartiles", "against the original", "peak memory", "deployed", "how")
    body = [_latency_row(row, largest, first) for row in rows]
    lead = "Bars reach to the median; the box spans the quartiles, the line all runs as far as there is room."
    return section(f"Latency, {plural(threads, 'thread')}", lead, table(head, body, numbers=(2, 3, 4, 5, 6)))


def _latency_row(row: Measurement, largest: float, first: Measurement | None) -> tuple[str, ...]:
    times = row.times
    if times is None:
        raise ValueError(f"{row.subject} was not timed")
    label = f"{row.subject}, {row.engine}"
    fill = "f-before" if row.side == "original" else "f-accent"
    against = "" if row is first or first is None or first.times is None else speedup(first.times.median, times.median)
    name = tag("div", tag("div", row.subject, cls="name"), tag("div", f"{row.engine}, {row.side}", cls="small soft"))
    plot = tag("div", time_bar(times, largest, fill, f"{label}: {milliseconds(times.median)}"), style="min-width:150px")
    quartiles = f"{milliseconds(times.low)} to {milliseconds(times.high)}"
    memory = "" if row.peak_memory_mb is None else f"{row.peak_memory_mb:,.0f} MB"
    figures = (milliseconds(times.median), quartiles, against, memory, size(row.file_bytes))
    return name, plot, *figures, how_badge(row.how)


def _kernels(part: Breakdown) -> Markup:
    """Where the time of a compiled model goes."""
    largest = max((kernel.share for kernel in part.kernels), default=1.0)
    head = ("kernel", "share of the time", "", "calls", "GOP/s", "of peak", "runner")
    body = [
        (
            tag("div", tag("div", k.kernel, cls="name"), tag("div", k.sites, cls="small soft")),
            tag(
                "div", bar(k.share, largest, "f-accent", f"{k.kernel}: {100 * k.share:.1f} %"), style="min-width:150px"
            ),
            f"{100 * k.share:.1f} %",
            str(k.calls),
            *rate_texts(k),
            tag("span", k.runner, style="white-space:nowrap"),
        )
        for k in part.kernels
    ]
    lead = (
        "Billions of multiplications and additions a second, and their share of what the cores can do in their "
        "registers, measured in the same run. Below each kernel stand the nodes that its first call computes."
    )
    title = f"Kernels of {part.subject}, {part.engine}, {plural(part.threads, 'thread')}"
    return section(title, lead, table(head, body, numbers=(2, 3, 4, 5)))


def _slow(measured: Measured) -> Markup:
    items = [tag("li", tag("span", "note", cls="badge warn"), " ", text) for text in slower(measured)]
    if advice := measured.advice():
        items.append(tag("li", tag("span", "advice", cls="badge good"), " ", advice))
    return section("Notes", "", tag("ul", *items, cls="notes")) if items else EMPTY


def _unmeasured(measured: Measured) -> Markup:
    """Rows without a time: emulated, only compiled, or not run."""
    rows = [row for row in measured.rows if row.times is None]
    if not rows:
        return EMPTY
    head = ("", "engine", "threads", "result", "deployed", "how")
    body = [
        (tag("span", row.subject, cls="name"), row.engine, str(row.threads), untimed(row), size(row.file_bytes),
         how_badge(row.how)) for row in rows
    ]  # fmt: skip
    lead = "Checked for agreement or only compiled. An emulator's time says nothing about the device, so none is given."
    return section("Without a time", lead, table(head, body, numbers=(2, 4)))


def _machine(measured: Measured) -> Markup:
    machine = measured.machine
    facts = [
        ("Processor", machine.cpu),
        ("Cores", str(machine.cores)),
        ("Memory", f"{machine.memory_mb:,} MB"),
        ("System", machine.system),
        *sorted(machine.versions.items()),
        ("Date", machine.date),
    ]
    if runs := runs_text(measured):
        facts.append(("Runs", runs))
    return section("Machine", "", tag("dl", *(join((tag("dt", k), tag("dd", v))) for k, v in facts)))
