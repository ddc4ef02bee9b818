"""Attention in the words of `graphopt inspect`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from attention_forms import CASES
from small_models import context

from graphopt.analyses import ATTENTION
from graphopt.analyses.attention import as_record, summaries
from graphopt.cli.main import _run
from graphopt.model_io import save_model


def told(name: str) -> list[str]:
    blocks = context(CASES[name].model()).fact(ATTENTION)
    return list(summaries([as_record(block) for block in blocks]))


def test_blocks_that_are_alike_share_a_line() -> None:
    (block,) = context(CASES["GQA by Expand"].model()).fact(ATTENTION)
    assert list(summaries([as_record(block)] * 3)) == [
        "3 blocks of 4 heads of 8 on 2 of keys, any number of queries and keys"
    ]


def test_lengths_order_and_caches_are_told() -> None:
    assert told("GPT-2: rows of a stored triangle behind a cache") == [
        "1 block of 4 heads of 8, any number of queries and keys, causal, with a cache"
    ]
    assert told("queries that were learned") == ["1 block of 4 heads of 8, 3 queries, any number of keys"]
    assert told("one head without an axis for it") == [
        "1 block of 1 head of 8 (values 6), any number of queries and keys"
    ]


def test_inspect_lists_attention(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = save_model(CASES["a triangle of -inf"].model(), tmp_path / "m.onnx")[0]
    assert _run(["inspect", str(path)]) == 0
    assert "attention  1 block of 4 heads of 8, any number of queries and keys, causal" in capsys.readouterr().out
    assert _run(["inspect", str(path), "--json"]) == 0
    (record,) = json.loads(capsys.readouterr().out)["attention"]
    assert (record["heads"], record["causal"], record["scale"]) == (4, "yes", 1.0)
