"""A model for an NPU and its host as C99: the host's parts, and one function that runs all parts in order."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from graphopt_backends._plan import TensorSpec
from graphopt_backends.network.memory import lay_out, lifetimes
from graphopt_backends.network.views import Buffer
from graphopt_backends.npu.host.c_lower import Call, Constant, Functions
from graphopt_backends.npu.host.c_names import C_TYPES, helper, identifier, literal

__all__ = ["RUN", "HostPart", "NpuCall", "Source", "function_of", "write_source"]

RUN = "model_run"
"""The function that runs all parts."""

_WIDTH = 116
_HEADER = """\
/*
@TITLE@
 *
 * model_run computes the model once; for what the NPU does it calls graphopt_npu. All memory is static: nothing is
 * allocated, no thread is started, and one run must end before the next begins. Pointers must not overlap, and must be
 * aligned for their type. Tensors lie in the order of their axes, the last innermost. Nothing is checked: indices among
 * the inputs must be in range.
 *
 * Compile model.c as C99 or later and link libm; -ffp-contract=off gives the same results on all machines.
 *
 * To place memory, define GRAPHOPT_HOST_WORKSPACE (@WORKSPACE@ bytes, written) and GRAPHOPT_HOST_CONSTANTS
 * (@CONSTANTS@ bytes, read), for example as __attribute__((section("sram"))).
 */
#ifndef GRAPHOPT_MODEL_H
#define GRAPHOPT_MODEL_H

#include <stdbool.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif
"""
_HEADER_END = """
#ifdef __cplusplus
}
#endif

#endif
"""
_NPU = """\
/*
 * Runs a part on the NPU; returns 0, or any other number where that failed. model.npu.c has one for Arm's driver.
 *
@PORTS@
 */
int graphopt_npu(int part, const void *const *inputs, void *const *outputs);
"""
_SOURCE = """\
/* @TITLE@ See model.h. */
#include "model.h"

#include <math.h>
#include <stddef.h>
#include <string.h>

