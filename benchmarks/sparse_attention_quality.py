"""What sparse attention costs in quality: GRAPHOPT_ZOO=... python benchmarks/sparse_attention_quality.py [CASE ...].

Two trained models on inputs of 512 positions, with windows, strided windows, blocks and learned patterns: the metric,
and how far the outputs move, against the share of attention scores that is left.

    stories260k        next tokens: the samples one behind another, as the model was trained. Two stories in a text have
                       nothing to do with each other: a window that forgets the first one can beat the dense model
    stories260k_drawn  next tokens of texts that the model itself wrote, each token drawn from all before it: no other
                       distribution can be better than that of the dense model, but for the noise of drawing
    minilm_repeated    pairs of sentences of STS-B, each repeated until the text is full, scored as people did: the
                       texts say what the sentences say
    minilm_joined      pairs of texts made of different sentences one behind another, every sentence used once; the
                       score of a pair is the mean of those of its pairs of sentences. It rewards a model that keeps
                       sentences apart: windows can beat the dense model

Calibration data are other texts: stories that are not scored, and sentences of SST-2, put together in the same way.
Intervals come from drawing pairs of texts, or stretches of 64 tokens, again and again with all models scored on the
same ones. Figures are kept in the cache folder, as in quant_static.py. All takes about an hour on one core (an
estimate), `--quick` (stories260k alone) about 5.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import tables
from long_inputs import task_of
from quant_figures import Figure, arguments, kept
from zoo_quant import load_zoo

import graphopt

Array = np.ndarray[Any, np.dtype[Any]]
_CASES = ("stories260k", "stories260k_drawn", "minilm_repeated", "minilm_joined")
_DENSE = "dense"
_CALIBRATION = 16
_STRETCH = 64
_DRAWS = 2000
_WIDTHS = {
    "stories260k": (32, 64, 128, 192, 255),
    "stories260k_drawn": (32, 64, 128, 192, 255),
    "minilm_repeated": (8, 16, 32, 64, 96, 128),
    "minilm_joined": (16, 64, 128),
}
_LEARNED = {
    "stories260k": [(128, keep) for keep in (0.7, 0.8, 0.9, 0.95, 0.98, 0.99)],
    "stories260k_drawn": [(128, keep) for keep in (0.7, 0.8, 0.9, 0.95, 0.98, 0.99)],
    "minilm_repeated": [(16, 0.1)] + [(64, keep) for keep in (0.15, 0.3, 0.4, 0.6, 0.7, 0.8, 0.9)],
    "minilm_joined": [(64, keep) for keep in (0.15, 0.4, 0.7)],
}
"""Width and share to keep."""
_KINDS = ("strided", "block")
_ZOO_STEP = "sparse-attention{pattern=learned width=32}"
_COLOURS = {
    "learned": "#c0392b",
    "window": "#2471a3",
    "window, 1 global": "#1e8449",
    "strided": "#b7950b",
    "block": "#7d3c98",
    _DENSE: "#333333",
}
_FONT = 'font-family="sans-serif" font-size="12"'
_NOTE = """Scores seen: of those that the dense model uses, the causal half where it is causal. Scores computed: of \
all that the dense model computes, with those that blocks of queries compute in vain; both for the longest \
calibration sample. `against dense`: the metric less that of the dense model, and the interval in which 95 % of \
differences lie when pairs of texts, or stretches of 64 tokens, are drawn again: one that holds 0 is noise. `moved`: \
how far outputs are from those of the dense model, nats between distributions of the next token, or 1 minus the \
cosine of embeddings: hardly noisy, as it needs no labels. A learned pattern dominates a window where it computes no \
more, moves the outputs less, and is not worse by the metric beyond noise. Where anything sparse beats the dense model \
beyond noise, learned patterns of few scores on minilm_repeated among it, the metric does not measure what attention \
loses, and `moved` does. Texts drawn, and sentences repeated, were added after joined ones had shown windows above the \
dense model; repeated sentences were settled on by what dense and windows scored, before learned patterns were.
"""


def main() -> None:
    """Measure what is not yet known and write the table and the plot."""
    options = _options()
    if options.child:
        job = json.loads(options.child)
        print(json.dumps(_looked_at(job["case"]) if job.get("zoo") else _measured(job)))
        return
    found: dict[tuple[str, str], Figure] = {}
    for case in options.cases or (_CASES[:1] if options.quick else _CASES):
        for step in (_DENSE, *_steps(case)):
            job = {"case": case, "step": step, "cache": str(options.cache)}
            found[case, step] = kept(f"{case} {step}", job, options.cache, measure=not options.write)
            print(case, step, json.dumps(found[case, step]), flush=True)
    zoo: dict[str, Figure] = {}
    for case in () if options.quick else sorted(load_zoo().cases()):
        zoo[case] = kept(f"zoo {case}", {"zoo": True, "case": case}, options.cache, measure=not options.write)
        print(case, json.dumps(zoo[case]), flush=True)
    known = {key: figure for key, figure in found.items() if figure}
    _write(known, {case: figure for case, figure in zoo.items() if figure}, options)


def _options() -> argparse.Namespace:
    parser = arguments(__doc__, "sparse_attention_quality")
    parser.add_argument("--write", action="store_true", help="write what is in the cache folder")
    return parser.parse_args()


def _steps(case: str) -> Iterator[str]:
    """Pipelines to compare."""
    widths = _WIDTHS[case]
    yield from (f"sparse-attention{{width={width}}}" for width in widths)
    yield from (f"sparse-attention{{pattern=learned width={width} keep={keep}}}" for width, keep in _LEARNED[case])
    others = {"stories260k": (64, 128), "minilm_repeated": (32,)}.get(case, ())
    yield from (f"sparse-attention{{width={width} global_tokens=1}}" for width in others)
    yield from (f"sparse-attention{{pattern={kind} width={width}}}" for kind in _KINDS for width in others)


def _measured(job: Mapping[str, Any]) -> Figure:
    """Rewrite and score, in the child."""
    zoo, cache = load_zoo(), Path(job["cache"])
    task, dense = task_of(job["case"], cache), cache / f"{job['case']}.npz"
    case = zoo.cases()[task.case]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model, figure = folder / "model.onnx", Figure(seen=1.0, computed=1.0)
        shutil.copyfile(case.model, model)
        if job["step"] != _DENSE:
            figure = _rewritten(job["step"], task.calibration, folder)
            model = folder / "out" / "model.onnx"
        outputs = zoo.predict(case, zoo.session(model), task.inputs, batch=4)
    after = next(array for key, array in outputs.items() if key in ("embedding", "logits"))
    if job["step"] == _DENSE:
        dense.parent.mkdir(parents=True, exist_ok=True)
        np.savez(dense, outputs=after)
    metric = next(iter(case.splits.values()))["metric"]
    value, count = zoo.METRICS[metric](outputs, {"labels": task.labels})
    with np.load(dense) as before:
        moved = _moved(metric, before["outputs"].astype(np.float64), after.astype(np.float64))
    units = _units(metric, after.astype(np.float64), task.labels)
    return {**figure, "metric": metric, "value": value, "count": count, "moved": moved, "units": units}


def _units(metric: str, outputs: Array, labels: Array) -> list[list[float]]:
    """What the metric is made of: the loss of every stretch of tokens, or similarity and score of every pair."""
    if metric == "perplexity":
        losses = -np.take_along_axis(_log_softmax(outputs), labels[..., None].astype(np.int64), -1)
        return losses.reshape(-1, _STRETCH).mean(axis=1, keepdims=True).tolist()
    outputs = outputs / np.linalg.norm(outputs, axis=-1, keepdims=True)
    return np.stack([(outputs[::2] * outputs[1::2]).sum(-1), labels], axis=1).tolist()


def _interval(one: Figure, other: Figure) -> tuple[float, float]:
    """In which 95 % of the differences of the metric lie, both scored on the same units, drawn again and again."""
    first, second = np.array(one["units"]), np.array(other["units"])
    metric, draws = _value[one["metric"]], np.random.default_rng(0).integers(len(first), size=(_DRAWS, len(first)))
    low, high = np.percentile([metric(first[draw]) - metric(second[draw]) for draw in draws], (2.5, 97.5))
    return float(low), float(high)


def _spearman(units: Array) -> float:
    first, second = (_ranks(column) for column in units.T)
    return float(np.corrcoef(first, second)[0, 1])


def _ranks(numbers: Array) -> Array:
    """Ranks, ties averaged."""
    _, places, counts = np.unique(numbers, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[places]


_value: Mapping[str, Callable[[Array], float]] = {
    "perplexity": lambda units: float(np.exp(units.mean())),
    "spearman": _spearman,
}


def _rewritten(step: str, calibration: Mapping[str, Array], folder: Path) -> Figure:
    np.savez(folder / "calib.npz", **calibration)  # pyright: ignore[reportArgumentType]
    data, out = folder / "calib.npz", folder / "out"
    report = graphopt.optimize(folder / "model.onnx", step, calibration=data, out=out, check="none").report.steps[0]
    figures = {key: report.metrics.get(f"scores_{key}", 1.0) for key in ("seen", "computed")}
    heads = {change.site: change.action for change in report.changes}
    return {**figures, "kept": report.metrics.get("attention_kept", 1.0), "heads": heads}


def _moved(metric: str, before: Array, after: Array) -> float:
    """How far outputs are from those of the dense model: nats between distributions, or 1 - cosine of embeddings."""
    if metric == "perplexity":
        first, second = (_log_softmax(logits) for logits in (before, after))
        return float((np.exp(first) * (first - second)).sum(-1).mean())
    cosine = (before * after).sum(-1) / np.linalg.norm(before, axis=-1) / np.linalg.norm(after, axis=-1)
    return float(1 - cosine.mean())


def _log_softmax(logits: Array) -> Array:
    centred = logits - logits.max(-1, keepdims=True)
    return centred - np.log(np.exp(centred).sum(-1, keepdims=True))


def _looked_at(case: str) -> Figure:
    """What becomes of a model of the zoo on its own data, in the child."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        load_zoo().export(case, folder, samples=_CALIBRATION, limit=8)
        with np.load(folder / "calib.npz") as data:
            figure = _rewritten(_ZOO_STEP, dict(data), folder)
        same = (folder / "model.onnx").read_bytes() == (folder / "out" / "model.onnx").read_bytes()
    return {**figure, "same": same}


