"""Inputs of 512 positions for two trained models of the zoo, with what their metrics compare outputs with.

    stories260k        next tokens: the samples one behind another, as the model was trained
    stories260k_drawn  next tokens of texts that the model itself wrote, each token drawn from all before it
    minilm_repeated    pairs of sentences of STS-B, each repeated until the text is full, scored as people did
    minilm_joined      pairs of texts made of different sentences one behind another, every sentence used once; the
                       score of a pair is the mean of those of its pairs of sentences

Calibration data are other texts: stories that are not scored, and sentences of SST-2, put together in the same way.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from zoo_quant import load_zoo

__all__ = ["Task", "task_of"]

Array = np.ndarray[Any, np.dtype[Any]]
_LENGTH = 512
_BOS, _CLS, _SEP = 1, 101, 102
_STORIES = 12
"""That the model writes."""
_SPREAD = 1.5
"""Of the pairs of sentences in a text, in points: in any order, means would all be alike."""
_TEXTS = 8
"""For calibration."""
_PAIRS = 40
"""Of repeated sentences."""


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


def task_of(case: str, cache: Path) -> Task:
    """The long inputs of a model.

    Args:
        case: One of the four.
        cache: Where texts that the model wrote are kept.
    """
    if case == "stories260k_drawn":
        return _drawn(cache / "drawn.npz")
    return {"stories260k": _stories, "minilm_repeated": _repeated, "minilm_joined": _joined}[case]()


def _stories() -> Task:
    zoo, length = load_zoo(), _LENGTH
    whole = {split: zoo.load("stories260k", split) for split in ("calib", "samples", "stories")}
    rows = {split: _rows(data) for split, data in whole.items()}
    calibration = _cut(rows["calib"], length + 1)
    scored = _cut(rows["samples"] + rows["stories"], length + 1)
    return Task("stories260k", {"input_ids": calibration[:, :-1]}, {"input_ids": scored[:, :-1]}, scored[:, 1:])


def _drawn(path: Path) -> Task:
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        np.savez(path, ids=_written())
    with np.load(path) as file:
        ids = file["ids"]
    return Task("stories260k", _stories().calibration, {"input_ids": ids[:, :-1]}, ids[:, 1:])


def _written() -> Array:
    """`[texts, 513]`: what the model writes, by the largest sum of logit and Gumbel noise, which draws from softmax."""
    zoo, rng = load_zoo(), np.random.default_rng(0)
    session = zoo.session(zoo.cases()["stories260k"].model)
    ids = np.full((_STORIES, 1), _BOS, np.int64)
    for _ in range(_LENGTH):
        logits = session.run(None, {"input_ids": ids})[0][:, -1]
        ids = np.append(ids, np.argmax(logits + rng.gumbel(size=logits.shape), axis=-1)[:, None], axis=1)
    return ids


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


def _repeated() -> Task:
    """Pairs of sentences, each repeated; rows 2i and 2i + 1 are one."""
    zoo = load_zoo()
    stsb, others = zoo.load("minilm", "stsb"), _words(zoo.load("minilm", "calib").inputs["input_ids"])
    sentences, scores = _words(stsb.inputs["input_ids"]), stsb.target["labels"]
    chosen = np.random.default_rng(0).permutation(len(scores))[:_PAIRS]
    texts = [[np.resize(sentences[2 * i + side], _LENGTH - 2)] for i in chosen for side in (0, 1)]
    calibration = [[np.resize(sentence, _LENGTH - 2)] for sentence in others[:_TEXTS]]
    return Task("minilm", _padded(calibration), _padded(texts), scores[chosen])


def _joined() -> Task:
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
        if min(sum(map(len, side)) for side in sides) >= _LENGTH - 2:
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
        if sum(map(len, texts[-1])) >= _LENGTH - 2:
            if len(texts) == _TEXTS:
                break
            texts.append([])
        texts[-1].append(sentence)
    return texts


def _padded(texts: Sequence[Sequence[Array]]) -> dict[str, Array]:
    """Texts between their marks, cut to the longest that the model takes."""
    rows = [np.concatenate([[_CLS], *text])[: _LENGTH - 1] for text in texts]
    rows = [np.append(row, _SEP) for row in rows]
    ids = np.zeros((len(rows), max(map(len, rows))), np.int64)
    for row, into in zip(rows, ids, strict=True):
        into[: len(row)] = row
    return {"input_ids": ids, "attention_mask": (ids != 0).astype(np.int64)}
