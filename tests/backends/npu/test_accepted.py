"""Vela takes what is emitted, and leaves nothing to a CPU."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

pytest.importorskip("tosa_serializer")
if shutil.which("vela") is None:
    pytest.skip("vela is not installed", allow_module_level=True)

from npu_cases import CASES, REFUSED, SIXTEEN, model

from graphopt_backends.npu.network import emit
from graphopt_backends.npu.tosa import serialize

_DEVICES = {"u55": "ethos-u55-128", "u65": "ethos-u65-256", "u85": "ethos-u85-256"}
_TOUR = [
    "conv, groups", "conv, patches", "depthwise, long steps", "deconv, larger", "deconv, depthwise", "gemm, turned",
    "matmul of two, repeated", "sum", "sum with channels", "difference, broadcast", "product, squeezed", "minimum",
    "product with channels", "product with a constant", "prelu", "norm", "swish", "max pool, wide strides",
    "average pool, borders", "global average", "mean of channels", "sum of the last axis", "argmax of channels",
    "concat", "split", "slice, steps", "slice backwards", "pad with a number", "transpose samples", "reshape",
    "depth to space", "space to depth", "softmax of channels", "resize half_pixel, floor, 7 x 9", "resize by scales",
    "interpolate half_pixel, 8 x 10", "interpolate asymmetric, 12 x 15",
]  # fmt: skip


def _check(names: list[str], family: str, folder: Path, dtype: str = "int8") -> None:
    path = folder / "model.tosa"
    path.write_bytes(serialize(emit(model(*names, dtype=dtype), family)))
    command = ["vela", str(path), "--accelerator-config", _DEVICES[family], "--output-format", "raw", "--output-dir"]
    done = subprocess.run([*command, str(folder)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert re.search(r"CPU operators = 0 ", done.stdout), done.stdout


@pytest.mark.parametrize("family", _DEVICES)
def test_vela_takes_one_operator_of_every_kind(family: str, tmp_path: Path) -> None:
    _check(_TOUR, family, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["u55", "u85"])
def test_vela_takes_every_way_of_every_operator(family: str, tmp_path: Path) -> None:
    taken = [name for name in CASES if name not in REFUSED[family]]
    for start in range(0, len(taken), 30):
        _check(taken[start : start + 30], family, tmp_path)


@pytest.mark.slow
def test_vela_takes_activations_of_sixteen_bits(tmp_path: Path) -> None:
    for start in range(0, len(SIXTEEN), 30):
        _check(SIXTEEN[start : start + 30], "u55", tmp_path, "int16")
