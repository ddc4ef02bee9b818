"""Sections of the page: layers, steps, fidelity, the backend, the model, and how to make it again."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence

from graphopt.pass_base import Change, Scalar
from graphopt.report.data import LayerRow, Port, Report, StepReport
from graphopt.report.figures import agreement_text, count, number, plural, quantity, ratio, scalar, size
from graphopt.report.heads import is_of_head, maps
from graphopt.report.markup import EMPTY, Markup, join, tag
from graphopt.report.plots import layer_bars

__all__ = ["backend", "fidelity", "heads", "how_badge", "layers", "model", "reproduce", "section", "steps", "table"]

_SHOWN_LAYERS = 60
_MOODS = {"executed": "good", "emulated": "warn", "compiled only": "warn", "estimated": "warn"}
_LEGEND = (("before", "before"), ("accent", "after, changed"), ("alone", "after, left alone"), ("gone", "gone"))


def section(title: str, lead: str, *body: str) -> Markup:
    """A titled box."""
    return tag("section", tag("h2", title), tag("p", lead, cls="lead") if lead else EMPTY, *body)


def table(head: Sequence[str], rows: Iterable[Sequence[str]], *, numbers: Collection[int] = ()) -> Markup:
    """A table that scrolls by itself on a narrow page; `numbers` are the columns to set flush right."""
    classes = ["num" if i in numbers else None for i in range(len(head))]
    top = tag("tr", *(tag("th", cell, cls=cls) for cell, cls in zip(head, classes, strict=True)))
    body = [tag("tr", *(tag("td", c, cls=cls) for c, cls in zip(row, classes, strict=True))) for row in rows]
    return tag("div", tag("table", tag("thead", top), tag("tbody", *body)), cls="scroll")


def how_badge(how: str) -> Markup:
    """A word that says how a figure was obtained."""
    return tag("span", how, cls=f"badge how {_MOODS.get(how, '')}".strip())


# ---------------------------------------------------------------- layers


def layers(report: Report) -> Markup:
    """Every layer with weights: what it cost, what it costs, and why."""
    if not report.layers:
        return EMPTY
    most_macs, most_bytes = _largest(report.layers, "macs"), _largest(report.layers, "bytes")
    rows = [_layer(row, most_macs, most_bytes) for row in report.layers]
    legend = [tag("span", tag("i", cls=f"i-{name}"), text) for name, text in _LEGEND]
    head = tag("div", *(tag("div", text) for text in ("layer", "MACs", "weights", "what happened")), cls="layer head")
    rest = rows[_SHOWN_LAYERS:]
    more = tag("details", tag("summary", f"{plural(len(rest), 'more layer')}"), *rest) if rest else EMPTY
    lead = (
        f"{plural(len(report.layers), 'layer')} with weights, counted, in the order of the original; one scale for all."
    )
    return section("Layers", lead, tag("div", *legend, cls="legend"), head, *rows[:_SHOWN_LAYERS], more)


def _layer(row: LayerRow, most_macs: int, most_bytes: int) -> Markup:
    before, after = row.before, row.after
    fill = "f-gone" if after is None else "f-accent" if row.changed else "f-alone"
    macs = (before.macs, after.macs if after else 0)
    weights = (before.weight_bytes, after.weight_bytes if after else 0)
    name = tag("div", tag("div", row.name, cls="name"), tag("div", row.operator, cls="small soft"))
    notes = [tag("div", note.step, ": ", note.action, cls="done" if note.done else "skip") for note in row.notes]
    if after is None and not any(note.replaced for note in row.notes):
        notes.append(tag("div", "gone: merged into another layer, or removed", cls="soft"))
    elif after is not None and not row.notes:
        notes.append(tag("div", "no step looked at it", cls="soft"))
    return tag(
        "div", name, _cost("MACs", macs, most_macs, quantity, fill), _cost("weights", weights, most_bytes, size, fill),
        tag("div", *notes, cls="small"), cls="layer",
    )  # fmt: skip


def _cost(
    what: str, values: tuple[int | None, int | None], largest: int, text: Callable[[int | None], str], fill: str
) -> Markup:
    if values == (0, 0):
        return tag("div")
    before, after = (text(value) for value in values)
    line = tag("div", f"{before} \u2192 ", tag("b", after), f" {ratio(*values)}" if values[1] else "", cls="cost")
    return tag("div", line, layer_bars(*values, largest, fill, f"{what}: {before} before, {after} after"))


def _largest(rows: Iterable[LayerRow], what: str) -> int:
    costs = [cost for row in rows for cost in (row.before, row.after) if cost is not None]
    return max((cost.macs or 0 if what == "macs" else cost.weight_bytes for cost in costs), default=0)


def heads(report: Report) -> Markup:
    """What heads of attention keep, layer by layer, where a pass tells."""
    pictures = maps(report)
    lead = (
        "Percent of what each head attended to that it still sees, on calibration data: layers from top to bottom, "
        "heads from left to right. Darker cells keep more; letters say what a head sees."
    )
    return section("Attention kept", lead, *pictures) if pictures else EMPTY


# ---------------------------------------------------------------- steps


def steps(report: Report) -> Markup:
    """The pipeline, step by step, with every change and every reason."""
    if not report.steps:
        return section("Steps", "No pass was asked for: the model ships as it came.")
    head = ("step", "sites changed", "left alone", "weights", "MACs", "nodes")
    rows = [
        (tag("code", step.step), count(len(step.done)), count(len(step.left_alone)), *_totals(step))
        for step in report.steps
    ]
    lead = "What each pass did, site by site, and why it left the others alone. Open a step to read it."
    return section(
        "Steps", lead, table(head, rows, numbers=range(1, 6)), tag("h3", "Site by site"), *map(_step, report.steps)
    )


def _totals(step: StepReport) -> tuple[str, str, str]:
    if step.after is None:
        return "", "", ""
    return size(step.after.weight_bytes), quantity(step.after.macs), count(step.after.nodes)


def _step(step: StepReport) -> Markup:
    badges = [
        _badge("lossy" if step.lossy else "lossless", "accent" if step.lossy else "good"),
        _badge("changed the model" if step.modified else "no change", "accent" if step.modified else ""),
    ]
    if step.left_alone:
        badges.append(_badge(f"{len(step.left_alone)} left alone", "warn"))
    facts = _facts(step.metrics) if step.metrics else EMPTY
    rows = [_change(change) for change in (*step.done, *step.skipped)]
    body = table(("site", "what happened", "figures"), rows) if rows else tag("p", "It looked at no site.", cls="soft")
    return tag("details", tag("summary", tag("code", step.step), *badges), tag("div", facts, body, cls="inside"))


def _change(change: Change) -> tuple[str, str, str]:
    details = sorted((key, value) for key, value in change.details.items() if not is_of_head(key))
    figures = ", ".join(f"{key} {scalar(value)}" for key, value in details)
    site = tag("span", change.site, cls="name")
    return site, tag("span", change.action, cls="done" if change.done else "skip"), tag("span", figures, cls="soft")


def _badge(text: str, mood: str) -> Markup:
    return tag("span", text, cls=f"badge {mood}".strip())


def _facts(facts: Mapping[str, Scalar]) -> Markup:
    return _definitions((key.replace("_", " "), scalar(value)) for key, value in sorted(facts.items()))


def _definitions(items: Iterable[tuple[str, str]]) -> Markup:
    return tag("dl", *(join((tag("dt", key), tag("dd", value))) for key, value in items))


# ---------------------------------------------------------------- checks


def fidelity(report: Report) -> Markup:
    """The result against the original, output by output."""
    found = report.fidelity
    title = "Fidelity"
    if found.not_run is not None:
        return section(title, "How far the result is from the original.", _badge("not run", "warn"), " ", found.not_run)
    head = ("output", "SQNR", "largest difference", "mean difference", "range of the original", "cosine", "same top-1")
    rows = [
        (
            tag("span", out.name, cls="name"),
            "NaN in the result" if out.nan else f"{number(out.sqnr_db)} dB",
            number(out.max_abs),
            number(out.mean_abs),
            f"{number(out.reference_min)} to {number(out.reference_max)}",
            number(out.cosine, 6),
            "" if out.top1_agreement is None else f"{out.top1_agreement:.2f} %",
        )
        for out in found.outputs
    ]
    text = f"The result against the original in ONNX Runtime on {plural(found.samples, 'sample')}, {found.inputs}: "
    return section(title, join((text, how_badge(found.how))), table(head, rows, numbers=range(1, 7)))


def backend(report: Report) -> Markup:
    """What was made for the target, and how it was checked."""
    made = report.backend
    if made is None:
        return section("Target", f"{report.target} runs model.onnx as it is: nothing was compiled.")
    items: list[tuple[str, str]] = [("Target", made.target), ("Backend", made.backend)]
    if made.kernel is not None:
        items.append(("Kernel file", join((tag("code", made.kernel), ", ", size(made.kernel_bytes)))))
    items.append(("Agreement with model.onnx", agreement_text(made)))
    if made.agreement is not None:
        items.append(("Checked on", f"{plural(made.agreement.samples, 'sample')}, {made.agreement.inputs}"))
    items += [(key, scalar(value)) for key, value in sorted(made.facts.items())]
    if made.files:
        items.append(("Files", ", ".join(made.files)))
    parts: tuple[Markup, ...] = ()
    for title, found in (("Left to the host", made.declined), ("Run by ONNX Runtime", made.fallbacks)):
        rows = [(tag("span", f.site, cls="name"), f.operator, f.reason) for f in found]
        parts += (tag("h3", title), table(("node", "operator", "reason"), rows)) if rows else ()
    runners = [(r.operator, r.runner, count(r.nodes)) for r in made.runners]
    if runners:
        parts += (tag("h3", "What runs each operator"), table(("operator", "runner", "nodes"), runners, numbers=(2,)))
    lead = join(("How its results were obtained: ", how_badge(made.how)))
    return section("Target", lead, _definitions(items), *parts)


# ---------------------------------------------------------------- the model, and making it again


def model(report: Report) -> Markup:
    """Interface and operators, before and after."""
    before, after = report.before, report.after
    names = sorted({*before.operators, *after.operators})
    rows = [(name, count(before.operators.get(name, 0)), count(after.operators.get(name, 0))) for name in names]
    ports = [("input", port) for port in after.inputs] + [("output", port) for port in after.outputs]
    nodes = f"{count(before.totals.nodes)} nodes before, {count(after.totals.nodes)} after."
    return section(
        "Model",
        nodes,
        table(("", "name", "type", "shape"), [_port(kind, port) for kind, port in ports]) if ports else EMPTY,
        tag("h3", "Opset"),
        tag("p", f"{_opsets(before.opsets)} before, {_opsets(after.opsets)} after"),
        _unknown(after.macs_unknown),
        tag("details", tag("summary", "Operators"), tag("div", _operators(rows), cls="inside")),
    )


def _operators(rows: Sequence[Sequence[str]]) -> Markup:
    return table(("operator", "before", "after"), rows, numbers=(1, 2))


def _port(kind: str, port: Port) -> tuple[str, str, str, str]:
    return kind, tag("span", port.name, cls="name"), port.dtype, port.shape


def _opsets(opsets: Mapping[str, int]) -> str:
    return ", ".join(f"{domain} {version}" for domain, version in sorted(opsets.items())) or "unknown"


def _unknown(sites: Sequence[str]) -> Markup:
    if not sites:
        return EMPTY
    return tag("p", _badge("MACs unknown", "warn"), f" {plural(len(sites), 'node')}: {', '.join(sites)}", cls="small")


def reproduce(report: Report) -> Markup:
    """Everything the bytes of this bundle depend on."""
    items: list[tuple[str, str]] = [
        ("Pipeline", tag("code", report.pipeline)),
        ("Seed", str(report.seed)),
        ("Input", join((report.model, " ", _digest(report.digest)))),
    ]
    for data in report.data:
        samples = f", {plural(data.samples, 'sample')}" if data.samples is not None else ""
        items.append((data.role.capitalize(), join((f"{data.origin}{samples} ", _digest(data.digest)))))
    items += [("Shape", f"{name} = {shape}") for name, shape in sorted(report.shapes.items())]
    items += [(name, version) for name, version in sorted({"graphopt": report.version, **report.versions}.items())]
    items += [("File", f"{entry.name}, {size(entry.bytes)}") for entry in report.files]
    command = tag("pre", report.command) if report.command else EMPTY
    return section(
        "Make it again", "The same input and these settings give the same bytes.", command, _definitions(items)
    )


def _digest(digest: str | None) -> Markup:
    return tag("code", f"sha256 {digest}", cls="soft") if digest else tag("span", "no digest", cls="soft")
