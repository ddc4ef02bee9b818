"""A C header for bare metal: commands and weights of each part that an NPU runs, and what its driver wants to know."""

from __future__ import annotations

import math
import re
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from graphopt.errors import BackendError
from graphopt_backends.npu.raw import Place, Raw, read_raw

__all__ = ["NpuPart", "Port", "header_text"]

_C_TYPES = {"bool": "int8_t", "int8": "int8_t", "uint8": "uint8_t", "int16": "int16_t", "int32": "int32_t"}
_BYTES = {"int8_t": 1, "uint8_t": 1, "int16_t": 2, "int32_t": 4}
_ALIGNED = 16  # the driver refuses other base addresses
_A_LINE = 24  # numbers
_WIDTH = 116

_INTRODUCTION = """\
/*
@TITLE@
 *
 * To run a part with Arm's core driver (ethosu_driver.h), after ethosu_init:
 *
 *     #include "ethosu_driver.h"
 *     #include "@FILE@"
 *
 *     static uint8_t scratch[@PART@_SCRATCH_SIZE] __attribute__((aligned(16)));
@FAST@ *
 *     uint64_t address[@PART@_REGIONS];
 *     size_t size[@PART@_REGIONS];
 *     struct ethosu_driver *driver = ethosu_reserve_driver();
 *
 *     @part@_regions(address, size, scratch, @fast@);
 *     memcpy(scratch + @PART@_INPUT0_OFFSET, input, @PART@_INPUT0_SIZE);
 *     if (ethosu_invoke(driver, @part@_commands, @PART@_COMMANDS_SIZE, address, size, @PART@_REGIONS) != 0)
 *       ...;
 *     memcpy(output, scratch + @PART@_OUTPUT0_OFFSET, @PART@_OUTPUT0_SIZE);
 *     ethosu_release_driver(driver);
 *
 * Inputs and outputs lie in scratch and share it with all else: fill the inputs before each run, and take the outputs
 * before the next. A number x is stored as round(x / SCALE) + ZERO_POINT, held within the range of its type; q stands
 * for (q - ZERO_POINT) * SCALE. Where caches are on, clean them over scratch before a run and invalidate them after it.
 *
 * The arrays are static: include this header in one file. Define GRAPHOPT_NPU_COMMANDS and GRAPHOPT_NPU_WEIGHTS before
 * that to place them, for example as __attribute__((section("flash"))).
 */
#ifndef @GUARD@
#define @GUARD@

#include <stddef.h>
#include <stdint.h>

#ifndef GRAPHOPT_NPU_ALIGNED
#if defined(__GNUC__) || defined(__clang__)
#define GRAPHOPT_NPU_ALIGNED __attribute__((aligned(16)))
#elif defined(__cplusplus)
#define GRAPHOPT_NPU_ALIGNED alignas(16)
#else
#define GRAPHOPT_NPU_ALIGNED _Alignas(16)
#endif
#endif
#ifndef GRAPHOPT_NPU_COMMANDS
#define GRAPHOPT_NPU_COMMANDS
#endif
#ifndef GRAPHOPT_NPU_WEIGHTS
#define GRAPHOPT_NPU_WEIGHTS
#endif

#ifdef __cplusplus
extern "C" {
#endif
"""
_END = """
#ifdef __cplusplus
}
#endif

#endif
"""


