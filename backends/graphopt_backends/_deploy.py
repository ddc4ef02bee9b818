"""What lies beside a library in a bundle: its C header, an example, and a program that runs it on files."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

from graphopt.targets import Isa
from graphopt_backends._kept import kept
from graphopt_backends._library import SOURCES, Signature
from graphopt_backends._link import Linker, c_compiler
from graphopt_backends._runtime import RUNTIME, copy_runtime

__all__ = ["EXAMPLE", "RUNNERS", "add_example", "add_header", "add_runner", "add_tvm_runner", "example_command"]

RUNNERS = {"kernels": "run", "tvm": "run_tvm"}
"""Programs that run a part on files, by engine."""

EXAMPLE = "example.c"
"""A program that runs the model once."""

_PROGRAM = "program"
_HEADER, _HELPERS = "graphopt.h", ("arguments.h", "tensors.h")
_C_TYPES = {
    "bool": "uint8_t", "float16": "uint16_t", "bfloat16": "uint16_t", "float32": "float", "float64": "double",
    "int8": "int8_t", "int16": "int16_t", "int32": "int32_t", "int64": "int64_t",
    "uint8": "uint8_t", "uint16": "uint16_t", "uint32": "uint32_t", "uint64": "uint64_t",
}  # fmt: skip


def add_header(folder: Path) -> tuple[str, ...]:
    """Put the C header into a bundle; returns its file."""
    shutil.copyfile(SOURCES / _HEADER, folder / _HEADER)
    return (_HEADER,)


def add_runner(folder: Path, linker: Linker, isa: Isa, cache: Path) -> tuple[str, ...]:
    """Put the program `run` with its source into a bundle; returns its files."""
    for name in (_HEADER, *_HELPERS):
        shutil.copyfile(SOURCES / name, folder / name)
    text = (SOURCES / "run.cc").read_text("utf8").replace("@COMPILER@", f"{c_compiler(isa).removesuffix('gcc')}g++")
    (folder / "run.cc").write_text(text, "utf8")
    sources = [folder / name for name in ("run.cc", _HEADER, *_HELPERS)]
    _program(folder / RUNNERS["kernels"], sources, linker, isa.machine, cache, ["-ldl"])
    return (RUNNERS["kernels"], "run.cc", _HEADER, *_HELPERS)


def add_tvm_runner(folder: Path, runtime: Path, linker: Linker, isa: Isa, cache: Path) -> tuple[str, ...]:
    """Put TVM's runtime into a bundle, and the program that runs parts which need it; returns their files."""
    copied = copy_runtime(runtime, folder)
    sources = [SOURCES / "tvm" / "run.cc", SOURCES / "tvm" / "model.h", *(SOURCES / name for name in _HELPERS)]
    names = ("run_tvm.cc", "model.h", *_HELPERS)
    for source, name in zip(sources, names, strict=True):
        shutil.copyfile(source, folder / RUNTIME / name)
    libraries = sorted((folder / RUNTIME).glob("*.so"))
    options = [
        f"-I{(folder / RUNTIME / 'include').resolve()}", "-Wl,--no-as-needed", *(str(p.resolve()) for p in libraries),
        "-Wl,-rpath,$ORIGIN/runtime", "-Wl,--allow-shlib-undefined",
    ]  # fmt: skip
    headers = sorted((folder / RUNTIME).rglob("*.h"))
    _program(folder / RUNNERS["tvm"], sources, linker, isa.machine, cache, options, digested=[*libraries, *headers])
    return (RUNNERS["tvm"], *copied, *(f"{RUNTIME}/{name}" for name in names))


def _program(
    path: Path, sources: Sequence[Path], linker: Linker, machine: str, cache: Path, options: Sequence[str],
    digested: Sequence[Path] = (),
) -> None:  # fmt: skip
    """Compile a program, or take the one that was kept."""

    def compile_in(folder: Path) -> None:
        linker.program(folder / sources[0].name, folder / _PROGRAM, options)

    made = kept(cache / "runner" / machine, linker, sources, compile_in, digested) / _PROGRAM
    shutil.copyfile(made, path)
    path.chmod(0o755)


def add_example(
    folder: Path, weights: str | None, inputs: Sequence[Signature], outputs: Sequence[Signature], isa: Isa
) -> tuple[str, ...]:
    """Put a C program that runs the model once into a bundle; returns its file.

    Args:
        folder: The bundle.
        weights: Its file of weights, if there is one.
        inputs: What the model takes.
        outputs: What it gives.
        isa: The CPU.
    """
    text = (SOURCES / EXAMPLE).read_text("utf8")
    for mark, value in {
        "@COMMAND@": example_command(isa),
        "@WEIGHTS@": f'"{weights}"' if weights else "NULL",
        "@INPUTS@": "".join(_array("input", i, t) for i, t in enumerate(inputs)),
        "@INPUT_NAMES@": ", ".join(f"input{i}" for i in range(len(inputs))) or "NULL",
        "@OUTPUTS@": "".join(_array("output", i, t) for i, t in enumerate(outputs)),
        "@OUTPUT_NAMES@": ", ".join(f"output{i}" for i in range(len(outputs))) or "NULL",
    }.items():
        text = text.replace(mark, value)
    (folder / EXAMPLE).write_text(text, "utf8")
    return (EXAMPLE,)


def example_command(isa: Isa) -> str:
    """What builds the example, in the bundle."""
    return f"{c_compiler(isa)} -std=c11 -O2 {EXAMPLE} model.so -o example -Wl,-rpath,'$ORIGIN'"


def _array(side: str, index: int, tensor: Signature) -> str:
    kind = _C_TYPES.get(tensor.dtype, "uint8_t")
    count = tensor.nbytes if kind == "uint8_t" else tensor.elements
    shape = "x".join(map(str, tensor.shape)) or "scalar"
    name = "".join(c if c.isprintable() and c not in "*/\\" else "_" for c in tensor.name)
    return f"  static {kind} {side}{index}[{max(count, 1)}]; /* {name}: {tensor.dtype}, {shape} */\n"
