"""From a graph that kernels compute to a library: machine code, weights, and the runtime that calls it."""

from __future__ import annotations

import math
import os
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from graphopt.errors import BackendError, WriteError
from graphopt.targets import Isa
from graphopt_backends._compile import llvm_target
from graphopt_backends._kept import kept
from graphopt_backends._link import Linker, c_compiler
from graphopt_backends.network.steps import ENTRY, PEAK, Step

__all__ = [
    "BUILD", "BUILD_SCRIPT", "EMBEDDED_BYTES", "RUNTIME_SOURCES", "SOURCES", "Made", "Signature", "compile_network",
    "signatures",
]  # fmt: skip

EMBEDDED_BYTES = 64 << 20
"""Weights above this lie in a file beside the library, which is mapped when it is loaded."""

SOURCES = Path(__file__).parent / "runtime"
"""Where the sources in C are."""

RUNTIME_SOURCES = ("graphopt.h", "compiled.h", "cpu.h", "cpu.c", "runtime.c")
"""What a library is linked with; C11 and POSIX threads."""

BUILD, BUILD_SCRIPT = "build", "build.sh"
"""Folder of a bundle that is to be linked elsewhere, and what links it."""

_COMPILED = ("cpu.c", "runtime.c")
_HEADERS, _EXPORTS = ("graphopt.h", "compiled.h"), "exports.map"
_PAGE = 4096
_OBJECT, _DESCRIPTION, _WEIGHTS = "kernels.o", "model.c", "model.weights"


@dataclass(frozen=True)
class Signature:
    """An input or output: its name, NumPy's name of its element type, its shape."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def elements(self) -> int:
        """Number of its values."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of its values."""
        return self.elements * np.dtype(self.dtype).itemsize


@dataclass(frozen=True)
class Made:
    """A library, and what is known of it.

    Attributes:
        steps: Calls of kernels, in order.
        weight_bytes: Bytes of its weights.
        separate: They lie in a file beside it.
        workspace: Bytes of memory that a run needs, with one thread.
    """

    steps: tuple[Step, ...]
    weight_bytes: int
    separate: bool
    workspace: int

    @property
    def kernels(self) -> int:
        """Distinct kernels."""
        return len({step.kernel for step in self.steps})


def compile_network(
    model: ir.Model, isa: Isa, target: str, path: Path, linker: Linker | None, cache: Path, emit: Sequence[str] = (),
    *, samples_apart: bool = False,
) -> Made:  # fmt: skip
    """Compile a lowered model, all of whose nodes kernels compute, into the library `path`.

    Weights of more than `EMBEDDED_BYTES` go into a file of the same name that ends in `.weights`.

    Args:
        model: Fixed shapes; changed on the way.
        isa: The CPU.
        target: What is compiled for, for messages of the library.
        path: Where it goes.
        linker: A C compiler for the CPU; None: object code, sources and the command that links them go into the
            folder `build` beside `path`.
        cache: Where the compiled runtime is kept.
        emit: `asm` and `source` write listings beside it.
        samples_apart: Samples of a batch do not mix, and lie along the first axis of all inputs and outputs.

    Raises:
        BackendError: The compiler or linker fails.
        WriteError: The disk is full or the folder cannot be written.
    """
    import tvm

    from graphopt_backends.kernels.build import build
    from graphopt_backends.network.assemble import assemble
    from graphopt_backends.network.convert import convert
    from graphopt_backends.network.weights import Weights

    with tempfile.TemporaryDirectory(prefix="graphopt-", dir=path.parent) as scratch:
        folder = Path(scratch)
        try:
            with (folder / _WEIGHTS).open("wb+") as stream:
                stream.write(b" " * (_PAGE - 1) + b"\n")
                weights = Weights(stream)
                network = convert(model, isa, weights)
                weights.finish()
                stream.seek(0)
                stream.write(f"graphopt weights 1 {weights.nbytes} {weights.digest}\n".encode())
        except OSError as e:
            raise WriteError(str(path), e.strerror or str(e), "free some space or choose another folder with -o") from e
        assembled = assemble(network)
        library = build(assembled.module, tvm.target.Target(llvm_target(isa, 1)))
        (folder / _OBJECT).write_bytes(_object_code(library))
        for kind, suffix in (("asm", "s"), ("source", "ll")):
            if kind in emit:
                path.with_suffix(f".{suffix}").write_text(library.inspect_source(suffix), "utf8")
        separate = weights.nbytes > EMBEDDED_BYTES
        facts = _Facts(
            target, isa, signatures(model.graph.inputs), signatures(model.graph.outputs), assembled.steps,
            weights.nbytes, weights.digest, assembled.workspace, assembled.scratch, not separate,
            samples_apart,
        )  # fmt: skip
        (folder / _DESCRIPTION).write_text(_description(facts), "utf8")
        if linker is None:
            _ship(folder, path.parent / BUILD, isa, embedded=not separate)
        else:
            _link(folder, path, linker, isa.machine, cache)
        if separate:
            (folder / _WEIGHTS).replace(path.with_suffix(".weights"))
    return Made(assembled.steps, weights.nbytes, separate, assembled.workspace + assembled.scratch)


