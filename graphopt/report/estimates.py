"""What compilers say of speed on a device that nobody ran: on the page, and in one line."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import groupby

from graphopt.backend_base import Estimate, EstimatedStep
from graphopt.report.data import Report
from graphopt.report.figures import clean, milliseconds, plural, quantity, size
from graphopt.report.markup import EMPTY, Markup, join, tag
from graphopt.report.plots import bar
from graphopt.report.sections import how_badge, section, table

__all__ = ["estimate_line", "estimated_ms", "estimates"]

_SHOWN = 60
_KINDS = 3
_ONE_LINE = "white-space:nowrap"


def estimates(report: Report) -> Markup:
    """What each part would take, and where its cycles go."""
    found = report.backend.estimates if report.backend else ()
    if not found:
        return EMPTY
    largest = max((layer.cycles for part in found for layer in _layers(part)), default=0)
    head = ("part", "time", "cycles", "MACs", "multipliers busy", "memory in use", "moved by a run", "weights")
    rows = [_part(part) for part in found]
    if len(found) > 1:
        macs = quantity(sum(part.macs for part in found))
        rows.append(("all", _time(found), quantity(sum(part.cycles for part in found)), macs, "", "", "", ""))
    lead = join(("By a model of the hardware, ", how_badge(_by(found)), ": nothing was run. ", _settings(found)))
    numbers = range(1, 5)
    return section("Estimates", lead, table(head, rows, numbers=numbers), *(_steps(part, largest) for part in found))


def estimate_line(found: Sequence[Estimate]) -> tuple[str, str]:
    """All parts in one line, and who says so for what."""
    cycles, macs = sum(part.cycles for part in found), sum(part.macs for part in found)
    most = sum(part.macs / part.utilisation for part in found if part.utilisation)
    words = [_time(found), f"{quantity(cycles)} cycles"]
    words += [f"multipliers {_percent(macs / most)} busy"] if most else []
    words += [f"{clean(name)} {size(used)}" for name, used in _most(found).items()]
    return ", ".join(words), f"{clean(_by(found))}: {clean(_settings(found))}"


def estimated_ms(found: Iterable[Estimate]) -> float:
    """Milliseconds that one run of all parts would take, one after the other."""
    return 1000 * sum(part.seconds for part in found)


def _part(part: Estimate) -> tuple[str, ...]:
    weights = f"{size(part.weight_bytes)} \u2192 {size(part.encoded_bytes)}" if part.encoded_bytes else "none"
    name = tag("span", part.part, cls="name", style=_ONE_LINE)
    figures = (_time([part]), quantity(part.cycles), quantity(part.macs), _percent(part.utilisation))
    return name, *figures, _sizes(part.memory), _sizes(part.traffic), tag("span", weights, style=_ONE_LINE)


def _steps(part: Estimate, largest: int) -> Markup:
    """Layers of a part with a bar for the cycles of each, on one scale for all parts."""
    if not part.steps:
        return EMPTY
    rows = [_step(layer, part, largest) for layer in _layers(part)]
    head = ("layer", "cycles", "", "of the part", "waits for", "MACs", "multipliers busy", "memory")
    first, rest = rows[:_SHOWN], rows[_SHOWN:]
    numbers = (2, 3, 5, 6, 7)
    more = EMPTY
    if rest:
        more = tag("details", tag("summary", plural(len(rest), "more layer")), table(head, rest, numbers=numbers))
    return join((tag("h3", f"Layers of {part.part}"), table(head, first, numbers=numbers), more))


def _layers(part: Estimate) -> Iterator[EstimatedStep]:
    """Steps in order, neighbours that compute the same nodes as one."""
    for sites, steps in groupby(part.steps, key=lambda step: step.sites):
        neighbours = list(steps)
        yield from [_together(neighbours)] if sites else neighbours


def _together(steps: Sequence[EstimatedStep]) -> EstimatedStep:
    """One step that stands for several: they run one after the other."""
    if len(steps) == 1:
        return steps[0]
    kinds = list(dict.fromkeys(step.operator for step in steps))
    more = ", ..." if len(kinds) > _KINDS else ""
    cycles, busy = sum(step.cycles for step in steps), Counter[str]()
    for step in steps:
        busy.update(step.busy)
    return EstimatedStep(
        name=plural(len(steps), "step"),
        operator=", ".join(kinds[:_KINDS]) + more,
        sites=steps[0].sites,
        cycles=cycles,
        busy=busy,
        macs=sum(step.macs for step in steps),
        utilisation=sum(step.utilisation * step.cycles for step in steps) / cycles if cycles else 0.0,
        memory_bytes=max(step.memory_bytes for step in steps),
    )


def _step(step: EstimatedStep, part: Estimate, largest: int) -> tuple[str, ...]:
    sites = ", ".join(step.sites) or step.name
    kind = f"{step.operator}, {step.name}" if step.sites else step.operator
    name = tag("div", tag("div", sites, cls="name"), tag("div", kind, cls="small soft"))
    plot = tag("div", bar(step.cycles, largest, "f-accent", f"{sites}: {step.cycles} cycles"), style="min-width:120px")
    share = _percent(step.cycles / part.cycles) if part.cycles else ""
    macs = quantity(step.macs) if step.macs else ""
    busy = _percent(step.utilisation) if step.macs else ""
    waits = tag("span", _waits_for(step.busy), style=_ONE_LINE)
    return name, plot, quantity(step.cycles), share, waits, macs, busy, size(step.memory_bytes)


def _waits_for(busy: Mapping[str, int]) -> str:
    """What keeps a step from being faster: the unit that is busy longest."""
    return max(sorted(busy), key=lambda name: busy[name], default="")


def _most(found: Iterable[Estimate]) -> dict[str, int]:
    """Bytes by memory that the part with most of it uses: parts run one after the other."""
    together: dict[str, int] = {}
    for part in found:
        for name, used in part.memory.items():
            together[name] = max(together.get(name, 0), used)
    return together


def _time(found: Iterable[Estimate]) -> str:
    return milliseconds(estimated_ms(found))


def _by(found: Iterable[Estimate]) -> str:
    return f"estimated by {', '.join(sorted({part.by for part in found}))}"


def _settings(found: Iterable[Estimate]) -> str:
    return "; ".join(dict.fromkeys(part.settings for part in found))


def _sizes(amounts: Mapping[str, int]) -> Markup:
    return join(tag("div", f"{name} {size(amount)}", style=_ONE_LINE) for name, amount in sorted(amounts.items()))


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %" if share >= 0.0995 or not share else f"{100 * share:.1f} %"
