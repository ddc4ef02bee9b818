from __future__ import annotations

import pytest

from graphopt.errors import UsageError
from graphopt.measured import Breakdown, KernelTime, Machine, Measured, Measurement, Times

TIMES = Times(2.0, 1.0, 1.5, 3.0, 9.0)


def row(**changes: object) -> Measurement:
    fields = {
        "engine": "onnxruntime",
        "subject": "m",
        "side": "result",
        "how": "executed",
        "threads": 1,
        "file_bytes": 5,
    }
    return Measurement(**{**fields, **changes})


@pytest.mark.parametrize("how", ["emulated", "compiled only", "estimated"])
@pytest.mark.parametrize("figure", [{"times": TIMES}, {"peak_memory_mb": 3.0}, {"base_memory_mb": 3.0}])
def test_only_what_was_executed_carries_a_time_or_memory(how: str, figure: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="carries no time or memory"):
        row(how=how, **figure)


def test_a_time_cannot_be_smuggled_into_an_emulated_row_through_json() -> None:
    text = Measured((row(times=TIMES),), Machine("c", 1, "s", 1)).to_json()
    with pytest.raises(UsageError, match="carries no time"):
        Measured.from_json(text.replace('"executed"', '"emulated"'))


def test_a_benchmark_comes_back_from_json() -> None:
    rows = (row(times=TIMES, peak_memory_mb=1.5, base_memory_mb=1.0), row(engine="arm", how="emulated", agrees=0.5))
    machine = Machine("c", 1, "s", 1, {"numpy": "2"}, "2026-01-31 12:00 UTC")
    part = Breakdown("m", "x86", 1, (KernelTime("kernels", "Conv_0", "conv", 1, 0.5, 1.0, 9.0, 0.5),))
    measured = Measured(rows, machine, breakdowns=(part,))
    assert Measured.from_json(measured.to_json()) == measured


def test_json_that_is_no_benchmark_is_one_clear_line() -> None:
    with pytest.raises(UsageError, match=r"bench\.json: not a benchmark: .*; measure again with graphopt bench"):
        Measured.from_json("{}")


def test_find_returns_timed_rows_of_the_side_engine_and_threads() -> None:
    rows = (
        row(),
        row(times=TIMES, threads=1),
        row(times=TIMES, threads=4),
        row(side="original", times=TIMES, threads=4),
    )
    measured = Measured(rows, Machine("c", 1, "s", 1))
    assert measured.find("result") is rows[1]
    assert measured.find("result", threads=4) is rows[2]
    assert measured.find("original") is rows[3]
    assert measured.find("original", threads=2) is None
    assert measured.find("result", "arm") is None


def timed(engine: str, median: float, threads: int = 1, side: str = "result") -> Measurement:
    return row(engine=engine, times=Times(median, *[median] * 4), threads=threads, side=side)


def test_the_faster_engine_is_the_one_to_ship_for_each_number_of_threads() -> None:
    rows = (timed("onnxruntime", 2.0), timed("x86", 1.0), timed("onnxruntime", 1.0, 2), timed("x86", 1.5, 2))
    assert Measured(rows, Machine("c", 1, "s", 1)).advice() == (
        "with 1 thread ship the compiled library: 2.00x as fast as ONNX Runtime; "
        "with 2 threads ship model.onnx in ONNX Runtime: 1.50x as fast as the compiled library"
    )


def test_one_engine_alone_is_no_choice() -> None:
    rows = (timed("onnxruntime", 2.0, side="original"), timed("x86", 1.0), row())
    assert Measured(rows, Machine("c", 1, "s", 1)).advice() is None
