"""The C header: that it compiles without a warning, and that a program that includes it finds what Vela made.

The outputs of Vela beside this file were made by Vela 5.2.0 of three convolutions in a row, 8 x 8 with 16 channels.
"""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from graphopt.errors import BackendError
from graphopt_backends.npu.header import NpuPart, Port, header_text
from graphopt_backends.npu.raw import read_raw

SAMPLES = Path(__file__).parent / "samples"
SHAPE = (1, 8, 8, 16)
STRICT = ("-Wall", "-Wextra", "-pedantic", "-Werror")
DIALECTS = [("cc", "c99", "c"), ("cc", "c17", "c"), ("c++", "c++11", "cc"), ("c++", "c++20", "cc")]

PROGRAM = """
#define GRAPHOPT_NPU_WEIGHTS __attribute__((section("weights")))
#include "model.npu.h"
#include <stdio.h>
#include <string.h>

int main(void) {
  static uint8_t scratch[KWS_NPU0_SCRATCH_SIZE] __attribute__((aligned(16)));
  static uint8_t fast[KWS_NPU1_SCRATCH_FAST_SIZE] __attribute__((aligned(16)));
  const int shape[KWS_NPU0_INPUT0_RANK] = KWS_NPU0_INPUT0_SHAPE;
  uint64_t address[KWS_NPU1_REGIONS];
  size_t size[KWS_NPU1_REGIONS];
  unsigned long sum = 0;
  KWS_NPU0_INPUT0_TYPE value = -3;
  kws_npu0_regions(address, size, scratch, NULL);
  printf("%d %d %d\\n", address[0] == (uintptr_t)kws_npu0_weights, address[1] == (uintptr_t)scratch, (int)size[1]);
  kws_npu1_regions(address, size, scratch, fast);
  printf("%d %d %d\\n", address[0] == (uintptr_t)kws_npu1_weights, address[2] == (uintptr_t)fast, (int)size[2]);
  for (size_t i = 0; i < KWS_NPU0_WEIGHTS_SIZE; ++i) sum = sum * 31 + kws_npu0_weights[i];
  printf("%lu %d\\n", sum, (int)(((uintptr_t)kws_npu0_weights | (uintptr_t)kws_npu0_commands) % 16));
  printf("%.4s %d\\n", (const char *)kws_npu0_commands, KWS_NPU0_COMMANDS_SIZE);
  printf("%d %d %d\\n", shape[0], shape[3], (int)(sizeof(value) * KWS_NPU0_INPUT0_ELEMENTS));
  printf("%.9g %d\\n", (double)(((float)value - KWS_NPU0_INPUT0_ZERO_POINT) * KWS_NPU0_INPUT0_SCALE), (int)value);
  memset(scratch + KWS_NPU0_OUTPUT0_OFFSET, 0, KWS_NPU0_OUTPUT0_SIZE);
  return 0;
}
"""


def _part(accelerator: str, **ports: tuple[Port, ...]) -> NpuPart:
    inputs = ports.get("inputs", (Port("input", "int8", SHAPE, 0.1, -128),))
    outputs = ports.get("outputs", (Port("logits */ #include <nothing>\n\\", "int8", SHAPE, 2.0, 3),))
    return NpuPart(SAMPLES / f"{accelerator}.npz", inputs, outputs, f"{accelerator} at 500 MHz")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    parts = [_part("ethos-u55-128"), _part("ethos-u65-512")]
    (tmp_path / "model.npu.h").write_text(header_text("model.npu.h", "KWS", parts), "utf8")
    return tmp_path


def _compile(command: list[str], folder: Path) -> None:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(("compiler", "standard", "ending"), DIALECTS)
def test_c_and_cpp_take_the_header_without_a_warning(compiler: str, standard: str, ending: str, folder: Path) -> None:
    if shutil.which(compiler) is None:
        pytest.skip(f"{compiler} not found")
    (folder / f"file.{ending}").write_text('#include "model.npu.h"\n#include "model.npu.h"\nint used;\n', "utf8")
    _compile([compiler, *STRICT, f"-std={standard}", "-c", f"file.{ending}", "-o", "file.o"], folder)


