"""What sparse attention costs in quality: GRAPHOPT_ZOO=... python benchmarks/sparse_attention_quality.py [CASE ...].

Two trained models on long inputs, with windows, strided windows, blocks and learned patterns: the metric, and how far
the outputs move, against the share of attention scores that is left.

    stories260k  next tokens in 512 tokens: the samples one behind another, as the model was trained
    minilm       pairs of texts of 256 tokens and more, each made of sentences of STS-B one behind another; the score of
                 a pair of texts is the mean of those of its pairs of sentences. Every sentence is used once

Calibration data are other texts: stories that are not scored, and sentences of SST-2, put together in the same way.
Figures are kept in the cache folder, as in quant_static.py. All takes about 40 minutes on one core (an estimate),
`--quick` (stories260k alone) about 5.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tables
from quant_figures import Figure, arguments, kept
from zoo_quant import load_zoo

import graphopt

Array = np.ndarray[Any, np.dtype[Any]]
_CASES = ("stories260k", "minilm")
_DENSE = "dense"
_LENGTH = {"stories260k": 512, "minilm": 256}
_CLS, _SEP = 101, 102
_SPREAD = 1.5
"""Of the pairs of sentences in a text, in points: in any order, means would all be alike."""
_CALIBRATION = 16
_KEEPS = {"stories260k": (0.7, 0.8, 0.9, 0.95, 0.98, 0.99), "minilm": (0.15, 0.2, 0.3, 0.5, 0.8, 0.9)}
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
calibration sample. `moved`: how far outputs are from those of the dense model, nats between distributions of the \
next token, or 1 minus the cosine of embeddings: less noisy than the metric on few samples. A learned pattern \
dominates a window where it computes no more, is no worse by the metric, and moves the outputs less.
"""


@dataclass(frozen=True)
class Task:
    """Long inputs of one model.

    Attributes:
        case: Of the zoo.
        calibration: Arrays by the names of the inputs.
        inputs: What is scored.
        labels: What the metric compares with.
    """

    case: str
    calibration: dict[str, Array]
    inputs: dict[str, Array]
    labels: Array


def task_of(case: str) -> Task:
    """The long inputs of a model."""
    return _stories() if case == "stories260k" else _texts()


def _stories() -> Task:
    zoo, length = load_zoo(), _LENGTH["stories260k"]
    whole = {split: zoo.load("stories260k", split) for split in ("calib", "samples", "stories")}
    rows = {split: _rows(data) for split, data in whole.items()}
    calibration = _cut(rows["calib"], length + 1)
    scored = _cut(rows["samples"] + rows["stories"], length + 1)
    return Task("stories260k", {"input_ids": calibration[:, :-1]}, {"input_ids": scored[:, :-1]}, scored[:, 1:])


def _rows(data: Any) -> list[Array]:
    """Samples of different lengths with their last label, which no input has."""
    found: list[Array] = []
    for ids, labels in zip(data.inputs["input_ids"], data.target["labels"], strict=True):
        real = labels >= 0
        found.append(np.concatenate([ids[:1], labels[real]]))
    return found


