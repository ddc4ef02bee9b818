"""Figures as a person reads them, the same in the terminal and in HTML."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from graphopt.measured import KernelTime, Measured, Measurement, Region, Times
from graphopt.pass_base import Change, Scalar
from graphopt.report.data import Accuracy, BackendReport, Fidelity, Limit, ModelSummary, OutputFidelity, Report

__all__ = [
    "Reason",
    "accuracy_change",
    "agreement_text",
    "clean",
    "count",
    "fidelity_text",
    "limit_text",
    "macs_text",
    "milliseconds",
    "number",
    "packed_bytes",
    "plural",
    "quantity",
    "rate_texts",
    "ratio",
    "reasons",
    "runs_text",
    "scalar",
    "score",
    "size",
    "slower",
    "speedup",
    "spread",
    "untimed",
    "worst",
]

_PERCENT_METRICS = ("top1", "top5")
_NUMBER = re.compile(r"(?<![\w'])\d[\d.]*")  # not inside names
_SKIPPED = "skipped: "
_SLOWER = 1.05
_UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


@dataclass(frozen=True)
class Reason:
    """Why sites were left alone, and which."""

    step: str
    reason: str
    sites: tuple[str, ...]


def clean(text: str) -> str:
    """Show control characters and changes of direction as escapes, so that no name can steer a terminal or a page."""
    return _UNPRINTABLE.sub(lambda match: f"\\u{ord(match[0]):04x}", text)


def plural(amount: int, noun: str) -> str:
    """Write `1 layer`, `2 layers`."""
    return f"{amount:,} {noun}{'' if amount == 1 else 's'}"


def size(amount: int | None) -> str:
    """Write a number of bytes in decimal units: `312 kB`."""
    return "unknown" if amount is None else f"{_scaled(amount, ('', 'k', 'M', 'G', 'T'))}B"


def quantity(amount: int | None) -> str:
    """Write a large number: `40.8 M`."""
    return "unknown" if amount is None else _scaled(amount, ("", "k", "M", "G", "T", "P")).rstrip()


def macs_text(model: ModelSummary) -> str:
    """Write a model's MACs; where some are unknown, that there are more."""
    if model.totals.macs is None:
        return "unknown"
    return f"{'> ' if model.macs_unknown else ''}{quantity(model.totals.macs)}"


def milliseconds(value: float) -> str:
    """Write a time with three digits or so: `4.02 ms`, `31.5 ms`, `0.087 ms`."""
    steps = ((99.95, 0), (9.995, 1), (0.9995, 2), (0.00995, 3))
    digits = next((digits for least, digits in steps if value >= least), 5)
    return f"{value:,.{digits}f} ms"


def count(amount: int | None) -> str:
    """Write a whole number with every digit."""
    return "unknown" if amount is None else f"{amount:,}"


def number(value: float, digits: int = 3) -> str:
    """Write a float with a few significant digits; never in a way that hides NaN or an infinity."""
    if math.isnan(value):
        return "NaN"
    if math.isinf(value):
        return "infinite" if value > 0 else "-infinite"
    if value == int(value) and abs(value) < 1e6:
        return f"{int(value):,}"
    text = f"{value:.{digits}g}"
    return text if "e" not in text or abs(value) < 1e-3 else f"{value:,.0f}"


def scalar(value: Scalar) -> str:
    """Write a figure of a pass or a backend."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return number(value, 4)
    return count(value) if isinstance(value, int) else clean(value)


def ratio(before: float | None, after: float | None) -> str:
    """Write how much is left: `0.29x`; empty where there is nothing to divide."""
    if before is None or after is None or not before:
        return ""
    value = after / before
    return f"{value:.2f}x" if 0.01 <= value < 100 else f"{value:.3g}x"


def speedup(before: float, after: float) -> str:
    """Write a change of latency in words that cannot be read the wrong way round."""
    if not before or not after:
        return ""
    faster = before / after
    if 0.98 < faster < 1.02:
        return "same"
    return f"{faster:.2f}x faster" if faster > 1 else f"{1 / faster:.2f}x slower"


def slower(measured: Measured) -> tuple[str, ...]:
    """Sentences about results that are slower than the original; noise of a few percent is not called slow."""
    found: list[str] = []
    for row in measured.rows:
        first = measured.find("original", threads=row.threads)
        if row.side == "original" or row.times is None or first is None or first.times is None:
            continue
        factor = row.times.median / first.times.median if first.times.median else 1.0
        if factor > _SLOWER:
            where = f"{clean(row.engine)}, {plural(row.threads, 'thread')}"
            found.append(f"the result is {factor:.2f}x slower than the original in ONNX Runtime ({where})")
    found += [_slower_region(region) for region in measured.slower_regions]
    return tuple(found)


def _slower_region(region: Region) -> str:
    first, *others = region.layers
    more = f" and {plural(len(others), 'layer')} with it" if others else ""
    times = f"{milliseconds(region.before)} before, {milliseconds(region.after)} now"
    return f"{clean(first)!r}{more} became slower: {times}"


def spread(times: Times) -> str:
    """Write how far the quartiles lie apart, in percent of the median."""
    return f"{100 * (times.high - times.low) / times.median:.0f} %" if times.median > 0 else ""


def untimed(row: Measurement) -> str:
    """Write what is known of a benchmark's row without a time."""
    if row.not_run is not None:
        return clean(row.not_run)
    if row.agrees is None:
        return f"ran {plural(row.samples, 'sample')}, compared with nothing"
    return f"ran {plural(row.samples, 'sample')}, max diff {number(row.agrees)} from model.onnx in ONNX Runtime"