#ifndef GRAPHOPT_HOST_WORKSPACE
#define GRAPHOPT_HOST_WORKSPACE
#endif
#ifndef GRAPHOPT_HOST_CONSTANTS
#define GRAPHOPT_HOST_CONSTANTS
#endif
"""
_OWN = frozenset({"workspace", "inputs", "outputs", "status", "ROOM", "graphopt_npu", RUN, "i"})


@dataclass(frozen=True)
class HostPart:
    """A part that is C.

    Attributes:
        index: Its place among all parts.
        functions: What it computes.
        inputs: What it takes.
        outputs: What it makes.
    """

    index: int
    functions: Functions
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]


@dataclass(frozen=True)
class NpuCall:
    """A part that the NPU runs.

    Attributes:
        number: Its place among those that the NPU runs.
        inputs: What it takes.
        outputs: What it makes, as the model has it.
        made: Element types in which the NPU makes that.
    """

    number: int
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    made: tuple[str, ...]


@dataclass(frozen=True)
class Source:
    """A header, a source, and the memory they need.

    Attributes:
        header: Text of `model.h`.
        source: Text of `model.c`.
        workspace: Bytes that are written.
        constants: Bytes that are read.
    """

    header: str
    source: str
    workspace: int
    constants: int


def function_of(index: int) -> str:
    """Name of the function of a part."""
    return f"model_host{index}"


def write_source(
    title: str, inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec],
    parts: Sequence[HostPart | NpuCall], *, whole: bool = True,
) -> Source:  # fmt: skip
    """Write all host parts of a model in C, and what runs it.

    Args:
        title: What it is, in one sentence.
        inputs: Of the model.
        outputs: Of the model.
        parts: In order.
        whole: They are all parts of the model; else there is nothing that runs it.
    """
    values = _Values(inputs, outputs)
    used = [step for part in parts for step in _steps(part, values)]
    offsets, workspace = lay_out(lifetimes(used))
    hosts = [part for part in parts if isinstance(part, HostPart)]
    constants = {c.name: c for part in hosts for c in part.functions.constants.values()}
    size = sum(constant.array.nbytes for constant in constants.values())
    ends = _signature(RUN, inputs, outputs)
    header = [_filled(_HEADER, title, WORKSPACE=workspace, CONSTANTS=size)]
    if whole:
        told = ", or what graphopt_npu returned where that failed" if len(hosts) < len(parts) else ""
        header += [f"/* Runs the model; returns 0{told}.", *_described(inputs, outputs), " */"]
        header += [f"{ends};\n"]
        npu = [part for part in parts if isinstance(part, NpuCall)]
        ports = "\n".join(line for part in npu for line in _ports(part))
        header += [_NPU.replace("@PORTS@", ports)] if npu else []
    header += ["/* The parts that the host computes; they return 0. */"]
    header += [f"{_signature(function_of(part.index), part.inputs, part.outputs)};" for part in hosts]
    body = [_SOURCE.replace("@TITLE@", _plain(title))]
    if offsets:
        body += [
            "/* Tensors that are needed only while others are computed; numbers in it give it their alignment. */",
            "GRAPHOPT_HOST_WORKSPACE static union {",
            f"  int64_t integer;\n  double real;\n  uint8_t bytes[{max(workspace, 1)}];\n}} workspace;",
            "#define ROOM(type, offset) ((type *)(void *)(workspace.bytes + (offset)))\n",
        ]
    body += [line for constant in constants.values() for line in _constant(constant)]
    body += [f"{helper(name)}\n" for name in sorted({name for part in hosts for name in part.functions.helpers})]
    memory = _Memory(values, offsets)
    body += [line for part in hosts for line in memory.host(part)]
    if whole:
        body += memory.run(ends, inputs, outputs, parts)
    return Source("\n".join(header) + _HEADER_END, "\n".join(body) + "\n", workspace, size)


class _Values:
    """Where values lie that more than one part knows, by name: with the caller, or in the workspace."""

    def __init__(self, inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec]) -> None:
        self._buffers = {spec.name: _buffer(spec, "input") for spec in inputs}
        self._outputs = {spec.name for spec in outputs}
        self._narrow: dict[str, Buffer] = {}

    def __getitem__(self, spec: TensorSpec) -> Buffer:
        if spec.name not in self._buffers:
            origin = "output" if spec.name in self._outputs else "temporary"
            self._buffers[spec.name] = _buffer(spec, origin)
        return self._buffers[spec.name]

    def made(self, spec: TensorSpec, dtype: str) -> Buffer:
        """Where the NPU puts a value: in its place, or, where its elements have another type, beside it."""
        if dtype == spec.dtype:
            return self[spec]
        return self._narrow.setdefault(spec.name, Buffer(dtype, self[spec].size))


def _buffer(spec: TensorSpec, origin: Any) -> Buffer:
    return Buffer(spec.dtype, int(np.prod(spec.shape or (), dtype=np.int64)), origin, spec.name)


def _steps(part: HostPart | NpuCall, values: _Values) -> Iterator[list[Buffer]]:
    """Buffers that each step of a part needs."""
    if isinstance(part, NpuCall):
        made = [values.made(spec, dtype) for spec, dtype in zip(part.outputs, part.made, strict=True)]
        yield [*(values[spec] for spec in part.inputs), *made, *(values[spec] for spec in part.outputs)]
        return
    known = _known(part, values)
    for call in part.functions.calls:
        lives = call.lives or (None,) * len(call.tensors)
        for stage in range(call.stages):
            pairs = zip(call.tensors, lives, strict=True)
            held = [tensor for tensor, life in pairs if life is None or life[0] <= stage <= life[1]]
            yield [known.get(tensor, tensor) for tensor in held if isinstance(tensor, Buffer)]


def _known(part: HostPart, values: _Values) -> dict[Buffer, Buffer]:
    """Inputs and outputs of a part as values of the model."""
    own = (*part.functions.inputs, *part.functions.outputs)
    return dict(zip(own, (values[spec] for spec in (*part.inputs, *part.outputs)), strict=True))


@dataclass
class _Memory:
    values: _Values
    offsets: Mapping[Buffer, int]
    names: dict[Buffer, str] = field(default_factory=dict[Buffer, str])

    def host(self, part: HostPart) -> Iterator[str]:
        """All functions of a part, and the one that calls them."""
        yield from (f"{text}\n" for text in part.functions.texts.values())
        parameters = (*part.inputs, *part.outputs)
        own = (*part.functions.inputs, *part.functions.outputs)
        self.names = dict(zip(own, _parameter_names(parameters), strict=True))
        yield f"{_signature(function_of(part.index), part.inputs, part.outputs)} {{"
        read = {tensor for call in part.functions.calls for tensor in call.tensors if isinstance(tensor, Buffer)}
        yield from (f"  (void){self.names[buffer]};" for buffer in own if buffer not in read)
        yield from (f"  {self.call(call)}" for call in part.functions.calls)
        yield "  return 0;\n}\n"

    def call(self, call: Call) -> str:
        words = [tensor.name if isinstance(tensor, Constant) else self.place(tensor) for tensor in call.tensors]
        if call.function is None:
            target = call.tensors[1]
            assert isinstance(target, Buffer)
            return f"memcpy({words[1]}, {words[0]}, {target.nbytes});"
        return f"{call.function}({', '.join(words)});"

    def place(self, buffer: Buffer) -> str:
        return self.names.get(buffer) or f"ROOM({C_TYPES[buffer.dtype]}, {self.offsets[buffer]})"

    def run(
        self, ends: str, inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec],
        parts: Sequence[HostPart | NpuCall],
    ) -> Iterator[str]:  # fmt: skip
        """The function that runs the parts."""
        names = _parameter_names((*inputs, *outputs))
        self.names = {self.values[spec]: name for spec, name in zip(inputs, names, strict=False)}
        copies: list[str] = []
        for spec, name in zip(outputs, names[len(inputs) :], strict=True):
            buffer = self.values[spec]
            if buffer in self.names:  # an input as it is, or the same value twice
                copies.append(f"  memcpy({name}, {self.names[buffer]}, {buffer.nbytes});")
            self.names.setdefault(buffer, name)
        yield f"{ends} {{"
        read = {spec.name for part in parts for spec in part.inputs} | {spec.name for spec in outputs}
        yield from (f"  (void){self.names[self.values[spec]]};" for spec in inputs if spec.name not in read)
        if any(isinstance(part, NpuCall) for part in parts):
            yield "  int status;"
        for part in parts:
            if isinstance(part, HostPart):
                words = [self.place(self.values[spec]) for spec in (*part.inputs, *part.outputs)]
                yield f"  {function_of(part.index)}({', '.join(words)});"
            else:
                yield from self.npu(part)
        yield from copies
        yield "  return 0;\n}"

    def npu(self, part: NpuCall) -> Iterator[str]:
        made = [self.values.made(spec, dtype) for spec, dtype in zip(part.outputs, part.made, strict=True)]
        given = ", ".join(self.place(self.values[spec]) for spec in part.inputs)
        yield "  {"
        yield f"    const void *const inputs[] = {{{given}}};"
        yield f"    void *const outputs[] = {{{', '.join(map(self.place, made))}}};"
        yield f"    status = graphopt_npu({part.number}, inputs, outputs);"
        yield "    if (status != 0) {\n      return status;\n    }\n  }"
        for spec, narrow in zip(part.outputs, made, strict=True):
            wide = self.values[spec]
            if wide is not narrow:
                yield f"  for (size_t i = 0; i < {wide.size}; ++i) {{"
                yield f"    {self.place(wide)}[i] = {self.place(narrow)}[i];\n  }}"


def _parameter_names(specs: Sequence[TensorSpec]) -> list[str]:
    taken = set(_OWN)
    return [identifier(spec.name, taken) for spec in specs]


def _signature(name: str, inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec]) -> str:
    names = _parameter_names((*inputs, *outputs))
    types = [f"const {C_TYPES[spec.dtype]}" for spec in inputs] + [C_TYPES[spec.dtype] for spec in outputs]
    return f"int {name}({', '.join(f'{kind} *{n}' for kind, n in zip(types, names, strict=True)) or 'void'})"


def _described(inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec]) -> Iterator[str]:
    names = _parameter_names((*inputs, *outputs))
    for spec, name in zip((*inputs, *outputs), names, strict=True):
        yield f" *   {name}: {_sizes(spec)}{'' if name == spec.name else f', {_plain(spec.name)} in the model'}"


def _ports(part: NpuCall) -> Iterator[str]:
    yield f" *   part {part.number}:"
    yield from (f" *     inputs[{i}]: {_plain(spec.name)}, {_sizes(spec)}" for i, spec in enumerate(part.inputs))
    for i, (spec, dtype) in enumerate(zip(part.outputs, part.made, strict=True)):
        yield f" *     outputs[{i}]: {_plain(spec.name)}, {_sizes(spec, dtype)}"


def _sizes(spec: TensorSpec, dtype: str = "") -> str:
    return f"{C_TYPES[dtype or spec.dtype]}, {' x '.join(map(str, spec.shape or ())) or 'one number'}"


def _constant(constant: Constant) -> Iterator[str]:
    array = constant.array
    dtype, size = str(array.dtype), max(array.size, 1)
    yield f"GRAPHOPT_HOST_CONSTANTS static const {C_TYPES[dtype]} {constant.name}[{size}] = {{"
    numbers = [literal(value, dtype) for value in array.ravel().tolist()] or ["0"]
    yield from textwrap.wrap(", ".join(numbers), _WIDTH, break_long_words=False, break_on_hyphens=False)
    yield "};\n"


def _filled(text: str, title: str, **values: Any) -> str:
    title = textwrap.fill(_plain(title), _WIDTH, initial_indent=" * ", subsequent_indent=" * ")
    for mark, value in {"TITLE": title, **values}.items():
        text = text.replace(f"@{mark}@", str(value))
    return text


def _plain(text: str) -> str:
    """Text for a comment: nothing in it may end the comment or join lines."""
    return "".join(c if c.isprintable() and c not in "*\\?" else "_" for c in text)
