"""C source that runs an NPU's parts through Arm's core driver: the `graphopt_npu` that `model_run` calls."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from graphopt_backends.npu.header import NpuPart
from graphopt_backends.npu.raw import Raw, read_raw

__all__ = ["DRIVER", "driver_text"]

DRIVER = "model.npu.c"
"""File of a bundle."""

_HEAD = """\
/*
 * graphopt_npu of model.h, by Arm's core driver for the Ethos-U: compile it with model.c, and call ethosu_init before
 * model_run. Where caches are on, the driver cleans and invalidates them if ethosu_flush_dcache and
 * ethosu_invalidate_dcache are implemented. Define GRAPHOPT_NPU_SCRATCH and GRAPHOPT_NPU_SCRATCH_FAST to place memory,
 * and see model.npu.h for commands and weights.
 */
#include "ethosu_driver.h"
#include "model.h"
#include "model.npu.h"

#include <string.h>

#ifndef GRAPHOPT_NPU_SCRATCH
#define GRAPHOPT_NPU_SCRATCH
#endif
#ifndef GRAPHOPT_NPU_SCRATCH_FAST
#define GRAPHOPT_NPU_SCRATCH_FAST
#endif
"""


def driver_text(parts: Sequence[NpuPart]) -> str:
    """Write the source for all parts, in order, on top of the header that was written for them."""
    raws = [read_raw(part.raw) for part in parts]
    lines = [_HEAD, *_memory("scratch", "", range(len(raws)))]
    fast = [number for number, raw in enumerate(raws) if raw.scratch_fast.size]
    lines += _memory("fast", "_FAST", fast) if fast else []
    lines += ["int graphopt_npu(int part, const void *const *inputs, void *const *outputs) {"]
    lines += [f"  uint64_t address[{max(raw.regions for raw in raws)}];"]
    lines += [f"  size_t size[{max(raw.regions for raw in raws)}];"]
    lines += ["  int status = -1;", "  struct ethosu_driver *driver = ethosu_reserve_driver();", ""]
    lines += ["  if (driver == NULL) {\n    return status;\n  }", "  switch (part) {"]
    lines += [line for number, raw in enumerate(raws) for line in _case(number, raw)]
    lines += ["  }", "  ethosu_release_driver(driver);", "  return status;", "}"]
    return "\n".join(lines) + "\n"


def _memory(name: str, suffix: str, numbers: Sequence[int]) -> Iterator[str]:
    """Memory that parts use one after the other."""
    yield f"GRAPHOPT_NPU_SCRATCH{suffix} GRAPHOPT_NPU_ALIGNED static union {{"
    for number in numbers:
        yield f"  uint8_t npu{number}[MODEL_NPU{number}_SCRATCH{suffix}_SIZE];"
    yield f"}} {name};\n"


def _case(number: int, raw: Raw) -> Iterator[str]:
    part, upper, scratch = f"model_npu{number}", f"MODEL_NPU{number}", f"scratch.npu{number}"
    yield f"    case {number}:"
    yield f"      {part}_regions(address, size, {scratch}, {f'fast.npu{number}' if raw.scratch_fast.size else 'NULL'});"
    for i in range(len(raw.inputs)):
        yield f"      memcpy({scratch} + {upper}_INPUT{i}_OFFSET, inputs[{i}], {upper}_INPUT{i}_SIZE);"
    commands = f"{part}_commands, {upper}_COMMANDS_SIZE"
    yield f"      status = ethosu_invoke(driver, {commands}, address, size, {upper}_REGIONS);"
    for i in range(len(raw.outputs)):
        yield f"      memcpy(outputs[{i}], {scratch} + {upper}_OUTPUT{i}_OFFSET, {upper}_OUTPUT{i}_SIZE);"
    yield "      break;"