def runs_text(measured: Measured) -> str:
    """Write how often the timed rows ran; empty if none was timed."""
    timed = [row for row in measured.rows if row.times is not None]
    if not timed:
        return ""
    most, least = max(row.repeats for row in timed), min(row.repeats for row in timed)
    runs = plural(most, "timed run") if most == least else f"{least} to {plural(most, 'timed run')}"
    rounds = plural(max(row.rounds for row in timed), "round")
    return f"{rounds} of {runs}, each after {timed[0].warmup} to warm up; rows took turns"


def score(metric: str, value: float) -> str:
    """Write a metric's value, in percent where it is one."""
    if metric in _PERCENT_METRICS:
        return f"{value:.2f} %" if math.isfinite(value) else number(value)
    return number(value, 4)


def accuracy_change(accuracy: Accuracy) -> str:
    """Write the loss or gain of a metric: `-0.50 points`."""
    unit = "points" if accuracy.higher_is_better else "% worse" if accuracy.drop > 0 else "% better"
    if not math.isfinite(accuracy.drop):
        return number(accuracy.drop)
    if accuracy.higher_is_better:
        return f"{-accuracy.drop + 0.0:+.2f} {unit}"
    return f"{abs(accuracy.drop):.2f} {unit}"


def worst(fidelity: Fidelity) -> OutputFidelity | None:
    """The output that is furthest from the original's: NaN first, then the lowest SQNR."""
    outputs = sorted(fidelity.outputs, key=lambda o: (not o.nan, not math.isnan(o.sqnr_db), _order(o.sqnr_db)))
    return outputs[0] if outputs else None


def fidelity_text(fidelity: Fidelity) -> str:
    """Write the worst output's distance in one line."""
    output = worst(fidelity)
    if fidelity.not_run is not None or output is None:
        return clean(fidelity.not_run or "not checked: the model has no outputs")
    if output.nan:
        return "the result holds NaN where the original does not"
    if output.max_abs == 0:
        return "equal, bit by bit" if len(fidelity.outputs) == 1 else "all outputs equal, bit by bit"
    parts = [f"SQNR {number(output.sqnr_db)} dB", f"max diff {number(output.max_abs)}"]
    if output.top1_agreement is not None:
        parts.append(f"top-1 agreement {output.top1_agreement:.2f} %")
    return ", ".join(parts)


def packed_bytes(report: Report) -> int | None:
    """Bytes of the container, where the model was packed."""
    return next((entry.bytes for entry in report.files if entry.name == "model.gopt"), None)


def agreement_text(backend: BackendReport) -> str:
    """Write how well the target's file agrees with `model.onnx`."""
    agreement = backend.agreement
    if agreement is None:
        return clean(backend.not_run or "not run")
    parts = [f"max diff {number(agreement.max_abs)} (tolerance {number(agreement.tolerance)})"]
    if agreement.top1_agreement is not None:
        parts.insert(0, f"top-1 agreement {agreement.top1_agreement:.2f} %")
    return f"{'agrees' if agreement.ok else 'DISAGREES'}: {', '.join(parts)}"


def limit_text(limit: Limit, *, verdict: bool = True) -> str:
    """Write one limit with what was reached and, with `verdict`, whether that is enough."""
    got = "" if limit.got is None else f", got {_with_unit(limit.got, limit.unit)}"
    text = f"{clean(limit.name)} {limit.bound} {_with_unit(limit.wanted, limit.unit)}{got}"
    return f"{text}: {'met' if limit.met else 'MISSED'}" if verdict else text


def rate_texts(kernel: KernelTime) -> tuple[str, str]:
    """Write billions of operations a second, and that as a share of the measured peak; empty where there is none."""
    rate = "" if kernel.rate is None else f"{kernel.rate:,.0f}" if kernel.rate >= 10 else f"{kernel.rate:.1f}"
    return rate, "" if kernel.of_peak is None else f"{100 * kernel.of_peak:.0f} %"


def reasons(report: Report) -> tuple[Reason, ...]:
    """Sites that were left alone, by step and reason, the most frequent first within a step.

    Reasons that differ in a figure alone are one; the figures stand with the sites in the report.
    """
    found: list[Reason] = []
    for step in report.steps:
        groups: dict[str, list[Change]] = {}
        for change in step.left_alone:
            groups.setdefault(_NUMBER.sub("…", _reason(change)), []).append(change)
        ordered = sorted(groups.items(), key=lambda item: (-len(item[1]), item[0]))
        for alike, changes in ordered:
            texts = {_reason(change) for change in changes}
            reason = texts.pop() if len(texts) == 1 else alike
            found.append(Reason(step.name, reason, tuple(change.site for change in changes)))
    return tuple(found)


def _reason(change: Change) -> str:
    return change.action.removeprefix(_SKIPPED)


def _with_unit(value: float, unit: str) -> str:
    text = f"{value:.2f}" if unit in ("points", "%", "x") and math.isfinite(value) else number(value)
    return text + (unit if unit in ("", "x") else f" {clean(unit)}")


def _order(value: float) -> float:
    return 0.0 if math.isnan(value) else value


def _scaled(amount: float, units: Sequence[str]) -> str:
    value, unit = float(amount), units[0]
    for larger in units[1:]:
        if abs(value) < 999.5:
            break
        value, unit = value / 1000, larger
    digits = 0 if unit == units[0] or value >= 99.95 else 1 if value >= 9.995 else 2
    return f"{value:,.{digits}f} {unit}"
