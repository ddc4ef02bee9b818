"""What `graphopt doctor` says of the extra."""

from __future__ import annotations

import importlib.util

import pytest
from tosa_files import EXTRA

from graphopt_backends.npu.doctor import findings


def test_what_is_missing_is_named_with_what_it_takes_and_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    found = findings()
    assert [finding.subject for finding in found] == ["Vela", "TOSA serializer", "TOSA reference model"]
    assert not any(finding.ok for finding in found)
    assert all(finding.state.startswith("missing: ") and finding.hint == EXTRA for finding in found)


def test_what_is_there_is_named_with_its_version() -> None:
    pytest.importorskip("ethosu.vela", reason=EXTRA)
    pytest.importorskip("tosa_serializer", reason=EXTRA)
    assert all(finding.ok for finding in findings())
    assert findings()[0].state.endswith(" (ethos-u-vela)")
    assert findings()[1].state.endswith(" (tosa-tools)")