def _cut(rows: Sequence[Array], length: int) -> Array:
    joined = np.concatenate(rows)
    return joined[: len(joined) // length * length].reshape(-1, length)


def _texts() -> Task:
    """Pairs of texts; rows 2i and 2i + 1 are one."""
    zoo, rng = load_zoo(), np.random.default_rng(0)
    stsb = zoo.load("minilm", "stsb")
    sentences, scores = _words(stsb.inputs["input_ids"]), stsb.target["labels"]
    order = np.argsort(scores + _SPREAD * rng.standard_normal(len(scores)), kind="stable")
    texts, labels = list[list[Array]](), list[float]()
    start = 0
    for end in range(1, len(order) + 1):
        some = order[start:end]
        sides = [[sentences[2 * i + side] for i in some] for side in (0, 1)]
        if min(sum(map(len, side)) for side in sides) >= _LENGTH["minilm"] - 2:
            texts += sides
            labels.append(float(scores[some].mean()))
            start = end
    others = _words(zoo.load("minilm", "calib").inputs["input_ids"])
    return Task("minilm", _padded(_filled(others)), _padded(texts), np.array(labels))


def _words(ids: Array) -> list[Array]:
    """Sentences without what marks their start and end."""
    return [row[(row != 0) & (row != _CLS) & (row != _SEP)] for row in ids]


def _filled(sentences: Sequence[Array]) -> list[list[Array]]:
    """Calibration texts of the length of the others."""
    texts: list[list[Array]] = [[]]
    for sentence in sentences:
        if sum(map(len, texts[-1])) >= _LENGTH["minilm"] - 2:
            if len(texts) == _CALIBRATION:
                break
            texts.append([])
        texts[-1].append(sentence)
    return texts


def _padded(texts: Sequence[Sequence[Array]]) -> dict[str, Array]:
    rows = [np.concatenate([[_CLS], *text, [_SEP]]) for text in texts]
    ids = np.zeros((len(rows), max(map(len, rows))), np.int64)
    for row, into in zip(rows, ids, strict=True):
        into[: len(row)] = row
    return {"input_ids": ids, "attention_mask": (ids != 0).astype(np.int64)}


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
    widths, reach = ((32, 64, 128, 192, 255), 128) if case == "stories260k" else ((8, 16, 32, 64), 64)
    yield from (f"sparse-attention{{width={width}}}" for width in widths)
    yield from (f"sparse-attention{{pattern=learned width={reach} keep={keep}}}" for keep in _KEEPS[case])
    yield from (f"sparse-attention{{width={width} global_tokens=1}}" for width in widths[:3])
    yield from (f"sparse-attention{{pattern={kind} width={width}}}" for kind in _KINDS for width in widths[:2])


def _measured(job: Mapping[str, Any]) -> Figure:
    """Rewrite and score, in the child."""
    zoo, task, dense = load_zoo(), task_of(job["case"]), Path(job["cache"]) / f"{job['case']}.npz"
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
    return {**figure, "metric": metric, "value": value, "count": count, "moved": moved}


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
    rows = [_row(case, step, figure) for (case, step), figure in found.items()]
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
    head = ("case", "step", "scores seen", "scores computed", "attention kept", "metric", "value", "moved", "remarks")
    tables.write(options.name, "What sparse attention costs in quality", head, rows, "\n".join(notes))
    (tables.RESULTS / f"{options.name}.svg").write_text(_plot(found), "utf8")


def _row(case: str, step: str, figure: Figure) -> tuple[object, ...]:
    if "value" not in figure:
        return (case, f"`{step}`", *[""] * 6, figure["fault"])
    same = step != _DENSE and figure["computed"] == 1
    shares = (f"{100 * figure[key]:.1f} %" if key in figure else "" for key in ("seen", "computed", "kept"))
    shown = f"{figure['value']:.4f}", f"{figure['moved']:.2g}"
    return (case, f"`{step}`", *shares, figure["metric"], *shown, "left as it is" if same else "")


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
        ours, sign = learned[best], 1 if figure["metric"] == "perplexity" else -1
        better = ours["moved"] <= figure["moved"], sign * ours["value"] <= sign * figure["value"]
        words = (
            "dominates it" if all(better) else "closer to the dense outputs, worse by the metric" if better[0] else "no"
        )
        yield (
            f"{case}, `{step}` computes {100 * figure['computed']:.1f} % and gets {figure['value']:.4f}: `{best[1]}` "
            f"computes {100 * ours['computed']:.1f} % and gets {ours['value']:.4f}: {words}"
        )


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
    yield f'<text x="{left}" y="{top - 14}">{title}, against scores computed</text>'
    yield f'<rect x="{left}" y="{top}" width="340" height="250" fill="none" stroke="#bbbbbb"/>'
    for height in np.linspace(low, high, 5):
        label = 10**height if key == "moved" else height
        yield f'<text x="{left - 6}" y="{place(0, height)[1] + 4:.1f}" text-anchor="end">{label:.3g}</text>'
    for share in (0, 0.25, 0.5, 0.75, 1):
        yield f'<text x="{left + 340 * share}" y="{top + 268}" text-anchor="middle">{100 * share:.0f} %</text>'
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
