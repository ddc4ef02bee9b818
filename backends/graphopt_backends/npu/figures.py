"""What Vela says of a compiled network, read from the two tables that it writes.

`*_summary_*.csv` has one row for the network, `*_per-layer.csv` one for each operation. Cells are not quoted: the name
of an operation, which comes last, may hold commas and line breaks.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

from graphopt.backend_base import Estimate, EstimatedStep
from graphopt.errors import BackendError

__all__ = ["estimate", "read_steps", "read_summary"]

_MEMORIES = {
    "sram": "SRAM", "dram": "DRAM", "on_chip_flash": "on-chip flash", "off_chip_flash": "off-chip flash",
}  # fmt: skip
_BUSY = {
    "NPU": "NPU", "SRAM AC": "SRAM", "DRAM AC": "DRAM", "OnFlash AC": "on-chip flash", "OffFlash AC": "off-chip flash",
}  # fmt: skip
_NAME = "Name"
_MACS_A_CYCLE = re.compile(r"-(\d+)$")


def estimate(
    part: str, by: str, accelerator: str, summary: str, layers: str, sites: Mapping[str, tuple[str, ...]]
) -> Estimate:
    """Put both tables together.

    Args:
        part: File of the part, relative to the bundle.
        by: Name and version of the compiler.
        accelerator: Vela's name of the NPU; it ends in multiply-accumulates a cycle.
        summary: Text of the table with one row.
        layers: Text of the table with a row for each operation; empty where there is none.
        sites: Nodes of the model by the name of the tensor that an operation makes.

    Raises:
        BackendError: A table is not what this version of Vela writes.
    """
    found = read_summary(summary)
    cycles, macs = _whole(found, "cycles_total"), _whole(found, "nn_macs")
    clock, match = _number(found, "core_clock"), _MACS_A_CYCLE.search(accelerator)
    most = cycles * int(match[1]) if match else 0
    settings = f"{accelerator} at {clock / 1e6:g} MHz, {found['system_config']}, {found['memory_mode']}"
    busy = {"NPU": _whole(found, "cycles_npu")}
    busy |= {name: _whole(found, f"cycles_{key}_access") for key, name in _MEMORIES.items()}
    return Estimate(
        part=part,
        by=by,
        settings=settings,
        cycles=cycles,
        seconds=_number(found, "inference_time"),
        busy=_used(busy),
        macs=macs,
        utilisation=macs / most if most else 0.0,
        memory=_used({name: round(1024 * _number(found, f"{key}_memory_used")) for key, name in _MEMORIES.items()}),
        traffic=_used({name: _whole(found, f"{key}_total_bytes") for key, name in _MEMORIES.items()}),
        weight_bytes=_whole(found, "total_original_weights"),
        encoded_bytes=_whole(found, "total_npu_encoded_weights"),
        steps=tuple(read_steps(layers, sites)),
    )


def read_summary(text: str) -> Mapping[str, str]:
    """Read the table with one row.

    Raises:
        BackendError: It has none, or lacks a column that is needed.
    """
    lines = text.strip().splitlines()
    if len(lines) != 2:
        raise _unreadable("summary", f"has {len(lines)} lines, not 2")
    head, row = (line.split(",") for line in lines)
    if len(head) != len(row):
        raise _unreadable("summary", f"has {len(row)} cells for {len(head)} columns")
    return dict(zip(head, row, strict=True))


def read_steps(text: str, sites: Mapping[str, tuple[str, ...]]) -> Iterator[EstimatedStep]:
    """Read the table with a row for each operation.

    Raises:
        BackendError: It lacks a column that is needed.
    """
    head, *lines = text.strip("\n").split("\n")
    columns = head.split(",")
    if text.strip() and columns[-1] != _NAME:
        raise _unreadable("per-layer", f"ends in the column {columns[-1]!r}, not {_NAME!r}")
    for cells in _rows(lines, len(columns)):
        row = dict(zip(columns, cells, strict=True))
        busy = {name: _whole(row, key) for key, name in _BUSY.items()}
        yield EstimatedStep(
            name=row[_NAME],
            operator=row.get("NNG Operator", ""),
            sites=_sites_of(row[_NAME], sites),
            cycles=_whole(row, "Op Cycles"),
            busy=_used(busy),
            macs=_whole(row, "MAC Count"),
            utilisation=_number(row, "Util% (MAC)") / 100,
            memory_bytes=_whole(row, "Staging Usage"),
        )


def _sites_of(name: str, sites: Mapping[str, tuple[str, ...]]) -> tuple[str, ...]:
    """Nodes behind a tensor; `NAME_int32` and its like are steps that Vela puts before it makes `NAME`."""
    while name not in sites and "_" in name:
        name = name.rpartition("_")[0]
    return sites.get(name, ())


def _rows(lines: list[str], width: int) -> Iterator[list[str]]:
    """Cells of each row; a line that is too short for one goes on with the name in the row before it."""
    row: list[str] = []
    for line in lines:
        cells = line.split(",", width - 1)
        if len(cells) == width:
            if row:
                yield row
            row = cells
        elif row:
            row[-1] += f"\n{line}"
    if row:
        yield row


def _used(figures: Mapping[str, int]) -> dict[str, int]:
    return {name: value for name, value in figures.items() if value}


def _whole(row: Mapping[str, str], column: str) -> int:
    return round(_number(row, column))


def _number(row: Mapping[str, str], column: str) -> float:
    try:
        return float(row[column])
    except KeyError as e:
        raise _unreadable("table", f"lacks the column {column!r}") from e
    except ValueError as e:
        raise _unreadable("table", f"says {row[column]!r} where a number was expected, in {column!r}") from e


def _unreadable(which: str, fact: str) -> BackendError:
    return BackendError(f"Vela's {which}", fact, "install the version that graphopt[npu] asks for")