def test_a_cortex_m_compiler_takes_the_header(folder: Path) -> None:
    if shutil.which("arm-none-eabi-gcc") is None:
        pytest.skip("arm-none-eabi-gcc not found")
    (folder / "file.c").write_text('#include "model.npu.h"\nint used;\n', "utf8")
    _compile(["arm-none-eabi-gcc", "-mcpu=cortex-m55", *STRICT, "-c", "file.c", "-o", "file.o"], folder)


def test_a_program_finds_what_vela_made(folder: Path) -> None:
    if shutil.which("cc") is None:
        pytest.skip("cc not found")
    (folder / "program.c").write_text(PROGRAM, "utf8")
    _compile(["cc", *STRICT, "program.c", "-o", "program"], folder)
    done = subprocess.run([str(folder / "program")], capture_output=True, text=True, check=True)
    first, second = (read_raw(SAMPLES / f"{name}.npz") for name in ("ethos-u55-128", "ethos-u65-512"))
    total = 0
    for byte in first.weights:
        total = (total * 31 + byte) % 2**64
    assert done.stdout.splitlines() == [
        f"1 1 {first.scratch.size}",
        f"1 1 {second.scratch_fast.size}",
        f"{total} 0",
        f"COP1 {len(first.commands)}",
        "1 16 1024",
        "12.5 -3",
    ]


def test_names_in_c_come_from_the_model_whatever_it_is_called(folder: Path) -> None:
    for model, name in (("MobileNet v2-0.35", "mobilenet_v2_0_35"), ("9.onnx", "model_9_onnx"), ("模型", "model")):
        text = header_text("model.npu.h", model, [_part("ethos-u55-128")])
        assert f"static const uint8_t {name}_npu0_commands[" in text
        assert f"#ifndef GRAPHOPT_{name.upper()}_NPU_H" in text


def test_the_header_says_how_it_is_used(folder: Path) -> None:
    text = (folder / "model.npu.h").read_text("utf8")
    assert "ethosu_invoke(driver, kws_npu0_commands, KWS_NPU0_COMMANDS_SIZE, address, size, KWS_NPU0_REGIONS)" in text
    assert "ethos-u55-128 at 500 MHz" in text
    assert "logits _/ #include <nothing>__: int8, 1 x 8 x 8 x 16" in text
    assert text == header_text("model.npu.h", "KWS", [_part("ethos-u55-128"), _part("ethos-u65-512")])


def test_a_number_without_a_scale_has_none(folder: Path) -> None:
    text = header_text("model.npu.h", "m", [_part("ethos-u55-128", inputs=(Port("x", "int8", SHAPE),))])
    assert "M_NPU0_INPUT0_SCALE" not in text.split("*/", 1)[1]
    assert "#define M_NPU0_OUTPUT0_SCALE 2.0f" in text


@pytest.mark.parametrize(
    ("ports", "fact"),
    [
        ({"inputs": ()}, "has 1 inputs, not 0"),
        (
            {"inputs": (Port("x", "int16", SHAPE),)},
            "input 'x' has 1024 elements of 1 bytes, not int16 of (1, 8",
        ),
        (
            {"outputs": (Port("y", "int8", (1, 8, 8)),)},
            "output 'y' has 1024 elements of 1 bytes, not int8 of (1, 8",
        ),
        ({"outputs": (Port("y", "float32", SHAPE),)}, "output 'y' has 1024 elements of 1 bytes, not float32"),
    ],
)
def test_ports_that_are_not_those_of_vela_are_refused(ports: dict[str, tuple[Port, ...]], fact: str) -> None:
    with pytest.raises(BackendError) as caught:
        header_text("model.npu.h", "m", [_part("ethos-u55-128", **ports)])
    assert fact in str(caught.value)


def test_a_file_that_vela_did_not_write_is_refused_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "text.npz").write_text("no archive", "utf8")
    np.savez(tmp_path / "other.npz", weight_data=np.zeros(3))
    for name in ("text.npz", "other.npz", "missing.npz"):
        with pytest.raises(BackendError, match=f"{name}: is no raw output of Vela") as caught:
            read_raw(tmp_path / name)
        assert "\n" not in str(caught.value)