def _object_code(library: Any) -> bytes:
    """What LLVM made; it writes to memory, because it ends the process where a disk is full."""
    with os.fdopen(os.memfd_create(_OBJECT), "rb") as memory:
        library.write_to_file(f"/proc/self/fd/{memory.fileno()}", "o")
        return memory.read()


def _link(folder: Path, path: Path, linker: Linker, machine: str, cache: Path) -> None:
    """Link a library from the object, description and weights in a folder, and the runtime."""
    for name in (*_HEADERS, _EXPORTS):
        shutil.copyfile(SOURCES / name, folder / name)
    linker.objects(folder, (_DESCRIPTION,))
    runtime = _runtime_objects(linker, machine, cache)
    own = (_OBJECT, str(Path(_DESCRIPTION).with_suffix(".o")))
    linker.link(path, folder, (*own, *(str(path) for path in runtime)), _EXPORTS)


def _ship(folder: Path, target: Path, isa: Isa, *, embedded: bool) -> None:
    """Put what a library is linked from into a folder."""
    target.mkdir()
    made = (_OBJECT, _DESCRIPTION, *([_WEIGHTS] if embedded else []))
    for name in made:
        shutil.copyfile(folder / name, target / name)
    for name in (*RUNTIME_SOURCES, _EXPORTS):
        shutil.copyfile(SOURCES / name, target / name)
    script = (SOURCES / BUILD_SCRIPT).read_text("utf8")
    compiler = c_compiler(isa)
    (target / BUILD_SCRIPT).write_text(script.replace("@TRIPLE@", isa.triple).replace("@COMPILER@", compiler), "utf8")
    (target / BUILD_SCRIPT).chmod(0o755)


def _runtime_objects(linker: Linker, machine: str, cache: Path) -> list[Path]:
    sources = [SOURCES / name for name in RUNTIME_SOURCES]
    folder = kept(cache / "engine" / machine, linker, sources, lambda at: linker.objects(at, _COMPILED))
    return [(folder / name).with_suffix(".o") for name in _COMPILED]


def signatures(values: Sequence[ir.Value]) -> tuple[Signature, ...]:
    """Of inputs or outputs with fixed shapes.

    Raises:
        BackendError: A shape or type is not known.
    """
    found: list[Signature] = []
    for value in values:
        if value.dtype is None or value.shape is None or not all(isinstance(size, int) for size in value.shape):
            raise BackendError(str(value.name), "has no fixed shape and type")
        shape = tuple(int(size) for size in value.shape if isinstance(size, int))
        found.append(Signature(str(value.name), str(value.dtype.numpy()), shape))
    return tuple(found)


@dataclass(frozen=True)
class _Facts:
    target: str
    isa: Isa
    inputs: tuple[Signature, ...]
    outputs: tuple[Signature, ...]
    steps: tuple[Step, ...]
    weight_bytes: int
    weight_digest: str
    workspace: int
    scratch: int
    embedded: bool
    samples_apart: bool