def _write(found: Mapping[tuple[str, str], Figure], zoo: Mapping[str, Figure], options: argparse.Namespace) -> None:
    rows = [_row(case, step, figure, found.get((case, _DENSE), {})) for (case, step), figure in found.items()]
    heads = [
        f"- {case}, `{step}`, {site}: {action}"
        for (case, step), figure in found.items()
        if "learned" in step
        for site, action in figure.get("heads", {}).items()
    ]
    verdicts = [f"- {line}" for line in _verdicts(found)]
    looked = ["| case | heads | file |", "|---|---|---|", *(_zoo_row(case, figure) for case, figure in zoo.items())]
    notes = [_NOTE, *verdicts, "", "What learned heads see:", "", *heads]
    if zoo:
        notes += ["", f"`{_ZOO_STEP}` on every model of the zoo, with its own, shorter data:", "", *looked]
    head = ("case", "step", "scores seen", "scores computed", "attention kept", "metric", "value")
    head += ("against dense", "moved", "remarks")
    tables.write(options.name, "What sparse attention costs in quality", head, rows, "\n".join(notes))
    (tables.RESULTS / f"{options.name}.svg").write_text(_plot(found), "utf8")


def _row(case: str, step: str, figure: Figure, dense: Figure) -> tuple[object, ...]:
    if "value" not in figure:
        return (case, f"`{step}`", *[""] * 7, figure["fault"])
    same = step != _DENSE and figure["computed"] == 1
    shares = (f"{100 * figure[key]:.1f} %" if key in figure else "" for key in ("seen", "computed", "kept"))
    against = "" if step == _DENSE or same or "value" not in dense else _shown(figure, dense)
    shown = f"{figure['value']:.4f}", against, f"{figure['moved']:.2g}"
    return (case, f"`{step}`", *shares, figure["metric"], *shown, "left as it is" if same else "")


