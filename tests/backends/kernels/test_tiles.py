"""Products of tiles are exact, where every matrix lies right before memory that must not be read."""

from __future__ import annotations

import ctypes
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import pytest
from kernel_runner import run

from graphopt.targets import Isa
from graphopt_backends.kernels.conv import Window
from graphopt_backends.kernels.epilogue import Epilogue
from graphopt_backends.kernels.expression import as_type, call, number, operand
from graphopt_backends.kernels.tile_conv import TileConv
from graphopt_backends.kernels.tile_gemm import TileGemm
from graphopt_backends.kernels.tiles import Chunks, tiles_pay
from graphopt_backends.x86 import TARGETS, X86Backend

Kind = Literal["u8s8", "s8s8"]

_TARGET = next(target for target in TARGETS if target.device == "amx")
_LIMITS = {"u8s8": (0, 255, np.uint8), "s8s8": (-128, 127, np.int8)}
_SUMS = Epilogue(operand(0, "int32"), bias=True)
_PAGE = 4096


@pytest.fixture(scope="module")
def isa() -> Isa:
    """A CPU with tiles, which the system lets this process use."""
    if X86Backend().how(_TARGET) != "executed":
        pytest.skip("no CPU with AMX here")
    arch_prctl, request, tiles = 158, 0x1023, 18
    assert ctypes.CDLL(None).syscall(arch_prctl, request, tiles) == 0
    assert _TARGET.isa
    return _TARGET.isa


def _drawn(random: np.random.Generator, kind: str, *shape: int) -> np.ndarray:
    """Numbers of a range; often its ends only, where sums become as large as they can."""
    least, most, dtype = _LIMITS[kind]
    ends = random.random() < 0.3
    return (random.choice([least, most], shape) if ends else random.integers(least, most + 1, shape)).astype(dtype)