def _description(facts: _Facts) -> str:
    """The C source with what the runtime must know of a model."""
    shapes = [_shape("input", i, t) for i, t in enumerate(facts.inputs)]
    shapes += [_shape("output", i, t) for i, t in enumerate(facts.outputs)]
    pointers = [f"inputs[{i}]" for i in range(len(facts.inputs))]
    pointers += [f"outputs[{i}]" for i in range(len(facts.outputs))]
    parameters = ", ".join(["const void*"] * len(facts.inputs) + ["void*"] * len(facts.outputs))
    steps = [_step(step) for step in facts.steps]
    return "\n".join(
        [
            '#include "compiled.h"',
            "",
            *shapes,
            *_table("inputs", "graphopt_tensor", [_tensor("input", i, t) for i, t in enumerate(facts.inputs)]),
            *_table("outputs", "graphopt_tensor", [_tensor("output", i, t) for i, t in enumerate(facts.outputs)]),
            *_table("steps", "graphopt_step", steps),
            "const graphopt_description graphopt_this = {",
            f"  GRAPHOPT_FORMAT, {_text(facts.target)}, {_text(' '.join(facts.isa.required))},",
            f"  {len(facts.inputs)}, {len(facts.outputs)}, {len(facts.steps)}, inputs, outputs, steps,",
            f"  {facts.weight_bytes}u, {_text(facts.weight_digest)}, {facts.workspace}u, {facts.scratch}u,",
            "};",
            *_weights(facts.embedded),
            f"const int graphopt_samples_apart = {int(facts.samples_apart)};",
            *_peaks(facts.isa),
            f"void {ENTRY}({parameters}{', ' if parameters else ''}const void*, void*, void*, int32_t, int32_t);",
            "void graphopt_enter(",
            "    _Atomic(const void*)* inputs, _Atomic(void*)* outputs, const void* weights, void* workspace,",
            "    void* model, int32_t task, int32_t tasks) {",
            "  (void)inputs, (void)outputs;",
            f"  {ENTRY}({', '.join([*pointers, 'weights', 'workspace', 'model', 'task', 'tasks'])});",
            "}",
            "",
        ]
    )


def _table(name: str, kind: str, rows: Sequence[str]) -> list[str]:
    return [f"static const {kind} {name}[] = {{", *(rows or ["  {0},"]), "};"]


def _step(step: Step) -> str:
    texts = _text(step.kernel), _text(", ".join(step.sites)), _text(step.arithmetic)
    return f"  {{{', '.join(texts)}, {step.operations}u}},"


def _peaks(isa: Isa) -> list[str]:
    """What measures the CPU, one entry for each kind of arithmetic."""
    from graphopt_backends.kernels.peak import peaks_of

    found = peaks_of(isa)
    rows = [f'  {{"{kind}", {PEAK}{kind}, {peak.operations}u}},' for kind, peak in found.items()]
    return [
        *(f"void {PEAK}{kind}(const void*, const void*, void*, int32_t);" for kind in found),
        "const graphopt_loop graphopt_loops[] = {", *rows, "  {0, 0, 0},", "};",
    ]  # fmt: skip


def _shape(side: str, index: int, tensor: Signature) -> str:
    return f"static const int64_t {side}_shape_{index}[] = {{{', '.join(map(str, tensor.shape)) or '0'}}};"


def _tensor(side: str, index: int, tensor: Signature) -> str:
    name, dtype = _text(tensor.name), _text(tensor.dtype)
    return f"  {{{name}, {dtype}, {len(tensor.shape)}, {side}_shape_{index}, {tensor.nbytes}u}},"


def _weights(embedded: bool) -> list[str]:
    if not embedded:
        return ["const uint8_t* const graphopt_embedded_weights = 0;"]
    return [
        '__asm__(".section .rodata\\n.balign 64\\n.local graphopt_weights\\ngraphopt_weights:\\n"',
        f'        ".incbin \\"{_WEIGHTS}\\", {_PAGE}\\n.previous\\n");',
        "extern const uint8_t graphopt_weights[];",
        "const uint8_t* const graphopt_embedded_weights = graphopt_weights;",
    ]


def _text(text: str) -> str:
    """A C string."""
    plain = (chr(byte) if 32 <= byte < 127 and chr(byte) not in '"\\?' else f"\\{byte:03o}" for byte in text.encode())
    return f'"{"".join(plain)}"'