def _shown(figure: Figure, other: Figure) -> str:
    low, high = _interval(figure, other)
    return f"{figure['value'] - other['value']:+.4f} ({low:+.4f} .. {high:+.4f})"


def _zoo_row(case: str, figure: Figure) -> str:
    texts = [f"{site}: {action}" for site, action in figure.get("heads", {}).items()]
    same = "" if "same" not in figure else "the same, byte for byte" if figure["same"] else "rewritten"
    return f"| {case} | {figure.get('fault') or '<br>'.join(texts) or 'no attention'} | {same} |"


def _verdicts(found: Mapping[tuple[str, str], Figure]) -> Iterator[str]:
    """For every window, the learned pattern that computes no more and is best by the outputs."""
    for (case, step), figure in found.items():
        if _series(step) != "window" or "value" not in figure:
            continue
        learned = {
            key: f for key, f in found.items() if key[0] == case and _series(key[1]) == "learned" and "value" in f
        }
        fits = [key for key, f in learned.items() if f["computed"] <= figure["computed"]]
        if not fits:
            yield f"{case}, `{step}`: no learned pattern computes as little"
            continue
        best = min(fits, key=lambda key: learned[key]["moved"])
        ours = learned[best]
        yield (
            f"{case}, `{step}` computes {100 * figure['computed']:.1f} % and gets {figure['value']:.4f}, moved "
            f"{figure['moved']:.2g}: `{best[1]}` computes {100 * ours['computed']:.1f} % and gets {ours['value']:.4f}, "
            f"moved {ours['moved']:.2g}; metric {_shown(ours, figure)}: {_verdict(ours, figure)}"
        )