@dataclass(frozen=True)
class Port:
    """An input or output of a part, as it lies in memory.

    Attributes:
        name: What the model calls it.
        dtype: NumPy's name of its element type.
        shape: Its sizes, in the order in which the NPU keeps them.
        scale: Step of its numbers; None: they are no quantized reals.
        zero_point: What stands for 0.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    scale: float | None = None
    zero_point: int = 0


@dataclass(frozen=True)
class NpuPart:
    """A part that the NPU runs.

    Attributes:
        raw: Vela's output.
        inputs: In the order of the part.
        outputs: In the order of the part.
        settings: What it was compiled for, in words.
    """

    raw: Path
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    settings: str = ""


def header_text(file: str, model: str, parts: Sequence[NpuPart]) -> str:
    """Write the header of all parts.

    Args:
        file: Its name, such as `model.npu.h`.
        model: Name of the model, from which names in C are made.
        parts: In order; what belongs to part 0 is called `<model>_npu0_...`.

    Raises:
        BackendError: A file is no output of Vela, or does not have these inputs and outputs.
    """
    stem = _identifier(model)
    raws = [_checked(part) for part in parts]
    lines = [_introduction(file, model, stem, parts, raws[0])] if raws else []
    for i, (part, raw) in enumerate(zip(parts, raws, strict=True)):
        lines += _part(f"{stem}_npu{i}", part, raw)
    return "\n".join(lines) + _END


def _introduction(file: str, model: str, stem: str, parts: Sequence[NpuPart], first: Raw) -> str:
    what = "1 part" if len(parts) == 1 else f"{len(parts)} parts"
    title = f"{_plain(model)} for an Arm Ethos-U, compiled by Vela: {what}. {_plain(parts[0].settings)}".strip()
    fast = f" *     static uint8_t fast[{stem.upper()}_NPU0_SCRATCH_FAST_SIZE] __attribute__((aligned(16)));\n"
    values = {
        "@TITLE@": textwrap.fill(title, _WIDTH, initial_indent=" * ", subsequent_indent=" * "),
        "@FILE@": _plain(file),
        "@PART@": f"{stem.upper()}_NPU0",
        "@part@": f"{stem}_npu0",
        "@FAST@": fast if first.scratch_fast.size else "",
        "@fast@": "fast" if first.scratch_fast.size else "NULL",
        "@GUARD@": f"GRAPHOPT_{stem.upper()}_NPU_H",
    }
    text = _INTRODUCTION
    for mark, value in values.items():
        text = text.replace(mark, value)
    return text


def _part(name: str, part: NpuPart, raw: Raw) -> Iterator[str]:
    upper = name.upper()
    yield f"/* ---- {_plain(part.raw.name)} ---- */\n"
    yield from _array(f"{name}_commands", "GRAPHOPT_NPU_COMMANDS", raw.commands)
    yield from _array(f"{name}_weights", "GRAPHOPT_NPU_WEIGHTS", raw.weights)
    yield f"#define {upper}_REGIONS {raw.regions}"
    yield f"#define {upper}_SCRATCH_SIZE {raw.scratch.size}"
    yield f"#define {upper}_SCRATCH_FAST_SIZE {raw.scratch_fast.size}\n"
    for side, ports, places in (("INPUT", part.inputs, raw.inputs), ("OUTPUT", part.outputs, raw.outputs)):
        yield f"#define {upper}_{side}S {len(ports)}"
        for i, (port, place) in enumerate(zip(ports, places, strict=True)):
            yield from _port(f"{upper}_{side}{i}", port, place)
    yield from _regions(name, raw)


def _array(name: str, placed: str, data: bytes) -> Iterator[str]:
    yield f"#define {name.upper()}_SIZE {len(data)}"
    yield f"{placed} GRAPHOPT_NPU_ALIGNED static const uint8_t {name}[{max(len(data), 1)}] = {{"
    numbers = list(map(str, data or b"\0"))
    yield ",\n".join(",".join(numbers[i : i + _A_LINE]) for i in range(0, len(numbers), _A_LINE))
    yield "};\n"


def _port(name: str, port: Port, place: Place) -> Iterator[str]:
    sizes = " x ".join(map(str, port.shape)) or "scalar"
    yield f"/* {_plain(port.name)}: {port.dtype}, {sizes} */"
    yield f"#define {name}_TYPE {_C_TYPES[port.dtype]}"
    yield f"#define {name}_RANK {len(port.shape)}"
    yield f"#define {name}_SHAPE {{{', '.join(map(str, port.shape or (1,)))}}}"
    yield f"#define {name}_ELEMENTS {place.elements}"
    yield f"#define {name}_SIZE {place.elements * place.element_bytes}"
    yield f"#define {name}_OFFSET {place.offset}"
    if port.scale is not None:
        yield f"#define {name}_SCALE {_float(port.scale)}"
        yield f"#define {name}_ZERO_POINT ({port.zero_point})"
    yield ""


def _regions(name: str, raw: Raw) -> Iterator[str]:
    """A function that says where all memory is."""
    areas = {
        raw.scratch.region: ("scratch", f"{name.upper()}_SCRATCH_SIZE"),
        raw.scratch_fast.region: ("scratch_fast", f"{name.upper()}_SCRATCH_FAST_SIZE"),
    }
    unused = [] if raw.scratch_fast.size else ["scratch_fast"]
    if unused:
        areas = {raw.scratch.region: areas[raw.scratch.region]}
    areas = {raw.weights_area.region: (f"{name}_weights", f"{name.upper()}_WEIGHTS_SIZE"), **areas}
    yield "/* Base addresses and sizes for ethosu_invoke. scratch_fast may be NULL where its size is 0. */"
    yield f"static inline void {name}_regions(uint64_t *address, size_t *size, void *scratch, void *scratch_fast) {{"
    for region, (memory, amount) in sorted(areas.items()):
        yield f"  address[{region}] = (uint64_t)(uintptr_t){memory};"
        yield f"  size[{region}] = {amount};"
    yield from (f"  (void){memory};" for memory in unused)
    yield "}\n"


def _checked(part: NpuPart) -> Raw:
    """What Vela made, if it has the inputs and outputs of the part."""
    raw = read_raw(part.raw)
    for side, ports, places in (("input", part.inputs, raw.inputs), ("output", part.outputs, raw.outputs)):
        if len(ports) != len(places):
            raise BackendError(part.raw.name, f"has {len(places)} {side}s, not {len(ports)}")
        for port, place in zip(ports, places, strict=True):
            kind = _C_TYPES.get(port.dtype, "")
            if (math.prod(port.shape), _BYTES.get(kind)) != (place.elements, place.element_bytes):
                fact = f"{side} {port.name!r} has {place.elements} elements of {place.element_bytes} bytes"
                raise BackendError(part.raw.name, f"{fact}, not {port.dtype} of {port.shape}")
            if place.region != raw.scratch.region:
                raise BackendError(part.raw.name, f"{side} {port.name!r} does not lie in scratch")
    return raw


def _float(value: float) -> str:
    """A float32 constant that is read back as it was."""
    text = f"{value:.9g}"
    return f"{text if '.' in text or 'e' in text else f'{text}.0'}f"


def _identifier(text: str) -> str:
    name = re.sub(r"\W+", "_", text, flags=re.ASCII).strip("_").lower()
    return name if name and not name[0].isdigit() else f"model_{name}".rstrip("_")


def _plain(text: str) -> str:
    """Text for a comment: nothing in it may end the comment or join lines."""
    return "".join(c if c.isprintable() and c not in "*\\?" else "_" for c in text)