def _fenced(array: np.ndarray) -> np.ndarray:
    """The same array right before a page that must not be touched."""
    libc = ctypes.CDLL(None)
    libc.mmap.restype, libc.mmap.argtypes = ctypes.c_void_p, [ctypes.c_void_p, *[ctypes.c_size_t] * 5]
    room = -(-array.nbytes // _PAGE) * _PAGE
    memory = libc.mmap(None, room + _PAGE, 3, 0x22, 2**64 - 1, 0)
    libc.mprotect(ctypes.c_void_p(memory + room), ctypes.c_size_t(_PAGE), 0)
    held = (ctypes.c_uint8 * array.nbytes).from_address(memory + room - array.nbytes)
    found = np.ctypeslib.as_array(held).view(array.dtype).reshape(array.shape)
    found[...] = array
    return found


@pytest.mark.parametrize("kind", ["u8s8", "s8s8"])
@pytest.mark.parametrize(
    ("rows", "columns", "depth", "pitch"),
    [(1, 16, 64, 0), (16, 33, 48, 50), (17, 32, 65, 0), (49, 70, 130, 192), (100, 20, 256, 256), (33, 100, 8, 0)],
)
def test_products_are_exact_and_read_nothing_behind_matrices(
    isa: Isa, kind: Kind, rows: int, columns: int, depth: int, pitch: int
) -> None:
    random = np.random.default_rng(rows)
    for turn in range(2):
        a, w = _drawn(random, kind, rows * (pitch or depth)), _drawn(random, "s8s8", depth, columns)
        a = a[: (rows - 1) * (pitch or depth) + depth]
        seen = np.lib.stride_tricks.as_strided(a, (rows, depth), (pitch or depth, 1))
        bias = random.integers(-(2**20), 2**20, columns).astype(np.int32)
        kernel = TileGemm(isa, kind, rows, columns, depth, _SUMS, pitch)
        arrays = [_fenced(a), _fenced(kernel.pack(w)), _fenced(kernel.pack_column(bias))]
        got = run(kernel, arrays, np.empty((rows, columns), np.int32), tasks=1 + 2 * turn)
        np.testing.assert_array_equal(got, seen.astype(np.int32) @ w + bias)


def test_the_epilogue_takes_the_sums_of_every_part_of_the_rows(isa: Isa) -> None:
    random, (rows, columns, depth) = np.random.default_rng(3), (200, 72, 128)
    a, w = _drawn(random, "u8s8", rows, depth), _drawn(random, "s8s8", depth, columns)
    other = random.integers(0, 255, (rows, columns)).astype(np.uint8)
    scaled = call("mul", as_type(operand(0, "int32"), "float32"), number(2.0**-14))
    added = call("add", scaled, as_type(operand(1, "uint8"), "float32"))
    clipped = call("min", call("max", call("round", added), number(0)), number(255))
    epilogue = Epilogue(as_type(clipped, "uint8"), ((columns, 1),))
    kernel = TileGemm(replace(isa, level2_bytes=16000, cores=1), "u8s8", rows, columns, depth, epilogue)
    got = run(kernel, [a, kernel.pack(w), other], np.empty((rows, columns), np.uint8), tasks=3)
    expected = np.round((a.astype(np.int32) @ w) * np.float32(2.0**-14) + other)
    np.testing.assert_array_equal(got, np.clip(expected, 0, 255).astype(np.uint8))


_WINDOWS = {
    "border": (Window((3, 3), pads=(1, 1, 1, 1)), 64, 40),
    "strides": (Window((3, 2), (2, 2), pads=(0, 1, 1, 0)), 20, 16),
    "dilation": (Window((2, 3), dilations=(2, 2), pads=(1, 2, 0, 1)), 68, 33),
    "inside": (Window((2, 2)), 16, 64),
    "steps": (Window((1, 1), (2, 2)), 72, 20),
}


@pytest.mark.parametrize("kind", ["u8s8", "s8s8"])
@pytest.mark.parametrize("name", sorted(_WINDOWS))
def test_convolutions_are_exact(isa: Isa, kind: Kind, name: str) -> None:
    window, channels, filters = _WINDOWS[name]
    random = np.random.default_rng(channels)
    for height, width, small in ((7, 19, True), (9, 40, False)):
        x, zero = _drawn(random, kind, 2, height, width, channels), 3
        w = _drawn(random, "s8s8", filters, channels, *window.size)
        bias = random.integers(-(2**20), 2**20, filters).astype(np.int32)
        cpu = replace(isa, level2_bytes=30000) if small else isa
        kernel = TileConv(cpu, kind, 2, height, width, channels, filters, window, 1, _SUMS, zero)
        arrays = [_fenced(x), _fenced(kernel.pack(w)), _fenced(kernel.pack_column(bias))]
        expected = _convolved(x, w, window, zero) + bias
        np.testing.assert_array_equal(run(kernel, arrays, np.empty(expected.shape, np.int32), tasks=3), expected)


def _convolved(x: np.ndarray, w: np.ndarray, window: Window, border: int) -> np.ndarray:
    """Sums over all taps, one after the other."""
    top, left, bottom, right = window.pads
    padded = np.pad(x.astype(np.int32), ((0, 0), (top, bottom), (left, right), (0, 0)), constant_values=border)
    height, width = window.result(x.shape[1], x.shape[2])
    total: Any = 0
    for i in range(window.size[0]):
        for j in range(window.size[1]):
            y, z = i * window.dilations[0], j * window.dilations[1]
            seen = padded[:, y : y + height * window.strides[0] : window.strides[0]]
            seen = seen[:, :height, z : z + width * window.strides[1] : window.strides[1]][:, :, :width]
            total = total + seen @ w[:, :, i, j].T.astype(np.int32)
    return total


@pytest.mark.parametrize("run", [4, 48, 64, 65, 130, 1219])
def test_chunks_meet_every_weight_once(run: int) -> None:
    chunks, weight = Chunks(run), np.arange(1, run + 1)[:, None]
    parts = chunks.cut(weight).reshape(chunks.count, chunks.length)
    found = np.zeros(run, np.int64)
    for chunk, part in enumerate(parts):
        start = min(chunk * chunks.length, run - chunks.length)
        found[start : start + chunks.length] += part
    assert (found == weight[:, 0]).all()


def test_tiles_are_for_what_fills_them() -> None:
    assert _TARGET.isa
    assert tiles_pay(_TARGET.isa, "u8s8", 128, 768, 768)
    assert not tiles_pay(replace(_TARGET.isa, tiles=False), "u8s8", 128, 768, 768)
    assert not tiles_pay(_TARGET.isa, "f32", 128, 768, 768)
    for rows, columns, depth in ((1, 768, 768), (128, 8, 768), (128, 768, 32), (128, 768, 57)):
        assert not tiles_pay(_TARGET.isa, "u8s8", rows, columns, depth)