def _verdict(ours: Figure, window: Figure) -> str:
    """Of a pattern that computes no more than a window."""
    low, high = _interval(ours, window)
    worse, better = (low, -high) if ours["metric"] == "perplexity" else (-high, low)
    if ours["moved"] > window["moved"]:
        return "no"
    if worse > 0:
        return "closer to the dense outputs, but worse by the metric beyond noise"
    return f"dominates it{', by the metric beyond noise too' if better > 0 else ''}"


def _series(step: str) -> str:
    """Which line of the plot a pipeline belongs to."""
    if step == _DENSE or "pattern=" in step:
        return step if step == _DENSE else step.split("pattern=")[1].split()[0]
    return "window, 1 global" if "global_tokens" in step else "window"


def _plot(found: Mapping[tuple[str, str], Figure]) -> str:
    """Metric and distance from the dense outputs against the share of scores that is computed, as SVG."""
    cases = list(dict.fromkeys(case for case, _ in found))
    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" width="900" height="{60 + 330 * len(cases)}" {_FONT}>']
    parts.append('<rect width="100%" height="100%" fill="white"/>')
    for row, case in enumerate(cases):
        figures = {step: f for (name, step), f in found.items() if name == case and "value" in f}
        for column, key in enumerate(("value", "moved")):
            parts += _panel(70 + 440 * column, 40 + 330 * row, case, figures, key)
    return "\n".join([*parts, "</svg>", ""])


def _panel(left: int, top: int, case: str, figures: Mapping[str, Figure], key: str) -> Iterator[str]:
    """One plot: what is measured against shares of scores computed, from none to all of them."""
    shown = {step: f for step, f in figures.items() if key == "value" or f[key] > 0}
    heights = [np.log10(f[key]) if key == "moved" else f[key] for f in shown.values()]
    low, high = min(heights), max(heights)

    def place(share: float, height: float) -> tuple[float, float]:
        return left + 340 * share, top + 250 * (1 - (height - low) / max(1e-9, high - low))

    metric = next(iter(figures.values()))["metric"]
    title = f"{case}: {metric}" if key == "value" else f"{case}: distance from the dense outputs"
    yield f'<text x="{left}" y="{top - 14}">{title}</text>'
    yield f'<rect x="{left}" y="{top}" width="340" height="250" fill="none" stroke="#bbbbbb"/>'
    for height in np.linspace(low, high, 5):
        label = 10**height if key == "moved" else height
        yield f'<text x="{left - 6}" y="{place(0, height)[1] + 4:.1f}" text-anchor="end">{label:.4g}</text>'
    for share in (0, 0.25, 0.5, 0.75, 1):
        yield f'<text x="{left + 340 * share}" y="{top + 268}" text-anchor="middle">{100 * share:.0f} %</text>'
    yield f'<text x="{left + 170}" y="{top + 284}" text-anchor="middle">scores computed</text>'
    for number, (name, colour) in enumerate(_COLOURS.items()):
        points = sorted(
            place(f["computed"], np.log10(f[key]) if key == "moved" else f[key])
            for step, f in shown.items()
            if _series(step) == name and (name == _DENSE or f["computed"] < 1)
        )
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        yield f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.5"/>'
        yield from (f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5" fill="{colour}"/>' for x, y in points)
        if points:
            yield f'<text x="{left + 330}" y="{top + 18 + 16 * number}" text-anchor="end" fill="{colour}">{name}</text>'


if __name__ == "__main__":
    main()
